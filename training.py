"""What every training entry does around its steps: the loop, checkpoints, the log, evaluations, and how it ends.

Shapes: B batch, C channels, H = W size.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import config as configuration
from checkpoint import RunFolder
from dataset.prepared import PreparedImages, text_encoders
from kernels import resolve_backend
from models.cost import held, peak_flops
from runtime import Ranks, Stop, environment, plain_errors, tf32


def launch(kind: type, config):
    """Start or resume the run of a `Run` class to its end. Exits with one line on a user's mistake or a full disk."""
    with Ranks() as ranks, tf32(config.tf32):
        with plain_errors(ValueError, OSError):
            if config.dry_run and config.model and config.data and not Path(config.data).exists():
                if ranks.main:
                    print(f"data       {config.data} is not there; the shapes are those of {config.model} by default")
                    print(kind.outline(config))
                return
            run = kind(config, ranks)
            run.describe()
            if config.dry_run:
                run.wrapped = None  # see __exit__
                return
            run.open_folder()
        with plain_errors(OSError), run:
            stopped_by = run.train()
    if stopped_by:
        raise SystemExit(128 + stopped_by)


class Run:
    """One run of an entry, whose class adds a constructor, `outline`, `describe`, `batches` and `train_step`.

    The constructor sets `inputs`, `model`, its constructor's `arguments`, `ema`, `tally`, `wrapped` (by `parallel`),
    `parts` (see RunFolder), `flops` of a step for an image, and `evaluate` where there is to be an evaluation.
    """

    aligned_steps = 0  # the first of which also align

    def __init__(self, config, ranks: Ranks):
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.share, self.micro = split_batch(config, ranks.world)
        bf16 = config.precision == "bf16" or config.precision == "auto" and self.device.type == "cuda"
        # Without autocast's cache where there are shards: it would keep whole weights.
        options = {"enabled": bf16, "cache_enabled": not config.shard}
        self.autocast = functools.partial(torch.autocast, self.device.type, torch.bfloat16, **options)
        resolve_backend(config.route_backend, self.device)  # refuses one that cannot run here
        if config.shard and ranks.host_group is None:
            raise ValueError("shard = True: there are no processes to share the model; start them with torchrun")
        self.evaluate = None
        # Seconds are of training alone. Checkpoints hold what is due, so that interrupted work is repeated.
        self.progress = {"step": 0, "seconds": 0.0, "logged_step": 0, "logged_seconds": 0.0}
        self.progress |= {"evaluation_due": False, "diagnosis_due": False}

    def open_folder(self, **more):
        """Claim the run folder, and take up the run in it, if any. more: what else decides the run (RunFolder)."""
        data, inputs = self.inputs.data, self.inputs
        contents = {
            "content of data": data.content,
            "content of encoder": [encoder.fingerprint for encoder in inputs.encoders],
            "content of autoencoder": inputs.autoencoder.fingerprint,
            "content of judges": self.evaluate.fingerprints if self.evaluate else [],
            "classes with images": data.labels.unique().tolist(),
            **more,
        }
        if inputs.text:
            encoder = text_encoders(data.folder)[inputs.text]
            contents |= {"content of text": inputs.text, "text encoder": encoder["name"]}
            contents["content of captions"] = encoder["captions"]
        self.folder = RunFolder(self.config, self.ranks)
        self.folder.resume(contents, self.parts, self.progress)
        if self.progress["step"]:
            self.say(f"resumed    at step {self.progress['step']}")
        self.progress["diagnosis_due"] &= self.config.diagnose_every > 0  # it may have been switched off since
        self.progress["evaluation_due"] &= self.evaluate is not None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.wrapped = None  # it must go before the process group, or gloo may wait for ever
        self.folder.close()

    # ---- networks ----

    def place(self, *models: torch.nn.Module):
        """Moves models to the device: whole, or this process's shards."""
        for model in models:
            if self.config.shard:
                shard(model, self.ranks)
            else:
                model.to(self.device)

    def parallel(self, model: torch.nn.Module) -> torch.nn.Module:
        """What to call in place of a model so that its gradients are means over the processes."""
        alone = self.ranks.world == 1 or self.config.shard  # shards see to it themselves
        return model if alone else DistributedDataParallel(model)

    # ---- steps ----

    def train(self):
        """Train to max_steps. Returns the signal that ended it early, or 0."""
        config, progress = self.config, self.progress
        if config.compile:
            self.model.compile()
        shown = {"desc": self.folder.path.name, "unit": "step", "mininterval": 1, "disable": not self.ranks.main}
        bar = tqdm(initial=progress["step"], total=config.max_steps, **shown)
        with Stop("stopping: the run is saved first", self.ranks) as stop:
            stopped_by = self.evaluate_if_due(stop, bar)
            clock = time.perf_counter()
            for batch in self.batches() if not stopped_by else ():
                self.train_step(batch)
                progress["step"] += 1
                bar.update()
                stopped_by, last = stop.agreed(), progress["step"] == config.max_steps
                # Also at the last aligned step, so that no line averages steps with and without alignment.
                log_due = last or self.due(config.log_every) or progress["step"] == self.aligned_steps
                snapshot = self.due(config.snapshot_every)
                save_due = last or stopped_by or snapshot or self.due(config.checkpoint_every)
                progress["evaluation_due"] = self.evaluate is not None and (last or self.due(config.eval_every))
                progress["diagnosis_due"] = self.due(config.diagnose_every)
                if not (log_due or save_due or progress["evaluation_due"] or progress["diagnosis_due"]):
                    continue
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                progress["seconds"] += time.perf_counter() - clock
                if log_due:
                    bar.set_postfix(self.write_log())
                if save_due:  # before the evaluation, which may take long
                    self.save(snapshot)
                stopped_by = stopped_by or self.evaluate_if_due(stop, bar)
                if stopped_by:
                    break
                clock = time.perf_counter()
        bar.close()
        end = ", saved; the same command again goes on from here" if stopped_by else ", complete"
        self.say(f"{self.folder.path}: step {progress['step']} of {config.max_steps}{end}")
        return stopped_by

    @property
    def mine(self) -> slice:
        """This process's share of the global batch."""
        return slice(self.ranks.rank * self.share, (self.ranks.rank + 1) * self.share)

    def due(self, every):
        return every > 0 and self.progress["step"] % every == 0

    def gradients(self, wrapped: torch.nn.Module, losses_of: Callable[[slice], Iterable]) -> torch.Tensor:
        """Gradients of the loss over this process's share of the batch, in parts of micro_batch_size.

        losses_of(rows): the loss of a part and what is logged beside it, all scalars.
        Returns these as means over the global batch.
        """
        means, count = 0.0, self.share // self.micro
        for part in range(count):
            # Shards are exchanged in each part: what waits would be whole gradients.
            accumulate = part < count - 1 and isinstance(wrapped, DistributedDataParallel)
            with wrapped.no_sync() if accumulate else contextlib.nullcontext():
                losses = list(losses_of(slice(part * self.micro, (part + 1) * self.micro)))
                (losses[0] / count).backward()
            means = means + torch.stack(losses).detach() / count
        return self.ranks.sum(means / self.ranks.world)

    def update(self, optimizer: torch.optim.Optimizer, weights: list, losses: torch.Tensor) -> tuple:
        """An optimiser step by the gradients at hand, unless they or the losses are not finite.

        Returns the norm of the gradients and whether the step was taken, both on the device.
        """
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, self.config.grad_clip)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        finite = losses.isfinite().all() & grad_norm.isfinite()
        # The fused optimiser leaves weights and moments alone where this is 1, without asking the host.
        optimizer.found_inf = (~finite).float()
        optimizer.step()
        optimizer.zero_grad()
        return grad_norm, finite

    def save(self, snapshot=False):
        self.folder.save(self.parts, self.progress, self.arguments, snapshot)

    def fade_in(self):
        """Sets how far routing has faded in (models/streams.py), in the model and its averages."""
        for model in (self.model, *self.ema.models.values()):
            model.gamma = configuration.retrofit_gamma(vars(self.config), self.progress["step"])

    # ---- records ----

    def write_log(self):
        """Write the means since the last line. Returns what the progress bar shows."""
        config, progress = self.config, self.progress
        steps, seconds = (progress[key] - progress[f"logged_{key}"] for key in ("step", "seconds"))
        progress |= {"logged_step": progress["step"], "logged_seconds": progress["seconds"]}
        means, skipped, longest = self.tally.read()
        if progress["step"] > self.aligned_steps:
            means.pop("alignment_loss", None)
        rate = steps * config.batch_size / max(seconds, 1e-9)
        record = self.record() | means | {"skipped_steps": skipped, "samples_per_second": round(rate, 2)}
        if peak := peak_flops(self.device):
            record["mfu"] = round(self.flops * rate / self.ranks.world / peak, 4)
        if self.device.type == "cuda":
            record["peak_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
        self.folder.log.write(record)
        if longest >= config.max_skipped_steps:
            raise SystemExit(
                f"error: {longest} steps in a row had a non-finite loss or gradient (max_skipped_steps = "
                f"{config.max_skipped_steps}), {skipped} of {progress['step']} in all. Weights were not touched by "
                f"them. Try a lower --lr (now {config.lr:g}) or --precision fp32, with another --out"
                + f"; --init-from {self.folder.last} starts from the last checkpoint, where there is one"
                * hasattr(config, "init_from")
            )
        return {"loss": f"{means['loss']:.4f}"} if means else {"skipped": skipped}

    def record(self):
        step, seconds = self.progress["step"], round(self.progress["seconds"], 3)
        return {"step": step, "images": step * self.config.batch_size, "seconds": seconds}

    def evaluate_if_due(self, stop, bar):
        """Do what is due of evaluation and diagnosis. Returns the signal that cut it short, after saving, or 0."""
        progress = self.progress
        if not (progress["evaluation_due"] or progress["diagnosis_due"]):
            return 0
        self.fade_in()
        if progress["evaluation_due"]:
            began = time.perf_counter()
            distances, grid = self.evaluate(self.ema.first, interrupted=stop.agreed)
            if distances is None:
                self.save()  # with the evaluation still due
                return stop.agreed()
            progress["evaluation_due"] = False
            taken = {"evaluation_seconds": round(time.perf_counter() - began, 3)}
            self.folder.log.write(self.record() | distances | taken)
            if self.ranks.main:
                path = self.folder.path / "samples" / f"{progress['step']:07d}.png"
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)
                self.folder.log.image("samples", grid, progress["step"])
            bar.set_postfix({name: f"{distance:.3f}" for name, distance in distances.items()})
        if progress["diagnosis_due"]:
            self.diagnose()
            progress["diagnosis_due"] = False
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # the log is of training alone
        if progress["step"] == self.config.max_steps:
            self.save()  # there is no later checkpoint to say that this was done
        return 0

    def diagnose(self):
        """The figures of analysis.diagnose for the first average, by the main process; the others wait."""
        if self.ranks.main:
            from analysis.diagnose import diagnose  # nothing else needs matplotlib and scikit-learn

            inputs, config, step = self.inputs, self.inputs.config, self.progress["step"]
            diagnose(
                self.ema.first,
                PreparedImages(config.data, latents=inputs.autoencoder.content, text=inputs.text),
                inputs.autoencoder,
                inputs.encoders[0] if inputs.encoders else None,
                self.folder.path / "diagnosis" / f"{step:07d}",
                num_images=self.config.diagnose_images,
                path=config.path,
                provenance={"average": str(self.config.ema_decays[0]), "step": step, **environment(self.ranks)},
            )
        self.ranks.barrier()

    def resources(self, kept: int, more: int, shared: int = 0) -> str:
        """Lines on batch, memory and device; the arguments are those of `held`."""
        precision = "bf16 autocast" if self.autocast.keywords["enabled"] else "fp32"
        return (
            f"batch      {self.config.batch_size} global = {self.ranks.world} processes x {self.share} local, "
            f"in {self.share // self.micro} accumulated parts of {self.micro}\n"
            f"{held(kept, more, shared, self.ranks.world if self.config.shard else 1)}\n"
            f"device     {self.device}, {precision}, torch {torch.__version__}"
        )

    def say(self, text):
        if self.ranks.main:
            print(text, flush=True)


def shard(model: torch.nn.Module, ranks: Ranks):
    """Leaves each process its part of every weight of a model, on its device (FSDP2), in place.

    Blocks are not called whole, so it is their sublayers that are gathered when they are called; all other weights are
    gathered for as long as the model computes.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in model.blocks:
        for sublayer in block.children():
            if any(True for _ in sublayer.parameters()):
                fully_shard(sublayer, mesh=mesh)
    # By default these would stay whole until a backward pass, which averages do not have: theirs would not move on.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def split_batch(config, world):
    """Images per process, and per part that it takes at a time. Raises ValueError where they do not come out even."""
    share = config.batch_size // world
    micro = min(share, config.micro_batch_size or share)
    if share < 1 or share * world != config.batch_size or share % micro:
        raise ValueError(
            f"batch_size = {config.batch_size} cannot be shared evenly among {world} processes in parts of "
            f"micro_batch_size = {micro}"
        )
    return share, micro


class Tally:
    """Means over the logged interval and counts of skipped steps, kept on the device until they are read."""

    def __init__(self, device: torch.device, names: tuple):
        self.names = names
        self.state = {"sums": torch.zeros(len(names), dtype=torch.float64, device=device)}
        for name in ("counted", "skipped", "in_row", "longest"):
            self.state[name] = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, values: torch.Tensor, finite: torch.Tensor):
        """values: as in `names`; finite: whether the step was taken. Both on the device."""
        state = self.state
        state["sums"] += torch.where(finite, values.double(), 0)
        state["counted"] += finite
        state["skipped"] += ~finite
        state["in_row"] = torch.where(finite, 0, state["in_row"] + 1)
        state["longest"] = torch.maximum(state["longest"], state["in_row"])

    def read(self) -> tuple[dict, int, int]:
        """Means over the interval ({} if every step was skipped), steps skipped in all, and the most of them in a row.

        Starts a new interval.
        """
        count, skipped, longest = (int(self.state[name]) for name in ("counted", "skipped", "longest"))
        means = dict(zip(self.names, (self.state["sums"] / count).tolist())) if count else {}
        self.state["sums"].zero_()
        self.state["counted"].zero_()
        self.state["longest"].copy_(self.state["in_row"])
        return means, skipped, longest

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict):
        for name, value in self.state.items():
            value.copy_(state[name])

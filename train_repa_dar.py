"""Trains SiT with residual, DAR or one of two baseline routings, with or without REPA.

    python train_repa_dar.py --config digits --routing dar --alignment repa
    torchrun --nproc_per_node=8 train_repa_dar.py --config cifar10 --routing dar --alignment repa

`make quickstart` shows how to prepare the data for the first command. The same command again resumes the run, bit for
bit on a CPU. `--help` lists every option, docs/configuration.md explains them.

Shapes: B batch, C channels, H = W size, T tokens.
"""

import contextlib
import functools
import gc
import time
from pathlib import Path

import torch
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import config as configuration
from checkpoint import EMA, RunFolder, load_published, load_weights
from dataset.inputs import Inputs
from dataset.prepared import PreparedImages
from eval.online import OnlineEvaluation
from kernels import resolve_backend, why_not_fused
from loss import Loss, interpolant
from models.cost import flops_per_image, parameters_by_part, peak_flops
from models.sit import SIT_MODELS
from models.streams import ResidualStream
from runtime import Ranks, Stop, Tally, Use, derive_seed, environment, plain_errors, tf32

KERNELS = {"torch": "plain PyTorch", "triton": "fused Triton kernels", "cpu": "fused C"}


def main(argv=None):
    config = configuration.parse(argv)
    with Ranks() as ranks, tf32(config.tf32):
        with plain_errors(ValueError, OSError):
            trainer = Trainer(config, ranks)
            trainer.describe()
            if config.dry_run:
                trainer.wrapped = None  # see __exit__
                return
            trainer.open_folder()
        with plain_errors(OSError), trainer:
            stopped_by = trainer.train()
    if stopped_by:
        raise SystemExit(128 + stopped_by)


class Trainer:
    """One run: its model and what trains it."""

    def __init__(self, config, ranks):
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.share, self.micro = split_batch(config, ranks.world)
        bf16 = config.precision == "bf16" or config.precision == "auto" and self.device.type == "cuda"
        self.autocast = functools.partial(torch.autocast, self.device.type, torch.bfloat16, enabled=bf16)
        resolve_backend(config.route_backend, self.device)  # refuses one that cannot run here

        self.inputs = Inputs(config, ranks)
        self.loss = Loss(config.path, config.time_sampling, config.proj_coeff, config.spatial_norm)
        last = min(config.align_steps or config.max_steps, config.max_steps)
        self.aligned_steps = last if self.inputs.encoders else 0
        self.arguments = config.model_arguments() | {
            "input_size": self.inputs.shape[1],
            "in_channels": self.inputs.shape[0],
            "num_classes": self.inputs.data.num_classes,
            "align_dims": tuple(encoder.dim for encoder in self.inputs.encoders),
        }
        self.model = self.build_model().to(self.device)
        self.flops = 3 * flops_per_image(config.model, self.arguments)  # a backward pass is two forward passes
        self.wrapped = DistributedDataParallel(self.model) if ranks.world > 1 else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.ema = EMA(self.model, config.ema_decays)
        self.tally = Tally(self.device)
        self.parts = {"model": self.model, "emas": self.ema, "optimizer": self.optimizer, "tally": self.tally}
        # Seconds are of training alone. Checkpoints hold what is due, so that interrupted work is repeated.
        self.progress = {"step": 0, "seconds": 0.0, "logged_step": 0, "logged_seconds": 0.0}
        self.progress |= {"evaluation_due": False, "diagnosis_due": False}
        self.evaluate = None
        if config.eval_every:
            self.evaluate = OnlineEvaluation(config, ranks, self.inputs, self.autocast)

    def build_model(self):
        config = self.config
        torch.manual_seed(derive_seed(config.seed, Use.WEIGHTS))
        model = SIT_MODELS[config.model](
            **self.arguments,
            route_backend=config.route_backend,
            checkpoint_activations=config.checkpoint_activations,
        )
        if config.init_from and not Path(config.out, "last.pt").is_file():
            try:
                missing, unused = load_published(model, load_weights(config.init_from), config.new_labels)
            except ValueError as error:
                raise ValueError(f"init_from = {config.init_from!r}: {error}") from None
            absent = f"not in it: {abridged(missing)}; not used: {abridged(unused)}"
            self.say(
                f"initial weights from {config.init_from}; {absent}" + "; label table reinitialised" * config.new_labels
            )
        return model

    def open_folder(self):
        """Claim the run folder, and take up the run in it, if any."""
        data, inputs = self.inputs.data, self.inputs
        contents = {
            "content of data": data.content,
            "content of encoder": [encoder.fingerprint for encoder in inputs.encoders],
            "content of autoencoder": inputs.autoencoder.fingerprint,
            "content of judges": self.evaluate.fingerprints if self.evaluate else [],
            "classes with images": data.labels.unique().tolist(),
        }
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

    # ---- training ----

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

    def due(self, every):
        return every > 0 and self.progress["step"] % every == 0

    def batches(self):
        """Batches from the current step on; after alignment ends, what only it needs is no longer read."""
        step, change, end = self.progress["step"], self.aligned_steps, self.config.max_steps
        yield from self.inputs.batches(self.inputs.data, step, change, self.ranks)
        yield from self.inputs.batches(self.inputs.plain_data, max(step, change), end, self.ranks)

    def train_step(self, batch):
        """One optimiser step on this process's share of the global batch, in parts of micro_batch_size."""
        self.fade_in()
        if self.progress["step"] >= self.aligned_steps and self.model.align_depth:
            self.end_alignment()
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        draws, posterior = self.draw()
        losses, count = torch.zeros(3, device=self.device), self.share // self.micro
        for part in range(count):
            rows = slice(part * self.micro, (part + 1) * self.micro)
            images = {name: value[rows] for name, value in batch.items()}
            x = self.inputs.clean(images, posterior[rows])
            accumulate = part < count - 1 and self.ranks.world > 1
            with self.wrapped.no_sync() if accumulate else contextlib.nullcontext():
                with self.autocast():
                    tokens = self.inputs.tokens(images) if self.model.align_depth else None
                    total, parts = self.loss(self.wrapped, x, images["labels"], draws[rows], tokens)
                (total / count).backward()
            losses += torch.stack([total, *parts.values()]).detach() / count
        losses = self.ranks.sum(losses / self.ranks.world)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.ema.weights, self.config.grad_clip)
        finite = losses.isfinite().all() & grad_norm.isfinite()
        # The fused optimiser leaves weights and moments alone where this is 1, without asking the host.
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        self.tally.add(torch.cat([losses, grad_norm.view(1)]), finite)

    def draw(self):
        """This process's share of the step's random numbers, which follow from (seed, step) for the global batch."""
        seed = derive_seed(self.config.seed, Use.STEP, self.progress["step"])
        generator, shape = torch.Generator(self.device).manual_seed(seed), (self.config.batch_size, *self.inputs.shape)
        draws = self.loss.draw(shape, generator)
        posterior = torch.randn(shape, generator=generator, device=self.device)  # of latents
        mine = slice(self.ranks.rank * self.share, (self.ranks.rank + 1) * self.share)
        return draws[mine], posterior[mine]

    def fade_in(self):
        for model in (self.model, *self.ema.models.values()):
            model.gamma = configuration.retrofit_gamma(vars(self.config), self.progress["step"])

    def end_alignment(self):
        """From here on the model only denoises, and its projectors stay as they are.

        Of HASTE (arXiv 2505.16792) this is the end after a fixed number of steps; its alignment of attention maps and
        its trigger by gradients are not implemented.
        """
        for model in (self.model, *self.ema.models.values()):
            model.align_depth = ()
        # Without a gradient, rather than with one of zero, which would let AdamW go on by its momentum.
        self.model.projectors.requires_grad_(False)
        self.flops = 3 * flops_per_image(self.config.model, self.arguments | {"align_dims": ()})
        if self.ranks.world > 1:  # the old wrapper would wait for the projectors' gradients
            self.wrapped = None
            gc.collect()  # frees the old wrapper's buffers first
            self.wrapped = DistributedDataParallel(self.model)

    def save(self, snapshot=False):
        self.folder.save(self.parts, self.progress, self.arguments, snapshot)

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
                f"them. Try a lower --lr (now {config.lr:g}) or --precision fp32, with another --out; --init-from "
                f"{self.folder.last} starts from the last checkpoint, where there is one"
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

            inputs, step = self.inputs, self.progress["step"]
            latents = "" if self.config.autoencoder == "pixels" else inputs.autoencoder.fingerprint
            diagnose(
                self.ema.first,
                PreparedImages(self.config.data, latents=latents),
                inputs.autoencoder,
                inputs.encoders[0] if inputs.encoders else None,
                self.folder.path / "diagnosis" / f"{step:07d}",
                num_images=self.config.diagnose_images,
                path=self.config.path,
                provenance={"average": str(self.config.ema_decays[0]), "step": step, **environment(self.ranks)},
            )
        self.ranks.barrier()

    def describe(self):
        """Print what the run is and what it takes."""
        config, model, inputs = self.config, self.model, self.inputs
        parts = parameters_by_part(model)
        total, states = sum(parts.values()), 3 + len(config.ema_decays)  # weights, two moments, averages
        routing = config.routing
        if model.router:
            routing += f" by {KERNELS[resolve_backend(config.route_backend, self.device)]}"
            if config.route_backend == "auto" and (reason := why_not_fused(self.device)):
                routing += f", no fused kernels: {reason}"
        alignment = config.alignment
        if 0 < self.aligned_steps < config.max_steps:
            alignment += f" for {self.aligned_steps} steps"
        if model.router and config.retrofit_steps:
            routing += f", fading in for {config.retrofit_steps} steps"
            if config.init_from and not Path(config.out, "last.pt").is_file():
                routing += f" from a velocity {self.retrofit_error():.1e} off that of residual addition (relative RMS)"
        for encoder in inputs.encoders:
            alignment += f", {encoder.name} ({encoder.grid[0]} x {encoder.grid[1]} tokens)"
        precision = "bf16 autocast" if self.autocast.keywords["enabled"] else "fp32"
        self.say(
            f"run        {config.out}, {config.max_steps} steps\n"
            f"data       {len(inputs.data)} images of {inputs.data.resolution} pixels, {inputs.data.num_classes} "
            f"classes; trained on {config.autoencoder}, {' x '.join(map(str, inputs.shape))}\n"
            f"model      {config.model}, {len(model.blocks)} blocks, {model.x_embedder.num_patches} tokens, "
            f"routing {routing}\n"
            f"alignment  {alignment}\n"
            f"parameters {total / 1e6:.2f} M: {', '.join(f'{name} {n / 1e6:.2f}' for name, n in parts.items())}\n"
            f"compute    {self.flops / 1e9:.4g} GFLOP of matrix products for an image in a training step, "
            f"encoders excluded\n"
            f"batch      {config.batch_size} global = {self.ranks.world} processes x {self.share} local, "
            f"in {self.share // self.micro} accumulated parts of {self.micro}; "
            f"{len(inputs.data) / config.batch_size:.4g} steps in an epoch\n"
            f"memory     {4 * total * (states + 1) / 2**30:.3g} GiB for weights, gradients, moments and averages, "
            f"activations excluded\n"
            f"disk       {4 * total * states / 2**30:.3g} GiB for a checkpoint\n"
            f"device     {self.device}, {precision}, torch {torch.__version__}"
        )

    @torch.no_grad()
    def retrofit_error(self):
        """How far the model is from residual addition with the same weights, on the first images at random times."""
        data, rows = self.inputs.plain_data, range(min(16, len(self.inputs.plain_data)))
        batch = {name: value.to(self.device) for name, value in data.__getitems__(rows).items()}
        draws = self.loss.draw((len(rows), *self.inputs.shape), torch.Generator(self.device).manual_seed(0))
        x_t, _ = interpolant(self.inputs.clean(batch, draws.noise), draws.noise, draws.t, self.config.path)
        self.fade_in()
        self.model.eval()
        with self.autocast():
            inputs = x_t, draws.t, batch["labels"]
            ours, residual = self.model(*inputs)[0], self.model(*inputs, make_stream=lambda v, e: ResidualStream(v))[0]
        self.model.train()
        return ((ours - residual).float().square().mean() / residual.float().square().mean()).sqrt().item()

    def say(self, text):
        if self.ranks.main:
            print(text, flush=True)


def abridged(names):
    return ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4) or "none"


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


if __name__ == "__main__":
    main()

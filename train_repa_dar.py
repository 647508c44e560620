"""Trains SiT with residual or DAR routing, or that of two baselines, with or without REPA.

    python train_repa_dar.py --config digits --routing dar --alignment repa
    torchrun --nproc_per_node=8 train_repa_dar.py --config cifar10 --routing dar --alignment repa

`make quickstart` shows how the data of the first are prepared. The same command again resumes the run, bit for bit on a
CPU. `--help` lists every option.

Shapes: B batch, C channels, H = W size, T tokens.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import signal
import time

import torch
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import config as configuration
from dataset.prepared import PreparedImages, ShuffledBatches
from kernels import resolve_backend
from loss import alignment_loss, denoising_loss, interpolant, sample_times, spatial_normalisation
from models.autoencoder import load_autoencoder
from models.encoders import FrozenEncoder
from models.sit import SIT_MODELS, flops_per_image, kept_for_backward, load_published, parameters_by_part
from eval.metrics import check_weights, npz_statistics
from eval.online import OnlineEvaluation
from runtime import (
    EMA,
    INITIAL_WEIGHTS,
    TRAINING,
    MetricsLog,
    Ranks,
    StopFlag,
    derive_seed,
    environment,
    load_file,
    load_weights,
    lock_folder,
    replaced,
)

# Dense bf16, with float32 accumulation. The PCIe cards of the same name are slower and come first.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
KERNELS = {"torch": "plain PyTorch", "triton": "fused Triton kernels"}


def main(argv=None):
    config = configuration.parse(argv)
    with Ranks() as ranks:
        try:
            trainer = Trainer(config, ranks)
            trainer.describe()
            if config.dry_run:
                return
            trainer.open_folder()
            trainer.resume()
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
        try:
            stopped_by = trainer.train()
        finally:
            trainer.close()
    if stopped_by:
        raise SystemExit(128 + stopped_by)


class Trainer:
    """One run: everything between the configuration and the files in its folder."""

    def __init__(self, config, ranks):
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.share, self.micro = split_batch(config, ranks.world)
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.tf32
        self.bf16 = config.precision == "bf16" or config.precision == "auto" and self.device.type == "cuda"
        self.autocast = functools.partial(torch.autocast, self.device.type, torch.bfloat16, enabled=self.bf16)

        images = PreparedImages(config.data)
        if config.diagnose_every and len(images) < config.diagnose_images:
            raise ValueError(f"diagnose_images = {config.diagnose_images}: {config.data} has {len(images)} images")
        with ranks.one_first():
            self.autoencoder = load_autoencoder(config.autoencoder).to(self.device)
            self.decoder = load_autoencoder(config.decoder).to(self.device) if config.decoder else self.autoencoder
        self.size = latent_size(config, images.resolution, self.autoencoder, self.decoder)
        self.patch_size = patch_size(config.model, self.size)
        self.encoders = self.build_encoders()
        self.inception, self.fid_reference = self.build_inception()
        aligned, prepared = config.alignment == "repa", config.encoder_features == "prepared"
        self.aligned_steps = min(config.align_steps or config.max_steps, config.max_steps) if aligned else 0
        self.latent = config.autoencoder != "pixels"
        read = functools.partial(
            PreparedImages,
            config.data,
            mirror=config.mirror,
            latents=self.autoencoder.fingerprint if self.latent else "",
        )
        self.data = read(
            images=not self.latent or aligned and not prepared,
            features=[encoder.fingerprint for encoder in self.encoders] if aligned and prepared else (),
        )
        self.unaligned_data = read(images=not self.latent)  # for the steps that are not aligned
        resolve_backend(config.route_backend, self.device)  # refuses one that cannot run here
        self.model = self.build_model().to(self.device)
        self.flops_per_image = 3 * flops_per_image(self.model)  # of a training step: the backward is two forwards
        self.ema = EMA(self.model, config.ema_decays)
        self.wrapped = DistributedDataParallel(self.model) if ranks.world > 1 else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.tally = Tally(self.device)
        self.step, self.seconds = 0, 0.0  # seconds of training, without evaluation and checkpoints
        self.logged = {"step": 0, "seconds": 0.0}  # where the current interval of the log began
        # What this step still owes; a checkpoint remembers it if the run is cut short.
        self.evaluation_due = self.diagnosis_due = False

    # ---- building ----

    def build_encoders(self):
        config = self.config
        names = config.encoder if config.alignment == "repa" else config.encoder[:1] if config.eval_every else ()
        with self.ranks.one_first():
            return [
                FrozenEncoder(name, self.size // self.patch_size, *config.encoder_weights[i : i + 1]).to(self.device)
                for i, name in enumerate(names)
            ]

    def build_inception(self):
        """Inception v3 and the statistics of ADM's reference; None for what the evaluation does not need."""
        config = self.config
        if not config.eval_every or config.eval_metric != "fid":
            return None, None
        found = npz_statistics(config.fid_reference) if config.fid_reference else {}
        if config.fid_reference and "pool3" not in found:
            raise ValueError(
                f"fid_reference = {config.fid_reference!r} holds no statistics (mu, sigma); "
                "`python -m eval.metrics --save-reference` makes a file that does"
            )
        from eval.features import InceptionFeatures  # nothing else needs torch-fidelity

        with self.ranks.one_first():
            inception = InceptionFeatures(config.inception).to(self.device)
        if found:
            check_weights(config.fid_reference, inception)
        return inception, found.get("pool3")

    def build_model(self):
        config = self.config
        sizes = {
            name: value
            for name in ("depth", "hidden_size", "num_heads")
            if (value := getattr(config, name)) is not None
        }
        aligned = config.alignment == "repa"
        torch.manual_seed(derive_seed(config.seed, INITIAL_WEIGHTS))
        model = SIT_MODELS[config.model](
            input_size=self.size,
            in_channels=self.autoencoder.channels,
            num_classes=self.data.num_classes,
            class_dropout_prob=config.class_dropout_prob,
            qk_norm=config.qk_norm,
            routing=config.routing,
            query=config.query,
            chunk_size=config.chunk_size,
            final_aggregator=config.final_aggregator,
            route_backend=config.route_backend,
            align_depth=config.align_depth if aligned else (),
            align_dims=[encoder.dim for encoder in self.encoders] if aligned else (),
            projector=config.projector,
            projector_dim=config.projector_dim,
            checkpoint_activations=config.checkpoint_activations,
            **sizes,
        )
        if config.init_from and not (config.run_folder() / "last.pt").is_file():
            try:
                missing, unused = load_published(model, load_weights(config.init_from))
            except ValueError as error:
                raise ValueError(f"init_from = {config.init_from!r}: {error}") from None
            self.say(
                f"initial weights from {config.init_from}; not in it: {abridged(missing)}; not used: {abridged(unused)}"
            )
        return model

    # ---- the run folder ----

    def open_folder(self):
        self.folder = self.config.run_folder()
        self.lock = lock_folder(self.folder) if self.ranks.main else None

    def resume(self):
        """Take up the run that is in the folder, if any. Refuses one with other settings."""
        options = dataclasses.asdict(self.config)
        self.identity = {
            **options,
            "content of data": self.data.content,
            "content of encoder": [encoder.fingerprint for encoder in self.encoders],
            "content of autoencoder": self.autoencoder.fingerprint,
        }
        if self.inception:
            self.identity["content of inception"] = self.inception.fingerprint
        last = self.folder / "last.pt"
        checkpoint = None
        if last.is_file():
            checkpoint = load_file(last)
            if not isinstance(checkpoint, dict) or "log_lines" not in checkpoint:
                raise ValueError(f"{last} is no checkpoint of this trainer; give another --out, or --init-from {last}")
            changed = configuration.differences(self.identity, checkpoint["config"])
        else:  # perhaps a run that ended before its first checkpoint
            saved = configuration.load_saved(self.folder / "config.yaml")
            if not saved and (self.folder / "metrics.jsonl").exists():
                raise ValueError(f"{self.folder} has a metrics.jsonl that is not of this program; give another --out")
            changed = configuration.differences(options, saved) if saved else []
        if changed:
            raise ValueError(
                f"{self.folder} holds a run of another configuration:\n  "
                + "\n  ".join(changed)
                + "\ngive another --out, or the settings it was made with"
            )
        if checkpoint:
            self.model.load_state_dict(checkpoint["model"])
            self.ema.load_state_dict(checkpoint["emas"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.tally.load_state_dict(checkpoint["tally"])
            self.step, self.seconds, self.logged = (checkpoint[key] for key in ("step", "seconds", "logged"))
            self.evaluation_due = checkpoint["evaluation_due"]
            # The option may have been taken back, such as after a diagnosis that failed.
            self.diagnosis_due = self.config.diagnose_every > 0 and checkpoint.get("diagnosis_due", False)
            self.say(f"resumed    at step {self.step}")
        self.ranks.barrier()  # nobody writes before all have read
        if self.ranks.main and (self.step < self.config.max_steps or self.evaluation_due or self.diagnosis_due):
            configuration.save(self.config, self.folder / "config.yaml")
            with open(self.folder / "environment.jsonl", "a") as file:
                file.write(json.dumps({"from_step": self.step, **environment(self.ranks)}) + "\n")
        self.log = MetricsLog(
            self.folder, checkpoint["log_lines"] if checkpoint else 0, self.step, self.config.tensorboard, self.ranks
        )

    def close(self):
        self.wrapped = None  # it must go before the process group, or gloo may wait for ever
        self.log.close()
        if self.lock:
            self.lock.close()

    def save(self):
        if self.ranks.main:
            emas = self.ema.state_dict()
            checkpoint = {
                "config": self.identity,
                "step": self.step,
                "seconds": self.seconds,
                "logged": self.logged,
                "evaluation_due": self.evaluation_due,
                "diagnosis_due": self.diagnosis_due,
                "log_lines": self.log.lines,
                "model": self.model.state_dict(),
                "ema": next(iter(emas.values())),
                "emas": emas,
                "optimizer": self.optimizer.state_dict(),
                "tally": self.tally.state_dict(),
            }
            names = ["last.pt"]
            if self.due(self.config.snapshot_every):
                names.insert(0, f"step-{self.step:07d}.pt")  # first: from last.pt the run would go on without it
            for name in names:
                with replaced(self.folder / name) as file:
                    torch.save(checkpoint, file)
        self.ranks.barrier()

    # ---- training ----

    def train(self):
        """Train to max_steps. Returns the signal that ended it early, or 0."""
        config, stopped_by = self.config, 0
        if config.compile:
            self.model.compile()
        evaluate = None
        if config.eval_every and (self.step < config.max_steps or self.evaluation_due):
            evaluate = OnlineEvaluation(
                config,
                PreparedImages(config.data),
                self.encoders[0],
                self.decoder,
                (self.autoencoder.channels, self.size, self.size),
                self.ranks,
                self.autocast,
                self.inception,
                self.fid_reference,
            )
        bar = tqdm(
            on_device(self.batches(), self.device),
            initial=self.step,
            total=config.max_steps,
            desc=self.folder.name,
            unit="step",
            disable=not self.ranks.main,
            mininterval=1,
        )
        with StopFlag(self.ranks) as stop:
            stopped_by = self.look(evaluate, stop, bar)
            clock = time.perf_counter()
            for batch in bar if not stopped_by else ():
                self.train_step(batch)
                self.step += 1
                stopped_by, last = stop.agreed(), self.step == config.max_steps
                # A line ends with the alignment, so that none is a mean over steps with and without it.
                log_due = last or self.due(config.log_every) or self.step == self.aligned_steps
                self.evaluation_due = evaluate is not None and (last or self.due(config.eval_every))
                self.diagnosis_due = self.due(config.diagnose_every)
                save_due = last or stopped_by or self.due(config.checkpoint_every) or self.due(config.snapshot_every)
                if not (log_due or save_due or self.evaluation_due or self.diagnosis_due):
                    continue
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                self.seconds += time.perf_counter() - clock
                if log_due:
                    bar.set_postfix(self.write_log())
                if save_due:  # before the evaluation, which may take long
                    self.save()
                stopped_by = stopped_by or self.look(evaluate, stop, bar)
                if stopped_by:
                    break
                clock = time.perf_counter()
        self.say(
            f"{self.folder}: step {self.step} of {config.max_steps}"
            + (", saved; the same command again goes on from here" if stopped_by else ", complete")
        )
        return stopped_by

    def due(self, every):
        return every > 0 and self.step % every == 0

    def batches(self):
        """What each step from the present one on takes; what only the alignment needs is no longer read after it."""
        for data, start, stop in (
            (self.data, self.step, self.aligned_steps),
            (self.unaligned_data, max(self.step, self.aligned_steps), self.config.max_steps),
        ):
            sampler = ShuffledBatches(
                len(data), self.config.batch_size, self.config.seed, start, stop, self.ranks.rank, self.ranks.world
            )
            if len(sampler):
                yield from DataLoader(
                    data,
                    batch_sampler=sampler,
                    collate_fn=already_a_batch,
                    num_workers=self.config.num_workers,
                    pin_memory=self.device.type == "cuda",
                    worker_init_fn=leave_signals_to_the_trainer,
                )

    def end_alignment(self):
        """From here on the model only denoises, and its projectors stay as they are.

        Of HASTE (arXiv 2505.16792) this is the end after a fixed number of steps; its alignment of attention maps and
        its trigger by gradients are not taken.
        """
        for model in (self.model, *self.ema.models.values()):
            model.align_depth = ()
        # Without a gradient, rather than with one of zero, which would let AdamW go on by its momentum.
        self.model.projectors.requires_grad_(False)
        self.flops_per_image = 3 * flops_per_image(self.model)
        if self.ranks.world > 1:  # it would wait for the gradients of those that it began with
            self.wrapped = None
            gc.collect()  # the buffers of the old one go first
            self.wrapped = DistributedDataParallel(self.model)

    def train_step(self, batch):
        """One optimiser step on this process's share of the global batch, in parts of micro_batch_size."""
        if self.step >= self.aligned_steps and self.model.align_depth:
            self.end_alignment()
        draws = self.draw()
        parts = self.share // self.micro
        losses = torch.zeros(3, device=self.device)
        for part in range(parts):
            rows = slice(part * self.micro, (part + 1) * self.micro)
            inputs = {name: value[rows] for name, value in batch.items()}
            last = part == parts - 1
            with contextlib.nullcontext() if last or self.ranks.world == 1 else self.wrapped.no_sync():
                part_losses = self.losses(inputs, {name: value[rows] for name, value in draws.items()})
                (part_losses[0] / parts).backward()
            losses += torch.stack([loss.detach() for loss in part_losses]) / parts
        losses = self.ranks.sum(losses / self.ranks.world)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        finite = losses.isfinite().all() & grad_norm.isfinite()
        # The fused optimiser leaves weights and moments alone where this is 1, without asking the host.
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model)
        self.tally.add(torch.cat([losses, grad_norm.view(1)]), finite)

    def draw(self):
        """This process's share of the step's random numbers, which follow from (seed, step) for the global batch."""
        generator = torch.Generator(self.device).manual_seed(derive_seed(self.config.seed, TRAINING, self.step))
        batch = self.config.batch_size
        make = functools.partial(torch.randn, generator=generator, device=self.device)
        shape = (batch, self.autoencoder.channels, self.size, self.size)
        draws = {"noise": make(*shape), "time_normal": make(batch)}
        for name in ("time_uniform", "label"):
            draws[name] = torch.rand(batch, generator=generator, device=self.device)
        if self.latent:
            draws["posterior"] = make(*shape)
        first = self.ranks.rank * self.share
        return {name: value[first : first + self.share] for name, value in draws.items()}

    def losses(self, inputs, draws):
        """Total, denoising and alignment loss of one part; inputs as `PreparedImages` serves them."""
        config = self.config
        t = sample_times(draws["time_uniform"], draws["time_normal"], config.time_sampling, config.path)
        x = (
            self.autoencoder.sample(inputs["moments"], draws["posterior"])
            if self.latent
            else self.autoencoder.encode(inputs["images"])
        )
        x_t, target = interpolant(x, draws["noise"], t, config.path)
        with self.autocast():
            velocity, aligned = self.wrapped(x_t, t, inputs["labels"], draws["label"])
            if aligned:
                tokens = [
                    inputs[f"tokens_{i}"] if f"tokens_{i}" in inputs else encoder(inputs["images"])
                    for i, encoder in enumerate(self.encoders)
                ]
        denoising = denoising_loss(velocity, target)
        if not aligned:
            return denoising, denoising, torch.zeros_like(denoising)
        if config.spatial_norm is not None:
            tokens = [spatial_normalisation(encoded, config.spatial_norm) for encoded in tokens]
        alignment = alignment_loss(aligned, tokens)
        return denoising + config.proj_coeff * alignment, denoising, alignment

    # ---- records ----

    def write_log(self):
        steps, seconds = self.step - self.logged["step"], self.seconds - self.logged["seconds"]
        self.logged = {"step": self.step, "seconds": self.seconds}
        means, skipped, longest = self.tally.read()
        if self.step > self.aligned_steps:
            means.pop("alignment_loss", None)
        record = {
            "step": self.step,
            "images": self.step * self.config.batch_size,
            "seconds": round(self.seconds, 3),
            **means,
            "skipped_steps": skipped,
            "samples_per_second": round(steps * self.config.batch_size / max(seconds, 1e-9), 2),
        }
        if peak := peak_flops(self.device):
            record["mfu"] = round(self.flops_per_image * record["samples_per_second"] / self.ranks.world / peak, 4)
        if self.device.type == "cuda":
            record["peak_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
        self.log.write(record)
        if longest >= self.config.max_skipped_steps:
            raise SystemExit(
                f"error: {longest} steps in a row had a non-finite loss or gradient (max_skipped_steps = "
                f"{self.config.max_skipped_steps}), {skipped} of {self.step} in all. Weights were not touched by them. "
                f"Try a lower --lr (now {self.config.lr:g}) or --precision fp32, with another --out; "
                f"--init-from {self.folder / 'last.pt'} starts from the last checkpoint, where there is one"
            )
        return {"loss": f"{means['loss']:.4f}"} if means else {"skipped": skipped}

    def look(self, evaluate, stop, bar):
        """Do what is due of evaluation and diagnosis. Returns the signal that cut it short, after saving, or 0."""
        if not (self.evaluation_due or self.diagnosis_due):
            return 0
        if self.evaluation_due and not self.write_evaluation(evaluate, stop, bar):
            self.save()  # with the evaluation still due
            return stop.agreed()
        if self.diagnosis_due:
            self.write_diagnosis()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # the log is of training alone
        if self.step == self.config.max_steps:
            self.save()  # there is no later checkpoint to say that this was done
        return 0

    def write_evaluation(self, evaluate, stop, bar):
        """Evaluate the first average and record it. Returns whether it came to its end."""
        began = time.perf_counter()
        distances, grid = evaluate(next(iter(self.ema.models.values())), interrupted=stop.agreed)
        if distances is None:
            return False
        self.evaluation_due = False
        self.log.write(
            {
                "step": self.step,
                "images": self.step * self.config.batch_size,
                "seconds": round(self.seconds, 3),
                **distances,
                "evaluation_seconds": round(time.perf_counter() - began, 3),
            }
        )
        if self.ranks.main:
            path = self.folder / "samples" / f"{self.step:07d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)
            self.log.image("samples", grid, self.step)
        bar.set_postfix({name: f"{distance:.3f}" for name, distance in distances.items()})
        return True

    def write_diagnosis(self):
        """The figures of analysis.diagnose for the first average, by the main process; the others wait."""
        if self.ranks.main:
            from analysis.diagnose import diagnose  # nothing else needs matplotlib and scikit-learn

            config, encoder = self.config, self.encoders[0] if self.encoders else None
            data = PreparedImages(config.data, latents=self.autoencoder.fingerprint if self.latent else "")
            decay, model = next(iter(self.ema.models.items()))
            diagnose(
                model,
                data,
                self.autoencoder,
                encoder,
                self.folder / "diagnosis" / f"{self.step:07d}",
                num_images=config.diagnose_images,
                path=config.path,
                provenance={"average": str(decay), "step": self.step, **environment(self.ranks)},
            )
        self.diagnosis_due = False
        self.ranks.barrier()

    def describe(self):
        """Print what the run is and what it takes."""
        config, model = self.config, self.model
        parts = parameters_by_part(model)
        total = sum(parts.values())
        routing = config.routing
        if model.router:
            routing += f" by {KERNELS[resolve_backend(config.route_backend, self.device)]}"
        alignment = config.alignment
        if 0 < self.aligned_steps < config.max_steps:
            alignment += f" for {self.aligned_steps} steps"
        encoders = ", ".join(
            f"{encoder.name} ({encoder.grid[0]} x {encoder.grid[1]} tokens)" for encoder in self.encoders
        )
        frozen = [*self.encoders, *{self.autoencoder, self.decoder}]
        weights = sum(
            p.numel() for network in frozen if isinstance(network, torch.nn.Module) for p in network.parameters()
        )
        averages = len(config.ema_decays)
        two, four = self.kept_for(2), self.kept_for(4)  # the difference leaves out what a batch shares
        memory = 4 * (weights + total * (4 + averages)) + two + (self.micro - 2) * (four - two) / 2
        self.say(
            f"run        {config.run_folder()}, {config.max_steps} steps\n"
            f"data       {len(self.data)} images of {self.data.resolution} pixels, {self.data.num_classes} classes; "
            f"trained on {config.autoencoder}, {self.autoencoder.channels} x {self.size} x {self.size}\n"
            f"model      {config.model}, {len(model.blocks)} blocks, {model.x_embedder.num_patches} tokens, "
            f"routing {routing}\n"
            f"parameters {total / 1e6:.2f} M: {', '.join(f'{name} {n / 1e6:.2f}' for name, n in parts.items())}\n"
            f"compute    {self.flops_per_image / 1e9:.4g} GFLOP of matrix products for an image in a training step, "
            f"encoders excluded\n"
            f"encoder    {encoders or 'none'}, alignment {alignment}\n"
            f"batch      {config.batch_size} global = {self.ranks.world} processes x {self.share} local, "
            f"in {self.share // self.micro} accumulated parts of {self.micro}; "
            f"{len(self.data) / config.batch_size:.4g} steps in an epoch\n"
            f"memory     about {memory / 2**30:.3g} GiB in each process, before the allocator's own losses\n"
            f"disk       {4 * total * (3 + averages) / 2**30:.3g} GiB for a checkpoint\n"
            f"device     {self.device}, {'bf16 autocast' if self.bf16 else 'fp32'}, torch {torch.__version__}"
        )

    def kept_for(self, count):
        """Bytes that a step keeps for its backward pass when it takes so many images at a time."""
        x = torch.zeros(count, self.autoencoder.channels, self.size, self.size, device=self.device)
        zeros = torch.zeros(count, device=self.device)
        with self.autocast():
            return kept_for_backward(self.model, x, zeros, zeros.long(), zeros)

    def say(self, text):
        if self.ranks.main:
            print(text, flush=True)


class Tally:
    """Means over the logged interval and counts of skipped steps, kept on the device until they are read."""

    NAMES = ("loss", "denoising_loss", "alignment_loss", "grad_norm")

    def __init__(self, device):
        self.state = {"sums": torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)}
        for name in ("counted", "skipped", "in_row", "longest"):
            self.state[name] = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, values, finite):
        """values: as in NAMES; finite: whether the step was taken. Both on the device."""
        state = self.state
        state["sums"] += torch.where(finite, values.double(), 0)
        state["counted"] += finite
        state["skipped"] += ~finite
        state["in_row"] = torch.where(finite, 0, state["in_row"] + 1)
        state["longest"] = torch.maximum(state["longest"], state["in_row"])

    def read(self):
        """Means over the interval ({} if every step was skipped), steps skipped in all, and the longest row of them.

        Starts a new interval.
        """
        count, skipped, longest = (int(self.state[name]) for name in ("counted", "skipped", "longest"))
        means = dict(zip(self.NAMES, (self.state["sums"] / count).tolist())) if count else {}
        self.state["sums"].zero_()
        self.state["counted"].zero_()
        self.state["longest"].copy_(self.state["in_row"])
        return means, skipped, longest

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        for name, value in self.state.items():
            value.copy_(state[name])


def peak_flops(device):
    """Dense bf16 operations per second of a GPU, from its data sheet; 0 where that is not known here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), 0)


def on_device(batches, device):
    """The batches on the device. On a GPU each is copied on a stream of its own while the one before is in use."""
    if device.type != "cuda":
        yield from batches
        return
    side, waiting = torch.cuda.Stream(), []
    for batch in itertools.chain(batches, [None]):
        if batch is not None:
            with torch.cuda.stream(side):
                copied = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            waiting.append((copied, side.record_event()))
        if len(waiting) == 2 or batch is None and waiting:
            ready, copy_done = waiting.pop(0)
            torch.cuda.current_stream().wait_event(copy_done)
            for value in ready.values():
                value.record_stream(torch.cuda.current_stream())  # it was allocated on the other one
            yield ready


def abridged(names):
    return ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4) or "none"


def already_a_batch(batch):
    return batch


def leave_signals_to_the_trainer(worker):
    """A signal to the whole process group must not take away the readers before the step is finished and saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def latent_size(config, resolution, autoencoder, decoder):
    """Side of what the model sees. Raises ValueError where images, autoencoder and decoder do not fit together."""
    if resolution % autoencoder.downsampling:
        raise ValueError(
            f"data = {config.data!r}: images of {resolution} pixels are not a multiple of the "
            f"{autoencoder.downsampling} that one latent of {config.autoencoder!r} stands for"
        )
    if (decoder.channels, decoder.downsampling) != (autoencoder.channels, autoencoder.downsampling):
        raise ValueError(
            f"decoder = {config.decoder!r} takes {decoder.channels} channels and enlarges "
            f"{decoder.downsampling} times, autoencoder = {config.autoencoder!r} gives "
            f"{autoencoder.channels} and {autoencoder.downsampling}"
        )
    return resolution // autoencoder.downsampling


def patch_size(model, size):
    """Patch size of a named model. Raises ValueError on an unknown name, and where it does not divide `size`."""
    if model not in SIT_MODELS:
        raise ValueError(f"model = {model!r} is unknown; choose one of {', '.join(SIT_MODELS)}")
    patch = int(model.rpartition("/")[2])
    if size % patch:
        raise ValueError(f"model = {model!r}: the {size} x {size} inputs cannot be cut into patches of {patch}")
    return patch


def split_batch(config, world):
    """Images per process, and per part that it takes at a time. Raises ValueError where they do not come out even."""
    share = config.batch_size // world
    micro = min(share, config.micro_batch_size or share)
    if share < 1 or share * world != config.batch_size or share % micro:
        raise ValueError(
            f"batch_size = {config.batch_size} cannot be shared evenly among {world} processes "
            f"in parts of micro_batch_size = {micro}"
        )
    return share, micro


if __name__ == "__main__":
    main()

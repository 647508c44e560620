"""Trains a SiT or an MM-DiT with residual, DAR or one of two baseline routings, with or without REPA.

    python train_repa_dar.py --config digits --routing dar --alignment repa
    torchrun --nproc_per_node=8 train_repa_dar.py --config cifar10 --routing dar --alignment repa

`make quickstart` shows how to prepare the data for the first command. The same command again resumes the run, bit for
bit on a CPU. `--help` lists every option, docs/configuration.md explains them.

Shapes: B batch, C channels, H = W size, T tokens.
"""

import gc
from pathlib import Path

import torch

import config as configuration
from checkpoint import EMA
from dataset.inputs import Inputs
from eval.online import OnlineEvaluation
from kernels import resolve_backend, why_not_fused
from loss import Loss, interpolant
from models.cost import flops_per_image, held, parameters_by_part
from models.registry import constructor
from models.streams import ResidualStream
from runtime import Use, derive_seed
from training import Run, Tally, launch
from weights import load_into, load_weights

KERNELS = {"torch": "plain PyTorch", "triton": "fused Triton kernels", "cpu": "fused C"}


def main(argv=None):
    launch(Trainer, configuration.parse(argv))


class Trainer(Run):
    """One run: its model and what trains it."""

    def __init__(self, config, ranks):
        super().__init__(config, ranks)
        self.inputs = Inputs(config, ranks)
        times = {name: getattr(config, name) for name in ("time_sampling", "time_mean", "time_std", "time_shift")}
        self.loss = Loss(config.path, proj_coeff=config.proj_coeff, spatial_norm=config.spatial_norm, **times)
        last = min(config.align_steps or config.max_steps, config.max_steps)
        self.aligned_steps = last if self.inputs.encoders else 0
        self.arguments = config.model_arguments() | self.inputs.model_arguments()
        self.arguments["align_dims"] = tuple(encoder.dim for encoder in self.inputs.encoders)
        self.model = self.build_model()
        self.ema = EMA(self.model, config.ema_decays)
        self.place(self.model, *self.ema.models.values())
        self.flops = 3 * flops_per_image(config.model, self.arguments)  # a backward pass is two forward passes
        self.wrapped = self.parallel(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.tally = Tally(self.device, ("loss", "denoising_loss", "alignment_loss", "grad_norm"))
        self.parts = {"model": self.model, "emas": self.ema, "optimizer": self.optimizer, "tally": self.tally}
        if config.eval_every:
            self.evaluate = OnlineEvaluation(config, ranks, self.inputs, self.autocast)

    @staticmethod
    def outline(config) -> str:
        """What a run takes, by its options alone: on the meta device, with encoders of DINOv2's width (ViT-B)."""
        arguments = config.model_arguments()
        arguments["align_dims"] = (768,) * len(config.encoder) if config.alignment == "repa" else ()
        with torch.device("meta"):
            parts = parameters_by_part(constructor(config.model)(**arguments))
        total = sum(parts.values())
        kept = (3 + len(config.ema_decays)) * total
        flops = 3 * flops_per_image(config.model, arguments)
        return takes(parts, flops) + held(kept, total, processes=8)

    def build_model(self):
        config = self.config
        torch.manual_seed(derive_seed(config.seed, Use.WEIGHTS))
        model = constructor(config.model)(
            **self.arguments,
            route_backend=config.route_backend,
            checkpoint_activations=config.checkpoint_activations,
        )
        if self.inputs.text:
            model.null_text.copy_(self.inputs.data.null_text)
        if config.init_from and not Path(config.out, "last.pt").is_file():
            try:
                with self.ranks.one_first():  # the hub may be asked
                    weights, _ = load_weights(config.init_from, config.model)
                weights.pop("null_text", None)  # the data's own is taken
                missing, unused = load_into(model, weights, config.new_labels)
            except ValueError as error:
                raise ValueError(f"init_from = {config.init_from!r}: {error}") from None
            absent = f"not in it: {abridged(missing)}; not used: {abridged(unused)}"
            self.say(
                f"initial weights from {config.init_from}; {absent}" + "; label table reinitialised" * config.new_labels
            )
        return model

    # ---- training ----

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

        def losses_of(rows):
            images = {name: value[rows] for name, value in batch.items()}
            x = self.inputs.clean(images, posterior[rows])
            with self.autocast():
                tokens = self.inputs.tokens(images) if self.model.align_depth else None
                total, parts = self.loss(self.wrapped, x, self.inputs.conditions(images), draws[rows], tokens)
            return total, *parts.values()

        losses = self.gradients(self.wrapped, losses_of)
        grad_norm, finite = self.update(self.optimizer, self.ema.weights, losses)
        self.ema.update()
        self.tally.add(torch.cat([losses, grad_norm.view(1)]), finite)

    def record(self):
        """With the epochs so far, in which mirrored images are not counted apart."""
        epoch = self.progress["step"] * self.config.batch_size * (1 + self.config.mirror) / len(self.inputs.data)
        return super().record() | {"epoch": round(epoch, 4)}

    def draw(self):
        """This process's share of the step's random numbers, which follow from (seed, step) for the global batch."""
        seed = derive_seed(self.config.seed, Use.STEP, self.progress["step"])
        generator, shape = torch.Generator(self.device).manual_seed(seed), (self.config.batch_size, *self.inputs.shape)
        draws = self.loss.draw(shape, generator)
        posterior = torch.randn(shape, generator=generator, device=self.device)  # of latents
        return draws[self.mine], posterior[self.mine]

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
        if self.wrapped is not self.model:  # the old wrapper would wait for the projectors' gradients
            self.wrapped = None
            gc.collect()  # frees the old wrapper's buffers first
            self.wrapped = self.parallel(self.model)

    def describe(self):
        """Print what the run is and what it takes."""
        config, model, inputs = self.config, self.model, self.inputs
        parts = parameters_by_part(model)
        tokens = (inputs.shape[1] // model.patch_size) ** 2
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
        self.say(
            f"run        {config.out}, {config.max_steps} steps\n"
            f"data       {len(inputs.data)} images of {inputs.data.resolution} pixels, {inputs.data.num_classes} "
            f"classes, {len(inputs.data) / config.batch_size:.4g} steps in an epoch; trained on {config.autoencoder}, "
            f"{' x '.join(map(str, inputs.shape))}\n"
            f"model      {config.model}, {len(model.blocks)} blocks, {tokens} tokens, "
            f"routing {routing}\n"
            f"alignment  {alignment}\n" + takes(parts, self.flops) + self.resources(total * states, total)
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
            inputs = x_t, draws.t, self.inputs.conditions(batch)
            ours, residual = self.model(*inputs)[0], self.model(*inputs, make_stream=lambda v, e: ResidualStream(v))[0]
        self.model.train()
        return ((ours - residual).float().square().mean() / residual.float().square().mean()).sqrt().item()


def takes(parts: dict, flops: int) -> str:
    """Lines on parameters, by part, and on compute."""
    return (
        f"parameters {sum(parts.values()) / 1e6:.2f} M: "
        f"{', '.join(f'{name} {count / 1e6:.2f}' for name, count in parts.items())}\n"
        f"compute    {flops / 1e9:.4g} GFLOP of matrix products for an image in a training step, encoders excluded\n"
    )


def abridged(names):
    return ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4) or "none"


if __name__ == "__main__":
    main()

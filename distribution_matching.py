"""Distribution matching distillation: what a few-step student and its critic minimise (DMD2, arXiv 2405.14867).

For velocity networks on the linear path. Three networks take part: the frozen teacher, the student, and the critic,
which learns to denoise the student's samples as the teacher does real ones. No images are needed, but for a GAN: then
the critic also tells the student's samples from real ones, token by token, by its projector.

Shapes: B batch, C channels, H = W size, T tokens, K steps of the student.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from eval.samplers import before_last_step, predict_clean
from loss import Draws, Loss, denoising_loss, interpolant, time_shifted

TIMES = (0.02, 0.98)  # between which the student's samples are noised, for teacher and critic to compare (DMD2)
UNIFORM = Loss()  # draws times as pretraining does


def step_times(count: int, time_shift: float = 1.0) -> tuple[float, ...]:
    """Where the K steps of a student start: 1, (K-1)/K, .., 1/K, each moved by `time_shifted`."""
    return tuple(time_shifted(1 - k / count, time_shift) for k in range(count))


@dataclass(frozen=True)
class SampleDraws:
    """The random numbers of a batch of training samples.

    images: (B) numbers of training images. labels: theirs, (B), or captions (B, L, W + 1). noises: (B, C, H, W) for
    each step that is made, 1 to K of them. diffusion: what the finished samples are noised with.
    """

    images: torch.Tensor
    labels: torch.Tensor
    noises: tuple[torch.Tensor, ...]
    diffusion: Draws

    def __getitem__(self, rows: slice) -> "SampleDraws":
        noises = tuple(noise[rows] for noise in self.noises)
        return SampleDraws(self.images[rows], self.labels[rows], noises, self.diffusion[rows])


def draw_samples(
    labels: Callable, images: int, shape: tuple, count: int, seed: int, device: torch.device | str = "cpu"
) -> SampleDraws:
    """Random numbers for samples of this shape (B, C, H, W), which follow from the seed alone.

    labels: of training images by their numbers (B), of which there are `images`; count: K. How many of the K steps are
    made is drawn once for all samples, uniformly from 1 to K.
    """
    steps = 1 + int(torch.randint(count, (), generator=torch.Generator().manual_seed(seed)))  # without a device sync
    generator = torch.Generator(device).manual_seed(seed)
    chosen = torch.randint(images, shape[:1], generator=generator, device=device)
    noises = (torch.randn(shape, generator=generator, device=device) for _ in range(steps))
    return SampleDraws(chosen, labels(chosen), tuple(noises), UNIFORM.draw(shape, generator))


def training_sample(student: Callable, last: Callable, times: tuple, draws: SampleDraws) -> torch.Tensor:
    """x_0 (B, C, H, W) as the student makes it in as many steps as are drawn (backward simulation, DMD2 Section 4.5).

    Only the last step has a gradient; it calls `last`, which is the student or its DDP wrapper.
    """
    times, noises = times[: len(draws.noises)], iter(draws.noises)
    x = before_last_step(student, next(noises), draws.labels, times, lambda: next(noises))
    return predict_clean(last, x, x.new_full(x.shape[:1], times[-1]), draws.labels)


# DMD, Eq. 7 and 8; the GAN: DMD2, Eq. 4
def student_loss(
    teacher: Callable, critic: Callable, x: torch.Tensor, draws: SampleDraws, cfg_scale=1.0, gan_weight=0.0
) -> torch.Tensor:
    """0.5 |x - stopgrad(x - g)|^2, averaged over everything, so that the gradient in x is g over its size.

    g = (x_critic - x_teacher) / mean |x - x_teacher|, image by image: the two networks' predictions for x (B, C, H, W)
    noised to a random time, the teacher's guided by cfg_scale. gan_weight: of - log P(x is real). Returns a scalar.
    """
    x_t, t = noised(x, draws)
    with torch.no_grad():
        wanted = predict_clean(teacher, x_t, t, draws.labels, cfg_scale)
        found = predict_clean(critic, x_t, t, draws.labels)
        g = (found - wanted) / (x - wanted).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        target = x - g
    loss = 0.5 * F.mse_loss(x, target)
    if gan_weight:
        _, [realness] = critic(x_t, t, draws.labels)  # again, as this one needs a gradient
        loss = loss + gan_weight * F.softplus(-realness.float()).mean()
    return loss


def critic_loss(critic: Callable, x: torch.Tensor, draws: SampleDraws, real=None, gan_weight=0.0) -> torch.Tensor:
    """The denoising loss of pretraining, on samples x (B, C, H, W) of the student. Returns a scalar.

    real: images (B, C, H, W) of the same labels; gan_weight: of - log P(real is real) - log P(x is not), both noised.
    """
    x, t = x.detach(), draws.diffusion.t
    x_t, target = interpolant(x, draws.diffusion.noise, t)
    loss = denoising_loss(critic(x_t, t, draws.labels)[0], target)
    if gan_weight:
        (x_t, t), (real_t, _) = noised(x, draws), noised(real, draws)
        _, [realness] = critic(torch.cat([x_t, real_t]), torch.cat([t, t]), torch.cat([draws.labels] * 2))
        of_x, of_real = realness.float().chunk(2)  # (B, T, 1) logits
        loss = loss + gan_weight * (F.softplus(of_x).mean() + F.softplus(-of_real).mean())
    return loss


def noised(x: torch.Tensor, draws: SampleDraws) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, C, H, W) at a random time between TIMES, and the time (B)."""
    low, high = TIMES
    t = (low + (high - low) * draws.diffusion.t).to(x.dtype)
    return interpolant(x, draws.diffusion.noise.to(x.dtype), t)[0], t

"""Distribution matching distillation: what a few-step student and its critic minimise (DMD2, arXiv 2405.14867).

The form without data and without a GAN, for velocity networks on the linear path. Three networks take part: the frozen
teacher, the student, and the critic, which learns to denoise the student's samples as the teacher does real ones.

Shapes: B batch, C channels, H = W size, K steps of the student.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from eval.samplers import before_last_step, predict_clean
from loss import Draws, Loss, interpolant

TIMES = (0.02, 0.98)  # between which the student's samples are noised, for teacher and critic to compare (DMD2)
LOSS = Loss()  # of the critic: velocity matching at uniform times


def step_times(count: int, time_shift: float = 1.0) -> tuple[float, ...]:
    """Where the K steps of a student start: 1, (K-1)/K, .., 1/K, each moved to s t / (1 + (s - 1) t) for a shift s."""
    return tuple(time_shift * t / (1 + (time_shift - 1) * t) for t in (1 - k / count for k in range(count)))


@dataclass(frozen=True)
class SampleDraws:
    """The random numbers of a batch of training samples.

    labels: (B). noises: (B, C, H, W) for each step that is made, 1 to K of them. diffusion: what the finished samples
    are noised with.
    """

    labels: torch.Tensor
    noises: tuple[torch.Tensor, ...]
    diffusion: Draws

    def __getitem__(self, rows: slice) -> "SampleDraws":
        return SampleDraws(self.labels[rows], tuple(noise[rows] for noise in self.noises), self.diffusion[rows])


def draw_samples(labels: torch.Tensor, shape: tuple, count: int, seed: int) -> SampleDraws:
    """Random numbers for samples of this shape (B, C, H, W), which follow from the seed alone.

    labels: (N) to choose from, on the device where the numbers are wanted; count: K. How many of the K steps are made
    is drawn once for all samples, uniformly from 1 to K.
    """
    steps = 1 + int(torch.randint(count, (), generator=torch.Generator().manual_seed(seed)))  # without a device sync
    generator = torch.Generator(labels.device).manual_seed(seed)
    chosen = torch.randint(len(labels), shape[:1], generator=generator, device=labels.device)
    noises = (torch.randn(shape, generator=generator, device=labels.device) for _ in range(steps))
    return SampleDraws(labels[chosen], tuple(noises), LOSS.draw(shape, generator))


def training_sample(student: Callable, last: Callable, times: tuple, draws: SampleDraws) -> torch.Tensor:
    """x_0 (B, C, H, W) as the student makes it in as many steps as are drawn (backward simulation, DMD2 Section 4.5).

    Only the last step has a gradient; it calls `last`, which is the student or its DDP wrapper.
    """
    times, noises = times[: len(draws.noises)], iter(draws.noises)
    x = before_last_step(student, next(noises), draws.labels, times, lambda: next(noises))
    return predict_clean(last, x, x.new_full(x.shape[:1], times[-1]), draws.labels)


# DMD, Eq. 7 and 8
def student_loss(teacher: Callable, critic: Callable, x: torch.Tensor, draws: SampleDraws, cfg_scale=1.0):
    """0.5 |x - stopgrad(x - g)|^2, averaged over everything, so that the gradient in x is g over its size.

    g = (x_critic - x_teacher) / mean |x - x_teacher|, image by image: the two networks' predictions for x (B, C, H, W)
    noised to a random time, the teacher's guided by cfg_scale. Returns a scalar.
    """
    low, high = TIMES
    t = (low + (high - low) * draws.diffusion.t).to(x.dtype)
    with torch.no_grad():
        x_t, _ = interpolant(x, draws.diffusion.noise.to(x.dtype), t)
        wanted = predict_clean(teacher, x_t, t, draws.labels, cfg_scale)
        found = predict_clean(critic, x_t, t, draws.labels)
        g = (found - wanted) / (x - wanted).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        target = x - g
    return 0.5 * F.mse_loss(x, target)


def critic_loss(critic: Callable, x: torch.Tensor, draws: SampleDraws) -> torch.Tensor:
    """The denoising loss of pretraining, on samples x (B, C, H, W) of the student. Returns a scalar."""
    return LOSS(critic, x.detach(), draws.labels, draws.diffusion)[0]

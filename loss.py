"""What a training step minimises: the denoising loss of SiT and the alignment loss of REPA.

`Loss` is all of it, from clean images and random numbers to one scalar. Time runs from data (t = 0) to noise (t = 1).

Shapes: B batch, C channels, H = W size, T tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

PATHS = ("linear", "cosine")
TIME_SAMPLINGS = ("uniform", "lognormal")


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch: times t (B), noise (B, C, H, W), label (B) or None.

    label: uniform numbers that decide which labels are dropped; None leaves them to the model, which drops some only
    in training.
    """

    t: torch.Tensor
    noise: torch.Tensor
    label: torch.Tensor | None = None

    def __getitem__(self, rows: slice) -> "Draws":
        return Draws(self.t[rows], self.noise[rows], None if self.label is None else self.label[rows])


@dataclass(frozen=True)
class Loss:
    """The training loss of a SiT: SiT's velocity matching, plus proj_coeff times REPA's alignment.

    path: of PATHS; time_sampling: of TIME_SAMPLINGS; spatial_norm: iREPA's gamma, or None for tokens as they are.
    time_mean, time_std: of the logarithm of log-normal noise levels; time_shift: of `time_shifted`.
    """

    path: str = "linear"
    time_sampling: str = "uniform"
    proj_coeff: float = 0.5
    spatial_norm: float | None = None
    time_mean: float = 0.0
    time_std: float = 1.0
    time_shift: float = 1.0

    def draw(self, shape: tuple, generator: torch.Generator) -> Draws:
        """Random numbers for clean images of this shape (B, C, H, W)."""
        options = {"generator": generator, "device": generator.device}
        noise = torch.randn(shape, **options)
        normal, uniform = torch.randn(shape[0], **options), torch.rand(shape[0], **options)
        normal = self.time_mean + self.time_std * normal
        times = time_shifted(sample_times(uniform, normal, self.time_sampling, self.path), self.time_shift)
        return Draws(times, noise, label=torch.rand(shape[0], **options))

    def __call__(
        self, model: Callable, x: torch.Tensor, labels: torch.Tensor, draws: Draws, tokens: list | None = None
    ) -> tuple[torch.Tensor, dict]:
        """Total (scalar), and its parts by name.

        x: (B, C, H, W) clean; labels: (B); tokens: (B, T, dim) of each encoder, needed where the model aligns.
        """
        x_t, target = interpolant(x, draws.noise, draws.t, self.path)
        velocity, aligned = model(x_t, draws.t, labels, draws.label)
        denoising = denoising_loss(velocity, target)
        if not aligned:
            return denoising, {"denoising_loss": denoising, "alignment_loss": torch.zeros_like(denoising)}
        if self.spatial_norm is not None:
            tokens = [spatial_normalisation(encoded, self.spatial_norm) for encoded in tokens]
        alignment = alignment_loss(aligned, tokens)
        return denoising + self.proj_coeff * alignment, {"denoising_loss": denoising, "alignment_loss": alignment}


def path_coefficients(t: torch.Tensor, path: str = "linear") -> tuple:
    """alpha, sigma and their derivatives in t, each shaped like t, for x_t = alpha x + sigma eps (SiT, Table 1)."""
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path == "cosine":
        angle, rate = t * (math.pi / 2), math.pi / 2
        return angle.cos(), angle.sin(), -rate * angle.sin(), rate * angle.cos()
    raise ValueError(f"path {path!r} is unknown; choose one of {', '.join(PATHS)}")


def interpolant(x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, path: str = "linear") -> tuple:
    """x_t = alpha x + sigma eps and its velocity v = alpha' x + sigma' eps.

    x, noise: (B, C, H, W); t: (B). Returns two (B, C, H, W).
    """
    alpha, sigma, d_alpha, d_sigma = path_coefficients(t.view(-1, *[1] * (x.ndim - 1)), path)
    return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def sample_times(uniform, normal, sampling: str = "uniform", path: str = "linear") -> torch.Tensor:
    """Training times in [0, 1] from draws that the caller made: "uniform" uses the first, "lognormal" the second.

    Log-normal: the noise level s = exp(normal) = sigma / alpha, mapped to t on the path (REPA, SD3).
    uniform, normal: (B). Returns (B).
    """
    if sampling == "uniform":
        return uniform
    if sampling != "lognormal":
        raise ValueError(f"time_sampling {sampling!r} is unknown; choose one of {', '.join(TIME_SAMPLINGS)}")
    noise_level = normal.exp()
    if path == "linear":
        return noise_level / (1 + noise_level)
    if path == "cosine":
        return torch.atan(noise_level) * (2 / math.pi)
    raise ValueError(f"path {path!r} is unknown; choose one of {', '.join(PATHS)}")


def time_shifted(t, shift: float):
    """t moved towards noise, s t / (1 + (s - 1) t), as larger images need (SD3, Eq. 23). t in [0, 1]; shift 1: none."""
    return shift * t / (1 + (shift - 1) * t)


def denoising_loss(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean square error in float32 over everything. velocity, target: (B, C, H, W). Returns a scalar."""
    return F.mse_loss(velocity.float(), target.float())


def spatial_normalisation(tokens: torch.Tensor, gamma: float, eps: float = 1e-6) -> torch.Tensor:
    """(x - gamma E[x]) / (std[x] + eps), over the tokens of each image, channel by channel (iREPA, Algorithm 1).

    Takes off part of what all tokens have in common, so that they differ more; gamma is 0.6 to 0.8 in arXiv 2512.10794.
    The variance is divided by T - 1, which the cosine of the alignment does not see.
    tokens: (B, T, dim). Returns the same in float32. Raises ValueError for a single token, which has no spread.
    """
    if tokens.shape[1] < 2:
        raise ValueError(
            f"spatial_norm = {gamma}: encoder tokens {tuple(tokens.shape)} (batch, tokens, width) have no "
            "spread; at least two tokens are needed, from smaller patches or larger images"
        )
    x = tokens.float()
    return (x - gamma * x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + eps)


def alignment_loss(aligned: list, features: list) -> torch.Tensor:
    """- mean cosine similarity over batch, tokens, depths and encoders (REPA, Eq. 8).

    aligned:  list of projected tokens (B, T, dim), by depth and then by encoder, as the model returns them.
    features: list of encoder tokens (B, T, dim), one per encoder.
    Returns a scalar. Raises ValueError where the two do not match.
    """
    if not features or len(aligned) % len(features):
        raise ValueError(f"{len(aligned)} projections cannot be shared among {len(features)} encoders")
    total = 0.0
    for i, projected in enumerate(aligned):
        target = features[i % len(features)]
        if projected.shape != target.shape:
            raise ValueError(
                f"the model has projected tokens {tuple(projected.shape)} (batch, tokens, width), "
                f"the encoder {tuple(target.shape)}"
            )
        # Float32 before normalising: in half precision the norm overflows or vanishes and the loss turns NaN.
        total = total - F.cosine_similarity(projected.float(), target.float(), dim=-1).mean()
    return total / len(aligned)

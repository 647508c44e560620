"""Samplers of SiT: from noise at t = 1 to data at t = 0, by ODE or SDE, with classifier-free guidance.

`model(x, t, y)` returns (velocity, anything) and has `num_classes`, the null label. The state is kept in float64
whatever the model computes in.

Shapes: B batch, C channels, H = W size.
"""

from collections.abc import Callable, Iterable

import torch

from loss import path_coefficients

SOLVERS = ("euler", "heun")
SDE_LAST = 0.04  # the SDE's score diverges towards t = 0, so its last step starts here (REPA)


def draw(model: Callable, seeds: Iterable[int], shape: tuple, y: torch.Tensor, sampler: str, **options) -> torch.Tensor:
    """Samples by "euler", "heun" or "sde". Each depends on its own seed and label alone, not on the rest of the batch.

    seeds: one per sample; shape: (C, H, W); y: (B) labels, on the model's device; options: of sample_ode or sample_sde.
    Returns (B, C, H, W) float64. Raises ValueError as they do.
    """
    noise = IndexedNoise(seeds, shape, y.device)
    if sampler == "sde":
        return sample_sde(model, noise(), y, step_noise=noise, **options)
    return sample_ode(model, noise(), y, solver=sampler, **options)


@torch.no_grad()
def sample_ode(
    model: Callable,
    noise: torch.Tensor,
    y: torch.Tensor,
    num_steps: int = 250,
    cfg_scale: float = 1.0,
    guidance_interval: tuple = (0.0, 1.0),
    path: str = "linear",
    solver: str = "euler",
) -> torch.Tensor:
    """Integrate dx/dt = v(x, t) from t = 1 to 0 in equal steps.

    noise: (B, C, H, W) standard normal; y: (B) labels. solver: "euler", one evaluation a step, or "heun", two in each
    but the last (EDM, Algorithm 1). guidance_interval: times (low, high) between which guidance is applied.
    Returns (B, C, H, W) float64. Raises ValueError on an unknown solver or path, or on num_steps < 1.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; choose one of {', '.join(SOLVERS)}")
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}: must be at least 1")
    path_coefficients(torch.ones(()), path)  # refuses an unknown path, which an ODE does not need
    velocity = guided_velocity(model, noise, y, cfg_scale, guidance_interval)
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
    x = noise.double()
    for now, after in zip(times[:-1], times[1:]):
        v = velocity(x, now)
        step = x + (after - now) * v
        if solver == "heun" and after > 0:
            step = x + (after - now) * (v + velocity(step, after)) / 2
        x = step
    return x


@torch.no_grad()
def sample_sde(
    model: Callable,
    noise: torch.Tensor,
    y: torch.Tensor,
    num_steps: int = 250,
    cfg_scale: float = 1.0,
    guidance_interval: tuple = (0.0, 1.0),
    path: str = "linear",
    step_noise: Callable | None = None,
) -> torch.Tensor:
    """Euler-Maruyama on dx = (v - w s / 2) dt + sqrt(w) dW with diffusion w(t) = 2t and score s (SiT, REPA).

    num_steps - 1 equal steps from t = 1 to 0.04, then one to 0 without noise.
    noise: (B, C, H, W) standard normal; y: (B) labels. step_noise: called for each noisy step, returns (B, C, H, W)
    standard normal numbers; the default draws them from torch's global generator.
    Returns (B, C, H, W) float64. Raises ValueError on an unknown path or on num_steps < 2.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps = {num_steps}: the SDE needs at least 2")
    step_noise = step_noise or (lambda: torch.randn_like(noise))
    velocity = guided_velocity(model, noise, y, cfg_scale, guidance_interval)
    times = [*torch.linspace(1, SDE_LAST, num_steps, dtype=torch.float64).tolist(), 0.0]
    x = noise.double()
    for now, after in zip(times[:-1], times[1:]):
        v, diffusion = velocity(x, now), 2 * now
        x = x + (after - now) * (v - 0.5 * diffusion * score_from_velocity(x, v, now, path))
        if after > 0:
            x = x + (diffusion * (now - after)) ** 0.5 * step_noise().double()
    return x


def score_from_velocity(x: torch.Tensor, v: torch.Tensor, t: float, path: str = "linear") -> torch.Tensor:
    """grad log p_t(x) = - E[eps | x] / sigma, with eps solved from x = alpha x_0 + sigma eps and v = its derivative."""
    alpha, sigma, d_alpha, d_sigma = path_coefficients(torch.tensor(t, dtype=x.dtype, device=x.device), path)
    noise = (alpha * v - d_alpha * x) / (alpha * d_sigma - d_alpha * sigma)
    return -noise / sigma


def guided_velocity(model: Callable, like: torch.Tensor, y: torch.Tensor, cfg_scale: float, interval: tuple):
    """The velocity as a function of (x, t): plain outside the interval, v_null + w (v - v_null) inside it.

    like: a tensor of the dtype in which the model takes x and t.
    """
    low, high = interval[0] - 1e-6, interval[1] + 1e-6  # else rounded times would miss its ends
    y_null = torch.full_like(y, model.num_classes)

    def velocity(x, t):
        x, times = x.to(like.dtype), torch.full((len(x),), t, dtype=like.dtype, device=x.device)
        if cfg_scale == 1 or not low <= t <= high:
            return model(x, times, y)[0].double()
        both, _ = model(torch.cat([x, x]), torch.cat([times, times]), torch.cat([y, y_null]))
        v, v_null = both.double().chunk(2)
        return v_null + cfg_scale * (v - v_null)

    return velocity


class IndexedNoise:
    """Standard normal numbers (B, *shape) in float32, one generator per sample, so that batches do not matter.

    The first call gives the initial noise of the samples, each further one the noise of a step.
    """

    def __init__(self, seeds: Iterable[int], shape: tuple, device: torch.device | str):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> torch.Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)

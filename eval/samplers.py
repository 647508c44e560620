"""Samplers of SiT: from noise at t = 1 to data at t = 0, by ODE or SDE, with classifier-free guidance.

Distilled models have a sampler of their own, of few steps.
`model(x, t, y)` returns (velocity, anything), and `model.null(B)` is y without a label. The state of ODE and SDE is
kept in float64 whatever the model computes in.

Shapes: B batch, C channels, H = W size. y: labels (B), or captions (B, L, W + 1).
"""

from collections.abc import Callable, Iterable

import torch

from loss import interpolant, path_coefficients, time_shifted

SOLVERS = ("euler", "heun")
SDE_LAST = 0.04  # the SDE's score diverges towards t = 0, so its last step starts here (REPA)


def draw(model: Callable, seeds: Iterable[int], shape: tuple, y: torch.Tensor, sampler: str, **options) -> torch.Tensor:
    """Samples by "euler", "heun", "sde", or "few-step" for a distilled model.

    Each depends on its own seed and label alone, not on the rest of the batch.

    seeds: one per sample; shape: (C, H, W); y: (B) labels, on the model's device; options: of the sampler's function.
    Returns (B, C, H, W) float64. Raises ValueError as they do.
    """
    noise = IndexedNoise(seeds, shape, y.device)
    if sampler == "few-step":
        return sample_few_steps(model, noise(), y, step_noise=noise, **options)
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
    time_shift: float = 1.0,
    guide: Callable | None = None,
    solver: str = "euler",
) -> torch.Tensor:
    """Integrate dx/dt = v(x, t) from t = 1 to 0, in equal steps unless `time_shift` moves them (`time_shifted`).

    noise: (B, C, H, W) standard normal; y: (B) labels. solver: "euler", one evaluation a step, or "heun", two in each
    but the last (EDM, Algorithm 1). cfg_scale, guide: of `guided`. guidance_interval: times (low, high) between which
    guidance is applied.
    Returns (B, C, H, W) float64. Raises ValueError on an unknown solver or path, or on num_steps < 1.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; choose one of {', '.join(SOLVERS)}")
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}: must be at least 1")
    path_coefficients(torch.ones(()), path)  # refuses an unknown path, which an ODE does not need
    velocity = guided_velocity(model, noise, y, cfg_scale, guidance_interval, guide)
    times = time_shifted(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), time_shift).tolist()
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
    time_shift: float = 1.0,
    guide: Callable | None = None,
    step_noise: Callable | None = None,
) -> torch.Tensor:
    """Euler-Maruyama on dx = (v - w s / 2) dt + sqrt(w) dW with diffusion w(t) = 2t and score s (SiT, REPA).

    num_steps - 1 steps from t = 1 to 0.04, equal unless `time_shift` moves them, then one to 0 without noise.
    The arguments are those of `sample_ode`. step_noise: called for each noisy step, returns (B, C, H, W)
    standard normal numbers; the default draws them from torch's global generator.
    Returns (B, C, H, W) float64. Raises ValueError on an unknown path or on num_steps < 2.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps = {num_steps}: the SDE needs at least 2")
    step_noise = step_noise or (lambda: torch.randn_like(noise))
    velocity = guided_velocity(model, noise, y, cfg_scale, guidance_interval, guide)
    even = torch.linspace(1, time_shifted(SDE_LAST, 1 / time_shift), num_steps, dtype=torch.float64)
    times = [*time_shifted(even, time_shift).tolist(), 0.0]
    x = noise.double()
    for now, after in zip(times[:-1], times[1:]):
        v, diffusion = velocity(x, now), 2 * now
        x = x + (after - now) * (v - 0.5 * diffusion * score_from_velocity(x, v, now, path))
        if after > 0:
            x = x + (diffusion * (now - after)) ** 0.5 * step_noise().double()
    return x


@torch.no_grad()
def sample_few_steps(model: Callable, noise: torch.Tensor, y: torch.Tensor, times: tuple, step_noise: Callable):
    """Samples of a distilled model: x_0 is predicted at the first of its times, noised again to the next, and so on.

    noise: (B, C, H, W) standard normal; y: (B) labels; times: descending from 1. step_noise: called before each step
    but the first, returns (B, C, H, W) standard normal numbers.
    Returns (B, C, H, W) float64.
    """
    x = before_last_step(model, noise, y, times, step_noise)
    return predict_clean(model, x, x.new_full(x.shape[:1], times[-1]), y).double()


@torch.no_grad()
def before_last_step(model: Callable, noise: torch.Tensor, y: torch.Tensor, times: tuple, step_noise: Callable):
    """The state that `sample_few_steps` gives to the model in its last step: (B, C, H, W) at the last of the times."""
    x = noise
    for now, after in zip(times[:-1], times[1:]):
        clean = predict_clean(model, x, x.new_full(x.shape[:1], now), y)
        x, _ = interpolant(clean, step_noise(), x.new_full(x.shape[:1], after))
    return x


def predict_clean(model: Callable, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, cfg_scale: float = 1.0):
    """E[x_0 | x_t] = x_t - t v on the linear path. x: (B, C, H, W), t: (B), of one dtype, as is what is returned."""
    v = guided(model, x, t, y, cfg_scale)
    return (x - t.view(-1, *[1] * (x.ndim - 1)) * v).to(x.dtype)


def score_from_velocity(x: torch.Tensor, v: torch.Tensor, t: float, path: str = "linear") -> torch.Tensor:
    """grad log p_t(x) = - E[eps | x] / sigma, with eps solved from x = alpha x_0 + sigma eps and v = its derivative."""
    alpha, sigma, d_alpha, d_sigma = path_coefficients(torch.tensor(t, dtype=x.dtype, device=x.device), path)
    noise = (alpha * v - d_alpha * x) / (alpha * d_sigma - d_alpha * sigma)
    return -noise / sigma


def guided_velocity(model: Callable, like: torch.Tensor, y: torch.Tensor, cfg_scale: float, interval: tuple, guide):
    """The velocity as a function of (x, t), guided within the interval.

    like: a tensor of the dtype in which the model takes x and t.
    """
    low, high = interval[0] - 1e-6, interval[1] + 1e-6  # else rounded times would miss its ends

    def velocity(x, t):
        x, times = x.to(like.dtype), torch.full((len(x),), t, dtype=like.dtype, device=x.device)
        return guided(model, x, times, y, cfg_scale if low <= t <= high else 1.0, guide)

    return velocity


def guided(
    model: Callable, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, cfg_scale: float, guide: Callable | None = None
) -> torch.Tensor:
    """v_0 + w (v - v_0) in float64. x: (B, C, H, W); t, y: (B).

    v_0 is the model's velocity without label, by one pass for both (classifier-free guidance), or that of `guide`, a
    weaker model (autoguidance, arXiv 2406.02507).
    """
    if cfg_scale == 1:
        return model(x, t, y)[0].double()
    if guide:
        v, v_0 = model(x, t, y)[0].double(), guide(x, t, y)[0].double()
    else:
        null = model.null(len(y)).to(y)
        both, _ = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        v, v_0 = both.double().chunk(2)
    return v_0 + cfg_scale * (v - v_0)


class IndexedNoise:
    """Standard normal numbers (B, *shape) in float32, one generator per sample, so that batches do not matter.

    The first call gives the initial noise of the samples, each further one the noise of a step.
    """

    def __init__(self, seeds: Iterable[int], shape: tuple, device: torch.device | str):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> torch.Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)

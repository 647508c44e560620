"""The public routing operators and their choice of backend.

    from kernels import route
    h = route(sources, query, norm_weight)

Shapes: B batch, T tokens, D width, n sources.
"""

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import reference, route_cpu, route_torch  # noqa: F401  (registers a backend)
from kernels.operators import Carried, Route, RouteModulate

if importlib.util.find_spec("triton"):  # Linux; elsewhere there is PyTorch alone
    from kernels import route_triton
else:
    route_triton = None

BACKENDS = ("auto", "torch", "triton", "cpu")
MOST_SOURCES = 128  # whose addresses fit a launch's arguments


def resolve_backend(backend: str, device: torch.device) -> str:
    """What serves tensors of this device, "torch", "triton" or "cpu": "auto" is the fused one, where it can be had.

    Raises ValueError on an unknown backend, and on a fused one that cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return "torch" if why_not_fused(device) else {"cuda": "triton", "cpu": "cpu"}[device.type]
    if backend == "triton" and route_triton is None:
        raise ValueError("backend 'triton' needs the package triton, which is not installed; choose 'torch'")
    if backend == "triton" and device.type != "cuda" and not route_triton.INTERPRETED:
        raise ValueError(
            f"backend 'triton' needs a CUDA device, not {device.type!r}, or the environment variable "
            "TRITON_INTERPRET=1 (slow, for tests); choose 'torch'"
        )
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' needs a CPU, not {device.type!r}; choose 'torch' or 'auto'")
    if backend == "cpu" and why_not_fused(device):
        raise ValueError(f"backend 'cpu' cannot be had: {why_not_fused(device)}; choose 'torch'")
    return backend


def why_not_fused(device: torch.device) -> str:
    """Why tensors of this device are routed by plain PyTorch with "auto"; "" where they are not."""
    if device.type == "cuda":
        return "" if route_triton else "the package triton is not installed"
    return route_cpu.why_not() if device.type == "cpu" else f"there is none for {device.type!r}"


def route(
    sources: Sequence[Tensor],
    query: Tensor,
    norm_weight: Tensor,
    eps: float = 1e-6,
    backend: str = "auto",
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Aggregate earlier sublayer outputs by a softmax over depth, one per token (DAR, arXiv 2605.20708, Eq. 5-6).

        h = sum_i a_i v_i,   a = softmax_i(q . k_i / sqrt(D)),   k_i = norm_weight * RMSNorm(v_i)

    sources:     sequence of n >= 1 tensors (B, T, D); they are cast to their common dtype.
    query:       (D) shared, (B, D) one per sample, or (B, T, D) one per token.
    norm_weight: (D).
    eps:         added to the mean square inside the RMSNorm.
    backend:     "torch" (PyTorch, runs anywhere), "triton" or "cpu" (fused: one read of the sources forward, one
                 backward; no float64, no weights; "triton" takes at most 128 sources, "cpu" only float32) or "auto"
                 (the fused one of the device where it can).
    Returns h (B, T, D) in the common dtype of the sources; with `return_weights`, also a (n, B, T).
    Keys, logits, softmax and sums are float32 (float64 for float64 sources). h and gradients are then rounded to the
    dtype of what they belong to.
    Raises ValueError on an empty list, on shapes that do not fit together, and on a backend that is unknown or cannot
    do what is asked.
    """
    sources, backend = _checked(sources, query, norm_weight, backend, return_weights)
    if return_weights:
        return reference.route(sources, query, norm_weight, eps)
    return Route.apply(backend, query, norm_weight, eps, *sources)


def route_modulate(
    sources: Sequence[Tensor | Carried],
    query: Tensor,
    norm_weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, list[Carried]]:
    """`route`, followed by what reads its state: LayerNorm without weights, then adaLN's modulation.

        x = LayerNorm(h) * (1 + scale) + shift

    shift, scale: (B, D). norm_eps: of the LayerNorm. Other arguments and errors are those of `route`.
    Returns x (B, T, D), in autocast's dtype where that is on and otherwise in h's; h (B, T, D) in the sources' dtype.
    Returns the sources, each with its carrier (`Carried`): later reads must use these, so that a source's gradients are
    added up in the backend. Each reader rounds the sum so far to the sources' dtype.
    """
    carriers, asked = [v.carrier if isinstance(v, Carried) else None for v in sources], backend
    sources, backend = _checked([value_of(v) for v in sources], query, norm_weight, backend)
    shape, width = tuple(sources[0].shape), sources[0].shape[-1]
    for name, value in (("shift", shift), ("scale", scale)):
        if tuple(value.shape) != (shape[0], width):
            raise ValueError(f"{name} is {tuple(value.shape)}; sources {shape} need ({shape[0]}, {width})")
    dtype = autocast_dtype(sources[0])
    if asked == "torch":  # x is made from h, so that it has a gradient in the states (analysis/diagnose.py)
        h = Route.apply(backend, query, norm_weight, eps, *sources)
        return modulated(h, shift, scale, norm_eps).to(dtype), h, sources
    x, h, *carriers = RouteModulate.apply(
        backend, query, norm_weight, shift, scale, eps, norm_eps, dtype, *carriers, *sources
    )  # fmt: skip
    return x, h, list(map(Carried, sources, carriers))


def modulated(h: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm without weights, then adaLN. h: (B, T, D); shift, scale: (B, D). Returns (B, T, D)."""
    x = F.layer_norm(h, h.shape[-1:], eps=eps)
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def value_of(source: Tensor | Carried) -> Tensor:
    return source.value if isinstance(source, Carried) else source


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of autocast where that is on for this tensor's device, otherwise the tensor's own."""
    device = tensor.device.type
    enabled = not tensor.is_meta and torch.is_autocast_enabled(device)  # which knows no device "meta"
    return torch.get_autocast_dtype(device) if enabled else tensor.dtype


def _checked(sources, query, norm_weight, backend, return_weights=False):
    """The sources in their common dtype, and the backend."""
    if len(sources) == 0:
        raise ValueError("sources is empty; a state needs at least v_0 to be routed from")
    shape = sources[0].shape
    if len(shape) != 3:
        raise ValueError(f"sources must be (B, T, D); source 0 is {tuple(shape)}")
    for i, v in enumerate(sources):
        if v.shape != shape:
            raise ValueError(
                f"all sources must have one shape; source 0 is {tuple(shape)}, source {i} {tuple(v.shape)}"
            )
    batch, tokens, width = shape
    if tuple(query.shape) not in {(width,), (batch, width), (batch, tokens, width)}:
        raise ValueError(
            f"query is {tuple(query.shape)}; sources {tuple(shape)} need ({width},), "
            f"({batch}, {width}) or ({batch}, {tokens}, {width})"
        )
    if tuple(norm_weight.shape) != (width,):
        raise ValueError(f"norm_weight is {tuple(norm_weight.shape)}; sources {tuple(shape)} need ({width},)")
    chosen = resolve_backend(backend, sources[0].device)
    kinds = {v.dtype for v in sources}
    dtype = functools.reduce(torch.promote_types, kinds)
    beyond = _beyond(chosen, dtype, len(sources), return_weights)
    if beyond and backend != "auto":
        raise ValueError(f"backend {backend!r} does not do {beyond}; choose 'torch' or 'auto'")
    sources = [v if v.dtype == dtype else v.to(dtype) for v in sources]
    return sources, "torch" if beyond else chosen


def _beyond(backend, dtype, count, return_weights):
    """What a fused backend does not do, of what is asked; otherwise ""."""
    if backend == "triton" and dtype == torch.float64 or backend == "cpu" and dtype != torch.float32:
        return str(dtype).removeprefix("torch.")
    if backend != "torch" and return_weights:
        return "return_weights"
    return f"{count} sources (at most {MOST_SOURCES})" if backend == "triton" and count > MOST_SOURCES else ""

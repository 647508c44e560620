"""What all backends share: their derivatives, and what PyTorch must know about the fused ones.

A backend is two functions (`register`). Those of Triton and of the CPU become PyTorch operators, so that
`torch.compile` sees one node per call.

Shapes: B batch, T tokens, D width, n sources.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

FUNCTIONS, BACKENDS, LIBRARIES = {}, {}, []  # by name: as they are; as operators


def _backend(name: str):
    """The functions as they are unless they are being compiled: PyTorch's machinery would cost 2 % of a small step."""
    return (BACKENDS if torch.compiler.is_compiling() else FUNCTIONS)[name]


def register(name: str, forward: Callable, backward: Callable, namespace: str = ""):
    """Makes two functions the backend `name`; with a namespace, as its PyTorch operators.

    forward(sources, query, norm_weight, eps, [shift, scale, norm_eps, dtype]): returns h (B, T, D), the log-sum-exp of
        its logits (B, T) and, with a shift, x (B, T, D) in `dtype` (`kernels.route_modulate`).
    backward(dx, dh, h, lse, sources, known, query, norm_weight, eps, [shift, scale, norm_eps]): returns the gradients
        of the sources, a list, of the query and the norm weight; with a dx also of shift and scale. dx or dh may be
        None. known: a gradient or None for each source, from later readers; it is added.
        That of a backend with a namespace also takes `in_place`, for `gradient_tensors`; operators may not write to
        their arguments.
    """

    def functions(backward):
        def route_backward(dh, *rest):
            return backward(None, dh, *rest)

        forwards = dict(route=forward, route_modulate=forward)
        return forwards | dict(route_backward=route_backward, route_modulate_backward=backward)

    eager = functools.partial(backward, in_place=True) if namespace else backward
    BACKENDS[name] = FUNCTIONS[name] = SimpleNamespace(**functions(eager))
    if not namespace:
        return
    library = torch.library.Library(namespace, "FRAGMENT")  # custom_op would cost 60 us more per call
    LIBRARIES.append(library)  # or the operators would go with it
    BACKENDS[name] = getattr(torch.ops, namespace)
    for operator, (schema, shapes) in OPERATORS.items():
        library.define(operator + schema)
        library.impl(operator, functions(backward)[operator], "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{operator}", shapes, lib=library)


def gradient_tensors(h: torch.Tensor, known: list, in_place: bool) -> list:
    """Where a fused backward writes the sources' gradients; h: the state (B, T, D).

    in_place: onto what is known, which came through a carrier from another call; nothing else sees it.
    """
    return [g if in_place and g is not None else torch.empty_like(h) for g in known]


# ---- schemas and shapes ----


def _like(tensor, dtype=None):
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _routed(sources, query, norm_weight, eps):
    return _like(sources[0]), sources[0].new_empty(sources[0].shape[:2], dtype=torch.float32)


def _modulated(sources, query, norm_weight, eps, shift, scale, norm_eps, dtype):
    return *_routed(sources, query, norm_weight, eps), _like(sources[0], dtype)


def _route_gradients(dh, h, lse, sources, known, query, norm_weight, eps):
    return [_like(v) for v in sources], _like(query), _like(norm_weight)


def _modulate_gradients(dx, dh, h, lse, sources, known, query, norm_weight, eps, shift, scale, norm_eps):
    gradients = _route_gradients(dh, h, lse, sources, known, query, norm_weight, eps)
    return *gradients, shift.new_empty(shift.shape), scale.new_empty(scale.shape)


OPERATORS = {
    "route": (
        "(Tensor[] sources, Tensor query, Tensor norm_weight, float eps) -> (Tensor, Tensor)",
        _routed,
    ),
    "route_modulate": (
        "(Tensor[] sources, Tensor query, Tensor norm_weight, float eps, Tensor shift, Tensor scale, float norm_eps, "
        "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
        _modulated,
    ),
    "route_backward": (
        "(Tensor dh, Tensor h, Tensor lse, Tensor[] sources, Tensor?[] known, Tensor query, Tensor norm_weight, "
        "float eps) -> (Tensor[], Tensor, Tensor)",
        _route_gradients,
    ),
    "route_modulate_backward": (
        "(Tensor dx, Tensor? dh, Tensor h, Tensor lse, Tensor[] sources, Tensor?[] known, Tensor query, "
        "Tensor norm_weight, float eps, Tensor shift, Tensor scale, float norm_eps) "
        "-> (Tensor[], Tensor, Tensor, Tensor, Tensor)",
        _modulate_gradients,
    ),
}


# ---- derivatives ----


class Route(torch.autograd.Function):
    """h of `kernels.route`."""

    @staticmethod
    def forward(ctx, backend, query, norm_weight, eps, *sources):
        h, lse = _backend(backend).route(sources, query, norm_weight, eps)
        ctx.save_for_backward(h, lse, query, norm_weight, *sources)
        ctx.backend, ctx.eps = backend, eps
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        h, lse, query, norm_weight, *sources = ctx.saved_tensors
        known = [None] * len(sources)
        backward = _backend(ctx.backend).route_backward
        gradients, dquery, dweight = backward(dh, h, lse, sources, known, query, norm_weight, ctx.eps)
        return None, dquery, dweight, None, *gradients


class Carried(NamedTuple):
    """A source that has been read: its value, and the carrier through which later readers send its gradient back."""

    value: torch.Tensor
    carrier: torch.Tensor


class RouteModulate(torch.autograd.Function):
    """(x, h, *carriers) of `kernels.route_modulate`.

    A carrier is a tensor of a source's shape without memory of its own; only its gradient means something. Later
    readers take the carriers and return new ones. Autograd thus hands the sum of their gradients to this backward,
    which adds its own share in the kernel. No gradient is written only to be read again and added to another
    (README.md).
    """

    @staticmethod
    def forward(ctx, backend, query, norm_weight, shift, scale, eps, norm_eps, dtype, *tensors):
        """tensors: a carrier of each source, None if it has not been read; then the sources."""
        carriers, sources = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        operator = _backend(backend).route_modulate
        h, lse, x = operator(sources, query, norm_weight, eps, shift, scale, norm_eps, dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, lse, query, norm_weight, shift, scale, *sources)
        ctx.backend, ctx.eps, ctx.norm_eps = backend, eps, norm_eps
        ctx.unread = [carrier is None for carrier in carriers]
        return x, h, *(h.new_empty(()).expand(h.shape) if carrier is None else carrier for carrier in carriers)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, dh, *known):
        h, lse, query, norm_weight, shift, scale, *sources = ctx.saved_tensors
        backend, routing = _backend(ctx.backend), (h, lse, sources, known, query, norm_weight, ctx.eps)
        gradients, dquery, dweight, dshift, dscale = known, None, None, None, None
        if dx is not None:
            results = backend.route_modulate_backward(dx, dh, *routing, shift, scale, ctx.norm_eps)
            gradients, dquery, dweight, dshift, dscale = results
        elif dh is not None:
            gradients, dquery, dweight = backend.route_backward(dh, *routing)
        of_carriers = [None if unread else gradient for unread, gradient in zip(ctx.unread, gradients)]
        of_sources = [gradient if unread else None for unread, gradient in zip(ctx.unread, gradients)]
        return None, dquery, dweight, dshift, dscale, None, None, None, *of_carriers, *of_sources

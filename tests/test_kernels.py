"""The fused kernels (kernels/route_triton.py) on a CPU, by Triton's interpreter, against their definition in float64.

The reference at the top is DAR's Eq. 5-6 and adaLN written out with float64 autograd; it shares no code with the
project. The interpreter runs the kernels' own source, row by row, at milliseconds per source and token: shapes are
tiny, and odd, so that few axes fit a power of two or a program's rows. That the kernels also compile for a GPU, with
wide loads and without spills, is shown at the end.

Shapes: B batch, T tokens, D width, n sources.
"""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
import train_repa_dar
from dataset import prepare
from kernels import resolve_backend, route, route_modulate
from models.sit import SiT
from tests.conftest import ROOT, read_lines
from tests.test_routing import randomize

pytest.importorskip("triton", reason="Triton has no build for this system")
from kernels import route_triton  # noqa: E402

OPERATORS = torch.ops.dar

# Errors as a share of the norm of what is expected. float32: sums over n, T and D in an order of their own. Half
# precision: the reference sees the same rounded inputs and the arithmetic is float32, so a result is rounded once, by
# one unit, since the interpreter cuts bf16 off where a GPU rounds to nearest; gradients are made from an h that was
# itself rounded, which softmax differences see, and behind a LayerNorm from a dh that was rounded as well.
FORWARD = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
BACKWARD = {torch.float32: 5e-6, torch.bfloat16: 2**-5, torch.float16: 2**-8}


def test_the_interpreter_is_on():
    """Without it the tests below would be about nothing, or fail one by one on a machine without a GPU."""
    assert route_triton.INTERPRETED, (
        "the kernels are compiled, not interpreted: TRITON_INTERPRET=1 must be in the environment before triton is "
        "imported; tests/conftest.py sets it"
    )


@pytest.fixture(scope="module", autouse=True)
def patched_once():
    """The interpreter patches triton.language for every call of one function by another; once per module and launch
    is enough, and twice as fast."""
    from triton.runtime import interpreter

    patched = set()

    def patch_language(function, original=getattr(interpreter, "_patch_lang", None)):
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            return original(function)

    def launch(*args, original=interpreter.GridExecutor.__call__, **kwargs):
        patched.clear()
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if hasattr(interpreter, "_patch_lang"):  # as Triton 3.7 calls it
            patch.setattr(interpreter, "_patch_lang", patch_language)
            patch.setattr(interpreter.GridExecutor, "__call__", launch)
        yield


# ---- the independent reference ----


def aggregated(sources, query, norm_weight, eps=1e-6):
    """Eq. 5-6."""
    v = torch.stack(sources)  # (n, B, T, D)
    keys = norm_weight * v / (v.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    query = query[:, None] if query.ndim == 2 else query  # (B, D) -> (B, 1, D)
    weights = ((query * keys).sum(-1) / math.sqrt(v.shape[-1])).softmax(0)  # (n, B, T)
    return (weights[..., None] * v).sum(0)


def modulated(h, shift, scale, norm_eps=1e-6):
    centred = h - h.mean(-1, keepdim=True)
    normalized = centred / (centred.pow(2).mean(-1, keepdim=True) + norm_eps).sqrt()
    return normalized * (1 + scale[:, None]) + shift[:, None]


def listed(inputs):
    """ "source 0", "source 1", ... of a dictionary, as a list."""
    return [inputs[f"source {i}"] for i in range(sum(name.startswith("source ") for name in inputs))]


def defined_route(inputs, eps=1e-6):
    return {"h": aggregated(listed(inputs), inputs["query"], inputs["norm_weight"], eps)}


def defined_modulate(inputs, eps=1e-6, norm_eps=1e-6):
    sources = listed(inputs)
    h = aggregated(sources, inputs["query"], inputs["norm_weight"], eps)
    x = modulated(h, inputs["shift"], inputs["scale"], norm_eps)
    return {"x": x, "h": h, **{f"returned {i}": v for i, v in enumerate(sources)}}


# ---- the kernels under the same names ----


def fused_route(inputs, eps=1e-6):
    return {"h": route(listed(inputs), inputs["query"], inputs["norm_weight"], eps, backend="triton")}


def fused_modulate(inputs, eps=1e-6, norm_eps=1e-6):
    x, h, sources = route_modulate(
        listed(inputs),
        inputs["query"],
        inputs["norm_weight"],
        inputs["shift"],
        inputs["scale"],
        eps,
        norm_eps,
        backend="triton",
    )
    return {"x": x, "h": h, **{f"returned {i}": v for i, v in enumerate(sources)}}


# ---- how they are compared ----


def draw(n, B, T, D, rank, dtype=torch.float32, seed=0, modulate=False):
    """Inputs by name. Sources differ in scale, or leaving the norm out would change little."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {f"source {i}": 4.0 ** (i % 5 - 2) * randn(B, T, D) for i in range(n)}
    inputs["query"] = 2 * randn(*{1: (D,), 2: (B, D), 3: (B, T, D)}[rank])
    inputs["norm_weight"] = 1 + randn(D)
    if modulate:
        inputs["shift"], inputs["scale"] = randn(B, D), randn(B, D)
    return {name: value.to(dtype) for name, value in inputs.items()}


def draw_like(tensor, seed=99, dtype=None):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(dtype or tensor.dtype)


def evaluate(function, inputs, cotangents):
    """What `function` returns, and the gradients of its outputs that have cotangents, None for inputs without one."""
    outputs = function(inputs)
    wanted = [name for name, value in inputs.items() if value.requires_grad]
    found = torch.autograd.grad(
        [outputs[name] for name in cotangents],
        [inputs[name] for name in wanted],
        list(cotangents.values()),
        allow_unused=True,
    )
    return {name: value.detach() for name, value in outputs.items()}, dict(zip(wanted, found))


def assert_close(actual, expected, tolerance, what):
    assert actual.shape == expected.shape, what
    error, size = (actual.double() - expected).norm().item(), expected.norm().item()
    # False for NaN as well. Below 1e-37 float32 has nothing.
    assert error <= max(tolerance * size, 1e-37), f"{what}: error {error:.3g} at size {size:.3g}"


def compare(function, definition, inputs, cotangents, forward=None, backward=None, dtypes=None, **options):
    """All outputs and all gradients of `function` against float64 autograd of `definition`, by name.

    cotangents: by name of output; the others take no part in the backward. dtypes: of outputs, unless the sources'.
    """
    common = inputs["source 0"].dtype
    forward, backward = forward or FORWARD[common], backward or BACKWARD[common]
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    outputs, gradients = evaluate(lambda given: function(given, **options), inputs, cotangents)
    double = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    outputs_expected, gradients_expected = evaluate(
        lambda given: definition(given, **options), double, {name: value.double() for name, value in cotangents.items()}
    )
    assert outputs.keys() == outputs_expected.keys() and gradients.keys() == inputs.keys()
    for name, expected in outputs_expected.items():
        assert outputs[name].dtype == (dtypes or {}).get(name, common), name
        assert_close(outputs[name], expected, forward, name)
    for name, expected in gradients_expected.items():
        if gradients[name] is None:
            assert expected is None or not expected.any(), name
            continue
        assert gradients[name].dtype == inputs[name].dtype, name
        expected = torch.zeros_like(double[name]) if expected is None else expected
        assert_close(gradients[name], expected, backward, f"gradient of {name}")
    return outputs, gradients


# ---- memory that shows what is read and written ----

BORDER = 2048  # numbers on either side; more than a row can overhang
SENTINEL = -12288.0  # exact in all dtypes


def embedded(shape, dtype, inside, border, shift=0):
    """A contiguous tensor (no view) within a larger piece of memory, which is also returned."""
    shape = tuple(shape)
    buffer = torch.full((math.prod(shape) + 2 * BORDER,), border, dtype=dtype)
    tensor = torch.empty(0, dtype=dtype).set_(
        buffer.untyped_storage(), BORDER + shift, shape, torch.empty(shape, device="meta").stride()
    )
    return tensor.fill_(inside), buffer


def bordered(inputs, shift=0):
    """The same inputs with NaN all around: whoever reads past an end spoils the result."""
    moved = {}
    for name, value in inputs.items():
        moved[name], _ = embedded(value.shape, value.dtype, 0, math.nan, shift)
        moved[name].copy_(value)
    return moved


@pytest.fixture
def guarded(monkeypatch):
    """What operators allocate is NaN until they write it, within borders that must be unharmed at the end."""
    allocations = []

    def allocate(shape, dtype):
        tensor, buffer = embedded(shape, dtype, math.nan, SENTINEL)
        allocations.append((buffer, tensor.numel()))
        return tensor

    class Torch(types.ModuleType):
        def __getattr__(self, name):
            return getattr(torch, name)

    patched = Torch("torch")
    patched.empty_like = lambda tensor, dtype=None: allocate(tensor.shape, dtype or tensor.dtype)
    monkeypatch.setattr(route_triton, "torch", patched)

    def new_empty(self, *shape, original=torch.Tensor.new_empty, **options):
        if "device" in options:  # the interpreter's own
            return original(self, *shape, **options)
        return allocate(torch.empty(*shape, device="meta").shape, options.get("dtype", self.dtype))

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield allocations
    assert allocations, "the operators allocate in a way that this fixture does not see"
    for buffer, size in allocations:
        assert (buffer[:BORDER] == SENTINEL).all() and (buffer[BORDER + size :] == SENTINEL).all(), (
            f"a kernel wrote outside its output of {size} numbers"
        )


@pytest.fixture
def bounded(monkeypatch):
    """Every address that a kernel reads or writes must lie in one of the tensors of its launch."""
    from triton.runtime import interpreter

    if not all(hasattr(interpreter.InterpreterBuilder, f"create_masked_{way}") for way in ("load", "store")):
        pytest.skip("this version of Triton has another interpreter")
    tensors, seen = [], []

    def launch(executor, *arguments, original=interpreter.GridExecutor.__call__, **options):
        tensors[:] = [
            tensor
            for argument in arguments
            for tensor in (argument if isinstance(argument, tuple) else (argument,))
            if isinstance(tensor, torch.Tensor)
        ]
        return original(executor, *arguments, **options)

    def watched(name, mask_position):
        original = getattr(interpreter.InterpreterBuilder, name)

        def access(builder, pointers, *rest):
            addresses = pointers.data[rest[mask_position].data.astype(bool)].astype(int)
            seen.append(name)
            if addresses.size:
                first, last = addresses.min(), addresses.max() + pointers.get_element_ty().primitive_bitwidth // 8
                assert any(
                    tensor.data_ptr() <= first and last <= tensor.data_ptr() + tensor.nbytes for tensor in tensors
                ), f"{name} outside of all tensors"
            return original(builder, pointers, *rest)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, access)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    watched("create_masked_load", 0)
    watched("create_masked_store", 1)
    yield
    assert {"create_masked_load", "create_masked_store"} == set(seen)


# ---- route ----


def odd_shapes(count, seed):
    generator = random.Random(seed)
    return [
        (
            generator.randint(2, 57),
            generator.choice((1, 2)),
            generator.choice((1, 3)),
            generator.choice((2, 7, 37, 75, 96, 129)),
        )
        for _ in range(count)
    ]


# T covers one program and several of each kernel's rows; n the padding to 8, 16, 64; D tails that are full, and not.
SHAPES = [(1, 3, 5, 37), (2, 2, 11, 75), (8, 2, 3, 96), (9, 1, 5, 129), (57, 1, 1, 7), (3, 3, 7, 1), (4, 2, 5, 2)]


@pytest.mark.parametrize("rank", [1, 2, 3], ids=["D", "BD", "BTD"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_route_equals_the_definition(guarded, shape, rank):
    inputs = bordered(draw(*shape, rank, seed=sum(shape)))
    # Large enough to show where it is added; and without it RMSNorm of one number is constant, its gradient rounding.
    eps = 0.3 if rank % 2 or shape[-1] == 1 else 1e-6
    compare(fused_route, defined_route, inputs, {"h": draw_like(inputs["source 0"])}, eps=eps)


@pytest.mark.parametrize(
    "shape, rank",
    [
        *zip(odd_shapes(3, seed=3), (1, 2, 3)),
        ((2, 1, 3, 1152), 2),
        ((3, 1, 2, 1281), 3),  # XL's width; the first that needs two warps
        ((128, 1, 1, 7), 1),
    ],
    ids=str,
)  # the most sources that a launch can take
def test_route_equals_the_definition_at_other_sizes(guarded, shape, rank):
    inputs = bordered(draw(*shape, rank, seed=sum(shape)))
    compare(fused_route, defined_route, inputs, {"h": draw_like(inputs["source 0"])})


@pytest.mark.parametrize(
    "shape, rank, dtype",
    [
        ((3, 2, 3, 37), 1, torch.bfloat16),
        ((9, 1, 5, 75), 2, torch.bfloat16),
        ((5, 2, 5, 96), 3, torch.bfloat16),
        ((57, 1, 1, 7), 1, torch.bfloat16),
        ((6, 2, 3, 129), 3, torch.float16),
    ],
    ids=str,
)
def test_route_equals_the_definition_in_half_precision(guarded, shape, rank, dtype):
    inputs = bordered(draw(*shape, rank, dtype, seed=sum(shape)))
    compare(fused_route, defined_route, inputs, {"h": draw_like(inputs["source 0"])})


def test_bf16_inputs_are_computed_in_float32():
    """Two logits near 16 that differ by 1/64: bf16, with a spacing of 1/8 there, would tie them."""
    D = 64
    v = torch.ones(2, 1, 1, D)
    v[1, ..., 0] = 1.5  # exact in bf16; not parallel to the first
    query, g = torch.full((D,), 2.0), torch.ones(D)
    h = route([*v.bfloat16()], query.bfloat16(), g.bfloat16(), backend="triton")
    lse = OPERATORS.route([*v.bfloat16()], query.bfloat16(), g.bfloat16(), 1e-6)[1]
    keys = v.double() / (v.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    logits = 2 * keys.sum(-1) / math.sqrt(D)
    assert 1 / 128 < (logits[0] - logits[1]).abs().item() < 1 / 8
    assert h.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert lse.item() == pytest.approx(logits.logsumexp(0).item(), rel=1e-6)


def test_sources_that_resemble_each_other_give_precise_query_gradients():
    """Neighbouring outputs have a cosine above 0.9 in trained networks; only their differences move a query."""
    generator = torch.Generator().manual_seed(0)
    inputs = draw(4, 2, 3, 135, 1, torch.bfloat16)
    common = torch.randn(2, 3, 135, generator=generator)
    for i in range(4):
        inputs[f"source {i}"] = (common + 0.3 * torch.randn(2, 3, 135, generator=generator)).bfloat16()
    inputs["query"], inputs["norm_weight"] = torch.randn(135, generator=generator), torch.ones(135)
    cotangents = {"h": draw_like(inputs["source 0"])}
    # The float32 reference of kernels/reference.py is within 1e-5 here.
    compare(fused_route, defined_route, inputs, cotangents)


def test_the_log_sum_exp_has_no_gradient():
    """It is there for the backward; a gradient that flowed into it would be lost in silence."""
    inputs = {name: value.requires_grad_() for name, value in draw(2, 1, 1, 3, 1).items()}
    h, lse = OPERATORS.route(listed(inputs), inputs["query"], inputs["norm_weight"], 1e-6)
    assert h.requires_grad and not lse.requires_grad


# ---- route_modulate ----

KNOWN = {"none": (), "some": (1, 3), "all": (0, 1, 2, 3)}
MODULATIONS = [
    *((reads, known, 2, 3) for reads in (("x",), ("h",), ("x", "h")) for known in KNOWN),
    *((("x", "h"), "some", rank, 9) for rank in (1, 2, 3)),
    ((), "some", 2, 3),
]


@pytest.mark.parametrize("reads, known, rank, T", MODULATIONS, ids=str)
def test_route_modulate_equals_the_definition(guarded, reads, known, rank, T):
    """For every choice of what the loss sees. `known`: the returned sources that are read again later."""
    inputs = bordered(draw(4, 2, T, 37, rank, seed=7, modulate=True))
    cotangents = {
        name: draw_like(inputs["source 0"], seed)
        for seed, name in enumerate((*reads, *(f"returned {i}" for i in KNOWN[known])))
    }
    compare(fused_modulate, defined_modulate, inputs, cotangents, eps=0.3, norm_eps=0.05)


@pytest.mark.parametrize("rank", [1, 2, 3], ids=["D", "BD", "BTD"])
@pytest.mark.parametrize("D", [1, 7, 37])
def test_kernels_stay_within_their_tensors(bounded, rank, D):
    """Even where what they read is not used: an address past the end may not exist on a GPU."""
    inputs = {name: value.requires_grad_() for name, value in draw(3, 2, 5, D, rank, modulate=True).items()}
    cotangents = {name: draw_like(inputs["source 0"], seed) for seed, name in enumerate(("x", "h", "returned 2"))}
    evaluate(fused_modulate, inputs, cotangents)


@pytest.mark.parametrize(
    "shape, rank",
    [((1, 2, 3, 37), 2), ((2, 1, 17, 7), 3), ((9, 3, 1, 129), 1), ((2, 1, 2, 1152), 2), ((2, 1, 2, 1281), 2)],
    ids=str,
)
def test_route_modulate_equals_the_definition_at_other_sizes(guarded, shape, rank):
    inputs = bordered(draw(*shape, rank, seed=sum(shape), modulate=True))
    like = inputs["source 0"]
    cotangents = {"x": draw_like(like, 1), "h": draw_like(like, 2), f"returned {shape[0] - 1}": draw_like(like, 3)}
    compare(fused_modulate, defined_modulate, inputs, cotangents, norm_eps=1e-2)


@pytest.mark.parametrize("autocast", [False, True])
def test_route_modulate_in_bf16(guarded, autocast):
    inputs = bordered(draw(5, 2, 3, 75, 2, torch.bfloat16, seed=3, modulate=True))
    cotangents = {name: draw_like(inputs["source 0"], seed) for seed, name in enumerate(("x", "h", "returned 2"))}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        compare(fused_modulate, defined_modulate, inputs, cotangents)


def test_under_autocast_x_is_ready_for_the_sublayer_and_h_keeps_its_precision(guarded):
    inputs = bordered(draw(3, 2, 3, 37, 2, seed=3, modulate=True))
    like = inputs["source 0"]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = fused_modulate(inputs)
        compare(
            fused_modulate,
            defined_modulate,
            inputs,
            {"x": draw_like(like, 1, torch.bfloat16)},
            forward=FORWARD[torch.bfloat16],
            dtypes={"x": torch.bfloat16},
        )
    assert_close(outputs["h"], defined_modulate({k: v.double() for k, v in inputs.items()})["h"], 2e-6, "h")
    assert fused_modulate(inputs)["x"].dtype == torch.float32  # without autocast x is as precise as h


def test_under_autocast_the_backends_return_the_same_dtypes():
    inputs = draw(2, 1, 2, 5, 2, modulate=True)
    for dtype in (torch.float32, torch.bfloat16):
        sources = [v.to(dtype) for v in listed(inputs)]
        for autocast in (False, True):
            for backend in ("torch", "triton"):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    x, h, _ = route_modulate(
                        sources,
                        inputs["query"],
                        inputs["norm_weight"],
                        inputs["shift"],
                        inputs["scale"],
                        backend=backend,
                    )
                    mixed = route(sources, inputs["query"], inputs["norm_weight"], backend=backend)
                assert x.dtype == (torch.bfloat16 if autocast else dtype) and h.dtype == mixed.dtype == dtype


@pytest.mark.parametrize("transposed", [False, True])
def test_shift_and_scale_may_be_parts_of_a_larger_tensor(guarded, transposed):
    """adaLN's six chunks of one (B, 6D), and a layout in which not even a row is contiguous."""
    B, D = 3, 33
    whole = torch.randn(B, 6 * D, generator=torch.Generator().manual_seed(1))
    inputs = {**draw(3, B, 5, D, 2), "whole": whole.T.contiguous() if transposed else whole}

    def parts(given):
        whole = given["whole"].T if transposed else given["whole"]
        chunks = whole.chunk(6, -1)
        assert not chunks[3].is_contiguous() and (chunks[3].stride(-1) == 1) != transposed
        return {**given, "shift": chunks[3], "scale": chunks[4]}

    cotangents = {"x": draw_like(inputs["source 0"], 1), "h": draw_like(inputs["source 0"], 2)}
    compare(
        lambda given: fused_modulate(parts(given)), lambda given: defined_modulate(parts(given)), inputs, cotangents
    )


# ---- several aggregators, one after the other ----

PLAN = [(0,), (0, 1), (0, 2), (0, 2, 3), (0, 2, 4), (0, 2, 4, 5)]  # six sublayers in chunks of two


def through(read):
    """A network: sublayer l reads the sources PLAN[l - 1] by `read`, which returns x, h and sources for later."""

    def network(inputs, unused=(), returned=True):
        v, outputs = [inputs["source 0"]], {}
        for l, indices in enumerate(PLAN, start=1):
            query = inputs[f"query {l}"]
            if query.ndim == 2 and inputs["kind"].item() == 3:
                query = v[-1] @ query  # W v_{l-1}, one per token
            x, h, sources = read([v[i] for i in indices], query, inputs[f"weight {l}"], *inputs[f"shift and scale {l}"])
            if returned:
                for i, source in zip(indices, sources):
                    v[i] = source
            outputs[f"h {l}"], outputs[f"x {l}"] = h, x
            if l in unused:
                x = v[-1]  # a sublayer that never looks at its state
            v.append(1.1**l * torch.tanh(x @ inputs[f"matrix {l}"] + 0.3 * x.roll(1, 1)))
        outputs["last"] = v[-1]
        outputs |= {f"v {i}": v[i] for i in range(len(PLAN))}  # as returned by the last that read them
        return outputs

    return network


def fused_read(sources, query, norm_weight, shift, scale):
    return route_modulate(sources, query, norm_weight, shift, scale, backend="triton")


def defined_read(sources, query, norm_weight, shift, scale):
    h = aggregated(sources, query, norm_weight)
    return modulated(h, shift, scale), h, sources


CHAINS = {  # rank of the query, what the loss sees, and how the chain is built
    "static": (1, ("last", "x 6"), {}),
    "timestep": (2, ("last", "x 6", "h 6", "h 3", "v 0"), {}),
    "dynamic": (3, ("last", "x 6"), {}),
    "a state that nothing reads": (2, ("last", "x 6"), dict(unused=(3, 4))),
    "one that only an aligned h reads": (2, ("last", "h 3"), dict(unused=(3,))),
    "returned sources that nothing reads": (2, ("x 6", "h 2"), {}),
    "only a source that passed through": (2, ("v 4",), {}),
    "every reader given the original sources": (2, ("last", "x 6", "h 3"), dict(returned=False)),
}


@pytest.mark.parametrize("case", CHAINS)
def test_gradients_add_up_through_a_chain(guarded, case):
    """Sources are shared by several aggregators, whose gradients meet inside the kernels."""
    rank, seen, options = CHAINS[case]
    B, T, D = 2, 2, 9
    generator = torch.Generator().manual_seed(5)
    inputs = {"source 0": torch.randn(B, T, D, generator=generator)}
    for l in range(1, len(PLAN) + 1):
        inputs[f"query {l}"] = torch.randn({1: (D,), 2: (B, D), 3: (D, D)}[rank], generator=generator)
        inputs[f"weight {l}"] = 1 + torch.randn(D, generator=generator)
        inputs[f"shift and scale {l}"] = torch.randn(2, B, D, generator=generator)
        inputs[f"matrix {l}"] = torch.randn(D, D, generator=generator) / math.sqrt(D)
    inputs["kind"] = torch.tensor(float(rank))
    cotangents = {name: draw_like(inputs["source 0"], seed) for seed, name in enumerate(seen)}
    # A rounding passes through six nonlinear sublayers, of gain about two each, forward and backward.
    compare(through(fused_read), through(defined_read), inputs, cotangents, forward=2e-5, backward=2e-4, **options)


def test_one_tensor_may_be_several_sources(guarded):
    inputs = {**draw(2, 2, 3, 7, 2, modulate=True)}
    cotangents = {name: draw_like(inputs["source 0"], seed) for seed, name in enumerate(("x", "returned 2"))}

    def twice(given):
        return {**given, "source 2": given["source 0"]}

    compare(
        lambda given: fused_modulate(twice(given)), lambda given: defined_modulate(twice(given)), inputs, cotangents
    )
    inputs = draw(2, 2, 3, 7, 2)
    compare(
        lambda given: fused_route(twice(given)),
        lambda given: defined_route(twice(given)),
        inputs,
        {"h": draw_like(inputs["source 0"])},
    )


def test_what_needs_no_gradient_gets_none():
    """A frozen aggregator, or frozen sources, change nothing for the rest."""
    for function, modulate in ((fused_route, False), (fused_modulate, True)):
        inputs = draw(3, 1, 2, 7, 2, modulate=modulate)
        cotangent = draw_like(inputs["source 0"])
        _, whole = evaluate(
            function, {name: value.clone().requires_grad_() for name, value in inputs.items()}, {"h": cotangent}
        )
        for frozen in (("source 1",), ("query", "norm_weight", "shift", "scale"), ("source 0", "source 1", "source 2")):
            some = {name: value.clone().requires_grad_(name not in frozen) for name, value in inputs.items()}
            outputs, part = evaluate(function, some, {"h": cotangent})
            assert part.keys() == inputs.keys() - set(frozen)
            for name, value in part.items():
                assert value is whole[name] is None or torch.equal(value, whole[name]), name
        with torch.no_grad():
            free = function(inputs)
        assert not free["h"].requires_grad and torch.equal(free["h"], outputs["h"])


def test_a_second_derivative_is_refused():
    """There is none: an error, and not zeros."""
    for function, modulate in ((fused_route, False), (fused_modulate, True)):
        inputs = {name: value.requires_grad_() for name, value in draw(2, 1, 1, 3, 1, modulate=modulate).items()}
        (gradient,) = torch.autograd.grad(function(inputs)["h"].pow(2).sum(), inputs["source 0"], create_graph=True)
        with pytest.raises(RuntimeError, match="dar"):
            gradient.pow(2).sum().backward()


# ---- exact properties ----


@pytest.mark.parametrize("rank", [1, 2, 3], ids=["D", "BD", "BTD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_source_is_returned_and_sends_no_gradient_to_its_weights(guarded, dtype, rank):
    for modulate, function in ((False, fused_route), (True, fused_modulate)):
        inputs = draw(1, 2, 5, 37, rank, dtype, modulate=modulate)
        inputs["source 0"] = 1000 * inputs["source 0"]
        inputs["query"] = 100 * inputs["query"]  # a logit that rounds coarsely
        inputs = {name: value.requires_grad_() for name, value in inputs.items()}
        cotangent = draw_like(inputs["source 0"])
        outputs, gradients = evaluate(function, inputs, {"h": cotangent})
        assert torch.equal(outputs["h"], inputs["source 0"])
        assert torch.equal(gradients["source 0"], cotangent)
        for name in ("query", "norm_weight"):
            assert torch.equal(gradients[name], torch.zeros_like(inputs[name])), name
    # On a GPU the kernels need not round alike. So that it holds there too, the backward does not rely on it:
    arguments = [inputs["source 0"].detach()], inputs["query"].detach(), inputs["norm_weight"].detach()
    h, lse = OPERATORS.route(*arguments, 1e-6)
    assert (lse == -math.inf).all()  # nor on the logit
    (dv,), dquery, dweight = OPERATORS.route_backward(cotangent, 1.01 * h, lse, arguments[0], [], *arguments[1:], 1e-6)
    assert torch.equal(dv, cotangent) and not dquery.any() and not dweight.any()


@pytest.mark.parametrize("rank", [1, 2, 3], ids=["D", "BD", "BTD"])
def test_repeated_runs_are_bit_identical(rank):
    inputs = {name: value.requires_grad_() for name, value in draw(3, 2, 9, 37, rank, modulate=True).items()}
    cotangents = {name: draw_like(inputs["source 0"], seed) for seed, name in enumerate(("x", "h", "returned 2"))}
    first, second = (evaluate(fused_modulate, inputs, cotangents) for _ in range(2))
    for ours, theirs in zip(first, second):
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name


# ---- unusual inputs ----


def test_sources_of_different_dtypes_meet_in_the_common_one(guarded):
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    for function, definition, modulate in (
        (fused_route, defined_route, False),
        (fused_modulate, defined_modulate, True),
    ):
        inputs = draw(3, 2, 3, 37, 2, modulate=modulate)
        cotangents = {"h": draw_like(inputs["source 0"])}
        inputs |= {f"source {i}": inputs[f"source {i}"].to(dtype) for i, dtype in enumerate(dtypes)}
        names = ("h", "x", "returned 0", "returned 1", "returned 2")
        # A gradient takes its source's dtype only at the end: one rounding, to nearest.
        compare(
            function,
            definition,
            inputs,
            cotangents,
            forward=FORWARD[torch.float32],
            backward=2**-8,
            dtypes=dict.fromkeys(names, torch.float32),
        )


def test_parameters_may_be_of_another_dtype_than_the_sources(guarded):
    """Under autocast: bf16 sources, float32 queries and norm weights, bf16 or float32 shift and scale."""
    inputs = draw(3, 2, 5, 33, 2, modulate=True)
    inputs |= {name: inputs[name].bfloat16() for name in ("source 0", "source 1", "source 2", "shift")}
    cotangents = {name: draw_like(inputs["source 0"], seed) for seed, name in enumerate(("x", "h"))}
    compare(fused_modulate, defined_modulate, inputs, cotangents)


def layouts(B, T, D):
    """Non-contiguous (B, T, D) from contiguous ones."""
    return {
        "transposed": ((T, B, D), lambda v: v.transpose(0, 1)),
        "strided": ((B, T, 2 * D), lambda v: v[..., ::2]),
        "a part": ((B, T + 4, D), lambda v: v[:, 2:-2]),
        "expanded": ((B, 1, D), lambda v: v.expand(B, T, D)),
        "permuted": ((D, T, B), lambda v: v.permute(2, 1, 0)),
    }


def test_layout_does_not_matter(guarded):
    """Of sources, query, norm weight and cotangents. Expanded cotangents are what .sum() and .mean() send back."""
    B, T, D = 2, 3, 7
    generator = torch.Generator().manual_seed(0)
    inputs = draw(5, B, T, D, 3, modulate=True)
    views = layouts(B, T, D)
    for i, (shape, _) in enumerate(views.values()):
        inputs[f"source {i}"] = torch.randn(shape, generator=generator)
    inputs["query"], inputs["norm_weight"] = torch.randn(T, B, D, generator=generator), torch.randn(D, 2)

    def seen(given):
        arranged = {f"source {i}": view(given[f"source {i}"]) for i, (_, view) in enumerate(views.values())}
        assert not any(value.is_contiguous() for value in arranged.values())
        return {**given, **arranged, "query": given["query"].transpose(0, 1), "norm_weight": given["norm_weight"][:, 1]}

    for cotangent in (torch.tensor(0.7).expand(B, T, D), torch.randn(T, B, D).transpose(0, 1)):
        assert not cotangent.is_contiguous()
        compare(
            lambda given: fused_modulate(seen(given)),
            lambda given: defined_modulate(seen(given)),
            inputs,
            {"x": cotangent * 1, "h": cotangent, "returned 1": cotangent, "returned 3": cotangent},
        )
        compare(
            lambda given: fused_modulate(seen(given)),
            lambda given: defined_modulate(seen(given)),
            inputs,
            {"x": cotangent + torch.randn(B, 1, D).expand(B, T, D)},
        )
        compare(
            lambda given: fused_route(seen(given)), lambda given: defined_route(seen(given)), inputs, {"h": cotangent}
        )


@pytest.mark.parametrize("B, T", [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("rank", [1, 2, 3], ids=["D", "BD", "BTD"])
def test_nothing_in_nothing_out(rank, B, T):
    """An empty batch still gives every parameter a gradient, of zeros."""
    for function, modulate in ((fused_route, False), (fused_modulate, True)):
        inputs = {name: value.requires_grad_() for name, value in draw(3, B, T, 7, rank, modulate=modulate).items()}
        cotangents = {name: torch.zeros(B, T, 7) for name in (("x", "h") if modulate else ("h",))}
        outputs, gradients = evaluate(function, inputs, cotangents)
        assert all(value.shape == (B, T, 7) for value in outputs.values())
        for name, value in gradients.items():
            assert torch.equal(value, torch.zeros_like(inputs[name])), name


def test_zero_sources_have_the_finite_gradient_of_rmsnorm_at_zero(guarded):
    """v_1 .. v_n are zero while the sublayers' gates are: there RMSNorm has a gradient gain of 1/sqrt(eps) = 1000."""
    for function, definition, modulate in (
        (fused_route, defined_route, False),
        (fused_modulate, defined_modulate, True),
    ):
        inputs = draw(4, 2, 3, 33, 2, modulate=modulate)
        for i in (1, 2, 3):
            inputs[f"source {i}"] = torch.zeros(2, 3, 33)
        cotangent = draw_like(inputs["source 0"])
        _, gradients = compare(function, definition, inputs, {"h": cotangent})
        assert gradients["source 1"].norm() > 5 * cotangent.norm()  # the gain is really there
        inputs["source 0"] = torch.zeros(2, 3, 33)
        outputs, gradients = compare(function, definition, inputs, {"h": cotangent})
        assert not outputs["h"].any() and torch.allclose(gradients["source 0"], cotangent / 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_sources_do_not_overflow(guarded, dtype):
    """Their squares exceed float16 by far."""
    inputs = draw(4, 2, 3, 33, 2, seed=1, modulate=True)
    for i in range(4):
        inputs[f"source {i}"] = 1e4 * inputs[f"source {i}"].sign()
    inputs |= {name: value.to(dtype) for name, value in inputs.items() if name.startswith("source")}
    cotangents = {name: draw_like(inputs["source 0"], seed) for seed, name in enumerate(("x", "h"))}
    compare(fused_modulate, defined_modulate, inputs, cotangents)


@pytest.mark.parametrize("rank", [1, 3], ids=["D", "BTD"])
def test_large_logits_do_not_overflow(guarded, rank):
    """Hundreds, of either sign: exp of them is infinite or zero."""
    # Not so large that the gradients fall below 1e-16 of the terms that they are made of: float64 has nothing there.
    inputs = draw(5, 2, 5, 65, rank, seed=4)
    inputs["query"] = 100 * inputs["query"]
    # float32 holds a logit of 1000 to 1e-4 only, and the weights follow.
    compare(fused_route, defined_route, inputs, {"h": draw_like(inputs["source 0"])}, forward=1e-3, backward=1e-2)


@pytest.mark.parametrize("sign", [-1, 1])
def test_equal_large_logits_give_a_mean(guarded, sign):
    """Keys of parallel sources are equal, whatever their lengths; 2000 or -2000 for all must not become 0 / 0."""
    u, D = torch.linspace(1, 2, 9), 9
    inputs = {f"source {i}": (i + 1) * u.expand(2, 3, D).contiguous() for i in range(4)}
    inputs |= {"query": sign * 600 * u, "norm_weight": torch.ones(D)}
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    outputs, gradients = evaluate(fused_route, inputs, {"h": draw_like(inputs["source 0"])})
    assert_close(outputs["h"], 2.5 * u.double().expand(2, 3, D), 1e-3, "h")  # logits round by 1e-4
    assert all(gradient.isfinite().all() for gradient in gradients.values())


# ---- as PyTorch operators ----


def operator_cases(rank):
    """Small arguments for each of the operators; those of `route`, which has a derivative, need gradients."""
    inputs = draw(2, 2, 3, 5, rank, modulate=True)
    sources, query, g = listed(inputs), inputs["query"], inputs["norm_weight"]
    shift, scale = torch.cat([inputs["shift"], inputs["scale"]], 1).chunk(2, 1)
    h, lse = OPERATORS.route(sources, query, g, 1e-6)
    dh = draw_like(h)
    return {
        "route": (
            OPERATORS.route.default,
            (
                [v.clone().requires_grad_() for v in sources],
                query.clone().requires_grad_(),
                g.clone().requires_grad_(),
                1e-6,
            ),
        ),
        "route, transposed": (
            OPERATORS.route.default,
            ([v.transpose(0, 1).contiguous().transpose(0, 1) for v in sources], query, g, 1e-6),
        ),
        "route_modulate": (
            OPERATORS.route_modulate.default,
            (sources, query, g, shift, scale, 1e-6, 1e-6, torch.bfloat16),
        ),
        "route_backward": (OPERATORS.route_backward.default, (dh, h, lse, sources, [dh, h], query, g, 1e-6)),
        "modulate_backward": (OPERATORS.modulate_backward.default, (dh, h, h, shift, scale, 1e-6)),
        "modulate_backward, no dh": (OPERATORS.modulate_backward.default, (dh, None, h, shift, scale, 1e-6)),
    }


@pytest.mark.parametrize(
    "name, rank",
    [
        *(
            (name, rank)
            for name in ("route", "route, transposed", "route_modulate", "route_backward")
            for rank in (1, 2, 3)
        ),
        ("modulate_backward", 2),
        ("modulate_backward, no dh", 2),
    ],
)
def test_operators_keep_pytorchs_rules(name, rank):
    """Schema, derivative, shapes and strides as promised to torch.compile, symbolic shapes."""
    operator, arguments = operator_cases(rank)[name]
    torch.library.opcheck(operator, arguments)


def two_sublayers(inputs):
    """A block's worth of routing: what the second reads was returned by the first."""
    x, _, sources = route_modulate(
        listed(inputs), inputs["query"], inputs["norm_weight"], inputs["shift"], inputs["scale"], backend="triton"
    )
    x, h, sources = route_modulate(
        [*sources, torch.tanh(x)],
        inputs["query"],
        inputs["norm_weight"],
        inputs["scale"],
        inputs["shift"],
        backend="triton",
    )
    mixed = route([*sources, x], inputs["query"], inputs["norm_weight"], backend="triton")
    return {"x": x, "h": h, "mixed": mixed, "returned 0": sources[0]}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_block_compiles_as_one_graph(backend, tmp_path, monkeypatch):
    if backend == "inductor" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    inputs = {name: value.requires_grad_() for name, value in draw(2, 2, 3, 8, 2, modulate=True).items()}
    cotangents = {
        name: draw_like(inputs["source 0"], seed) for seed, name in enumerate(("x", "h", "mixed", "returned 0"))
    }
    eager = evaluate(two_sublayers, inputs, cotangents)
    compiled = evaluate(torch.compile(two_sublayers, fullgraph=True, backend=backend), inputs, cotangents)
    for ours, theirs in zip(compiled, eager):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_close(ours[name], theirs[name].double(), 1e-5, name)


@pytest.mark.parametrize("modulate", [False, True], ids=["route", "route_modulate"])
def test_floating_point_operations_are_counted(modulate):
    """Per number of a source, forward: 2 for its mean square, 2 for its logit, 2 for the sum. Backward 14: three such
    sums, 6 for dv, 2 for the query. On top: an addition per known gradient, dh . h, and the norm with its modulation.
    """
    n, B, T, D = 3, 2, 5, 7
    inputs = {name: value.requires_grad_() for name, value in draw(n, B, T, D, 2, modulate=modulate).items()}
    names = ("x", "returned 0", "returned 2") if modulate else ("h",)
    with FlopCounterMode(display=False) as counter:
        evaluate(
            fused_modulate if modulate else fused_route, inputs, {name: draw_like(inputs["source 0"]) for name in names}
        )
    counts = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    if modulate:
        expected = {"dar.route_modulate": 6 * n + 8, "dar.route_backward": 16 * n + 2 + 2, "dar.modulate_backward": 18}
    else:
        expected = {"dar.route": 6 * n, "dar.route_backward": 16 * n + 2}
    assert counts == {operator: count * B * T * D for operator, count in expected.items()}


def test_memory_traffic_is_counted():
    """Forward: n sources in, h and perhaps x out. Backward: sources, h and dh in, known gradients in, gradients out;
    behind a LayerNorm dx and h in, dh out once more."""
    assert route_triton.forward_bytes(57, 1000, 2) == (57 + 1) * 2000
    assert route_triton.forward_bytes(57, 1000, 2, modulate=True) == (57 + 2) * 2000
    assert route_triton.backward_bytes(57, 1000, 4) == (57 + 57 + 2) * 4000
    assert route_triton.backward_bytes(57, 1000, 4, num_known=5, modulate=True) == (57 + 57 + 2 + 5 + 3) * 4000


# ---- launches ----


def test_every_width_is_covered_by_head_and_tail():
    """The head is read and written without a mask, so it must not be longer than a row."""
    for width in range(1, 5000):
        options = route_triton._options(width)
        head, tail = options["HEAD"], options["TAIL"]
        assert head <= width <= head + tail and head.bit_count() == tail.bit_count() == 1, width
    assert route_triton.warps(1152) == 1 and route_triton.warps(1281) == 2
    assert all(route_triton.warps(width) in (1, 2, 4, 8, 16) for width in range(1, 100_000, 97))


class Recorder:
    """In a kernel's place: keeps the options of its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((grid, arguments, options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_aligned_addresses_are_called_aligned(monkeypatch, dtype):
    """A GPU stops at a 16-byte load from anywhere else; the interpreter would not notice."""
    forward, backward = Recorder(), Recorder()
    monkeypatch.setattr(route_triton, "_forward", forward)
    monkeypatch.setattr(route_triton, "_backward", backward)
    inputs = draw(9, 1, 1, 16, 1, dtype)
    sources, query, g = listed(bordered(inputs)), inputs["query"], inputs["norm_weight"]
    moved = listed(bordered(inputs, shift=1))
    assert all(v.data_ptr() % 16 == 0 for v in sources) and all(v.data_ptr() % 16 for v in moved)
    h, lse = sources[0].clone(), torch.zeros(1, 1)

    for i in (None, 0, 8):
        mixed = [moved[j] if i == j else v for j, v in enumerate(sources)]
        route_triton.route(mixed, query, g, 1e-6)
        route_triton.route_backward(h, h, lse, mixed, [], query, g, 1e-6)
        route_triton.route_backward(h, h, lse, sources, mixed, query, g, 1e-6)
    aligned, first, last = (
        [launch[2]["ALIGN"] for launch in launches]
        for launches in (
            forward.launches[:1] + backward.launches[:2],
            forward.launches[1:2] + backward.launches[2:4],
            forward.launches[2:] + backward.launches[4:],
        )
    )
    assert aligned == [16] * 3 and first == last == [dtype.itemsize] * 3


def test_kernels_run_with_a_misaligned_source(guarded):
    inputs = bordered(draw(3, 2, 3, 37, 2, modulate=True), shift=1)
    compare(fused_modulate, defined_modulate, inputs, {"x": draw_like(inputs["source 0"])})


def test_one_compiled_kernel_serves_many_counts_of_sources(monkeypatch):
    """Tuples are padded; a launch's types change at 8, 16, 32, 64 and 128 sources and nowhere else."""
    recorder = Recorder()
    monkeypatch.setattr(route_triton, "_forward", recorder)
    v = torch.zeros(1, 1, 2)
    for n in range(1, 129):
        route_triton.route([v] * n, torch.zeros(2), torch.zeros(2), 1e-6)
    lengths = [len(arguments[0]) for _, arguments, _ in recorder.launches]
    assert [arguments[1] for _, arguments, _ in recorder.launches] == list(range(1, 129))
    assert lengths == [8] * 8 + [16] * 8 + [32] * 16 + [64] * 32 + [128] * 64


# ---- which backend ----


def small(n=2, dtype=torch.float32):
    return dict(sources=[torch.zeros(2, 3, 5, dtype=dtype)] * n, query=torch.zeros(5), norm_weight=torch.ones(5))


def small_modulate(n=2, dtype=torch.float32):
    return dict(**small(n, dtype), shift=torch.zeros(2, 5), scale=torch.zeros(2, 5))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(sources=small(dtype=torch.float64)["sources"]), "float64"),
        (dict(sources=[torch.zeros(2, 3, 5), torch.zeros(2, 3, 5, dtype=torch.float64)]), "float64"),
        (dict(return_weights=True), "return_weights"),
        (dict(sources=small(129)["sources"]), "129 sources"),
    ],
)
def test_triton_says_what_it_cannot_do(change, message):
    with pytest.raises(ValueError, match=f"'triton' .*{message}"):
        route(**{**small(), **change}, backend="triton")
    route(**{**small(), **change}, backend="torch")  # and the way out that the message names is one
    route(**{**small(), **change}, backend="auto")
    if "return_weights" not in change:
        with pytest.raises(ValueError, match=f"'triton' .*{message}"):
            route_modulate(**{**small_modulate(), **change}, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(shift=torch.zeros(5)), r"shift is \(5,\)"),
        (dict(scale=torch.zeros(2, 6)), r"scale is \(2, 6\)"),
        (dict(shift=torch.zeros(1, 5)), r"shift is \(1, 5\)"),
        (dict(scale=torch.zeros(2, 1, 5)), r"scale is \(2, 1, 5\)"),
        (dict(sources=[]), "empty"),
        (dict(query=torch.zeros(3, 5)), r"query is \(3, 5\)"),
        (dict(norm_weight=torch.ones(1)), r"norm_weight is \(1,\)"),
    ],
)
def test_route_modulate_refuses_what_does_not_fit(change, message, backend):
    with pytest.raises(ValueError, match=message):
        route_modulate(**{**small_modulate(), **change}, backend=backend)


@pytest.mark.parametrize("change, message", [(dict(backend="cuda"), "'cuda'"), (dict(backend=None), "None")])
def test_unknown_backends_are_refused(change, message):
    for call in (
        lambda: route(**small(), **change),
        lambda: route_modulate(**small_modulate(), **change),
        lambda: resolve_backend(change["backend"], torch.device("cpu")),
    ):
        with pytest.raises(ValueError, match=f"backend {message} is unknown; choose one of auto, torch, triton"):
            call()


CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # a name; no GPU is needed for it


def test_resolved_backends(monkeypatch):
    assert [resolve_backend(name, CUDA) for name in ("auto", "torch", "triton")] == ["triton", "torch", "triton"]
    assert [resolve_backend(name, CPU) for name in ("auto", "torch", "triton")] == ["torch", "torch", "triton"]
    monkeypatch.setattr(route_triton, "INTERPRETED", False)
    assert [resolve_backend(name, CUDA) for name in ("auto", "torch", "triton")] == ["triton", "torch", "triton"]
    assert [resolve_backend(name, CPU) for name in ("auto", "torch")] == ["torch", "torch"]
    for call in (
        lambda: resolve_backend("triton", CPU),
        lambda: route(**small(), backend="triton"),
        lambda: route_modulate(**small_modulate(), backend="triton"),
    ):
        with pytest.raises(ValueError, match="CUDA device, not 'cpu'.*TRITON_INTERPRET=1"):
            call()
    monkeypatch.setattr(kernels, "route_triton", None)  # as on systems without Triton
    assert resolve_backend("auto", CUDA) == resolve_backend("auto", CPU) == "torch"
    for device in (CPU, CUDA):
        with pytest.raises(ValueError, match="not installed"):
            resolve_backend("triton", device)


def test_without_triton_there_is_pytorch():
    """The package imports and routes where Triton cannot be installed."""
    code = """if True:
        import importlib.util, torch
        original = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *more: None if name == "triton" else original(name, *more)
        import kernels
        assert kernels.route_triton is None
        v = torch.ones(1, 1, 3)
        assert torch.equal(kernels.route([v, 3 * v], torch.zeros(3), torch.ones(3)), 2 * v)
        """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture
def no_triton(monkeypatch):
    def refuse(*args):
        raise AssertionError("Triton was called")

    monkeypatch.setattr(route_triton, "route", refuse)
    monkeypatch.setattr(route_triton.RouteModulate, "apply", refuse)


def test_auto_is_plain_pytorch_on_a_cpu(no_triton):
    inputs = draw(3, 2, 3, 5, 2, modulate=True)
    expected = defined_modulate({name: value.double() for name, value in inputs.items()})
    h = route(listed(inputs), inputs["query"], inputs["norm_weight"])
    x, h_too, sources = route_modulate(
        listed(inputs), inputs["query"], inputs["norm_weight"], inputs["shift"], inputs["scale"]
    )
    assert torch.equal(h, h_too) and all(ours is theirs for ours, theirs in zip(sources, listed(inputs), strict=True))
    assert_close(h, expected["h"], 2e-6, "h")
    assert_close(x, expected["x"], 2e-6, "x")
    for backend in ("torch", "auto"):
        assert torch.equal(h, route(listed(inputs), inputs["query"], inputs["norm_weight"], backend=backend))
    with pytest.raises(AssertionError, match="was called"):  # the fixture is not a dead letter
        route(listed(inputs), inputs["query"], inputs["norm_weight"], backend="triton")
    with pytest.raises(AssertionError, match="was called"):
        route_modulate(**small_modulate(), backend="triton")


def test_auto_on_a_gpu_leaves_to_pytorch_what_triton_cannot_do(no_triton, monkeypatch):
    monkeypatch.setattr(kernels, "resolve_backend", lambda backend, device: "triton")
    assert route(**small(dtype=torch.float64)).dtype == torch.float64
    assert route(**small(), return_weights=True)[1].shape == (2, 2, 3)
    assert route(**small(129)).shape == (2, 3, 5)
    assert route_modulate(**small_modulate(129))[0].shape == (2, 3, 5)
    assert route_modulate(**small_modulate(dtype=torch.float64))[0].dtype == torch.float64
    with pytest.raises(AssertionError, match="was called"):
        route(**small(128))


# ---- inside SiT and the trainer ----

TINY = dict(
    input_size=4,
    patch_size=2,
    in_channels=1,
    hidden_size=8,
    depth=2,
    num_heads=2,
    num_classes=3,
    routing="dar",
    chunk_size=2,
    align_depth=(1,),
    align_dims=(),
    projector_dim=8,
)


def tiny_sit(backend, query="timestep", **changes):
    torch.manual_seed(0)
    model = SiT(**{**TINY, **changes}, query=query, route_backend=backend)
    randomize(model, scale=0.2)  # gates and queries that start at zero hide much
    return model


def tiny_batch(B=2):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(B, 1, 4, 4, generator=generator),
        torch.rand(B, generator=generator),
        torch.arange(B) % 3,
        torch.linspace(0, 0.99, B),
    )


def states_and_gradients(model, forward=None):
    velocity, aligned = (model if forward is None else forward)(*tiny_batch())
    loss = sum(output.float().square().mean() for output in (velocity, *aligned))
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return [velocity.detach(), *(z.detach() for z in aligned), *gradients]


@pytest.mark.parametrize(
    "query, final, precision",
    [("static", "shared", "float32"), ("timestep", "shared", "bf16"), ("dynamic", "dedicated", "float32")],
)
def test_sit_is_the_same_network_with_either_backend(query, final, precision):
    results = {}
    for backend in ("torch", "triton"):
        model = tiny_sit(backend, query, final_aggregator=final, align_dims=(5,))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            results[backend] = states_and_gradients(model)
    # Both round to bf16 in places of their own, and each of the sublayers passes that on.
    tolerance = 1e-5 if precision == "float32" else 0.05
    names = ["velocity", "aligned", *(name for name, p in model.named_parameters() if p.requires_grad)]
    for name, ours, theirs in zip(names, results["triton"], results["torch"], strict=True):
        assert ours.dtype == theirs.dtype
        if ours.norm() > 1e-6:  # but for gradients that are zero: key biases
            assert_close(ours, theirs.double(), tolerance, name)


@pytest.mark.parametrize("query", ["static", "timestep", "dynamic"])
def test_sit_compiles_as_one_graph(query):
    torch.compiler.reset()
    model = tiny_sit("triton", query, depth=1, align_dims=(5,))
    eager = states_and_gradients(model)
    compiled = states_and_gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    for i, (ours, theirs) in enumerate(zip(compiled, eager, strict=True)):
        assert_close(ours, theirs.double(), 1e-5, f"result {i}")


@pytest.mark.parametrize("query", ["static", "timestep", "dynamic"])
def test_a_short_training_is_the_same_with_either_backend(query):
    losses = {}
    for backend in ("torch", "triton"):
        model = tiny_sit(backend, query)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        x, t, y, label_draw = tiny_batch()
        losses[backend] = []
        for _ in range(3):
            loss = (model(x, t, y, label_draw)[0] - x.flip(0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-5)
    assert len(set(losses["torch"])) == 3


def test_the_trainer_trains_alike_with_either_backend(tmp_path, capsys):
    prepare.main(["digits", "--out", str(tmp_path / "data"), "--limit", "12"])
    records = {}
    for backend, name in (("torch", "plain PyTorch"), ("triton", "fused Triton kernels")):
        values = {
            "data": tmp_path / "data",
            "out": tmp_path / backend,
            "model": "SiT-S/4",
            "depth": 1,
            "hidden_size": 8,
            "num_heads": 2,
            "routing": "dar",
            "chunk_size": 2,
            "batch_size": 2,
            "max_steps": 2,
            "log_every": 1,
            "eval_every": 0,
            "checkpoint_every": 2,
            "tensorboard": False,
            "route_backend": backend,
        }
        arguments = [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        train_repa_dar.main(["--config", "digits", *arguments])
        assert f"routing dar by {name}" in capsys.readouterr().out
        records[backend] = [
            (line["step"], line["loss"], line["grad_norm"]) for line in read_lines(tmp_path / backend / "metrics.jsonl")
        ]
    assert [step for step, *_ in records["torch"]] == [1, 2]
    for ours, theirs in zip(records["triton"], records["torch"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


# ---- compiled for a GPU, without one ----

# In a process of its own: in this one triton.jit made interpreted functions.
COMPILE = """
import json, os, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import route_triton as k

assert not k.INTERPRETED
options = k._options(1152)
warps = options.pop("num_warps")
table = ("*bf16",) * 32
FORWARD_OPTIONS = dict(ALIGN=16, STAGES=k.STAGES, ROWS=k.FORWARD_ROWS)
BACKWARD_OPTIONS = dict(ALIGN=16, STAGES=k.STAGES, ROWS=k.BACKWARD_ROWS)
FORWARD = dict(sources=table, query="*fp32", weight="*fp32", h="*bf16", lse="*fp32", x="*bf16", shift="*bf16",
               scale="*bf16")
BACKWARD = dict(sources=table, known=table, gradients=table, dh="*bf16", h="*bf16", lse="*fp32", query="*fp32",
                weight="*fp32", dquery="*fp32", dquery_parts="*fp32", dweight_parts="*fp32")
MODULATE = dict(dx="*bf16", dh_direct="*bf16", h="*bf16", scale="*bf16", dh="*bf16", dshift_parts="*fp32",
                dscale_parts="*fp32")
CASES = [
    ("forward", k._forward, FORWARD, dict(MODULATE=False, x=None, shift=None, scale=None, **FORWARD_OPTIONS)),
    ("forward, modulated", k._forward, FORWARD, dict(MODULATE=True, **FORWARD_OPTIONS)),
    ("backward", k._backward, BACKWARD, dict(PER_TOKEN=False, **BACKWARD_OPTIONS)),
    ("backward per token", k._backward, BACKWARD, dict(PER_TOKEN=True, **BACKWARD_OPTIONS)),
    ("modulate_backward", k._modulate_backward, MODULATE, dict(ROWS=k.MODULATE_ROWS)),
    ("modulate_backward, no dh", k._modulate_backward, MODULATE, dict(dh_direct=None, ROWS=k.MODULATE_ROWS)),
]
cuobjdump = triton.knobs.nvidia.cuobjdump.path
found = {}
for name, kernel, tensors, constants in CASES:
    constants = {**options, **constants}
    signature, attributes = {}, {}
    for j, argument in enumerate(kernel.arg_names):
        kind = "constexpr" if argument in constants else tensors.get(argument, "fp32" if "eps" in argument else "i32")
        signature[argument] = kind
        if isinstance(kind, tuple):
            attributes |= {(j, i): [["tt.divisibility", 16]] for i in range(len(kind))}
        elif kind[0] == "*" or "stride" in argument:
            attributes[j,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(c),): v for c, v in constants.items()}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    usage = None
    if cuobjdump and os.path.exists(cuobjdump):
        path = os.path.join(sys.argv[1], "kernel.cubin")
        with open(path, "wb") as file:
            file.write(compiled.asm["cubin"])
        usage = subprocess.run([cuobjdump, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found[name] = dict(ttir=compiled.asm["ttir"], ptx=compiled.asm["ptx"], usage=usage,
                       fixed=[parameter.name for parameter in kernel.params if not parameter.do_not_specialize])
print(json.dumps(found))
"""
KERNELS = [
    "forward",
    "forward, modulated",
    "backward",
    "backward per token",
    "modulate_backward",
    "modulate_backward, no dh",
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """By kernel, at the width of XL in bf16 and with 32 slots: its first and last code, and its use of a GPU."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, folder], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_move_sixteen_bytes_at_a_time(compiled, kernel):
    ptx = compiled[kernel]["ptx"]
    copies = re.findall(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10\b", ptx)
    loads, stores = (re.findall(rf"\b{way}\.global(?:\.\w+(?:::\w+)*)*\.v4\.b32", ptx) for way in ("ld", "st"))
    assert loads and stores  # query, norm weight, dh; h and gradients
    assert bool(copies) == ("modulate" not in kernel or "forward" in kernel)  # sources, two iterations ahead
    assert not re.search(r"\bld\.global(?:\.\w+)*\.b16\b", ptx)  # nothing is read number by number


@pytest.mark.parametrize("kernel", KERNELS)
def test_counts_are_arguments_and_not_constants(compiled, kernel):
    """Triton compiles again for every integer argument that is 1 or a multiple of 16, unless told not to."""
    assert not {"num_sources", "num_known", "tokens"} & set(compiled[kernel]["fixed"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_registers_are_not_spilled(compiled, kernel):
    usage = compiled[kernel]["usage"]
    if usage is None:
        pytest.skip("this build of Triton comes without cuobjdump")
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    # Per token, the sum for the norm weight waits in memory while a row's sources are read: not in that loop.
    assert registers <= 255 and local == 0 and stack <= (128 if kernel == "backward per token" else 0), usage


@pytest.mark.parametrize("kernel", KERNELS)
def test_offsets_are_64_bit(compiled, kernel):
    """Tokens x D exceed 2^31 at XL's scale. Only positions within a row, and what they grow from, may be 32-bit."""
    code = compiled[kernel]["ttir"]
    offsets = re.findall(r"tt\.addptr .* : !tt\.ptr<\w+>, (i\d+)", code)
    assert offsets and set(offsets) == {"i64"}
    made = dict(re.findall(r"(%\w+) = ([\w.]+) ", code))
    widened = re.findall(r"arith\.extsi (%\w+) : i32 to i64", code)
    assert widened and not any(made.get(name) == "arith.muli" for name in widened)

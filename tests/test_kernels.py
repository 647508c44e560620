"""The backends on a CPU, Triton's by its interpreter, against their definition in float64.

The reference is DAR's Eq. 5-6 and adaLN of tests/test_routing.py with float64 autograd; it shares no code with the
project. The interpreter runs the kernels' own source, row by row, at milliseconds per source and token: shapes are
tiny, and odd, so that few axes fit a power of two or a program's rows.

Shapes: B batch, T tokens, D width, n sources.
"""

import functools
import math
import sys
import types

import pytest
import torch

import kernels
import train_repa_dar
from kernels import operators, resolve_backend, route, route_cpu, route_modulate, why_not_fused
from models.sit import SiT
from tests.conftest import read_lines
from tests.test_routing import aggregate, layer_norm, randomize

pytest.importorskip("triton", reason="Triton has no build for this system")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from kernels import route_triton  # noqa: E402

OPERATORS = torch.ops.dar
NAMESPACES = {"triton": "dar", "cpu": "dar_cpu"}
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16

# Errors as a share of the norm of what is expected. float32: sums over n, T and D in an order of their own. Half
# precision: the reference sees the same rounded inputs and the arithmetic is float32, so a result is rounded once, by
# one unit, since the interpreter cuts bf16 off where a GPU rounds to nearest; gradients are made from an h that was
# itself rounded, which softmax differences see, and behind a LayerNorm from a dh that was rounded as well.
FORWARD = {FLOAT: 2e-6, BF16: 2**-7, HALF: 2**-10}
BACKWARD = {FLOAT: 5e-6, BF16: 2**-5, HALF: 2**-8}


@pytest.fixture(scope="module", autouse=True)
def patched_once():
    """The interpreter patches triton.language at every call. Once is enough, and takes half the time."""
    assert route_triton.INTERPRETED, "TRITON_INTERPRET=1 must be set before triton is imported, as in tests/conftest.py"
    scopes = [interpreter._patch_lang(function.fn) for function in (route_triton._forward, tl.cdiv)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
        yield
    for scope in reversed(scopes):
        scope.restore()


BACKEND = "triton"  # of `fused`


@pytest.fixture(params=["triton", "cpu", "torch"])
def backend(request, monkeypatch):
    """Runs a test with each."""
    assert request.param != "cpu" or not route_cpu.why_not(), "the tests need a C compiler"
    monkeypatch.setattr(sys.modules[__name__], "BACKEND", request.param)
    return request.param


@pytest.fixture
def guarded(backend, monkeypatch):
    """What operators allocate is NaN until they write it, and each address that a kernel reads or writes must lie in
    one tensor of its launch, even if what it reads is not used: an address past the end may not exist on a GPU."""
    spans, listed, seen, builder = [], [], set(), interpreter.InterpreterBuilder

    def span(tensor):
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize

    def addresses(*lists, original=route_triton._addresses):
        listed[:] = [span(tensor) for tensors in lists for tensor in tensors if tensor is not None]
        return original(*lists)

    def launch(executor, *arguments, original=interpreter.GridExecutor.__call__, **options):
        spans[:] = [*listed, *(span(x) for x in arguments if isinstance(x, torch.Tensor))]
        return original(executor, *arguments, **options)

    def watched(way, mask_position):
        def access(self, pointers, *rest, original=getattr(builder, f"create_masked_{way}")):
            addresses = pointers.data[rest[mask_position].data.astype(bool)].astype(int)
            seen.add(way)
            if addresses.size:
                first, end = addresses.min(), addresses.max() + pointers.get_element_ty().primitive_bitwidth // 8
                assert any(begin <= first and end <= last for begin, last in spans), f"{way} outside of all tensors"
            return original(self, pointers, *rest)

        monkeypatch.setattr(builder, f"create_masked_{way}", access)

    if backend == "triton":
        monkeypatch.setattr(route_triton, "_addresses", addresses)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
        watched("load", 0)
        watched("store", 1)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    yield
    torch.use_deterministic_algorithms(False)
    assert backend != "triton" or seen == {"load", "store"}, "the interpreter works in another way than here"


# ---- the independent reference, and the kernels, under the same names ----


def aggregated(sources, query, norm_weight, eps=1e-6):
    """Eq. 5-6."""
    return aggregate(sources, query[:, None] if query.ndim == 2 else query, norm_weight, eps)[0]


def modulated(h, shift, scale, norm_eps=1e-6):
    return layer_norm(h, norm_eps) * (1 + scale[:, None]) + shift[:, None]


def listed(inputs):
    """ "source 0", "source 1", ... of a dictionary, as a list."""
    return [inputs[f"source {i}"] for i in range(sum(name.startswith("source ") for name in inputs))]


def defined(inputs, eps=1e-6, norm_eps=1e-6):
    """`route`, or `route_modulate` if there is a shift."""
    sources = listed(inputs)
    h = aggregated(sources, inputs["query"], inputs["norm_weight"], eps)
    if "shift" not in inputs:
        return {"h": h}
    x = modulated(h, inputs["shift"], inputs["scale"], norm_eps)
    return {"x": x, "h": h, **{f"returned {i}": v for i, v in enumerate(sources)}}


class Arrived(torch.autograd.Function):
    """A carried source as a tensor whose gradient goes to the carrier."""

    @staticmethod
    def forward(ctx, value, carrier):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient.clone()


def as_tensor(source):
    return Arrived.apply(*source) if isinstance(source, operators.Carried) else source


def fused(inputs, eps=1e-6, norm_eps=1e-6, backend=None):
    common = listed(inputs), inputs["query"], inputs["norm_weight"]
    halves = any(v.dtype != FLOAT for v in common[0])
    backend = backend or ("auto" if BACKEND == "cpu" and halves else BACKEND)  # which the C leaves to PyTorch
    if "shift" not in inputs:
        return {"h": route(*common, eps, backend)}
    x, h, sources = route_modulate(*common, inputs["shift"], inputs["scale"], eps, norm_eps, backend)
    return {"x": x, "h": h, **{f"returned {i}": as_tensor(v) for i, v in enumerate(sources)}}


# ---- how they are compared ----


def draw(n, B, T, D, rank, dtype=FLOAT, seed=0, modulate=False):
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


def draw_like(tensor, seed=99):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor.dtype)


def cotangents(names, like):
    return {name: draw_like(like, seed) for seed, name in enumerate(names)}


def evaluate(function, inputs, seen):
    """What `function` returns, and the gradients of its outputs in `seen`, None for inputs without one."""
    outputs = function(inputs)
    wanted = [name for name, value in inputs.items() if value.requires_grad]
    found = torch.autograd.grad(
        [outputs[name] for name in seen], [inputs[name] for name in wanted], list(seen.values()), allow_unused=True
    )
    return {name: value.detach() for name, value in outputs.items()}, dict(zip(wanted, found))


def assert_close(actual, expected, tolerance, what):
    assert actual.shape == expected.shape, what
    error, size = (actual.double() - expected).norm().item(), expected.norm().item()
    # False for NaN as well. Below 1e-37 float32 has nothing.
    assert error <= max(tolerance * size, 1e-37), f"{what}: error {error:.3g} at size {size:.3g}"


def compare(inputs, seen, forward=None, backward=None, dtypes=None, view=dict, functions=(fused, defined), **options):
    """All outputs and all gradients of the kernels against float64 autograd of the definition, by name.

    seen: cotangents by name of output, of random numbers unless given; other outputs take no part in the backward.
    view: what is made of the inputs before the call. dtypes: of outputs, unless the sources'.
    """
    common = inputs["source 0"].dtype
    forward, backward = forward or FORWARD[common], backward or BACKWARD[common]
    if not isinstance(seen, dict):
        like = view(inputs)["source 0"]
        seen = {name: value.to((dtypes or {}).get(name, common)) for name, value in cotangents(seen, like).items()}
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    double = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    ours, theirs = (lambda given, function=function: function(view(given), **options) for function in functions)
    outputs, gradients = evaluate(ours, inputs, seen)
    outputs_expected, gradients_expected = evaluate(theirs, double, {name: v.double() for name, v in seen.items()})
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


# ---- one aggregation ----

# T covers one program and several of each kernel's rows; n the padding to 8, 16, 64 and 128, the most that a launch
# takes; D tails that are full, and not. 1152 is XL's width, 1281 the first that needs two warps.
SHAPES = [  # (n, B, T, D), rank of the query
    ((1, 1, 5, 37), 1),
    ((3, 2, 5, 75), 2),
    ((2, 2, 5, 11), 3),
    ((8, 2, 1, 96), 3),
    ((9, 1, 3, 129), 1),
    ((33, 1, 1, 7), 2),
    ((3, 2, 3, 1), 3),
    ((4, 1, 2, 2), 1),
    ((128, 1, 1, 7), 2),
    ((2, 1, 2, 1152), 3),
    ((2, 1, 1, 1281), 2),
]
HALVES = [((3, 2, 3, 37), 1, BF16), ((9, 1, 2, 75), 2, BF16), ((5, 2, 2, 12), 3, BF16), ((6, 2, 1, 29), 3, HALF)]


@pytest.mark.parametrize("shape, rank, dtype", [*((*case, FLOAT) for case in SHAPES), *HALVES], ids=str)
def test_route_equals_the_definition(guarded, shape, rank, dtype):
    # Large enough to show where it is added; and without it RMSNorm of one number is constant, its gradient rounding.
    eps = 0.3 if rank == 1 or shape[-1] == 1 else 1e-6
    compare(draw(*shape, rank, dtype), ["h"], eps=eps)


# What the loss sees. A returned source is seen if it is read again later; its gradient is then known in the backward.
READS = [("x",), ("h",), ("x", "h")]
KNOWN = [(), ("returned 1",), ("returned 0", "returned 1", "returned 2")]
MODULATED = [
    *(((3, 2, 2, 9), 2, reads + known) for reads in READS for known in KNOWN),
    ((3, 2, 1, 5), 2, ("returned 2",)),
    *(((2, 2 if rank == 2 else 1, 9, 7), rank, ("x", "h", "returned 1")) for rank in (1, 2, 3)),
    ((1, 2, 3, 37), 2, ("x", "h", "returned 0")),
    ((9, 3, 1, 65), 1, ("x", "h", "returned 8")),
    ((2, 1, 1, 1152), 2, ("x", "h", "returned 1")),
    ((2, 1, 1, 1281), 2, ("x", "h", "returned 1")),
]


@pytest.mark.parametrize("shape, rank, seen", MODULATED, ids=str)
def test_route_modulate_equals_the_definition(guarded, shape, rank, seen):
    compare(draw(*shape, rank, seed=7, modulate=True), seen, eps=0.3, norm_eps=0.05)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_under_autocast_x_is_ready_for_the_sublayer_and_h_keeps_its_precision(guarded, dtype, autocast):
    inputs = draw(3, 2, 2, 37, 2, seed=3, modulate=True)
    inputs |= {f"source {i}": inputs[f"source {i}"].to(dtype) for i in range(3)}
    x_dtype = BF16 if autocast else dtype
    with torch.autocast("cpu", BF16, enabled=autocast):
        outputs, _ = compare(inputs, ("x", "h"), forward=FORWARD[x_dtype], dtypes={"x": x_dtype})
        plain = fused(inputs, backend="torch")
        alone = fused({name: value for name, value in inputs.items() if name not in ("shift", "scale")})["h"]
    assert plain["x"].dtype == x_dtype and plain["h"].dtype == alone.dtype == dtype
    double = {name: value.detach().double() for name, value in inputs.items()}
    assert_close(outputs["h"], defined(double)["h"], FORWARD[dtype], "h")


def test_bf16_inputs_are_computed_in_float32():
    """Two logits near 16 that differ by 1/64: bf16, with a spacing of 1/8 there, would tie them."""
    D = 64
    v = torch.ones(2, 1, 1, D)
    v[1, ..., 0] = 1.5  # exact in bf16; not parallel to the first
    query, g = torch.full((D,), 2.0), torch.ones(D)
    h, lse = OPERATORS.route([*v.bfloat16()], query.bfloat16(), g.bfloat16(), 1e-6)
    keys = v.double() / (v.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    logits = 2 * keys.sum(-1) / math.sqrt(D)
    assert 1 / 128 < (logits[0] - logits[1]).abs().item() < 1 / 8
    assert h.dtype == BF16 and lse.dtype == FLOAT
    assert lse.item() == pytest.approx(logits.logsumexp(0).item(), rel=1e-6)


def test_sources_that_resemble_each_other_give_precise_query_gradients():
    """Neighbouring outputs have a cosine above 0.9 in trained networks; only their differences move a query."""
    generator = torch.Generator().manual_seed(0)
    inputs = draw(4, 2, 3, 135, 1, BF16)
    common = torch.randn(2, 3, 135, generator=generator)
    for i in range(4):
        inputs[f"source {i}"] = (common + 0.3 * torch.randn(2, 3, 135, generator=generator)).bfloat16()
    inputs["query"], inputs["norm_weight"] = torch.randn(135, generator=generator), torch.ones(135)
    compare(inputs, {"h": draw_like(inputs["source 0"])})  # the float32 reference is within 1e-5 here


# ---- several aggregators, one after the other ----

PLAN = [(0,), (0, 1), (0, 2), (0, 2, 3)]  # four sublayers in chunks of two


def chain(read, inputs, unused=(), returned=True):
    """A network: sublayer l reads the sources PLAN[l - 1] by `read`, which returns x, h and sources for later."""
    v, outputs = [inputs["source 0"]], {}
    for l, indices in enumerate(PLAN, start=1):
        query, weight, matrix = (inputs[f"{name} {l}"] for name in ("query", "weight", "matrix"))
        query = v[-1] @ query if query.shape == matrix.shape else query  # W v_{l-1}, one per token
        x, h, sources = read([v[i] for i in indices], query, weight, *inputs[f"shift and scale {l}"])
        for i, source in zip(indices, sources if returned else ()):
            v[i] = source
        outputs |= {f"h {l}": h, f"x {l}": x}
        x = as_tensor(v[-1]) if l in unused else x  # a sublayer that never looks at its state
        v.append(1.1**l * torch.tanh(x @ matrix + 0.3 * x.roll(1, 1)))
    # As the last that read them returned.
    return outputs | {"last": v[-1]} | {f"v {i}": as_tensor(v[i]) for i in range(len(PLAN))}


def fused_read(*arguments):
    return route_modulate(*arguments, backend=BACKEND)


def defined_read(sources, query, norm_weight, shift, scale):
    h = aggregated(sources, query, norm_weight)
    return modulated(h, shift, scale), h, sources


CHAINS = {  # rank of the query, what the loss sees, and how the chain is built
    "timestep": (2, ("last", "x 4", "h 4", "h 2", "v 0"), {}),
    "dynamic": (3, ("last", "x 4"), {}),
    "states that nothing reads, or only an aligned h": (2, ("last", "h 3"), dict(unused=(2, 3))),
    "returned sources that nothing reads": (2, ("x 4", "h 2"), {}),
    "only a source that passed through": (2, ("v 2",), {}),
    "every reader given the original sources": (2, ("last", "x 4", "h 3"), dict(returned=False)),
}


@pytest.mark.parametrize("case", CHAINS)
def test_gradients_add_up_through_a_chain(guarded, case):
    """Sources are shared by several aggregators, whose gradients meet inside the kernels."""
    rank, seen, options = CHAINS[case]
    B, T, D = 2, 2, 5
    shapes = {"source 0": (B, T, D)}
    for l in range(1, len(PLAN) + 1):
        query = {1: (D,), 2: (B, D), 3: (D, D)}[rank]
        shapes |= {f"query {l}": query, f"weight {l}": (D,), f"shift and scale {l}": (2, B, D), f"matrix {l}": (D, D)}
    generator = torch.Generator().manual_seed(5)
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs |= {name: value / math.sqrt(D) for name, value in inputs.items() if "matrix" in name}
    # A rounding passes through four nonlinear sublayers, of gain about two each, forward and backward.
    functions = functools.partial(chain, fused_read), functools.partial(chain, defined_read)
    compare(inputs, seen, forward=2e-5, backward=2e-4, functions=functions, **options)


@pytest.mark.parametrize("modulate", [False, True], ids=["route", "route_modulate"])
def test_one_tensor_may_be_several_sources(guarded, modulate):
    inputs = draw(2, 2, 3, 7, 2, modulate=modulate)
    seen = ("x", "returned 2") if modulate else ("h",)
    compare(inputs, seen, view=lambda given: {**given, "source 2": given["source 0"]})


@pytest.mark.parametrize("modulate", [False, True], ids=["route", "route_modulate"])
def test_what_needs_no_gradient_gets_none(modulate, backend):
    """A frozen aggregator, or frozen sources, change nothing for the rest: the same bits in every run."""
    inputs = draw(3, 1, 2, 7, 2, modulate=modulate)
    seen = {"h": draw_like(inputs["source 0"])}
    outputs, whole = evaluate(fused, {name: value.clone().requires_grad_() for name, value in inputs.items()}, seen)
    for frozen in ((), ("source 1",), ("query", "norm_weight", "shift", "scale"), ("source 0", "source 1", "source 2")):
        some = {name: value.clone().requires_grad_(name not in frozen) for name, value in inputs.items()}
        again, part = evaluate(fused, some, seen)
        assert part.keys() == inputs.keys() - set(frozen)
        assert all(torch.equal(again[name], outputs[name]) for name in outputs)
        for name, value in part.items():
            assert value is whole[name] is None or torch.equal(value, whole[name]), name
    with torch.no_grad():
        free = fused(inputs)
    assert not free["h"].requires_grad and torch.equal(free["h"], outputs["h"])


def test_derivatives_that_do_not_exist(backend):
    """A second one is an error, not zeros."""
    for modulate in (False, True):
        inputs = {name: value.requires_grad_() for name, value in draw(2, 1, 1, 3, 1, modulate=modulate).items()}
        (gradient,) = torch.autograd.grad(fused(inputs)["h"].pow(2).sum(), inputs["source 0"], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.pow(2).sum().backward()


# ---- unusual inputs ----


@pytest.mark.parametrize("dtype, rank", [(FLOAT, 1), (BF16, 2), (HALF, 3)], ids=str)
def test_one_source_is_returned_and_sends_no_gradient_to_its_weights(guarded, dtype, rank):
    for modulate in (False, True):
        inputs = draw(1, 2, 2, 9, rank, dtype, modulate=modulate)
        inputs["source 0"] = 1000 * inputs["source 0"]
        inputs["query"] = 100 * inputs["query"]  # a logit that rounds coarsely
        inputs = {name: value.requires_grad_() for name, value in inputs.items()}
        cotangent = draw_like(inputs["source 0"])
        outputs, gradients = evaluate(fused, inputs, {"h": cotangent})
        assert torch.equal(outputs["h"], inputs["source 0"])
        assert torch.equal(gradients["source 0"], cotangent)
        for name in ("query", "norm_weight"):
            assert torch.equal(gradients[name], torch.zeros_like(inputs[name])), name
    if BACKEND == "torch" or dtype != FLOAT and BACKEND == "cpu":
        return
    # On a GPU the kernels need not round alike. So that it holds there too, the backward does not rely on it:
    operators = getattr(torch.ops, NAMESPACES[BACKEND])
    arguments = [inputs["source 0"].detach()], inputs["query"].detach(), inputs["norm_weight"].detach()
    h, lse = operators.route(*arguments, 1e-6)
    assert (lse == -math.inf).all()  # nor on the logit
    rest = arguments[0], [None], *arguments[1:], 1e-6
    (dv,), dquery, dweight = operators.route_backward(cotangent, 1.01 * h, lse, *rest)
    assert torch.equal(dv, cotangent) and not dquery.any() and not dweight.any()


@pytest.mark.parametrize("modulate", [False, True], ids=["route", "route_modulate"])
def test_dtypes_may_differ(guarded, modulate):
    """Sources meet in their common dtype. Under autocast: bf16 sources and shift, float32 queries and norm weights."""
    inputs = draw(3, 2, 2, 37, 2, modulate=modulate)
    seen = {"h": draw_like(inputs["source 0"])}
    mixed = inputs | {f"source {i}": inputs[f"source {i}"].to(dtype) for i, dtype in enumerate((BF16, FLOAT, HALF))}
    dtypes = dict.fromkeys(("h", "x", "returned 0", "returned 1", "returned 2"), FLOAT)
    # A gradient takes its source's dtype only at the end: one rounding, to nearest.
    compare(mixed, seen, forward=FORWARD[FLOAT], backward=2**-8, dtypes=dtypes)
    half = {name: value.bfloat16() for name, value in inputs.items() if "source" in name or name == "shift"}
    compare(inputs | half, ("x", "h") if modulate else ("h",))


@pytest.mark.parametrize("transposed", [False, True])
def test_layout_does_not_matter(guarded, transposed):
    """Of sources, query, norm weight and cotangents, which .sum() and .mean() send back expanded. shift and scale are
    two of adaLN's six chunks of (B, 6 D), also in a layout in which not even a row is contiguous."""
    B, T, D = 2, 3, 7
    generator = torch.Generator().manual_seed(0)
    inputs = draw(5, B, T, D, 3)
    for i, shape in enumerate([(T, B, D), (B, T, 2 * D), (B, T + 4, D), (B, 1, D), (D, T, B)]):
        inputs[f"source {i}"] = torch.randn(shape, generator=generator)
    inputs["query"], inputs["norm_weight"] = torch.randn(T, B, D, generator=generator), torch.randn(D, 2)
    whole = torch.randn(B, 6 * D, generator=generator)
    modulation = {"whole": whole.T.contiguous() if transposed else whole}

    def seen(given):
        a, b, c, d, e = listed(given)
        views = a.transpose(0, 1), b[..., ::2], c[:, 2:-2], d.expand(B, T, D), e.permute(2, 1, 0)
        arranged = {f"source {i}": view for i, view in enumerate(views)}
        arranged |= {"query": given["query"].transpose(0, 1), "norm_weight": given["norm_weight"][:, 1]}
        if "whole" in given:
            chunks = (given["whole"].T if transposed else given["whole"]).chunk(6, -1)
            assert (chunks[3].stride(-1) == 1) != transposed
            arranged |= {"shift": chunks[3], "scale": chunks[4]}
        assert not any(value.is_contiguous() for value in arranged.values())
        return arranged

    expanded, turned = torch.tensor(0.7).expand(B, T, D), torch.randn(T, B, D, generator=generator).transpose(0, 1)
    cotangent, other = (turned, expanded) if transposed else (expanded, turned)
    names = ("h", "returned 1", "returned 3")
    compare(inputs | modulation, {"x": other, **dict.fromkeys(names, cotangent)}, view=seen)
    compare(inputs, {"h": cotangent}, view=seen)


@pytest.mark.parametrize("rank", [1, 3], ids=["D", "BTD"])
@pytest.mark.parametrize("B, T", [(0, 3), (2, 0)])
def test_nothing_in_nothing_out(rank, B, T, backend):
    """An empty batch still gives every parameter a gradient, of zeros."""
    for modulate in (False, True):
        inputs = {name: value.requires_grad_() for name, value in draw(3, B, T, 7, rank, modulate=modulate).items()}
        seen = {name: torch.zeros(B, T, 7) for name in (("x", "h") if modulate else ("h",))}
        outputs, gradients = evaluate(fused, inputs, seen)
        assert all(value.shape == (B, T, 7) for value in outputs.values())
        for name, value in gradients.items():
            assert torch.equal(value, torch.zeros_like(inputs[name])), name


@pytest.mark.parametrize("modulate", [False, True], ids=["route", "route_modulate"])
def test_zero_sources_have_the_finite_gradient_of_rmsnorm_at_zero(guarded, modulate):
    """v_1 .. v_n are zero while the sublayers' gates are: there RMSNorm has a gradient gain of 1/sqrt(eps) = 1000."""
    inputs = draw(4, 2, 3, 33, 2, modulate=modulate)
    inputs |= {f"source {i}": torch.zeros(2, 3, 33) for i in (1, 2, 3)}
    cotangent = draw_like(inputs["source 0"])
    _, gradients = compare(inputs, {"h": cotangent})
    assert gradients["source 1"].norm() > 5 * cotangent.norm()  # the gain is really there
    inputs["source 0"] = torch.zeros(2, 3, 33)
    outputs, gradients = compare(inputs, {"h": cotangent})
    assert not outputs["h"].any() and torch.allclose(gradients["source 0"], cotangent / 4)


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
def test_large_sources_do_not_overflow(guarded, dtype):
    """Their squares exceed float16 by far."""
    inputs = draw(3, 2, 2, 33, 2, seed=1, modulate=True)
    inputs |= {f"source {i}": (1e4 * inputs[f"source {i}"].sign()).to(dtype) for i in range(3)}
    compare(inputs, ("x", "h"))


@pytest.mark.parametrize("rank", [1, 3], ids=["D", "BTD"])
def test_large_logits_do_not_overflow(guarded, rank):
    """Hundreds, of either sign: exp of them is infinite or zero."""
    # Not so large that the gradients fall below 1e-16 of the terms that they are made of: float64 has nothing there.
    inputs = draw(5, 2, 2, 65, rank, seed=5)
    inputs["query"] = 100 * inputs["query"]
    # float32 holds a logit of 1000 to 1e-4 only, and the weights follow.
    compare(inputs, ("h",), forward=1e-3, backward=1e-2)


@pytest.mark.parametrize("sign", [-1, 1])
def test_equal_large_logits_give_a_mean(guarded, sign):
    """Keys of parallel sources are equal, whatever their lengths; 2000 or -2000 for all must not become 0 / 0."""
    u, D = torch.linspace(1, 2, 9), 9
    inputs = {f"source {i}": (i + 1) * u.expand(1, 2, D).contiguous() for i in range(4)}
    inputs |= {"query": sign * 600 * u, "norm_weight": torch.ones(D)}
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    outputs, gradients = evaluate(fused, inputs, {"h": draw_like(inputs["source 0"])})
    assert_close(outputs["h"], 2.5 * u.double().expand(1, 2, D), 1e-3, "h")  # logits round by 1e-4
    assert all(gradient.isfinite().all() for gradient in gradients.values())


# ---- as PyTorch operators ----


def operator_cases(operators, rank):
    """Small arguments for each of the operators."""
    inputs = draw(2, 2, 2, 3, rank, modulate=True)
    sources, query, g = listed(inputs), inputs["query"], inputs["norm_weight"]
    shift, scale = torch.cat([inputs["shift"], inputs["scale"]], 1).chunk(2, 1)
    h, lse = operators.route(sources, query, g, 1e-6)
    dh, turned = draw_like(h), [v.transpose(0, 1).contiguous().transpose(0, 1) for v in sources]
    rest = h, lse, sources, [None, dh], query, g, 1e-6
    return {
        "route": (turned, query, g, 1e-6),
        "route_modulate": (sources, query, g, 1e-6, shift, scale, 1e-6, BF16),
        "route_backward": (dh, *rest),
        "route_modulate_backward": (dh, h, *rest, shift, scale, 1e-6),
        "route_modulate_backward, no dh": (dh, None, *rest, shift, scale, 1e-6),
    }


CHECKED = [("route", 3), ("route_modulate", 1), ("route_backward", 1), ("route_backward", 3)]
CHECKED += [("route_modulate_backward", 2), ("route_modulate_backward, no dh", 2)]


# Fewer of the second namespace, whose schemas are those of the first.
CHECKED = [("dar", *each) for each in CHECKED] + [("dar_cpu", *each) for each in CHECKED if "modulate" in each[0]][:2]


@pytest.mark.parametrize("namespace, name, rank", CHECKED)
def test_operators_keep_pytorchs_rules(namespace, name, rank):
    """Schema, shapes and strides as promised to torch.compile, symbolic shapes."""
    operators = getattr(torch.ops, namespace)
    torch.library.opcheck(getattr(operators, name.split(",")[0]).default, operator_cases(operators, rank)[name])


def two_aggregations(inputs):
    """The second reads what the first returned."""
    first, second = ([inputs[f"{name}{i}"] for name in ("query", "norm_weight", "shift", "scale")] for i in (1, 2))
    x, h, sources = route_modulate(listed(inputs), *first, backend=BACKEND)
    y, h_too, sources = route_modulate([*sources, x], *second, backend=BACKEND)
    return dict(zip(("h", "y", "h too", "v", "w", "x"), (h, y, h_too, *map(as_tensor, sources))))


def test_aggregations_compile_as_one_graph(backend):
    """Not by inductor, whose C++ takes 20 s; what it relies on is the test before."""
    torch.compiler.reset()
    inputs = {f"source {i}": value for i, value in enumerate(torch.randn(2, 2, 3, 8))}
    for i, rank in ((1, 3), (2, 1)):
        inputs |= {f"{name}{i}": value for name, value in draw(0, 2, 3, 8, rank, seed=i, modulate=True).items()}
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    seen = cotangents(("h", "y", "h too", "v", "w", "x"), inputs["source 0"])
    eager = evaluate(two_aggregations, inputs, seen)
    compiled = evaluate(torch.compile(two_aggregations, fullgraph=True, backend="aot_eager"), inputs, seen)
    for ours, theirs in zip(compiled, eager):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_close(ours[name], theirs[name].double(), 1e-5, name)


# ---- launches ----


def test_every_width_is_covered_by_head_and_tail():
    """The head is read and written without a mask, so it must not be longer than a row."""
    for width in range(1, 5000):
        options = route_triton._options(width)
        head, tail = options["HEAD"], options["TAIL"]
        assert head <= width <= head + tail and head.bit_count() == tail.bit_count() == 1, width
    warps = {width: route_triton._options(width)["num_warps"] for width in (7, 1280, 1281, 5120, 10**5)}
    assert warps == {7: 1, 1280: 1, 1281: 2, 5120: 4, 10**5: 16}


def misaligned(tensor):
    return torch.cat([torch.zeros(1, dtype=tensor.dtype), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize("dtype, wrong", [(FLOAT, None), (FLOAT, 8), (BF16, None), (BF16, 0)], ids=str)
def test_only_aligned_addresses_are_called_aligned(monkeypatch, dtype, wrong):
    """A GPU stops at a 16-byte load from anywhere else; the interpreter would not notice."""
    found = []

    def recorded(*lists, original=route_triton._addresses):
        *addresses, align = original(*lists)
        found.append(align)
        return *addresses, align

    monkeypatch.setattr(route_triton, "_addresses", recorded)
    inputs = draw(9, 1, 1, 16, 1, dtype)
    sources, rest = listed(inputs), (inputs["query"], inputs["norm_weight"], 1e-6)
    mixed = [misaligned(v) if i == wrong else v for i, v in enumerate(sources)]
    h, lse = OPERATORS.route(mixed, *rest)
    OPERATORS.route_backward(h, h, lse, mixed, [None] * 9, *rest)
    OPERATORS.route_backward(h, h, lse, sources, mixed, *rest)
    assert found == [16 if wrong is None else dtype.itemsize] * 3


def test_kernels_run_with_misaligned_tensors(guarded):
    inputs = {name: misaligned(value) for name, value in draw(3, 2, 2, 37, 2, modulate=True).items()}
    assert all(value.data_ptr() % 16 for value in inputs.values())
    compare(inputs, ("x",))


def test_one_compiled_kernel_serves_many_counts_of_sources():
    """Tuples are padded; a launch's types change at 8, 16, 32, 64 and 128 sources and nowhere else."""
    lengths = [len(route_triton._addresses([torch.zeros(1)] * n)[0]) for n in range(1, 129)]
    assert lengths == [8] * 8 + [16] * 8 + [32] * 16 + [64] * 32 + [128] * 64


# ---- which backend ----


V = torch.zeros(2, 3, 5)
SMALL = dict(sources=[V, V], query=torch.zeros(5), norm_weight=torch.ones(5))
SMALL_MODULATE = SMALL | dict(shift=torch.zeros(2, 5), scale=torch.zeros(2, 5))


@pytest.fixture
def no_fused(monkeypatch):
    def refuse(*args):
        raise AssertionError("a fused backend was called")

    for name in NAMESPACES:
        functions = types.SimpleNamespace(route=refuse, route_modulate=refuse)
        monkeypatch.setitem(operators.FUNCTIONS, name, functions)


BEYOND = [
    ("triton", dict(sources=[V.double(), V.double()]), "float64"),
    ("triton", dict(sources=[V, V.double()]), "float64"),
    ("triton", dict(return_weights=True), "return_weights"),
    ("triton", dict(sources=[V] * 129), "129 sources"),
    ("cpu", dict(sources=[V, V.double()]), "float64"),
    ("cpu", dict(sources=[V.bfloat16(), V.bfloat16()]), "bfloat16"),
    ("cpu", dict(return_weights=True), "return_weights"),
]


@pytest.mark.parametrize("name, change, message", BEYOND)
def test_what_is_not_fused_is_left_to_pytorch(no_fused, monkeypatch, name, change, message):
    """By "auto". The fused backend is refused, and the ways out that the message names are some."""
    calls = [(route, SMALL | change)]
    if "return_weights" not in change:
        calls.append((route_modulate, SMALL_MODULATE | change))
    for call, arguments in calls:
        with pytest.raises(ValueError, match=f"'{name}' .*{message}.*'torch' or 'auto'"):
            call(**arguments, backend=name)
    monkeypatch.setattr(kernels, "resolve_backend", lambda backend, device: "torch" if backend == "torch" else name)
    for call, arguments in calls:
        for backend in ("torch", "auto"):
            result = call(**arguments, backend=backend)
            h = result if call is route and "return_weights" not in change else result[0]
            assert h.shape == (2, 3, 5) and h.dtype == getattr(torch, message, FLOAT)
    for call, arguments in ((route, SMALL), (route_modulate, SMALL_MODULATE)):  # the fixture is not a dead letter
        with pytest.raises(AssertionError, match="was called"):
            call(**arguments | dict(sources=[V] * 128))


MISFITS = [
    (dict(shift=torch.zeros(5)), r"shift is \(5,\)"),
    (dict(shift=torch.zeros(1, 5)), r"shift is \(1, 5\)"),
    (dict(scale=torch.zeros(2, 6)), r"scale is \(2, 6\)"),
    (dict(scale=torch.zeros(2, 1, 5)), r"scale is \(2, 1, 5\)"),
    (dict(sources=[]), "empty"),
    (dict(query=torch.zeros(3, 5)), r"query is \(3, 5\)"),
    (dict(norm_weight=torch.ones(1)), r"norm_weight is \(1,\)"),
]


@pytest.mark.parametrize("change, message", MISFITS)
def test_route_modulate_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        route_modulate(**SMALL_MODULATE | change)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # a name; no GPU is needed for it


def test_resolved_backends(monkeypatch):
    def resolved(device):
        return [resolve_backend(name, device) for name in ("auto", "torch", "triton")]

    def refused(backend, message, device=CPU):
        calls = [lambda: resolve_backend(backend, device)]
        if device == CPU:
            calls += [
                lambda: route(**SMALL, backend=backend),
                lambda: route_modulate(**SMALL_MODULATE, backend=backend),
            ]
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call()

    for backend in ("cuda", None):
        refused(backend, f"backend {backend!r} is unknown; choose one of auto, torch, triton, cpu")
    assert resolved(CUDA) == ["triton", "torch", "triton"] and resolved(CPU) == ["cpu", "torch", "triton"]
    assert resolve_backend("cpu", CPU) == "cpu" and why_not_fused(CPU) == why_not_fused(CUDA) == ""
    refused("cpu", "needs a CPU, not 'cuda'", CUDA)
    assert resolve_backend("auto", torch.device("meta")) == "torch" and "'meta'" in why_not_fused(torch.device("meta"))
    monkeypatch.setattr(route_triton, "INTERPRETED", False)
    assert resolved(CUDA) == ["triton", "torch", "triton"]
    assert [resolve_backend(name, CPU) for name in ("auto", "torch")] == ["cpu", "torch"]
    refused("triton", "CUDA device, not 'cpu'.*TRITON_INTERPRET=1")
    monkeypatch.setattr(kernels, "route_triton", None)  # as on systems without Triton
    assert resolve_backend("auto", CUDA) == "torch" and "triton is not installed" in why_not_fused(CUDA)
    refused("triton", "not installed")
    monkeypatch.setattr(route_cpu, "_library", lambda: "no C compiler")
    assert resolve_backend("auto", CPU) == "torch" and why_not_fused(CPU) == "no C compiler"
    refused("cpu", "cannot be had: no C compiler; choose 'torch'")


# ---- inside SiT and the trainer ----


@pytest.mark.parametrize(
    "query, final, bf16", [("static", "shared", False), ("timestep", "shared", True), ("dynamic", "dedicated", False)]
)
def test_sit_is_the_same_network_with_every_backend(query, final, bf16):
    sizes = dict(input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=1, num_heads=2, num_classes=3)
    sizes |= dict(align_depth=1, align_dims=(5,), projector_dim=8, chunk_size=2)
    generator, results = torch.Generator().manual_seed(1), {}
    x, t = torch.randn(2, 1, 4, 4, generator=generator), torch.rand(2, generator=generator)
    for backend in ("torch", "triton", "cpu"):
        torch.manual_seed(0)
        model = SiT(**sizes, routing="dar", query=query, final_aggregator=final, route_backend=backend)
        randomize(model, scale=0.2)  # gates and queries that start at zero hide much
        with torch.autocast("cpu", BF16, enabled=bf16):
            velocity, (aligned,) = model(x, t, torch.arange(2), torch.linspace(0, 0.99, 2))
        loss = velocity.float().square().mean() + aligned.float().square().mean()
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        results[backend] = [velocity.detach(), aligned.detach(), *gradients]
    # Both round to bf16 in places of their own, and each of the sublayers passes that on.
    tolerance = 0.05 if bf16 else 1e-5
    names = ["velocity", "aligned", *(name for name, p in model.named_parameters() if p.requires_grad)]
    for backend in ("triton", "cpu"):
        for name, ours, theirs in zip(names, results[backend], results["torch"], strict=True):
            assert ours.dtype == theirs.dtype
            if ours.norm() > 1e-6:  # but for gradients that are zero: key biases
                assert_close(ours, theirs.double(), tolerance, name)


def test_the_trainer_trains_alike_with_every_backend(small_data, tmp_path, capsys):
    records = {}
    for backend, name in (("torch", "plain PyTorch"), ("cpu", "fused C")):
        out = tmp_path / backend
        words = f"--config digits --data {small_data} --out {out} --model SiT-S/4 --depth 1 --hidden-size 8"
        words += f" --num-heads 2 --routing dar --route-backend {backend} --chunk-size 2 --batch-size 2 --max-steps 2"
        words += " --log-every 1 --eval-every 0 --checkpoint-every 2 --tensorboard False"
        train_repa_dar.main(words.split())
        assert f"routing dar by {name}" in capsys.readouterr().out
        lines = read_lines(out / "metrics.jsonl")
        records[backend] = [(line["step"], line["loss"], line["grad_norm"]) for line in lines]
    assert [step for step, *_ in records["torch"]] == [1, 2]
    for theirs, ours in zip(records["torch"], records["cpu"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)

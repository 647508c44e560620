"""Depth routing (kernels.route, models.dar) against DAR's Eq. 5-7 and Prop. 1.

The references at the top are written from the equations alone, in float64: sources chosen by set-builder, stacked,
normalised and mixed by explicit softmax. They share no code with the project. tests/test_model.py puts them into a SiT.

Shapes: B batch, T tokens, D width, n sources, L sublayers, S chunk size.
"""

import math
import random
import re

import numpy as np
import pytest
import torch

from kernels import route
from models.dar import DepthRouter, optimal_chunk_size, source_plan

LEARNABLE = [(query, final) for query in ("static", "timestep", "dynamic") for final in ("dedicated", "shared")]


# ---- the independent references ----


def source_set(l, L, S):
    """S_l for l = 1..L, and S_final for l = L + 1 (Eq. 7)."""
    n = math.ceil(min(l, L) / S)
    summaries = {m * S for m in range(L + 1) if m <= n - 1}
    current = {i for i in range(L + 1) if (n - 1) * S + 1 <= i <= l - 1}
    return sorted(summaries | current)


def aggregate(sources, query, g, eps=1e-6):
    """Eq. 5: h (B, T, D) and the weights (n, B, T). query broadcasts to (B, T, D)."""
    v = torch.stack(list(sources))  # (n, B, T, D)
    keys = g * (v / torch.sqrt((v**2).mean(dim=-1, keepdim=True) + eps))
    scores = (query * keys).sum(dim=-1) / v.shape[-1] ** 0.5  # (n, B, T)
    exponentials = torch.exp(scores - scores.max(dim=0).values)
    alpha = exponentials / exponentials.sum(dim=0)
    return (alpha.unsqueeze(-1) * v).sum(dim=0), alpha


def chunk_sums(v, S):
    """v_0 and the sum of each chunk, finished or begun, of the outputs v[1:]; chunk m holds (m - 1) S + 1 .. m S."""
    return [v[0], *(sum(v[first : first + S]) for first in range(1, len(v), S))]


def dar_states(v_0, e, sublayers, S, kind, final, parameter, summary="last"):
    """All states h_1 .. h_{L+1} of a network whose sublayer l is the function sublayers[l - 1].

    e: (B, D), the timestep embedding. parameter(l, name): "query" or "norm_weight" of aggregator l = 1..L+1.
    """
    L, v, states = len(sublayers), [v_0], []
    for l in range(1, L + 2):
        owner = L if l == L + 1 and final == "shared" else l  # Appendix C.3: the head reuses the last one
        query, g = parameter(owner, "query"), parameter(owner, "norm_weight")
        sources = chunk_sums(v, S) if summary == "sum" else [v[i] for i in source_set(l, L, S)]
        if kind == "timestep":
            query = (query + e)[:, None, :]
        elif kind == "dynamic":
            query = torch.einsum("ij,btj->bti", query, sources[-1])  # W_l v_{l-1}; the head's newest is v_L
        states.append(aggregate(sources, query, g)[0])
        if l <= L:
            v.append(sublayers[l - 1](states[-1]))
    return states


def attnres_states(v_0, sublayers, S, parameter):
    """The same for Block Attention Residuals."""
    L, v, states = len(sublayers), [v_0], []
    for l in range(1, L + 2):
        sources = chunk_sums(v, S)
        keys = [parameter(l, "norm_weight") * v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() for v in sources]
        raised = [torch.exp(key @ parameter(l, "query")) for key in keys]  # no square root of D
        states.append(sum((r / sum(raised))[..., None] * v for r, v in zip(raised, sources)))
        if l <= L:
            v.append(sublayers[l - 1](states[-1]))
    return states


def unet_states(v_0, sublayers, weight, bias):
    """The same with U-ViT's long skips. weight (D, 2 D), bias: functions of the number 1 .. n of the joined block."""
    n, states = len(sublayers) // 2, [v_0]  # states[2 k] is the stream after block k
    for block in range(1, n + 1):
        h, mirrored = states[-1], n + 1 - block
        if mirrored < block:
            h = h + torch.cat([h, states[2 * mirrored]], dim=-1) @ weight(block).T + bias(block)
        states.append(h + sublayers[2 * block - 2](h))
        states.append(states[-1] + sublayers[2 * block - 1](states[-1]))
    return states


def layer_norm(x, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def assert_near(actual, expected, what, tolerance):
    """Errors scale with a tensor's largest entry, not with each one: sums over sources and tokens cancel."""
    assert actual.shape == expected.shape, what
    actual, expected = actual.double(), expected.double()
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * size, f"{what}: error {error:.3g} at size {size:.3g}"


def randomize(model, skip=(), seed=0, scale=0.3):
    """Add noise to every parameter but the positions, in an order and amount that depend on names and shapes alone."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and not name.startswith(tuple(skip)):
                parameter.add_(scale * torch.randn_like(parameter))


# ---- the operator ----

# Errors allowed: 200 roundings for sums over n, T and D. Other dtypes are in tests/test_kernels.py.
TOLERANCE = 200 * 2**-52
# (n, B, T, D): odd, so that nothing is a power of two and few axes agree by chance.
SHAPES = [(2, 5, 1, 33), (4, 2, 13, 17), (7, 3, 11, 9), (9, 5, 7, 33), (3, 1, 1, 1), (2, 1, 5, 3)]


@pytest.mark.parametrize("rank", [1, 2, 3], ids=["D", "BD", "BTD"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_route_equals_the_definition(shape, rank):
    """In float64, which fused kernels leave to PyTorch, and with the weights, which they do not give."""
    n, B, T, D = shape
    torch.manual_seed(sum(shape))
    eps = (1e-6, 0.3)[n % 2]  # large enough to show where it is added
    scales = torch.tensor([4.0 ** (i % 5 - 2) for i in range(n)])  # a norm left out would change every weight
    inputs = {f"source {i}": (scales[i] * torch.randn(B, T, D)).double() for i in range(n)}
    inputs["query"] = (2 * torch.randn({1: (D,), 2: (B, D), 3: (B, T, D)}[rank])).double()
    inputs["norm_weight"] = (1 + torch.randn(D)).double()
    cotangent = torch.randn(B, T, D).double()

    def arguments():
        given = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        return given, [given[f"source {i}"] for i in range(n)], given["query"], given["norm_weight"]

    actual, *given = arguments()
    h, alpha = route(*given, eps=eps, return_weights=True)
    torch.testing.assert_close(h, route(*given, eps=eps))  # another order of summing
    (h * cotangent).sum().backward()

    expected, sources, query, norm_weight = arguments()
    h_expected, alpha_expected = aggregate(sources, query[:, None] if rank == 2 else query, norm_weight, eps)
    (h_expected * cotangent).sum().backward()

    assert alpha_expected.std() > 0.03  # far from a plain mean
    assert_near(alpha, alpha_expected, "weights", TOLERANCE)
    assert_near(h, h_expected, "h", TOLERANCE)
    for name in inputs:
        assert_near(actual[name].grad, expected[name].grad, f"gradient of {name}", TOLERANCE)


def test_route_refuses_what_does_not_fit():
    """Also what would broadcast."""
    good = dict(sources=[torch.zeros(2, 3, 5)] * 2, query=torch.zeros(5), norm_weight=torch.ones(5))
    route(**good)
    shapes = {"query": [(6,), (3, 5), (2, 1, 5)], "norm_weight": [(1,), (2, 5)]}
    bad = [({name: torch.zeros(shape)}, f"{name} is {shape}") for name in shapes for shape in shapes[name]]
    for shape in ((3, 5), (2, 3, 5, 1)):
        bad.append((dict(sources=[torch.zeros(shape)]), f"source 0 is {shape}"))
    for shape in ((2, 4, 5), (1, 3, 5)):
        bad.append((dict(sources=[torch.zeros(2, 3, 5), torch.zeros(shape)]), f"source 1 {shape}"))
    for change, message in [*bad, (dict(sources=[]), "empty"), (dict(backend="cuda"), "'cuda'")]:
        with pytest.raises(ValueError, match=re.escape(message)):
            route(**{**good, **change})


# ---- which sources ----


def test_source_sets_of_xl():
    plan = source_plan(num_sublayers=56, chunk_size=4)
    assert len(plan) == 57
    assert plan[-1] == (*range(0, 53, 4), 53, 54, 55, 56) and len(plan[-1]) == 18
    assert sum(map(len, plan)) == 522
    assert plan[0] == (0,)
    assert plan[4] == (0, 4)  # l = 5 opens chunk 2: v_4 once, as the summary of chunk 1
    assert plan[7] == (0, 4, 5, 6, 7)


def test_source_sets_equal_the_definition():
    sizes = random.Random(2)
    drawn = [(L, sizes.randint(1, L)) for L in (sizes.randint(1, 64) for _ in range(25))]
    for L, S in [*drawn, (1, 1), (2, 2), (24, 24), (7, 3)]:
        plan = source_plan(L, S)
        assert [list(entry) for entry in plan] == [source_set(l, L, S) for l in range(1, L + 2)], (L, S)
        assert [entry[-1] for entry in plan] == list(range(L + 1)), (L, S)  # the newest, which dynamic queries read
        assert source_plan(L, 1) == source_plan(L, L) == [tuple(range(l)) for l in range(1, L + 2)]  # dense
    assert plan == [(0,), (0, 1), (0, 1, 2), (0, 3), (0, 3, 4), (0, 3, 4, 5), (0, 3, 6), (0, 3, 6, 7)]


def test_optimal_chunk_size_minimises_the_cost_of_the_paper():
    assert optimal_chunk_size(num_sublayers=56, alpha=0.4) == pytest.approx(4.9, abs=0.05)
    assert optimal_chunk_size(num_sublayers=56, alpha=0.6) == pytest.approx(3.7, abs=0.05)
    for L in (24, 56):
        S = np.linspace(1, L, 200_001)
        for alpha in (0.0, 0.2, 0.4, 0.5, 0.6, 0.8):
            cost = np.log(L / S + S) + alpha * np.log(S)
            assert optimal_chunk_size(L, alpha) == pytest.approx(S[cost.argmin()], abs=2 * (S[1] - S[0]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: source_plan(56, 57), "chunk_size = 57 "),
        (lambda: source_plan(0, 1), "num_sublayers = 0"),
        (lambda: optimal_chunk_size(56, 1.0), "alpha = 1.0"),
        (lambda: DepthRouter(6, 8, "constant", 2, "shared"), "'constant'"),
        (lambda: DepthRouter(6, 8, "static", 2, "auto"), "'auto'"),
    ],
)
def test_bad_plans_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

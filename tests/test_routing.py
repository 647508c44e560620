"""Depth routing (kernels.route, models.dar, SiT with routing="dar") against DAR's Eq. 5-7, 11 and Prop. 1.

The reference at the top of this file is written from the equations alone: sources chosen by set-builder, stacked,
normalised and mixed in float64 by explicit softmax. It shares no code with the project.

Shapes: B batch, T tokens, D width, n sources, L sublayers, S chunk size.
"""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from kernels import route
from loss import alignment_loss, denoising_loss
from models.dar import DepthRouter, RoutedStream, optimal_chunk_size, source_plan
from models.sit import SIT_MODELS, SiT

QUERIES = ("static", "timestep", "dynamic")
FINALS = ("dedicated", "shared")
LEARNABLE = [(query, final) for query in QUERIES for final in FINALS]


# ---- the independent reference ----


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


def chain(v_0, e, sublayers, S, kind, final, parameter):
    """All states h_1 .. h_{L+1} and outputs v_0 .. v_L of a network whose sublayer l is the function sublayers[l - 1].

    e: (B, D), the timestep embedding. parameter(l, name): "query" or "norm_weight" of aggregator l = 1..L+1.
    """
    L, v, states = len(sublayers), [v_0], []
    for l in range(1, L + 2):
        owner = L if l == L + 1 and final == "shared" else l  # Appendix C.3: the head reuses the last one
        query, g = parameter(owner, "query"), parameter(owner, "norm_weight")
        if kind == "timestep":
            query = (query + e)[:, None, :]
        elif kind == "dynamic":
            query = torch.einsum("ij,btj->bti", query, v[l - 1])  # W_l v_{l-1}; the head's newest is v_L
        states.append(aggregate([v[i] for i in source_set(l, L, S)], query, g)[0])
        if l <= L:
            v.append(sublayers[l - 1](states[-1]))
    return states, v


def assert_close(actual, expected, units, what):
    """Largest error at most `units` roundings of actual's dtype, measured on the largest entry of `expected`.

    Sums over sources and tokens cancel, so that errors scale with a tensor's largest entry, not with each one.
    """
    assert actual.shape == expected.shape, what
    error = (actual.double() - expected.double()).abs().max().item()
    bound = units * torch.finfo(actual.dtype).eps * expected.double().abs().max().item()
    assert error <= bound, f"{what}: error {error:.3g} exceeds {bound:.3g}"


def draws(count, seed):
    """Seeded odd shapes (n, B, T, D): nothing is a power of two, and no two axes agree by chance."""
    generator, found = random.Random(seed), []
    while len(found) < count:
        shape = (
            generator.randint(2, 9),
            generator.choice((2, 3, 5)),
            generator.choice((1, 7, 11, 13)),
            generator.choice((9, 17, 33)),
        )
        if shape not in found:
            found.append(shape)
    return found


# ---- the operator ----

# Roundings allowed per dtype: sums over n, T and D for float64 and float32. In bf16 the arithmetic is float32, but the
# output is rounded once, and a source's gradient is a sum of two terms that are rounded before they are added.
UNITS = {torch.float64: 200, torch.float32: 200, torch.bfloat16: 3}


@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3], ids=["D", "BD", "BTD"])
@pytest.mark.parametrize("shape", [*draws(4, seed=1), (3, 1, 1, 1), (2, 1, 5, 3)], ids=str)
def test_route_equals_the_definition(shape, rank, dtype):
    n, B, T, D = shape
    torch.manual_seed(sum(shape))
    eps = (1e-6, 0.3)[n % 2]  # large enough to show where it is added
    scales = torch.tensor([4.0 ** (i % 5 - 2) for i in range(n)])  # a norm left out would change every weight
    inputs = {f"source {i}": (scales[i] * torch.randn(B, T, D)).to(dtype) for i in range(n)}
    inputs["query"] = (2 * torch.randn({1: (D,), 2: (B, D), 3: (B, T, D)}[rank])).to(dtype)
    inputs["norm_weight"] = (1 + torch.randn(D)).to(dtype)
    cotangent = torch.randn(B, T, D).to(dtype)

    actual = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    h = route([actual[f"source {i}"] for i in range(n)], actual["query"], actual["norm_weight"], eps=eps)
    assert h.dtype == dtype
    (h * cotangent).sum().backward()

    expected = {name: value.double().requires_grad_() for name, value in inputs.items()}
    query = expected["query"][:, None] if rank == 2 else expected["query"]
    h_expected, alpha = aggregate([expected[f"source {i}"] for i in range(n)], query, expected["norm_weight"], eps)
    (h_expected * cotangent.double()).sum().backward()

    assert alpha.std() > 0.03  # far from a plain mean
    assert_close(h, h_expected, UNITS[dtype], "h")
    for name in inputs:
        assert actual[name].grad.dtype == dtype, name
        assert_close(actual[name].grad, expected[name].grad, UNITS[dtype], f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_a_float32_distribution_over_depth(dtype):
    n, B, T, D = 5, 3, 7, 9
    torch.manual_seed(0)
    sources = [(i + 1) * torch.randn(B, T, D).to(dtype) for i in range(n)]
    query, g = 2 * torch.randn(B, T, D), torch.randn(D)
    h, alpha = route(sources, query, g, return_weights=True)
    assert alpha.shape == (n, B, T) and alpha.dtype == torch.float32
    assert (alpha >= 0).all() and alpha.std() > 0.1
    torch.testing.assert_close(alpha.sum(0), torch.ones(B, T), atol=1e-6, rtol=0)
    mixed = sum(a[..., None].double() * v.double() for a, v in zip(alpha, sources))
    assert_close(h, mixed, 8, "h")
    assert torch.equal(h, route(sources, query, g))  # asking for the weights changes nothing


def test_route_of_mixed_dtypes_returns_the_common_one():
    torch.manual_seed(0)
    sources = [torch.randn(2, 3, 5, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.bfloat16)]
    query, g = torch.randn(5), torch.randn(5)
    h = route(sources, query, g)
    assert h.dtype == torch.float32
    assert_close(h, aggregate([v.double() for v in sources], query.double(), g.double())[0], 20, "h")


def test_autocast_does_not_lower_the_precision_of_routing():
    torch.manual_seed(0)
    sources, query, g = [torch.randn(2, 7, 33) for _ in range(6)], 3 * torch.randn(2, 33), torch.randn(33)
    with torch.autocast("cpu", torch.bfloat16):
        h = route(sources, query, g)
    assert h.dtype == torch.float32
    assert_close(h, route(sources, query, g), 20, "h")


def test_bf16_logits_keep_differences_below_bf16_resolution():
    """Two logits near 16 that differ by 1/64: bf16, with a spacing of 1/8 there, would tie them."""
    D = 64
    ones, bumped = torch.ones(1, 1, D), torch.ones(1, 1, D)
    bumped[..., 0] = 1.5  # exact in bf16; not parallel to the first
    query = torch.full((D,), 2.0)  # q . k / sqrt(D) = 16 for the first
    sources = [ones.bfloat16(), bumped.bfloat16()]
    _, alpha = route(sources, query.bfloat16(), torch.ones(D).bfloat16(), return_weights=True)
    expected = aggregate([v.double() for v in sources], query.double(), torch.ones(D).double())[1]
    assert 1e-3 < (expected[0] - 0.5).abs().item() < 1 / 64
    torch.testing.assert_close(alpha.double(), expected, atol=2e-6, rtol=0)


def test_one_source_is_returned_and_sends_no_gradient_to_its_weights():
    torch.manual_seed(0)
    v, query, g = (torch.randn(*shape, requires_grad=True) for shape in ((3, 7, 9), (3, 9), (9,)))
    h, alpha = route([v], query, g, return_weights=True)
    cotangent = torch.randn_like(h)
    h.backward(cotangent)
    assert torch.equal(h, v) and torch.equal(alpha, torch.ones(1, 3, 7))
    assert torch.equal(v.grad, cotangent)
    assert torch.equal(query.grad, torch.zeros_like(query)) and torch.equal(g.grad, torch.zeros_like(g))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_zero_source_has_the_finite_gradient_of_rmsnorm_at_zero(dtype):
    """At v_1 = 0, d(logit)/dv_1 = g q / sqrt(D eps), the gain of 1000 that sublayers see while their gates are zero.

    With h = a_0 v_0 and a cotangent u: dh.u/dv_1 = a_1 u + a_1 (u . v_1 - u . h) g q / sqrt(D eps).
    """
    B, T, D, eps = 2, 3, 5, 1e-6
    torch.manual_seed(0)
    v_0, query, g, u = (torch.randn(*shape, dtype=dtype) for shape in ((B, T, D), (D,), (D,), (B, T, D)))
    inputs = [v_0, torch.zeros(B, T, D, dtype=dtype), query, g]
    for tensor in inputs:
        tensor.requires_grad_()
    h = route([v_0, inputs[1]], query, g, eps=eps)
    h.backward(u)
    assert all(tensor.grad.isfinite().all() for tensor in inputs)

    with torch.no_grad():
        logit = (query * g * v_0).sum(-1) / torch.sqrt(v_0.square().mean(-1) + eps) / math.sqrt(D)
        a_0 = torch.sigmoid(logit)[..., None]
        a_1 = 1 - a_0
        gain = g * query / math.sqrt(D * eps)
        expected = a_1 * u - a_1 * (u * a_0 * v_0).sum(-1, keepdim=True) * gain
    assert expected.abs().max() > 100  # the gain is really there
    assert_close(h, (a_0 * v_0).detach(), 50, "h")
    assert_close(inputs[1].grad, expected, 200, "gradient of the zero source")


def test_all_sources_zero_give_zero_and_finite_gradients():
    sources = [torch.zeros(2, 3, 5, requires_grad=True) for _ in range(4)]
    query, g = torch.randn(2, 5, requires_grad=True), torch.ones(5, requires_grad=True)
    h = route(sources, query, g)
    h.backward(torch.ones_like(h))
    assert torch.equal(h, torch.zeros(2, 3, 5))
    for v in sources:
        torch.testing.assert_close(v.grad, torch.full_like(v, 1 / 4))  # a plain mean; the logits' part is zero
    assert query.grad.isfinite().all() and g.grad.isfinite().all()


ROUTE_ERRORS = {
    "no sources": (dict(sources=[]), "empty"),
    "source of rank 2": (dict(sources=[torch.zeros(3, 5)]), r"\(3, 5\)"),
    "source of rank 4": (dict(sources=[torch.zeros(2, 3, 5, 1)]), r"\(2, 3, 5, 1\)"),
    "unequal sources": (dict(sources=[torch.zeros(2, 3, 5), torch.zeros(2, 4, 5)]), r"source 1 \(2, 4, 5\)"),
    "sources that would broadcast": (dict(sources=[torch.zeros(2, 3, 5), torch.zeros(1, 3, 5)]), r"\(1, 3, 5\)"),
    "query of another width": (dict(query=torch.zeros(6)), r"query is \(6,\)"),
    "query of another batch": (dict(query=torch.zeros(3, 5)), r"query is \(3, 5\)"),
    "query that would broadcast": (dict(query=torch.zeros(2, 1, 5)), r"query is \(2, 1, 5\)"),
    "scalar query": (dict(query=torch.zeros(())), r"query is \(\)"),
    "norm weight of another width": (dict(norm_weight=torch.zeros(1)), r"norm_weight is \(1,\)"),
    "norm weight of rank 2": (dict(norm_weight=torch.zeros(2, 5)), r"norm_weight is \(2, 5\)"),
    "unknown backend": (dict(backend="cuda"), "'cuda'"),
}


@pytest.mark.parametrize("case", ROUTE_ERRORS)
def test_route_refuses_what_does_not_fit(case):
    change, message = ROUTE_ERRORS[case]
    good = dict(sources=[torch.zeros(2, 3, 5)] * 2, query=torch.zeros(5), norm_weight=torch.ones(5))
    route(**good)
    with pytest.raises(ValueError, match=message):
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


def test_last_chunk_may_be_shorter():
    plan = source_plan(num_sublayers=7, chunk_size=3)
    assert plan == [(0,), (0, 1), (0, 1, 2), (0, 3), (0, 3, 4), (0, 3, 4, 5), (0, 3, 6), (0, 3, 6, 7)]


SIZES = random.Random(2)
PLANS = [(L, SIZES.randint(1, L)) for L in (SIZES.randint(1, 64) for _ in range(25))] + [(1, 1), (2, 2), (24, 24)]


@pytest.mark.parametrize("L, S", PLANS)
def test_source_sets_equal_the_definition(L, S):
    plan = source_plan(L, S)
    assert [list(entry) for entry in plan] == [source_set(l, L, S) for l in range(1, L + 2)]
    for l, entry in enumerate(plan, start=1):
        assert entry[-1] == l - 1  # the newest output is always there: dynamic queries read it


@pytest.mark.parametrize("L", [1, 2, 7, 56])
def test_chunks_of_one_and_of_all_are_dense(L):
    dense = [tuple(range(l)) for l in range(1, L + 2)]
    assert source_plan(L, 1) == dense and source_plan(L, L) == dense


def test_optimal_chunk_size_of_the_paper():
    assert optimal_chunk_size(num_sublayers=56, alpha=0.4) == pytest.approx(4.9, abs=0.05)
    assert optimal_chunk_size(num_sublayers=56, alpha=0.6) == pytest.approx(3.7, abs=0.05)
    assert optimal_chunk_size(num_sublayers=56, alpha=0.0) == pytest.approx(math.sqrt(56))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.4, 0.5, 0.6, 0.8])
@pytest.mark.parametrize("L", [24, 56])
def test_optimal_chunk_size_minimises_the_cost(L, alpha):
    S = np.linspace(1, L, 200_001)
    cost = np.log(L / S + S) + alpha * np.log(S)
    assert optimal_chunk_size(L, alpha) == pytest.approx(S[cost.argmin()], abs=2 * (S[1] - S[0]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: source_plan(56, 0), "chunk_size = 0 "),
        (lambda: source_plan(56, 57), "chunk_size = 57 "),
        (lambda: source_plan(56, -4), "chunk_size = -4 "),
        (lambda: source_plan(0, 1), "num_sublayers = 0"),
        (lambda: optimal_chunk_size(0, 0.5), "num_sublayers = 0"),
        (lambda: optimal_chunk_size(56, 1.0), "alpha = 1.0"),
        (lambda: optimal_chunk_size(56, -0.1), "alpha = -0.1"),
        (lambda: DepthRouter(6, 8, "constant", 2, "shared"), "'constant'"),
        (lambda: DepthRouter(6, 8, "static", 2, "auto"), "'auto'"),
        (lambda: DepthRouter(6, 8, "static", 7, "shared"), "chunk_size = 7 "),
    ],
)
def test_bad_plans_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- a whole network ----


def build_router(L, D, kind, S, final, dtype, seed):
    """A DepthRouter with every parameter random: zero queries would hide the norm and the choice of aggregator."""
    router = DepthRouter(L, D, kind, S, final).to(dtype)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise / math.sqrt(D) if parameter.ndim == 2 else 1 + noise)
    return router


def run_router(router, v_0, e, sublayers):
    v, states, weights = [v_0], [], []
    for l in range(1, len(sublayers) + 2):
        h, alpha = router(v, e, return_weights=True)
        states.append(h)
        weights.append(alpha)
        if l <= len(sublayers):
            v.append(sublayers[l - 1](h))
    return states, weights


ROUTER_SHAPES = [(L, S, B, T, D) for L, S, (_, B, T, D) in zip((1, 5, 8, 9), (1, 2, 3, 9), draws(4, seed=4))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind, final", LEARNABLE)
@pytest.mark.parametrize("shape", ROUTER_SHAPES, ids=str)
def test_depth_router_equals_the_definition(shape, kind, final, dtype):
    """States and all gradients of L sublayers joined by DAR."""
    L, S, B, T, D = shape
    # Each rounding passes through up to 9 nonlinear sublayers; queries made of outputs amplify it once more.
    units = 2000 if kind == "dynamic" else 300
    router = build_router(L, D, kind, S, final, dtype, seed=sum(shape))
    assert len(router.aggregators) == L + (final == "dedicated")
    base = {"v_0": torch.randn(B, T, D), "e": torch.randn(B, D)}
    base |= {f"A_{l}": torch.randn(D, D) / math.sqrt(D) for l in range(1, L + 1)}
    base = {name: value.to(dtype) for name, value in base.items()}
    cotangents = [torch.randn(B, T, D).to(dtype) for _ in range(L + 1)]

    def network(inputs):
        """Sublayers that mix channels and tokens, and whose outputs grow with depth as DiT's do."""
        return [
            lambda h, l=l: 1.2**l * torch.tanh(h @ inputs[f"A_{l}"] + 0.5 * h.roll(1, dims=1)) for l in range(1, L + 1)
        ]

    actual = {name: value.clone().requires_grad_() for name, value in base.items()}
    states, weights = run_router(router, actual["v_0"], actual["e"], network(actual))
    sum((h * u).sum() for h, u in zip(states, cotangents)).backward()

    expected = {name: value.double().requires_grad_() for name, value in base.items()}
    parameters = {name: value.detach().double().requires_grad_() for name, value in router.named_parameters()}
    states_expected, _ = chain(
        expected["v_0"],
        expected["e"],
        network(expected),
        S,
        kind,
        final,
        lambda l, name: parameters[f"aggregators.{l - 1}.{name}"],
    )
    sum((h * u.double()).sum() for h, u in zip(states_expected, cotangents)).backward()

    for l, (h, h_expected, alpha) in enumerate(zip(states, states_expected, weights), start=1):
        assert alpha.shape == (len(source_set(l, L, S)), B, T)
        assert_close(h, h_expected, units, f"h_{l}")
    for name in base:
        if name == "e" and kind != "timestep":
            assert actual["e"].grad is None  # only "timestep" may read it
            continue
        assert_close(actual[name].grad, expected[name].grad, units, f"gradient of {name}")
    for name, parameter in router.named_parameters():
        if name.startswith("aggregators.0.") and (final, L) != ("shared", 1):
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name  # one source, nothing to weigh
        else:
            assert_close(parameter.grad, parameters[name].grad, units, f"gradient of {name}")


# ---- inside SiT ----

TINY = dict(
    input_size=4,
    patch_size=2,
    in_channels=3,
    hidden_size=16,
    depth=3,
    num_heads=2,
    num_classes=5,
    routing="dar",
    align_depth=(2,),
    align_dims=(6,),
    projector_dim=8,
)


def randomize(model, skip=(), seed=0, scale=0.3):
    """Add noise to every parameter but the positions, in an order and amount that depend on names and shapes alone."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and not name.startswith(tuple(skip)):
                parameter.add_(scale * torch.randn_like(parameter))


def batch(B=3, seed=0):
    torch.manual_seed(seed)
    return torch.randn(B, 3, 4, 4), torch.rand(B), torch.randint(0, 5, (B,))


@pytest.mark.parametrize("kind, final", LEARNABLE)
def test_chunks_of_one_and_of_all_give_the_same_model(kind, final):
    results = {}
    for S in (1, 4, 6):
        torch.manual_seed(1)
        model = SiT(**TINY, query=kind, chunk_size=S, final_aggregator=final).eval()
        randomize(model)
        velocity, (aligned,) = model(*batch())
        (velocity.square().mean() + aligned.square().mean()).backward()
        results[S] = [velocity, aligned, *(p.grad for p in model.parameters() if p.requires_grad)]
    assert all(torch.equal(one, everything) for one, everything in zip(results[1], results[6], strict=True))
    assert not torch.allclose(results[1][0], results[4][0])  # real chunks differ: the test sees the routing


def test_timestep_query_starts_as_the_static_one():
    """e(t) starts at zero, so w + e(t) is w. Gates and head are made random, or both outputs would be zero anyway."""
    models = {}
    for kind in ("static", "timestep"):
        torch.manual_seed(1)
        models[kind] = SiT(**TINY, query=kind).eval()
    last = ("t_embedder.mlp.2.weight", "t_embedder.mlp.2.bias")
    for name, value in models["timestep"].state_dict().items():
        assert name in last or torch.equal(value, models["static"].state_dict()[name]), name
    for name in last:
        assert not models["timestep"].get_parameter(name).any(), name
        nn.init.zeros_(models["static"].get_parameter(name))  # leaves conditioning on t out of both

    for model in models.values():
        randomize(model, skip=last)  # queries too: w + 0 must be w, not 0
    x, t, y = batch()
    with torch.no_grad():
        (static, (z_static,)), (timestep, (z_timestep,)) = models["static"](x, t, y), models["timestep"](x, t, y)
        assert static.abs().max() > 0.1
        torch.testing.assert_close(timestep, static)
        torch.testing.assert_close(z_timestep, z_static)
        for model in models.values():  # once e(t) is learnt, only one routes by it
            torch.manual_seed(2)
            nn.init.normal_(model.get_parameter(last[0]))
        assert not torch.allclose(models["static"](x, t, y)[0], models["timestep"](x, t, y)[0], atol=1e-2)


def routed_states(model, *inputs):
    """v_0 .. v_L, h_1 .. h_{L+1} and the projectors' inputs of one forward pass, and what the model returns."""
    states, outputs, projected = [], [], []

    def read(stream, shift, scale, original=RoutedStream.read):
        x, h = original(stream, shift, scale)
        states.append(h)
        outputs[:] = stream.v
        return x, h

    hooks = []
    for projector in model.projectors:
        hooks.append(projector.register_forward_pre_hook(lambda m, arguments: projected.append(arguments[0])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoutedStream, "read", read)
        result = model(*inputs)
    for hook in hooks:
        hook.remove()
    return outputs, states, projected, result


@pytest.mark.parametrize("S", [1, 4, 5])
@pytest.mark.parametrize("kind, final", LEARNABLE)
def test_at_initialisation_every_state_is_the_mean_of_v0_and_zeros(kind, final, S):
    torch.manual_seed(0)
    model = SiT(**{**TINY, "align_depth": (1, 2, 3)}, query=kind, chunk_size=S, final_aggregator=final)
    for aggregator in model.router.aggregators:
        assert not aggregator.query.any() and (aggregator.norm_weight == 1).all()
    outputs, states, projected, (velocity, _) = routed_states(model, *batch())
    assert len(outputs) == 7 and len(states) == 7 and len(projected) == 3
    assert outputs[0].abs().max() > 0.1
    for v in outputs[1:]:
        assert torch.equal(v, torch.zeros_like(v))
    for l, h in enumerate(states, start=1):
        torch.testing.assert_close(h, outputs[0] / len(source_set(l, 6, S)))
    for k, z in enumerate(projected, start=1):  # z_k is the input of sublayer 2k + 1
        torch.testing.assert_close(z, outputs[0] / len(source_set(2 * k + 1, 6, S)))
    assert torch.equal(velocity, torch.zeros_like(velocity))


@pytest.mark.parametrize(
    "kind, final, aligned_too",
    [*((*case, True) for case in LEARNABLE), *((kind, "dedicated", False) for kind in QUERIES)],
)
def test_first_steps_train_every_parameter(kind, final, aligned_too):
    """Finite from the first step, where the sublayers' outputs are zero and RMSNorm's gradient gain is 1000.

    DistributedDataParallel needs a gradient for every parameter in every step. By the sixth step each is also
    non-zero, but for the first aggregator, which has one source and so nothing to weigh: zeros give way one after the
    other, the head, the gates, the queries and, once those are not zero, the norm weights.
    """
    torch.manual_seed(0)
    model = SiT(**{**TINY, "align_dims": (6,) if aligned_too else ()}, query=kind, final_aggregator=final)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert model.pos_embed.requires_grad is False and len(parameters) == len(list(model.parameters())) - 1
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    x, t, y = batch(4)
    target, features = torch.randn(4, 3, 4, 4), [torch.randn(4, 4, 6)]
    losses = []
    for step in range(6):
        optimizer.zero_grad(set_to_none=True)
        velocity, aligned = model(x, t, y, label_draw=torch.linspace(0, 0.99, 4))
        loss = denoising_loss(velocity, target)
        if aligned_too:
            loss = loss + 0.5 * alignment_loss(aligned, features)
        loss.backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None, f"step {step}: {name} has no gradient"
            assert parameter.grad.isfinite().all(), f"step {step}: {name}"
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    still_zero = {name for name, parameter in parameters.items() if not parameter.grad.any()}
    assert still_zero == {"router.aggregators.0.query", "router.aggregators.0.norm_weight"}


@pytest.mark.parametrize("kind, millions", [("static", 675), ("timestep", 675), ("dynamic", 751)])
def test_xl_has_the_paper_parameter_count(kind, millions):
    with torch.device("meta"):
        model = SIT_MODELS["SiT-XL/2"](routing="dar", query=kind, chunk_size=4, align_dims=())
        residual = SIT_MODELS["SiT-XL/2"](align_dims=())
    assert len(model.router.aggregators) == 57 and len(model.router.plan) == 57
    assert sum(len(sources) for sources in model.router.plan) == 522
    count, count_residual = (sum(p.numel() for p in m.parameters()) for m in (model, residual))
    assert round(count / 1e6) == millions and round(count_residual / 1e6) == 675
    per_query = 1152**2 if kind == "dynamic" else 1152
    assert count - count_residual == 57 * (per_query + 1152)  # a query and a norm weight each
    assert residual.router is None


@pytest.mark.parametrize(
    "final, align_dims, count", [("auto", (), 7), ("auto", (6,), 6), ("dedicated", (6,), 7), ("shared", (), 6)]
)
def test_auto_final_aggregator_is_shared_only_with_alignment(final, align_dims, count):
    model = SiT(**{**TINY, "align_dims": align_dims}, final_aggregator=final)
    assert len(model.router.aggregators) == count


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(query="constant"), "'constant'"),
        (dict(final_aggregator="none"), "'none'"),
        (dict(chunk_size=0), "chunk_size = 0 "),
        (dict(chunk_size=7), "chunk_size = 7 .* 6 sublayers"),
    ],
)
def test_sit_refuses_bad_routing(change, message):
    with pytest.raises(ValueError, match=message):
        SiT(**{**TINY, **change})

"""What joins the sublayers of a SiT: how each routing starts and trains, half precision, recomputing, compilation.

Values are compared with definitions in tests/test_model.py. Shapes: B batch, T tokens, D width, L sublayers.
"""

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import kernels
from loss import alignment_loss, denoising_loss
from models.dar import make_router
from models.streams import RoutedStream
from tests.test_model import batch, build, recorded
from tests.test_routing import LEARNABLE, aggregate, assert_near, source_set
from weights import load_into

ROUTINGS = ("residual", "dar", "attnres", "unet")
needs_triton = pytest.mark.skipif(kernels.route_triton is None, reason="triton is not installed")
DRAW = torch.tensor([0.05, 0.5, 0.9])  # the first label is dropped


def gradients(model, run, inputs):
    """Velocity, projections and the gradients of all parameters, for a loss that reads every output."""
    model.zero_grad()
    velocity, aligned = run(*inputs)
    sum(output.float().square().mean() for output in (velocity, *aligned)).backward()
    outputs = {f"output {i}": output.detach() for i, output in enumerate((velocity, *aligned))}
    return outputs | {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


ARMS = [
    *(dict(routing="dar", query=query, final_aggregator=final) for query, final in LEARNABLE),
    *(dict(routing="dar", query=query, align_dims=()) for query in ("static", "timestep", "dynamic")),
    *(dict(routing="attnres", chunk_size=S) for S in (1, 4)),
    *(dict(routing="unet", depth=depth) for depth in (3, 4)),
    *(dict(qk_norm=True, align_dims=dims) for dims in ((), (5, 6))),
]


# ---- the start ----


@pytest.mark.parametrize("S", [1, 4, 5])
@pytest.mark.parametrize("query, final", [*LEARNABLE, ("attnres", "dedicated")])
def test_at_first_every_state_is_the_mean_of_v0_and_zeros(query, final, S):
    """Gates are zero, so v_l is exactly zero for l > 0; queries are zero, so h_l = v_0 / |S_l|. Projectors see it."""
    routing = "attnres" if query == "attnres" else "dar"
    changes = dict(query=query, final_aggregator=final, chunk_size=S, align_depth=(1, 2, 3))
    model, projected = build(routing=routing, randomized=False, **changes), []
    assert len(model.router.aggregators) == (7 if final == "dedicated" else 6)
    for aggregator in model.router.aggregators:
        assert aggregator.query.shape == ((24, 24) if query == "dynamic" else (24,))
        assert not aggregator.query.any() and (aggregator.norm_weight == 1).all()
    for projector in model.projectors[::2]:
        projector.register_forward_pre_hook(lambda module, arguments: projected.append(arguments[0]))
    states, stream, (velocity, _) = recorded(model, *batch())
    assert len(stream.v) == 7 and len(states) == 7 and stream.v[0].value.abs().max() > 0.1
    for v in (*map(kernels.value_of, stream.v[1:]), velocity):
        assert torch.equal(v, torch.zeros_like(v))
    for l, h in enumerate(states, start=1):
        sources = 1 + -(-(l - 1) // S) if routing == "attnres" else len(source_set(l, 6, S))
        torch.testing.assert_close(h, stream.v[0].value / sources)
    assert len(projected) == 3 and all(map(torch.equal, projected, states[2::2]))  # z_k is the input of sublayer 2k + 1


ROUTED = [dict(routing="dar", query=query, chunk_size=S) for query in ("static", "timestep", "dynamic") for S in (1, 4)]


@pytest.mark.parametrize("changes", [*ROUTED, dict(routing="attnres", chunk_size=4)], ids=str)
def test_routing_fades_into_residual_weights(changes):
    """First the residual model's function; then Eq. 5 and the mean of all outputs, mixed; last, routing to the bit."""
    residual = build(align_dims=(), routing="residual")
    model = build(align_dims=(), seed=7, **changes)
    load_into(model, residual.state_dict())
    expected = residual(*batch())[0]
    plain = model(*batch())[0]
    assert (plain - expected).norm() > 0.01 * expected.norm()
    model.gamma = 0.0
    assert_near(model(*batch())[0], expected, "velocity", 2e-6)

    model.gamma, e = 0.3, model.t_embedder(batch()[1])
    states, stream, _ = recorded(model, *batch())
    for l, h in enumerate(states, start=1):
        indices, query, g = model.router.aggregation(stream.v[:l], e)
        query = query.unsqueeze(1) if query.ndim == 2 else query
        routed, _ = aggregate([stream.v[i].double() for i in indices], query.double(), g.double())
        # With AttnRes v_l is the sum of a chunk, and a chunk's last is all of it.
        ends = {*range(0, l - 1, changes["chunk_size"]), l - 1} if changes["routing"] == "attnres" else range(l)
        assert_near(h, 0.7 * sum(stream.v[i].double() for i in ends) / l + 0.3 * routed, f"h {l}", 1e-5)
    model.gamma = 1.0
    assert torch.equal(model(*batch())[0], plain)


@pytest.mark.parametrize("changes", ARMS, ids=str)
def test_first_steps_train_every_parameter(changes):
    """Finite from the first step, where all outputs are zero and RMSNorm's gradient gain is 1000; none without one.

    DistributedDataParallel needs a gradient for every parameter in every step. By the eighth step each is also
    non-zero, but for the first aggregator, which has one source and so nothing to weigh: zeros give way one after the
    other, the head, the gates, the queries and, once those are not zero, the norm weights.
    """
    model = build(randomized=False, **changes).train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(parameters) == len(list(model.parameters())) - 1
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    (x, t, y), losses = batch(4), []
    target, *tokens = torch.randn_like(x), torch.randn(4, 16, 5), torch.randn(4, 16, 6)
    for step in range(8):
        optimizer.zero_grad(set_to_none=True)
        velocity, aligned = model(x, t, y, label_draw=torch.linspace(0, 0.99, 4))
        loss = denoising_loss(velocity, target) + (0.5 * alignment_loss(aligned, tokens) if aligned else 0)
        loss.backward()
        losses.append(loss.item())
        for name, parameter in parameters.items():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), f"step {step}: {name}"
        optimizer.step()
    assert losses[-1] < losses[0]
    still_zero = {name for name, parameter in parameters.items() if not parameter.grad.any()}
    assert still_zero == {name for name in parameters if name.startswith("router.aggregators.0.")}


@pytest.mark.parametrize("query, final", LEARNABLE)
def test_chunks_of_one_and_of_all_give_the_same_model(query, final):
    results = {}
    for S in (1, 4, 6):
        model = build(routing="dar", query=query, chunk_size=S, final_aggregator=final)
        results[S] = gradients(model, model, batch())
    assert all(torch.equal(value, results[6][name]) for name, value in results[1].items())
    assert not torch.allclose(results[1]["output 0"], results[4]["output 0"])  # the test sees the routing


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_long_skips_start_as_the_residual_model(depth, half):
    """To the bit, and under autocast as well: every weight random but those of the skips, which are zero."""
    residual = build(depth=depth, align_depth=depth)
    model = build(depth=depth, align_depth=depth, routing="unet", randomized=False)
    assert len(model.skips) == depth // 2 and not any(p.any() for p in model.skips.parameters())
    load_into(model, residual.state_dict())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        (velocity, aligned), (expected, aligned_expected) = model(*batch()), residual(*batch())
    assert velocity.std() > 0.1 and torch.equal(velocity, expected)
    assert len(aligned) == 2 and all(map(torch.equal, aligned, aligned_expected))


def test_options_of_other_routings_are_idle():
    """query and final_aggregator change nothing in attnres, and with chunk_size nothing in unet and residual."""
    idle = dict(query="dynamic", final_aggregator="shared")
    assert len(build(routing="dar", align_dims=()).router.aggregators) == 7  # "auto" is "shared" only with alignment
    assert len(build(routing="dar").router.aggregators) == 6
    for routing, others in (("attnres", idle), ("unet", {**idle, "chunk_size": 99})):
        plain, other = build(routing=routing), build(routing=routing, **others)
        assert plain.state_dict().keys() == other.state_dict().keys()
        assert torch.equal(plain(*batch())[0], other(*batch())[0])


# ---- half precision and fused kernels ----


@pytest.mark.parametrize(
    "backend, dtype", [("torch", torch.float32), pytest.param("triton", torch.bfloat16, marks=needs_triton)]
)
def test_sources_have_one_dtype_under_autocast(backend, dtype):
    """Cast once: a cast in each of the aggregators that read a source would be kept by autograd."""
    with torch.autocast("cpu", torch.bfloat16):
        stream = RoutedStream(
            make_router("attnres", 6, 24, "", 3, "", backend, ""), torch.full((2, 4, 24), 5.0), torch.zeros(2, 24)
        )
        for _ in range(4):  # v_2 and v_3 are sums, v_4 begins a chunk
            stream.write(torch.ones(2, 4, 24, dtype=torch.bfloat16))
    assert [kernels.value_of(v).dtype for v in stream.v] == [dtype] * 5
    assert [kernels.value_of(v).unique().tolist() for v in stream.v] == [[5], [1], [2], [3], [1]]


def test_autocast_keeps_the_stream_of_long_skips_in_float32():
    model, states = build(routing="unet", depth=4, align_depth=4), []
    for half in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            states.append(recorded(model, *batch())[0][-1])
    assert states[1].dtype == torch.float32 and not torch.equal(*states)
    assert_near(states[1], states[0], "the stream after two skips", 0.03)


def test_fused_kernels_serve_attnres():
    """Running sums pass through the fused backward, which adds up a source's gradients on its way."""
    results = {}
    for backend in ("cpu", "torch"):
        model = build(route_backend=backend, routing="attnres", chunk_size=3)
        results[backend] = gradients(model, model, batch())
    for name, value in results["torch"].items():
        if not name.startswith("router.aggregators.0."):
            assert value.any(), name
            assert_near(results["cpu"][name], value, name, 2e-4)
    assert not results["cpu"]["router.aggregators.0.query"].any()


# ---- recomputing, compilation, processes ----


@pytest.mark.parametrize(
    "changes, half", [*((arm, False) for arm in ARMS[::2]), *((arm, True) for arm in ARMS[4::10])], ids=str
)
def test_checkpointing_recomputes_every_sublayer_and_changes_no_bit(changes, half):
    inputs, results, calls = (*batch(), DRAW), {}, {}
    for recompute in (False, True):
        model = build(checkpoint_activations=recompute, **changes).train()
        calls[recompute] = []
        for sublayer in [sublayer for block in model.blocks for sublayer in (block.attn, block.mlp)]:
            sublayer.register_forward_pre_hook(lambda module, _, calls=calls[recompute]: calls.append(module))
        run = torch.autocast("cpu", torch.bfloat16, enabled=half)(model)  # the forward pass only
        results[recompute] = gradients(model, run, inputs)
        # With respect to one tensor alone, which a checkpoint of the reentrant kind would refuse.
        velocity, weight = run(*inputs)[0], model.x_embedder.proj.weight
        results[recompute]["alone"] = torch.autograd.grad(velocity.float().sum(), weight)[0]
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.delattr("models.sit.checkpoint")  # not needed where nothing is kept
            model(*inputs)
    sublayers = 2 * len(model.blocks)
    assert {recompute: len(made) for recompute, made in calls.items()} == {False: 3 * sublayers, True: 5 * sublayers}
    assert results[True].keys() == results[False].keys() and len(results[True]) > 20
    for name, value in results[False].items():
        assert torch.equal(results[True][name], value), name


@pytest.mark.parametrize("routing, depth, recompute", [("dar", 1, True), ("attnres", 1, False), ("unet", 2, True)])
def test_compiles_without_graph_breaks(routing, depth, recompute):
    """What `compile` relies on: forward and backward are one graph, with the values of the eager ones."""
    changes = dict(depth=depth, chunk_size=2, align_depth=1, checkpoint_activations=recompute)
    model, inputs = build(routing=routing, **changes).train(), (*batch(), DRAW)
    eager = gradients(model, model, inputs)
    compiled = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    assert len(eager) > 30
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_checkpointing_works_in_distributed_data_parallel(routing):
    """Every parameter is ready once per pass, also with accumulation; DDP raises where one is not, or is twice."""
    model = build(checkpoint_activations=True, routing=routing, query="dynamic").train()
    inputs = (*batch(), DRAW)
    once = gradients(model, model, inputs)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        for _ in range(2):
            with wrapped.no_sync():
                first = gradients(model, wrapped, inputs)
            velocity, aligned = wrapped(*inputs)
            sum(output.square().mean() for output in (velocity, *aligned)).backward()
            for name in first.keys() - {f"output {i}" for i in range(5)}:
                assert torch.equal(first[name], once[name]), name
                assert torch.equal(model.get_parameter(name).grad, 2 * once[name]), name
        # Not after its group: it would then join the group's thread and hold what that thread may be waiting for, the
        # interpreter's lock, for ever.
        del wrapped
    finally:
        distributed.destroy_process_group()

"""The baselines beside DAR, AttnRes and U-ViT's long skips, against forward passes written from their definitions.

Those at the top share no routing code with the project. They take embedders, sublayers and head from the model, which
tests/test_model.py compares with definitions of their own, and run in float64.

Shapes: B batch, T tokens, D width, n sources. A model of n blocks has L = 2 n sublayers; S is the chunk size.
"""

import json

import pytest
import torch

import kernels
import train_repa_dar
from analysis import diagnose as diagnosis
from checkpoint import load_trained
from models.dar import AttnResRouter, RoutedStream
from models.sit import SiT, load_published, parameters_by_part
from runtime import load_file
from tests.conftest import read_lines
from tests.test_model import assert_loaded, assert_near, batch, build, gradients

BASELINES = ("attnres", "unet")


# ---- the definitions ----


def modulated(h, shift, scale):
    """LayerNorm without weights, then adaLN."""
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]


def parts(model, x, t, y):
    """v_0 (B, T, D), the sublayers as functions of the state that each reads, and the head as one of the last state."""
    c = model.t_embedder(t) + model.y_embedder.embedding_table(y)

    def sublayer(module, shift, scale, gate):
        return lambda h: gate[:, None] * module(modulated(h, shift, scale))

    sublayers = []
    for block in model.blocks:
        six = block.adaLN_modulation(c).chunk(6, dim=-1)
        sublayers += [sublayer(block.attn, *six[:3]), sublayer(block.mlp, *six[3:])]
    shift, scale = model.final_layer.adaLN_modulation(c).chunk(2, dim=-1)
    return (
        model.x_embedder(x) + model.pos_embed,
        sublayers,
        lambda h: model.unpatchify(model.final_layer.linear(modulated(h, shift, scale))),
    )


def attnres_forward(v_0, sublayers, S, query, norm_weight):
    """What each sublayer and the head read, h_1 .. h_{L+1}, and their weights over the sources, each (n, B, T).

    query, norm_weight: functions of the reader's number. Chunk m holds sublayers (m - 1) S + 1 .. m S.
    """
    L = len(sublayers)
    outputs, states, weights = {}, [], []
    for l in range(1, L + 2):
        sources = [v_0]
        for first in range(1, L + 1, S):  # of a chunk
            members = [outputs[i] for i in range(first, min(first + S, L + 1)) if i < l]
            if members:  # finished, or begun before l
                sources.append(sum(members))
        keys = [norm_weight(l) * v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() for v in sources]
        raised = [torch.exp(key @ query(l)) for key in keys]  # no square root of D
        alpha = torch.stack(raised) / sum(raised)
        states.append(sum(a[..., None] * v for a, v in zip(alpha, sources)))
        weights.append(alpha)
        if l <= L:
            outputs[l] = sublayers[l - 1](states[-1])
    return states, weights


def unet_forward(v_0, sublayers, weight, bias):
    """The stream after 0, 1, .. n blocks. weight (D, 2 D), bias: functions of the number 1 .. n of the joined block."""
    n = len(sublayers) // 2
    stream = {0: v_0}
    for number in range(1, n + 1):
        h = stream[number - 1]
        mirrored = n + 1 - number
        if mirrored < number:
            stacked = torch.cat([h, stream[mirrored]], dim=-1)
            h = h + stacked @ weight(number).T + bias(number)
        h = h + sublayers[2 * number - 2](h)
        stream[number] = h + sublayers[2 * number - 1](h)
    return [stream[number] for number in range(n + 1)]


def defined(model, inputs, S=None):
    """Velocity and projections of a model by these definitions."""
    v_0, sublayers, head = parts(model, *inputs)
    if model.routing == "attnres":
        aggregators = model.router.aggregators
        states, _ = attnres_forward(
            v_0, sublayers, S, lambda l: aggregators[l - 1].query, lambda l: aggregators[l - 1].norm_weight
        )
        after = states[::2]  # z_k is what block k + 1 reads
    else:
        first = len(model.blocks) - len(model.skips) + 1
        after = unet_forward(
            v_0,
            sublayers,
            lambda number: model.skips[number - first].weight,
            lambda number: model.skips[number - first].bias,
        )
    aligned = [
        model.projectors[2 * i + encoder](after[k]) for i, k in enumerate(model.align_depth) for encoder in range(2)
    ]
    return head(after[-1]), aligned


CASES = [
    dict(routing="attnres", depth=depth, chunk_size=S, align_depth=tuple(range(1, depth + 1)))
    for depth, S in ((1, 1), (1, 2), (3, 1), (3, 2), (3, 3), (3, 4), (3, 5), (3, 6), (4, 3))
]
CASES += [dict(routing="unet", depth=depth, align_depth=tuple(range(1, depth + 1))) for depth in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_forward_and_gradients_equal_the_definition(changes):
    model = build(**changes).double()
    inputs = batch(dtype=torch.float64)
    results = []
    for run in (model, lambda *inputs: defined(model, inputs, changes.get("chunk_size"))):
        results.append(gradients(model, run, inputs))
    actual, expected = results
    assert actual.keys() == expected.keys() and len(actual) > 30
    assert expected["output 0"].std() > 0.1
    for name, value in expected.items():
        if name.startswith("router.aggregators.0."):
            assert not actual[name].any(), name  # one source, nothing to weigh
        else:
            assert value.any() and value.isfinite().all(), name
            assert_near(actual[name], value, name, tolerance=1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        dict(routing="attnres", chunk_size=4),
        dict(routing="attnres", chunk_size=1),
        dict(routing="unet"),
        dict(routing="unet", depth=4),
    ],
    ids=str,
)
def test_first_steps_train_every_parameter(changes):
    """Finite from the first step, where all outputs are zero and RMSNorm's gradient gain is 1000; none without one.

    By the eighth step each is also non-zero, but for AttnRes's first aggregator, which has nothing to weigh.
    """
    model = build(randomized=False, **changes).train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    (x, t, y), losses = batch(4), []
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(x.shape, generator=generator)
    for step in range(8):
        optimizer.zero_grad(set_to_none=True)
        velocity, aligned = model(x, t, y, label_draw=torch.linspace(0, 0.99, 4))
        loss = (velocity - target).square().mean() + sum((z - 1).square().mean() for z in aligned)
        loss.backward()
        losses.append(loss.item())
        for name, parameter in parameters.items():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), f"step {step}: {name}"
        optimizer.step()
    assert losses[-1] < losses[0]
    still_zero = {name for name, parameter in parameters.items() if not parameter.grad.any()}
    assert still_zero == {name for name in parameters if name.startswith("router.aggregators.0.")}


# ---- AttnRes ----


@pytest.mark.parametrize("zero_queries", [True, False])
@pytest.mark.parametrize("depth, S", [(1, 1), (2, 3), (3, 2), (3, 4), (3, 6)])
def test_weights_of_attnres(depth, S, zero_queries):
    """A distribution over the sources; with queries of zero, as at first, the plain mean of them."""
    model = build(routing="attnres", depth=depth, chunk_size=S, align_dims=()).double()
    if zero_queries:
        for aggregator in model.router.aggregators:
            torch.nn.init.zeros_(aggregator.query)
    inputs = batch(dtype=torch.float64)
    v_0, sublayers, _ = parts(model, *inputs)
    aggregators = model.router.aggregators
    with torch.no_grad(), diagnosis.observed(model, weights=True) as look:
        trace = look(*inputs)
        states, expected = attnres_forward(
            v_0, sublayers, S, lambda l: aggregators[l - 1].query, lambda l: aggregators[l - 1].norm_weight
        )
    assert len(trace.weights) == len(trace.states) == 2 * depth + 1
    for l, (alpha, weights, h, state) in enumerate(zip(trace.weights, expected, trace.states, states), start=1):
        count = 1 + -(-(l - 1) // S)  # v_0, and the chunks that have begun
        assert alpha.shape == (count, 3, 16)
        torch.testing.assert_close(alpha.sum(0), torch.ones(3, 16, dtype=torch.float64))
        assert_near(alpha, weights, f"weights of reader {l}", tolerance=1e-9)
        assert_near(h, state, f"h_{l}", tolerance=1e-9)
        if zero_queries:
            torch.testing.assert_close(alpha, torch.full_like(alpha, 1 / count))
        elif count > 1:
            assert alpha.std() > 0.05
        read = model.router.plan[l - 1]
        assert torch.equal(trace.outputs[0], v_0) and read[0] == 0 and len(read) == count
        torch.testing.assert_close(sum(a[..., None] * trace.outputs[i] for a, i in zip(alpha, read)), h)


def test_attnres_starts_as_a_plain_mean_with_a_query_and_a_norm_for_each_reader():
    model = build(routing="attnres", randomized=False, chunk_size=4)
    assert len(model.router.aggregators) == 7  # six sublayers and the head, aligned or not
    for aggregator in model.router.aggregators:
        assert aggregator.query.shape == (24,) and not aggregator.query.any() and (aggregator.norm_weight == 1).all()
    assert parameters_by_part(model)["router"] == 7 * 2 * 24


def test_options_of_dar_are_idle_elsewhere():
    """query and final_aggregator change nothing in attnres, and with chunk_size nothing in unet."""
    idle = dict(query="dynamic", final_aggregator="shared")
    for changes, others in (
        (dict(routing="attnres", chunk_size=3), idle),
        (dict(routing="unet"), {**idle, "chunk_size": 99}),
    ):
        plain, other = build(**changes), build(**{**changes, **others})
        assert plain.state_dict().keys() == other.state_dict().keys()
        assert torch.equal(plain(*batch())[0], other(*batch())[0])


@pytest.mark.skipif(kernels.route_triton is None, reason="triton is not installed")
def test_fused_kernels_serve_attnres():
    """Running sums pass through the fused backward, which adds up a source's gradients on its way."""
    changes = dict(routing="attnres", depth=2, align_depth=2, chunk_size=3, input_size=4)  # slow here
    inputs, results = batch(2, size=4), {}
    for backend in ("triton", "torch"):
        model = build(route_backend=backend, **changes)
        results[backend] = gradients(model, model, inputs)
    for name, value in results["torch"].items():
        if not name.startswith("router.aggregators.0."):
            assert value.any(), name
            assert_near(results["triton"][name], value, name, tolerance=2e-4)
    assert not results["triton"]["router.aggregators.0.query"].any()


@pytest.mark.parametrize("backend, dtype", [("torch", torch.float32), ("triton", torch.bfloat16)])
def test_sums_have_the_dtype_of_sources_under_autocast(backend, dtype):
    if backend == "triton" and kernels.route_triton is None:
        pytest.skip("triton is not installed")
    with torch.autocast("cpu", torch.bfloat16):
        stream = RoutedStream(AttnResRouter(6, 24, 3, backend), torch.full((2, 4, 24), 5.0), torch.zeros(2, 24))
        for _ in range(4):  # v_2 and v_3 are sums, v_4 begins a chunk
            stream.write(torch.ones(2, 4, 24, dtype=torch.bfloat16))
    assert [v.dtype for v in stream.v] == [dtype] * 5
    assert [v.unique().tolist() for v in stream.v] == [[5], [1], [2], [3], [1]]


# ---- long skips ----


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_long_skips_start_as_the_residual_model(depth, half):
    """To the bit, and under autocast as well: every weight random but those of the skips, which are zero."""
    residual = build(depth=depth, align_depth=depth)
    model = build(depth=depth, align_depth=depth, routing="unet", randomized=False)
    assert len(model.skips) == depth // 2 and not any(p.any() for p in model.skips.parameters())
    assert load_published(model, residual.state_dict()) == (
        sorted(name for name in model.state_dict() if name.startswith("skips.")),
        [],
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        (velocity, aligned), (expected, aligned_expected) = model(*batch()), residual(*batch())
    assert velocity.std() > 0.1 and torch.equal(velocity, expected)
    assert len(aligned) == 2 and all(map(torch.equal, aligned, aligned_expected))


def test_autocast_keeps_the_stream_in_float32():
    model, states = build(routing="unet", depth=4, align_depth=4), []
    model.projectors[0].register_forward_pre_hook(lambda module, arguments: states.append(arguments[0]))
    for half in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(*batch())
    assert states[1].dtype == torch.float32 and not torch.equal(*states)
    assert_near(states[1], states[0], "the stream after two skips", tolerance=0.03)


def test_an_odd_depth_has_a_middle_block_without_skip():
    for depth, count in ((1, 0), (4, 2), (5, 2), (28, 14)):
        with torch.device("meta"):
            model = SiT(depth=depth, routing="unet", align_depth=1)
        assert len(model.skips) == count
        assert all(tuple(skip.weight.shape) == (1152, 2 * 1152) for skip in model.skips)
        assert parameters_by_part(model).get("skips", 0) == count * (2 * 1152**2 + 1152)


# ---- weights of another routing ----


@pytest.mark.parametrize("routing, part", [("attnres", "router."), ("unet", "skips.")])
def test_residual_weights_start_a_baseline_whose_own_parts_stay(routing, part):
    source, target = build(seed=3).state_dict(), build(seed=4, routing=routing)
    initial = {name: value.clone() for name, value in target.state_dict().items() if name.startswith(part)}
    assert load_published(target, source) == (sorted(initial), []) and initial
    assert_loaded(target, {**source, **initial})
    whole = build(seed=5, routing=routing).state_dict()
    assert load_published(target, whole) == ([], [])
    assert_loaded(target, whole)


@pytest.mark.parametrize(
    "theirs, ours, message",
    [
        ("unet", "residual", "unknown skips.0.bias; unknown skips.0.weight$"),
        ("attnres", "residual", "unknown router.aggregators.0.norm_weight"),
        ("unet", "attnres", "missing router.aggregators.0.*; .* more"),
        ("dar", "unet", "missing skips.0.bias; .* more"),
    ],
)
def test_weights_of_another_routing_are_refused(theirs, ours, message):
    with pytest.raises(ValueError, match=message):
        load_published(build(routing=ours), build(routing=theirs).state_dict())


def test_a_part_of_the_skips_is_refused():
    weights = build(routing="unet", depth=5).state_dict()
    weights.pop("skips.1.weight")
    with pytest.raises(ValueError, match=": missing skips.1.weight$"):
        load_published(build(routing="unet", depth=5), weights)


# ---- the commands ----


@pytest.fixture(scope="module")
def runs(digits, encoder_folder, tmp_path_factory):
    """Three steps of the trainer with each baseline, three blocks and alignment: {routing: (folder, what it said)}."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for routing in BASELINES:
        with pytest.MonkeyPatch.context() as patch:
            said = []
            patch.setattr(train_repa_dar.Trainer, "say", lambda self, text: said.append(text))
            train_repa_dar.main(
                [
                    "--config",
                    "digits",
                    "--data",
                    str(digits),
                    "--encoder",
                    str(encoder_folder),
                    "--alignment",
                    "repa",
                    "--out",
                    str(folder / routing),
                    "--routing",
                    routing,
                    "--depth",
                    "3",
                    "--hidden-size",
                    "32",
                    "--num-heads",
                    "2",
                    "--align-depth",
                    "2",
                    "--projector-dim",
                    "16",
                    "--chunk-size",
                    "4",
                    "--batch-size",
                    "8",
                    "--max-steps",
                    "3",
                    "--log-every",
                    "1",
                    "--lr",
                    "0.01",
                    "--eval-every",
                    "3",
                    "--eval-samples",
                    "4",
                    "--sample-steps",
                    "2",
                    "--tensorboard",
                    "False",
                ]
            )
        found[routing] = folder / routing, "\n".join(said)
    return found


@pytest.mark.parametrize("routing", BASELINES)
def test_a_run_trains_evaluates_and_is_rebuilt(runs, routing):
    folder, said = runs[routing]
    log = read_lines(folder / "metrics.jsonl")
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 3 and max(losses) < 10 and log[-1]["frechet_distance"] > 0
    assert all(line["skipped_steps"] == 0 for line in log if "loss" in line)
    assert f"routing {routing}" + (" by plain PyTorch" if routing == "attnres" else "\n") in said
    model, options = load_trained(folder / "last.pt", "none")
    trained = load_file(folder / "last.pt")["model"]
    assert (model.routing, options["routing"]) == (routing, routing)
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    moved = "router.aggregators.6.query" if routing == "attnres" else "skips.0.weight"
    assert trained[moved].any()  # from zero


@pytest.mark.parametrize("routing", BASELINES)
def test_figures_of_a_run(runs, tmp_path, routing):
    folder, _ = runs[routing]
    names = ["states", "time", "alignment"] + ["routing"] * (routing == "attnres")
    arguments = [str(folder / "last.pt"), "--average", "none", "--times", "0.1", "1", "--num-images", "24", "--out"]
    diagnosis.main([*arguments, str(tmp_path / "a")])
    assert {file.stem for file in (tmp_path / "a").iterdir()} == set(names)
    content = {name: json.loads((tmp_path / "a" / f"{name}.json").read_text()) for name in names}
    assert {figure["settings"]["routing"] for figure in content.values()} == {routing}
    assert len(content["states"]["data"]["rms"][0]) == 4 and len(content["time"]["data"]["r2"]) == 7
    if routing == "attnres":
        data = content["routing"]["data"]
        assert data["sources"] == [[0], [0, 1], [0, 2], [0, 3], [0, 4], [0, 4, 5], [0, 4, 6]]  # S = 4
        for rows in data["weights"]:
            assert [len(row) for row in rows] == [1, 2, 2, 2, 2, 3, 3]
            assert all(sum(row) == pytest.approx(1) for row in rows)
    else:
        with pytest.raises(SystemExit, match="'routing': .* long skips .* choose from states, time, alignment"):
            diagnosis.main([*arguments, str(tmp_path / "b"), "--figures", "routing"])
        assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("routing", BASELINES)
def test_looking_leaves_the_forward_pass_bit_identical(routing):
    """And the states are those that the projectors see."""
    model = build(routing=routing, align_depth=(1, 2, 3))
    inputs, seen = batch(), []
    velocity, _ = model(*inputs)
    for projector in model.projectors[::2]:
        projector.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with diagnosis.observed(model, weights=True) as look:
        x, t, y = inputs
        trace, slopes = diagnosis.loss_gradients(look, x.clone(), t, velocity + 1, y, "states")
    assert torch.equal(trace.velocity, velocity) and len(trace.states) == len(slopes) == 7
    assert all(map(torch.equal, seen, trace.states[2::2])) and len(seen) == 3
    assert all(slope.any() for slope in slopes)

"""The figures of analysis.diagnose: each number against its definition, written out again here, and the whole command."""

import functools
import json
import math
import random
import shutil
import types

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from torch.nn import functional as F

import train_repa_dar
from dataset.prepared import PreparedImages
from analysis import diagnose as diagnosis
from analysis.diagnose import FIGURES, Sample, cknna, diagnose, held_out_score, observed, pooled_states
from kernels import route
from loss import interpolant
from models import sit
from models.autoencoder import Pixels
from models.encoders import FrozenEncoder
from models.sit import SiT

TIMES = (0.2, 0.7)
DAR = {"routing": "dar", "query": "dynamic", "chunk_size": 2}


def small_model(dtype=torch.float64, depth=2, random=True, **settings):
    """Every parameter random, so that no gate is zero and no weight uniform."""
    torch.manual_seed(0)
    model = (
        SiT(
            input_size=8,
            patch_size=2,
            in_channels=3,
            hidden_size=16,
            depth=depth,
            num_heads=2,
            num_classes=10,
            align_dims=(),
            **settings,
        )
        .to(dtype)
        .eval()
    )
    if random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def images(digits):
    return PreparedImages(digits)


def sample_of(model, images, num_images=6, batch_size=4, seed=0):
    return Sample(model, images, Pixels(), num_images, batch_size, seed, "linear")


def whole(sample, t, null_label=False):
    """All images as one batch: x_t, t, target, y."""
    return [torch.cat(parts) for parts in zip(*sample.batches(t, null_label))]


def plain_forward(model, x, t, y, gates):
    """Residual SiT with h_l = sum_{i<l} g_{l,i} v_i. Returns the velocity, all h and all v."""
    e = model.t_embedder(t)
    c = e + model.y_embedder.embedding_table(y)
    v, h = [model.x_embedder(x) + model.pos_embed], []

    def read(shift, scale):
        h.append(sum(gates[len(v)][i] * v[i] for i in range(len(v))))
        return F.layer_norm(h[-1], h[-1].shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    for block in model.blocks:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block.adaLN_modulation(c).chunk(6, dim=-1)
        v.append(gate_1[:, None] * block.attn(read(shift_1, scale_1)))
        v.append(gate_2[:, None] * block.mlp(read(shift_2, scale_2)))
    shift, scale = model.final_layer.adaLN_modulation(c).chunk(2, dim=-1)
    return model.unpatchify(model.final_layer.linear(read(shift, scale))), h, v


def ones(model):
    return {reader: [1.0] * reader for reader in range(1, 2 * len(model.blocks) + 2)}


# ---- looking ----


@pytest.mark.parametrize(
    "settings", [{}, DAR, {**DAR, "query": "timestep", "chunk_size": 1}, {"checkpoint_activations": True}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_looking_leaves_the_forward_pass_bit_identical(images, settings, dtype):
    model = small_model(dtype, **settings)
    x_t, t, _, y = whole(sample_of(model, images), 0.4)
    assert x_t.dtype == dtype
    expected, _ = model(x_t, t, y)
    for of in ("states", "reads"):
        with observed(model, weights=True) as look:
            trace, _ = diagnosis.loss_gradients(look, x_t, t, expected + 1, y, of)
        assert torch.equal(trace.velocity, expected)
    assert len(trace.states) == len(trace.reads) == len(trace.outputs) == 5
    assert all(torch.equal(a, b) for a, b in zip(trace.states, trace.reads))


def test_what_is_seen_of_a_residual_model(images):
    model = small_model()
    x_t, t, _, y = whole(sample_of(model, images), 0.4)
    _, states, outputs = plain_forward(model, x_t, t, y, ones(model))
    with observed(model) as look:
        trace = look(x_t, t, y)
    for seen, expected in ((trace.states, states), (trace.outputs, outputs)):
        for a, b in zip(seen, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_what_is_seen_of_a_routed_model(images):
    model = small_model(**DAR)
    x_t, t, _, y = whole(sample_of(model, images), 0.4)
    with observed(model, weights=True) as look:
        trace = look(x_t, t, y)
    v, router = trace.outputs, model.router
    for reader in range(1, 6):
        aggregator = router.aggregators[reader - 1]
        query = F.linear(v[reader - 1], aggregator.query)
        state, weights = route(
            [v[i] for i in router.plan[reader - 1]], query, aggregator.norm_weight, return_weights=True
        )
        torch.testing.assert_close(trace.states[reader - 1], state)
        torch.testing.assert_close(trace.weights[reader - 1], weights)


def test_looking_is_in_float32_with_plain_routing_whatever_the_caller_has_set(images):
    model = small_model(torch.float32, **DAR)
    x_t, t, _, y = whole(sample_of(model, images), 0.4)
    expected, _ = model(x_t, t, y)
    model.router.backend = "triton"
    with torch.autocast("cpu", torch.bfloat16), observed(model, weights=True) as look:
        assert model.router.backend == "torch"
        trace = look(x_t, t, y)
    assert model.router.backend == "triton"
    assert trace.velocity.dtype == torch.float32 and torch.equal(trace.velocity, expected)


@pytest.mark.parametrize("settings", [{}, DAR])
def test_model_and_random_state_are_left_as_found(images, encoder_folder, tmp_path, settings):
    model = small_model(torch.float32, **settings).train()
    model.blocks[1].eval()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    if model.router:
        model.router.backend = "auto"
    model.final_layer.linear.weight.grad = torch.ones_like(model.final_layer.linear.weight)

    def state():
        return (
            [value.clone() for value in (*model.state_dict().values(), torch.get_rng_state())],
            [module.training for module in model.modules()],
            [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()],
            model.router and model.router.backend,
            sit.ResidualStream,
            sit.RoutedStream,
            random.getstate(),
            np.random.get_state()[1].tolist(),
        )

    encoder = FrozenEncoder(str(encoder_folder), 4)

    def same(a, b):
        return all(map(torch.equal, a[0], b[0])) and a[1:] == b[1:]

    before = state()
    diagnose(model, images, Pixels(), encoder, tmp_path, num_images=24, times=(0.5,))
    assert same(state(), before)
    with pytest.raises(RuntimeError), observed(model):
        assert not same(state(), before)
        raise RuntimeError
    assert same(state(), before)


def test_sample_follows_from_the_seed_and_not_from_the_batches(images):
    model = small_model(torch.float32)
    one, other = sample_of(model, images, 7, 3), sample_of(model, images, 7, 7)
    for a, b in zip(whole(one, one.times), whole(other, other.times), strict=True):
        assert torch.equal(a, b)
    assert len(set(one.items)) == 7 and not np.array_equal(one.items, sample_of(model, images, 7, 7, seed=1).items)
    x_t, t, target, y = whole(one, one.times)
    expected = interpolant(one.x, one.noise, one.times.float())
    assert torch.equal(x_t, expected[0]) and torch.equal(target, expected[1]) and torch.equal(t, one.times.float())
    assert torch.equal(one.x, Pixels().encode(images.__getitems__(one.items)["images"]))
    assert torch.equal(y, images.labels[one.items]) and set(whole(one, 0.5, True)[3].tolist()) == {10}


def test_images_are_noised_on_the_path_of_the_run(images):
    sample = Sample(small_model(), images, Pixels(), 5, 3, 0, "cosine")
    x_t, _, target, _ = whole(sample, 0.3)
    cos, sin, x, noise = math.cos(0.15 * math.pi), math.sin(0.15 * math.pi), sample.x.double(), sample.noise.double()
    torch.testing.assert_close(x_t, cos * x + sin * noise)
    torch.testing.assert_close(target, math.pi / 2 * (cos * noise - sin * x))


def test_sample_of_latents_is_a_draw_from_the_posterior():
    """Latents of 4 channels and half the size; a second image of the same moments has another draw."""

    class Data(types.SimpleNamespace):
        resolution, num_classes, labels, folder = 16, 10, torch.arange(10), "folder"

        def __len__(self):
            return 10

        def __getitems__(self, items):
            mean = torch.as_tensor(items, dtype=torch.float16).view(-1, 1, 1, 1).expand(-1, 4, 8, 8)
            return {"moments": torch.cat([mean, torch.full_like(mean, 0.25)], dim=1)}

    def draw(moments, noise):
        mean, std = moments.float().chunk(2, dim=1)
        return mean + std * noise

    model = SiT(input_size=8, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=10, align_dims=())
    autoencoder = types.SimpleNamespace(channels=4, downsampling=2, name="latents", sample=draw)
    sample = Sample(model, Data(), autoencoder, 5, 3, 0, "linear")
    draws = (sample.x - torch.from_numpy(sample.items).view(-1, 1, 1, 1)) / 0.25
    assert draws.std().item() == pytest.approx(1, abs=0.1) and abs(draws.mean()) < 0.1
    assert abs((draws * sample.noise).mean()) < 0.1, "the posterior's noise is not the diffusion's"


# ---- (a) states ----


def test_states_of_a_residual_model(images):
    """Values and gradients of the stream by a plain recursion h <- h + v."""
    model = small_model()
    sample = sample_of(model, images)
    with observed(model) as look:
        data = diagnosis.states(look, model, sample, TIMES)
    for row, t in enumerate(TIMES):
        x_t, t, target, y = whole(sample, t)
        c = model.t_embedder(t) + model.y_embedder.embedding_table(y)
        stream = [model.x_embedder(x_t) + model.pos_embed]

        def read(h, shift, scale):
            return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

        for block in model.blocks:
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block.adaLN_modulation(c).chunk(6, dim=-1)
            h = stream[-1] + gate_1[:, None] * block.attn(read(stream[-1], shift_1, scale_1))
            stream.append(h + gate_2[:, None] * block.mlp(read(h, shift_2, scale_2)))
        shift, scale = model.final_layer.adaLN_modulation(c).chunk(2, dim=-1)
        velocity = model.unpatchify(model.final_layer.linear(read(stream[-1], shift, scale)))
        loss = (velocity - target).square().mean((1, 2, 3)).sum()
        gradients = torch.autograd.grad(loss, stream)
        assert data["rms"][row] == pytest.approx([h.square().mean().sqrt().item() for h in stream])
        assert data["gradient_rms"][row] == pytest.approx([g.square().mean().sqrt().item() for g in gradients])
        assert data["cosine"][row] == pytest.approx(
            [
                (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1).mean().item()
                for a, b in zip(stream, stream[1:])
            ]
        )
    assert data["blocks"] == [0, 1, 2]


def test_state_gradient_of_a_routed_model_is_a_finite_difference(images, monkeypatch):
    model = small_model(**DAR)
    sample = sample_of(model, images, 1)
    x_t, t, target, y = whole(sample, 0.4)
    with observed(model) as look:
        _, gradients = diagnosis.loss_gradients(look, x_t, t, target, y, "states")
    direction, reader, values = torch.randn_like(gradients[2]), 2, []
    original = sit.RoutedStream.read

    for step in (1e-5, -1e-5):

        def read(self, shift, scale):
            x, h = original(self, shift, scale)
            if len(self.v) - 1 == reader:
                h = h + step * direction
                x = F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
            return x, h

        monkeypatch.setattr(sit.RoutedStream, "read", read)
        values.append((model(x_t, t, y)[0] - target).square().mean().item())
    assert (gradients[2] * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


# ---- (b) routing ----


def test_importance_is_the_finite_difference_of_explicit_gates(images):
    model = small_model()
    sample = sample_of(model, images)
    with observed(model) as look:
        data = diagnosis.routing(look, model, sample, TIMES)
    assert data["sources"] == [list(range(reader)) for reader in range(1, 6)]
    for row, t in enumerate(TIMES):
        x_t, t, target, y = whole(sample, t)
        for reader in range(1, 6):
            expected = []
            for i in range(reader):
                losses = []
                for step in (1e-5, -1e-5):
                    gates = ones(model)
                    gates[reader][i] += step
                    with torch.no_grad():
                        velocity, _, _ = plain_forward(model, x_t, t, y, gates)
                    losses.append((velocity - target).square().mean((1, 2, 3)))
                expected.append(((losses[0] - losses[1]) / 2e-5).abs().mean().item())
            assert data["importance"][row][reader - 1] == pytest.approx(expected, rel=1e-4, abs=1e-8)
            shares = np.array(data["importance"][row][reader - 1]) / sum(data["importance"][row][reader - 1])
            assert data["weights"][row][reader - 1] == pytest.approx(shares.tolist())
            assert data["largest"][row][reader - 1] == pytest.approx(shares.max())
            assert data["entropy"][row][reader - 1] == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-9)


@pytest.mark.parametrize("query", ["static", "timestep", "dynamic"])
def test_weights_of_routed_models(images, query):
    model = small_model(**{**DAR, "query": query})
    sample = sample_of(model, images)
    with observed(model, weights=True) as look:
        data = diagnosis.routing(look, model, sample, TIMES)
        traces = [look(*(whole(sample, t)[i] for i in (0, 1, 3))) for t in TIMES]
    assert data["sources"] == [list(read) for read in model.router.plan] and "importance" not in data
    for row, trace in enumerate(traces):
        for reader, alpha in enumerate(trace.weights):
            assert sum(data["weights"][row][reader]) == pytest.approx(1)
            assert data["weights"][row][reader] == pytest.approx(alpha.mean((1, 2)).tolist())
            entropy = -(alpha * alpha.log()).sum(0).mean().item()
            assert data["entropy"][row][reader] == pytest.approx(entropy, abs=1e-12)
            assert data["largest"][row][reader] == pytest.approx(alpha.max(0).values.mean().item())
            count = len(alpha)
            share = data["entropy_share"][row][reader]
            assert share is None if count == 1 else share == pytest.approx(entropy / math.log(count))


def test_untrained_weights_are_uniform(images):
    model = small_model(random=False, **{**DAR, "chunk_size": 1})
    with observed(model, weights=True) as look:
        data = diagnosis.routing(look, model, sample_of(model, images), TIMES)
    for entropy, largest, share in zip(data["entropy"], data["largest"], data["entropy_share"]):
        assert entropy == pytest.approx([math.log(n) for n in range(1, 6)])
        assert largest == pytest.approx([1 / n for n in range(1, 6)])
        assert share == [None, *[pytest.approx(1)] * 4]


def test_entropy_of_a_certain_choice_is_zero():
    entropy, largest = diagnosis.entropy_and_largest(torch.eye(4)[:, :1].expand(4, 3))
    assert (entropy.item(), largest.item()) == (0, 1)


# ---- (c), (d) probes ----


def test_pooled_states_are_in_order_and_under_the_null_label(images):
    model = small_model()
    sample = sample_of(model, images)
    x_t, t, _, y = whole(sample, sample.times)
    with observed(model) as look:
        pooled = pooled_states(look, sample, sample.times)
        expected = [h.mean(1) for h in look(x_t, t, torch.full_like(y, 10)).states]
    assert pooled == pytest.approx(torch.stack(expected).detach().numpy())


def test_time_is_read_from_states_that_hold_it(images, monkeypatch):
    """The states are replaced: the first hold t linearly beside noise, the second noise alone."""
    rng = np.random.default_rng(0)
    model = small_model(torch.float32)
    sample = sample_of(model, images, 400, 400)
    t, noise = sample.times.numpy(), rng.normal(size=(400, 16))
    informed = noise + 30 * t[:, None] * rng.normal(size=16)
    monkeypatch.setattr(diagnosis, "pooled_states", lambda look, sample, t: [informed, noise])
    known, unknown = diagnosis.time(None, model, sample)["r2"]
    assert known > 0.95 and -0.3 < unknown < 0.1


def test_a_real_forward_pass_knows_t(images):
    model = small_model(torch.float32, **DAR)
    sample = sample_of(model, images, 200, 100)
    with observed(model) as look:
        data = diagnosis.time(look, model, sample)
    assert data["readers"] == [1, 2, 3, 4, 5]
    assert max(data["r2"]) > 0.8


def test_probe_is_fitted_on_three_quarters_and_scored_on_the_rest():
    """With scales that standardisation has to undo, and held-out targets that the fitted ones contradict."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 3)) * [1e-6, 1, 1e6] + 5
    y = x @ [1e6, 1, 1e-6]
    assert held_out_score(RidgeCV(np.logspace(-3, 5, 9)), x, y) > 0.999
    y[60:] *= -1
    assert held_out_score(RidgeCV(np.logspace(-3, 5, 9)), x, y) < -1
    labels = (x[:, 0] > 5).astype(int)
    assert held_out_score(LogisticRegression(max_iter=500), x, labels) > 0.9
    labels[60:] = 1 - labels[60:]
    assert held_out_score(LogisticRegression(max_iter=500), x, labels) < 0.1


def test_probe_is_standardised_by_the_fitted_images_alone():
    """Against ridge regression in closed form; the held-out images lie elsewhere, which may not move the scale."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)) * [1, 5, 20]
    x[30:] = 6 * x[30:] + 50
    y = x @ [1.0, -0.5, 0.2] + rng.normal(size=40)
    mean, deviation = x[:30].mean(0), x[:30].std(0)
    z, offset = (x - mean) / deviation, y[:30].mean()
    weights = np.linalg.solve(z[:30].T @ z[:30] + 10 * np.eye(3), z[:30].T @ (y[:30] - offset))
    rest = y[30:] - offset - z[30:] @ weights
    expected = 1 - np.square(rest).sum() / np.square(y[30:] - y[30:].mean()).sum()
    assert held_out_score(Ridge(10.0), x, y) == pytest.approx(expected, rel=1e-9)


def cknna_by_loops(a, b, k):
    count = len(a)
    unit = [[row / math.sqrt(sum(row * row)) for row in features] for features in (a, b)]
    kernel = [[[float(sum(u * w)) for w in rows] for u in rows] for rows in unit]
    near = [
        [set(sorted((j for j in range(count) if j != i), key=lambda j: -one[i][j])[:k]) for i in range(count)]
        for one in kernel
    ]

    def similarity(p, q):
        left, right = (
            [[one[i][j] if j in near[p][i] and j in near[q][i] else 0 for j in range(count)] for i in range(count)]
            for one in (kernel[p], kernel[q])
        )
        numbers = range(count)
        trace = sum(left[i][j] * right[j][i] for i in numbers for j in numbers)
        sums = sum(map(sum, left)) * sum(map(sum, right))
        chain = sum(left[i][j] * right[j][l] for i in numbers for j in numbers for l in numbers)
        return trace + sums / ((count - 1) * (count - 2)) - 2 * chain / (count - 2)

    return similarity(0, 1) / math.sqrt(similarity(0, 0) * similarity(1, 1))


@pytest.mark.parametrize("k", [2, 5])
def test_cknna_against_its_definition(k):
    rng = np.random.default_rng(k)
    a = rng.normal(size=(24, 4))
    b = np.concatenate([a[:, :2] * 3, rng.normal(size=(24, 3))], axis=1)
    assert cknna(a, b, k) == pytest.approx(cknna_by_loops(a, b, k))
    assert 0 < cknna(a, b, k) < 0.9


def test_cknna_of_identical_and_of_unrelated_representations():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 16)), rng.normal(size=(300, 16))
    rotated = 7 * a @ np.linalg.qr(rng.normal(size=(16, 16)))[0] * rng.uniform(1, 2, size=(300, 1))
    assert cknna(a, a) == pytest.approx(1) and cknna(a, rotated) == pytest.approx(1)
    assert abs(cknna(a, b)) < 0.05
    assert math.isnan(cknna(a, np.zeros_like(a)))


def test_alignment_with_itself_is_complete(images, encoder_folder, monkeypatch):
    """Where the states are the encoder's own tokens, CKNNA is 1 and the accuracy the encoder's."""
    model = small_model(torch.float32)
    sample, encoder = sample_of(model, images, 80, 40), FrozenEncoder(str(encoder_folder), 4)
    tokens = encoder(images.__getitems__(sample.items)["images"]).mean(1).double().numpy()
    noise = np.random.default_rng(0).normal(size=tokens.shape)
    states = np.stack([noise, noise, tokens, noise, noise])
    monkeypatch.setattr(diagnosis, "pooled_states", lambda look, sample, t: states)
    data = diagnosis.alignment(None, model, sample, (0.5,), encoder)
    assert data["cknna"] == [[pytest.approx(score) for score in (cknna(noise, tokens), 1, cknna(noise, tokens))]]
    assert data["accuracy"][0][1] == data["encoder_accuracy"] > data["accuracy"][0][0]


def test_alignment_looks_at_every_time_that_is_asked_for(images, encoder_folder, monkeypatch):
    """Where the states at t = 0.7 alone are the encoder's tokens."""
    model = small_model(torch.float32)
    sample, encoder = sample_of(model, images, 80, 40), FrozenEncoder(str(encoder_folder), 4)
    tokens, noise = sample.encoded(encoder), np.random.default_rng(0).normal(size=(80, 24))
    monkeypatch.setattr(
        diagnosis, "pooled_states", lambda look, sample, t: np.stack([tokens if t == 0.7 else noise] * 5)
    )
    data = diagnosis.alignment(None, model, sample, TIMES, encoder)
    assert data["cknna"] == [[pytest.approx(cknna(noise, tokens))] * 3, [pytest.approx(1)] * 3]
    assert data["accuracy"][1] == [data["encoder_accuracy"]] * 3


# ---- the pictures ----


def test_picture_of_routing_puts_each_weight_at_its_source():
    """Readers of four sublayers in chunks of two; columns that a reader does not see stay empty."""
    sources, times = [[0], [0, 1], [0, 2], [0, 2, 3], [0, 2, 4]], [0.2, 0.7]
    rng = np.random.default_rng(0)
    weights = [[rng.dirichlet(np.ones(len(read))).tolist() for read in sources] for _ in times]
    shares, largest = rng.random((2, 2, 5)).tolist()
    figure = diagnosis.plot_routing(
        {
            "sources": sources,
            "times": times,
            "weights": weights,
            "largest": largest,
            "entropy_share": [[None, *row[1:]] for row in shares],
        }
    )
    maps = [panel for panel in figure.axes if panel.images]
    assert [panel.get_title() for panel in maps] == ["t = 0.2", "t = 0.7"]
    for panel, rows in zip(maps, weights):
        expected = np.full((5, 5), np.nan)
        for reader, (read, values) in enumerate(zip(sources, rows)):
            for i, value in zip(read, values):
                expected[reader, i] = value
        np.testing.assert_array_equal(np.ma.filled(panel.images[0].get_array(), np.nan), expected)
    panels = {panel.get_title(): panel.lines for panel in figure.axes if panel.lines}
    for reader in (1, 3, 5):
        drawn = {line.get_label(): list(line.get_ydata()) for line in panels[f"reader {reader}"]}
        assert drawn == {
            f"v{i}": [rows[reader - 1][place] for rows in weights] for place, i in enumerate(sources[reader - 1])
        }
    for title, rows in (("entropy / log n", shares), ("largest weight", largest)):
        for line, row in zip(panels[title], rows, strict=True):
            np.testing.assert_array_equal(line.get_ydata()[1:], row[1:])
            assert line.get_xdata().tolist() == [1, 2, 3, 4, 5]


def test_pictures_of_curves_show_their_own_numbers():
    times, blocks = [0.2, 0.7], [0, 1, 2]
    rms, gradient, cosine, cknna_rows, accuracy = np.random.default_rng(0).uniform(0.1, 1, size=(5, 2, 3)).tolist()
    cosine = [row[:2] for row in cosine]
    states = diagnosis.plot_states(
        {"times": times, "blocks": blocks, "rms": rms, "gradient_rms": gradient, "cosine": cosine}
    )
    alignment = diagnosis.plot_alignment(
        {
            "times": times,
            "blocks": blocks,
            "cknna": cknna_rows,
            "accuracy": accuracy,
            "neighbours": 10,
            "encoder_accuracy": 0.55,
        }
    )
    time = diagnosis.plot_time({"readers": [1, 2, 3], "r2": [0.1, 0.9, 0.4]})
    for figure, kinds in (
        (states, {"RMS of the state": rms, "RMS of the loss gradient": gradient, "cosine with the next state": cosine}),
        (alignment, {"CKNNA, k = 10": cknna_rows, "accuracy of a linear probe": accuracy}),
    ):
        panels = {
            panel.get_title(): {line.get_label(): list(line.get_ydata()) for line in panel.lines}
            for panel in figure.axes
        }
        assert panels.keys() == kinds.keys()
        for title, rows in kinds.items():
            assert [panels[title][f"t = {t:g}"] for t in times] == rows
    assert panels["accuracy of a linear probe"]["encoder"] == [0.55, 0.55]
    assert time.axes[0].lines[0].get_ydata().tolist() == [0.1, 0.9, 0.4]


# ---- the command ----


@pytest.fixture(scope="module")
def checkpoints(digits, encoder_folder, tmp_path_factory):
    """Runs of three steps: {name: last.pt}."""
    folder, paths = tmp_path_factory.mktemp("runs"), {}
    for name, extra in (("residual", ("--alignment", "none")), ("dar", ("--alignment", "repa", "--path", "cosine"))):
        train_repa_dar.main(
            [
                "--config",
                "digits",
                "--data",
                str(digits),
                "--encoder",
                str(encoder_folder),
                "--out",
                str(folder / name),
                "--routing",
                name,
                "--depth",
                "2",
                "--hidden-size",
                "32",
                "--num-heads",
                "2",
                "--align-depth",
                "1",
                "--projector-dim",
                "16",
                "--batch-size",
                "8",
                "--max-steps",
                "3",
                "--eval-every",
                "0",
                "--tensorboard",
                "False",
                *extra,
            ]
        )
        paths[name] = str(folder / name / "last.pt")
    return paths


def command(checkpoint, out, *extra):
    diagnosis.main([checkpoint, "--out", str(out), "--times", "0.1", "1", "--num-images", "24", *map(str, extra)])


def read(folder, name):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((folder / f"{name}.json").read_text(), parse_constant=refuse)


@pytest.mark.parametrize("name", ["residual", "dar"])
def test_command_writes_every_figure(checkpoints, digits, encoder_folder, tmp_path, capsys, name):
    command(checkpoints[name], tmp_path / "new" / "a", "--figures", "states")
    command(checkpoints[name], tmp_path / "b", "--average", "none")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(
        f"{figure}.{kind}" for figure in FIGURES for kind in ("json", "png")
    )
    for figure in FIGURES:
        content = read(tmp_path / "b", figure)
        assert {
            "figure": figure,
            "step": 3,
            "average": "none",
            "checkpoint": checkpoints[name],
        }.items() <= content.items()
        assert {
            "seed": 0,
            "num_images": 24,
            "batch_size": 16,
            "data": str(digits),
            "routing": name,
            "path": "linear" if name == "residual" else "cosine",
        }.items() <= content["settings"].items()
        assert {"torch", "python", "command", "gpu"} <= content.keys()
        with Image.open(tmp_path / "b" / f"{figure}.png") as image:
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 10, "an empty page"
    assert read(tmp_path / "b", "alignment")["settings"]["encoder"] == str(encoder_folder)
    data = {figure: read(tmp_path / "b", figure)["data"] for figure in FIGURES}
    assert data["states"]["times"] == data["routing"]["times"] == [0.1, 1]
    assert [len(data["states"][key][0]) for key in ("rms", "gradient_rms", "cosine")] == [3, 3, 2]
    assert len(data["time"]["r2"]) == 5
    assert np.shape(data["alignment"]["cknna"]) == np.shape(data["alignment"]["accuracy"]) == (2, 3)
    assert str(tmp_path / "b" / "states.png") in capsys.readouterr().out
    # Three steps have not moved the average (decay 0.9999) far from the initial weights.
    assert read(tmp_path / "new" / "a", "states")["data"]["rms"] != data["states"]["rms"]


def test_command_is_deterministic_and_seeded(checkpoints, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        command(checkpoints["dar"], tmp_path / name, "--figures", "states", "time", "--seed", seed)
    for figure in ("states", "time"):
        a, b, c = (read(tmp_path / name, figure)["data"] for name in "abc")
        assert a == b != c
    assert not (tmp_path / "a" / "routing.json").exists()


def test_untrained_residual_model_has_no_importance_and_still_makes_a_figure(images, tmp_path):
    """All gradients are zero at the first step; JSON has null where a share is 0 / 0."""
    model = small_model(torch.float32, random=False)
    results = diagnose(model, images, Pixels(), None, tmp_path, ("states", "routing"), TIMES, num_images=4)
    assert read(tmp_path, "routing")["data"] == results["routing"]
    assert results["routing"]["importance"][0][2] == [0, 0, 0] and results["routing"]["weights"][0][2] == [None] * 3
    assert "checkpoint" not in read(tmp_path, "states")


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--figures", "states", "weights"], r"figures = \('weights',\): choose from states, routing, time, alignment"),
        (["--times", "0.5", "1.5"], r"times = \(0.5, 1.5\): give times in \[0, 1\]"),
        (["--times", "nan"], "times"),
        (["--num-images", "0"], "num_images = 0: must be at least 1"),
        (["--batch-size", "0"], "batch_size = 0"),
        (["--seed", "-1"], "seed = -1"),
        (["--num-images", "19", "--figures", "time"], "figure 'time' needs at least 20 images, not 19"),
        (["--num-images", "19", "--figures", "alignment"], "figure 'alignment' needs at least 20 images"),
        (["--data", "nowhere"], "not a prepared folder"),
        (["--encoder", "nobody"], "encoder 'nobody' is neither"),
        (["--average", "0.5"], "no average '0.5'"),
    ],
)
def test_command_ends_in_a_clear_error(checkpoints, tmp_path, extra, message):
    with pytest.raises(SystemExit, match="error: .*" + message):
        command(checkpoints["residual"], tmp_path / "out", *extra)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "extra, expected",
    [
        ((), ("{own}", "own.pt")),
        (("--encoder", "other"), ("other", "")),
        (("--encoder-weights", "b.pt"), ("{own}", "b.pt")),
        (("--encoder", "other", "--encoder-weights", "b.pt"), ("other", "b.pt")),
    ],
    ids=str,
)
def test_weights_of_the_run_are_for_its_own_encoder(
    checkpoints, encoder_folder, tmp_path, monkeypatch, extra, expected
):
    def refuse(name, grid, weights):
        raise ValueError(f"asked for {name!r} with {weights!r}")

    content = torch.load(checkpoints["dar"], weights_only=False)
    content["config"]["encoder_weights"] = ["own.pt"]
    torch.save(content, tmp_path / "last.pt")
    monkeypatch.setattr(diagnosis, "FrozenEncoder", refuse)
    name, weights = expected
    with pytest.raises(SystemExit) as stop:
        command(str(tmp_path / "last.pt"), tmp_path / "out", *extra)
    assert str(stop.value.code) == f"error: asked for {name.format(own=encoder_folder)!r} with {weights!r}"


def test_missing_checkpoint_is_a_clear_error(tmp_path):
    with pytest.raises(SystemExit, match="error: there is no checkpoint 'nowhere.pt'"):
        command("nowhere.pt", tmp_path)


@pytest.fixture
def released(tmp_path, monkeypatch):
    """Weights of a model that the table of sizes knows, without any options: arguments of the command."""
    tiny = functools.partial(SiT, patch_size=2, hidden_size=16, depth=2, num_heads=2)
    monkeypatch.setitem(sit.SIT_MODELS, "SiT-tiny/2", tiny)
    torch.save({"ema": small_model(torch.float32).state_dict()}, tmp_path / "released.pt")
    return [str(tmp_path / "released.pt"), tmp_path / "out", "--model", "SiT-tiny/2"]


def test_released_weights_with_all_that_they_do_not_say(released, digits, encoder_folder, tmp_path):
    command(
        *released,
        "--data",
        digits,
        "--autoencoder",
        "pixels",
        "--encoder",
        encoder_folder,
        "--figures",
        "time",
        "alignment",
    )
    assert read(tmp_path / "out", "alignment")["step"] is None
    assert read(tmp_path / "out", "time")["settings"]["path"] == "linear"


@pytest.mark.parametrize("missing", ["data", "autoencoder", "encoder"])
def test_released_weights_have_to_be_told_what_they_do_not_say(released, digits, encoder_folder, missing):
    given = {"data": digits, "autoencoder": "pixels", "encoder": encoder_folder}
    arguments = [word for key, value in given.items() if key != missing for word in (f"--{key}", value)]
    with pytest.raises(SystemExit, match=f"{missing}: .*released.pt does not say it; give --{missing}"):
        command(*released, *arguments)


@pytest.mark.parametrize("settings", [{"input_size": 16}, {"in_channels": 4}, {"num_classes": 9}])
def test_data_that_do_not_fit_the_model_are_refused(images, tmp_path, settings):
    model = SiT(
        **{
            "input_size": 8,
            "in_channels": 3,
            "num_classes": 10,
            "hidden_size": 16,
            "depth": 1,
            "num_heads": 2,
            "align_dims": (),
            **settings,
        }
    )
    given = [settings.get(key, value) for key, value in (("in_channels", 3), ("input_size", 8), ("num_classes", 10))]
    with pytest.raises(
        ValueError, match="has 3 channels of size 8 and 10 classes, the model %d of size %d and %d" % tuple(given)
    ):
        diagnose(model, images, Pixels(), None, tmp_path / "out", ("states",))


def test_alignment_without_encoder_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="'alignment' needs an encoder"):
        diagnose(small_model(torch.float32), images, Pixels(), None, tmp_path / "out", ("alignment",))


def test_images_of_one_class_have_no_alignment_and_still_make_the_other_figures(digits, encoder_folder, tmp_path):
    """As from a folder of unsorted photographs: a run on them must not end at its first diagnosis."""
    folder = tmp_path / "data"
    shutil.copytree(digits, folder)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "class_names": ["all"]}))
    np.save(folder / "labels.npy", np.zeros_like(np.load(folder / "labels.npy")))
    torch.manual_seed(0)
    model = SiT(
        input_size=8, patch_size=2, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=1, align_dims=()
    )
    encoder = FrozenEncoder(str(encoder_folder), 4)
    done = diagnose(model, PreparedImages(folder), Pixels(), encoder, tmp_path / "out", times=(0.5,), num_images=20)
    assert sorted(done) == ["routing", "states", "time"]
    with pytest.raises(ValueError, match="'alignment' needs images of two classes"):
        diagnose(model, PreparedImages(folder), Pixels(), encoder, tmp_path / "out", ("alignment",), (0.5,), 20)

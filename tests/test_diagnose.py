"""The figures of analysis.diagnose: each number against its definition, written out again here, and the command."""

import functools
import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.linear_model import Ridge
from torch.nn import functional as F

import train_repa_dar
from analysis import diagnose as diagnosis
from analysis import figures as drawing
from analysis.diagnose import FIGURES, Look, Sample, cknna, diagnose, entropy_and_largest, held_out_score, pooled_states
from dataset.prepared import PreparedImages
from kernels import route
from models import sit
from models.autoencoder import Pixels
from models.encoders import FrozenEncoder
from models.sit import SiT
from models.streams import RoutedStream
from tests.conftest import TINY

TIMES = (0.2, 0.7)
DAR = {"routing": "dar", "query": "dynamic", "chunk_size": 2}
SMALL = {"input_size": 8, "in_channels": 3, "num_classes": 10, "hidden_size": 16, "depth": 2, "num_heads": 2}


def small_model(dtype=torch.float64, random=True, **settings):
    """Every parameter random, so that no gate is zero and no weight uniform."""
    torch.manual_seed(0)
    model = SiT(**{**SMALL, "align_dims": (), **settings}).to(dtype).eval()
    for parameter in model.parameters() if random else ():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def images(digits):
    return PreparedImages(digits)


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the PNGs empty, which would take seconds."""
    monkeypatch.setattr(Figure, "savefig", lambda *arguments, **options: None)


def sample_of(model, images, num_images=6, batch_size=4, seed=0, path="linear"):
    return Sample(model, images, Pixels(), num_images, batch_size, seed, path)


def whole(sample, t, null_label=False, path="linear"):
    """All images as one batch: x_t, t, target, y. By formulas of its own."""
    batches = list(sample.batches(t, null_label))
    x, noise, t = (torch.cat(parts) for parts in zip(*((x, draws.noise, draws.t) for x, _, draws in batches)))
    angle, y = t.view(-1, 1, 1, 1) * math.pi / 2, torch.cat([y for _, y, _ in batches])
    if path == "cosine":
        cos, sin = angle.cos(), angle.sin()
        return cos * x + sin * noise, t, math.pi / 2 * (cos * noise - sin * x), y
    return x + t.view(-1, 1, 1, 1) * (noise - x), t, noise - x, y


def modulated(h, shift, scale):
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def plain_forward(model, x, t, y, gates=None):
    """Residual SiT by h <- h + v, or with gates by h_l = sum_{i<l} g_{l,i} v_i. Returns velocity, all h and all v."""
    c = model.t_embedder(t) + model.y_embedder.embedding_table(y)
    v, h = [model.x_embedder(x) + model.pos_embed], []

    def read(shift, scale):
        if gates:
            h.append(sum(gates[len(v)][i] * v[i] for i in range(len(v))))
        else:
            h.append(h[-1] + v[-1] if h else v[0])
        return modulated(h[-1], shift, scale)

    for block in model.blocks:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block.adaLN_modulation(c).chunk(6, dim=-1)
        v.append(gate_1[:, None] * block.attn(read(shift_1, scale_1)))
        v.append(gate_2[:, None] * block.mlp(read(shift_2, scale_2)))
    last = read(*model.final_layer.adaLN_modulation(c).chunk(2, dim=-1))
    return model.unpatchify(model.final_layer.linear(last)), h, v


# ---- looking ----


ROUTINGS = [{}, DAR, {**DAR, "query": "timestep", "chunk_size": 1}, {"routing": "attnres", "chunk_size": 2}]


@pytest.mark.parametrize("settings", [*ROUTINGS, {"routing": "unet"}, {"checkpoint_activations": True}], ids=str)
def test_looking_leaves_the_forward_pass_bit_identical(images, settings):
    """Also with a compiled model, under autocast and another backend; the states are those that projectors see."""
    model, seen = small_model(torch.float32, align_depth=(1, 2), align_dims=(4,), projector_dim=8, **settings), []
    x_t, t, _, y = whole(sample_of(model, images), 0.4)
    if model.router:
        model.router.backend = "torch"  # as looking does
    for projector in model.projectors:
        projector.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    expected, _ = model(x_t, t, y)
    states, seen = seen[:], []
    if model.router:
        model.router.backend = "triton"
    model._compiled_call_impl = pytest.fail  # what `compile` puts in the place of the call
    look = Look(model)
    with torch.autocast("cpu", torch.bfloat16):
        velocity, projected = look(x_t.requires_grad_(), t, y)
    assert velocity.dtype == torch.float32 and torch.equal(velocity, expected) and projected == []
    assert all(map(torch.equal, look.states[2::2], states)) and len(states) == 2
    assert len(look.states) == len(look.reads) == len(look.outputs) == 5
    assert all(map(torch.equal, look.states, look.reads)) and all(state.requires_grad for state in look.states)


@pytest.mark.parametrize("settings", [{}, DAR], ids=str)
def test_model_and_surroundings_are_left_as_found(images, encoder_folder, tmp_path, settings, monkeypatch, undrawn):
    model, within = small_model(torch.float32, **settings).train(), []
    encoder = FrozenEncoder(str(encoder_folder), 4)
    model.blocks[1].eval()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    model.final_layer.linear.weight.grad = torch.ones_like(model.final_layer.linear.weight)
    precision = torch.get_float32_matmul_precision
    model.blocks[0].attn.register_forward_hook(lambda module, *_: within.append((module.training, precision())))

    def state():
        return (
            [value.clone() for value in (*model.state_dict().values(), torch.get_rng_state())],
            [module.training for module in model.modules()],
            [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()],
            (model.router and model.router.backend, precision()),
            (random.getstate(), np.random.get_state()[1].tolist()),
        )

    def same(a, b):
        return all(map(torch.equal, a[0], b[0])) and a[1:] == b[1:]

    torch.set_float32_matmul_precision("high")  # as the trainer does
    try:
        before = state()
        diagnose(model, images, Pixels(), encoder, tmp_path, num_images=24, times=(0.5,))
        assert same(state(), before) and set(within) == {(False, "highest")}
        monkeypatch.setitem(FIGURES, "states", lambda look, *_: look.model.nothing)
        with pytest.raises(AttributeError, match="nothing"):
            diagnose(model, images, Pixels(), None, tmp_path, num_images=24)
        assert same(state(), before)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_sample_follows_from_the_seed_and_not_from_the_batches(images):
    model = small_model(torch.float32)
    one, other = sample_of(model, images, 7, 3), sample_of(model, images, 7, 7)
    for a, b in zip(whole(one, one.times), whole(other, other.times), strict=True):
        assert torch.equal(a, b)
    items, again = one.items.tolist(), sample_of(model, images, len(images), 600, seed=1)
    assert len(set(items)) == 7 and items != again.items[:7].tolist() and not torch.equal(again.times[:7], one.times)
    same = [again.items.tolist().index(item) for item in items]
    assert (again.noise[same] == one.noise).float().mean() < 0.01
    x_t, t, target, y = whole(one, one.times)
    assert torch.equal(one.x, Pixels().encode(images.__getitems__(items)["images"]))
    assert torch.equal(t, one.times.float()) and torch.equal(y, images.labels[items])
    torch.testing.assert_close(x_t, one.x + t.view(-1, 1, 1, 1) * (one.noise - one.x))
    assert set(whole(one, 0.5, True)[3].tolist()) == {10}


class FakeLatents:
    """Ten images whose posterior has the image's number as mean; its own autoencoder of half the resolution."""

    resolution, num_classes, labels, folder = 16, 10, torch.arange(10), "folder"
    channels, downsampling, name = 4, 2, "latents"

    def __len__(self):
        return 10

    def __getitems__(self, items):
        mean = torch.as_tensor(items, dtype=torch.float16).view(-1, 1, 1, 1).expand(-1, 4, 8, 8)
        return {"moments": torch.cat([mean, torch.full_like(mean, 0.25)], dim=1)}

    def conditions(self, items):
        return self.labels[items]

    def sample(self, moments, noise):
        mean, std = moments.float().chunk(2, dim=1)
        return mean + std * noise


def test_sample_of_latents_is_a_draw_from_the_posterior():
    sample = Sample(small_model(torch.float32, in_channels=4), FakeLatents(), FakeLatents(), 5, 3, 0, "linear")
    draws = (sample.x - sample.items.view(-1, 1, 1, 1)) / 0.25
    assert draws.std().item() == pytest.approx(1, abs=0.1) and abs(draws.mean()) < 0.1
    assert abs((draws * sample.noise).mean()) < 0.1, "the posterior's noise is not the diffusion's"


# ---- (a) states ----


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_states_of_a_residual_model(images, path):
    """Values and gradients of the stream by a plain recursion h <- h + v."""
    model = small_model()
    sample, look = sample_of(model, images, path=path), Look(model)
    data = diagnosis.states(look, sample, TIMES)
    for row, t in enumerate(TIMES):
        x_t, t, target, y = whole(sample, t, path=path)
        velocity, states, outputs = plain_forward(model, x_t, t, y)
        stream = states[::2]
        gradients = torch.autograd.grad((velocity - target).square().mean((1, 2, 3)).sum(), stream)
        assert data["rms"][row] == pytest.approx([h.square().mean().sqrt().item() for h in stream])
        assert data["gradient_rms"][row] == pytest.approx([g.square().mean().sqrt().item() for g in gradients])
        angles = [(F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1).mean() for a, b in zip(stream, stream[1:])]
        assert data["cosine"][row] == pytest.approx([cosine.item() for cosine in angles])
        _, null_states, _ = plain_forward(model, x_t, t, torch.full_like(y, 10))
        pooled = torch.stack([h.mean(1) for h in null_states]).detach().numpy()
        assert pooled_states(look, sample, TIMES[row]) == pytest.approx(pooled)
        look(x_t, t, y)
        for seen, expected in ((look.states, states), (look.outputs, outputs)):
            for a, b in zip(seen, expected, strict=True):
                torch.testing.assert_close(a, b)
    assert data["blocks"] == [0, 1, 2]


def test_state_gradient_of_a_routed_model_is_a_finite_difference(images):
    model = small_model(**DAR)
    sample = sample_of(model, images, 1)
    (batch,) = sample.batches(0.4)
    gradients, values = Look(model).gradients(sample.loss, *batch, of="states"), []
    x_t, t, target, y = whole(sample, 0.4)
    direction = torch.randn_like(gradients[2])

    class Pushed(RoutedStream):
        def read(self, shift, scale):
            x, h = super().read(shift, scale)
            if len(self.v) != 3:
                return x, h
            return modulated(h + self.step * direction, shift, scale), h + self.step * direction

    for Pushed.step in (1e-5, -1e-5):
        velocity, _ = model(x_t, t, y, make_stream=functools.partial(Pushed, model.router))
        values.append((velocity - target).square().mean().item())
    assert (gradients[2] * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


# ---- (b) routing ----


def test_importance_is_the_finite_difference_of_explicit_gates(images):
    model = small_model()
    sample = sample_of(model, images)
    data = diagnosis.routing(Look(model), sample, TIMES)
    assert data["sources"] == [list(range(reader)) for reader in range(1, 6)]

    @torch.no_grad()
    def losses(inputs, reader, i, step):
        gates = {l: [1.0 + step * (i == j and l == reader) for j in range(l)] for l in range(1, 6)}
        x_t, t, target, y = inputs
        return (plain_forward(model, x_t, t, y, gates)[0] - target).square().mean((1, 2, 3))

    for row, t in enumerate(TIMES):
        for reader in range(1, 6):
            found, weights, largest, entropy = (
                data[name][row][reader - 1] for name in ("importance", "weights", "largest", "entropy")
            )
            pushed = [[losses(whole(sample, t), reader, i, step) for step in (1e-5, -1e-5)] for i in range(reader)]
            expected = [((up - down) / 2e-5).abs().mean().item() for up, down in pushed]
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-8)
            shares = np.array(found) / sum(found)
            assert weights == pytest.approx(shares.tolist()) and largest == pytest.approx(shares.max())
            assert entropy == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-9)


@pytest.mark.parametrize("query", ["static", "timestep", "dynamic", "attnres"])
def test_weights_of_routed_models(images, query):
    """States and weights by the public operator from the outputs, and what the figure makes of the weights."""
    model = small_model(**({"routing": "attnres", "chunk_size": 2} if query == "attnres" else {**DAR, "query": query}))
    sample, look = sample_of(model, images), Look(model)
    data, of_head = diagnosis.routing(look, sample, TIMES), [0, 2, 4] if query == "attnres" else [0, 2, 3, 4]
    assert data["sources"] == [[0], [0, 1], [0, 2], [0, 2, 3], of_head] and "importance" not in data
    for row, t in enumerate(TIMES):
        x_t, t, _, y = whole(sample, t)
        look(x_t, t, y)
        assert torch.equal(look.outputs[0], look.states[0])
        for l, (read, aggregator) in enumerate(zip(data["sources"], model.router.aggregators)):
            v = [look.outputs[i] for i in read]
            q = F.linear(v[-1], aggregator.query) if query == "dynamic" else aggregator.query
            q = q + model.t_embedder(t) if query == "timestep" else q * 4 if query == "attnres" else q
            state, alpha = route(v, q, aggregator.norm_weight, return_weights=True)
            torch.testing.assert_close(look.states[l], state)
            torch.testing.assert_close(look.weights[l], alpha)
            weights, entropy, largest, share = (
                data[name][row][l] for name in ("weights", "entropy", "largest", "entropy_share")
            )
            expected = -(alpha * alpha.log()).sum(0).mean().item()
            assert weights == pytest.approx(alpha.mean((1, 2)).tolist())
            assert entropy == pytest.approx(expected, abs=1e-12)
            assert largest == pytest.approx(alpha.max(0).values.mean().item())
            assert share == (None if len(alpha) == 1 else pytest.approx(expected / math.log(len(alpha))))


def test_certain_and_uniform_choices():
    entropy, largest = entropy_and_largest([torch.eye(4)[:, :1].expand(4, 3), torch.full((4, 3, 2), 0.25)])
    assert entropy.tolist() == pytest.approx([0, math.log(4)]) and largest.tolist() == [1, 0.25]


# ---- (c), (d) probes ----


def test_time_is_read_from_states_that_hold_it(images, monkeypatch):
    """The states are replaced: the first hold t linearly beside noise, the second noise alone."""
    rng, sample = np.random.default_rng(0), sample_of(small_model(torch.float32), images, 400, 400)
    t, noise = sample.times.numpy(), rng.normal(size=(400, 16))
    states = {id(sample.times): [noise + 30 * t[:, None] * rng.normal(size=16), noise]}
    monkeypatch.setattr(diagnosis, "pooled_states", lambda look, sample, t: states[id(t)])
    data = diagnosis.time(None, sample)
    known, unknown = data["r2"]
    assert known > 0.95 and -0.3 < unknown < 0.1 and data["readers"] == [1, 2]


def test_probe_is_fitted_on_three_quarters_and_scored_on_the_rest():
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
    numbers = range(len(a))
    unit = [[row / math.sqrt(sum(row * row)) for row in features] for features in (a, b)]
    kernel = [[[float(sum(u * w)) for w in rows] for u in rows] for rows in unit]
    near = [[sorted((j for j in numbers if j != i), key=lambda j: -rows[i][j])[:k] for i in numbers] for rows in kernel]

    def similarity(p, q):
        mutual = [[j in near[p][i] and j in near[q][i] for j in numbers] for i in numbers]
        left, right = ([[kernel[r][i][j] * mutual[i][j] for j in numbers] for i in numbers] for r in (p, q))
        trace = sum(left[i][j] * right[j][i] for i in numbers for j in numbers)
        sums = sum(map(sum, left)) * sum(map(sum, right))
        chain = sum(left[i][j] * right[j][l] for i in numbers for j in numbers for l in numbers)
        return trace + sums / ((len(a) - 1) * (len(a) - 2)) - 2 * chain / (len(a) - 2)

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
    """Where the states after block 1 at t = 0.7 are the encoder's tokens, CKNNA is 1 and the accuracy the encoder's."""
    model = small_model(torch.float32)
    sample, encoder = sample_of(model, images, 80, 40), FrozenEncoder(str(encoder_folder), 4)
    tokens = encoder(images.__getitems__(sample.items)["images"]).mean(1).double().numpy()
    noise = np.random.default_rng(0).normal(size=tokens.shape)
    states = {0.2: np.stack([noise] * 5), 0.7: np.stack([noise, noise, tokens, noise, noise])}
    monkeypatch.setattr(diagnosis, "pooled_states", lambda look, sample, t: states[t])
    data, other = diagnosis.alignment(Look(model), sample, TIMES, encoder), pytest.approx(cknna(noise, tokens))
    assert data["cknna"] == [[other, other, other], [other, pytest.approx(1), other]]
    assert data["accuracy"][1][1] == data["encoder_accuracy"] > data["accuracy"][1][0] == data["accuracy"][0][1]


# ---- the pictures ----


def lines(figure):
    """{title: {label: values}} of the curves in each panel, without what has no number."""
    panels = {panel.get_title(): panel.lines for panel in figure.axes if panel.lines}
    return {title: {line.get_label(): kept(line.get_ydata()) for line in rows} for title, rows in panels.items()}


def kept(values):
    return [value for value in values if not math.isnan(value)]


def test_picture_of_routing_puts_each_weight_at_its_source():
    """Readers of four sublayers in chunks of two; columns that a reader does not see stay empty."""
    sources, times, rng = [[0], [0, 1], [0, 2], [0, 2, 3], [0, 2, 4]], [0.2, 0.7], np.random.default_rng(0)
    weights = [[rng.dirichlet(np.ones(len(read))).tolist() for read in sources] for _ in times]
    shares, largest = rng.random((2, 2, 5)).tolist()
    data = {"sources": sources, "times": times, "weights": weights, "largest": largest}
    figure = drawing.routing({**data, "entropy_share": [[None, *row[1:]] for row in shares]})
    maps = [panel for panel in figure.axes if panel.images]
    assert [panel.get_title() for panel in maps] == ["t = 0.2", "t = 0.7"]
    for panel, rows in zip(maps, weights):
        expected = np.full((5, 5), np.nan)
        for reader, (read, values) in enumerate(zip(sources, rows)):
            expected[reader, read] = values
        np.testing.assert_array_equal(np.ma.filled(panel.images[0].get_array(), np.nan), expected)
    expected = {
        f"reader {l}": {f"v{i}": [rows[l - 1][n] for rows in weights] for n, i in enumerate(sources[l - 1])}
        for l in (1, 3, 5)
    }
    expected["entropy / log n"] = {f"t = {t:g}": row[1:] for t, row in zip(times, shares)}
    expected["largest weight"] = {f"t = {t:g}": row for t, row in zip(times, largest)}
    assert lines(figure) == expected


def test_pictures_of_curves_show_their_own_numbers():
    names = {"rms": "RMS of the state", "gradient_rms": "RMS of the loss gradient", "cknna": "CKNNA, k = 10"}
    names |= {"cosine": "cosine with the next state", "accuracy": "accuracy of a linear probe"}
    rows = dict(zip(names, np.random.default_rng(0).random((5, 2, 3)).tolist()))
    rows["cosine"] = [row[:2] for row in rows["cosine"]]
    data = {**rows, "times": [0.2, 0.7], "blocks": [0, 1, 2], "neighbours": 10, "encoder_accuracy": 0.55}
    drawn = lines(drawing.states(data)) | lines(drawing.alignment(data))
    assert drawn[names["accuracy"]].pop("encoder") == [0.55, 0.55]
    assert drawn == {title: dict(zip(("t = 0.2", "t = 0.7"), rows[name])) for name, title in names.items()}
    scales = [panel.get_yscale() for panel in drawing.states({**data, "gradient_rms": [[0.0] * 3] * 2}).axes]
    assert scales == ["log", "linear", "linear"]  # a logarithmic axis has no place for zeros
    (line,) = drawing.time({"readers": [1, 2, 3], "r2": [0.1, 0.9, 0.4]}).axes[0].lines
    assert line.get_ydata().tolist() == [0.1, 0.9, 0.4]


# ---- the command ----


@pytest.fixture(scope="module")
def checkpoints(digits, encoder_folder, tmp_path_factory):
    """Runs of three steps: {name: last.pt}."""
    folder, paths = tmp_path_factory.mktemp("runs"), {}
    settings = f"--data {digits} --encoder {encoder_folder} {TINY} --max-steps 3 --eval-every 0"
    for name, extra in (("residual", "--alignment none"), ("dar", "--alignment repa --path cosine")):
        train_repa_dar.main(f"{settings} --out {folder / name} --routing {name} {extra}".split())
        paths[name] = str(folder / name / "last.pt")
    return paths


def command(checkpoint, out, *extra):
    diagnosis.main([checkpoint, "--out", str(out), "--times", "0.1", "1", "--num-images", "24", *map(str, extra)])


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text(), parse_constant=pytest.fail)


def test_command_writes_every_figure(checkpoints, digits, encoder_folder, tmp_path, capsys):
    command(checkpoints["dar"], tmp_path / "new" / "a", "--average", "none")
    written = {f"{figure}.{kind}" for figure in FIGURES for kind in ("json", "png")}
    assert {path.name for path in (tmp_path / "new" / "a").iterdir()} == written
    assert str(tmp_path / "new" / "a" / "states.png") in capsys.readouterr().out
    said = {"step": 3, "average": "none", "checkpoint": checkpoints["dar"]}
    settings = {"seed": 0, "num_images": 24, "batch_size": 16, "data": str(digits), "routing": "dar"}
    settings |= {"path": "cosine", "encoder": str(encoder_folder)}
    data = {}
    for figure in FIGURES:
        content = read(tmp_path / "new" / "a", figure)
        assert {"figure": figure, **said}.items() <= content.items() and settings.items() <= content["settings"].items()
        assert {"torch", "python", "command", "gpu"} <= content.keys()
        with Image.open(tmp_path / "new" / "a" / f"{figure}.png") as image:
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 10, "an empty page"
        data[figure] = content["data"]
    assert data["states"]["times"] == data["routing"]["times"] == [0.1, 1]
    assert [len(data["states"][key][0]) for key in ("rms", "gradient_rms", "cosine")] == [3, 3, 2]
    assert len(data["time"]["r2"]) == 5
    assert np.shape(data["alignment"]["cknna"]) == np.shape(data["alignment"]["accuracy"]) == (2, 3)


def test_command_is_deterministic_and_seeded(checkpoints, tmp_path, undrawn):
    """And looks at the average that it is told to; three steps have not moved it far from the initial weights."""
    options = {"a": "--average none", "b": "--average none", "c": "--seed 1 --average none", "d": "--average 0.99"}
    for name, extra in options.items():
        command(checkpoints["dar"], tmp_path / name, *f"--figures states time {extra}".split())
    for figure in ("states", "time"):
        a, b, c, d = (read(tmp_path / name, figure)["data"] for name in options)
        assert a == b != c and a != d
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
        ("--times 0.5 1.5", r"times = \(0.5, 1.5\): give times in \[0, 1\]"),
        ("--num-images 0", "num_images = 0: must be at least 1"),
        ("--num-images 19 --figures time", "figure 'time' needs at least 20 images, not 19"),
        ("--data nowhere", "not a prepared folder"),
    ],
)
def test_command_ends_in_a_clear_error(checkpoints, tmp_path, extra, message):
    with pytest.raises(SystemExit, match="error: .*" + message):
        command(checkpoints["residual"], tmp_path / "out", *extra.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["model: SiT-S/2\nseed: 0\n", None])
def test_what_is_no_checkpoint_is_a_clear_error(tmp_path, content):
    """Other kinds of files are in tests/test_published.py."""
    path = tmp_path / "strange.pt"
    if content:
        path.write_text(content)
    with pytest.raises(SystemExit, match=f"error: .*{path}"):
        command(str(path), tmp_path / "out", "--model", "SiT-S/2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoder, weights", [("", ""), ("other", ""), ("", "b.pt"), ("other", "b.pt")])
def test_weights_of_the_run_are_for_its_own_encoder(
    checkpoints, encoder_folder, tmp_path, monkeypatch, encoder, weights
):
    content, asked = torch.load(checkpoints["dar"], weights_only=False), []
    content["config"]["encoder_weights"] = ["own.pt"]
    torch.save(content, tmp_path / "last.pt")
    monkeypatch.setattr(diagnosis, "FrozenEncoder", lambda name, grid, weights: asked.append((name, grid, weights)))
    with pytest.raises(AttributeError):  # no encoder came
        command(str(tmp_path / "last.pt"), tmp_path, "--encoder", encoder, "--encoder-weights", weights)
    assert asked == [(encoder or str(encoder_folder), 4, weights or ("" if encoder else "own.pt"))]


@pytest.mark.parametrize("missing", ["", "data", "autoencoder", "encoder"])
def test_released_weights_are_told_what_they_do_not_say(
    digits, encoder_folder, tmp_path, monkeypatch, missing, undrawn
):
    """Weights of a model that the table of sizes knows, without any options."""
    tiny = functools.partial(SiT, patch_size=2, hidden_size=16, depth=2, num_heads=2)
    monkeypatch.setitem(sit.SIT_MODELS, "SiT-tiny/2", tiny)
    torch.save({"ema": small_model(torch.float32).state_dict()}, tmp_path / "released.pt")
    given = {"data": digits, "autoencoder": "pixels", "encoder": encoder_folder, "model": "SiT-tiny/2"}
    arguments = [word for key, value in given.items() if key != missing for word in (f"--{key}", value)]
    run = functools.partial(command, str(tmp_path / "released.pt"), tmp_path / "out", *arguments)
    if missing:
        with pytest.raises(SystemExit, match=f"{missing}: .*released.pt does not say it; give --{missing}"):
            run()
    else:
        run("--figures", "time", "alignment")
        assert read(tmp_path / "out", "alignment")["step"] is None
        assert read(tmp_path / "out", "time")["settings"]["path"] == "linear"


@pytest.mark.parametrize("settings", [{"input_size": 16}, {"in_channels": 4}, {"num_classes": 9}], ids=str)
def test_data_that_do_not_fit_the_model_are_refused(images, tmp_path, settings):
    model = small_model(torch.float32, **settings)
    given = "{in_channels} channels of size {input_size} and {num_classes} classes".format_map({**SMALL, **settings})
    with pytest.raises(ValueError, match=f"has 3 channels of size 8 and 10 classes, the model {given}"):
        diagnose(model, images, Pixels(), None, tmp_path / "out", ("states",))


def test_figures_that_cannot_be_drawn_are_left_out_or_refused(images, digits, encoder_folder, tmp_path, undrawn):
    """One class, as from a folder of unsorted photographs: a run on them must not end at its first diagnosis."""
    folder, encoder = tmp_path / "data", FrozenEncoder(str(encoder_folder), 4)
    shutil.copytree(digits, folder)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "class_names": ["all"]}))
    np.save(folder / "labels.npy", np.zeros_like(np.load(folder / "labels.npy")))
    cases = (
        (PreparedImages(folder), encoder, {"num_classes": 1}, "alignment", "images of two classes"),
        (images, None, {}, "alignment", "an encoder"),
        (images, encoder, {"routing": "unet"}, "routing", "long skips"),
    )
    for data, encoder, settings, name, reason in cases:
        look_at = functools.partial(diagnose, small_model(torch.float32, **settings), data, Pixels(), encoder)
        others = [figure for figure in FIGURES if figure != name]
        with pytest.raises(ValueError, match=f"'{name}': .*{reason}.*; choose from {', '.join(others)}"):
            look_at(tmp_path / "out", (name,), (0.5,), 20)
        assert not (tmp_path / "out").exists()
        assert list(look_at(tmp_path / reason, times=(0.5,), num_images=20)) == others

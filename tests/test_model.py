"""SiT (models/) with every routing against a float64 forward pass written from definitions.

The reference works on a plain dictionary of weights and shares no code with the project or timm: patches by cutting
them out, sine-cosine positions, unscaled timesteps, adaLN-Zero sublayers, attention by explicit softmax. What joins
its sublayers is in tests/test_routing.py.

Shapes: B batch, C channels, H = W size, p patch size, T tokens, D width.
"""

import math

import pytest
import torch

from models.sit import SiT
from tests.test_routing import assert_near, attnres_states, dar_states, layer_norm, randomize, unet_states

SMALL = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=24, depth=3, num_heads=3, num_classes=7)
SMALL |= dict(align_depth=(1, 3), align_dims=(5, 6), projector_dim=10)


def build(seed=0, randomized=True, **changes):
    """A small SiT in which no parameter is zero: untouched, its gates and head would hide everything else."""
    torch.manual_seed(seed)
    model = SiT(**{**SMALL, **changes}).eval()
    if randomized:
        randomize(model, seed=seed + 1, scale=0.2)
    return model


def batch(B=3, size=8, channels=3, dtype=torch.float32, seed=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, channels, size, size, generator=generator, dtype=torch.float64).to(dtype)
    t = torch.rand(B, generator=generator, dtype=torch.float64).to(dtype)
    return x, t, torch.randint(0, 8, (B,), generator=generator)  # 7 is the null class


def recorded(model, *inputs):
    """What every sublayer and the head read, as h_1 .. h_{L+1}; the stream; and what the model returns."""
    states, streams = [], []

    def make_stream(tokens, e):
        stream = model.stream(tokens, e)

        def read(shift, scale, original=stream.read):
            x, h = original(shift, scale)
            states.append(h)
            return x, h

        stream.read = read
        streams.append(stream)
        return stream

    result = model(*inputs, make_stream=make_stream)
    return states, streams[0], result


# ---- the independent reference ----


def positions(width, grid):
    """(T, D): for the token in row r and column c, sin and cos of c w_j, then of r w_j, w_j = 10000^(-j / (D/4))."""
    table, quarter = torch.zeros(grid * grid, width, dtype=torch.float64), width // 4
    for r in range(grid):
        for c in range(grid):
            for j in range(quarter):
                w = 10000.0 ** (-j / quarter)
                values = (math.sin(c * w), math.cos(c * w), math.sin(r * w), math.cos(r * w))
                table[r * grid + c, j::quarter] = torch.tensor(values, dtype=torch.float64)
    return table


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def reference(w, x, t, y, settings):
    """Velocity (B, C, H, W), projections, and states h_1 .. h_{L+1}, from named weights `w`, in their precision."""

    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    B, C, H, _ = x.shape
    p, depth, num_heads = settings["patch_size"], settings["depth"], settings["num_heads"]
    grid = H // p
    corners = [(r * p, c * p) for r in range(grid) for c in range(grid)]
    patches = torch.stack([x[:, :, r : r + p, c : c + p].reshape(B, C * p * p) for r, c in corners], 1)
    tokens = patches @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"]
    D = tokens.shape[-1]
    tokens = tokens + positions(D, grid).float()  # in which precision the model keeps them

    angles = t[:, None] * torch.tensor([10000.0 ** (-i / 128) for i in range(128)], dtype=t.dtype)
    e = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = e + w["y_embedder.embedding_table.weight"][y]

    def convolution(name, value):
        """3 x 3, with zeros around the grid; token r * grid + c is in row r and column c."""
        around, kernel = torch.zeros(B, grid + 2, grid + 2, D, dtype=value.dtype), w[f"{name}.weight"]
        around[:, 1:-1, 1:-1] = value.reshape(B, grid, grid, D)
        terms = (around[:, i : i + grid, j : j + grid] @ kernel[:, :, i, j].T for i in range(3) for j in range(3))
        return w[f"{name}.bias"] + sum(terms).flatten(1, 2)

    def six(block):
        """shift, scale, gate of the attention, then of the MLP, each (B, 1, D)."""
        return linear(f"blocks.{block}.adaLN_modulation.1", silu(c)).reshape(B, 6, 1, D).unbind(1)

    def attention(block, h):
        name, width, heads = f"blocks.{block}.attn", D // num_heads, []
        shift, scale, gate = six(block)[:3]
        qkv = linear(f"{name}.qkv", layer_norm(h) * (1 + scale) + shift)
        for n in range(num_heads):
            q, k, v = (qkv[..., part * D + n * width : part * D + (n + 1) * width] for part in range(3))
            if settings.get("qk_norm"):  # timm's, one head at a time
                q = layer_norm(q, 1e-5) * w[f"{name}.q_norm.weight"] + w[f"{name}.q_norm.bias"]
                k = layer_norm(k, 1e-5) * w[f"{name}.k_norm.weight"] + w[f"{name}.k_norm.bias"]
            scores = torch.exp(q @ k.transpose(1, 2) / math.sqrt(width))
            heads.append(scores / scores.sum(-1, keepdim=True) @ v)
        return gate * linear(f"{name}.proj", torch.cat(heads, -1))

    def feed_forward(block, h):
        shift, scale, gate = six(block)[3:]
        hidden = gelu_tanh(linear(f"blocks.{block}.mlp.fc1", layer_norm(h) * (1 + scale) + shift))
        return gate * linear(f"blocks.{block}.mlp.fc2", hidden)

    def of_aggregator(l, name):
        return w[f"router.aggregators.{l - 1}.{name}"]

    def of_skip(name):
        return lambda block: w[f"skips.{block - (depth - depth // 2) - 1}.{name}"]

    sublayers = [lambda h, f=f, b=b: f(b, h) for b in range(depth) for f in (attention, feed_forward)]
    routing, S = settings.get("routing", "residual"), settings.get("chunk_size")
    if routing == "residual":
        states = [tokens]
        for f in sublayers:
            states.append(states[-1] + f(states[-1]))
    elif routing == "dar":
        kind, final = settings["query"], settings["final_aggregator"]
        summary = settings.get("chunk_summary", "last")
        states = dar_states(tokens, e, sublayers, S, kind, final, of_aggregator, summary)
    elif routing == "attnres":
        states = attnres_states(tokens, sublayers, S, of_aggregator)
    else:
        states = unet_states(tokens, sublayers, of_skip("weight"), of_skip("bias"))

    aligned, depths = [], settings["align_depth"]
    for k in [depths] if isinstance(depths, int) else sorted(depths):
        for _ in settings["align_dims"]:
            name = f"projectors.{len(aligned)}"
            z = states[2 * k]  # follows block k
            if settings.get("projector") == "conv":
                aligned.append(convolution(name, z))
            else:
                aligned.append(linear(f"{name}.4", silu(linear(f"{name}.2", silu(linear(f"{name}.0", z))))))

    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c)).reshape(B, 2, 1, D).unbind(1)
    out = linear("final_layer.linear", layer_norm(states[-1]) * (1 + scale) + shift)
    channels = out.shape[-1] // (p * p)
    image = torch.zeros(B, channels, H, H, dtype=out.dtype)
    for token, (r, c) in enumerate(corners):
        image[:, :, r : r + p, c : c + p] = out[:, token].reshape(B, p, p, channels).permute(0, 3, 1, 2)
    return image, aligned, states


# ---- the forward pass ----

RESIDUAL = [
    dict(),
    dict(patch_size=4, num_heads=2, depth=2, align_depth=(2,)),
    dict(patch_size=1, in_channels=1, input_size=3, hidden_size=12, num_heads=1, depth=1, align_depth=1),
    dict(mlp_ratio=2.5, align_depth=[3, 1, 2], align_dims=[4]),  # in any order; results are by depth
    dict(align_depth=(), align_dims=(), qk_norm=True),
    dict(projector="conv", input_size=10),
    dict(projector="conv", patch_size=3, input_size=9, depth=1, align_depth=(1,), align_dims=(7,)),
    dict(projector="conv", patch_size=8, depth=1, align_depth=(1,)),  # a single token
]
DAR = [
    dict(routing="dar", query=query, final_aggregator=final, depth=depth, chunk_size=S, align_depth=depth)
    for query in ("static", "timestep", "dynamic")
    for final, depth, S in (
        ("dedicated", 3, 4),
        ("dedicated", 1, 1),
        ("shared", 3, 2),
        ("shared", 4, 3),
        ("shared", 3, 6),
    )
]
DAR += [dict(routing="dar", query="static", final_aggregator="shared", chunk_size=4, projector="conv")]
DAR += [
    dict(routing="dar", query=query, final_aggregator=final, chunk_size=S, chunk_summary="sum", align_depth=(1, 2, 3))
    for query, final, S in (("timestep", "shared", 4), ("dynamic", "dedicated", 2), ("dynamic", "shared", 3))
]
ATTNRES = [
    dict(routing="attnres", depth=depth, chunk_size=S, align_depth=tuple(range(1, depth + 1)))
    for depth, S in ((1, 1), (1, 2), (3, 1), (3, 2), (3, 3), (3, 4), (3, 5), (3, 6), (4, 3))
]
UNET = [dict(routing="unet", depth=depth, align_depth=tuple(range(1, depth + 1))) for depth in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize("changes", RESIDUAL + DAR + ATTNRES + UNET, ids=str)
def test_forward_and_gradients_equal_the_definition(changes):
    """And projections are those of z_k, which the next block, or the head, receives: entry 2 k of the states."""
    model, settings = build(**changes).double(), {**SMALL, **changes}
    inputs = batch(size=settings["input_size"], channels=settings["in_channels"], dtype=torch.float64)
    states, _, (velocity, aligned) = recorded(model, *inputs)
    w = {name: value.detach().double().clone().requires_grad_() for name, value in model.state_dict().items()}
    grid = settings["input_size"] // settings["patch_size"]
    pos_embed = positions(settings["hidden_size"], grid)
    torch.testing.assert_close(w.pop("pos_embed")[0], pos_embed, atol=1e-7, rtol=0)
    velocity_expected, aligned_expected, states_expected = reference(w, *inputs, settings)
    assert velocity_expected.std() > 0.1
    names = ["velocity", *(f"aligned[{i}]" for i in range(len(aligned))), *(f"h_{i + 1}" for i in range(len(states)))]
    actual, expected = (velocity, *aligned, *states), (velocity_expected, *aligned_expected, *states_expected)
    assert len(aligned) == len(model.projectors) and len(states) == 2 * len(model.blocks) + 1
    for name, one, other in zip(names, actual, expected, strict=True):
        assert_near(one, other, name, 1e-9)

    torch.manual_seed(9)
    cotangents = [torch.randn_like(output) for output in (velocity, *aligned)]
    sum((output * u).sum() for output, u in zip(actual, cotangents)).backward()
    sum((output * u).sum() for output, u in zip(expected, cotangents)).backward()
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            assert not parameter.requires_grad
        elif name.startswith("router.aggregators.0."):
            assert not parameter.grad.any(), name  # one source; the reference has rounding there
        elif name.endswith("k_norm.bias"):
            assert parameter.grad.abs().max() < 1e-12, name  # a softmax does not see what all keys share
        else:
            assert w[name].grad.any(), name
            assert_near(parameter.grad, w[name].grad, f"gradient of {name}", 1e-9)


@pytest.mark.parametrize("routing", ["residual", "dar", "attnres", "unet"])
def test_single_and_double_precision_agree(routing):
    """The float32 model is not merely close by construction: its own float64 twin bounds its error."""
    model = build(routing=routing)
    with torch.no_grad():
        single, double = model(*batch())[0], model.double()(*batch(dtype=torch.float64))[0]
    assert_near(single.double(), double, "velocity", 1e-4)


def test_initial_weights_are_those_of_dit():
    model = build(randomized=False, hidden_size=96, num_classes=200)
    weights = dict(model.named_parameters())
    zero = {name for name, value in weights.items() if not value.any()}
    of_zeros = [*(f"blocks.{i}.adaLN_modulation.1" for i in range(3)), "final_layer.linear"]
    of_zeros = {f"{name}.weight" for name in (*of_zeros, "final_layer.adaLN_modulation.1")}
    assert zero == of_zeros | {name for name in weights if name.endswith("bias")}
    for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
        assert weights[name].std().item() == pytest.approx(0.02, rel=0.05), name
    for name in ("x_embedder.proj", "blocks.0.attn.qkv", "blocks.2.mlp.fc1", "projectors.0.0"):
        matrix = weights[f"{name}.weight"].flatten(1)  # Xavier-uniform, also for the convolution
        bound = math.sqrt(6 / sum(matrix.shape))
        assert 0.95 * bound < matrix.abs().max() <= bound, name
    velocity, _ = model(*batch())
    assert torch.equal(velocity, torch.zeros_like(velocity))


# ---- labels ----


@pytest.mark.parametrize("num_classes", [7, 10])
def test_label_draw_decides_which_labels_training_makes_the_null_class(num_classes):
    model = build(num_classes=num_classes, class_dropout_prob=0.3)
    assert model.num_classes == num_classes
    assert model.y_embedder.embedding_table.weight.shape[0] == num_classes + 1
    x, t, _ = batch(4)
    y, draw = torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 0.2999, 0.3001, 0.99])
    with torch.no_grad():
        expected = model(x, t, torch.tensor([num_classes, num_classes, 2, 3]))[0]
        labelled = model(x, t, y)[0]
        assert not torch.allclose(expected[:2], labelled[:2], atol=1e-2)  # the null class shows
        assert torch.equal(model(x, t, y, label_draw=torch.zeros(4))[0], labelled)  # eval drops none
        model.train()
        assert torch.equal(model(x, t, y, label_draw=draw)[0], expected)
    assert y.tolist() == [0, 1, 2, 3]  # the caller's labels are left alone


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_training_drops_a_fraction_p_of_the_labels(p):
    model, n = build(class_dropout_prob=p), 20_000
    labels = torch.arange(n) % 7
    with torch.no_grad():  # the embedding then spells out its label
        model.y_embedder.embedding_table.weight.copy_(torch.arange(8.0)[:, None].expand(8, 24))
        torch.manual_seed(0)
        used = model.train().y_embedder(labels)[:, 0].long()
        kept = model.eval().y_embedder(labels)[:, 0].long()
    assert torch.equal(kept, labels)
    dropped = used == 7
    assert torch.equal(used[~dropped], labels[~dropped])
    assert dropped.float().mean().item() == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))


# ---- one start for every arm ----


def test_one_seed_gives_every_arm_the_same_backbone_and_projectors():
    """But for the timestep embedder of DAR with timestep queries, whose last layer starts at zero."""
    queries = [("dar", query) for query in ("static", "timestep", "dynamic")]
    for dims in ((), (5, 6)):
        baseline = build(align_dims=dims, randomized=False).state_dict()
        for routing, query in (*queries, ("attnres", "timestep"), ("unet", "timestep")):
            state = build(routing=routing, query=query, align_dims=dims, randomized=False).state_dict()
            extra = {name.split(".")[0] for name in state.keys() - baseline.keys()}
            assert extra == {"skips" if routing == "unet" else "router"}
            for name, value in baseline.items():
                if (routing, query) == ("dar", "timestep") and name.startswith("t_embedder.mlp.2"):
                    assert not state[name].any(), name
                else:
                    assert torch.equal(state[name], value), (routing, query, dims, name)
    convolved = build(projector="conv", randomized=False).state_dict()
    shared = {name for name in baseline if not name.startswith("projectors.")}
    assert all(torch.equal(convolved[name], baseline[name]) for name in shared)
    own = {f"projectors.{i}.{part}" for i in range(4) for part in ("weight", "bias")}
    assert convolved.keys() - shared == own
    other = build(seed=1, randomized=False).state_dict()
    assert not torch.equal(other["blocks.0.attn.qkv.weight"], baseline["blocks.0.attn.qkv.weight"])


# ---- constructor ----


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(input_size=9), "input_size = 9 .*patch_size = 2"),
        (dict(hidden_size=26, num_heads=2), "hidden_size = 26"),
        (dict(hidden_size=24, num_heads=5), "hidden_size = 24 .*num_heads = 5"),
        (dict(routing="dense"), "'dense'"),
        (dict(projector="linear"), "projector 'linear' .* mlp, conv"),
        (dict(class_dropout_prob=1.0), "class_dropout_prob = 1.0"),
        (dict(align_depth=4), r"\(4,\) .*depth = 3"),
        (dict(align_depth=(1, 1)), r"\(1, 1\)"),
        (dict(align_depth=()), r"\(5, 6\)"),
        (dict(routing="dar", chunk_size=7), "chunk_size = 7 .* 6 sublayers"),
    ],
)
def test_constructor_refuses_bad_values_by_name(change, message):
    SiT(**SMALL)
    with pytest.raises(ValueError, match=message):
        SiT(**{**SMALL, **change})

"""SiT (models.sit) against a float64 forward pass written from definitions, and the handling of published weights.

The reference at the top works on a plain dictionary of weights and shares no code with the project or timm: patches by
unfolding, sine-cosine positions, unscaled timesteps, adaLN-Zero sublayers, attention by explicit softmax. With
routing="dar" its sublayers are joined by the reference of tests/test_routing.py.

Shapes: B batch, C channels, H = W size, p patch size, T tokens, D width.
"""

import argparse
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import kernels
from models.dar import RoutedStream
from models.sit import (
    SIT_MODELS,
    ResidualStream,
    SiT,
    flops_per_image,
    kept_for_backward,
    load_published,
    parameters_by_part,
)
from runtime import load_file, load_weights
from tests.test_routing import chain, randomize

SMALL = dict(
    input_size=8,
    patch_size=2,
    in_channels=3,
    hidden_size=24,
    depth=3,
    num_heads=3,
    num_classes=7,
    align_depth=(1, 3),
    align_dims=(5, 6),
    projector_dim=10,
)


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


# ---- the independent reference ----


def positions(width, grid):
    """(T, D): for the token in row r and column c, sin and cos of c w_j, then of r w_j, w_j = 10000^(-j / (D/4))."""
    table = torch.zeros(grid * grid, width, dtype=torch.float64)
    quarter = width // 4
    for r in range(grid):
        for c in range(grid):
            for j in range(quarter):
                w = 10000.0 ** (-j / quarter)
                table[r * grid + c, [j, quarter + j, 2 * quarter + j, 3 * quarter + j]] = torch.tensor(
                    [math.sin(c * w), math.cos(c * w), math.sin(r * w), math.cos(r * w)], dtype=torch.float64
                )
    return table


def layer_norm(x):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def reference(
    w,
    x,
    t,
    y,
    *,
    patch_size,
    num_heads,
    depth,
    align_depth=(),
    num_encoders=0,
    routing="residual",
    query=None,
    chunk_size=None,
    final=None,
    **_,
):
    """Velocity (B, C, H, W) and projections, from named weights `w`, in their precision."""

    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    B, C, H, _ = x.shape
    p, grid = patch_size, H // patch_size
    patches = [
        x[:, :, r * p : (r + 1) * p, c * p : (c + 1) * p].reshape(B, C * p * p)
        for r in range(grid)
        for c in range(grid)
    ]
    kernel = w["x_embedder.proj.weight"]
    tokens = torch.stack(patches, 1) @ kernel.reshape(len(kernel), -1).T + w["x_embedder.proj.bias"]
    D = tokens.shape[-1]
    tokens = tokens + positions(D, grid)

    angles = t[:, None] * torch.tensor([10000.0 ** (-i / 128) for i in range(128)], dtype=t.dtype)
    e = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = e + w["y_embedder.embedding_table.weight"][y]

    def convolution(name, value):
        """3 x 3, with zeros around the grid; token r * grid + c is in row r and column c."""
        kernel, rows = w[f"{name}.weight"], []
        for r in range(grid):
            for c in range(grid):
                row = w[f"{name}.bias"].expand(B, -1)
                for i in (-1, 0, 1):
                    for j in (-1, 0, 1):
                        if 0 <= r + i < grid and 0 <= c + j < grid:
                            row = row + value[:, (r + i) * grid + c + j] @ kernel[:, :, 1 + i, 1 + j].T
                rows.append(row)
        return torch.stack(rows, 1)

    def six(block):
        """shift, scale, gate of the attention, then of the MLP, each (B, 1, D)."""
        return linear(f"blocks.{block}.adaLN_modulation.1", silu(c)).reshape(B, 6, 1, D).unbind(1)

    def attention(block, h):
        shift, scale, gate = six(block)[:3]
        qkv = linear(f"blocks.{block}.attn.qkv", layer_norm(h) * (1 + scale) + shift)
        heads, width = [], D // num_heads
        for n in range(num_heads):
            q, k, v = (qkv[..., part * D + n * width : part * D + (n + 1) * width] for part in range(3))
            scores = torch.exp(q @ k.transpose(1, 2) / math.sqrt(width))
            heads.append(scores / scores.sum(-1, keepdim=True) @ v)
        return gate * linear(f"blocks.{block}.attn.proj", torch.cat(heads, -1))

    def feed_forward(block, h):
        shift, scale, gate = six(block)[3:]
        hidden = gelu_tanh(linear(f"blocks.{block}.mlp.fc1", layer_norm(h) * (1 + scale) + shift))
        return gate * linear(f"blocks.{block}.mlp.fc2", hidden)

    sublayers = [lambda h, f=f, b=b: f(b, h) for b in range(depth) for f in (attention, feed_forward)]
    if routing == "residual":
        states = [tokens]
        for f in sublayers:
            states.append(states[-1] + f(states[-1]))
    else:
        states, _ = chain(
            tokens, e, sublayers, chunk_size, query, final, lambda l, name: w[f"router.aggregators.{l - 1}.{name}"]
        )

    aligned = []
    for k in align_depth:
        for _ in range(num_encoders):
            name = f"projectors.{len(aligned)}"
            if f"{name}.weight" in w:
                aligned.append(convolution(name, states[2 * k]))
                continue
            hidden = silu(linear(f"{name}.2", silu(linear(f"{name}.0", states[2 * k]))))
            aligned.append(linear(f"{name}.4", hidden))  # states[2k] follows block k

    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c)).reshape(B, 2, 1, D).unbind(1)
    out = linear("final_layer.linear", layer_norm(states[-1]) * (1 + scale) + shift)
    channels = out.shape[-1] // (p * p)
    image = torch.zeros(B, channels, H, H, dtype=out.dtype)
    for token in range(grid * grid):
        r, c_ = token // grid * p, token % grid * p
        image[:, :, r : r + p, c_ : c_ + p] = out[:, token].reshape(B, p, p, channels).permute(0, 3, 1, 2)
    return image, aligned


def weights_of(model):
    """Named weights in float64, as leaves, without the positions: the reference has its own."""
    return {
        name: value.detach().double().clone().requires_grad_()
        for name, value in model.state_dict().items()
        if name != "pos_embed"
    }


def assert_near(actual, expected, what, tolerance=1e-5):
    """The model keeps positions and timestep frequencies in float32 (6e-8), also in double precision."""
    assert actual.shape == expected.shape, what
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * size, f"{what}: error {error:.3g} at size {size:.3g}"


# ---- the forward pass ----

RESIDUAL = [
    dict(),
    dict(patch_size=4, num_heads=2, depth=2, align_depth=(2,)),
    dict(patch_size=1, in_channels=1, input_size=3, hidden_size=12, num_heads=1, depth=1, align_depth=1),
    dict(mlp_ratio=2.5, align_depth=[3, 1, 2], align_dims=[4]),  # in any order; results are by depth
    dict(align_depth=(), align_dims=()),
    dict(projector="conv", input_size=10),
    dict(projector="conv", patch_size=3, input_size=9, depth=1, align_depth=(1,), align_dims=(7,)),
    dict(projector="conv", patch_size=8, depth=1, align_depth=(1,)),  # a single token
]
DAR = [
    dict(routing="dar", query=query, final_aggregator=final, chunk_size=S)
    for query in ("static", "timestep", "dynamic")
    for final, S in (("dedicated", 4), ("shared", 2), ("shared", 6))
]
DAR += [dict(routing="dar", query="static", final_aggregator="shared", chunk_size=4, projector="conv")]


@pytest.mark.parametrize("changes", RESIDUAL + DAR, ids=str)
def test_forward_and_gradients_equal_the_definition(changes):
    model = build(**changes).double()
    settings = {**SMALL, **changes}
    x, t, y = batch(size=settings["input_size"], channels=settings["in_channels"], dtype=torch.float64)
    velocity, aligned = model(x, t, y)

    depths = settings["align_depth"]
    settings.update(
        align_depth=(depths,) if isinstance(depths, int) else sorted(depths),
        num_encoders=len(settings["align_dims"]),
        final=settings.get("final_aggregator"),
    )
    w = weights_of(model)
    velocity_expected, aligned_expected = reference(w, x, t, y, **settings)
    assert velocity_expected.std() > 0.1
    assert_near(velocity, velocity_expected, "velocity")
    assert len(aligned) == len(aligned_expected) == len(settings["align_depth"]) * len(settings["align_dims"])
    for i, (projected, expected) in enumerate(zip(aligned, aligned_expected)):
        assert_near(projected, expected, f"aligned[{i}]")

    torch.manual_seed(9)
    cotangents = [torch.randn_like(output) for output in (velocity, *aligned)]
    sum((output * u).sum() for output, u in zip((velocity, *aligned), cotangents)).backward()
    sum((output * u).sum() for output, u in zip((velocity_expected, *aligned_expected), cotangents)).backward()
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            assert not parameter.requires_grad
        elif name.startswith("router.aggregators.0."):
            assert not parameter.grad.any(), name  # one source; the reference has rounding there
        else:
            assert_near(parameter.grad, w[name].grad, f"gradient of {name}", tolerance=1e-4)


def test_single_and_double_precision_agree():
    """The float32 model is not merely close by construction: its own float64 twin bounds its error."""
    for changes in (dict(), dict(routing="dar")):
        model = build(**changes)
        with torch.no_grad():
            single = model(*batch())[0]
            double = model.double()(*batch(dtype=torch.float64))[0]
        assert_near(single.double(), double, "velocity", tolerance=1e-4)


def test_timestep_embedding_is_unscaled_cosines_then_sines():
    captured = []
    model = build()
    model.t_embedder.mlp[0].register_forward_pre_hook(lambda m, arguments: captured.append(arguments[0]))
    t = torch.tensor([0.0, 0.25, 1.0])
    model.t_embedder(t)
    frequencies = np.exp(-np.log(10000) * np.arange(128) / 128)
    angles = t.numpy()[:, None] * frequencies
    np.testing.assert_allclose(captured[0].numpy(), np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=1e-6)


def test_positions_put_the_column_first():
    pos = build(randomized=False).pos_embed
    assert pos.shape == (1, 16, 24)
    torch.testing.assert_close(pos[0].double(), positions(24, 4), atol=1e-7, rtol=0)
    assert torch.equal(pos[0, 0, 12:], pos[0, 1, 12:]) and not torch.equal(pos[0, 0, :12], pos[0, 1, :12])


def test_initial_weights_are_those_of_dit():
    model = build(randomized=False, hidden_size=96, num_classes=200)
    weights = dict(model.named_parameters())
    zero = {name for name, value in weights.items() if name.endswith("weight") and not value.any()}
    assert zero == {
        *(f"blocks.{i}.adaLN_modulation.1.weight" for i in range(3)),
        "final_layer.linear.weight",
        "final_layer.adaLN_modulation.1.weight",
    }
    assert all(
        not value.any()
        for name, value in weights.items()
        if name.endswith("bias") and not name.startswith("t_embedder.mlp.0") or name == "t_embedder.mlp.0.bias"
    )
    for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
        assert weights[name].std().item() == pytest.approx(0.02, rel=0.05), name
    for name in (
        "x_embedder.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.2.mlp.fc1.weight",
        "projectors.0.0.weight",
    ):
        matrix = weights[name].flatten(1)  # Xavier-uniform, also for the convolution
        bound = math.sqrt(6 / sum(matrix.shape))
        assert 0.95 * bound < matrix.abs().max() <= bound, name
    velocity, _ = model(*batch())
    assert torch.equal(velocity, torch.zeros_like(velocity))


def test_qk_norm_normalises_queries_and_keys():
    """LayerNorm over each head's width, with its own weights, as timm does where SiT and REPA ask for it."""
    model = build(qk_norm=True)
    names = {name for name in model.state_dict() if name.startswith("blocks.0.attn.")}
    assert {"blocks.0.attn.q_norm.weight", "blocks.0.attn.k_norm.bias"} <= names
    x, t, y = batch()
    with torch.no_grad():
        before = model(x, t, y)[0]
        model.blocks[0].attn.qkv.weight[:24] *= 2  # the queries' scale is normalised away
        model.blocks[0].attn.qkv.bias[:24] *= 2
        assert_near(model(x, t, y)[0], before, "velocity", tolerance=1e-3)


# ---- alignment ----


def states_between_blocks(model, *inputs):
    """The states that each block's attention, and the head, read: the state after block k is entry k."""
    received = []
    with pytest.MonkeyPatch.context() as patch:
        for stream in (ResidualStream, RoutedStream):

            def read(self, shift, scale, original=stream.read):
                x, h = original(self, shift, scale)
                received.append(h)
                return x, h

            patch.setattr(stream, "read", read)
        result = model(*inputs)
    return received[::2], result  # every other one is read by an MLP


@pytest.mark.parametrize("routing, final", [("residual", "auto"), ("dar", "shared"), ("dar", "dedicated")])
@pytest.mark.parametrize("align_depth", [(1,), (2,), (3,), (1, 2, 3)])
def test_aligned_tokens_are_those_that_the_next_block_receives(align_depth, routing, final):
    """z_k is the stream (residual) or the aggregate (DAR) passed on to block k + 1; for k = depth, to the head."""
    model = build(routing=routing, final_aggregator=final, align_depth=align_depth)
    states, (_, aligned) = states_between_blocks(model, *batch())
    assert len(states) == 4 and len(aligned) == len(model.projectors) == 2 * len(align_depth)
    assert len({tuple(state.flatten()[:8].tolist()) for state in states}) == 4  # four different states
    for i, k in enumerate(align_depth):
        for encoder, dim in enumerate((5, 6)):
            index = 2 * i + encoder  # by depth, then by encoder
            assert aligned[index].shape == (3, 16, dim)
            assert torch.equal(aligned[index], model.projectors[index](states[k]))


def test_projectors_change_nothing_else():
    """Without projectors the velocity is the same: alignment only adds a loss."""
    for routing in ("residual", "dar"):
        with_, without = (
            build(routing=routing, final_aggregator="shared", randomized=False, align_dims=dims)
            for dims in ((5, 6), ())
        )
        for model in (with_, without):
            randomize(model, skip=("projectors",), scale=0.2)
        assert without(*batch())[1] == []
        velocity = without(*batch())[0]
        assert velocity.std() > 0.1 and torch.equal(with_(*batch())[0], velocity)


# ---- labels ----


def test_null_class_is_num_classes():
    for num_classes in (7, 10):
        model = build(num_classes=num_classes)
        assert model.num_classes == num_classes
        assert model.y_embedder.embedding_table.weight.shape[0] == num_classes + 1


def test_label_draw_decides_what_training_drops():
    model = build(class_dropout_prob=0.3)
    x, t, _ = batch(4)
    y, draw = torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 0.2999, 0.3001, 0.99])
    with torch.no_grad():
        expected = model(x, t, torch.tensor([7, 7, 2, 3]))[0]
        labelled = model(x, t, y)[0]
        assert not torch.allclose(expected[:2], labelled[:2], atol=1e-2)  # the null class shows
        assert torch.equal(model(x, t, y, label_draw=torch.zeros(4))[0], labelled)  # eval drops none
        model.train()
        assert torch.equal(model(x, t, y, label_draw=draw)[0], expected)
    assert y.tolist() == [0, 1, 2, 3]  # the caller's labels are left alone


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_training_drops_a_fraction_p_of_the_labels(p):
    model = build(class_dropout_prob=p)
    n = 20_000
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


# ---- same start for every arm ----


def test_one_seed_gives_every_arm_the_same_backbone():
    arms = {}
    for routing, query in (
        ("residual", "timestep"),
        ("dar", "static"),
        ("dar", "timestep"),
        ("dar", "dynamic"),
        ("attnres", "timestep"),
        ("unet", "timestep"),
    ):
        for dims in ((), (5, 6)):
            arms[routing, query, dims] = build(routing=routing, query=query, align_dims=dims, randomized=False)
    baseline = arms["residual", "timestep", ()].state_dict()
    for (routing, query, dims), model in arms.items():
        state = model.state_dict()
        extra = {name.split(".")[0] for name in state.keys() - baseline.keys()}
        own = {"residual": set(), "dar": {"router"}, "attnres": {"router"}, "unet": {"skips"}}[routing]
        assert extra == own | ({"projectors"} if dims else set())
        for name, value in baseline.items():
            if name.startswith("t_embedder.mlp.2") and (routing, query) == ("dar", "timestep"):
                assert not state[name].any(), name  # e(t) must start at zero there
            else:
                assert torch.equal(state[name], value), (routing, query, dims, name)
    other = build(seed=1, randomized=False).state_dict()
    assert not torch.equal(other["blocks.0.attn.qkv.weight"], baseline["blocks.0.attn.qkv.weight"])
    for routing in ("dar", "attnres", "unet"):  # alignment starts alike, too
        for name, value in arms["residual", "timestep", (5, 6)].state_dict().items():
            if name.startswith("projectors."):
                assert torch.equal(arms[routing, "timestep", (5, 6)].state_dict()[name], value), (routing, name)
    convolved = build(projector="conv", randomized=False).state_dict()
    assert all(torch.equal(convolved[name], value) for name, value in baseline.items())
    assert convolved.keys() - baseline.keys() == {
        f"projectors.{i}.{part}" for i in range(4) for part in ("weight", "bias")
    }


# ---- published weights ----


def published_shapes(depth, width, patch, channels, tokens, num_classes, hidden, dims):
    """Names and shapes in SiT's and REPA's released files (mlp_ratio 4)."""
    shapes = {
        "pos_embed": (1, tokens, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (num_classes + 1, width),
        "final_layer.linear.weight": (patch * patch * channels, width),
        "final_layer.linear.bias": (patch * patch * channels,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    for i in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3, 1),
            ("attn.proj", 1, 1),
            ("mlp.fc1", 4, 1),
            ("mlp.fc2", 1, 4),
            ("adaLN_modulation.1", 6, 1),
        ):
            shapes[f"blocks.{i}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"blocks.{i}.{name}.bias"] = (rows * width,)
    for i, dim in enumerate(dims):
        for layer, rows, columns in ((0, hidden, width), (2, hidden, hidden), (4, dim, hidden)):
            shapes[f"projectors.{i}.{layer}.weight"] = (rows, columns)
            shapes[f"projectors.{i}.{layer}.bias"] = (rows,)
    return shapes


@pytest.mark.parametrize("name, size", [("SiT-B/2", (12, 768, 2)), ("SiT-XL/2", (28, 1152, 2))])
@pytest.mark.parametrize("dims", [(), (768,), (768, 1024)])
def test_names_and_shapes_are_those_of_published_checkpoints(name, size, dims):
    with torch.device("meta"):
        model = SIT_MODELS[name](align_dims=dims)
    actual = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    depth, width, patch = size
    assert actual == published_shapes(depth, width, patch, 4, 256, 1000, 2048, dims)


SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "Plus": (28, 1216, 16)}


def test_every_named_size_has_patches_of_2_4_and_8():
    assert set(SIT_MODELS) == {f"SiT-{size}/{patch}" for size in SIZES for patch in (2, 4, 8)}


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_named_sizes(size, patch):
    depth, width, heads = SIZES[size]
    with torch.device("meta"):
        model = SIT_MODELS[f"SiT-{size}/{patch}"]()
    assert len(model.blocks) == depth and model.patch_size == patch
    assert all(block.attn.num_heads == heads for block in model.blocks)
    assert model.pos_embed.shape == (1, (32 // patch) ** 2, width)
    assert model.final_layer.linear.out_features == patch * patch * 4
    assert model.blocks[0].mlp.fc1.out_features == 4 * width


def test_named_sizes_can_be_overridden():
    model = SIT_MODELS["SiT-S/8"](
        hidden_size=24,
        depth=2,
        num_heads=3,
        input_size=16,
        in_channels=1,
        num_classes=10,
        align_depth=2,
        align_dims=(5,),
        projector_dim=6,
    )
    x, t, y = batch(2, size=16, channels=1)
    velocity, (aligned,) = model(x, t, y)
    assert velocity.shape == (2, 1, 16, 16) and aligned.shape == (2, 4, 5) and len(model.blocks) == 2


def assert_loaded(target, source):
    loaded = target.state_dict()
    for name, value in source.items():
        assert torch.equal(loaded[name], value), name


def test_our_own_checkpoint_loads(tmp_path):
    for changes in (dict(), dict(routing="dar", query="dynamic")):
        source, raw, target = build(seed=3, **changes), build(seed=4, **changes), build(seed=5, **changes)
        path = tmp_path / "last.pt"
        torch.save(
            {
                "config": {"seed": 0},
                "step": 7,
                "model": raw.state_dict(),
                "ema": source.state_dict(),
                "emas": {"0.999": source.state_dict()},
            },
            path,
        )
        assert load_published(target, load_weights(path)) == ([], [])
        assert_loaded(target, source.state_dict())  # the averaged weights, not the raw ones
        assert torch.equal(target(*batch())[0], source(*batch())[0])


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_bare_state_dicts_and_other_keys_load(tmp_path, key):
    source, target = build(seed=3), build(seed=4)
    torch.save({key: source.state_dict()} if key else source.state_dict(), tmp_path / "w.pt")
    load_published(target, load_weights(tmp_path / "w.pt"))
    assert_loaded(target, source.state_dict())


def test_repa_checkpoint_loads(tmp_path):
    """REPA stores its arguments as a Namespace, its weights under "ema", and "module." before names from DDP."""
    source, raw, target = build(seed=3), build(seed=4), build(seed=5)
    torch.save(
        {
            "model": raw.state_dict(),
            "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
            "steps": 400_000,
            "ema": {f"module.{name}": value for name, value in source.state_dict().items()},
            "args": argparse.Namespace(
                model="SiT-XL/2", cfg_prob=0.1, encoder_depth=8, fused_attn=True, output_dir=None
            ),
        },
        tmp_path / "0400000.pt",
    )
    assert load_published(target, load_weights(tmp_path / "0400000.pt")) == ([], [])
    assert_loaded(target, source.state_dict())


def test_safetensors_load(tmp_path):
    source, target = build(seed=3), build(seed=4)
    save_file({name: value.contiguous() for name, value in source.state_dict().items()}, tmp_path / "w.safetensors")
    assert load_published(target, load_weights(str(tmp_path / "w.safetensors"))) == ([], [])
    assert_loaded(target, source.state_dict())


def test_learn_sigma_checkpoint_keeps_the_velocity_half():
    """Released SiT predicts (velocity, variance), 2C channels per pixel in (p, p, 2C) order; the first C are kept.

    Its time runs from noise to data: x_t = t x + (1 - t) eps with velocity x - eps.
    """
    target = build(seed=3).double()
    source = {**build(seed=4).double().state_dict()}
    torch.manual_seed(0)
    rows = 2 * 2 * 2 * SMALL["in_channels"]
    source["final_layer.linear.weight"] = 0.3 * torch.randn(rows, 24, dtype=torch.float64)
    source["final_layer.linear.bias"] = torch.randn(rows, dtype=torch.float64)
    x, t, y = batch(dtype=torch.float64)
    both, _ = reference(source, x, 1 - t, y, **SMALL)
    assert both.shape == (3, 6, 8, 8)
    before = {name: value.clone() for name, value in source.items()}
    assert load_published(target, source) == ([], [])
    assert_near(target(x, t, y)[0], -both[:, :3], "velocity half")
    assert all(torch.equal(source[name], before[name]) for name in before)  # the caller's weights stay


def test_projectors_of_one_side_only_are_reported_and_left_alone():
    plain, projected = build(seed=3, align_dims=()), build(seed=4)
    names = sorted(name for name in projected.state_dict() if name.startswith("projectors."))
    assert len(names) == 24
    initial = {name: projected.state_dict()[name].clone() for name in names}
    assert load_published(projected, plain.state_dict()) == (names, [])
    assert_loaded(projected, {**plain.state_dict(), **initial})
    assert load_published(plain, build(seed=5).state_dict()) == ([], names)
    assert_loaded(plain, {name: value for name, value in build(seed=5).state_dict().items() if name not in names})


def test_projectors_of_another_kind_are_reported_and_left_alone():
    source, target = build(seed=3).state_dict(), build(seed=4, projector="conv")
    theirs, ours = (
        sorted(name for name in state if name.startswith("projectors.")) for state in (source, target.state_dict())
    )
    initial = {name: target.state_dict()[name].clone() for name in ours}
    assert load_published(target, source) == (ours, theirs)
    assert_loaded(target, {**{name: value for name, value in source.items() if name not in theirs}, **initial})


def drop(*names):
    return lambda state: {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    "change, message",
    [
        (drop("blocks.1.attn.qkv.bias"), "missing blocks.1.attn.qkv.bias"),
        (drop("pos_embed", "x_embedder.proj.weight"), "missing pos_embed; missing x_embedder.proj.weight"),
        (lambda s: {**s, "blocks.3.attn.qkv.bias": torch.zeros(72)}, "unknown blocks.3.attn.qkv.bias"),
        (lambda s: {**s, "pos_embed": torch.zeros(1, 64, 24)}, "pos_embed is (1, 64, 24), the model's is (1, 16, 24)"),
        (
            lambda s: {**s, "y_embedder.embedding_table.weight": torch.zeros(7, 24)},
            "y_embedder.embedding_table.weight is (7, 24), the model's is (8, 24)",
        ),
        (
            lambda s: {**s, "final_layer.linear.bias": torch.zeros(36)},
            "final_layer.linear.bias is (36,), the model's is (12,)",
        ),
        (lambda s: {**s, "projectors.0.4.bias": torch.zeros(9)}, "projectors.0.4.bias is (9,), the model's is (5,)"),
        (lambda s: {}, " more"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_not_loaded(change, message):
    target = build(seed=3)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        load_published(target, change(build(seed=4).state_dict()))
    assert_loaded(target, before)


@pytest.mark.parametrize("dims", [(), (5, 6)], ids=["plain", "projected"])
@pytest.mark.parametrize("query", ["static", "timestep", "dynamic"])
def test_residual_weights_initialise_all_of_a_dar_model_but_its_routers(query, dims):
    source = build(seed=3, align_dims=dims).state_dict()
    target = build(randomized=False, routing="dar", query=query)
    initial = {name: value.clone() for name, value in target.state_dict().items()}
    unloaded = [name for name in initial if name.startswith("router.") or not dims and name.startswith("projectors.")]
    assert load_published(target, source) == (sorted(unloaded), [])
    assert len(unloaded) == 12 + (0 if dims else 24)  # 6 queries and norm weights; 4 projectors
    assert_loaded(target, {**{name: initial[name] for name in unloaded}, **source})
    assert target.t_embedder.mlp[2].weight.any()  # trained, also where DAR had zeroed it


def test_a_router_is_loaded_whole_or_not_at_all():
    routed, plain = build(seed=3, routing="dar").state_dict(), build(seed=3).state_dict()
    for weights, message in (
        (drop("router.aggregators.2.norm_weight")(routed), ": missing router.aggregators.2.norm_weight$"),
        ({**plain, "router.aggregators.2.query": torch.ones(24)}, ": missing router.aggregators.0.*; .* more"),
        ({**plain, "router.aggregators.7.query": torch.ones(24)}, ": missing router.aggregators.0.*; .* more"),
        (drop("pos_embed")(plain), ": missing pos_embed$"),
    ):
        target = build(seed=4, routing="dar")
        with pytest.raises(ValueError, match=message):
            load_published(target, weights)
        assert_loaded(target, build(seed=4, routing="dar").state_dict())
    with pytest.raises(ValueError, match="unknown router.aggregators.0.norm_weight"):
        load_published(build(), routed)


class Touch:
    """Unpickling one creates a file: the mark of code that was executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "plain pickle"])
def test_code_in_a_weights_file_is_refused_and_not_executed(tmp_path, legacy):
    mark = tmp_path / "executed"
    content = {"ema": {"a": torch.zeros(1)}, "args": Touch(mark)}
    if legacy:
        (tmp_path / "evil.pt").write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt.*never executed"):
        load_weights(tmp_path / "evil.pt")
    assert not mark.exists()
    if legacy:
        pickle.loads((tmp_path / "evil.pt").read_bytes())
    else:
        torch.load(tmp_path / "evil.pt", weights_only=False)
    assert mark.exists()  # the file was indeed able to


def test_missing_weights_file_is_named(tmp_path):
    for path in (tmp_path / "nowhere.pt", tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_file(path)


BROKEN = {
    "text.pt": lambda path: path.write_text("not a checkpoint"),
    "empty.pt": lambda path: path.write_bytes(b""),
    "text.safetensors": lambda path: path.write_text("not a checkpoint"),
    "tensor.pt": lambda path: torch.save(torch.zeros(3), path),
    "list.pt": lambda path: torch.save([torch.zeros(3)], path),
    "step.pt": lambda path: torch.save({"step": 3}, path),
    "nothing.pt": lambda path: torch.save({}, path),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_without_weights_are_named(tmp_path, name):
    BROKEN[name](tmp_path / name)
    with pytest.raises(ValueError, match=re.escape(name)):
        load_weights(tmp_path / name)


# ---- constructor ----


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(input_size=9), "input_size = 9 .*patch_size = 2"),
        (dict(hidden_size=26, num_heads=2), "hidden_size = 26"),
        (dict(hidden_size=24, num_heads=5), "hidden_size = 24 .*num_heads = 5"),
        (dict(routing="dense"), "'dense'"),
        (dict(query="constant"), "'constant'"),  # also where residual routing has no use for it
        (dict(final_aggregator="mean"), "'mean'"),
        (dict(projector="linear"), "projector 'linear' .* mlp, conv"),
        (dict(class_dropout_prob=1.0), "class_dropout_prob = 1.0"),
        (dict(class_dropout_prob=-0.1), "class_dropout_prob = -0.1"),
        (dict(align_depth=0), r"\(0,\)"),
        (dict(align_depth=4), r"\(4,\) .*depth = 3"),
        (dict(align_depth=(1, 1)), r"\(1, 1\)"),
        (dict(align_depth=()), r"\(5, 6\)"),
        (dict(routing="dar", query="constant"), "'constant'"),
        (dict(routing="dar", final_aggregator="mean"), "'mean'"),
        (dict(routing="dar", chunk_size=0), "chunk_size = 0"),
        (dict(routing="dar", chunk_size=7), "chunk_size = 7"),
        (dict(routing="attnres", chunk_size=0), "chunk_size = 0"),
        (dict(routing="attnres", chunk_size=7), "chunk_size = 7"),
        (dict(routing="attnres", route_backend="cuda"), "'cuda'"),
    ],
)
def test_constructor_refuses_bad_values_by_name(change, message):
    SiT(**SMALL)
    with pytest.raises(ValueError, match=message):
        SiT(**{**SMALL, **change})


def test_half_precision_keeps_no_more_for_backward_than_float32():
    """Sources are cast once: a cast in each of the aggregators that read them would be kept by autograd."""
    model = SiT(**{**SMALL, "routing": "dar", "depth": 6, "chunk_size": 4, "align_depth": 1})
    inputs = torch.randn(2, model.in_channels, model.input_size, model.input_size), torch.rand(2), torch.zeros(2).long()
    kept = {}
    for half in (False, True):
        stored = {}

        def pack(x):
            stored[x.untyped_storage().data_ptr()] = x
            return x

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            torch.autocast("cpu", torch.bfloat16, enabled=half),
        ):
            model(*inputs)
        kept[half] = sum(x.untyped_storage().nbytes() for x in stored.values())
    assert kept[True] < 1.1 * kept[False]


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "checkpoint"])
@pytest.mark.parametrize("routing", ["dar", "attnres", "unet"])
def test_compiles_without_graph_breaks(routing, recompute):
    """What `compile` relies on: forward and backward are one graph, with the values of the eager ones."""
    torch.manual_seed(0)
    model = SiT(**{**SMALL, "routing": routing, "depth": 2, "align_depth": (1,)}, checkpoint_activations=recompute)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    size, channels = model.input_size, model.in_channels
    labels = torch.randint(0, model.num_classes, (2,))
    inputs = (torch.randn(2, channels, size, size), torch.rand(2), labels, torch.rand(2))
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        velocity, aligned = run(*inputs)
        (velocity.square().mean() + sum(tokens.square().mean() for tokens in aligned)).backward()
        gradients.append([velocity.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(gradients[0]) > 30
    for eager, compiled in zip(*gradients):
        torch.testing.assert_close(compiled, eager)


# ---- activation checkpointing ----

CHECKPOINTED = [
    dict(),
    dict(qk_norm=True, align_dims=()),
    dict(routing="dar", final_aggregator="shared"),
    dict(routing="dar", query="dynamic", final_aggregator="dedicated", align_dims=()),
    dict(routing="attnres", chunk_size=5),
    dict(routing="unet"),
]
TRITON = dict(routing="dar", depth=1, align_depth=1, chunk_size=2, input_size=2, route_backend="triton")  # slow here


def gradients(model, run, inputs):
    """Velocity, projections and the gradients of all parameters, for a loss that reads every output."""
    model.zero_grad()
    velocity, aligned = run(*inputs)
    sum(output.float().square().mean() for output in (velocity, *aligned)).backward()
    return {
        **{f"output {i}": output.detach() for i, output in enumerate((velocity, *aligned))},
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad},
    }


@pytest.mark.parametrize(
    "changes, half", [*((changes, half) for changes in CHECKPOINTED for half in (False, True)), (TRITON, True)], ids=str
)
def test_checkpointing_recomputes_every_sublayer_and_changes_no_bit(changes, half):
    if changes.get("route_backend") == "triton" and kernels.route_triton is None:
        pytest.skip("triton is not installed")
    inputs = (*batch(size=changes.get("input_size", 8)), torch.tensor([0.05, 0.5, 0.9]))
    results, calls = {}, {}
    for recompute in (False, True):
        model = build(checkpoint_activations=recompute, **changes).train()
        calls[recompute] = []
        for block in model.blocks:
            for sublayer in (block.attn, block.mlp):
                sublayer.register_forward_pre_hook(lambda module, _, calls=calls[recompute]: calls.append(module))
        run = torch.autocast("cpu", torch.bfloat16, enabled=half)(model)  # the forward pass only
        results[recompute] = gradients(model, run, inputs)
        # With respect to one tensor alone, which a checkpoint of the reentrant kind would refuse.
        (results[recompute]["alone"],) = torch.autograd.grad(
            run(*inputs)[0].float().sum(), model.x_embedder.proj.weight
        )
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.delattr("models.sit.checkpoint")  # not needed where nothing is kept
            model(*inputs)
    sublayers = 2 * len(model.blocks)
    assert {recompute: len(made) for recompute, made in calls.items()} == {False: 3 * sublayers, True: 5 * sublayers}
    assert results[True].keys() == results[False].keys() and len(results[True]) > 20
    for name, value in results[False].items():
        assert torch.equal(results[True][name], value), name


@pytest.mark.parametrize("routing", ["residual", "dar", "attnres", "unet"])
def test_checkpointing_keeps_nothing_of_the_insides_of_sublayers(routing):
    """What is kept does not know how wide the MLP is, or how many heads the attention has; and it is far less."""
    B, T, D = 3, 16, 24

    def kept(**changes):
        return kept_for_backward(build(routing=routing, align_dims=(), **changes), *batch(B))

    assert kept(mlp_ratio=4.0) - kept(mlp_ratio=2.0) > 3 * 2 * 4 * B * T * D  # blocks, ratio, bytes
    assert kept(num_heads=6) > kept(num_heads=3)
    lean = kept(checkpoint_activations=True)
    assert lean == kept(checkpoint_activations=True, mlp_ratio=2.0) == kept(checkpoint_activations=True, num_heads=6)
    assert lean < 0.5 * kept()
    if routing == "residual":
        # Per sublayer the state, its LayerNorm with mean and deviation, 1 + scale, and what it reads; per block SiLU(c)
        # and the modulation. No output: addition does not need it.
        block = 2 * (3 * T * D + 2 * T + D) + D + 6 * D
        assert kept(checkpoint_activations=True, depth=4) - lean == 4 * B * block


@pytest.mark.parametrize("routing", ["residual", "dar", "attnres", "unet"])
def test_checkpointing_works_in_distributed_data_parallel(routing):
    """Every parameter is ready once per pass, also with accumulation; DDP raises where one is not, or is twice."""
    model = build(checkpoint_activations=True, routing=routing, query="dynamic").train()
    inputs = (*batch(), torch.tensor([0.05, 0.5, 0.9]))
    once = gradients(model, model, inputs)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        for _ in range(2):
            with wrapped.no_sync():
                first = gradients(model, wrapped, inputs)
            velocity, aligned = wrapped(*inputs)
            sum(output.square().mean() for output in (velocity, *aligned)).backward()
            for name, p in model.named_parameters():
                if p.requires_grad:
                    assert torch.equal(first[name], once[name]) and torch.equal(p.grad, 2 * once[name]), name
        # Not after its group: it would then join the group's thread and hold what that thread may be waiting for, the
        # interpreter's lock, for ever.
        del wrapped
    finally:
        distributed.destroy_process_group()


# ---- numbers that describe a model ----


def on_meta(name, **changes):
    with torch.device("meta"):
        return SIT_MODELS[name](**{"align_dims": (), **changes}).to("meta")  # positions come from NumPy


@pytest.mark.parametrize(
    "name, changes, millions",
    [
        ("SiT-S/2", {}, 33),
        ("SiT-B/2", {}, 130),
        ("SiT-L/2", {}, 458),
        ("SiT-XL/2", {}, 675),
        ("SiT-Plus/2", {}, 752),
        ("SiT-XL/2", dict(routing="dar", query="dynamic", chunk_size=4), 751),
        ("SiT-XL/2", dict(routing="dar", query="timestep", chunk_size=4), 675),
    ],
)
def test_parameter_counts_are_the_papers(name, changes, millions):
    parts = parameters_by_part(on_meta(name, **changes))
    assert round(sum(parts.values()) / 1e6) == millions


def test_plus_is_the_width_nearest_to_the_papers_count():
    """Among those that 16 heads share; a deeper XL would be no closer."""
    off = {
        width: abs(sum(parameters_by_part(on_meta("SiT-XL/2", hidden_size=width)).values()) - 752e6)
        for width in (1200, SIZES["Plus"][1], 1232)
    }
    assert min(off, key=off.get) == 1216 and off[1216] < 0.5e6


@pytest.mark.parametrize(
    "query, final, aggregators",
    [(None, None, 0), ("timestep", "shared", 6), ("dynamic", "shared", 6), ("dynamic", "dedicated", 7)],
)
@pytest.mark.parametrize("dims", [(), (5, 6)])
def test_parameters_by_part(query, final, aggregators, dims):
    model = build(align_dims=dims, **(dict(routing="dar", query=query, final_aggregator=final) if query else {}))
    D, heads = (
        24,
        {
            "x_embedder": "embedders",
            "t_embedder": "embedders",
            "y_embedder": "embedders",
            "blocks": "blocks",
            "final_layer": "head",
            "projectors": "projectors",
        },
    )
    expected = {}
    for name, shape in published_shapes(3, D, 2, 3, 16, 7, 10, 2 * dims).items():  # projectors of two depths
        if name != "pos_embed":  # fixed
            part = heads[name.split(".")[0]]
            expected[part] = expected.get(part, 0) + math.prod(shape)
    if aggregators:
        expected["router"] = aggregators * ((D * D if query == "dynamic" else D) + D)
    assert parameters_by_part(model) == expected
    assert sum(expected.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.blocks.requires_grad_(False)
    expected.pop("blocks")
    assert parameters_by_part(model) == expected


def counted_flops(model, inputs):
    """PyTorch's own count. Attention by its definition: the fused one of the CPU has no formula and would count 0."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        *RESIDUAL,
        dict(qk_norm=True),
        dict(input_size=12, hidden_size=40, num_heads=5, depth=2, align_depth=2),
        dict(input_size=16, patch_size=8, projector_dim=33, align_dims=(4,)),
        dict(routing="attnres", chunk_size=2),
        dict(routing="unet"),
        dict(routing="unet", depth=4, align_dims=()),
        dict(routing="unet", depth=1, align_depth=1),
        *[
            dict(routing="dar", query=query, final_aggregator=final, depth=2, align_depth=1)
            for query in ("static", "timestep", "dynamic")
            for final in ("dedicated", "shared")
        ],
    ],
    ids=str,
)
def test_flops_are_those_of_a_forward_pass(changes, B):
    model, settings = build(**changes), {**SMALL, **changes}
    inputs = batch(B, size=settings["input_size"], channels=settings["in_channels"])
    assert B * flops_per_image(model) == counted_flops(model, inputs) > 0


@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_flops_without_the_projectors_that_nothing_runs(projector):
    """As the trainer leaves a model when the alignment ends."""
    model = build(projector=projector)
    before = flops_per_image(model)
    model.align_depth = ()
    assert flops_per_image(model) == counted_flops(model, batch(1)) < before


@pytest.mark.parametrize("name", ["SiT-XL/2", "SiT-Plus/4", "SiT-B/8"])
def test_flops_of_named_models(name):
    model = on_meta(name, align_dims=(768,)).eval()
    inputs = (
        torch.zeros(2, 4, 32, 32, device="meta"),
        torch.zeros(2, device="meta"),
        torch.zeros(2, dtype=torch.long, device="meta"),
    )
    assert 2 * flops_per_image(model) == counted_flops(model, inputs)


def test_flops_are_the_published_ones():
    """DiT-XL/2 has 118.64 G multiply-adds on 32 x 32 x 4 latents; so the other sizes and patches (arXiv 2212.09748)."""
    published = {"XL/2": 118.64, "L/2": 80.71, "B/2": 23.01, "S/2": 6.06, "XL/4": 29.05, "XL/8": 7.39}
    for name, giga in published.items():
        assert flops_per_image(on_meta(f"SiT-{name}")) == pytest.approx(2e9 * giga, rel=0.01), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("B", [1, 7])
def test_kept_for_backward_of_a_known_network(B, device):
    """The input and tanh's output, which two layers need and is one tensor; no weights."""
    with torch.device(device):
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        x = torch.zeros(B, 3)
    assert kept_for_backward(model, x) == 4 * B * (3 + 5)
    with torch.no_grad():
        assert kept_for_backward(model, x) == 0
    if device == "cpu":
        with torch.autocast(device, torch.bfloat16):  # a copy of the second layer's weight as well
            assert kept_for_backward(model, x) == 2 * (B * (3 + 5) + 5 * 2)


def test_kept_for_backward_counts_storages_whole():
    """A product needs its other factor: here a column, which keeps the table that it is a view of."""

    class Column(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, table):
            return self.scale * table[:, 0] + self.scale * table[:, 1]

    assert kept_for_backward(Column(), torch.zeros(6, 10)) == 4 * 6 * 10


@pytest.mark.parametrize("changes", CHECKPOINTED, ids=str)
def test_kept_for_backward_grows_with_the_batch(changes):
    for recompute in (False, True):
        model = build(checkpoint_activations=recompute, **changes)
        two, four, six = (kept_for_backward(model, *batch(B)) for B in (2, 4, 6))
        # Static queries alone know no batch: seven of them, scaled, and their products with the norm weights.
        shared = 2 * 7 * 24 * 4 if changes.get("routing") == "attnres" else 0
        assert four - shared == 2 * (two - shared) and six - shared == 3 * (two - shared) > 0

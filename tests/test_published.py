"""The named models: sizes, parameters and operations as published, and the weights that SiT, REPA and we store.

D width, T tokens, p patch size, C channels.
"""

import argparse
import math
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

import train_repa_dar
from models.cost import flops_per_image, parameters_by_part
from models.sit import SIT_MODELS
from tests.conftest import Harmful
from tests.test_model import SMALL, batch, build, reference
from tests.test_routing import assert_near
from weights import load_file, load_into, load_weights

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "Plus": (28, 1216, 16)}
TABLE = "y_embedder.embedding_table.weight"


def on_meta(name, **changes):
    with torch.device("meta"):
        return SIT_MODELS[name](**{"align_dims": (), **changes})


# ---- sizes and costs ----


def published_shapes(depth, width, patch, channels, tokens, num_classes, hidden, dims):
    """Names and shapes in SiT's and REPA's released files (mlp_ratio 4)."""
    shapes = {
        "pos_embed": (1, tokens, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        TABLE: (num_classes + 1, width),
    }
    linear = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patch * patch * channels, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(depth):
        linear |= {f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width)}
        linear |= {f"blocks.{i}.mlp.fc1": (4 * width, width), f"blocks.{i}.mlp.fc2": (width, 4 * width)}
        linear |= {f"blocks.{i}.adaLN_modulation.1": (6 * width, width)}
    for i, dim in enumerate(dims):
        linear |= {f"projectors.{i}.0": (hidden, width), f"projectors.{i}.2": (hidden, hidden)}
        linear |= {f"projectors.{i}.4": (dim, hidden)}
    for name, (rows, columns) in linear.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_those_of_published_checkpoints(size):
    assert set(SIT_MODELS) == {f"SiT-{name}/{patch}" for name in SIZES for patch in (1, 2, 4, 8)}
    depth, width, heads = SIZES[size]
    for patch, dims in ((2, ()), (4, (768,)), (8, (768, 1024))) if size == "S" else ((2, (768,)),):
        model = on_meta(f"SiT-{size}/{patch}", align_dims=dims)
        actual = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        assert actual == published_shapes(depth, width, patch, 4, (32 // patch) ** 2, 1000, 2048, dims)
        assert all(block.attn.num_heads == heads for block in model.blocks)


def test_parameter_counts_are_the_papers():
    for size, millions in {"S": 33, "B": 130, "L": 458, "XL": 675, "Plus": 752}.items():
        assert round(sum(parameters_by_part(on_meta(f"SiT-{size}/2")).values()) / 1e6) == millions
    for query, millions in {"static": 675, "timestep": 675, "dynamic": 751}.items():
        model = on_meta("SiT-XL/2", routing="dar", query=query)
        parts = parameters_by_part(model)
        assert round(sum(parts.values()) / 1e6) == millions
        assert sum(len(sources) for sources in model.router.plan) == 522 and len(model.router.plan) == 57
        per_query = 1152**2 if query == "dynamic" else 1152
        assert parts["router"] == 57 * (per_query + 1152)  # a query and a norm weight each


@pytest.mark.parametrize(
    "changes, extra",
    [
        ({}, {}),
        (dict(routing="dar", query="timestep", final_aggregator="shared"), {"router": 6 * 2 * 24}),
        (dict(routing="dar", query="dynamic", final_aggregator="dedicated"), {"router": 7 * (24 * 24 + 24)}),
        (dict(routing="attnres"), {"router": 7 * 2 * 24}),
        (dict(routing="unet"), {"skips": 24 * 48 + 24}),
        (dict(routing="unet", depth=1, align_depth=(1,)), {}),
        (dict(routing="unet", depth=5), {"skips": 2 * (24 * 48 + 24)}),  # the middle block has none
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [(), (5, 6)])
def test_parameters_by_part(changes, extra, dims):
    model, expected = build(align_dims=dims, **changes), dict(extra)
    parts = {"blocks": "blocks", "final_layer": "head", "projectors": "projectors"}
    for name, shape in published_shapes(len(model.blocks), 24, 2, 3, 16, 7, 10, len(model.align_depth) * dims).items():
        if name != "pos_embed":  # fixed
            part = parts.get(name.split(".")[0], "embedders")
            expected[part] = expected.get(part, 0) + math.prod(shape)
    assert parameters_by_part(model) == expected
    assert sum(expected.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.blocks.requires_grad_(False)
    assert parameters_by_part(model).keys() == expected.keys() - {"blocks"}


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(align_depth=(), align_dims=()),
        dict(patch_size=4, mlp_ratio=2.5, num_heads=2),
        dict(projector="conv", qk_norm=True),
        dict(routing="attnres", chunk_size=2),
        dict(routing="unet"),
        dict(routing="unet", depth=4, align_dims=()),
        *(dict(routing="dar", query=query, final_aggregator="shared") for query in ("static", "timestep", "dynamic")),
        dict(routing="dar", query="dynamic", final_aggregator="dedicated", chunk_size=1, checkpoint_activations=True),
    ],
    ids=str,
)
def test_flops_are_those_of_all_products(changes):
    """2 m n k for a product of (m, k) with (k, n). Every aggregator makes its dynamic query of all tokens."""
    s = {**SMALL, "mlp_ratio": 4.0, "routing": "residual", **changes}
    D, p, C, depth = s["hidden_size"], s["patch_size"], s["in_channels"], s["depth"]
    T = (s["input_size"] // p) ** 2
    products = [(T, p * p * C, D), (1, 256, D), (1, D, D), (1, D, 2 * D), (T, D, p * p * C)]
    attention, hidden = [(T, D, T), (T, T, D)], int(s["mlp_ratio"] * D)  # attention of all heads together
    products += depth * [(1, D, 6 * D), (T, D, 3 * D), *attention, (T, D, D), (T, D, hidden), (T, hidden, D)]
    for dim in len(s["align_depth"]) * s["align_dims"]:
        P = s["projector_dim"]
        products += [(T, 9 * D, dim)] if s.get("projector") == "conv" else [(T, D, P), (T, P, P), (T, P, dim)]
    if s.get("query") == "dynamic":
        products += (2 * depth + 1) * [(T, D, D)]
    if s["routing"] == "unet":
        products += depth // 2 * [(T, 2 * D, D)]
    expected = sum(2 * m * n * k for m, k, n in products)
    assert flops_per_image("SiT-B/8", s) == expected


def test_flops_are_the_published_ones():
    """DiT-XL/2 has 118.64 G multiply-adds on 32 x 32 x 4 latents; so the other sizes and patches (arXiv 2212.09748)."""
    published = {"XL/2": 118.64, "S/2": 6.06, "XL/8": 7.39}
    for name, giga in published.items():
        assert flops_per_image(f"SiT-{name}", {"align_dims": ()}) == pytest.approx(2e9 * giga, rel=0.01), name


def test_a_dry_run_without_data_says_what_the_named_model_takes(capsys, tmp_path):
    """By DiT's table 33 M parameters, and 6.06 G multiply-adds forward. Kept: weights, two moments, an average."""
    words = f"--config imagenet256_s --model SiT-S/2 --routing residual --alignment none --data {tmp_path / 'none'}"
    train_repa_dar.main([*words.split(), "--dry-run"])
    said = capsys.readouterr().out
    parameters, flops, disk = (
        float(re.search(rf"{name} +([\d.]+) {unit}", said)[1])
        for name, unit in (("parameters", "M"), ("compute", "GFLOP"), ("disk", "GiB"))
    )
    assert (parameters, flops) == (pytest.approx(32.96, rel=0.01), pytest.approx(6 * 6.06, rel=0.01))
    assert disk == pytest.approx(4 * 4e6 * parameters / 2**30, rel=0.01)


# ---- files of weights ----


def assert_loaded(target, source):
    loaded = target.state_dict()
    for name, value in source.items():
        assert torch.equal(loaded[name], value), name


def repa(source, raw):
    """REPA stores its arguments as a Namespace, its weights under "ema", and "module." before names from DDP."""
    arguments = argparse.Namespace(model="SiT-XL/2", cfg_prob=0.1, encoder_depth=8, fused_attn=True, output_dir=None)
    optimiser = {"state": {}, "param_groups": [{"lr": 1e-4}]}
    ema = {f"module.{name}": value for name, value in source.items()}
    return {"model": raw, "opt": optimiser, "steps": 400_000, "ema": ema, "args": arguments}


FILES = {
    "REPA.pt": repa,
    "ours.pt": lambda source, raw: {"step": 7, "model": raw, "ema": source, "emas": {"0.999": source}},
    "bare.pt": lambda source, raw: source,
    "model.pt": lambda source, raw: {"model": source},
    "state_dict.pt": lambda source, raw: {"state_dict": source},
    "bare.safetensors": lambda source, raw: source,
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_weights_load(tmp_path, name):
    """The averaged weights where there are both."""
    source, raw, target = (build(seed=seed, routing="dar", query="dynamic") for seed in (3, 4, 5))
    save = save_file if name.endswith("safetensors") else torch.save
    save(FILES[name](source.state_dict(), raw.state_dict()), tmp_path / name)
    assert load_into(target, load_weights(str(tmp_path / name))[0]) == ([], [])
    assert_loaded(target, source.state_dict())
    assert torch.equal(target(*batch())[0], source(*batch())[0])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "plain pickle"])
def test_code_in_a_weights_file_is_refused_and_not_executed(tmp_path, legacy):
    mark, path = tmp_path / "executed", tmp_path / "evil.pt"
    content = {"ema": {"a": torch.zeros(1)}, "args": Harmful(mark)}
    path.write_bytes(pickle.dumps(content, protocol=2)) if legacy else torch.save(content, path)
    with pytest.raises(ValueError, match=r"evil\.pt.*never executed"):
        load_weights(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes()) if legacy else torch.load(path, weights_only=False)
    assert mark.exists()  # the file was indeed able to


BROKEN = {
    "text.pt": lambda path: path.write_text("not a checkpoint"),
    "text.safetensors": lambda path: path.write_text("not a checkpoint"),
    "tensor.pt": lambda path: torch.save(torch.zeros(3), path),
    "nowhere.pt": lambda path: None,
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_without_weights_are_named(tmp_path, name):
    BROKEN[name](tmp_path / name)
    with pytest.raises(ValueError, match=re.escape(name)):
        load_weights(tmp_path / name)
    if not (tmp_path / name).is_file():
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
            load_file(tmp_path / name)


# ---- weights of another kind of model ----


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
    both, _, _ = reference(source, x, 1 - t, y, SMALL)
    assert both.shape == (3, 6, 8, 8)
    before = {name: value.clone() for name, value in source.items()}
    assert load_into(target, source) == ([], [])
    assert_near(target(x, t, y)[0], -both[:, :3], "velocity half", 1e-9)
    assert source.keys() == before.keys()
    assert all(torch.equal(source[name], before[name]) for name in before)  # the caller's weights stay


@pytest.mark.parametrize(
    "theirs, ours, unloaded, unused",
    [
        (dict(align_dims=()), dict(), ("projectors.",), ()),
        (dict(), dict(projector="conv"), ("projectors.",), ("projectors.",)),
        (dict(), dict(routing="dar", query="timestep"), ("router.",), ()),
        (dict(align_dims=()), dict(routing="dar", query="dynamic"), ("router.", "projectors."), ()),
        (dict(routing="dar", align_dims=(), final_aggregator="shared"), dict(routing="dar"), ("projectors.",), ()),
        (dict(routing="unet"), dict(routing="unet"), (), ()),
    ],
    ids=str,
)
def test_parts_of_one_side_only_are_reported_and_left_alone(theirs, ours, unloaded, unused):
    source, target = build(seed=3, **theirs).state_dict(), build(randomized=False, **ours)
    initial = {name: value.clone() for name, value in target.state_dict().items()}
    kept = {name: value for name, value in initial.items() if name.startswith(tuple(unloaded))}
    dropped = {name for name in source if name.startswith(tuple(unused))}
    assert load_into(target, source) == (sorted(kept), sorted(dropped))
    assert bool(kept) == bool(unloaded) and bool(dropped) == bool(unused)
    assert_loaded(target, {**{name: value for name, value in source.items() if name not in dropped}, **kept})
    assert target.t_embedder.mlp[2].weight.any()  # trained, also where DAR had zeroed it


def test_new_labels_start_the_label_table_anew_but_for_the_null_class():
    source = build(seed=3).state_dict()
    for num_classes in (4, 7):  # on request alone where the number of classes is the same
        target = build(seed=4, num_classes=num_classes, routing="dar")
        initial = target.state_dict()[TABLE].clone()
        if num_classes != 7:
            with pytest.raises(ValueError, match=r"\(8, 24\), the model's is \(5, 24\); --new-labels starts"):
                load_into(target, source)
            assert torch.equal(target.state_dict()[TABLE], initial)
        load_into(target, source, new_labels=True)
        null_class = source[TABLE][7:]
        assert_loaded(target, {**source, TABLE: torch.cat([initial[:num_classes], null_class])})
    with pytest.raises(ValueError, match=r"embedding_table.weight is \(8, 12\)"):  # of another width
        load_into(target, {**source, TABLE: torch.zeros(8, 12)}, new_labels=True)


def drop(*names):
    return lambda state: {name: value for name, value in state.items() if name not in names}


def put(name, *shape):
    return lambda state: {**state, name: torch.zeros(shape)}


PLAIN, ROUTED, SKIPS = dict(), dict(routing="dar"), dict(routing="unet", depth=5)


@pytest.mark.parametrize(
    "theirs, ours, change, message",
    [
        (PLAIN, PLAIN, drop("blocks.1.attn.qkv.bias"), r": missing blocks.1.attn.qkv.bias$"),
        (PLAIN, PLAIN, put("blocks.3.attn.qkv.bias", 72), r": unknown blocks.3.attn.qkv.bias$"),
        (PLAIN, PLAIN, put(TABLE, 7, 24), rf": {TABLE} is \(7, 24\), the model's is \(8, 24\); --new-labels "),
        (PLAIN, PLAIN, put("final_layer.linear.bias", 36), r"linear.bias is \(36,\), the model's is \(12,\)$"),
        (PLAIN, PLAIN, lambda state: {}, " more"),
        (PLAIN, ROUTED, put("router.aggregators.2.query", 24), ": missing router.aggregators.0.*; .* more"),
        (ROUTED, PLAIN, drop(), "unknown router.aggregators.0.norm_weight"),
        (dict(routing="unet"), dict(routing="attnres"), drop(), "missing router.aggregators.0.*; .* more"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_not_loaded(theirs, ours, change, message):
    target = build(seed=3, **ours)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_into(target, change(build(seed=4, **theirs).state_dict()))
    assert_loaded(target, before)

"""Frozen encoders against the own forward pass of timm and transformers, with the preprocessing written out here.

The encoders are their architectures with random weights, since the weights' values do not matter here.
"""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import models  # noqa: F401  (before timm: see its docstring)
import timm
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf

from models.encoders import SHORT_NAMES, FrozenEncoder
from tests.conftest import save_tiny_encoder

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def photos(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def bicubic(images, size, a=-0.75):
    """Bicubic interpolation by its definition: pixel centres aligned, edges repeated, no smoothing when shrinking.

    a: the kernel's free parameter; PyTorch's, and hence REPA's, is -0.75.
    """

    def kernel(d):
        d = abs(d)
        if d < 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    before = images.shape[-1]
    matrix = torch.zeros(size, before, dtype=torch.float64)
    for i in range(size):
        center = (i + 0.5) * before / size - 0.5
        for j in range(math.floor(center) - 1, math.floor(center) + 3):
            matrix[i, min(max(j, 0), before - 1)] += kernel(center - j)
    return matrix @ images.double() @ matrix.T


def preprocessed(images, mean, std, size):
    """uint8 (B, 3, H, W) -> float32 (B, 3, size, size) as in REPA: scaled, normalised, then resized."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
    return bicubic((images.double() / 255 - mean) / std, size).float()


def save_encoder(folder, architecture="vit_tiny_patch16_224", seed=0, mean=None, std=None, **arguments):
    """Any timm architecture with random weights, in the folder format that `--encoder` takes. Returns the model."""
    torch.manual_seed(seed)
    model = timm.create_model(architecture, num_classes=0, **arguments).eval()
    if mean:
        model.pretrained_cfg = {**model.pretrained_cfg, "mean": mean, "std": std}
    for parameter in model.parameters():  # so that no part is idle as timm starts it
        torch.nn.init.normal_(parameter, std=0.2)
    save_for_hf(model, str(folder), model_args=dict(num_classes=0, **arguments), safe_serialization=True)
    return model


SMALL = dict(embed_dim=24, depth=2, num_heads=2)
REGISTERS = dict(patch_size=7, img_size=28, reg_tokens=2, **SMALL)  # a class token and two registers


# ---- tokens ----


@pytest.mark.parametrize("size", [28, 32, 20])  # as it is, shrunk, enlarged
def test_tokens_are_timms_without_prefix(tmp_path, size):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)  # the folder's own, found in no default
    model = save_encoder(tmp_path / "vit", mean=mean, std=std, **REGISTERS)
    encoder = FrozenEncoder(str(tmp_path / "vit"), 4)
    assert (tuple(encoder.grid), encoder.dim, encoder.size) == ((4, 4), 24, 28)
    images = photos(3, size)
    with torch.no_grad():
        expected = model.forward_features(preprocessed(images, mean, std, 28))[:, 3:]
    got = encoder(images)
    assert got.shape == (3, 16, 24) and got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # After the final norm, whose weights are not its own: not the tokens before it.
    raw = model.blocks(model.norm_pre(model._pos_embed(model.patch_embed(preprocessed(images, mean, std, 28)))))[:, 3:]
    assert not torch.allclose(got, raw, atol=1e-2)


def test_tokens_are_in_row_order(tmp_path):
    save_encoder(tmp_path / "vit", patch_size=7, img_size=28, **SMALL)
    encoder = FrozenEncoder(str(tmp_path / "vit"), 4)
    images = photos(1, 28)
    changed = images.clone()
    changed[..., 7:14, 21:28] = 255 - changed[..., 7:14, 21:28]  # second row, fourth column
    difference = (encoder(images) - encoder(changed)).abs().sum(-1)[0]
    assert difference.argmax() == 1 * 4 + 3


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("grid", [3, 4, 6])
def test_positions_of_a_folder_are_resampled_to_the_grid(tmp_path, grid, registers):
    arguments = REGISTERS | {"reg_tokens": registers}
    model = save_encoder(tmp_path / "vit", **arguments)
    encoder = FrozenEncoder(str(tmp_path / "vit"), grid)
    prefix = 1 + registers
    assert model.pos_embed.shape == (1, prefix + 16, 24)
    expected = resample_abs_pos_embed(model.pos_embed, (grid, grid), num_prefix_tokens=prefix)
    assert torch.equal(encoder.model.pos_embed, expected)
    assert encoder(photos(2, 28)).shape == (2, grid * grid, 24)


@pytest.mark.parametrize(
    "name, prefix, size, grid",
    [
        ("vit_small_patch14_dinov2", 1, 64, 4),
        ("timm:vit_small_patch14_dinov2.lvd142m", 1, 64, 4),
        ("dinov2-vit-s", 1, 64, 4),
        ("DINOv2-ViT-S-reg", 5, 512, 32),
    ],
)
def test_dinov2_by_name_with_local_weights(tmp_path, name, prefix, size, grid):
    """The default encoder's architecture in its smallest size, stored for 37 x 37 patches as it is published."""
    architecture = "vit_small_patch14_dinov2" if prefix == 1 else "vit_small_patch14_reg4_dinov2"
    with torch.device("meta"):
        shapes = timm.create_model(architecture, num_classes=0).state_dict()
    generator = torch.Generator().manual_seed(0)
    stored = {name: torch.randn(tensor.shape, generator=generator) * 0.05 for name, tensor in shapes.items()}
    save_file(stored, tmp_path / "weights.safetensors")
    encoder = FrozenEncoder(name, grid, str(tmp_path / "weights.safetensors"))
    assert (encoder.name, encoder.grid, encoder.dim, encoder.size) == (name, (grid, grid), 384, 14 * grid)

    loaded = encoder.model.state_dict()
    assert loaded.keys() == stored.keys()
    positions = stored.pop("pos_embed")  # where there are registers, of patches alone
    prefix_positions = 1 if prefix == 1 else 0
    assert positions.shape == (1, prefix_positions + 37 * 37, 384)
    resampled = resample_abs_pos_embed(positions, (grid, grid), num_prefix_tokens=prefix_positions)
    assert torch.equal(loaded.pop("pos_embed"), resampled)
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)

    images = photos(1, size)
    with torch.no_grad():
        expected = encoder.model.forward_features(preprocessed(images, *IMAGENET, 14 * grid))[:, prefix:]
    torch.testing.assert_close(encoder(images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size, grid", [(256, 16), (512, 32)])
@pytest.mark.parametrize(
    "architecture, patch, prefix",
    [
        ("vit_small_patch14_dinov2", 14, 1),
        ("vit_small_patch14_reg4_dinov2", 14, 5),
        ("vit_small_patch16_dinov3", 16, 5),
        ("vit_small_patch16_224", 16, 1),
        ("vit_huge_patch14_gap_224", 14, 0),
        ("vit_base_patch16_siglip_256", 16, 0),
        ("vit_base_patch16_clip_quickgelu_224", 16, 1),
    ],
)
def test_families_at_both_resolutions(tmp_path, architecture, patch, prefix, size, grid):
    """Every family that has a short name, narrow and with two layers, in a folder."""
    heads = {"num_heads": 1, "embed_dim": 64} if "dinov3" in architecture else {"num_heads": 2, "embed_dim": 24}
    model = save_encoder(tmp_path / "vit", architecture, depth=2, img_size=4 * patch, **heads)
    encoder = FrozenEncoder(str(tmp_path / "vit"), grid)
    assert encoder.size == {14: {256: 224, 512: 448}, 16: {256: 256, 512: 512}}[patch][size]
    model.set_input_size((grid * patch, grid * patch))
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    images = photos(2, size)
    with torch.no_grad():
        expected = model.forward_features(preprocessed(images, mean, std, grid * patch))[:, prefix:]
    got = encoder(images)
    assert got.shape == (2, grid * grid, encoder.dim)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


WIDTHS = {"s": 384, "b": 768, "l": 1024, "h": 1280, "so400m": 1152}
FAMILIES = {  # patch sizes and tokens that belong to no patch
    "dinov1": ({16}, 1),
    "dinov2": ({14}, 1),
    "dinov3": ({16}, 5),
    "mae": ({14, 16}, 1),
    "ijepa": ({14, 16}, 0),
    "jepa": ({14}, 0),
    "clip": ({14, 16}, 1),
    "siglip": ({14, 16}, 0),
}


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_short_name(name):
    """timm has this architecture and published weights for it, and they are what the name says."""
    assert SHORT_NAMES[name] in timm.list_pretrained()
    with torch.device("meta"):
        model = timm.create_model(SHORT_NAMES[name], num_classes=0)
    family, vit, size, *registers = name.split("-")
    patches, prefix = FAMILIES[family]
    assert vit == "vit" and model.patch_embed.patch_size[0] in patches
    assert model.num_prefix_tokens == prefix + (4 if registers else 0)
    assert model.num_features == (WIDTHS | {"g": 1536 if family == "dinov2" else 1408})[size]
    assert not isinstance(model.norm, torch.nn.Identity)  # so that there is a final norm over tokens
    if family != "dinov2":  # whose tag names the data instead
        words = {"dinov1": "dino", "jepa": "ijepa"}
        assert words.get(family, family) in SHORT_NAMES[name]


def test_names_of_repa_are_known():
    # Its README's choices of --enc-type, but for MoCo v3, which timm does not have.
    names = "dinov2-vit-b, dinov2-vit-l, dinov2-vit-g, dinov1-vit-b, clip-vit-L, jepa-vit-h, mae-vit-l"
    assert {name.lower() for name in names.split(", ")} <= SHORT_NAMES.keys()


def test_timm_name_with_a_classifier_in_its_weights(tmp_path):
    """Weights of a classifier, in PyTorch's format: the head is left out, the rest is used."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    encoder = FrozenEncoder("test_vit", 10, str(tmp_path / "weights.pth"))
    images = photos(1, 160)
    with torch.no_grad():
        expected = model.forward_features(preprocessed(images, (0.5,) * 3, (0.5,) * 3, 160))[:, 1:]
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-4)


def test_timm_prefix_before_a_folder(encoder_folder):
    plain, prefixed = (FrozenEncoder(f"{prefix}{encoder_folder}", 4) for prefix in ("", "timm:"))
    assert plain.fingerprint == prefixed.fingerprint


def test_weights_in_the_hubs_cache_are_found_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--timm--test_vit.r160_in1k"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    save_file(timm.create_model("test_vit").state_dict(), repository / "snapshots" / "abc" / "model.safetensors")
    file = str(repository / "snapshots" / "abc" / "model.safetensors")
    assert FrozenEncoder("test_vit", 10).fingerprint == FrozenEncoder("test_vit", 10, file).fingerprint


def test_weights_in_pytorchs_cache_are_found_offline(tmp_path, monkeypatch):
    """I-JEPA is not on the hub. Here a small model takes its place."""
    name = "vit_huge_patch14_gap_224.in1k_ijepa"
    url = timm.get_pretrained_cfg(name).url
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    create = timm.create_model
    small = dict(depth=1, embed_dim=32, num_heads=1)
    monkeypatch.setattr(timm, "create_model", lambda *arguments, **options: create(*arguments, **options, **small))
    with pytest.raises(ValueError, match=f"from {url} .offline.*{Path(url).name} is not there"):
        FrozenEncoder("ijepa-vit-h", 16)

    torch.manual_seed(0)
    model = create(name, num_classes=0, **small)
    weights = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    (tmp_path / "checkpoints").mkdir()
    torch.save({"encoder": weights, "epoch": 300}, tmp_path / "checkpoints" / Path(url).name)
    loaded = FrozenEncoder("ijepa-vit-h", 16).model.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())


def test_a_batch_does_not_mix(encoder_folder):
    encoder, images = FrozenEncoder(str(encoder_folder), 4), photos(5, 8)
    torch.testing.assert_close(encoder(images)[3:4], encoder(images[3:4]), rtol=1e-5, atol=1e-5)


def test_frozen(encoder_folder):
    encoder = FrozenEncoder(str(encoder_folder), 4)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    with torch.enable_grad():
        assert not encoder(photos(1, 8)).requires_grad
    assert len(list(encoder.parameters())) > 10


# ---- transformers ----

VISION = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
TEXT = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)

# model, configuration, image processor, options of the configuration, patch size, tokens before those of the patches
TRANSFORMERS = {
    "dinov2": ("Dinov2Model", "Dinov2Config", "BitImageProcessor", {}, 14, 1),
    "registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        "BitImageProcessor",
        {"num_register_tokens": 3},
        14,
        4,
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", "DINOv3ViTImageProcessor", {"num_register_tokens": 2}, 16, 3),
    "vit": ("ViTModel", "ViTConfig", "ViTImageProcessor", {}, 16, 1),
    "deit": ("DeiTModel", "DeiTConfig", "DeiTImageProcessor", {}, 16, 2),
    "ijepa": ("IJepaModel", "IJepaConfig", "ViTImageProcessor", {}, 14, 0),
    "clip vision": ("CLIPVisionModel", "CLIPVisionConfig", "CLIPImageProcessor", {}, 16, 1),
    "siglip vision": ("SiglipVisionModel", "SiglipVisionConfig", "SiglipImageProcessor", {}, 16, 0),
    "clip": ("CLIPModel", "CLIPConfig", "CLIPImageProcessor", {}, 14, 1),
    "siglip": ("SiglipModel", "SiglipConfig", "SiglipImageProcessor", {}, 16, 0),
    "mae": ("ViTMAEModel", "ViTMAEConfig", "ViTImageProcessor", {}, 16, 1),
    "beit": ("BeitModel", "BeitConfig", "BeitImageProcessor", {}, 16, 1),
    "swin": (
        "SwinModel",
        "SwinConfig",
        "ViTImageProcessor",
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4},
        4,
        0,
    ),
}
COLOURS = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))  # found in no default


def save_transformers(folder, kind, seed=0, **processing):
    """A model with random weights and its image processor, as save_pretrained leaves them. Returns the model."""
    import transformers

    model, configuration, processor, options, patch, _ = TRANSFORMERS[kind]
    options = {"image_size": 5 * patch, "patch_size": patch, **(VISION if kind != "swin" else {}), **options}
    if kind in ("clip", "siglip"):
        options = {"vision_config": options, "text_config": TEXT}
    torch.manual_seed(seed)
    model = getattr(transformers, model)(getattr(transformers, configuration)(**options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processing = {"image_mean": COLOURS[0], "image_std": COLOURS[1]} | processing
    getattr(transformers, processor)(**processing).save_pretrained(folder)
    return model


@pytest.mark.parametrize("size, grid", [(256, 16), (512, 32)])
@pytest.mark.parametrize("kind", [kind for kind in TRANSFORMERS if kind not in ("mae", "beit", "swin")])
def test_tokens_are_those_of_transformers(tmp_path, kind, size, grid):
    *_, patch, prefix = TRANSFORMERS[kind]
    model = save_transformers(tmp_path, kind)
    encoder = FrozenEncoder(f"hf:{tmp_path}", grid)
    assert (encoder.grid, encoder.dim, encoder.size) == ((grid, grid), 24, grid * patch)
    assert encoder.name == f"hf:{tmp_path}"

    tower = model.vision_model if kind in ("clip", "siglip") else model
    resizable = {} if kind.startswith(("dino", "registers")) else {"interpolate_pos_encoding": True}
    images = photos(2, size)
    with torch.no_grad():
        x = preprocessed(images, *COLOURS, grid * patch)
        expected = tower(pixel_values=x, **resizable).last_hidden_state
        if kind.startswith("clip"):
            expected = tower.post_layernorm(expected)
    assert expected.shape == (2, prefix + grid * grid, 24)
    got = encoder(images)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected[:, prefix:], rtol=1e-3, atol=1e-3)
    # After the final norm: its weights are undone, and what is left has the mean 0 and the variance 1.
    norm = next(module for name, module in tower.named_children() if name in ("layernorm", "norm", "post_layernorm"))
    plain = (got - norm.bias) / norm.weight
    torch.testing.assert_close(plain.mean(-1), torch.zeros(2, grid * grid), rtol=0, atol=1e-2)
    torch.testing.assert_close(plain.var(-1, unbiased=False), torch.ones(2, grid * grid), rtol=0, atol=2e-2)


def test_transformers_model_is_frozen_and_has_no_text_tower(tmp_path):
    save_transformers(tmp_path, "clip")
    encoder = FrozenEncoder(f"hf:{tmp_path}", 4)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(photos(1, 64)).requires_grad
    assert not any("text" in name for name, _ in encoder.named_parameters())


def test_half_precision_weights_are_computed_in_float32(tmp_path):
    model = save_transformers(tmp_path, "vit")
    model.half().save_pretrained(tmp_path)
    encoder = FrozenEncoder(f"hf:{tmp_path}", 4)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert encoder(photos(1, 64)).dtype == torch.float32


def test_processor_that_does_not_normalise(tmp_path):
    model = save_transformers(tmp_path, "vit", do_normalize=False)
    images = photos(1, 80)
    with torch.no_grad():
        expected = model(images / 255).last_hidden_state[:, 1:]
    torch.testing.assert_close(FrozenEncoder(f"hf:{tmp_path}", 5)(images), expected, rtol=1e-3, atol=1e-3)


def test_classifier_of_transformers(tmp_path):
    """Its head is not used, and the pooling layer that AutoModel adds to it is not in the weights."""
    import transformers

    save_transformers(tmp_path, "vit")
    configuration = transformers.ViTConfig(image_size=80, patch_size=16, **VISION)
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(configuration).eval()
    model.save_pretrained(tmp_path)
    images = photos(1, 80)
    with torch.no_grad():
        expected = model.vit(preprocessed(images, *COLOURS, 80)).last_hidden_state[:, 1:]
    torch.testing.assert_close(FrozenEncoder(f"hf:{tmp_path}", 5)(images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_fingerprint_of_a_transformers_model(tmp_path, kind):
    save_transformers(tmp_path / "a", kind)
    original = FrozenEncoder(f"hf:{tmp_path / 'a'}", 4).fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert FrozenEncoder(f"hf:{tmp_path / 'copy'}", 4).fingerprint == original
    assert FrozenEncoder(f"hf:{tmp_path / 'a'}", 5).fingerprint != original
    save_transformers(tmp_path / "b", kind, image_mean=(0.1, 0.2, 0.4))
    assert FrozenEncoder(f"hf:{tmp_path / 'b'}", 4).fingerprint != original
    save_transformers(tmp_path / "c", kind, seed=1)
    assert FrozenEncoder(f"hf:{tmp_path / 'c'}", 4).fingerprint != original


# The first draws tokens at random, the second ends without a norm, the third merges its patches.
@pytest.mark.parametrize("kind", ["mae", "beit", "swin"])
def test_transformers_model_without_those_tokens(tmp_path, kind):
    save_transformers(tmp_path, kind)
    with pytest.raises(ValueError, match="encoder 'hf:.*' gives no 16 x 16 tokens"):
        FrozenEncoder(f"hf:{tmp_path}", 16)


@pytest.mark.parametrize(
    "kind, lost",
    [
        ("dinov2", "encoder.layer.1."),
        ("dinov2", "embeddings.position_embeddings"),
        ("clip", "vision_model.encoder.layers.1."),
        ("clip", "vision_model.post_layernorm"),
    ],
)
def test_transformers_model_with_weights_missing(tmp_path, kind, lost):
    save_transformers(tmp_path, kind)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(lost)}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights of encoder 'hf:.*' could not be loaded.* not in it.*hf:FOLDER"):
        FrozenEncoder(f"hf:{tmp_path}", 4)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_transformers_folder_with_a_file_missing(tmp_path, file):
    save_transformers(tmp_path, "dinov2")
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match="weights of encoder 'hf:(.|\n)*' could not be loaded(.|\n)*hf:FOLDER"):
        FrozenEncoder(f"hf:{tmp_path}", 4)


@pytest.mark.parametrize("name", ["hf:", "hf:no/such", "hf:not a name", "hf:timm/test_vit.r160_in1k"])
def test_unknown_transformers_model(name):
    with pytest.raises(ValueError, match=f"encoder '{name}' could not be loaded(.|\n)*hf:FOLDER"):
        FrozenEncoder(name, 4)


def test_weights_beside_a_transformers_model(tmp_path):
    save_transformers(tmp_path, "dinov2")
    weights = str(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"encoder_weights = '{weights}'.*hf:FOLDER"):
        FrozenEncoder(f"hf:{tmp_path}", 4, weights)


def test_transformers_folder_needs_its_prefix(tmp_path):
    save_transformers(tmp_path, "dinov2")
    with pytest.raises(ValueError, match="none that timm can build.*hf:FOLDER"):
        FrozenEncoder(str(tmp_path), 4)


# ---- fingerprint ----


def test_fingerprint_is_stable_and_follows_the_weights(tmp_path):
    save_tiny_encoder(tmp_path / "a")
    save_tiny_encoder(tmp_path / "copy")
    original = FrozenEncoder(str(tmp_path / "a"), 4).fingerprint
    assert len(original) == 12 and int(original, 16) >= 0
    assert FrozenEncoder(str(tmp_path / "copy"), 4).fingerprint == original  # the path does not matter

    file = tmp_path / "copy" / "model.safetensors"
    weights = load_file(file)
    weights["blocks.1.mlp.fc2.bias"][-1] += 1e-6
    save_file(weights, file)
    assert FrozenEncoder(str(tmp_path / "copy"), 4).fingerprint != original


def test_fingerprint_follows_the_normalisation(tmp_path):
    save_tiny_encoder(tmp_path / "vit")
    original = FrozenEncoder(str(tmp_path / "vit"), 4).fingerprint
    file = tmp_path / "vit" / "config.json"
    for key in ("mean", "std"):
        config = json.loads(file.read_text())
        config["pretrained_cfg"][key] = [0.5, 0.5, 0.25]
        file.write_text(json.dumps(config))
        assert FrozenEncoder(str(tmp_path / "vit"), 4).fingerprint != original


def test_fingerprint_follows_the_kind_of_gelu(tmp_path):
    # OpenAI's CLIP: one file of weights is right with the quick kind alone, and timm can build both.
    architectures = ("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224")
    for architecture in architectures:
        save_encoder(tmp_path / architecture, architecture, img_size=64, **SMALL)
    common, quick = (FrozenEncoder(str(tmp_path / architecture), 4) for architecture in architectures)
    assert all(torch.equal(*pair) for pair in zip(common.parameters(), quick.parameters(), strict=True))
    assert common.fingerprint != quick.fingerprint


def test_fingerprint_by_its_definition(tmp_path):
    """Prepared folders hold features under this name. A change of it would make them useless."""
    model = save_tiny_encoder(tmp_path)
    encoder = FrozenEncoder(str(tmp_path), 4)
    digest = hashlib.sha256(b"(4, 4)")
    half = torch.full((3, 1, 1), 0.5)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, tensor in ({"mean": half, "std": half} | tensors).items():
        digest.update(f"{name} {tuple(tensor.shape)} torch.float32".encode() + tensor.numpy().tobytes())
    assert encoder.fingerprint == digest.hexdigest()[:12]


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "vit_tiny_patch16_dinov3_qkvb"])
def test_fingerprint_follows_the_grid(tmp_path, architecture):
    # The second turns its queries by position instead of adding to the tokens: no weight depends on the grid.
    save_encoder(tmp_path / "vit", architecture, img_size=32, embed_dim=48, depth=1, num_heads=2)
    fingerprints = {FrozenEncoder(str(tmp_path / "vit"), grid).fingerprint for grid in (2, 3)}
    assert len(fingerprints) == 2


# ---- errors ----


@pytest.mark.parametrize(
    "name",
    [
        "dinov2",
        "no/such/folder",
        "",
        "timm:",
        "timm:no_such_vit",
        "dinov2-vit-x",
        "timm:dinov2-vit-b",
        "vit_tiny_patch16_224.no_such_weights",
    ],
)
def test_unknown_encoder(name):
    with pytest.raises(ValueError, match=f"encoder {name!r}"):
        FrozenEncoder(name, 4)


def test_unknown_short_name_lists_the_known_ones():
    with pytest.raises(ValueError) as error:
        FrozenEncoder("mocov3-vit-b", 4)
    assert all(name in str(error.value) for name in ("'mocov3-vit-b'", "hf:", *SHORT_NAMES))


def test_timm_architecture_without_published_weights():
    name = next(name for name in timm.list_models("vit_*") if not timm.models.is_model_pretrained(name))
    with pytest.raises(ValueError, match=f"weights of encoder '{name}' could not be loaded.*--encoder-weights FILE"):
        FrozenEncoder(name, 4)


@pytest.mark.parametrize("config", ["{}", '{"model_type": "dinov2", "patch_size": 14}', "not json"])
def test_folder_that_timm_did_not_write(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="encoder .*timm"):
        FrozenEncoder(str(tmp_path), 4)


def test_missing_weights_file(tmp_path):
    with pytest.raises(ValueError, match="encoder_weights = .*nowhere.pth.* there is no such file"):
        FrozenEncoder("test_vit", 4, str(tmp_path / "nowhere.pth"))


def test_weights_beside_a_folder(encoder_folder):
    weights = str(encoder_folder / "model.safetensors")
    with pytest.raises(ValueError, match="encoder_weights = .* the encoder is a folder that has its own weights"):
        FrozenEncoder(str(encoder_folder), 4, weights)


def test_hub_that_cannot_be_reached():
    with pytest.raises(ValueError, match="weights of encoder 'test_vit'.*--encoder-weights.*--encoder"):
        FrozenEncoder("test_vit", 4)


def test_folder_without_weights(tmp_path):
    save_tiny_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="weights of encoder .* could not be loaded"):
        FrozenEncoder(str(tmp_path), 4)


def test_weights_file_that_is_damaged(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="weights of encoder 'test_vit' could not be loaded"):
        FrozenEncoder("test_vit", 4, str(tmp_path / "weights.safetensors"))


# Of another model, and of the same model but with a layer missing: neither may leave random weights in silence.
@pytest.mark.parametrize("missing", ["", "blocks.3."])
def test_weights_file_that_does_not_fit(tmp_path, missing):
    weights = {
        name: tensor
        for name, tensor in timm.create_model("test_vit").state_dict().items()
        if missing and not name.startswith(missing)
    }
    save_file(weights or {"something.else": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="weights of encoder 'test_vit' could not be loaded"):
        FrozenEncoder("test_vit", 4, str(tmp_path / "weights.safetensors"))


# The second has patches as well, but merges them, and its output is no list of tokens.
@pytest.mark.parametrize(
    "architecture, arguments",
    [
        ("test_resnet", {}),
        (
            "swin_tiny_patch4_window7_224",
            dict(img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2)),
        ),
    ],
)
def test_models_that_are_no_vision_transformers(tmp_path, architecture, arguments):
    save_encoder(tmp_path / "model", architecture, **arguments)
    with pytest.raises(ValueError, match="plain vision transformer"):
        FrozenEncoder(str(tmp_path / "model"), 8)

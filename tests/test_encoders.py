"""Frozen encoders against the own forward pass of timm and transformers, with the preprocessing written out here.

The encoders are their architectures with random weights, since the weights' values do not matter here.
"""

import hashlib
import io
import json
import pickle
import re
from pathlib import Path

import pytest
import torch

import models  # noqa: F401  (before timm: see its docstring)
import safetensors.torch
import timm
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf

from models.encoders import SHORT_NAMES, FrozenEncoder
from tests.conftest import Harmful, save_tiny_encoder

COLOURS = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))  # found in no default
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def photos(count, height, width=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width or height), dtype=torch.uint8, generator=generator)


def bicubic(images, size, a=-0.75):
    """Bicubic interpolation by its definition: pixel centres aligned, edges repeated, no smoothing when shrinking.

    a: the kernel's free parameter; PyTorch's, and hence REPA's, is -0.75.
    """
    before = images.shape[-1]
    pixel = torch.arange(-3, before + 3)
    d = ((torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * before / size - 0.5 - pixel).abs()
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    kernel = torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
    matrix = kernel.new_zeros(size, before).index_add(1, pixel.clamp(0, before - 1), kernel)
    return matrix @ images.double() @ matrix.T


def preprocessed(images, mean, std, size):
    """uint8 (B, 3, H, W) -> float32 (B, 3, size, size) as in REPA: scaled, normalised, then resized."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
    return bicubic((images.double() / 255 - mean) / std, size).float()


def save_encoder(folder, architecture="vit_tiny_patch16_224", colours=None, **arguments):
    """Any timm architecture with random weights, in the folder format that `--encoder` takes. Returns the model."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=0, **arguments).eval()
    if colours:
        model.pretrained_cfg = {**model.pretrained_cfg, "mean": colours[0], "std": colours[1]}
    for parameter in model.parameters():  # so that no part is idle as timm starts it
        torch.nn.init.normal_(parameter, std=0.2)
    save_for_hf(model, str(folder), model_args=dict(num_classes=0, **arguments), safe_serialization=True)
    return model


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def snapshot(cache, repository):
    """The folder that the hub's cache keeps the files of this repository in."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    return folder / "snapshots" / ("0" * 40)


def assert_normalised(tokens, norm):
    """That they come after the final norm: without its weights, they have the mean 0 and the variance 1."""
    plain = (tokens - norm.bias) / norm.weight
    torch.testing.assert_close(plain.mean(-1), torch.zeros(tokens.shape[:2]), rtol=0, atol=1e-2)
    torch.testing.assert_close(plain.var(-1, unbiased=False), torch.ones(tokens.shape[:2]), rtol=0, atol=2e-2)


def refusal(*arguments):
    """The one line that FrozenEncoder refuses these arguments with."""
    with pytest.raises(ValueError) as error:
        FrozenEncoder(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


NARROW = dict(embed_dim=24, depth=2, num_heads=2)
ROTARY = dict(embed_dim=64, depth=2, num_heads=1)  # enough for the rotation of its queries
REGISTERS = dict(patch_size=7, reg_tokens=2, **NARROW)  # a class token and two registers


# ---- timm ----


# Every family that has a short name, stored for 4 x 4 patches. Images as large as the encoder's, larger and smaller.
@pytest.mark.parametrize(
    "architecture, arguments, patch, prefix, size, grid",
    [
        ("vit_tiny_patch16_224", REGISTERS, 7, 3, 28, 4),
        ("vit_tiny_patch16_224", REGISTERS, 7, 3, 32, 3),
        ("vit_tiny_patch16_224", REGISTERS, 7, 3, 20, 6),
        ("vit_small_patch14_dinov2", NARROW, 14, 1, 256, 16),
        ("vit_small_patch14_dinov2", NARROW, 14, 1, 512, 32),
        ("vit_small_patch14_reg4_dinov2", NARROW, 14, 5, 256, 16),
        ("vit_small_patch16_dinov3", ROTARY, 16, 5, 256, 16),
        ("vit_small_patch16_dinov3", ROTARY, 16, 5, 512, 32),
        ("vit_small_patch16_224", NARROW, 16, 1, 256, 16),
        ("vit_huge_patch14_gap_224", NARROW, 14, 0, 256, 16),
        ("vit_base_patch16_siglip_256", NARROW, 16, 0, 256, 16),
        ("vit_base_patch16_clip_quickgelu_224", NARROW, 16, 1, 256, 16),
    ],
)
def test_tokens_are_timms_without_prefix(tmp_path, architecture, arguments, patch, prefix, size, grid):
    model = save_encoder(tmp_path, architecture, COLOURS, img_size=4 * patch, **arguments)
    encoder = FrozenEncoder(str(tmp_path), grid)
    assert (encoder.grid, encoder.dim, encoder.size) == ((grid, grid), arguments["embed_dim"], grid * patch)
    images = photos(2, size)
    x = preprocessed(images, *COLOURS, grid * patch)
    model.set_input_size((grid * patch, grid * patch))
    with torch.no_grad():
        expected = model.forward_features(x)[:, prefix:]
    got = encoder(images)
    assert got.shape == (2, grid * grid, encoder.dim) and got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got[1:], encoder(images[1:]), rtol=1e-4, atol=1e-4)  # a batch does not mix
    assert_normalised(got, model.norm)


@pytest.mark.parametrize(
    "name, prefix", [("timm:vit_small_patch14_dinov2.lvd142m", 1), ("dinov2-vit-s", 1), ("DINOv2-ViT-S-reg", 5)]
)
def test_dinov2_by_name_with_local_weights(tmp_path, name, prefix):
    """The default encoder's architecture in its smallest size, stored for 37 x 37 patches as it is published."""
    architecture = "vit_small_patch14_dinov2" if prefix == 1 else "vit_small_patch14_reg4_dinov2"
    with torch.device("meta"):
        shapes = timm.create_model(architecture, num_classes=0).state_dict()
    generator = torch.Generator().manual_seed(0)
    stored = {name: torch.randn(tensor.shape, generator=generator) * 0.05 for name, tensor in shapes.items()}
    save_file(stored, tmp_path / "weights.safetensors")
    encoder = FrozenEncoder(name, 4, str(tmp_path / "weights.safetensors"))
    assert (encoder.name, encoder.grid, encoder.dim, encoder.size) == (name, (4, 4), 384, 56)

    loaded = encoder.model.state_dict()
    assert loaded.keys() == stored.keys()
    positions, before = stored.pop("pos_embed"), int(prefix == 1)  # where there are registers, of patches alone
    assert positions.shape == (1, before + 37 * 37, 384)
    resampled = resample_abs_pos_embed(positions, (4, 4), num_prefix_tokens=before)
    assert torch.equal(loaded.pop("pos_embed"), resampled)
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)

    images = photos(1, 64)
    with torch.no_grad():
        expected = encoder.model.forward_features(preprocessed(images, *IMAGENET, 56))[:, prefix:]
    torch.testing.assert_close(encoder(images), expected, rtol=1e-3, atol=1e-3)


WIDTHS = {"s": 384, "b": 768, "l": 1024, "h": 1280, "so400m": 1152}
PREFIX = {"dinov1": 1, "dinov2": 1, "dinov3": 5, "mae": 1, "ijepa": 0, "jepa": 0, "clip": 1, "siglip": 0}


def test_short_names():
    """timm has these architectures and published weights for them, and they are what the names say."""
    for name, target in SHORT_NAMES.items():
        assert target in timm.list_pretrained()
        with torch.device("meta"):
            model = timm.create_model(target, num_classes=0, depth=1)
        family, vit, size, *registers = name.split("-")
        assert vit == "vit" and model.patch_embed.patch_size[0] in (14, 16)
        assert model.num_prefix_tokens == PREFIX[family] + (4 if registers else 0)
        assert model.num_features == (WIDTHS | {"g": 1536 if family == "dinov2" else 1408})[size]
        assert not isinstance(model.norm, torch.nn.Identity)  # so that there is a final norm over tokens
        if family != "dinov2":  # whose tag names the data instead
            assert {"dinov1": "dino", "jepa": "ijepa"}.get(family, family) in target
    # REPA's README's choices of --enc-type, but for MoCo v3, which timm does not have.
    names = "dinov2-vit-b, dinov2-vit-l, dinov2-vit-g, dinov1-vit-b, clip-vit-L, jepa-vit-h, mae-vit-l"
    assert {name.lower() for name in names.split(", ")} <= SHORT_NAMES.keys()


def test_timm_name_with_a_classifier_in_its_weights(tmp_path, monkeypatch):
    """In PyTorch's format, or in the hub's cache, offline. The head is left out, the rest is used."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("test_vit", 10)
    for part in ("'test_vit'", "'timm/test_vit.r160_in1k'", "--encoder-weights FILE", "hf:FOLDER", "HF_HUB_OFFLINE=1"):
        assert part in message
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    save_file(model.state_dict(), snapshot(tmp_path, "timm/test_vit.r160_in1k") / "model.safetensors")
    images = photos(1, 160)
    with torch.no_grad():
        expected = model.forward_features(preprocessed(images, (0.5,) * 3, (0.5,) * 3, 160))[:, 1:]
    for weights in ("", str(tmp_path / "weights.pth")):
        encoder = FrozenEncoder("test_vit", 10, weights)
        torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-4)
        assert not any("head" in name for name, _ in encoder.named_parameters())


def test_weights_in_pytorchs_cache_are_found_offline(tmp_path, monkeypatch):
    """I-JEPA is not on the hub. Here a small model takes its place."""
    name = "vit_huge_patch14_gap_224.in1k_ijepa"
    url = timm.get_pretrained_cfg(name).url
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    create = timm.create_model
    small = dict(depth=1, embed_dim=32, num_heads=1)
    monkeypatch.setattr(timm, "create_model", lambda *arguments, **options: create(*arguments, **options, **small))
    torch.manual_seed(0)
    model = create(name, num_classes=0, **small)
    weights = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    (tmp_path / "checkpoints").mkdir()
    torch.save({"encoder": weights, "epoch": 300}, tmp_path / "checkpoints" / Path(url).name)
    loaded = FrozenEncoder("ijepa-vit-h", 16).model.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())


# ---- transformers ----

VISION = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
TEXT = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
SWIN = dict(embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)

# model and configuration, image processor, options of the configuration, patch size, tokens before those of the patches
TRANSFORMERS = {
    "dinov2": ("Dinov2", "BitImageProcessor", VISION, 14, 1),
    "registers": ("Dinov2WithRegisters", "BitImageProcessor", VISION | {"num_register_tokens": 3}, 14, 4),
    "dinov3": ("DINOv3ViT", "DINOv3ViTImageProcessor", VISION | {"num_register_tokens": 2}, 16, 3),
    "vit": ("ViT", "ViTImageProcessor", VISION, 16, 1),
    "deit": ("DeiT", "DeiTImageProcessor", VISION, 16, 2),
    "ijepa": ("IJepa", "ViTImageProcessor", VISION, 14, 0),
    "clip vision": ("CLIPVision", "CLIPImageProcessor", VISION, 16, 1),
    "siglip vision": ("SiglipVision", "SiglipImageProcessor", VISION, 16, 0),
    "clip": ("CLIP", "CLIPImageProcessor", VISION, 14, 1),
    "siglip": ("Siglip", "SiglipImageProcessor", VISION, 16, 0),
    "mae": ("ViTMAE", "ViTImageProcessor", VISION, 16, 1),
    "beit": ("Beit", "BeitImageProcessor", VISION, 16, 1),
    "swin": ("Swin", "ViTImageProcessor", SWIN, 4, 0),
}


def save_transformers(folder, kind, seed=0, **processing):
    """A model with random weights and its image processor, as save_pretrained leaves them. Returns the model."""
    name, processor, options, patch, _ = TRANSFORMERS[kind]
    options = {"image_size": 5 * patch, "patch_size": patch, **options}
    if kind in ("clip", "siglip"):
        options = {"vision_config": options, "text_config": TEXT}
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processing = {"image_mean": COLOURS[0], "image_std": COLOURS[1]} | processing
    getattr(transformers, processor)(**processing).save_pretrained(folder)
    return model


USABLE = [kind for kind in TRANSFORMERS if kind not in ("mae", "beit", "swin")]


@pytest.mark.parametrize("kind, grid", [(kind, 16) for kind in USABLE] + [("dinov2", 32), ("dinov3", 32), ("clip", 32)])
def test_tokens_are_those_of_transformers(tmp_path, kind, grid):
    *_, patch, prefix = TRANSFORMERS[kind]
    model = save_transformers(tmp_path, kind)
    encoder = FrozenEncoder(f"hf:{tmp_path}", grid)
    assert (encoder.name, encoder.grid, encoder.dim, encoder.size) == (f"hf:{tmp_path}", (grid,) * 2, 24, grid * patch)

    tower = model.vision_model if kind in ("clip", "siglip") else model
    resizable = {} if kind.startswith(("dino", "registers")) else {"interpolate_pos_encoding": True}
    images = photos(2, 16 * grid)
    with torch.no_grad():
        x = preprocessed(images, *COLOURS, grid * patch)
        expected = tower(pixel_values=x, **resizable).last_hidden_state
        if kind.startswith("clip"):
            expected = tower.post_layernorm(expected)
    assert expected.shape == (2, prefix + grid * grid, 24)
    got = encoder(images)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected[:, prefix:], rtol=1e-3, atol=1e-3)
    names = ("layernorm", "norm", "post_layernorm")
    assert_normalised(got, next(part for name, part in tower.named_children() if name in names))


def test_half_precision_classifier_without_normalisation(tmp_path):
    """Computed in float32, without the head, and without the pooling layer that AutoModel adds to no weights."""
    save_transformers(tmp_path, "vit", do_normalize=False)
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=80, patch_size=16, **VISION))
    model.eval().half().save_pretrained(tmp_path)
    encoder, images = FrozenEncoder(f"hf:{tmp_path}", 5), photos(1, 80)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    with torch.no_grad():
        expected = model.float().vit(images / 255).last_hidden_state[:, 1:]
    torch.testing.assert_close(encoder(images), expected, rtol=1e-3, atol=1e-3)


def test_frozen_without_the_text_tower(tmp_path, encoder_folder):
    save_transformers(tmp_path, "clip")
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("text_model")}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name in (str(encoder_folder), f"hf:{tmp_path}"):
        encoder = FrozenEncoder(name, 4)
        assert not any(module.training for module in encoder.modules())
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        assert not encoder(photos(1, 64)).requires_grad
        names = [name for name, _ in encoder.named_parameters()]
        assert len(names) > 10 and not any("text" in name for name in names)


# The first draws tokens at random, the second ends without a norm, the third merges its patches.
@pytest.mark.parametrize("kind", ["mae", "beit", "swin"])
def test_transformers_model_without_those_tokens(tmp_path, kind):
    save_transformers(tmp_path, kind)
    assert f"encoder 'hf:{tmp_path}' gives no 16 x 16 tokens" in refusal(f"hf:{tmp_path}", 16)


LOST = {
    "": ("blocks.1.",),
    "dinov2": ("encoder.layer.1.", "embeddings.position_embeddings"),
    "clip": ("vision_model.encoder.layers.1.", "vision_model.post_layernorm"),
}


@pytest.mark.parametrize("kind", LOST)
def test_weights_that_are_missing_are_not_left_at_random(tmp_path, kind):
    save_transformers(tmp_path, kind) if kind else save_tiny_encoder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for lost in LOST[kind]:
        kept = {name: tensor for name, tensor in weights.items() if not name.startswith(lost)}
        assert len(kept) < len(weights)
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        message = refusal(f"hf:{tmp_path}" if kind else str(tmp_path), 4)
        assert "could not be loaded" in message and lost in message


# ---- fingerprint ----


@pytest.mark.parametrize("grid", [2, 3])
@pytest.mark.parametrize(
    "architecture, kinds",
    [
        ("vit_tiny_patch16_224", ""),
        ("vit_base_patch16_clip_quickgelu_224", "QuickGELU"),  # one file of weights is right with one kind alone
        ("vit_tiny_patch16_dinov3_qkvb", ""),  # turns its queries by position: no weight depends on the grid
    ],
)
def test_fingerprint_by_its_definition(tmp_path, architecture, kinds, grid):
    """Prepared folders hold features under this name. A change of it would make them useless."""
    model = save_encoder(tmp_path, architecture, COLOURS, img_size=32, embed_dim=48, depth=1, num_heads=2)
    model.set_input_size((16 * grid, 16 * grid))
    digest = hashlib.sha256(f"({grid}, {grid}){kinds}".encode())
    tensors = {name: torch.tensor(values).view(3, 1, 1) for name, values in zip(("mean", "std"), COLOURS)}
    for name, tensor in (tensors | {f"model.{name}": tensor for name, tensor in model.state_dict().items()}).items():
        digest.update(f"{name} {tuple(tensor.shape)} torch.float32".encode() + tensor.numpy().tobytes())
    assert FrozenEncoder(str(tmp_path), grid).fingerprint == digest.hexdigest()[:12]


# ---- files that would run code, and files that are no weights ----


def no_weights(folder):
    """Contents of files that are no weights. Unpickling the last two makes this folder."""
    zipped = io.BytesIO()
    torch.save({"weight": Harmful(folder)}, zipped)
    other = safetensors.torch.save({"weight": torch.zeros(9)}, {"format": "pt"})
    return other, pickle.dumps({"weight": Harmful(folder)}), zipped.getvalue()


@pytest.mark.parametrize(
    "place, file", [("file", "pytorch_model.bin"), ("timm", "pytorch_model.bin"), ("hf", "model.safetensors")]
)
def test_weights_of_another_kind(tmp_path, place, file):
    save_transformers(tmp_path, "dinov2") if place == "hf" else save_tiny_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    file = str(tmp_path / file)
    name = {"file": "test_vit", "timm": str(tmp_path), "hf": f"hf:{tmp_path}"}[place]
    for content in no_weights(tmp_path / "ran"):
        Path(file).write_bytes(content)
        message = refusal(name, 4, *[file][: place == "file"])
        assert f"{name!r} could not be loaded from {file if place == 'file' else str(tmp_path)!r}" in message
        assert "weights_only" not in message  # which the libraries advise to switch off
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A folder of a DINOv2 with a module that makes the folder `ran`, and somebody who agrees to whatever is asked."""
    save_transformers(tmp_path, "dinov2")
    (tmp_path / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    monkeypatch.setattr("builtins.input", lambda *prompt: "yes")
    yield tmp_path
    assert not (tmp_path / "ran").exists()


OWN_MODEL = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
OWN_COLOURS = {"AutoImageProcessor": "own.Processor", "AutoFeatureExtractor": "own.Processor"}


@pytest.mark.parametrize(
    "file, changes",
    [
        ("config.json", dict(model_type="own", auto_map=OWN_MODEL)),
        ("config.json", dict(model_type="own", auto_map={"AutoConfig": "some/where--own.Config"})),
        ("preprocessor_config.json", dict(image_processor_type="Own", auto_map=OWN_COLOURS)),
    ],
)
def test_code_that_weights_need_is_refused(own_code, file, changes):
    change_json(own_code / file, **changes)
    assert "(it needs code that comes with it (auto_map), which is never run)" in refusal(f"hf:{own_code}", 4)


def test_code_beside_known_models_is_ignored(own_code):
    expected = FrozenEncoder(f"hf:{own_code}", 4).fingerprint
    change_json(own_code / "config.json", auto_map=OWN_MODEL)
    change_json(own_code / "preprocessor_config.json", auto_map=OWN_COLOURS)
    assert FrozenEncoder(f"hf:{own_code}", 4).fingerprint == expected
    save_tiny_encoder(own_code)
    change_json(own_code / "config.json", auto_map=OWN_MODEL)
    FrozenEncoder(str(own_code), 4)


# ---- other errors ----


@pytest.mark.parametrize("name", ["no/such", "", "timm:no_such"])
def test_unknown_encoder(name):
    message = refusal(name, 4)
    assert f"encoder {name!r} is neither a short name ({', '.join(SHORT_NAMES)})" in message and "hf:" in message


@pytest.mark.parametrize("name", ["hf:a/b", "test_vit.no_such"])
def test_encoder_without_weights(name):
    assert re.match(f"encoder {name!r} could not be loaded.*--encoder-weights FILE.*hf:FOLDER", refusal(name, 4))
    assert "encoder_weights = 'no.pth': " in refusal(name, 4, "no.pth")


@pytest.mark.parametrize(
    "prefix, file, content",
    [
        ("", "config.json", '{"model_type": "dinov2", "patch_size": 14}'),
        ("", "model.safetensors", None),
        ("hf:", "preprocessor_config.json", None),
    ],
)
def test_folder_of_something_else(tmp_path, prefix, file, content):
    save_transformers(tmp_path, "dinov2") if prefix else save_tiny_encoder(tmp_path)
    name, weights = f"{prefix}{tmp_path}", str(tmp_path / "model.safetensors")
    assert re.match(f"encoder_weights = '{weights}': encoder '{name}' .*has .*own", refusal(name, 4, weights))
    (tmp_path / file).write_text(content) if content else (tmp_path / file).unlink()
    assert re.match(f"encoder '{name}' could not be loaded.*save_for_hf.*hf:FOLDER", refusal(name, 4))


WINDOWS = dict(img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2))


# The second has patches as well, but merges them; its output is no list of tokens. The third makes them of larger ones.
@pytest.mark.parametrize(
    "architecture, arguments, reason",
    [
        ("test_resnet", {}, "has no square patches; a plain vision transformer is needed"),
        ("swin_tiny_patch4_window7_224", WINDOWS, "has no square patches; a plain vision transformer is needed"),
        ("vit_tiny_r_s16_p8_224", NARROW, "the model has 8 x 8 tokens, encoder .* 2 x 2"),
    ],
)
def test_models_that_are_no_vision_transformers(tmp_path, architecture, arguments, reason):
    save_encoder(tmp_path, architecture, **arguments)
    assert re.search(reason, refusal(str(tmp_path), 8))

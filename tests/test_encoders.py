"""Frozen encoders against timm's own forward pass, with the preprocessing written out here; pixels as latents.

The encoders are timm architectures with random weights, since the weights' values do not matter here.
"""

import json
import math

import numpy as np
import pytest
import torch

import models  # noqa: F401  (before timm: see its docstring)
import timm
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf

from models.autoencoder import AUTOENCODERS, load_autoencoder
from models.encoders import FrozenEncoder
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
    for parameter in model.parameters():                                # so that no part is idle as timm starts it
        torch.nn.init.normal_(parameter, std=0.2)
    save_for_hf(model, str(folder), model_args=dict(num_classes=0, **arguments), safe_serialization=True)
    return model


SMALL = dict(embed_dim=24, depth=2, num_heads=2)
REGISTERS = dict(patch_size=7, img_size=28, reg_tokens=2, **SMALL)      # a class token and two registers


# ---- tokens ----

@pytest.mark.parametrize("size", [28, 32, 20])                          # as it is, shrunk, enlarged
def test_tokens_are_timms_without_prefix(tmp_path, size):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)                        # the folder's own, found in no default
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
    changed[..., 7:14, 21:28] = 255 - changed[..., 7:14, 21:28]         # second row, fourth column
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


def test_dinov2_by_name_with_local_weights(tmp_path):
    """The default encoder's architecture in its smallest size, stored for 37 x 37 patches as it is published."""
    with torch.device("meta"):
        shapes = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    generator = torch.Generator().manual_seed(0)
    stored = {name: torch.randn(tensor.shape, generator=generator) * 0.05 for name, tensor in shapes.items()}
    save_file(stored, tmp_path / "weights.safetensors")
    encoder = FrozenEncoder("vit_small_patch14_dinov2", 4, str(tmp_path / "weights.safetensors"))

    loaded = encoder.model.state_dict()
    assert loaded.keys() == stored.keys()
    assert stored["pos_embed"].shape == (1, 1 + 37 * 37, 384)
    resampled = resample_abs_pos_embed(stored.pop("pos_embed"), (4, 4), num_prefix_tokens=1)
    assert torch.equal(loaded.pop("pos_embed"), resampled)
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)

    images = photos(2, 64)
    with torch.no_grad():
        expected = encoder.model.forward_features(preprocessed(images, *IMAGENET, 56))[:, 1:]
    torch.testing.assert_close(encoder(images), expected, rtol=1e-3, atol=1e-3)


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


# ---- fingerprint ----

def test_fingerprint_is_stable_and_follows_the_weights(tmp_path):
    save_tiny_encoder(tmp_path / "a")
    save_tiny_encoder(tmp_path / "copy")
    original = FrozenEncoder(str(tmp_path / "a"), 4).fingerprint
    assert len(original) == 12 and int(original, 16) >= 0
    assert FrozenEncoder(str(tmp_path / "copy"), 4).fingerprint == original         # the path does not matter

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


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "vit_tiny_patch16_dinov3_qkvb"])
def test_fingerprint_follows_the_grid(tmp_path, architecture):
    # The second turns its queries by position instead of adding to the tokens: no weight depends on the grid.
    save_encoder(tmp_path / "vit", architecture, img_size=32, embed_dim=48, depth=1, num_heads=2)
    fingerprints = {FrozenEncoder(str(tmp_path / "vit"), grid).fingerprint for grid in (2, 3)}
    assert len(fingerprints) == 2


# ---- errors ----

@pytest.mark.parametrize("name", ["dinov2", "no/such/folder", "", "vit_tiny_patch16_224.no_such_weights"])
def test_unknown_encoder(name):
    with pytest.raises(ValueError, match=f"encoder {name!r}"):
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
    weights = {name: tensor for name, tensor in timm.create_model("test_vit").state_dict().items()
               if missing and not name.startswith(missing)}
    save_file(weights or {"something.else": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="weights of encoder 'test_vit' could not be loaded"):
        FrozenEncoder("test_vit", 4, str(tmp_path / "weights.safetensors"))


# The second has patches as well, but merges them, and its output is no list of tokens.
@pytest.mark.parametrize("architecture, arguments", [("test_resnet", {}), ("swin_tiny_patch4_window7_224", dict(
    img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2)))])
def test_models_that_are_no_vision_transformers(tmp_path, architecture, arguments):
    save_encoder(tmp_path / "model", architecture, **arguments)
    with pytest.raises(ValueError, match="plain vision transformer"):
        FrozenEncoder(str(tmp_path / "model"), 8)


# ---- pixels ----

def test_pixels_come_back_exactly():
    levels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    pixels = load_autoencoder("pixels")
    assert (pixels.channels, pixels.downsampling) == (3, 1)
    x = pixels.encode(levels)
    assert x.dtype == torch.float32 and x.shape == levels.shape
    assert (x.min(), x.max()) == (-1, 1)
    np.testing.assert_allclose(x[0, 0].flatten().numpy(), np.arange(256) / 127.5 - 1, atol=1e-7)
    for latents in (x, x.double()):                                    # the samplers' state is float64
        assert torch.equal(pixels.decode(latents), levels)


def test_pixels_are_rounded_and_clipped():
    decode = load_autoencoder("pixels").decode
    levels = torch.arange(256).double()
    for shift in (-0.49, 0.49):
        assert torch.equal(decode((levels + shift) / 127.5 - 1), levels.to(torch.uint8))
    assert decode(torch.tensor([-1.5, -40.0, 1.5, 40.0])).tolist() == [0, 0, 255, 255]


def test_unknown_autoencoder():
    with pytest.raises(ValueError, match="autoencoder 'vae' is unknown.*pixels"):
        load_autoencoder("vae")
    assert all(type(load_autoencoder(name)) is kind for name, kind in AUTOENCODERS.items())

"""Latents against diffusers' own networks, with every scaling and rounding written out here; pixels as latents.

The autoencoders are diffusers' classes with few channels and random weights, saved as any other would be.
"""

import hashlib
import json
import re

import numpy as np
import pytest
import torch

from models import autoencoder as module
from models.autoencoder import HUB_NAMES, Latents, load_autoencoder
from tests.test_encoders import change_json, no_weights, photos, snapshot

import diffusers  # after models: see its docstring
import huggingface_hub
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_kl(folder, widths=(8, 16), **settings):
    """An AutoencoderKL in the folder format that `--autoencoder` takes. Returns diffusers' model."""
    down, up = (("DownEncoderBlock2D",) * len(widths), ("UpDecoderBlock2D",) * len(widths))
    blocks = dict(block_out_channels=widths, down_block_types=down, up_block_types=up, norm_num_groups=4)
    return saved(folder, diffusers.AutoencoderKL, **blocks, **settings)


def save_tiny(folder, levels=3, **settings):
    """The same of an AutoencoderTiny."""
    widths = dict(encoder_block_out_channels=(8,) * levels, decoder_block_out_channels=(8,) * levels)
    blocks = dict(num_encoder_blocks=(1,) * levels, num_decoder_blocks=(1,) * levels)
    return saved(folder, diffusers.AutoencoderTiny, **widths, **blocks, **settings)


def saved(folder, kind, **settings):
    torch.manual_seed(0)
    model = kind(**settings)
    for parameter in model.parameters():  # so that no part is idle, and that images have black and white
        torch.nn.init.normal_(parameter, std=0.8 if len(parameter) == 3 else 0.2)
    model.save_pretrained(folder)
    return model.eval()


def normal(*shape, seed=0, **options):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **options)


def assert_same_levels(got, x):
    """uint8 against [-1, 1] in the nearest of 256 levels, in float64.

    A value that lies between two levels may be rounded to either, since the two sides round differently before.
    """
    expected = np.rint(np.clip((x.double().numpy() + 1) / 2, 0, 1) * 255)
    assert got.dtype == torch.uint8 and got.shape == expected.shape
    difference = np.abs(got.numpy() - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    black, white = (expected == 0).mean(), (expected == 255).mean()
    assert 0.01 < black < 0.6 and 0.01 < white < 0.6  # or else neither end would be looked at


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    """Path of the folder and diffusers' model. The shift is what Stable Diffusion's has not, and others have."""
    folder = tmp_path_factory.mktemp("autoencoder") / "kl"
    return str(folder), save_kl(folder, scaling_factor=0.4, shift_factor=0.3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder") / "tiny"
    return str(folder), save_tiny(folder)


# ---- moments ----


@pytest.mark.parametrize("height, width", [(16, 16), (6, 20)])
@torch.no_grad()
def test_moments_are_mean_and_deviation_of_the_posterior(kl, height, width):
    folder, model = kl
    images = photos(3, height, width)
    x = images / 255 * 2 - 1
    posterior = model.encode(x).latent_dist
    got = load_autoencoder(folder).moments(images)
    assert got.shape == (3, 8, height // 2, width // 2) and got.dtype == torch.float32
    torch.testing.assert_close(got, torch.cat([posterior.mean, posterior.std], dim=1), rtol=1e-4, atol=1e-4)
    mean, log_variance = model.quant_conv(model.encoder(x)).chunk(2, dim=1)
    torch.testing.assert_close(got, torch.cat([mean, (log_variance / 2).exp()], dim=1), rtol=1e-4, atol=1e-4)


def test_deviations_are_clamped_and_fit_into_float16(tmp_path):
    model = save_kl(tmp_path)
    with torch.no_grad():
        model.quant_conv.bias[4:] = torch.tensor([-1000.0, 1000.0, 0.0, 0.0])
    model.save_pretrained(tmp_path)
    deviations = load_autoencoder(str(tmp_path)).moments(photos(1, 8, 8))[0, 4:]
    torch.testing.assert_close(deviations[0], torch.full((4, 4), np.exp(-15)), rtol=1e-5, atol=0)
    torch.testing.assert_close(deviations[1], torch.full((4, 4), np.exp(10)), rtol=1e-5, atol=0)
    assert deviations.half().isfinite().all() and (deviations.half() > 0).all()


@torch.no_grad()
def test_tiny_has_no_deviation(tiny):
    folder, model = tiny
    autoencoder, images = load_autoencoder(folder), photos(3, 8, 20)
    got = autoencoder.moments(images)
    assert got.shape == (3, 8, 2, 5) and got.dtype == torch.float32
    torch.testing.assert_close(got[:, :4], model.encode(images / 255 * 2 - 1).latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[:, :4], model.encoder.layers(images / 255), rtol=1e-4, atol=1e-4)  # TAESD's own
    assert (got[:, 4:] == 0).all()
    assert torch.equal(autoencoder.sample(got, normal(3, 4, 2, 5)), got[:, :4])
    for height, width in ((16, 18), (18, 16), (2, 2)):
        with pytest.raises(ValueError, match=f"tiny.* {height} x {width} pixels.* multiples of 4"):
            autoencoder.moments(photos(1, height, width))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_channels_and_downsampling(tmp_path, depth):
    save_kl(tmp_path / "kl", (8,) * depth, latent_channels=5)
    save_tiny(tmp_path / "tiny", depth, latent_channels=6)
    for folder, channels in (("kl", 5), ("tiny", 6)):
        autoencoder = load_autoencoder(str(tmp_path / folder))
        assert (autoencoder.channels, autoencoder.downsampling) == (channels, 2 ** (depth - 1))
        images = photos(2, 16, 8)
        moments = autoencoder.moments(images)
        assert moments.shape == (2, 2 * channels, 16 >> depth - 1, 8 >> depth - 1)
        assert autoencoder.decode(moments[:, :channels]).shape == images.shape


# ---- scale and shift ----


def test_scale_and_shift_are_of_the_config(tmp_path, kl, tiny):
    def scaling(folder):
        autoencoder = load_autoencoder(str(folder))
        return pytest.approx((autoencoder.scale.item(), autoencoder.shift.item()))

    assert scaling(kl[0]) == (0.4, 0.3)
    assert scaling(tiny[0]) == (1.0, 0.0)
    save_kl(tmp_path)
    assert scaling(tmp_path) == (0.18215, 0.0)
    # As Stable Diffusion's was published, before diffusers had these keys.
    config = json.loads((tmp_path / "config.json").read_text())
    new = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in config.keys() - new}))
    assert scaling(tmp_path) == (0.18215, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sample_is_the_closed_form(kl, dtype):
    moments = torch.cat([normal(3, 4, 2, 5, seed=1) * 5, normal(3, 4, 2, 5, seed=2).exp()], dim=1).to(dtype)
    noise = normal(3, 4, 2, 5, seed=3)
    got = load_autoencoder(kl[0]).sample(moments, noise)
    assert got.dtype == torch.float32
    mean, std = moments.double()[:, :4], moments.double()[:, 4:]
    torch.testing.assert_close(got.double(), (mean + std * noise.double() - 0.3) * 0.4, rtol=1e-6, atol=1e-6)


# ---- other classes of diffusers, their pipelines' arithmetic written out ----

BLOCKS = dict(
    block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
)  # fmt: skip
MEAN, STD = [0.3, -0.2, 0.1, 0.5], [0.5, 2.0, 1.5, 0.8]


def column(values):
    return torch.tensor(values).view(1, -1, 1, 1)


def save_dc(folder):
    half = dict(block_types=("ResBlock", "EfficientViTBlock"), block_out_channels=(8, 8), layers_per_block=(1, 1))
    half |= dict(qkv_multiscales=((), (5,)))
    both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in half.items()}
    model = saved(folder, diffusers.AutoencoderDC, latent_channels=4, attention_head_dim=2, scaling_factor=0.4, **both)
    return model, lambda x: model.encode(x).latent * 0.4, lambda z: model.decode(z / 0.4).sample


def save_means(folder):
    options = dict(BLOCKS, norm_num_groups=4, latents_mean=MEAN, latents_std=STD, scaling_factor=0.5)
    model = saved(folder, diffusers.AutoencoderKL, **options)
    return (
        model,
        lambda x: (model.encode(x).latent_dist.mean - column(MEAN)) * 0.5 / column(STD),
        lambda z: model.decode(z * column(STD) / 0.5 + column(MEAN)).sample,
    )


def save_flux2(folder):
    model = saved(folder, diffusers.AutoencoderKLFlux2, latent_channels=3, norm_num_groups=4, **BLOCKS)
    model.bn.running_mean.copy_(normal(12))
    model.bn.running_var.copy_(normal(12).exp())
    model.save_pretrained(folder)
    mean, std = column(model.bn.running_mean.tolist()), column((model.bn.running_var + 1e-4).sqrt().tolist())

    def encode(x):
        z = model.encode(x).latent_dist.mean
        b, c, h, w = z.shape
        z = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
        return (z - mean) / std

    def decode(z):
        z = z * std + mean
        b, c, h, w = z.shape
        z = z.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)
        return model.decode(z).sample

    return model, encode, decode


def save_qwen(folder):
    sizes = dict(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])
    model = saved(folder, diffusers.AutoencoderKLQwenImage, latents_mean=MEAN, latents_std=STD, **sizes)
    return (
        model,
        lambda x: (model.encode(x[:, :, None]).latent_dist.mean[:, :, 0] - column(MEAN)) / column(STD),
        lambda z: model.decode((z * column(STD) + column(MEAN))[:, :, None]).sample[:, :, 0],
    )


def save_rae(folder):
    encoder = dict(encoder_hidden_size=64, encoder_patch_size=4, encoder_num_hidden_layers=1, encoder_input_size=16)
    decoder = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    decoder = {f"decoder_{name}": value for name, value in decoder.items()}
    own = dict(latents_mean=[[[0.5]]] * 64, latents_std=[[[2.0]]] * 64, scaling_factor=0.5, patch_size=6)
    model = saved(folder, diffusers.AutoencoderRAE, **encoder, **decoder, **own)
    return (
        model,
        lambda x: model.encode((x + 1) / 2).latent,  # images in [0, 1]; it normalises by itself
        lambda z: 2 * model.decode(z).sample - 1,
    )


@pytest.mark.parametrize(
    "save, channels, downsampling, side",
    [
        (save_dc, 4, 2, 16),
        (save_means, 4, 2, 16),
        (save_flux2, 12, 4, 16),
        (save_qwen, 4, 2, 16),
        (save_rae, 64, 6, 24),
    ],
)
@torch.no_grad()
def test_other_classes(tmp_path, save, channels, downsampling, side):
    model, encode, decode = save(tmp_path)
    autoencoder, images = load_autoencoder(str(tmp_path)), photos(3, side, side)
    assert (autoencoder.channels, autoencoder.downsampling) == (channels, downsampling)
    moments = autoencoder.moments(images)
    mean, std = moments.chunk(2, dim=1)
    x = encode(images / 255 * 2 - 1)
    torch.testing.assert_close(autoencoder.sample(moments, torch.zeros_like(mean)), x, rtol=1e-4, atol=1e-4)
    noise = normal(*mean.shape, seed=4)
    assert (std.abs().max() > 0) == (save not in (save_dc, save_rae))  # these have no posterior
    drawn = autoencoder.sample(moments, noise)
    torch.testing.assert_close(drawn - x, std * noise * autoencoder.scale, rtol=1e-3, atol=1e-4)
    z = drawn / drawn.std() * 2
    expected = np.rint(np.clip((decode(z).numpy() + 1) / 2, 0, 1) * 255)
    got = autoencoder.decode(z).numpy()
    assert got.shape == images.shape and np.abs(got - expected).max() <= 1 and expected.std() > 5
    if save is save_rae:
        with pytest.raises(ValueError, match="takes images of 24 pixels alone, not 48 x 48"):
            autoencoder.moments(photos(1, 48, 48))


class LdmFormat:
    """Latent diffusion's autoencoder by its own names of weights: widths 32 and 64, one block in each level, attention
    in the lower one and in the middle."""

    def __init__(self):
        self.weights, self.made = {}, torch.Generator().manual_seed(0)
        self.encode(torch.zeros(1, 3, 8, 8)), self.decode(torch.zeros(1, 4, 4, 4))  # makes the weights

    def of(self, name, *shape):
        if name not in self.weights:
            self.weights[name] = torch.randn(shape, generator=self.made) * (0.5 if len(shape) == 1 else 0.1)
        return self.weights[name]

    def conv(self, x, name, out, size=3, **options):
        weight, bias = self.of(f"{name}.weight", out, x.shape[1], size, size), self.of(f"{name}.bias", out)
        return torch.nn.functional.conv2d(x, weight, bias, **options)

    def norm(self, x, name):
        affine = [self.of(f"{name}.{part}", x.shape[1]) for part in ("weight", "bias")]
        return torch.nn.functional.group_norm(x, 32, *affine, eps=1e-6)

    def act(self, x, name):
        x = self.norm(x, name)
        return x * x.sigmoid()

    def block(self, x, name, out):
        h = self.conv(self.act(x, f"{name}.norm1"), f"{name}.conv1", out, padding=1)
        h = self.conv(self.act(h, f"{name}.norm2"), f"{name}.conv2", out, padding=1)
        return h + (x if x.shape[1] == out else self.conv(x, f"{name}.nin_shortcut", out, 1))

    def attend(self, x, name):
        h, (b, c, *size) = self.norm(x, f"{name}.norm"), x.shape
        q, k, v = (self.conv(h, f"{name}.{part}", c, 1).flatten(2) for part in "qkv")  # (b, c, pixels)
        weights = (q.transpose(1, 2) @ k / c**0.5).softmax(-1)
        return x + self.conv((v @ weights.transpose(1, 2)).view(b, c, *size), f"{name}.proj_out", c, 1)

    def middle(self, x, name):
        x = self.attend(self.block(x, f"{name}.mid.block_1", 64), f"{name}.mid.attn_1")
        return self.block(x, f"{name}.mid.block_2", 64)

    def encode(self, x):
        h = self.block(self.conv(x, "encoder.conv_in", 32, padding=1), "encoder.down.0.block.0", 32)
        h = self.conv(torch.nn.functional.pad(h, (0, 1, 0, 1)), "encoder.down.0.downsample.conv", 32, stride=2)
        h = self.attend(self.block(h, "encoder.down.1.block.0", 64), "encoder.down.1.attn.0")
        h = self.conv(self.act(self.middle(h, "encoder"), "encoder.norm_out"), "encoder.conv_out", 8, padding=1)
        mean, log_variance = self.conv(h, "quant_conv", 8, 1).chunk(2, dim=1)
        return torch.cat([mean, (log_variance / 2).exp()], dim=1)

    def decode(self, z):
        h = self.conv(self.conv(z, "post_quant_conv", 4, 1), "decoder.conv_in", 64, padding=1)
        h = self.middle(h, "decoder")
        for j in range(2):
            h = self.attend(self.block(h, f"decoder.up.1.block.{j}", 64), f"decoder.up.1.attn.{j}")
        h = h.repeat_interleave(2, -1).repeat_interleave(2, -2)
        h = self.conv(h, "decoder.up.1.upsample.conv", 64, padding=1)
        for j in range(2):
            h = self.block(h, f"decoder.up.0.block.{j}", 32)
        return self.conv(self.act(h, "decoder.norm_out"), "decoder.conv_out", 3, padding=1)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@torch.no_grad()
def test_files_of_latent_diffusion(tmp_path, suffix):
    ldm, path, images = LdmFormat(), tmp_path / f"vavae{suffix}", photos(3, 16, 24)
    weights = {**ldm.weights, "loss.discriminator.weight": torch.zeros(3), "linear_proj.weight": torch.zeros(2, 2)}
    save_file(weights, path) if suffix == ".safetensors" else torch.save({"state_dict": weights}, path)
    with pytest.raises(ValueError, match="scaling_factor = None; .* let `dataset.prepare --statistics` measure it"):
        load_autoencoder(str(path))
    autoencoder = load_autoencoder(str(path), normalised=False)
    assert (autoencoder.channels, autoencoder.downsampling) == (4, 2)
    moments = ldm.encode(images / 255 * 2 - 1)
    torch.testing.assert_close(autoencoder.moments(images), moments, rtol=1e-3, atol=1e-3)
    decoded = ldm.decode(moments[:, :4])
    expected = np.rint(np.clip((decoded.numpy() + 1) / 2, 0, 1) * 255)
    assert np.abs(autoencoder.decode(moments[:, :4]).numpy() - expected).max() <= 1 and expected.std() > 5
    del weights["decoder.up.0.block.1.conv2.bias"]
    torch.save(weights, tmp_path / "half.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    for name, why in (("half", "Missing key"), ("other", "it has no weights encoder.down"), ("none", "")):
        with pytest.raises(ValueError, match=f"{name}.pt' could not be loaded .*{why}.*; give a file with latent"):
            load_autoencoder(str(tmp_path / f"{name}.pt"))


def test_what_cannot_encode_an_image(tmp_path):
    saved(tmp_path, diffusers.AutoencoderOobleck, encoder_hidden_size=8, downsampling_ratios=[2], channel_multiples=[1])
    with pytest.raises(ValueError, match="of class AutoencoderOobleck, cannot encode and decode an image of 128"):
        load_autoencoder(str(tmp_path))
    blocks = dict(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2)
    saved(tmp_path / "video", diffusers.AutoencoderKLTemporalDecoder, **blocks)
    with pytest.raises(ValueError, match="of class AutoencoderKLTemporalDecoder, cannot .*num_frames"):
        load_autoencoder(str(tmp_path / "video"))


def test_what_a_class_scales_by_itself_is_part_of_its_content(tmp_path):
    save_rae(tmp_path)
    before = load_autoencoder(str(tmp_path))
    change_json(tmp_path / "config.json", scaling_factor=1.0)
    after = load_autoencoder(str(tmp_path))
    assert before.content != after.content and before.fingerprint != after.fingerprint


# ---- decoding ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the samplers' state is float64
@torch.no_grad()
def test_decode_is_diffusers_after_the_scaling_is_undone(kl, dtype):
    folder, model = kl
    autoencoder, x = load_autoencoder(folder), normal(5, 4, 6, 10, dtype=dtype)
    assert_same_levels(autoencoder.decode(x), model.decode((x / 0.4 + 0.3).float()).sample)
    moments, noise = autoencoder.moments(photos(4, 12, 20)), normal(4, 4, 6, 10)
    expected = model.decode(moments[:, :4] + moments[:, 4:] * noise).sample
    assert_same_levels(autoencoder.decode(autoencoder.sample(moments, noise).to(dtype)), expected)


@torch.no_grad()
def test_tiny_decodes_scaled_latents(tiny):
    folder, model = tiny
    x = normal(5, 4, 4, 6) * 2
    got = load_autoencoder(folder).decode(x)
    assert_same_levels(got, model.decode(x).sample)
    assert_same_levels(got, model.decoder.layers(3 * torch.tanh(x / 3)) * 2 - 1)  # TAESD's own


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_decode_is_the_same_in_any_chunks(request, monkeypatch, kind):
    autoencoder = load_autoencoder(request.getfixturevalue(kind)[0])
    x = normal(2 * module.DECODED_AT_ONCE + 1, 4, 4, 4)
    batches = []
    autoencoder.model.decoder.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    expected = autoencoder.decode(x)
    assert batches == [module.DECODED_AT_ONCE] * 2 + [1] and module.DECODED_AT_ONCE <= 16
    assert len(expected.flatten(1).unique(dim=0)) == len(x)
    for at_once in (1, 3, 100):
        batches.clear()
        monkeypatch.setattr(module, "DECODED_AT_ONCE", at_once)
        assert (autoencoder.decode(x).int() - expected.int()).abs().max() <= 1
        assert sum(batches) == len(x) and max(batches) == min(at_once, len(x))


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_frozen_and_under_bf16_autocast(request, kind):
    autoencoder = load_autoencoder(request.getfixturevalue(kind)[0])
    assert not any(part.training for part in autoencoder.modules()) and autoencoder.to("cpu") is autoencoder
    assert len(list(autoencoder.parameters())) > 20
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())
    recorded = []
    for part in (autoencoder.model.encoder, autoencoder.model.decoder):
        part.register_forward_hook(lambda *arguments: recorded.append(torch.is_grad_enabled()))
    images, x = photos(3, 8, 8), normal(3, 4, 4, 4).requires_grad_()
    moments, decoded = autoencoder.moments(images), autoencoder.decode(x)
    assert recorded == [False, False]
    with torch.autocast("cpu", torch.bfloat16):
        half_moments, half_decoded = autoencoder.moments(images), autoencoder.decode(x)
    assert half_moments.dtype == torch.float32 and half_decoded.dtype == torch.uint8
    assert 0 < (half_moments - moments).norm() / moments.norm() < 0.03
    assert 0 < (half_decoded.float() - decoded.float()).abs().mean() < 4


# ---- loading ----


def test_attention_names_of_published_weights(tmp_path):
    """Stable Diffusion's files have the names that diffusers gave to attention at first."""
    model = save_kl(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights, renamed = {}, 0
    for name, tensor in load_file(tmp_path / WEIGHTS).items():
        for new in old:
            renamed += f".{new}." in name
            name = name.replace(f".{new}.", f".{old[new]}.")
        weights[name] = tensor
    assert renamed == 2 * 4 * 2  # encoder and decoder, weight and bias
    save_file(weights, tmp_path / WEIGHTS)
    loaded = load_autoencoder(str(tmp_path)).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_in_pytorchs_format_and_in_half_precision(tmp_path, tiny):
    """Neither the place nor the format changes the fingerprint, nor does the type in which numbers are stored."""
    tiny[1].save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / WEIGHTS).exists()
    assert load_autoencoder(str(tmp_path)).fingerprint == load_autoencoder(tiny[0]).fingerprint
    fingerprints = set()
    for half in (True, False):
        model = save_tiny(tmp_path / "tiny").half()
        (model if half else model.float()).save_pretrained(tmp_path / "tiny")
        stored = load_file(tmp_path / "tiny" / WEIGHTS).values()
        assert {tensor.dtype for tensor in stored} == {torch.float16 if half else torch.float32}
        autoencoder = load_autoencoder(str(tmp_path / "tiny"))
        assert {tensor.dtype for tensor in autoencoder.state_dict().values()} == {torch.float32}
        fingerprints.add(autoencoder.fingerprint)
    assert len(fingerprints) == 1


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")  # diffusers' way of asking the hub
@pytest.mark.parametrize(
    "name, repository",
    [
        ("sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse"),
        ("sd-vae-ft-ema", "stabilityai/sd-vae-ft-ema"),
        ("taesd", "madebyollin/taesd"),
        ("some-owner/vae.v2", "some-owner/vae.v2"),
    ],
)
def test_hub_names_are_read_from_the_cache(tmp_path, monkeypatch, tiny, name, repository):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    if name in HUB_NAMES:
        (tmp_path / name).mkdir()  # an alias is the same wherever one is
    with pytest.raises(ValueError) as error:
        load_autoencoder(name)
    for part in (repr(name), *HUB_NAMES, "OWNER/NAME", f"hf download {repository} --local-dir", "HF_HUB_OFFLINE=1"):
        assert part in str(error.value)
    tiny[1].save_pretrained(snapshot(tmp_path, repository))
    autoencoder = load_autoencoder(name)
    assert autoencoder.name == name and autoencoder.fingerprint == load_autoencoder(tiny[0]).fingerprint


@pytest.mark.parametrize(
    "kind, name, scaling", [("kl", "AutoencoderKL", "0.4, 0.3"), ("tiny", "AutoencoderTiny", "1.0, 0.0")]
)
def test_fingerprint_by_its_definition(request, kind, name, scaling):
    """Of every weight and the class, what moments depend on; and of these, the scale and the shift."""
    folder, model = request.getfixturevalue(kind)

    def of(identity):
        digest = hashlib.sha256(identity.encode())
        for weight, tensor in model.state_dict().items():
            digest.update(f"{weight} {tuple(tensor.shape)} torch.float32".encode() + tensor.numpy().tobytes())
        return digest.hexdigest()[:12]

    for found in (load_autoencoder(folder), Latents("another name", model, {})):
        assert (found.content, found.fingerprint) == tuple(map(of, (f"{name} ", f"('{name}', {scaling})")))


# ---- errors ----


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")
@pytest.mark.parametrize("name", ["vae", "", "no/such/folder"])
def test_unknown_name(name):
    with pytest.raises(
        ValueError, match=f"autoencoder {name!r} could .* of pixels, sd-.* OWNER/NAME .* save_pretrained"
    ):
        load_autoencoder(name)


@pytest.mark.parametrize(
    "config, match",
    [
        ('{"_class_name": "UNet2DModel"}', "UNet2DModel, is no autoencoder of diffusers"),
        ("not json", "could not be loaded.*JSON"),
        (None, "could not be loaded.*config.json"),
    ],
)
def test_folder_of_something_else(tmp_path, config, match):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=f"^autoencoder '{tmp_path}' .*{match}.*save_pretrained; .* the folder `vae`$"):
        load_autoencoder(str(tmp_path))


@pytest.mark.parametrize(
    "save, key, value, match",
    [
        (save_kl, "in_channels", 1, "only 3 is understood"),
        (save_kl, "latents_mean", [0.5] * 4, "needed are both"),
        (save_tiny, "upsampling_scaling_factor", 4, "only 2 is understood"),
        (save_kl, "scaling_factor", 0, "config.json"),
    ],
)
def test_settings_that_are_not_understood(tmp_path, save, key, value, match):
    save(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=f"{tmp_path.name}.* {key} = {re.escape(str(value))}[,; ].*{match}"):
        load_autoencoder(str(tmp_path))


# diffusers fills up what is missing with random weights, and leaves out what it does not know.
@pytest.mark.parametrize(
    "save, name, tensor, match",
    [
        (save_tiny, "encoder.layers.0.bias", None, "1 weights are missing .*such as encoder.layers.0.bias"),
        (save_tiny, "more", torch.zeros(1), "1 weights are missing or unknown .*, such as more"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, save, name, tensor, match):
    save(tmp_path)
    weights = load_file(tmp_path / WEIGHTS) | {name: tensor}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"^autoencoder '{tmp_path}' could not be loaded .*{match}.*save_pretrained"):
        load_autoencoder(str(tmp_path))


def test_weights_of_another_kind_and_code_that_comes_with_them(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    change_json(tmp_path / "config.json", auto_map={"AutoModel": "own.Model", "AutoencoderTiny": "own.Model"})
    load_autoencoder(str(tmp_path))
    (tmp_path / WEIGHTS).unlink()
    for content in (None, *no_weights(tmp_path / "ran")):
        if content is not None:
            (tmp_path / "diffusion_pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=f"^autoencoder '{tmp_path}' could not be loaded .*save_pretrained.*$"):
            load_autoencoder(str(tmp_path))
    change_json(tmp_path / "config.json", _class_name="Model")
    with pytest.raises(ValueError, match="its class by config.json, Model, is no autoencoder"):
        load_autoencoder(str(tmp_path))
    assert not (tmp_path / "ran").exists()


# ---- pixels ----


def test_pixels_come_back_exactly():
    every = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    pixels = load_autoencoder("pixels")
    assert (pixels.name, pixels.fingerprint, pixels.channels, pixels.downsampling) == ("pixels", "pixels", 3, 1)
    assert pixels.to("cpu") is pixels and not hasattr(pixels, "moments")
    x = pixels.encode(every)
    assert x.dtype == torch.float32 and x.shape == every.shape
    assert (x.min(), x.max()) == (-1, 1)
    np.testing.assert_allclose(x[0, 0].flatten().numpy(), np.arange(256) / 127.5 - 1, atol=1e-7)
    for latents in (x, x.double()):  # the samplers' state is float64
        assert torch.equal(pixels.decode(latents), every)
    for shift in (-0.49, 0.49):
        assert torch.equal(pixels.decode((every.double() + shift) / 127.5 - 1), every)
    assert pixels.decode(torch.tensor([-1.5, -40.0, 1.5, 40.0])).tolist() == [0, 0, 255, 255]

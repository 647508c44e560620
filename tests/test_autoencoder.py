"""Latents against diffusers' own networks, with every scaling and rounding written out here; pixels as latents.

The autoencoders are diffusers' classes with few channels and random weights, saved as any other would be.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from models import autoencoder as module
from models.autoencoder import HUB_NAMES, Latents, load_autoencoder
from tests.conftest import ROOT

import diffusers  # after models: see its docstring
import huggingface_hub
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_kl(folder, widths=(8, 16), seed=0, **settings):
    """An AutoencoderKL in the folder format that `--autoencoder` takes. Returns diffusers' model."""
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        norm_num_groups=4,
        **settings,
    )
    return saved(model, folder)


def save_tiny(folder, levels=3, seed=0, **settings):
    """The same of an AutoencoderTiny."""
    torch.manual_seed(seed)
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * levels,
        num_encoder_blocks=(1,) * levels,
        decoder_block_out_channels=(8,) * levels,
        num_decoder_blocks=(1,) * levels,
        **settings,
    )
    return saved(model, folder)


def saved(model, folder):
    for parameter in model.parameters():  # so that no part is idle, and that images have black and white
        torch.nn.init.normal_(parameter, std=0.8 if len(parameter) == 3 else 0.2)
    model.save_pretrained(folder)
    return model.eval()


def change_config(folder, **changes):
    """None takes a key away."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def photos(count, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def normal(*shape, seed=0, **options):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **options)


def levels(x):
    """[-1, 1] -> the nearest of 256 levels, in float64."""
    return np.rint(np.clip((x.double().numpy() + 1) / 2, 0, 1) * 255)


def assert_same_levels(got, expected):
    """A value that lies between two levels may be rounded to either, since the two sides round differently before."""
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
    torch.testing.assert_close(got[:, :4], posterior.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[:, 4:], posterior.std, rtol=1e-4, atol=1e-4)
    mean, log_variance = model.quant_conv(model.encoder(x)).chunk(2, dim=1)
    torch.testing.assert_close(got[:, :4], mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[:, 4:], (log_variance / 2).exp(), rtol=1e-4, atol=1e-4)


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
    images = photos(3, 8, 20)
    got = load_autoencoder(folder).moments(images)
    assert got.shape == (3, 8, 2, 5) and got.dtype == torch.float32
    torch.testing.assert_close(got[:, :4], model.encode(images / 255 * 2 - 1).latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[:, :4], model.encoder.layers(images / 255), rtol=1e-4, atol=1e-4)  # TAESD's own
    assert (got[:, 4:] == 0).all()


@pytest.mark.parametrize("height, width", [(16, 18), (18, 16), (2, 2)])
def test_sizes_that_latents_do_not_divide(tiny, height, width):
    autoencoder = load_autoencoder(tiny[0])
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
        return autoencoder.scale, autoencoder.shift

    assert scaling(kl[0]) == (0.4, 0.3)
    assert scaling(tiny[0]) == (1.0, 0.0)
    save_kl(tmp_path)
    assert scaling(tmp_path) == (0.18215, 0.0)
    # As Stable Diffusion's was published, before diffusers had these keys.
    change_config(tmp_path, scaling_factor=None, shift_factor=None, latents_mean=None, latents_std=None)
    assert scaling(tmp_path) == (0.18215, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sample_is_the_closed_form(kl, dtype):
    moments = torch.cat([normal(3, 4, 2, 5, seed=1) * 5, normal(3, 4, 2, 5, seed=2).exp()], dim=1).to(dtype)
    noise = normal(3, 4, 2, 5, seed=3)
    got = load_autoencoder(kl[0]).sample(moments, noise)
    assert got.dtype == torch.float32
    mean, std = moments.double()[:, :4], moments.double()[:, 4:]
    torch.testing.assert_close(got.double(), (mean + std * noise.double() - 0.3) * 0.4, rtol=1e-6, atol=1e-6)


def test_sample_has_the_statistics_of_the_posterior(kl):
    mean, std = torch.tensor([-3.0, 0.0, 1.0, 20.0]), torch.tensor([0.01, 1.0, 2.0, 0.5])
    moments = torch.cat([mean, std]).view(1, 8, 1, 1).expand(40000, 8, 1, 1).half()
    draws = load_autoencoder(kl[0]).sample(moments, normal(40000, 4, 1, 1))[..., 0, 0]
    error = 5 * std * 0.4 / 40000**0.5
    assert ((draws.mean(0) - (mean - 0.3) * 0.4).abs() < error).all()
    assert ((draws.std(0) - std * 0.4).abs() < error).all()


def test_sample_of_tiny_is_its_mean(tiny):
    autoencoder = load_autoencoder(tiny[0])
    moments = autoencoder.moments(photos(2, 8, 8))
    assert torch.equal(autoencoder.sample(moments, normal(2, 4, 2, 2)), moments[:, :4])


# ---- decoding ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the samplers' state is float64
@torch.no_grad()
def test_decode_is_diffusers_after_the_scaling_is_undone(kl, dtype):
    folder, model = kl
    x = normal(5, 4, 6, 10, dtype=dtype)
    expected = model.decode((x / 0.4 + 0.3).float()).sample
    assert_same_levels(load_autoencoder(folder).decode(x), levels(expected))


@torch.no_grad()
def test_decode_inverts_what_sample_did(kl):
    folder, model = kl
    autoencoder = load_autoencoder(folder)
    moments, noise = autoencoder.moments(photos(4, 12, 20)), normal(4, 4, 6, 10)
    expected = model.decode(moments[:, :4] + moments[:, 4:] * noise).sample
    assert_same_levels(autoencoder.decode(autoencoder.sample(moments, noise)), levels(expected))


@torch.no_grad()
def test_tiny_decodes_scaled_latents(tiny):
    folder, model = tiny
    x = normal(5, 4, 4, 6) * 2
    got = load_autoencoder(folder).decode(x)
    assert_same_levels(got, levels(model.decode(x).sample))
    assert_same_levels(got, levels(model.decoder.layers(3 * torch.tanh(x / 3)) * 2 - 1))  # TAESD's own


@pytest.mark.parametrize("kind", ["kl", "tiny"])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_decode_is_the_same_in_any_chunks(request, monkeypatch, kind, at_once):
    autoencoder = load_autoencoder(request.getfixturevalue(kind)[0])
    x = normal(2 * module.DECODED_AT_ONCE + 1, 4, 4, 4)
    batches = []
    autoencoder.model.decoder.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    expected = autoencoder.decode(x)
    assert batches == [module.DECODED_AT_ONCE] * 2 + [1] and module.DECODED_AT_ONCE <= 16
    assert len(expected.flatten(1).unique(dim=0)) == len(x)
    batches.clear()
    monkeypatch.setattr(module, "DECODED_AT_ONCE", at_once)
    assert (autoencoder.decode(x).int() - expected.int()).abs().max() <= 1
    assert sum(batches) == len(x) and max(batches) == min(at_once, len(x))


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_bf16_autocast(request, kind):
    autoencoder = load_autoencoder(request.getfixturevalue(kind)[0])
    images, x = photos(3, 8, 8), normal(3, 4, 4, 4)
    moments, decoded = autoencoder.moments(images), autoencoder.decode(x)
    with torch.autocast("cpu", torch.bfloat16):
        half_moments, half_decoded = autoencoder.moments(images), autoencoder.decode(x)
    assert half_moments.dtype == torch.float32 and half_decoded.dtype == torch.uint8
    assert 0 < (half_moments - moments).norm() / moments.norm() < 0.03
    assert 0 < (half_decoded.float() - decoded.float()).abs().mean() < 4


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_frozen(request, kind):
    autoencoder = load_autoencoder(request.getfixturevalue(kind)[0])
    assert not any(part.training for part in autoencoder.modules())
    assert len(list(autoencoder.parameters())) > 20
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())
    assert autoencoder.to("cpu") is autoencoder
    recorded = []
    for part in (autoencoder.model.encoder, autoencoder.model.decoder):
        part.register_forward_hook(lambda *arguments: recorded.append(torch.is_grad_enabled()))
    with torch.enable_grad():
        assert not autoencoder.moments(photos(1, 8, 8)).requires_grad
        autoencoder.decode(normal(1, 4, 4, 4).requires_grad_())
    assert recorded == [False, False]


# ---- loading ----


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_name_is_as_given(request, monkeypatch, tmp_path, kind):
    folder = request.getfixturevalue(kind)[0]
    monkeypatch.chdir(os.path.dirname(folder))
    for name in (folder, kind, f"./{kind}"):
        assert load_autoencoder(name).name == name


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


def test_weights_in_pytorchs_format(tmp_path, tiny):
    tiny[1].save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / WEIGHTS).exists()
    assert load_autoencoder(str(tmp_path)).fingerprint == load_autoencoder(tiny[0]).fingerprint


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")  # diffusers' way of asking the hub
@pytest.mark.parametrize("name, repository", [*HUB_NAMES.items(), ("some-owner/vae.v2", "some-owner/vae.v2")])
def test_hub_names_are_read_from_the_cache(tmp_path, monkeypatch, name, repository):
    snapshot = tmp_path / ("models--" + repository.replace("/", "--")) / "snapshots" / ("0" * 40)
    (save_tiny if "taesd" in name else save_kl)(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr(module, "go_offline_if_unreachable", lambda: asked.append(True))
    if name in HUB_NAMES:
        (tmp_path / name).mkdir()  # an alias is the same wherever one is
    monkeypatch.chdir(tmp_path)
    autoencoder = load_autoencoder(name)
    assert autoencoder.name == name and asked == [True]
    assert autoencoder.fingerprint == load_autoencoder(str(snapshot)).fingerprint
    assert asked == [True]  # a folder does not need the hub


def test_aliases():
    assert HUB_NAMES == {
        "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse",
        "sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema",
        "taesd": "madebyollin/taesd",
    }


# ---- fingerprint ----


def test_fingerprint_does_not_follow_place_name_or_type(tmp_path, kl):
    folder, model = kl
    autoencoder = load_autoencoder(folder)
    original = autoencoder.fingerprint
    assert len(original) == 12 and int(original, 16) >= 0
    assert autoencoder.to(torch.bfloat16).to(torch.float32).fingerprint == original
    model.save_pretrained(tmp_path / "another name")
    assert load_autoencoder(str(tmp_path / "another name")).fingerprint == original

    fingerprints = set()
    for half in (True, False):  # the same numbers stored in two types
        model = save_tiny(tmp_path / "tiny").half()
        (model if half else model.float()).save_pretrained(tmp_path / "tiny")
        stored = load_file(tmp_path / "tiny" / WEIGHTS).values()
        assert {tensor.dtype for tensor in stored} == {torch.float16 if half else torch.float32}
        autoencoder = load_autoencoder(str(tmp_path / "tiny"))
        assert {tensor.dtype for tensor in autoencoder.state_dict().values()} == {torch.float32}
        fingerprints.add(autoencoder.fingerprint)
    assert len(fingerprints) == 1


@pytest.mark.parametrize("save", [save_kl, save_tiny])
def test_fingerprint_follows_every_weight(tmp_path, save):
    model = save(tmp_path)
    fingerprints = {load_autoencoder(str(tmp_path)).fingerprint}
    for tensor in model.state_dict().values():
        value = tensor.flatten()[-1].item()
        tensor.view(-1)[-1] += 1e-5
        fingerprints.add(Latents("", model).fingerprint)
        tensor.view(-1)[-1] = value
    assert len(fingerprints) == 1 + len(model.state_dict())
    assert Latents("", model).fingerprint in fingerprints


@pytest.mark.parametrize("save", [save_kl, save_tiny])
def test_fingerprint_follows_scale_shift_and_class(tmp_path, save):
    model = save(tmp_path)
    fingerprints = [load_autoencoder(str(tmp_path)).fingerprint]
    for change in ({"scaling_factor": 0.5}, {"shift_factor": 0.5}, {"shift_factor": 0.25}):
        change_config(tmp_path, **change)
        fingerprints.append(load_autoencoder(str(tmp_path)).fingerprint)
    fingerprints.append(Latents("", model).fingerprint)
    assert fingerprints.pop() == fingerprints[0]
    model.__class__ = type("Another", (type(model),), {})
    fingerprints.append(Latents("", model).fingerprint)
    assert len(set(fingerprints)) == 5


# ---- errors ----


@pytest.mark.parametrize(
    "name",
    ["vae", "", "no/such/folder", "/no/such", "./vae", "../vae", "owner/", "owner/na me", "hf://owner/name", "Pixels"],
)
def test_unknown_name(name):
    with pytest.raises(ValueError) as error:
        load_autoencoder(name)
    for part in (repr(name), "pixels", *HUB_NAMES, "save_pretrained", "OWNER/NAME"):
        assert part in str(error.value)


def test_folder_without_config(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*without config.json.*save_pretrained.*`vae`"):
        load_autoencoder(str(tmp_path))


@pytest.mark.parametrize(
    "config, match",
    [
        ('{"_class_name": "UNet2DModel"}', "is of class UNet2DModel.* only AutoencoderKL and AutoencoderTiny"),
        ('{"_class_name": "AsymmetricAutoencoderKL"}', "is of class AsymmetricAutoencoderKL"),
        ("{}", "is of class None"),
        ("[]", "could not be loaded.*save_pretrained"),
        ("not json", "could not be loaded.*JSON.*save_pretrained"),
    ],
)
def test_folder_of_something_else(tmp_path, config, match):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=f"autoencoder .*{tmp_path.name}.*{match}"):
        load_autoencoder(str(tmp_path))


@pytest.mark.parametrize(
    "save, settings",
    [
        (save_kl, {"in_channels": 1}),
        (save_kl, {"out_channels": 4}),
        (save_tiny, {"out_channels": 1}),
        (save_kl, {"latents_mean": [0.5] * 4}),
        (save_kl, {"latents_std": [0.5] * 4}),
        (save_tiny, {"upsampling_scaling_factor": 4}),
    ],
)
def test_settings_that_are_not_understood(tmp_path, save, settings):
    save(tmp_path, **settings)
    ((key, value),) = settings.items()
    with pytest.raises(ValueError) as error:
        load_autoencoder(str(tmp_path))
    assert f"{key} = {value}" in str(error.value) and tmp_path.name in str(error.value)


@pytest.mark.parametrize("value", [0, None])
def test_scale_that_is_none(tmp_path, value):
    save_kl(tmp_path, scaling_factor=value)
    with pytest.raises(ValueError, match=f"{tmp_path.name}.* scaling_factor = {value}; .*config.json"):
        load_autoencoder(str(tmp_path))


def test_folder_without_weights(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"{tmp_path.name}.* could not be loaded .*save_pretrained"):
        load_autoencoder(str(tmp_path))


def test_weights_that_are_damaged(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"junk")
    with pytest.raises(ValueError, match=f"{tmp_path.name}.* could not be loaded .*save_pretrained"):
        load_autoencoder(str(tmp_path))


# diffusers fills up what is missing with random weights, and leaves out what it does not know.
@pytest.mark.parametrize(
    "save, change, match",
    [
        (
            save_kl,
            lambda weights: weights.pop("decoder.conv_out.bias"),
            "1 are missing .*such as decoder.conv_out.bias",
        ),
        (
            save_tiny,
            lambda weights: weights.pop("encoder.layers.0.bias"),
            "1 are missing .*such as encoder.layers.0.bias",
        ),
        (save_tiny, lambda weights: weights.update(more=torch.zeros(1)), "1 are missing or unknown, such as more"),
        (save_tiny, lambda weights: weights.update({"encoder.layers.0.bias": torch.zeros(9)}), "could not be loaded"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, save, change, match):
    save(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    change(weights)
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"(?s)autoencoder .*{tmp_path.name}.*{match}.*save_pretrained"):
        load_autoencoder(str(tmp_path))


def test_without_network_hub_names_fail_soon_and_say_what_to_do(tmp_path):
    """In a process of its own, which has not asked the hub before; on the way, pixels without diffusers."""
    program = """if True:
        import sys, time
        from models.autoencoder import HUB_NAMES, load_autoencoder
        load_autoencoder("pixels")
        assert "diffusers" not in sys.modules
        from diffusers import AutoencoderKL, AutoencoderTiny            # whose slow import is not to be timed
        for name in [*HUB_NAMES, "owner/name"]:
            start = time.perf_counter()
            try:
                load_autoencoder(name)
            except ValueError as error:
                print(f"{time.perf_counter() - start:.2f}", " ".join(str(error).split()))
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(HUB_NAMES) + 1, done.stderr
    for line, name in zip(lines, [*HUB_NAMES, "owner/name"]):
        assert float(line.split()[0]) < 10
        assert repr(name) in line and "cannot be reached" in line
        assert f"hf download {HUB_NAMES.get(name, name)} --local-dir FOLDER" in line


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


def test_pixels_are_rounded_and_clipped():
    decode = load_autoencoder("pixels").decode
    every = torch.arange(256).double()
    for shift in (-0.49, 0.49):
        assert torch.equal(decode((every + shift) / 127.5 - 1), every.to(torch.uint8))
    assert decode(torch.tensor([-1.5, -40.0, 1.5, 40.0])).tolist() == [0, 0, 255, 255]

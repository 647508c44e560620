"""The networks that judge, with random weights that travel through the same options as the published ones."""

import json
import pickle
import socket
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import models  # noqa: F401 - before timm: see its docstring
import timm
from timm.models import save_for_hf

from eval import features, metrics
from eval.features import DinoV2Features, InceptionFeatures, PooledFeatures
from tests.conftest import save_tiny_encoder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file like the published one, with random numbers that keep the activations' size from layer to layer."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.manual_seed(0)
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = InceptionFeatures(path).network
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    network.fc.weight *= 20
    # Half the size on disk; what matters is that it is the same for all.
    torch.save({name: value.half() for name, value in network.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def network(weights):
    return InceptionFeatures(weights)


def images(count, size=12, seed=0):
    """Smooth random images, each of its own colour: uint8 (count, 3, size, size)."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, size=(count, 3, 3, 3)))
    return nn.functional.interpolate(coarse, (size, size), mode="bilinear").to(torch.uint8)


def test_features_of_inception(network):
    seen = {}
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
        for name, module in {"block": network.network.Mixed_6d, "pool": network.network.AvgPool}.items()
    ]
    with torch.autocast("cpu", torch.bfloat16):
        found = network(images(2))
    for hook in hooks:
        hook.remove()
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        name: (2, dim) for name, dim in network.dims.items()
    }
    assert all(value.dtype == torch.float32 for value in found.values())
    assert found["pool3"].std() > 1e-3 and found["spatial"].std() > 1e-3
    # The block's first channels are those of its 1 x 1 branch; rows are flattened height, width, channel.
    block = seen["block"].numpy()
    spatial = [[block[i, c, y, x] for y in range(17) for x in range(17) for c in range(7)] for i in range(2)]
    np.testing.assert_array_equal(found["spatial"], np.array(spatial))
    np.testing.assert_array_equal(found["pool3"], seen["pool"].flatten(1))
    unbiased = found["pool3"].numpy() @ network.network.fc.weight.numpy().T
    assert network.network.fc.bias.abs().max() > 0
    np.testing.assert_allclose(found["logits"], unbiased, rtol=1e-4, atol=1e-4)


def test_images_of_any_size_and_either_format_of_weights(network, weights, tmp_path, monkeypatch):
    def checked(file, original=torch.load, **options):
        assert options["weights_only"] or not isinstance(file, str), "the library reads the user's file, code and all"
        return original(file, **options)

    save_file(torch.load(weights), tmp_path / "random.safetensors")
    monkeypatch.setattr(torch, "load", checked)
    for size, judge in ((8, network), (31, InceptionFeatures(tmp_path / "random.safetensors"))):
        found = judge(images(1, size))["pool3"]
        assert found.shape == (1, 2048) and torch.equal(found, network(images(1, size))["pool3"])
    with pytest.raises(ValueError, match="uint8"):
        network(images(1).float())


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "there is no weights file"),
        ({"other.weight": torch.zeros(2)}, "does not hold torch-fidelity's Inception v3"),
        (pickle.dumps(time.sleep, protocol=2), "never executed"),
    ],
    ids=["none", "others", "code"],
)
def test_weights_of_another_kind(tmp_path, content, message):
    path = tmp_path / "other.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"other.pth.*{message}|{message}.*other.pth") as error:
        InceptionFeatures(path)
    assert "\n" not in str(error.value)


def test_weights_that_cannot_be_downloaded(tmp_path, monkeypatch):
    """Nobody answers, or what comes has another checksum; nothing is kept, and the way out is named."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    assert features.PUBLISHED == "6726825d" and features.URL_INCEPTION_V3.endswith("2015-12-05-6726825d.pth")
    (tmp_path / "wrong.pth").write_bytes(b"an error page")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    start = time.perf_counter()
    for url, reason in (
        (f"http://127.0.0.1:{port}/wrong.pth", "refused"),
        ((tmp_path / "wrong.pth").as_uri(), "another checksum"),
    ):
        monkeypatch.setattr(features, "URL_INCEPTION_V3", url)
        with pytest.raises(ValueError, match=rf"wrong\.pth are not in .*{reason}.*--inception FILE"):
            InceptionFeatures()
    assert time.perf_counter() - start < 10
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_dinov2_follows_the_protocol(tmp_path):
    model = save_tiny_encoder(tmp_path / "tiny", img_size=224, patch_size=14)
    batch = images(3, 20)
    found = DinoV2Features(str(tmp_path / "tiny"))(batch)["dinov2"]
    for image, token in zip(batch, found):
        resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.BICUBIC)
        x = np.asarray(resized).astype(np.float64) / 255
        x = (x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            tokens = model.forward_features(torch.from_numpy(x).float().permute(2, 0, 1)[None])
        assert tokens.shape == (1, 1 + 16 * 16, 24)
        torch.testing.assert_close(token, tokens[0, 0], rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_dinov2_that_cannot_be_had(encoder_folder):
    with pytest.raises(ValueError, match="there is no such file.*--dinov2-weights"):
        DinoV2Features(weights="nowhere.pth")
    with pytest.raises(ValueError, match="patches of 14 pixels"):
        DinoV2Features(str(encoder_folder))


# ---- any classifier ----


def save_convnet(folder, seed=0):
    """A timm convolutional classifier with random weights and a normalisation of its own, saved by timm."""
    torch.manual_seed(seed)
    model = timm.create_model("resnet10t", num_classes=5)
    model.pretrained_cfg |= {"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    model.pretrained_cfg["num_classes"] = 5
    save_for_hf(model, str(folder), model_args={"num_classes": 5}, safe_serialization=True)
    return model.eval()


@pytest.mark.parametrize("kind", ["convnet", "vit-mean"])
def test_pooled_features_are_what_the_classifier_sees(tmp_path, kind):
    """The input of the last layer, of images resized and normalised by hand; in float32 whatever the caller has set."""
    if kind == "convnet":
        model, size, mean, std = save_convnet(tmp_path / "net"), 32, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
        last = model.fc
    else:  # as dataset.standin_encoder makes them: the final norm, then the mean of the tokens
        torch.manual_seed(0)
        options = dict(img_size=8, patch_size=2, embed_dim=24, depth=2, num_heads=2, num_classes=5, class_token=False)
        options |= dict(global_pool="avg", fc_norm=False)
        model, size, mean, std = timm.create_model("vit_tiny_patch16_224", **options).eval(), 8, [0.5] * 3, [0.5] * 3
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 8, 8), "num_classes": 5, "mean": mean}
        model.pretrained_cfg["std"] = std
        save_for_hf(model, str(tmp_path / "net"), model_args=options, safe_serialization=True)
        last = model.head
    batch, seen = images(3, 40), []
    x = nn.functional.interpolate(batch.float(), (size, size), mode="bicubic", antialias=True) / 255
    x = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad(), last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
        model(x)
    network = PooledFeatures(str(tmp_path / "net"))
    with torch.autocast("cpu", torch.bfloat16):
        found = network(batch)["pooled"]
    assert found.dtype == torch.float32 and found.shape == (3, network.dim) and not found.requires_grad
    torch.testing.assert_close(found, seen[0], rtol=1e-4, atol=1e-5)
    if kind == "vit-mean":
        with torch.no_grad():
            torch.testing.assert_close(found, model.forward_features(x).mean(1), rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3 and not network.training


def test_fingerprint_of_a_judge(tmp_path):
    """It changes with a weight and with the normalisation, and not with the folder."""
    prints = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_convnet(tmp_path / name, seed)
        prints.append(PooledFeatures(str(tmp_path / name)).fingerprint)
    assert prints[0] == prints[1] != prints[2]
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["pretrained_cfg"]["mean"][0] += 0.01
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    assert PooledFeatures(str(tmp_path / "b")).fingerprint != prints[0]


def test_judges_that_cannot_be_had(tmp_path):
    """Weights that are missing, in part missing, or code; never random ones in their place."""
    save_convnet(tmp_path / "none")
    (tmp_path / "none" / "model.safetensors").unlink()
    for name in ("part", "code"):
        model = save_convnet(tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        (tmp_path / name / "pytorch_model.bin").unlink(missing_ok=True)
    torch.save(dict(list(model.state_dict().items())[3:]), tmp_path / "part" / "pytorch_model.bin")
    (tmp_path / "code" / "pytorch_model.bin").write_bytes(pickle.dumps(time.sleep, protocol=2))
    for name in (tmp_path / "none", tmp_path / "part", tmp_path / "code", tmp_path, "no-such-network", "resnet18"):
        with pytest.raises(ValueError, match=f"'{name}' cannot judge .*--kind convnet") as error:
            PooledFeatures(str(name))
        assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


# ---- the command ----


def test_command(weights, tmp_path, capsys, monkeypatch):
    """A folder of png against an npz of images, then a part of it against the reference that was kept."""
    # The distance takes many seconds at this width; tests/test_metrics.py has its formula.
    monkeypatch.setattr(metrics, "frechet_distance", lambda mean, _, other, __: float((mean - other).square().sum()))
    (tmp_path / "samples").mkdir()
    for i, image in enumerate(images(5, seed=1)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "samples" / f"{i}.png")
    real, kept = images(6), tmp_path / "kept.npz"
    np.savez(tmp_path / "real.npz", real.permute(0, 2, 3, 1).numpy())
    save_tiny_encoder(tmp_path / "tiny", img_size=224, patch_size=14)
    words = [tmp_path / "samples", "--reference", tmp_path / "real.npz", "--inception", weights, "--fd-dinov2"]
    words += ["--dinov2", tmp_path / "tiny", "--num-workers", 0, "--batch-size", 4, "--save-reference", kept]
    metrics.main([str(word) for word in words])
    result = json.loads((tmp_path / "samples.metrics.json").read_text())
    names = ["fid", "sfid", "fd_dinov2", "precision", "recall", "inception_score", "inception_score_std"]
    assert list(result["metrics"]) == names
    assert result["metrics"]["fid"] > 0 and result["metrics"]["inception_score"] > 1
    assert result["samples"]["count"] == 5 and result["reference"]["images"] == 6
    assert result["samples"]["uint8_conversion"].startswith("unknown") and not result["inception"]["published"]
    assert "not the published Inception file" in capsys.readouterr().out

    network = InceptionFeatures(weights)
    statistics, found = metrics.npz_statistics(kept, network), network(real)
    for name in ("pool3", "spatial"):
        vectors = found[name].double().numpy()
        np.testing.assert_allclose(statistics[name][0], vectors.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(statistics[name][1], np.cov(vectors, rowvar=False), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(metrics.open_images(kept).__getitems__(range(6)), real, rtol=0, atol=0)
    assert np.load(kept)["inception_sha256"] == network.sha256  # kept statistics belong to their weights

"""The networks behind the metrics, with random weights that travel through the same options as the published ones."""

import json
import pickle
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from eval import features, metrics
from eval.features import DinoV2Features, InceptionFeatures
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
    batch = images(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(batch)
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


def test_images_of_any_size_are_resized_by_the_network(network):
    assert all(network(images(1, size))["pool3"].shape == (1, 2048) for size in (8, 31))
    with pytest.raises(ValueError, match="uint8"):
        network(images(1).float())


def test_precision_is_put_back():
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyError), features.full_precision("cpu"), torch.autocast("cpu"):
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
        with torch.autocast("cpu", torch.bfloat16), features.full_precision("cpu"):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_weights_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"weights-inception-2015-12-05-6726825d\.pth are not in .*--inception FILE"):
        InceptionFeatures()
    with pytest.raises(ValueError, match="no weights file.*elsewhere.pth"):
        InceptionFeatures(tmp_path / "elsewhere.pth")
    torch.save({"other.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth' does not hold torch-fidelity's Inception v3"):
        InceptionFeatures(tmp_path / "other.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(time.sleep, protocol=2))
    with pytest.raises(ValueError, match="code.pth.*never executed"):
        InceptionFeatures(tmp_path / "code.pth")
    assert time.perf_counter() - start < 10


def test_downloaded_weights_are_compared_with_their_checksum(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(features, "unreachable", lambda url: "")
    (tmp_path / "wrong.pth").write_bytes(b"an error page")
    monkeypatch.setattr(features, "URL_INCEPTION_V3", (tmp_path / "wrong.pth").as_uri())
    with pytest.raises(ValueError, match="wrong.pth.*hash"):
        InceptionFeatures()
    assert features.PUBLISHED == "6726825d" and not (tmp_path / "hub/checkpoints/wrong.pth").exists()


def test_dinov2_follows_the_protocol(tmp_path):
    model = save_tiny_encoder(tmp_path / "tiny", img_size=224, patch_size=14)
    batch = images(3, 20)
    found = DinoV2Features(str(tmp_path / "tiny"))(batch)["dinov2"]
    for image, features in zip(batch, found):
        resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.BICUBIC)
        x = np.asarray(resized).astype(np.float64) / 255
        x = (x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            tokens = model.forward_features(torch.from_numpy(x).float().permute(2, 0, 1)[None])
        assert tokens.shape == (1, 1 + 16 * 16, 24)
        torch.testing.assert_close(features, tokens[0, 0], rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_dinov2_that_cannot_be_had(encoder_folder):
    with pytest.raises(ValueError, match="--dinov2-weights"):
        DinoV2Features()
    with pytest.raises(ValueError, match="patches of 14 pixels"):
        DinoV2Features(str(encoder_folder))


def test_command(weights, tmp_path, capsys):
    """A folder of png against an npz of images, then a part of it against the reference that was kept."""
    (tmp_path / "samples").mkdir()
    for i, image in enumerate(images(5, seed=1)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "samples" / f"{i}.png")
    real = images(6)
    np.savez(tmp_path / "real.npz", real.permute(0, 2, 3, 1).numpy())
    save_tiny_encoder(tmp_path / "tiny", img_size=224, patch_size=14)
    kept = tmp_path / "kept.npz"
    metrics.main(
        [
            str(tmp_path / "samples"),
            "--reference",
            str(tmp_path / "real.npz"),
            "--inception",
            str(weights),
            "--fd-dinov2",
            "--dinov2",
            str(tmp_path / "tiny"),
            "--num-workers",
            "0",
            "--batch-size",
            "4",
            "--save-reference",
            str(kept),
        ]
    )
    result = json.loads((tmp_path / "samples.metrics.json").read_text())
    assert list(result["metrics"]) == [
        "fid",
        "sfid",
        "inception_score",
        "inception_score_std",
        "precision",
        "recall",
        "fd_dinov2",
    ]
    assert result["metrics"]["fid"] > 0 and result["metrics"]["inception_score"] > 1
    assert result["samples"]["count"] == 5 and result["reference"]["images"] == 6
    assert result["samples"]["uint8_conversion"].startswith("unknown") and not result["inception"]["published"]
    assert "not the published Inception file" in capsys.readouterr().out

    statistics = metrics.npz_statistics(kept)
    found = InceptionFeatures(weights)(real)
    for name in ("pool3", "spatial"):
        vectors = found[name].double().numpy()
        np.testing.assert_allclose(statistics[name][0], vectors.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(statistics[name][1], np.cov(vectors, rowvar=False), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(metrics.open_images(kept).__getitems__(range(6)), real, rtol=0, atol=0)
    # Kept statistics belong to their weights.
    state = torch.load(weights)
    state["fc.bias"] += 1
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(SystemExit, match="kept.npz' was made with the Inception weights"):
        metrics.main([str(tmp_path / "samples"), "--reference", str(kept), "--inception", str(tmp_path / "other.pth")])

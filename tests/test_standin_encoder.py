"""The stand-ins: they learn the classes, load as encoder and judge, repeat exactly, and overwrite nothing."""

import json
import os

import pytest
import torch

import models  # noqa: F401  (before timm: see its docstring)
import timm

from dataset import standin_encoder
from dataset.prepared import PreparedImages
from eval.features import PooledFeatures
from models.encoders import FrozenEncoder
from runtime import lock_folder
from tests.test_data import content

SMALL = ["--epochs", "3", "--width", "32", "--depth", "2"]
TINY = ["--epochs", "1", "--width", "32", "--depth", "1", "--batch-size", "512"]  # three steps


def train(data, out, *words):
    standin_encoder.main([str(data), "--out", str(out), *words])
    return out


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    return train(digits, tmp_path_factory.mktemp("standin") / "encoder", *SMALL)


def test_classifies_and_loads(trained, digits):
    """Well above the tenth that guessing gets; patch tokens come out of the final norm, one for each of SiT's."""
    record = json.loads((trained / "training.json").read_text())
    assert record["held_out_accuracy"] > 0.3 and record["held_out_images"] == 180
    encoder = FrozenEncoder(str(trained), grid=4)
    tokens = encoder(PreparedImages(digits).__getitems__(range(5))["images"])
    assert tokens.shape == (5, 16, 32)
    norm = encoder.model.norm
    plain = (tokens - norm.bias) / norm.weight
    torch.testing.assert_close(plain.mean(-1), torch.zeros(5, 16), atol=1e-4, rtol=0)
    torch.testing.assert_close(plain.var(-1, correction=0), torch.ones(5, 16), atol=1e-3, rtol=0)
    assert encoder.mean.flatten().tolist() == encoder.std.flatten().tolist() == [0.5, 0.5, 0.5]


def test_convnet_judges(digits, tmp_path):
    """What is loaded from the folder classifies all digits by its pooled features: the weights are the trained ones."""
    folder = train(digits, tmp_path / "judge", "--kind", "convnet", "--epochs", "3", "--lr", "4e-3")
    record, data = json.loads((folder / "training.json").read_text()), PreparedImages(digits)
    assert record["held_out_accuracy"] > 0.9 and record["options"]["kind"] == "convnet"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    whole = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = data.__getitems__(range(len(data)))["images"]
    with torch.no_grad():
        pooled = model((images / 255 - 0.5) / 0.5)
        right = whole.head.fc(pooled).argmax(-1) == data.labels
    assert pooled.shape == (1797, 64) and right.float().mean() > 0.9
    assert right[::10].float().mean().item() == pytest.approx(record["held_out_accuracy"], abs=1e-6)
    torch.testing.assert_close(PooledFeatures(str(folder))(images[:7])["pooled"], pooled[:7], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no square patches"):
        FrozenEncoder(str(folder), 4)


def test_same_options_make_the_same_encoder(trained, digits, tmp_path, capsys):
    torch.manual_seed(99)  # what happened before must not matter
    again = train(digits, tmp_path / "again", *SMALL)
    assert FrozenEncoder(str(again), 4).fingerprint == FrozenEncoder(str(trained), 4).fingerprint
    before = content(again)
    train(digits, again, *SMALL)
    assert "already trained" in capsys.readouterr().out
    for words, change in ((["--epochs", "4"], "epochs: 3 -> 4"), ([*SMALL, "--kind", "convnet"], "'vit' -> 'convnet'")):
        with pytest.raises(SystemExit, match=f"made with other settings .*{change}"):
            train(digits, again, *words)
    assert content(again) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epochs", "0"], "epochs = 0"),
        (["--width", "100"], "width = 100"),
        (["--patch-size", "3"], "patch_size = 3 .* 8 pixels"),
        (["--kind", "convnet", "--patch-size", "4"], "patch_size = 4: images of 8 pixels are too small"),
    ],
)
def test_wrong_options_are_refused(digits, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        train(digits, tmp_path / "encoder", *arguments)
    assert not (tmp_path / "encoder").exists()


def test_folders_of_others_and_those_in_use_are_left_alone(digits, tmp_path):
    with lock_folder(tmp_path / "used"), pytest.raises(SystemExit, match="in use by another run"):
        train(digits, tmp_path / "used", *SMALL)
    assert os.listdir(tmp_path / "used") == [".lock"]
    (tmp_path / "config.json").write_text("precious")
    with pytest.raises(SystemExit, match="not empty and was not made by this program"):
        train(digits, tmp_path)
    assert (tmp_path / "config.json").read_text() == "precious"


def test_full_disk_is_named_and_the_next_try_works(digits, tmp_path):
    out, whole = tmp_path / "out", train(digits, tmp_path / "whole", *TINY)
    out.mkdir()
    record = json.loads((whole / "training.json").read_text())
    (out / "training.json").write_text(json.dumps({"options": record["options"]}))  # so that the folder is its own
    (out / "model.safetensors.unfinished").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match=f"no space left for {out / 'model.safetensors'}"):
        train(digits, out, *TINY)
    train(digits, out, *TINY)
    assert content(out) == content(whole)

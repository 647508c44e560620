"""The stand-in encoder: learns the classes, loads as a frozen encoder, repeats exactly, and overwrites nothing."""

import json

import pytest
import torch

from dataset import standin_encoder
from dataset.prepared import PreparedImages
from models.encoders import FrozenEncoder


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("standin") / "encoder"
    standin_encoder.main([str(digits), "--out", str(folder), "--epochs", "3", "--width", "32", "--depth", "2"])
    return folder


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


def test_same_options_make_the_same_encoder(trained, digits, tmp_path):
    torch.manual_seed(99)  # what happened before must not matter
    again = tmp_path / "again"
    standin_encoder.main([str(digits), "--out", str(again), "--epochs", "3", "--width", "32", "--depth", "2"])
    assert FrozenEncoder(str(again), 4).fingerprint == FrozenEncoder(str(trained), 4).fingerprint


def test_finished_encoder_is_kept(trained, digits, capsys):
    before = {path: path.read_bytes() for path in trained.iterdir()}
    standin_encoder.main([str(digits), "--out", str(trained), "--epochs", "3", "--width", "32", "--depth", "2"])
    assert "already trained" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other options"):
        standin_encoder.main([str(digits), "--out", str(trained), "--epochs", "4"])
    assert before == {path: path.read_bytes() for path in trained.iterdir()}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epochs", "0"], "epochs = 0"),
        (["--width", "-32"], "width = -32"),
        (["--lr", "0"], "lr = 0"),
        (["--width", "100"], "width = 100"),
        (["--patch-size", "3"], "patch_size = 3 .* 8 pixels"),
    ],
)
def test_wrong_options_are_refused(digits, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        standin_encoder.main([str(digits), "--out", str(tmp_path / "encoder"), *arguments])
    assert not (tmp_path / "encoder").exists()


def test_foreign_folder_is_left_alone(digits, tmp_path):
    (tmp_path / "config.json").write_text("precious")
    with pytest.raises(SystemExit, match="not empty and was not made by this program"):
        standin_encoder.main([str(digits), "--out", str(tmp_path)])
    assert (tmp_path / "config.json").read_text() == "precious"

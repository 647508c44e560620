"""Sharing weights: what is written, that it is the same model, and that nothing in it is executed."""

import dataclasses
import json
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml

import distill
import train_repa_dar
from eval import export, sample
from tests.conftest import TINY
from weights import load_checkpoint, load_file, load_trained


@pytest.fixture(scope="module")
def run(digits, encoder_folder, tmp_path_factory):
    """A run with DAR, alignment and two averages."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    words = f"--data {digits} --out {folder} --encoder {encoder_folder} {TINY} --alignment repa --routing dar --lr 0.01"
    words += " --max-steps 6 --retrofit-steps 9 --eval-every 0 --ema-decays 0.5 0.9"
    train_repa_dar.main(words.split())
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "tiny-dar"
    export.main([str(run / "last.pt"), "--out", str(out), "--average", "0.9"])
    return out


def on_hub(exported, cache, monkeypatch):
    """The hub's cache as it is after a download of OWNER/NAME; there is no network here."""
    folder = cache / "models--owner--name"
    shutil.copytree(exported, folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return "owner/name"


def test_the_same_images_from_the_checkpoint_the_folder_and_the_hub(run, exported, tmp_path, monkeypatch):
    name = on_hub(exported, tmp_path / "cache", monkeypatch)
    monkeypatch.chdir(tmp_path)
    words = "--sampler euler --steps 3 --cfg-scale 2 --num-samples 5".split()
    sample.main([str(run / "last.pt"), *words, "--average", "0.9"])
    for source in (exported, name):
        sample.main([str(source), *words])
    folders = {folder.name.split("-6-")[0]: folder for folder in (tmp_path / "samples").iterdir()}
    assert folders.keys() == {"tiny", "tiny-dar", "name"}
    images, settings = zip(
        *(
            (np.load(folder / f"{folder.name}.npz")["arr_0"], json.loads((folder / "settings.json").read_text()))
            for folder in folders.values()
        )
    )
    assert all(np.array_equal(images[0], other) for other in images) and images[0].std() > 10
    assert len({made["hash"] for made in settings}) == 1
    weights = load_file(run / "last.pt")["emas"]["0.9"]
    model, known = load_trained(exported)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert (known["step"], known["average"], model.gamma) == (6, "0.9", 6 / 9)


def test_training_and_distillation_start_from_a_folder(run, exported, digits, tmp_path):
    words = f"--data {digits} {TINY} --routing dar --final-aggregator shared --init-from {exported} --max-steps 1"
    train_repa_dar.main([*words.split(), "--eval-every", "0", "--lr", "1e-12", "--out", str(tmp_path / "run")])
    started, weights = load_file(tmp_path / "run" / "last.pt")["model"], load_checkpoint(exported)["ema"]
    assert all(torch.allclose(value, weights[name]) for name, value in started.items())
    assert any(value.abs().max() > 0 for name, value in started.items() if "adaLN" in name)  # no fresh model has it
    words = f"--teacher {exported} --data {digits} --batch-size 8 --max-steps 1 --eval-every 0 --tensorboard False"
    distill.main([*words.split(), "--out", str(tmp_path / "student")])
    export.main([str(tmp_path / "student" / "last.pt"), "--out", str(tmp_path / "shared")])
    assert load_trained(tmp_path / "shared")[0].step_times == (1, 0.75, 0.5, 0.25)
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "teacher: tiny-dar" in card and str(tmp_path) not in card


def test_the_card_says_where_it_is_from_and_nothing_of_this_machine(run, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run, folder)
    with open(folder / "metrics.jsonl", "a") as file:
        for step, distance in ((3, 9.5), (6, 7.25), (9, 1.125)):  # the last one is of after the checkpoint
            record = {"step": step, "images": 1, "seconds": 2, "frechet_distance": distance, "evaluation_seconds": 4}
            file.write(json.dumps(record) + "\n")
    words = [str(folder / "last.pt"), "--sampler", "euler", "--steps", "2", "--num-samples", "3", "--cfg-scale", "1.75"]
    sample.main([*words, "--out", str(tmp_path / "drawn")])
    report, settings = tmp_path / "x.metrics.json", json.loads((tmp_path / "drawn" / "settings.json").read_text())
    made = {"metrics": {"fid": 12.5}, "warnings": ["only 3 samples"], "reference": {"path": "/somewhere/else/ref.npz"}}
    report.write_text(json.dumps(made | {"samples": {"settings": settings["settings"]}}))
    export.main([str(folder / "last.pt"), "--out", str(out), "--metrics", str(report)])
    card, config = ((out / name).read_text() for name in ("README.md", "config.json"))
    assert "| frechet_distance | 7.25 |" in card and "1.125" not in card and "9.5" not in card
    assert "| fid | 12.5 |" in card
    options = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert options["retrofit_steps"] == 9 and options["routing"] == "dar" and "out" not in options
    saved = json.loads(config)["config"]
    assert {"routing", "seed", "content of data"} <= saved.keys() and str(tmp_path) not in config + card
    words = [str(folder / "last.pt"), "--average", "0.9", "--out", str(tmp_path / "other")]
    with pytest.raises(SystemExit, match="x.metrics.json' is not a report .* of this checkpoint and average"):
        export.main([*words, "--metrics", str(report)])
    export.main(words)
    assert "7.25" not in (tmp_path / "other" / "README.md").read_text()  # training judged the first average
    for path in ("../alice/data", "~/data", "./data", "/home/alice/data"):
        assert export.shareable([path, "data/x"]) == ["data", "data/x"]


def test_what_is_refused(run, exported, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("dear")
    with pytest.raises(SystemExit, match="error: out = '.*full' is not an empty folder"):
        export.main([str(run / "last.pt"), "--out", str(tmp_path / "full")])
    assert (tmp_path / "full" / "letter").read_text() == "dear"
    with pytest.raises(ValueError, match="'owner/other' is neither a file nor a model on the hub that can be had"):
        load_checkpoint("owner/other")
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    torch.save({"weights": dataclasses.field}, broken / "model.safetensors")  # a pickle, which could run code
    with pytest.raises(ValueError, match="model.safetensors' is not a weights file"):
        load_trained(broken)

"""Drawing images from checkpoints: the same ones whatever the processes, the batch and what kills the command."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_repa_dar
from eval import sample as sampling
from eval import sample_folder
from eval.online import grid_of
from eval.samplers import draw
from models.autoencoder import Pixels
from models.sit import SIT_MODELS
from runtime import Ranks, Use, derive_seed, lock_folder
from tests.conftest import TINY, ending, forked, killed
from tests.test_autoencoder import save_kl
from weights import load_file, load_trained

COUNT = 150  # two whole chunks, and part of a third
FEW = ["--sampler", "sde", "--steps", "4", "--cfg-scale", "1.5"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(digits, encoder_folder, tmp_path_factory):
    """A step of the trainer, and then weights that make images depend on noise, label and time."""
    path = tmp_path_factory.mktemp("runs") / "tiny" / "last.pt"
    words = f"--data {digits} --out {path.parent} --encoder {encoder_folder} {TINY} --alignment repa --routing dar"
    train_repa_dar.main(f"{words} --query dynamic --max-steps 1 --eval-every 0 --ema-decays 0.99".split())
    content = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name, value in content["emas"]["0.99"].items():
        if name != "pos_embed":
            value.copy_(torch.randn(value.shape, generator=generator) * (1 if "y_embedder" in name else 0.15))
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """All images, by one process in whole chunks."""
    folder = tmp_path_factory.mktemp("samples") / "drawn"
    sampling.main(arguments(checkpoint, folder))
    return folder


def arguments(checkpoint, folder, *extra):
    return [str(checkpoint), "--out", str(folder), *FEW, "--num-samples", str(COUNT), *map(str, extra)]


def npz(folder):
    return np.load(folder / f"{folder.name}.npz")


def interrupted(*arguments):
    raise KeyboardInterrupt  # as Python does on Ctrl-C, unless it was started in the background


def settings(**changes):
    values = {"weights": "w", "autoencoder": "pixels", "sampler": "euler", "steps": 3, "cfg_scale": 1.0, "seed": 5}
    values |= {"guide": "", "guidance_interval": (0.0, 1.0), "time_shift": 1.0, "path": "linear", "precision": "fp32"}
    values |= {"num_samples": 20, "labels": "balanced", "classes": (), "prompts": ()}
    return sampling.Settings(**{**values, **changes})


@functools.cache
def small_model(seed=0):
    torch.manual_seed(seed)
    sizes = dict(input_size=8, in_channels=3, hidden_size=32, num_heads=2, depth=1, num_classes=4, align_dims=())
    model = SIT_MODELS["SiT-S/2"](**sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


# ---- the same images ----


def test_two_processes_and_another_batch_change_only_rounding(checkpoint, whole, tmp_path):
    words = arguments(checkpoint, tmp_path / "two", "--batch-size", 23)
    assert forked(*2 * [functools.partial(sampling.main, words)], ranks=True) == [None, None]
    one, two = npz(whole), npz(tmp_path / "two")
    assert np.array_equal(one["arr_1"], two["arr_1"])
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
    assert one["arr_0"].std(0).mean() > 20  # the images do differ from each other
    starts = json.loads((tmp_path / "two" / "settings.json").read_text())["starts"]
    assert [(start["processes"], start["batch_size"]) for start in starts] == [(2, 23)]


def in_second_chunk(model, autoencoder, settings, indices, *others):
    return indices[0] >= 64


def test_killed_and_restarted_is_the_same_file(checkpoint, whole, tmp_path):
    """In the second chunk, before the third is whole, and in the npz; then by another number of processes."""

    def run(*patch):
        setattr(*patch[:2], ending(killed, *patch))
        sampling.main(words)

    folder = tmp_path / "killed" / whole.name
    words = arguments(checkpoint, folder)
    for chunks, patch in enumerate(
        [
            (sampling, "sample_images", in_second_chunk),
            (os, "replace", lambda source, target: target.name == "00002.npy"),
            (sample_folder, "member", lambda archive, name: name == "arr_1.npy"),
        ],
        start=1,
    ):
        assert forked(functools.partial(run, *patch)) == [-signal.SIGKILL]
        assert len(list((folder / "samples").glob("*.npy"))) == chunks and not list(folder.glob("*.npz"))
    (folder / "samples" / "00001.npy").unlink()
    assert forked(*2 * [functools.partial(sampling.main, words)], ranks=True) == [None, None]
    for name in ("drawn.npz", "grid.png"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert len(json.loads((folder / "settings.json").read_text())["starts"]) == 4


def test_ctrl_c_says_that_the_same_command_goes_on(checkpoint, whole, tmp_path, capfd, monkeypatch):
    folder = tmp_path / whole.name
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="the same command again completes it"):
        patch.setattr(sampling, "sample_images", ending(interrupted, sampling, "sample_images", in_second_chunk))
        sampling.main(arguments(checkpoint, folder))
    sampling.main(arguments(checkpoint, folder))
    assert f"{COUNT - 64} of {COUNT} images" in capfd.readouterr().out
    assert (folder / "drawn.npz").read_bytes() == (whole / "drawn.npz").read_bytes()


def test_images_are_drawn_as_the_settings_say():
    """Against the sampler itself, which tests/test_samplers.py compares with closed forms."""
    model, indices = small_model(), [3, 17, 4]
    seeds, y = [derive_seed(5, Use.SAMPLE, i) for i in indices], sampling.labels_of(settings(), indices, 4)
    for changes in (
        {"sampler": "heun", "cfg_scale": 1.5},
        {"sampler": "sde", "path": "cosine"},
        {"sampler": "sde", "cfg_scale": 2.0, "guidance_interval": (0.3, 0.8), "time_shift": 2.0},
    ):
        for guide in (None, small_model(1)):
            x = draw(model, seeds, (3, 8, 8), y, num_steps=3, guide=guide, **changes)
            got = sampling.sample_images(model, Pixels(), settings(**changes), indices, CPU, guide)
            assert got.dtype == torch.uint8 and torch.equal(got, Pixels().decode(x))


def test_precision_is_that_of_the_network_and_leaves_no_trace():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    types = []
    with small_model().final_layer.linear.register_forward_hook(lambda module, x, out: types.append(out.dtype)):
        for precision in ("fp32", "bf16"):
            sampling.sample_images(small_model(), Pixels(), settings(steps=1, precision=precision), [0], CPU)
    assert types == [torch.float32, torch.bfloat16]
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_samples_that_are_not_finite_are_refused(checkpoint, tmp_path):
    content = load_file(checkpoint)
    content["emas"]["0.99"]["final_layer.linear.bias"][0] = float("inf")
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(SystemExit, match="error: samples 0 to 63 are not finite with precision = 'fp32'"):
        sampling.main(arguments(tmp_path / "last.pt", tmp_path / "out"))
    assert not list((tmp_path / "out" / "samples").iterdir())


# ---- labels ----


def test_labels_are_balanced_shuffled_and_of_the_index_alone():
    drawn = sampling.labels_of(settings(num_samples=50_000), range(50_000), 1000)
    assert drawn.dtype == torch.int64
    assert (drawn.bincount(minlength=1000) == 50).all()
    assert all((part.bincount(minlength=1000) == 5).all() for part in drawn.view(10, -1))  # the splits of IS
    assert (drawn[1:] > drawn[:-1]).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(drawn[:1000], drawn[1000:2000])
    scattered = [49_999, 3, 1000, 17]
    assert sampling.labels_of(settings(num_samples=7), scattered, 1000).tolist() == drawn[scattered].tolist()
    assert not torch.equal(sampling.labels_of(settings(seed=6), range(1000), 1000), drawn[:1000])
    chosen = sampling.labels_of(settings(classes=(7, 2, 5)), range(10), 9)
    assert all(sorted(chosen[first : first + 3].tolist()) == [2, 5, 7] for first in (0, 3, 6))


def test_random_labels_are_independent_and_of_the_index_alone():
    chosen = settings(labels="random", classes=(7, 2, 5, 3))
    drawn = sampling.labels_of(chosen, range(4000), 9)
    counts = drawn.bincount(minlength=9)[[7, 2, 5, 3]]
    assert counts.sum() == 4000 and 0 < ((counts - 1000) ** 2 / 1000).sum() < 16.3  # chi-squared of 3: 99.9 %
    pairs = (drawn[:-1] * 9 + drawn[1:]).bincount(minlength=81)
    pairs = pairs[pairs > 0].double()
    assert len(pairs) == 16 and ((pairs - 3999 / 16) ** 2 / (3999 / 16)).sum() < 37.7  # of 15
    scattered = [3999, 3, 1000]
    assert sampling.labels_of(chosen, scattered, 9).tolist() == drawn[scattered].tolist()
    other = sampling.labels_of(dataclasses.replace(chosen, seed=6), range(4000), 9)
    assert (other == drawn).double().mean().item() == pytest.approx(0.25, abs=0.04)


# ---- settings ----


def resolved(trained=(), **changes):
    if "cfg_scale" in changes:
        changes["cfg_scale"] = (changes["cfg_scale"],)
    options = sampling.Options(**{"checkpoint": Path("runs/x/last.pt"), **changes})
    known = {"model": "SiT-S/2", "path": "cosine", **dict(trained)}
    return sampling.resolve(options, known, small_model(), Pixels(), CPU)


@pytest.mark.parametrize(
    "preset, sampler, steps, scale, evaluations",
    [
        ("repa-sde-250", "sde", 250, 1.0, 250),
        ("sit-ode-250", "heun", 125, 1.0, 249),
        ("paper-cfg-1.5", "sde", 250, 1.5, 250),
        ("fast-ode-50", "euler", 50, 1.0, 50),
    ],
)
def test_presets_and_what_wins_over_them(preset, sampler, steps, scale, evaluations):
    preset_alone, calls, model = resolved(preset=preset), [], small_model()
    assert dataclasses.replace(preset_alone, weights="") == settings(
        weights="", sampler=sampler, steps=steps, cfg_scale=scale, path="cosine", num_samples=50_000, seed=0
    )
    with model.register_forward_hook(lambda module, inputs, out: calls.append(len(inputs[0]))):
        sampling.sample_images(model, Pixels(), preset_alone, [0], CPU)
    assert len(calls) == preset_alone.evaluations() == evaluations and set(calls) == {2 if scale != 1 else 1}
    given = dict(sampler="euler", steps=7, cfg_scale=3, guidance_interval=(0.0, 0.7), path="linear", time_shift=2.0)
    got = resolved(preset=preset, **given)
    assert {name: getattr(got, name) for name in given} == given


def test_every_setting_changes_the_hash_and_nothing_else():
    words = {"preset": "sit-ode-250", "sampler": "euler", "steps": 249, "cfg_scale": 1.4, "path": "linear", "seed": 1}
    words |= {"guidance_interval": (0.0, 0.7), "precision": "bf16", "num_samples": 10, "classes": (1, 2)}
    words |= {"time_shift": 3.0, "labels": "random"}
    base, weight = {"cfg_scale": 1.5}, small_model().final_layer.linear.bias
    digits = [resolved(**base).digits(), resolved({"arguments": {"num_heads": 4}}, **base).digits()]
    digits += [resolved(**{**base, name: value}).digits() for name, value in words.items()]
    kept = weight[0].item()
    weight[0] += 1e-6
    digits.append(resolved(**base).digits())
    weight[0] = kept
    assert len(set(digits)) == len(digits)
    others = ({}, {"autoencoder": "other"}, {"guide": "other"}, {"prompts": ("a two",)})
    assert len({settings(**change).digits() for change in others}) == 4
    for same in ({"batch_size": 3}, {"out": "x"}, {"checkpoint": Path("y.pt")}, {"steps": 250}):
        assert resolved(**base, **same).digits() == digits[0]
    assert resolved(cfg_scale=2).digits() == resolved(cfg_scale=2.0).digits()


def test_the_name_of_the_folder():
    options, origin = sampling.Options(Path("runs/x/last.pt")), {"step": 300}
    plain, guided = resolved(preset="fast-ode-50", steps=20), resolved(preset="paper-cfg-1.5")
    assert sampling.folder_name(options, plain, origin) == f"x-300-euler-20-{plain.digits()}"
    assert sampling.folder_name(options, guided, {"step": None}) == f"x-last-sde-250-cfg-1.5-{guided.digits()}"
    options = dataclasses.replace(options, average=("0.99",))
    assert sampling.folder_name(options, plain, origin) == f"x-300-ema-0.99-euler-20-{plain.digits()}"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 1}, "steps = 1: must be at least 2 for sde"),
        ({"cfg_scale": float("nan")}, "cfg_scale = nan"),
        ({"guidance_interval": (0.0, 0.7)}, r"guidance_interval = .* has no effect without guidance; give --cfg-scale"),
        ({"guide": "x.pt"}, "guide = 'x.pt': has no effect with guidance scale 1; give --cfg-scale"),
        ({"num_samples": 0}, "num_samples = 0: must be at least 1"),
        ({"classes": (1, 4)}, r"classes = \(1, 4\): the model's are 0 to 3"),
        ({"classes": (1, 1)}, "repeats a label"),
        ({"precision": "tf32"}, "precision = 'tf32': needs a GPU; give fp32"),
        ({"trained": {"class_dropout_prob": 0.0}, "cfg_scale": 1.5}, "cfg_scale = 1.5: .* without a null class"),
    ],
)
def test_bad_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        resolved(**changes)


# ---- the folder ----


def test_the_npz_is_in_the_layout_of_adm(whole, checkpoint):
    with zipfile.ZipFile(whole / "drawn.npz") as archive:
        entries = [(entry.filename, entry.date_time[0]) for entry in archive.infolist()]
        assert entries == [("arr_0.npy", 1980), ("arr_1.npy", 1980)] and archive.testzip() is None
    images, labels = npz(whole)["arr_0"], npz(whole)["arr_1"]
    assert images.shape == (COUNT, 8, 8, 3) and images.dtype == np.uint8
    assert labels.shape == (COUNT,) and labels.dtype == np.int64 and (np.bincount(labels) == 15).all()
    with Ranks() as ranks:
        options = sampling.Options(checkpoint, sampler="sde", steps=4, cfg_scale=(1.5,), num_samples=COUNT)
        model, _, autoencoder, chosen, _ = sampling.load(options, ranks)
    drawn = sampling.sample_images(model, autoencoder, chosen, range(128, COUNT), CPU)  # (B, 3, H, W)
    assert np.array_equal(images[128:], drawn.numpy().transpose(0, 2, 3, 1))
    assert model(torch.zeros(1, 3, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long))[1] == []
    assert load_trained(checkpoint)[0].align_depth == (1,)  # only here nobody reads the projections
    grid = grid_of(torch.from_numpy(images[:64]).permute(0, 3, 1, 2), torch.from_numpy(labels[:64]))
    assert np.array_equal(np.asarray(Image.open(whole / "grid.png")), grid.permute(1, 2, 0))
    chunks = [np.load(chunk) for chunk in sorted((whole / "samples").iterdir())]
    assert [len(chunk) for chunk in chunks] == [64, 64, 22] and np.array_equal(np.concatenate(chunks), images)


def test_settings_say_what_was_drawn_and_where(whole, checkpoint):
    content = json.loads((whole / "settings.json").read_text())
    assert content["settings"].keys() == {field.name for field in dataclasses.fields(sampling.Settings)}
    assert content["settings"]["cfg_scale"] == 1.5 and content["settings"]["seed"] == 0
    assert (
        content["function_evaluations"] == 4
        and content["seconds_per_1000_images"] > 0
        and content["uint8"] == "round to nearest, (x + 1) * 127.5"
    )
    (start,) = content["starts"]
    assert start["checkpoint"] == str(checkpoint) and (start["step"], start["average"]) == (1, "0.99")
    assert start["autoencoder"] == "pixels" and start["processes"] == 1 and start["batch_size"] == 64
    assert {"cpu", "gpu", "torch", "python", "commit", "command"} <= start.keys()


def test_a_finished_folder_stays_as_it_is(whole, checkpoint, tmp_path, capsys):
    def state(folder):
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = state(whole)
    sampling.main(arguments(checkpoint, whole, "--batch-size", 3))
    assert state(whole) == before and "150 images, complete" in capsys.readouterr().out
    copy = tmp_path / "drawn"
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("*.npz"))
    sampling.main(arguments(checkpoint, copy))  # makes the npz of the chunks, which may then go
    assert (copy / "drawn.npz").read_bytes() == (whole / "drawn.npz").read_bytes()
    shutil.rmtree(copy / "samples")
    sampling.main(arguments(checkpoint, copy))
    assert not (copy / "samples").exists()


def test_the_default_folder(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sampling.main([str(checkpoint), "--preset", "fast-ode-50", "--num-samples", "3", "--classes", "8"])
    (folder,) = (tmp_path / "samples").iterdir()
    assert folder.name.startswith("tiny-1-euler-50-") and (npz(folder)["arr_1"] == 8).all()
    assert folder.name.endswith(json.loads((folder / "settings.json").read_text())["hash"])


def test_guidance_scales_and_averages_share_noise_and_labels(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    guide = tmp_path / "guide.pt"
    content = load_file(checkpoint)
    content["emas"]["0.99"]["final_layer.linear.bias"] += 0.1
    torch.save(content, guide)
    words = f"{checkpoint} --sampler euler --steps 2 --num-samples 5 --cfg-scale 1 1.5 --average 0.99 none".split()
    sampling.main([*words, "--guide", str(guide)])
    folders = sorted((tmp_path / "samples").iterdir(), key=lambda folder: folder.name[:-8])  # without the hash
    assert [folder.name[:-9] for folder in folders] == [
        f"tiny-1-ema-{average}-euler-2{scale}" for average in ("0.99", "none") for scale in ("", "-cfg-1.5")
    ]
    command = capsys.readouterr().out.splitlines()[-1]
    assert all(str(npz.relative_to(tmp_path)) in command for npz in (tmp_path / "samples").rglob("*.npz"))
    assert len({npz(folder)["arr_1"].tobytes() for folder in folders}) == 1
    settings = [json.loads((folder / "settings.json").read_text())["settings"] for folder in folders]
    assert [bool(made["guide"]) for made in settings] == [False, True, False, True]
    plain, guided = (npz(folder)["arr_0"].astype(int) for folder in folders[:2])
    assert np.abs(plain - guided).max() > 1
    with pytest.raises(SystemExit, match="out = 'x': is for one set of images, and these are 4"):
        sampling.main([*words, "--out", "x"])
    for words_of_guide in ("--guide", str(guide)), ("--guidance-interval", "0", "0.5"):
        with pytest.raises(SystemExit, match="has no effect .*; give --cfg-scale"):
            sampling.main(f"{checkpoint} --cfg-scale 1 --average 0.99 none".split() + [*words_of_guide])
    with pytest.raises(SystemExit, match="no average '0.5'"):
        sampling.main(f"{checkpoint} --cfg-scale 1 --average 0.99 0.5 --seed 9".split())
    assert len([*(tmp_path / "samples").iterdir()]) == 4  # nothing was drawn of the one that is there
    for key, value in (("path", "cosine"), ("content of autoencoder", "another"), ("step_times", [1.0])):
        torch.save(content | {"config": content["config"] | {key: value}}, guide)
        with pytest.raises(
            SystemExit, match="guide.pt' has (path|autoencoder|few steps) = .*; give one that was trained alike"
        ):
            sampling.main([*words, "--guide", str(guide)])
    content["arguments"]["num_classes"] = 9
    for state in (content["model"], content["emas"]["0.99"]):
        state["y_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"][:10]
    torch.save(content, guide)
    with pytest.raises(SystemExit, match="guide.pt' has num_classes = 9, and 10 is needed"):
        sampling.main([*words, "--guide", str(guide)])


def test_classes_without_training_images_are_drawn_on_request_alone(checkpoint, tmp_path, capsys):
    content = load_file(checkpoint)
    assert content["config"]["classes with images"] == list(range(10))
    content["config"]["classes with images"] = [2, 5, 7]
    torch.save(content, tmp_path / "last.pt")
    words = arguments(tmp_path / "last.pt", tmp_path / "out", "--num-samples", 6, "--steps", 2)
    sampling.main(words)
    assert sorted(npz(tmp_path / "out")["arr_1"]) == [2, 2, 5, 5, 7, 7]
    assert "3 of 10 classes, those with training images" in capsys.readouterr().out
    sampling.main([*words, "--out", str(tmp_path / "asked"), "--classes", "2", "3"])
    assert set(npz(tmp_path / "asked")["arr_1"]) == {2, 3}
    assert "2 of 10 classes, balanced\n" in capsys.readouterr().out


def test_folders_that_are_not_ours_are_refused(whole, checkpoint, tmp_path):
    with pytest.raises(SystemExit, match="error: .*drawn was made with other settings .*seed: 0 -> 1.*another --out"):
        sampling.main(arguments(checkpoint, whole, "--seed", 1))
    lock = lock_folder(whole)
    with pytest.raises(SystemExit, match="error: .* is in use by another run"):
        sampling.main(arguments(checkpoint, whole))
    lock.close()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    with pytest.raises(SystemExit, match="error: .*foreign is not empty and was not made by this program"):
        sampling.main(arguments(checkpoint, foreign))
    with pytest.raises(SystemExit, match="error: .*letter.txt is not empty and was not made by this program"):
        sampling.main(arguments(checkpoint, foreign / "letter.txt"))
    assert [path.name for path in foreign.iterdir()] == ["letter.txt"]
    (foreign / "letter.txt").unlink()
    for content, message in (
        ('{"other": 1}', "made with other settings"),
        ("[]", "settings.json is damaged, or was not made by this program"),
        ('{"settings": {"we', "settings.json is damaged"),
    ):
        (foreign / "settings.json").write_text(content)
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            sampling.main(arguments(checkpoint, foreign))


def test_processes_that_do_not_see_one_folder_are_refused(checkpoint, tmp_path):
    """As on two machines without a shared disk; nor are those that have different weights."""
    content = load_file(checkpoint)
    content["emas"]["0.99"]["final_layer.linear.bias"] += 1
    torch.save(content, tmp_path / "last.pt")
    seen, apart = arguments(checkpoint, tmp_path / "a" / "out"), arguments(checkpoint, tmp_path / "b" / "out")
    other = arguments(tmp_path / "last.pt", tmp_path / "a" / "out")
    for words, fact in ((apart, "the content of "), (other, "the hash of the settings is ")):
        for outcome in forked(*(functools.partial(sampling.main, each) for each in (seen, words)), ranks=True):
            assert outcome.startswith(f"SystemExit: error: the processes disagree: {fact}")
            assert "an --out that is on a disk they share" in outcome
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize(
    "content, found",
    [
        (np.zeros((64, 8, 8, 3)), r"float64 \(64, 8, 8, 3\)"),
        (np.array([None] * 64), "no array .Object arrays cannot be loaded"),  # their loading runs code
        ("half", "no array"),
    ],
)
def test_damaged_chunks_are_named(checkpoint, whole, tmp_path, content, found):
    folder = tmp_path / "out"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.npz"))
    path = folder / "samples" / "00001.npy"
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(SystemExit, match=f"error: .*00001.npy holds {found}.* delete it and give the same") as error:
        sampling.main(arguments(checkpoint, folder))
    assert "\n" not in str(error.value) and not list(folder.glob("out.npz*"))


def test_a_full_disk_is_named_and_the_next_try_works(checkpoint, whole, tmp_path, monkeypatch):
    """/dev/full is one."""
    folder = tmp_path / whole.name
    with monkeypatch.context() as patch:
        patch.setattr(sample_folder.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10_000}))
        with pytest.raises(SystemExit, match="error: .*needs .* GiB more, the disk has .*--num-samples"):
            sampling.main(arguments(checkpoint, folder))
    for name, missing in (
        ("settings.json", []),
        ("grid.png", ["grid.png"]),
        ("drawn.npz", ["drawn.npz"]),
        ("samples/00001.npy", ["drawn.npz", "samples/00001.npy"]),
    ):
        for each in missing:
            (folder / each).unlink()
        (folder / f"{name}.unfinished").symlink_to("/dev/full")
        with pytest.raises(SystemExit, match=f"error: no space left for .*{name}") as error:
            sampling.main(arguments(checkpoint, folder))
        assert "\n" not in str(error.value) and not (folder / f"{name}.unfinished").is_symlink()
        sampling.main(arguments(checkpoint, folder))
        assert (folder / "drawn.npz").read_bytes() == (whole / "drawn.npz").read_bytes()


def test_options_and_checkpoints_are_checked_first(checkpoint, tmp_path):
    (tmp_path / "text.pt").write_text("a: 1\nb: [2, 3]\n")
    for path, words, message in (
        (checkpoint, ["--batch-size", 0], "batch_size = 0: must be at least 1"),
        (checkpoint, ["--average", "0.5"], "no average '0.5'; choose one of none, 0.99"),
        (tmp_path / "none.pt", [], "there is no weights file"),
        (tmp_path / "text.pt", [], "text.pt' is not a weights file"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}") as error:
            sampling.main(arguments(path, tmp_path / "out", *words))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


# ---- autoencoders and released weights ----


def test_released_weights_with_an_autoencoder(tmp_path):
    save_kl(tmp_path / "vae")
    torch.manual_seed(0)
    model = SIT_MODELS["SiT-S/2"](input_size=4, num_classes=3, align_dims=())
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    torch.save({"ema": model.state_dict()}, tmp_path / "repa.pt")
    words = [str(tmp_path / "repa.pt"), "--out", str(tmp_path / "out")]
    words += "--model SiT-S/2 --preset fast-ode-50 --steps 2 --num-samples 3".split()
    with pytest.raises(SystemExit, match="error: autoencoder = '': say what decodes the samples of .*repa.pt"):
        sampling.main(words)
    with pytest.raises(SystemExit, match="error: autoencoder = 'pixels' has 3 channels and .*repa.pt has 4"):
        sampling.main([*words, "--autoencoder", "pixels"])
    sampling.main([*words, "--autoencoder", str(tmp_path / "vae")])
    assert npz(tmp_path / "out")["arr_0"].shape == (3, 8, 8, 3)  # latents of 4, downsampled by 2
    content = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert content["settings"]["path"] == "linear" and len(content["settings"]["autoencoder"]) == 12
    assert content["starts"][0]["step"] is None


def test_another_autoencoder_in_the_place_of_the_runs_is_noticed(checkpoint, tmp_path):
    content = load_file(checkpoint)
    content["config"]["content of autoencoder"] = "0123456789ab"
    torch.save(content, tmp_path / "last.pt")
    options = sampling.Options(tmp_path / "last.pt")
    with Ranks() as ranks:
        with pytest.raises(ValueError, match="trained with another autoencoder than the present 'pixels'"):
            sampling.load(options, ranks)
        _, _, autoencoder, _, origin = sampling.load(dataclasses.replace(options, autoencoder="pixels"), ranks)
    assert autoencoder.name == origin["autoencoder"] == "pixels"

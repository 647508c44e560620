"""Preparing images, latents and features: any number of processes, stops and full disks, checksums; training on them.

Autoencoder and encoders are tiny and random, saved to a folder and loaded as real ones are. Images are drawn here.
"""

import collections
import functools
import json
import os
import re
import shutil
import threading
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import models  # noqa: F401  (before timm: see its docstring)
import timm
from timm.models import save_for_hf

from dataset import prepare, stages
from dataset.prepared import PreparedImages
from eval import features, online
from models.autoencoder import Latents, load_autoencoder
from models.encoders import FrozenEncoder
from runtime import lock_folder
from tests.conftest import forked, read_lines
from tests.test_metrics import NarrowInception
from tests.test_data import content, noise_image, on_small_disk, pictures, refusal, run, stored_images

SIZE, COUNT = 16, 22


@pytest.fixture(scope="module", autouse=True)
def small_files():
    """Four images to a file, so that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "IMAGES_PER_FILE", 4)
        yield


@pytest.fixture(scope="module")
def autoencoder_folder(tmp_path_factory):
    """A KL autoencoder that halves the side and has 4 latent channels."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("networks") / "vae"
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    sizes = dict(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=SIZE)
    AutoencoderKL(**blocks, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    """DINOv2's architecture with registers: patches of 14 pixels, a 4 x 4 grid."""
    folder = tmp_path_factory.mktemp("networks") / "dino"
    torch.manual_seed(1)
    architecture = dict(img_size=56, embed_dim=12, depth=1, num_heads=2, num_classes=0)
    model = timm.create_model("vit_small_patch14_reg4_dinov2", **architecture)
    save_for_hf(model, str(folder), model_args=architecture, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """22 pictures of 2 classes; one cannot be read."""
    folder = tmp_path_factory.mktemp("source") / "photos"
    for i in range(COUNT):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise_image(SIZE + i, SIZE + 5, seed=i)).save(folder / "ab"[i % 2] / f"{i:02}.png")
    (folder / "a" / "06.png").write_bytes(b"junk")
    return folder


@pytest.fixture(scope="module")
def arguments(autoencoder_folder, dino_folder, encoder_folder):
    words = f"--resolution {SIZE} --autoencoder {autoencoder_folder} --encoder {dino_folder} {encoder_folder}"
    return f"{words} --token-grid 4 --batch-size 3 --mirror".split()


@pytest.fixture(scope="module")
def prepared(photos, arguments, small_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "photos"
    run(photos, out, *arguments)
    return out


@pytest.fixture(scope="module")
def plain(photos, small_files, tmp_path_factory):
    """The images alone."""
    out = tmp_path_factory.mktemp("prepared") / "plain"
    run(photos, out, "--resolution", SIZE)
    return out


def test_rows_are_what_the_networks_give(prepared, autoencoder_folder, dino_folder, encoder_folder):
    autoencoder = load_autoencoder(str(autoencoder_folder))
    encoders = [FrozenEncoder(str(folder), 4) for folder in (dino_folder, encoder_folder)]
    data = PreparedImages(
        prepared, latents=autoencoder.content, features=[e.fingerprint for e in encoders], mirror=True
    )
    assert len(data) == 2 * (COUNT - 1) and data.labels.tolist() == 2 * (10 * [0] + 11 * [1])
    images = torch.from_numpy(np.delete(stored_images(prepared), 3, axis=0)).permute(0, 3, 1, 2)  # a/06 is row 3
    batch = data.__getitems__(range(len(data)))
    both = torch.cat([images, images.flip(-1)])
    assert torch.equal(batch["images"], both)
    assert batch["moments"].shape == (42, 8, 8, 8) and batch["moments"].dtype == torch.float16
    torch.testing.assert_close(batch["moments"].float(), autoencoder.moments(both), rtol=2e-3, atol=1e-3)
    for i, encoder in enumerate(encoders):
        torch.testing.assert_close(batch[f"tokens_{i}"].float(), encoder(both), rtol=2e-3, atol=2e-3)
    assert all((np.load(path)[[3, COUNT + 3]] == 0).all() for path in prepared.glob("*/*/*.npy"))
    chosen = data.__getitems__([40, 3, 20])
    assert all(torch.equal(chosen[name], batch[name][[40, 3, 20]]) for name in batch)
    latents = PreparedImages(prepared, images=False, latents=autoencoder.content)
    assert set(latents.__getitems__([0])) == {"labels", "moments"}
    plain = PreparedImages(prepared)
    assert set(plain.__getitems__([0])) == {"labels", "images"} and len(plain) == COUNT - 1


def test_statistics_make_an_autoencoder_of_normalised_latents(photos, autoencoder_folder, judge_folder, tmp_path):
    out = tmp_path / "out"
    run(photos, out, "--resolution", SIZE, "--autoencoder", autoencoder_folder, "--mirror", "--statistics")
    (folder,) = (out / "latents").iterdir()
    plain, normalised = (load_autoencoder(str(path)) for path in (autoencoder_folder, folder / "autoencoder"))
    assert plain.content == normalised.content == folder.name and plain.fingerprint != normalised.fingerprint
    data = PreparedImages(out, images=False, latents=normalised.content, mirror=True)  # nothing is encoded again
    moments = data.__getitems__(range(len(data)))["moments"]
    noise = torch.randn(400, *moments[:, :4].shape, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([normalised.sample(moments, each) for each in noise]).transpose(0, 2).flatten(1)
    assert drawn.mean(1).abs().max() < 0.01 and (drawn.std(1) - 1).abs().max() < 0.01
    train(out, judge_folder, tmp_path / "run", "--autoencoder", folder / "autoencoder", "--max-steps", 1)
    for words in (["--statistics"], ["--statistics", "--autoencoder", "pixels"]):
        with pytest.raises(SystemExit, match="error: statistics = True: is for latents; give an --autoencoder"):
            run(photos, out, "--resolution", SIZE, *words)


def test_mirrored_rows_must_have_been_stored(photos, autoencoder_folder, tmp_path):
    run(photos, tmp_path / "out", "--resolution", SIZE, "--autoencoder", autoencoder_folder)
    (latents,) = os.listdir(tmp_path / "out" / "latents")
    assert len(PreparedImages(tmp_path / "out", latents=latents)) == COUNT - 1
    assert len(PreparedImages(tmp_path / "out", mirror=True)) == 2 * (COUNT - 1)  # pixels need no copies
    with pytest.raises(ValueError, match=f"no finished mirrored latents {latents}.*--mirror"):
        PreparedImages(tmp_path / "out", latents=latents, mirror=True)


def test_networks_may_move_and_finished_work_is_not_done_again(
    prepared, photos, arguments, autoencoder_folder, monkeypatch, capsys
):
    """What is stored is known by its weights, not by where they lie; the networks' number of images may change too."""

    def never(*arguments):
        raise AssertionError("an image was read or encoded again")

    monkeypatch.setattr(stages, "center_crop", never)
    monkeypatch.setattr(FrozenEncoder, "forward", never)
    moved = autoencoder_folder.rename(autoencoder_folder.with_name("moved"))
    try:
        before = content(prepared)
        words = [moved if word == str(autoencoder_folder) else word for word in arguments]
        run(photos, prepared, *words, "--batch-size", 5)
        assert content(prepared) == before
        assert capsys.readouterr().out.count("already there") == 4
    finally:
        moved.rename(autoencoder_folder)


def test_checksums_find_what_has_changed_and_it_is_made_again(prepared, photos, arguments, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    run("", copy, "--verify")
    assert "as they were written" in capsys.readouterr().out
    for pattern in ("images/00002.bin", "latents/*/moments.npy", "features/*/tokens.npy"):
        path = next(copy.glob(pattern))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    message = refusal("", copy, "--verify")
    assert "00002.bin" in message and message.count("npy rows 20 to 21") == 2 and message.count(";") == 2
    # As the message says: delete the records of these, and prepare again.
    for pattern in ("images/00002.json", "*/*/00005.json", "*/*/meta.json"):
        for path in copy.glob(pattern):
            path.unlink()
    assert "is not finished; the same command without --verify" in refusal("", copy, "--verify")
    (copy / "meta.json").unlink()
    assert "is not finished" in refusal("", copy, "--verify")
    run(photos, copy, *arguments)
    assert content(copy) == content(prepared)
    for name in ("settings.json", "images/00001.json"):
        (copy / name).write_text('{"sha2')
        assert f"{copy / name} is damaged" in refusal(photos, copy, *arguments, *["--verify"] * ("/" in name))
        shutil.copy(prepared / name, copy / name)


def test_the_estimate_is_near(photos, arguments, tmp_path, capsys):
    run(photos, tmp_path / "out", *arguments)
    printed = capsys.readouterr().out
    estimated = float(re.search(r"images: about ([\d.]+)kiB", printed)[1]) * 1024
    stored = sum(path.stat().st_size for path in (tmp_path / "out" / "images").glob("*.bin"))
    assert estimated == pytest.approx(stored, rel=0.3)
    assert f"moments: about {22 * 2 * 8 * 8 * 8 * 2 / 1024}kiB" in printed


# ---- what is refused, and left alone ----


@pytest.mark.parametrize(
    "words, message",
    [
        (["--autoencoder", "sd-vae"], "'sd-vae'"),
        (["--resolution", 15], "resolution = 15 is not a multiple"),
        (["--encoder-weights", "a", "b", "c"], "encoder_weights = ('a', 'b', 'c')"),
        (["--token-grid", 0], "token_grid = 0"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(photos, arguments, tmp_path, words, message):
    assert message in refusal(photos, tmp_path / "out", *arguments, *words)
    assert not (tmp_path / "out").exists()


def test_folders_of_others_and_of_other_settings_are_left_alone(prepared, photos, tmp_path):
    (tmp_path / "thesis.txt").write_text("chapter 1")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        assert f"{out} is not empty and was not made by this program" in refusal("digits", out)
    assert content(tmp_path) == {"thesis.txt": b"chapter 1"}
    before, renamed = content(prepared), tmp_path / "photos"
    shutil.copytree(photos, renamed)
    (renamed / "b" / "01.png").rename(renamed / "b" / "02.png")
    for source, words, change in (
        (photos, ["--resolution", 8], "resolution: 16 -> 8"),
        (photos, ["--resolution", SIZE, "--limit", 5], "count: 22 -> 5"),
        (renamed, ["--resolution", SIZE], "listing: "),
        ("digits", ["--resolution", SIZE], f"source: '{photos}' -> 'digits'"),
    ):
        message = refusal(source, prepared, *words)
        assert change in message and "other settings" in message
    assert content(prepared) == before


def test_disk_that_is_too_small(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: usage(10, 0, 1797 * 70))  # a PNG needs more
    message = refusal("digits", tmp_path / "out")
    assert "needs about" in message and "kiB" in message and "--limit" in message
    assert not (tmp_path / "out").exists()


def test_one_run_at_a_time_writes_into_a_folder(photos, prepared, arguments, tmp_path, monkeypatch):
    words, out = ["--resolution", SIZE], tmp_path / "out"
    with lock_folder(out):
        assert "in use by another run" in refusal(photos, out, *words)
    with lock_folder(prepared):
        run(photos, prepared, *arguments)  # all is there, so nothing is written
    # Another run that begins and ends between our first look and our lock.
    estimate = prepare.estimate

    def meanwhile(stages, folder):
        monkeypatch.setattr(prepare, "estimate", estimate)
        run(photos, out, "--resolution", 8)

    monkeypatch.setattr(prepare, "estimate", meanwhile)
    assert "resolution: 8 -> 16" in refusal(photos, out, *words)
    # Really at once: one does it, or all that is left to do.
    both = tmp_path / "both"
    outcomes = set(map(str, forked(*[functools.partial(run, photos, both, *words)] * 3)))
    assert "None" in outcomes and all(text == "None" or "in use by another run" in text for text in outcomes)
    assert len(PreparedImages(both)) == COUNT - 1


# ---- several processes ----


def test_two_processes_write_what_one_does(prepared, photos, arguments, tmp_path, capfd):
    assert forked(*[functools.partial(run, photos, tmp_path / "out", *arguments)] * 2, ranks=True) == [None, None]
    assert content(tmp_path / "out") == content(prepared)
    assert capfd.readouterr().out.count("left out: a/06.png") == 1


@pytest.mark.parametrize("kind", ["empty disks", "half prepared disks", "other sources"])
def test_machines_that_share_no_disk_or_source_are_refused(tmp_path, monkeypatch, kind):
    others = kind == "other sources"

    def at(machine):
        os.chdir(pictures(tmp_path / machine, f"cats/x/{machine if others else 'a'}.png"))
        if kind == "half prepared disks":
            os.mkdir("out")
            shutil.copy(tmp_path / "c" / "out" / "settings.json", "out")
        run("cats", tmp_path / "out" if others else "out", "--resolution", SIZE)

    monkeypatch.chdir(pictures(tmp_path / "c", "cats/x/a.png"))
    run("cats", "out", "--resolution", SIZE)
    for outcome in forked(functools.partial(at, "a"), functools.partial(at, "b"), ranks=True):
        fact = f"{tmp_path / 'out'} is {{" if others else "what process 0 wrote to out/.shared is '"
        assert outcome.startswith(f"SystemExit: error: the processes disagree: {fact}"), outcome
        assert "the same source and networks, and --out on a disk that all of them see" in outcome
    assert not [*tmp_path.glob("[abo]*/out/images/*"), *tmp_path.glob("out/images/*")]


# ---- runs that end early ----


class Interrupt:
    """Calls through to a function, but raises KeyboardInterrupt at call number `at` (from 0); None: never."""

    def __init__(self, function, at):
        self.function, self.at, self.calls, self.lock = function, at, 0, threading.Lock()

    def __call__(self, *arguments, **options):
        with self.lock:  # images are read by several threads
            self.calls += 1
            stop = self.calls - 1 == self.at
        if stop:
            raise KeyboardInterrupt
        return self.function(*arguments, **options)

    def __get__(self, instance, owner):
        """So that it can stand for a method."""
        return lambda *arguments: self(instance, *arguments)


def counted(patch, owner, name, at=None):
    patch.setattr(prepare, "estimate", lambda stages, folder: None)  # which reads some images first
    patch.setattr(owner, name, Interrupt(getattr(owner, name), at))
    return vars(owner)[name]


# What is called, at which of its calls each of the runs is stopped, and how many are left for the last one. 21 images
# can be read, 3 of them in the first file of 4. Settings, images and records of six files, labels, sizes, meta are 16
# files put in place; a network's settings, array, six records and meta are 9. Networks take 3 images at a time, and
# mirrored ones as often: 4 calls for each full file, 2 for the last one.
STOPS = [
    *((stages, "center_crop", stops, left) for stops, left in (([0], 21), ([5, 6], 14))),
    *((os, "replace", [call], None) for call in (0, 7, 15, 24)),
    (Latents, "moments", [3], 22),
    (FrozenEncoder, "forward", [20], 24),
]


@pytest.mark.parametrize("owner, name, stops, left", STOPS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_stopped_anywhere_it_ends_up_the_same(
    prepared, plain, photos, arguments, tmp_path, monkeypatch, owner, name, stops, left
):
    out, images_alone = tmp_path / "out", owner is stages or owner is os and stops[0] < 16
    words, whole = (["--resolution", SIZE], plain) if images_alone else (arguments, prepared)
    for stop in stops:
        with monkeypatch.context() as patch:
            counted(patch, owner, name, stop)
            with pytest.raises(SystemExit, match="the same command again completes it"):
                run(photos, out, *words)
    if images_alone:
        assert not (out / "settings.json").exists() or "16 -> 4" in refusal(photos, out, "--resolution", 4)
        with pytest.raises(ValueError, match="(not finished|not a prepared folder).*python -m dataset.prepare"):
            PreparedImages(out)
    elif owner is Latents:
        (latents,) = os.listdir(out / "latents")
        with pytest.raises(ValueError, match=f"no finished latents {latents}.*--autoencoder"):
            PreparedImages(out, latents=latents)
    with monkeypatch.context() as patch:
        calls = counted(patch, owner, name)
        run(photos, out, *words)
    assert content(out) == content(whole) and left in (None, calls.calls)


@pytest.mark.parametrize("file", ["settings.json", "images/00001.bin"])
def test_full_disk_is_named_and_the_next_try_works(plain, photos, tmp_path, file):
    out = tmp_path / "out"
    if file == "settings.json":
        out.mkdir()
    else:
        shutil.copytree(plain, out)
        for path in (out / "meta.json", out / file, (out / file).with_suffix(".json")):
            path.unlink(missing_ok=True)
    (out / f"{file}.unfinished").symlink_to("/dev/full")
    message = refusal(photos, out, "--resolution", SIZE)
    assert f"no space left for {out / file}; make room" in message
    run(photos, out, "--resolution", SIZE)
    assert content(out) == content(plain)


def test_small_disk_stops_before_an_array_and_not_within(photos, arguments, tmp_path, monkeypatch):
    """A page of a mapped file that finds no room kills the process."""

    def tried():
        monkeypatch.setattr(prepare, "estimate", lambda stages, folder: None)
        return refusal(photos, tmp_path / "disk" / "out", *arguments), os.listdir(tmp_path / "disk" / "out" / "latents")

    (tmp_path / "disk").mkdir()
    outcome = on_small_disk(tmp_path / "disk", "size=100k", tried)
    assert "no space left for" in outcome[0] and "moments.npy" in outcome[0] and len(outcome[1]) == 1


def test_read_only_folders(photos, prepared, arguments, tmp_path):
    def tried():
        shutil.copytree(prepared, tmp_path / "disk" / "done")
        os.system(f"mount -o remount,ro {tmp_path / 'disk'}")
        run(photos, tmp_path / "disk" / "done", *arguments)
        return refusal(photos, tmp_path / "disk" / "out", *arguments)

    (tmp_path / "disk").mkdir()
    message = on_small_disk(tmp_path / "disk", "size=9m", tried)
    assert "disk/out' cannot be written to" in message and "Read-only" in message


# ---- training on them ----


def train(prepared, judge_folder, out, *words):
    import train_repa_dar

    sizes = "--depth 2 --hidden-size 16 --num-heads 2 --projector-dim 8 --align-depth 1 --chunk-size 2 --batch-size 8"
    steps = "--max-steps 20 --log-every 10 --tensorboard False --lr 3e-3 --num-workers 0"
    judged = f"--eval-encoder {judge_folder} --eval-every 20 --eval-samples 4 --eval-batch-size 4 --sample-steps 2"
    train_repa_dar.main([*f"--data {prepared} --out {out} {sizes} {steps} {judged}".split(), *map(str, words)])


@pytest.mark.parametrize(
    "routing, alignment, features",
    [("residual", "none", "prepared"), ("dar", "repa", "prepared"), ("dar", "repa", "online")],
)
def test_every_arm_trains_on_latents(
    prepared, autoencoder_folder, dino_folder, encoder_folder, judge_folder, tmp_path, routing, alignment, features
):
    """Two encoders at once, mirrored copies, sampling and decoding."""
    words = f"--autoencoder {autoencoder_folder} --encoder {dino_folder} {encoder_folder} --mirror --routing {routing}"
    words += f" --alignment {alignment} --encoder-features {features}"
    train(prepared, judge_folder, tmp_path / "run", *words.split())
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    losses = [line["denoising_loss"] for line in lines if "loss" in line]
    assert losses[1] < losses[0] and any("frechet_distance" in line for line in lines)
    grid = np.asarray(Image.open(tmp_path / "run" / "samples" / "0000020.png"))
    assert grid.ndim == 3 and grid.std() > 0


def test_a_dry_run_says_what_it_takes_and_writes_nothing(prepared, autoencoder_folder, judge_folder, tmp_path, capsys):
    words = f"--autoencoder {autoencoder_folder} --eval-every 0 --dry-run --micro-batch-size 4"
    train(prepared, judge_folder, tmp_path / "run", *words.split())
    assert "2.625 steps in an epoch" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_autoencoder_decoder_and_images_must_fit(prepared, autoencoder_folder, judge_folder, tmp_path):
    from diffusers import AutoencoderKL

    other = tmp_path / "other"
    AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4).save_pretrained(other)
    for words, message in (
        (["--decoder", other], "decoder = .* enlarges 1 times"),
        (["--decoder", "pixels"], "decoder = 'pixels' takes 3 channels"),
        (["--mirror", "--autoencoder", other], "no finished latents"),
    ):
        with pytest.raises(SystemExit, match=message):
            train(
                prepared, judge_folder, tmp_path / "run", "--autoencoder", autoencoder_folder, "--eval-every", 0, *words
            )


@pytest.fixture(scope="module")
def of_repa(autoencoder_folder, tmp_path_factory):
    """A folder as REPA's tools write it: 9 images numbered on end, float32 latents by diffusers alone, ten classes."""
    from diffusers import AutoencoderKL

    folder, model = tmp_path_factory.mktemp("repa") / "data", AutoencoderKL.from_pretrained(autoencoder_folder).eval()
    labels = {"images": [], "vae-sd": []}
    for i in range(9):
        picture, latents = f"00000/img{i:08}.png", f"00000/img-mean-std-{i:08}.npy"
        for part, name in (("images", picture), ("vae-sd", latents)):
            (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
            labels[part].append([name, (3 * i) % 10])
        image = noise_image(SIZE, SIZE, seed=i)
        Image.fromarray(image).save(folder / "images" / picture, compress_level=0)
        with torch.no_grad():
            x = torch.from_numpy(image).permute(2, 0, 1)[None].to(torch.float32) / 127.5 - 1
            posterior = model.encode(x)["latent_dist"]
        np.save(folder / "vae-sd" / latents, torch.cat([posterior.mean, posterior.std], dim=1)[0])
    for part, found in labels.items():
        (folder / part / "dataset.json").write_text(json.dumps({"labels": found}))
    return folder


def as_repa_reads(folder):
    """Images, latents and labels in the order of REPA's CustomDataset: sorted names of each part, one by one."""
    labels = dict(json.loads((folder / "vae-sd" / "dataset.json").read_text())["labels"])
    pictures, latents = (
        sorted((folder / part).rglob(f"*.{end}")) for part, end in (("images", "png"), ("vae-sd", "npy"))
    )
    images = np.stack([np.array(Image.open(path)).transpose(2, 0, 1) for path in pictures])
    return images, np.stack([np.load(path) for path in latents]), [labels[f"00000/{path.name}"] for path in latents]


def zipped(folder, out):
    """Each part in a zip without compression, as the tools write it where --dest ends in .zip."""
    for part in ("images", "vae-sd"):
        out.mkdir(exist_ok=True)
        with zipfile.ZipFile(out / f"{part}.zip", "w", zipfile.ZIP_STORED) as archive:
            for path in (folder / part).rglob("*.*"):
                archive.write(path, path.relative_to(folder / part))
                archive.writestr(f"__MACOSX/00000/._{path.name}", b"what macOS adds to a zip")
    return out


@pytest.mark.parametrize("packed", [False, True])
def test_repas_folder_is_taken_as_it_is(of_repa, autoencoder_folder, encoder_folder, judge_folder, packed, tmp_path):
    """Images and labels exactly, latents to a rounding to float16; no image is encoded but the first few."""
    source, out = zipped(of_repa, tmp_path / "zip") if packed else of_repa, tmp_path / "out"
    run(source, out, "--resolution", SIZE, "--autoencoder", autoencoder_folder, "--encoder", encoder_folder)
    data = PreparedImages(out, latents=load_autoencoder(str(autoencoder_folder)).content)
    found, (images, latents, labels) = data.__getitems__(range(len(data))), as_repa_reads(of_repa)
    assert np.array_equal(found["images"], images) and found["labels"].tolist() == labels
    assert len(data) == 9 and data.num_classes == 10
    np.testing.assert_allclose(found["moments"].numpy(), latents, rtol=2**-11, atol=2**-25)
    prepare.main(["x", "--out", str(out), "--verify"])
    train(out, judge_folder, tmp_path / "run", "--autoencoder", autoencoder_folder, "--max-steps", 1, "--eval-every", 0)


@pytest.fixture(scope="module")
def of_lightning(autoencoder_folder, tmp_path_factory):
    """LightningDiT's files: draws of the posterior by diffusers alone, the mirrored images' too, in two shards."""
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    folder, model = tmp_path_factory.mktemp("lightning"), AutoencoderKL.from_pretrained(autoencoder_folder).eval()
    for shard, count in enumerate((5, 4)):
        images = np.stack([noise_image(SIZE, SIZE, seed=10 * shard + i) for i in range(count)])
        x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            drawn = {key: model.encode(images).latent_dist.sample() for key, images in (("", x), ("_flip", x.flip(-1)))}
        tensors = {f"latents{key}": value.contiguous() for key, value in drawn.items()}
        tensors["labels"] = torch.arange(count) + 3 * shard
        save_file(tensors, folder / f"latents_rank00_shard{shard:03}.safetensors")
    return folder


def test_lightnings_latents_train_without_images(
    of_lightning, autoencoder_folder, encoder_folder, judge_folder, tmp_path, monkeypatch
):
    from safetensors.torch import load_file

    out, words = tmp_path / "out", ("--resolution", SIZE, "--autoencoder", autoencoder_folder)
    run(of_lightning, out, *words, "--mirror", "--statistics")
    content, shards = load_autoencoder(str(autoencoder_folder)).content, map(load_file, sorted(of_lightning.iterdir()))
    data, shards = PreparedImages(out, images=False, latents=content, mirror=True), list(shards)
    found = data.__getitems__(range(18))
    for key, rows in (("latents", slice(0, 9)), ("latents_flip", slice(9, 18))):
        expected = torch.cat([shard[key] for shard in shards])
        torch.testing.assert_close(found["moments"][rows, :4].float(), expected, rtol=2**-10, atol=2**-20)
    assert (found["moments"][:, 4:] == 0).all() and found["labels"].tolist() == 2 * [0, 1, 2, 3, 4, 3, 4, 5, 6]
    prepare.main(["x", "--out", str(out), "--verify"])
    latents = ("--autoencoder", autoencoder_folder, "--max-steps", 2)
    train(out, judge_folder, tmp_path / "run", *latents, "--eval-every", 0, "--mirror")
    monkeypatch.setattr(features, "InceptionFeatures", NarrowInception)
    monkeypatch.setattr(online, "npz_statistics", lambda path, network: {"pool3": (torch.zeros(7), torch.eye(7))})
    train(out, "inception", tmp_path / "fid", *latents, "--fid-reference", __file__, "--eval-every", 2)
    assert "fid" in (tmp_path / "fid" / "metrics.jsonl").read_text()
    needs = "holds latents without images, which are needed for"
    seen = (*latents, "--eval-every", 0, "--diagnose-every", 2)
    aligned = ("--alignment", "repa", "--encoder", encoder_folder, "--encoder-features", "online", "--eval-every", 0)
    for name, more in (
        ("judged", latents),
        ("aligned", (*latents, *aligned)),
        ("pixels", ("--eval-every", 0)),
        ("seen", seen),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{needs}"):
            train(out, judge_folder, tmp_path / name, *more)


def test_what_lightnings_files_cannot_give(of_lightning, autoencoder_folder, encoder_folder, tmp_path):
    source, words = tmp_path / "source", ("--resolution", SIZE, "--autoencoder", autoencoder_folder)
    with pytest.raises(SystemExit, match="error: encoder = .* holds no images that they could encode"):
        run(of_lightning, tmp_path / "out", *words, "--encoder", encoder_folder)
    with pytest.raises(SystemExit, match="error: none of the entries of .* its latents are float32 .8, 8, 8."):
        run(of_lightning, tmp_path / "out", "--resolution", 2 * SIZE, "--autoencoder", autoencoder_folder)
    shutil.copytree(of_lightning, source)
    (source / "latents_rank00_shard001.safetensors").write_bytes(b"half of it")
    with pytest.raises(SystemExit, match="error: .*shard001.safetensors is damaged, or holds no latents and labels"):
        run(source, tmp_path / "out", *words)
    assert not (tmp_path / "out" / "meta.json").exists()


def test_entries_of_repas_folder_that_are_missing_or_damaged(of_repa, autoencoder_folder, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(of_repa, source)
    (source / "images" / "00000" / "img00000001.png").unlink()
    (source / "vae-sd" / "00000" / "img-mean-std-00000002.npy").unlink()
    (source / "vae-sd" / "00000" / "img-mean-std-00000003.npy").write_bytes(b"junk")
    np.save(source / "vae-sd" / "00000" / "img-mean-std-00000004.npy", np.full((8, 8, 8), np.nan))
    np.save(source / "vae-sd" / "00000" / "img-mean-std-00000005.npy", np.zeros((8, 4, 4)))
    np.save(source / "vae-sd" / "00000" / "img-mean-std-00000006.npy", np.full((8, 8, 8), 1e5))
    np.save(source / "vae-sd" / "00000" / "img-mean-std-00000099.npy", np.zeros((8, 8, 8)))
    run(source, out, "--resolution", SIZE, "--autoencoder", autoencoder_folder)
    said = capsys.readouterr().out
    assert "left out, without a label: 1 (00000/img-mean-std-00000099.npy)" in said and "6 damaged and left out" in said
    for number in range(1, 7):
        assert f"left out: 00000/img-mean-std-0000000{number}.npy" in said
    data = PreparedImages(out, latents=load_autoencoder(str(autoencoder_folder)).content)
    keep = [0, 7, 8]
    expected = as_repa_reads(of_repa)
    assert np.array_equal(data.__getitems__(range(3))["images"], expected[0][keep])
    np.testing.assert_allclose(
        data.__getitems__(range(3))["moments"].numpy(), expected[1][keep], rtol=2**-11, atol=2**-25
    )


def test_repas_folder_with_what_does_not_fit(of_repa, autoencoder_folder, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(5)
    other = AutoencoderKL(**dict(AutoencoderKL.from_pretrained(autoencoder_folder).config))
    other.save_pretrained(tmp_path / "other")
    broken = {
        "bare": '{"labels": null}',
        "below": '{"labels": [["00000/img-mean-std-0.npy", -1]]}',
    }
    for name, text in broken.items():
        shutil.copytree(of_repa, tmp_path / name)
        (tmp_path / name / "vae-sd" / "dataset.json").write_text(text)
    shutil.copytree(of_repa / "vae-sd", tmp_path / "damaged" / "vae-sd")
    (tmp_path / "damaged" / "images.zip").write_bytes(b"no zip")
    right = ("--autoencoder", autoencoder_folder)
    for source, words, message in (
        (of_repa, (), "holds latents: give the --autoencoder that made them"),
        (of_repa, (*right, "--resolution", SIZE // 2), r"none of the entries of .* not finite .*\(8, 4, 4\)"),
        (of_repa, ("--autoencoder", tmp_path / "other"), "are not those of .*other': they differ by"),
        (tmp_path / "bare", right, "has no labels in dataset.json"),
        (tmp_path / "below", right, "img-mean-std-0.npy"),
        (tmp_path / "damaged", right, "images.zip is damaged, or no zip"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            run(source, tmp_path / "out", "--resolution", SIZE, *words)
        assert not (tmp_path / "out").exists()

"""Preparing latents and features (any number of processes, mirrored copies, checksums), and training on them.

Autoencoder and encoders are tiny and random, saved to a folder and loaded as real ones are. Images are drawn here.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import models  # noqa: F401  (before timm: see its docstring)
import timm
from timm.models import save_for_hf

from dataset import bench, prepare
from dataset.prepared import PreparedImages
from models.autoencoder import load_autoencoder
from models.encoders import FrozenEncoder
from runtime import load_file
from tests.conftest import ROOT, read_lines
from tests.test_data import content, noise_image, refusal, run, stored_images

SIZE, COUNT = 16, 22


@pytest.fixture(scope="module")
def autoencoder_folder(tmp_path_factory):
    """A KL autoencoder that halves the side and has 4 latent channels."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("networks") / "vae"
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=SIZE,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    """DINOv2's architecture with registers: patches of 14 pixels, a 4 x 4 grid."""
    folder = tmp_path_factory.mktemp("networks") / "dino"
    torch.manual_seed(1)
    architecture = dict(img_size=56, embed_dim=12, depth=1, num_heads=2, num_classes=0)
    save_for_hf(
        timm.create_model("vit_small_patch14_reg4_dinov2", **architecture),
        str(folder),
        model_args=architecture,
        safe_serialization=True,
    )
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
    return [
        "--resolution",
        SIZE,
        "--autoencoder",
        autoencoder_folder,
        "--encoder",
        dino_folder,
        encoder_folder,
        "--token-grid",
        4,
        "--batch-size",
        3,
        "--mirror",
    ]


@pytest.fixture(scope="module")
def prepared(photos, arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "photos"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "CHUNK", 4)
        run(photos, out, *arguments)
    return out


def test_rows_are_what_the_networks_give(prepared, autoencoder_folder, dino_folder, encoder_folder):
    autoencoder = load_autoencoder(str(autoencoder_folder))
    encoders = [FrozenEncoder(str(folder), 4) for folder in (dino_folder, encoder_folder)]
    data = PreparedImages(
        prepared, latents=autoencoder.fingerprint, features=[e.fingerprint for e in encoders], mirror=True
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
    chosen = data.__getitems__([40, 3, 20])
    assert all(torch.equal(chosen[name], batch[name][[40, 3, 20]]) for name in batch)


def test_only_what_is_asked_for_is_served(prepared):
    (latents,) = os.listdir(prepared / "latents")
    assert set(PreparedImages(prepared, images=False, latents=latents).__getitems__([0])) == {"labels", "moments"}
    plain = PreparedImages(prepared)
    assert set(plain.__getitems__([0])) == {"labels", "images"} and len(plain) == COUNT - 1


def torchrun(processes, *words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = "import sys; from dataset import prepare; prepare.CHUNK = 4; prepare.main(sys.argv[1:])"
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            "--no-python",
            sys.executable,
            "-c",
            script,
            *map(str, words),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_two_processes_write_what_one_does(prepared, photos, arguments, tmp_path):
    done = torchrun(2, photos, "--out", tmp_path / "out", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert content(tmp_path / "out") == content(prepared)
    assert done.stdout.count("left out: a/06.png") == 1


@pytest.mark.parametrize("stage, call", [("moments", 3), ("moments", 20)])
def test_stopped_among_the_latents_it_ends_up_the_same(prepared, photos, arguments, tmp_path, monkeypatch, stage, call):
    from models.autoencoder import Latents

    monkeypatch.setattr(prepare, "CHUNK", 4)
    original, calls = getattr(Latents, stage), []

    def until(self, images):
        calls.append(len(images))
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Latents, stage, until)
        with pytest.raises(SystemExit, match="the same command again"):
            run(photos, tmp_path / "out", *arguments)
    (latents,) = os.listdir(tmp_path / "out" / "latents")
    with pytest.raises(ValueError, match=f"no finished latents {latents}.*--autoencoder"):
        PreparedImages(tmp_path / "out", latents=latents)
    run(photos, tmp_path / "out", *arguments)
    assert content(tmp_path / "out") == content(prepared)


def test_the_networks_may_move(prepared, photos, arguments, autoencoder_folder, tmp_path, monkeypatch, capsys):
    """What is stored is known by its weights, not by where they lie; the processes' number of images may change too."""
    monkeypatch.setattr(prepare, "CHUNK", 4)
    moved = autoencoder_folder.rename(autoencoder_folder.with_name("moved"))
    try:
        before = content(prepared)
        run(photos, prepared, *[moved if word == autoencoder_folder else word for word in arguments], "--batch-size", 5)
        assert content(prepared) == before
        assert capsys.readouterr().out.count("already there") == 4
    finally:
        moved.rename(autoencoder_folder)


def test_mirrored_rows_must_have_been_stored(photos, autoencoder_folder, tmp_path):
    run(photos, tmp_path / "out", "--resolution", SIZE, "--autoencoder", autoencoder_folder)
    (latents,) = os.listdir(tmp_path / "out" / "latents")
    assert len(PreparedImages(tmp_path / "out", latents=latents)) == COUNT - 1
    assert len(PreparedImages(tmp_path / "out", mirror=True)) == 2 * (COUNT - 1)  # pixels need no copies
    with pytest.raises(ValueError, match=f"no finished latents mirrored ones of {latents}.*--mirror"):
        PreparedImages(tmp_path / "out", latents=latents, mirror=True)


def test_checksums_find_what_has_changed(prepared, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    run("", copy, "--verify")
    assert "as they were written" in capsys.readouterr().out
    for path, place in (
        (copy / "images" / "00002.bin", 40),
        (next(copy.glob("latents/*/moments.npy")), -1),
        (next(copy.glob("features/*/tokens.npy")), 200),
    ):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
    message = refusal("", copy, "--verify")
    assert "00002.bin" in message and "moments.npy rows 20 to 21" in message and "tokens.npy rows 0 to 3" in message
    assert message.count(";") == 2
    record = next(copy.glob("latents/*/00001.json"))
    record.rename(record.with_suffix(".away"))
    assert "is not finished; the same command without --verify" in refusal("", copy, "--verify")
    record.with_suffix(".away").rename(record)
    # As the message says: without these records the chunks are made again.
    for record in (
        *copy.glob("*/*/meta.json"),
        copy / "meta.json",
        copy / "images" / "00002.json",
        *copy.glob("latents/*/00005.json"),
        *copy.glob("features/*/00000.json"),
    ):
        record.unlink()
    assert "is not finished" in refusal("", copy, "--verify")


def test_estimate_comes_first_and_is_near(photos, arguments, tmp_path, capsys):
    run(photos, tmp_path / "out", *arguments)
    printed = capsys.readouterr().out
    assert printed.index("images: about") < printed.index("moments: about") < printed.index("left out")
    estimated = float(re.search(r"images: about ([\d.]+) KiB", printed)[1]) * 1024
    stored = sum(path.stat().st_size for path in (tmp_path / "out" / "images").glob("*.bin"))
    assert estimated == pytest.approx(stored, rel=0.3)
    assert f"moments: about {22 * 2 * 8 * 8 * 8 * 2 / 1024:.3g} KiB" in printed
    assert re.search(r"tokens: about [\d.]+ KiB and [\d.e-]+ minutes \(\d+ images/s in each of 1 processes\)", printed)
    run(photos, tmp_path / "out", *arguments)
    assert "about" not in capsys.readouterr().out  # nothing is left to estimate


@pytest.mark.parametrize(
    "words, message",
    [
        (["--autoencoder", "sd-vae"], "'sd-vae' is unknown"),
        (["--resolution", 15], "resolution = 15 is not a multiple"),
        (["--encoder-weights", "a", "b", "c"], "encoder_weights = ('a', 'b', 'c')"),
        (["--token-grid", 0], "token_grid = 0"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(photos, arguments, tmp_path, words, message):
    assert message in refusal(photos, tmp_path / "out", *arguments, *words)
    assert not (tmp_path / "out").exists()


# ---- training on them ----


def train(prepared, out, *words):
    import train_repa_dar

    train_repa_dar.main(
        [
            str(word)
            for word in (
                "--data",
                prepared,
                "--out",
                out,
                "--depth",
                2,
                "--hidden-size",
                16,
                "--num-heads",
                2,
                "--projector-dim",
                8,
                "--align-depth",
                1,
                "--chunk-size",
                2,
                "--batch-size",
                8,
                "--max-steps",
                20,
                "--log-every",
                10,
                "--eval-every",
                20,
                "--eval-samples",
                4,
                "--eval-batch-size",
                4,
                "--sample-steps",
                2,
                "--tensorboard",
                "False",
                "--lr",
                "3e-3",
                "--num-workers",
                0,
                *words,
            )
        ]
    )


@pytest.mark.parametrize("routing", ["residual", "dar"])
@pytest.mark.parametrize("alignment, features", [("none", "prepared"), ("repa", "prepared"), ("repa", "online")])
def test_every_arm_trains_on_latents(
    prepared, autoencoder_folder, dino_folder, encoder_folder, tmp_path, capsys, routing, alignment, features
):
    """Two encoders at once, mirrored copies, sampling and decoding."""
    train(
        prepared,
        tmp_path / "run",
        "--autoencoder",
        autoencoder_folder,
        "--encoder",
        dino_folder,
        encoder_folder,
        "--routing",
        routing,
        "--alignment",
        alignment,
        "--encoder-features",
        features,
        "--mirror",
    )
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    losses = [line["denoising_loss"] for line in lines if "loss" in line]
    assert losses[1] < losses[0] and any("frechet_distance" in line for line in lines)
    grid = np.asarray(Image.open(tmp_path / "run" / "samples" / "0000020.png"))
    assert grid.ndim == 3 and grid.std() > 0
    printed = capsys.readouterr().out
    assert f"trained on {autoencoder_folder}, 4 x 8 x 8" in printed and "42 images of 16 pixels" in printed
    model = load_file(tmp_path / "run" / "last.pt")["model"]
    assert sum(name.startswith("projectors") and name.endswith("4.weight") for name in model) == (
        2 if alignment == "repa" else 0
    )
    assert ("router.aggregators.0.query" in model) == (routing == "dar")


def test_a_dry_run_says_what_it_takes_and_writes_nothing(prepared, autoencoder_folder, tmp_path, capsys):
    train(
        prepared,
        tmp_path / "run",
        "--autoencoder",
        autoencoder_folder,
        "--eval-every",
        0,
        "--dry-run",
        "--micro-batch-size",
        4,
    )
    printed = capsys.readouterr().out
    for words in (
        "parameters 0.0",
        "GFLOP of matrix products for an image",
        "8 global = 1 processes x 8 local, in 2 accumulated parts of 4",
        "2.625 steps in an epoch",
        "16 tokens",
        "memory     about",
        "GiB for a checkpoint",
    ):
        assert words in printed, words
    assert not (tmp_path / "run").exists()


def test_autoencoder_decoder_and_images_must_fit(prepared, autoencoder_folder, digits, tmp_path):
    from diffusers import AutoencoderKL

    other = tmp_path / "other"
    AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4).save_pretrained(other)
    for words, message in (
        (["--decoder", other], "decoder = .* enlarges 1 times"),
        (["--decoder", "pixels"], "decoder = 'pixels' takes 3 channels"),
        (["--mirror", "--autoencoder", other], "no finished latents"),
    ):
        with pytest.raises(SystemExit, match=message):
            train(prepared, tmp_path / "run", "--autoencoder", autoencoder_folder, "--eval-every", 0, *words)


def test_reader_benchmark(prepared, tmp_path, capsys):
    bench.main(
        [str(prepared), "--batch-size", "4", "--num-workers", "0", "--steps", "3", "--out", str(tmp_path / "r.json")]
    )
    rates = json.loads((tmp_path / "r.json").read_text())["images_per_second"]
    (latents,) = os.listdir(prepared / "latents")
    assert set(rates) == {
        "images",
        f"latents {latents}",
        f"latents {latents} + images",
        *(f"latents {latents} + tokens {name}" for name in os.listdir(prepared / "features")),
    }
    assert all(rate > 0 for rate in rates.values()) and "images/s   images" in capsys.readouterr().out

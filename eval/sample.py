"""Draws images from a checkpoint: an npz in the layout of ADM's evaluator, a grid, and all settings beside them.

    python -m eval.sample runs/imagenet256/dar/last.pt --preset repa-sde-250 --num-samples 50000 --seed 0
    torchrun --nproc_per_node=8 -m eval.sample runs/imagenet256/dar/last.pt --preset repa-sde-250
    python -m eval.sample SiT-XL-2-256x256.pt --model SiT-XL/2 --autoencoder sd-vae-ft-ema --preset sit-ode-250

The same command again, with any number of processes, goes on where it stopped. An image depends on the settings, the
seed and its index alone: other processes or batch sizes change it by rounding alone, in float32 at most one grey level.
The folder is named after the checkpoint, the sampler, and a hash of every setting that moves FID; it holds

    NAME.npz            arr_0, uint8 (N, H, W, 3), and arr_1, int64 (N), the labels
    grid.png            the first 64, by label
    settings.json       the settings, and where each start of the command ran
    samples/CHUNK.npy   64 images each; may be deleted once the npz is there

| preset         | sampler                         | network evaluations per image |
| -------------- | ------------------------------- | ----------------------------- |
| repa-sde-250   | Euler-Maruyama                  | 250                           |
| sit-ode-250    | Heun, 125 steps                 | 249: the last step takes one  |
| paper-cfg-1.5  | Euler-Maruyama, guidance 1.5    | 250, each for two labels      |
| fast-ode-50    | Euler, for a quick look         | 50                            |

Shapes: B batch, N all images, C channels of what SiT sees, S its size, H = W pixels.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from checkpoint import load_trained
from eval.online import grid_of
from eval.samplers import IndexedNoise, sample_ode, sample_sde
from models.autoencoder import load_autoencoder
from runtime import EVALUATION, Ranks, derive_seed, environment, lock_folder, replaced

CHUNK = 64  # images in a file, whatever the batch and the processes
GRID = 64  # images shown; those of the first chunk
PRESETS = {
    "repa-sde-250": {"sampler": "sde", "steps": 250, "cfg_scale": 1.0},
    "sit-ode-250": {"sampler": "heun", "steps": 125, "cfg_scale": 1.0},
    "paper-cfg-1.5": {"sampler": "sde", "steps": 250, "cfg_scale": 1.5},
    "fast-ode-50": {"sampler": "euler", "steps": 50, "cfg_scale": 1.0},
}
ARCHITECTURE = ("num_heads", "routing", "query", "chunk_size", "final_aggregator")  # what weights do not show
CONVERSION = "round to nearest, (x + 1) * 127.5"


@dataclass(frozen=True)
class Options:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Ours (last.pt), or weights that SiT or REPA has released."""
    out: str = ""
    """Folder to write. Empty: samples/{run}-{step}-{sampler}-{hash of the settings}."""
    preset: Literal["repa-sde-250", "sit-ode-250", "paper-cfg-1.5", "fast-ode-50"] = "repa-sde-250"
    """Sampler, steps and guidance scale; any of these given by hand wins over it."""
    sampler: Literal["euler", "heun", "sde"] | None = None
    """ODE by Euler or Heun, or SDE by Euler-Maruyama."""
    steps: int | None = None
    """Sampler steps; heun costs two network evaluations in each but the last."""
    cfg_scale: float | None = None
    """Guidance scale; 1: none."""
    guidance_interval: tuple[float, float] | None = None
    """Times between which guidance is applied; all if not given. 1 is noise."""
    num_samples: int = 50_000
    """Images to draw."""
    seed: int = 0
    """Decides noise and labels."""
    classes: tuple[int, ...] = ()
    """Draw these labels only; all if not given. Either way in random order, each as often as the others."""
    batch_size: int = CHUNK
    """Images that a process takes at a time, at most the 64 of a file."""
    precision: Literal["auto", "bf16", "tf32", "fp32"] = "auto"
    """Of the network; auto is bf16 on a GPU and fp32 on a CPU. The sampler's state is float64."""
    average: str = ""
    """Which moving average of ours, by its decay, or `none` for the weights themselves; the first if not given."""
    model: str = ""
    """Name of a released model, such as SiT-XL/2."""
    autoencoder: str = ""
    """Decodes the samples; must be given for released weights (`pixels` for none). Empty: the one of the run."""
    path: Literal["linear", "cosine"] | None = None
    """Interpolant that the model was trained with; if not given the run's, or linear for released weights."""
    npz: bool = True
    """Write the npz; without it the images are only in samples/."""


@dataclass(frozen=True)
class Settings:
    """All that moves FID. `resolve` makes them; weights and autoencoder are fingerprints of content."""

    weights: str
    autoencoder: str
    sampler: str
    steps: int
    cfg_scale: float
    guidance_interval: tuple[float, float]
    path: str
    precision: str
    num_samples: int
    seed: int
    classes: tuple[int, ...]

    def digits(self):
        """Eight hexadecimal digits that change with any of them."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:8]

    def evaluations(self):
        """Evaluations of the velocity per image; a guided one takes the network twice."""
        return 2 * self.steps - 1 if self.sampler == "heun" else self.steps


def main(argv=None):
    options = tyro.cli(Options, args=argv, prog="python -m eval.sample", description=__doc__)
    with Ranks() as ranks, told_to_stop(ranks):
        try:
            sample(options, ranks)
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from None


def sample(options, ranks):
    """Write the folder, or what is missing of it, and return it. Raises ValueError on what cannot be used."""
    if options.batch_size < 1:
        raise ValueError(f"batch_size = {options.batch_size}: must be at least 1")
    model, autoencoder, settings, origin = load(options, ranks)
    folder = Path(options.out) if options.out else Path("samples") / folder_name(options, settings, origin)
    shape = (settings.num_samples, *2 * (model.input_size * autoencoder.downsampling,), 3)
    npz = folder / f"{folder.resolve().name}.npz"
    lock = claim(folder, settings) if ranks.main else None
    with contextlib.closing(lock) if lock else contextlib.nullcontext():
        chunks = {
            folder / "samples" / f"{first // CHUNK:05}.npy": range(first, min(first + CHUNK, shape[0]))
            for first in range(0, shape[0], CHUNK)
        }
        missing = {path: indices for path, indices in chunks.items() if not npz.is_file() and not path.is_file()}
        if ranks.main and (missing or options.npz and not npz.is_file()):
            describe(options, settings, origin, folder, shape, sum(map(len, missing.values())), ranks)
            record(options, settings, origin, folder, ranks)
        ranks.barrier()  # nobody writes before the folder is known to be ours, and is there
        draw(missing, list(chunks)[ranks.rank :: ranks.world], model, autoencoder, settings, options, ranks)
        if ranks.main:
            while not npz.is_file() and not all(path.is_file() for path in chunks):
                time.sleep(0.5)  # a barrier would give up long before the slowest process does
            finish(chunks, npz, shape, labels_of(settings, range(shape[0]), model.num_classes), options)
    return folder


# ---- what is drawn ----


def load(options, ranks):
    """The model and the autoencoder on this process's device, the resolved Settings, and where the model is from.

    Raises ValueError where the options fit neither each other nor the checkpoint.
    """
    model, trained = load_trained(options.checkpoint, options.average, options.model)
    model.align_depth = ()  # nobody reads the projections here
    name = options.autoencoder or trained.get("autoencoder", "")
    if not name:
        raise ValueError(
            f"autoencoder = '': say what decodes the samples of {options.checkpoint}, such as "
            "--autoencoder sd-vae-ft-ema, or pixels for a model of images"
        )
    with ranks.one_first():
        autoencoder = load_autoencoder(name).to(ranks.device)
    expected = trained.get("content of autoencoder", autoencoder.fingerprint)
    if not options.autoencoder and autoencoder.fingerprint != expected:
        raise ValueError(
            f"{options.checkpoint} was trained with another autoencoder than the present {name!r}; give "
            "the right one with --autoencoder, or this one to use it all the same"
        )
    if autoencoder.channels != model.in_channels:
        raise ValueError(
            f"autoencoder = {name!r} has {autoencoder.channels} channels and {options.checkpoint} has "
            f"{model.in_channels}; give the --autoencoder that it was trained with"
        )
    settings = resolve(options, trained, model, autoencoder, ranks.device)
    origin = {
        "checkpoint": str(options.checkpoint),
        "model": options.model or trained["model"],
        "step": trained.get("step"),
        "average": trained.get("average"),
        "autoencoder": name,
    }
    return model.to(ranks.device), autoencoder, settings, origin


def resolve(options, trained, model, autoencoder, device):
    """The Settings that the options mean for a model, as `load_trained` returns it, on a device.

    Raises ValueError on the first value that cannot be used.
    """
    given = {key: value for key in PRESETS[options.preset] if (value := getattr(options, key)) is not None}
    chosen = {**PRESETS[options.preset], **given}
    guided = chosen["cfg_scale"] != 1
    interval = tuple(options.guidance_interval or (0.0, 1.0))
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    unknown = [label for label in options.classes if not 0 <= label < model.num_classes]
    for fine, name, value, rule in (
        (
            chosen["steps"] >= 1 + (chosen["sampler"] == "sde"),
            "steps",
            chosen["steps"],
            f"must be at least {1 + (chosen['sampler'] == 'sde')} for {chosen['sampler']}",
        ),
        (
            0 <= chosen["cfg_scale"] < float("inf"),
            "cfg_scale",
            chosen["cfg_scale"],
            "must be at least 0, and finite; 1 is none",
        ),
        (0 <= interval[0] < interval[1] <= 1, "guidance_interval", interval, "must be 0 <= low < high <= 1"),
        (
            guided or options.guidance_interval is None,
            "guidance_interval",
            interval,
            "has no effect without guidance; give --cfg-scale, or leave it out",
        ),
        (
            not guided or trained.get("class_dropout_prob", 1) > 0,
            "cfg_scale",
            chosen["cfg_scale"],
            f"{options.checkpoint} was trained without a null class (class_dropout_prob = 0); give --cfg-scale 1",
        ),
        (options.num_samples >= 1, "num_samples", options.num_samples, "must be at least 1"),
        (options.seed >= 0, "seed", options.seed, "must be at least 0"),
        (not unknown, "classes", options.classes, f"the model's are 0 to {model.num_classes - 1}"),
        (len(set(options.classes)) == len(options.classes), "classes", options.classes, "repeats a label"),
        (precision != "tf32" or device.type == "cuda", "precision", precision, "needs a GPU; give fp32"),
    ):
        if not fine:
            raise ValueError(f"{name} = {value!r}: {rule}")
    identity = [options.model or trained["model"], *(trained.get(key) for key in ARCHITECTURE)]
    chosen["cfg_scale"] = float(chosen["cfg_scale"])  # 2 and 2.0 would have two hashes
    return Settings(
        fingerprint(model, identity),
        autoencoder.fingerprint,
        **chosen,
        guidance_interval=tuple(map(float, interval)),
        path=options.path or trained.get("path", "linear"),
        precision=precision,
        num_samples=options.num_samples,
        seed=options.seed,
        classes=tuple(options.classes),
    )


def fingerprint(model, identity):
    """Twelve hexadecimal digits of the weights, and of a list of what else makes the model."""
    digest = hashlib.sha256(json.dumps(identity).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def labels_of(settings, indices, num_classes):
    """Labels (B) int64 of these indices: K of them in a row are the K classes, shuffled by (seed, row).

    Any prefix is thus as balanced as can be, and no part of it is of a few classes only.
    """
    classes = np.array(settings.classes or range(num_classes))
    # The 1 sets these seeds apart from those of the noise.
    rows = {
        row: np.random.default_rng([settings.seed, EVALUATION, row, 1]).permutation(classes)
        for row in {i // len(classes) for i in indices}
    }
    return torch.tensor([int(rows[i // len(classes)][i % len(classes)]) for i in indices])


@torch.no_grad()
def sample_images(model, autoencoder, settings, indices, device):
    """The images with these indices, uint8 (B, 3, H, W) on the device; what `load` returns goes in.

    Raises ValueError where a sample is not finite.
    """
    shape = (model.in_channels, model.input_size, model.input_size)  # (C, S, S)
    noise = IndexedNoise([derive_seed(settings.seed, EVALUATION, i) for i in indices], shape, device)
    y = labels_of(settings, indices, model.num_classes).to(device)
    common = dict(
        num_steps=settings.steps,
        cfg_scale=settings.cfg_scale,
        path=settings.path,
        guidance_interval=settings.guidance_interval,
    )
    with tf32(settings.precision == "tf32"):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.precision == "bf16"):
            if settings.sampler == "sde":
                x = sample_sde(model, noise(), y, step_noise=noise, **common)
            else:
                x = sample_ode(model, noise(), y, solver=settings.sampler, **common)
        if not x.isfinite().all():  # as uint8 they would be noise that looks like a bad model
            raise ValueError(
                f"samples {indices[0]} to {indices[-1]} are not finite with precision = "
                f"{settings.precision!r}; try --precision fp32, or an earlier checkpoint"
            )
        return autoencoder.decode(x)


@contextlib.contextmanager
def tf32(enabled):
    """Whether float32 products are rounded to TF32 inside the block; convolutions otherwise are, by default."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# ---- the folder ----


def folder_name(options, settings, origin):
    """The run and step of the checkpoint, the sampler, and a hash of all that moves FID."""
    sampler, interval = options.preset, settings.guidance_interval
    if interval != (0, 1) or any(getattr(settings, key) != value for key, value in PRESETS[sampler].items()):
        sampler = f"{settings.sampler}-{settings.steps}"
        if settings.cfg_scale != 1:
            sampler += f"-cfg-{settings.cfg_scale:g}" + f"-{interval[0]:g}-{interval[1]:g}" * (interval != (0, 1))
    step = options.checkpoint.stem if origin["step"] is None else origin["step"]
    return "-".join([options.checkpoint.resolve().parent.name, str(step), sampler, settings.digits()])


def claim(folder, settings):
    """Lock the folder and return the lock. Raises ValueError where it is in use, foreign, or of other settings."""
    path = folder / "settings.json"
    ours = {".lock", "settings.json.unfinished"}  # left by one that ended at once
    if (
        folder.exists()
        and not path.is_file()
        and (not folder.is_dir() or {entry.name for entry in folder.iterdir()} - ours)
    ):
        raise ValueError(f"{folder} is not empty and was not made by this program; give another --out")
    lock = lock_folder(folder)
    found = read_settings(path).get("settings", {})
    wanted = json.loads(json.dumps(dataclasses.asdict(settings)))
    changed = [f"{key}: {found.get(key)!r} -> {value!r}" for key, value in wanted.items() if found.get(key) != value]
    if found and changed:
        lock.close()
        raise ValueError(f"{folder} holds samples of other settings ({'; '.join(changed)}); give another --out")
    return lock


def read_settings(path):
    try:
        content = json.loads(path.read_text()) if path.is_file() else {"settings": {}}
        if isinstance(content, dict) and "settings" in content:
            return content
    except json.JSONDecodeError:
        pass
    raise ValueError(f"{path} was not made by this program; give another --out")


def record(options, settings, origin, folder, ranks):
    """settings.json: the settings, and one entry more of where the command ran."""
    path = folder / "settings.json"
    starts = read_settings(path).get("starts", []) + [
        {"batch_size": options.batch_size, **origin, **environment(ranks)}
    ]
    content = {
        "settings": dataclasses.asdict(settings),
        "hash": settings.digits(),
        "preset": options.preset,
        "function_evaluations": settings.evaluations(),
        "uint8": CONVERSION,
        "starts": starts,
    }
    with replaced(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
    (folder / "samples").mkdir(exist_ok=True)


def describe(options, settings, origin, folder, shape, count, ranks):
    """Print what is about to be done. Raises ValueError where the disk is too small for it."""
    size = shape[1] * shape[2] * 3
    needed, free = size * (count + options.npz * shape[0]), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder} needs {needed / 2**30:.3g} GiB more, the disk has {free / 2**30:.3g}; give another "
            "--out, a smaller --num-samples, or --no-npz"
        )
    guidance = (
        "no guidance"
        if settings.cfg_scale == 1
        else (
            f"guidance {settings.cfg_scale:g} between times {settings.guidance_interval[0]:g} and "
            f"{settings.guidance_interval[1]:g}"
        )
    )
    of = "" if origin["step"] is None else f", step {origin['step']}, average {origin['average']}"
    print(
        f"samples    {folder}: {count} of {shape[0]} images of {shape[1]} pixels left to draw\n"
        f"model      {origin['model']} of {origin['checkpoint']}{of}; decoded by {origin['autoencoder']}\n"
        f"sampler    {settings.sampler}, {settings.steps} steps = {settings.evaluations()} evaluations per image, "
        f"{guidance}, {settings.path} path\n"
        f"device     {ranks.world} x {ranks.device.type}, {settings.precision}",
        flush=True,
    )


def draw(missing, mine, model, autoencoder, settings, options, ranks):
    """Write this process's part of the missing chunks."""
    mine = {path: missing[path] for path in mine if path in missing}
    with tqdm(
        total=sum(map(len, mine.values())),
        desc=f"process 1 of {ranks.world}",
        unit="img",
        disable=not ranks.main or not mine,
    ) as bar:
        for path, indices in mine.items():
            parts = []
            for first in range(0, len(indices), options.batch_size):
                part = indices[first : first + options.batch_size]
                images = sample_images(model, autoencoder, settings, part, ranks.device)
                parts.append(images.permute(0, 2, 3, 1).cpu().numpy())  # (B, H, W, 3)
                bar.update(len(part))
            with replaced(path) as file:
                np.save(file, np.concatenate(parts))


def finish(chunks, npz, shape, labels, options):
    """The grid and the npz of all chunks, if they are not there yet."""

    def read(path):
        images = np.load(path)
        if images.shape != (len(chunks[path]), *shape[1:]) or images.dtype != np.uint8:
            raise ValueError(
                f"{path} holds {images.dtype} {images.shape} in place of uint8 "
                f"{(len(chunks[path]), *shape[1:])}; delete it and give the same command again"
            )
        return images

    grid = npz.with_name("grid.png")
    first = next(iter(chunks))
    if not grid.is_file() and first.is_file():
        picture = grid_of(torch.from_numpy(read(first)[:GRID]).permute(0, 3, 1, 2), labels)
        with replaced(grid) as file:
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "PNG")
    if options.npz and not npz.is_file():
        with replaced(npz) as file, zipfile.ZipFile(file, "w") as archive:
            with member(archive, "arr_0.npy") as array:  # a chunk at a time, for the memory
                np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for path in chunks:
                    array.write(read(path).tobytes())
            with member(archive, "arr_1.npy") as array:
                np.lib.format.write_array(array, labels.numpy())
    print(f"{npz if npz.is_file() else npz.parent}: {shape[0]} images, complete", flush=True)


def member(archive, name):
    """A file to write inside the archive; with one fixed date, so that equal images make equal bytes."""
    return archive.open(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True)


@contextlib.contextmanager
def told_to_stop(ranks):
    """SIGINT and SIGTERM end the block at once: whole chunks are kept, and nothing else has to be saved."""

    def stop(number, frame):
        for each in previous:  # torchrun repeats what it is sent
            signal.signal(each, signal.SIG_IGN)
        if ranks.main:
            os.write(2, b"\nstopped; the same command again goes on from here\n")
        raise SystemExit(128 + number)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()

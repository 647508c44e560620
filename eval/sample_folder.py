"""The folder that eval.sample writes: its name, its settings, its files of images, and what is made of them at the end.

Shapes: B batch, N all images, H = W pixels.
"""

import dataclasses
import hashlib
import io
import json
import math
import shutil
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eval.online import grid_of
from runtime import Ranks, check_folder, environment, lock_folder, read_json, replaced, write_json
from weights import SUFFIXES

CONVERSION = "round to nearest, (x + 1) * 127.5"


@dataclass(frozen=True)
class Settings:
    """All that moves FID. `load` of eval.sample makes them.

    weights, guide and autoencoder are fingerprints; no classes are all, no prompts are those of a model of labels.
    """

    weights: str
    autoencoder: str
    sampler: str
    steps: int
    cfg_scale: float
    guide: str
    guidance_interval: tuple[float, float]
    time_shift: float
    path: str
    precision: str
    num_samples: int
    seed: int
    labels: str
    classes: tuple[int, ...]
    prompts: tuple[str, ...]

    def digits(self) -> str:
        """Eight hexadecimal digits that change with any of them."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:8]

    def evaluations(self) -> int:
        """Evaluations of the velocity per image; a guided one takes the network twice."""
        return 2 * self.steps - 1 if self.sampler == "heun" else self.steps


def folder_name(options, settings: Settings, origin: dict) -> str:
    """Run, step and chosen average of the checkpoint, sampler, steps and guidance, and a hash of all that moves FID.

    options: of eval.sample; origin: where the model is from (`load` there).
    """
    path = options.checkpoint.resolve()
    step = path.stem if origin["step"] is None else origin["step"]
    guidance = "" if settings.cfg_scale == 1 else f"-cfg-{settings.cfg_scale:g}"
    run = path.parent.name if path.suffix in SUFFIXES else path.name  # of what eval.export made
    average = "".join(f"-ema-{decay}" for decay in options.average)
    return f"{run}-{step}{average}-{settings.sampler}-{settings.steps}{guidance}-{settings.digits()}"


def claim(folder: Path, settings: Settings):
    """Lock the folder and return the lock. Raises ValueError where it is in use, foreign, or of other settings."""
    expected = folder, "settings.json", dataclasses.asdict(settings), "settings"
    check_folder(*expected)
    lock = lock_folder(folder)
    check_folder(*expected)  # another run may have come first
    return lock


def undone(npz: Path, chunks: dict) -> dict:
    """The chunks {file name: indices} that are still to be drawn."""
    # A listing, as network file systems remember for a while that a file was not there.
    found = {path.name for path in (npz.parent / "samples").glob("*.npy")}
    return {} if npz.is_file() else {name: indices for name, indices in chunks.items() if name not in found}


def record(options, settings: Settings, origin: dict, folder: Path, shape: tuple, left: int, ranks: Ranks):
    """Print what is about to be done, and write settings.json with one entry more of where the command ran.

    left: images still to draw. Raises ValueError where the disk is too small.
    """
    needed, free = shape[1] * shape[2] * 3 * (left + shape[0]), shutil.disk_usage(folder).free
    if needed > free:
        amounts = f"needs {needed / 2**30:.3g} GiB more, the disk has {free / 2**30:.3g}"
        raise ValueError(f"{folder} {amounts}; give another --out, or a smaller --num-samples")
    low, high = settings.guidance_interval
    by = f" by {options.guide}" * bool(options.guide)
    guidance = f"guidance {settings.cfg_scale:g}{by} between times {low:g} and {high:g}"
    of = "" if origin["step"] is None else f", step {origin['step']}, average {origin['average']}"
    print(
        f"samples    {folder}: {left} of {shape[0]} images of {shape[1]} pixels left to draw\n"
        f"model      {origin['model']} of {origin['checkpoint']}{of}; decoded by {origin['autoencoder']}\n"
        f"sampler    {settings.sampler}, {settings.steps} steps = {settings.evaluations()} evaluations per image, "
        f"{'no guidance' if settings.cfg_scale == 1 else guidance}, {settings.path} path, "
        f"time shift {settings.time_shift:g}\n"
        f"labels     {origin['classes']}, {settings.labels}\n"
        f"device     {ranks.world} x {ranks.device.type}, {settings.precision}",
        flush=True,
    )
    path = folder / "settings.json"
    made = read_json(path) if path.is_file() else {"starts": []}
    content = made | {
        "settings": dataclasses.asdict(settings),
        "hash": settings.digits(),
        "preset": None if settings.sampler == "few-step" else options.preset,
        "function_evaluations": settings.evaluations(),
        "uint8": CONVERSION,
        "starts": [*made["starts"], {"batch_size": options.batch_size, **origin, **environment(ranks)}],
    }
    write_json(path, content)  # first, as it says whose the folder is
    if settings.prompts:
        (folder / "prompts.txt").write_text("\n".join(settings.prompts) + "\n", encoding="utf-8")
    (folder / "samples").mkdir(exist_ok=True)


def finish(chunks: dict, npz: Path, shape: tuple, labels: torch.Tensor):
    """The grid and the npz of all chunks, {file: images}, if they are not there yet."""
    grid, first = npz.with_name("grid.png"), next(iter(chunks))
    if not grid.is_file() and first.is_file():
        images = torch.from_numpy(read_chunk(first, (chunks[first], *shape[1:])))
        prompts, images = npz.with_name("prompts.txt"), images.permute(0, 3, 1, 2)
        if prompts.is_file():
            picture = captioned_grid(images, labels, prompts.read_text(encoding="utf-8").splitlines())
        else:
            picture = Image.fromarray(grid_of(images, labels).permute(1, 2, 0).numpy())
        with replaced(grid) as file:
            picture.save(file, "PNG")
    if not npz.is_file():
        with replaced(npz) as file, zipfile.ZipFile(file, "w") as archive:
            with member(archive, "arr_0.npy") as array:  # a chunk at a time, for the memory
                np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for path, count in chunks.items():
                    array.write(read_chunk(path, (count, *shape[1:])).tobytes())
            with member(archive, "arr_1.npy") as array:
                np.lib.format.write_array(array, labels.numpy())
    print(f"{npz}: {shape[0]} images, complete", flush=True)


def captioned_grid(images: torch.Tensor, labels: torch.Tensor, prompts: list[str]) -> Image.Image:
    """uint8 (B, 3, H, W) in a square, by label, each below its prompt."""
    from matplotlib.figure import Figure  # takes a second

    columns = math.ceil(len(images) ** 0.5)
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.5 * columns, 1.8 * rows), layout="tight")
    for place, row in enumerate(labels[: len(images)].argsort(stable=True).tolist()):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(images[row].permute(1, 2, 0).numpy())
        axes.set_axis_off()
        axes.set_title(textwrap.fill(textwrap.shorten(prompts[labels[row]], 75), 25), fontsize=6)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer)


def read_chunk(path: Path, shape: tuple) -> np.ndarray:
    """Images (B, H, W, 3) of one file. Raises ValueError where it does not hold them."""
    try:
        images = np.load(path, allow_pickle=False)
        found = f"{images.dtype} {images.shape}"
    except Exception as error:  # damaged files raise many kinds
        images, found = None, f"no array ({error})"
    if found != f"uint8 {shape}":
        raise ValueError(f"{path} holds {found} in place of uint8 {shape}; delete it and give the same command again")
    return images


def member(archive: zipfile.ZipFile, name: str):
    """A file to write inside the archive; with one fixed date, so that equal images make equal bytes."""
    return archive.open(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True)

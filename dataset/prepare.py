"""Turns images into the folder that the trainer maps into memory. Running the same command again resumes it.

    python -m dataset.prepare digits --out data/digits
    python -m dataset.prepare path/to/class_folders --out data/photos --resolution 256
    python -m dataset.prepare path/to/train.parquet --out data/cifar10 --resolution 32
    python -m dataset.prepare uoft-cs/cifar10 --out data/cifar10 --resolution 32

With --encoder, the frozen encoder's tokens are stored too. A folder holds images.npy (N, H, W, 3) uint8,
labels.npy (N) int64 with -1 for images that could not be read, features/<encoder>/tokens.npy (N, T, dim) float16,
and meta.json, which is written last.
"""

import hashlib
import io
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from dataset.digits import load_digits
from models.autoencoder import load_autoencoder
from models.encoders import FrozenEncoder

CHUNK = 256                                        # images between two records of progress
AUTOENCODER = "pixels"


@dataclass(frozen=True)
class Options:
    source: Annotated[str, tyro.conf.Positional]
    """`digits`, a folder with one subfolder per class, parquet file(s) or a folder of them, or a hub dataset name."""
    out: str
    """Folder to write."""
    resolution: int | None = None
    """Side of the square images; larger ones are cropped and resized as in ADM. Digits are 8 if not given."""
    split: str = "train"
    """Split of a hub dataset."""
    image_column: str = ""
    """Column with the images of a parquet or hub dataset; found by its type if not given."""
    label_column: str = ""
    """Column with the labels; found by its type or name if not given."""
    limit: int | None = None
    """Take only so many images, spread evenly over the source."""
    encoder: str = ""
    """Store the tokens of this frozen encoder: a timm name, or a folder that timm saved."""
    encoder_weights: str = ""
    """Local weights of a timm name."""
    token_grid: int | None = None
    """Tokens along one side; if not given, those of SiT with patch size 2."""
    batch_size: int = 64
    """Images that the encoder takes at a time."""


@dataclass(frozen=True)
class Source:
    """Images that can be read one by one: `load(i)` returns a PIL image or raises."""
    names: list
    labels: np.ndarray
    class_names: list
    load: callable


def main(argv=None):
    options = tyro.cli(Options, args=argv, prog="python -m dataset.prepare", description=__doc__)
    try:
        prepare(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command again goes on from here") from None


def prepare(options):
    """Write the folder, or what is missing of it. Raises ValueError on sources and settings that cannot be used."""
    resolution = 8 if options.resolution is None and options.source == "digits" else options.resolution
    if resolution is None or resolution < 1:
        raise ValueError(f"resolution = {resolution}: say the side of the square images, such as --resolution 256")
    if options.batch_size < 1:
        raise ValueError(f"batch_size = {options.batch_size}: must be at least 1")
    source = limited(open_source(options), options.limit)
    folder = Path(options.out)
    prepare_images(source, folder, options.source, resolution)
    if options.encoder:
        prepare_features(folder, options)


def prepare_images(source, folder, source_name, resolution):
    listing = hashlib.sha256(repr((source.names, source.labels.tolist())).encode()).hexdigest()
    settings = {"source": source_name, "resolution": resolution, "count": len(source.names), "listing": listing,
                "autoencoder": AUTOENCODER}
    images = ResumableArray(folder, "images.npy", (len(source.names), resolution, resolution, 3), np.uint8, settings)
    if images.finished:
        return print(f"{folder}: {len(source.names)} images are already there")

    def read(i):
        try:
            return np.asarray(center_crop(to_rgb(source.load(i)), resolution)), None
        except Exception as error:                 # a damaged file can raise nearly anything inside a decoder
            # Without the address of a buffer in memory, which differs from run to run.
            return 0, re.sub(r"<(\S+) object at 0x\w+>", r"\1", f"{type(error).__name__}: {error}")

    damaged = images.record.setdefault("damaged", {})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for rows in images.remaining(f"images -> {folder}"):
            for i, (pixels, problem) in zip(rows, pool.map(read, rows)):
                images.array[i] = pixels
                if problem:
                    damaged[str(i)] = [source.names[i], problem]
    labels = source.labels.astype(np.int64).copy()
    labels[[int(i) for i in damaged]] = -1
    for name, problem in damaged.values():
        print(f"left out: {name} ({problem})")
    if len(damaged) == len(source.names):
        raise ValueError(f"none of the {len(source.names)} images of {source_name!r} could be read")
    np.save(folder / "labels.npy", labels)
    with open(folder / "images.npy", "rb") as pixels:
        content = hashlib.sha256(hashlib.file_digest(pixels, "sha256").digest() + labels.tobytes()).hexdigest()
    images.finish({**settings, "content": content, "class_names": source.class_names,
                   "damaged": list(damaged.values())})
    print(f"{folder}: {len(source.names) - len(damaged)} images, {len(damaged)} damaged and left out, "
          f"{len(source.class_names)} classes")


def prepare_features(folder, options):
    meta = json.loads((folder / "meta.json").read_text())
    size = meta["resolution"] // load_autoencoder(meta["autoencoder"]).downsampling
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid = size // 2 if options.token_grid is None else options.token_grid
    if grid < 1:
        raise ValueError(f"token_grid = {grid}: must be at least 1")
    encoder = FrozenEncoder(options.encoder, grid, options.encoder_weights).to(device)
    images = np.load(folder / "images.npy", mmap_mode="r")
    settings = {"encoder": options.encoder, "fingerprint": encoder.fingerprint, "grid": encoder.grid[0]}
    tokens = ResumableArray(folder / "features" / encoder.fingerprint, "tokens.npy",
                            (len(images), encoder.grid[0] * encoder.grid[1], encoder.dim), np.float16, settings)
    if tokens.finished:
        return print(f"{tokens.folder}: features are already there")
    for rows in tokens.remaining(f"features -> {tokens.folder}"):
        for first in range(rows.start, rows.stop, options.batch_size):
            part = slice(first, min(first + options.batch_size, rows.stop))
            batch = torch.from_numpy(images[part].copy()).permute(0, 3, 1, 2).to(device)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                tokens.array[part] = encoder(batch).float().cpu().numpy()
    tokens.finish(settings)
    print(f"{tokens.folder}: tokens {tokens.array.shape} of {options.encoder}")


class ResumableArray:
    """An .npy file that is filled chunk by chunk, beside a record of how far it is.

    A record made with other settings, or a folder with other content, is refused with a ValueError.
    """

    def __init__(self, folder, name, shape, dtype, settings):
        self.folder, self.record = folder, {"settings": settings, "done": 0}
        self.finished = (folder / "meta.json").is_file()
        if (folder / "progress.json").is_file():
            self.record = json.loads((folder / "progress.json").read_text())
            changed = [f"{key}: {self.record['settings'].get(key)!r} -> {value!r}" for key, value in settings.items()
                       if self.record["settings"].get(key) != value]
            if changed:
                raise ValueError(f"{folder} was prepared with other settings ({'; '.join(changed)}); "
                                 "give another --out, or delete that folder first")
        elif folder.exists() and (not folder.is_dir() or
                                  {path.name for path in folder.iterdir()} - {"progress.json.unfinished"}):
            raise ValueError(f"{folder} is not empty and was not made by this program; give another --out")
        if self.finished:
            return
        folder.mkdir(parents=True, exist_ok=True)
        resuming = self.record["done"] > 0
        if not resuming:
            needed, free = int(np.prod(shape)) * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
            if needed > free:
                raise ValueError(f"{folder / name} needs {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB")
            write_json(folder / "progress.json", self.record)
        self.array = np.lib.format.open_memmap(folder / name, mode="r+" if resuming else "w+", dtype=dtype, shape=shape)

    def remaining(self, title):
        """Ranges of rows still to be filled; each is recorded as done when the next one is asked for."""
        total = len(self.array)
        with tqdm(total=total, initial=self.record["done"], desc=title, unit="img") as bar:
            while self.record["done"] < total:
                rows = range(self.record["done"], min(self.record["done"] + CHUNK, total))
                yield rows
                self.array.flush()
                self.record["done"] = rows.stop
                write_json(self.folder / "progress.json", self.record)
                bar.update(len(rows))

    def finish(self, meta):
        write_json(self.folder / "meta.json", meta)


def open_source(options):
    if options.source == "digits":
        images, labels = load_digits()
        names = [f"digit {i}" for i in range(len(images))]
        return Source(names, labels, [str(k) for k in range(10)], images.__getitem__)
    path = Path(options.source)
    parquet = [path] if path.suffix == ".parquet" else sorted(path.rglob("*.parquet")) if path.is_dir() else []
    if path.is_dir() and not parquet:
        return open_class_folder(path)
    if path.exists() and not path.is_dir() and not parquet:
        raise ValueError(f"source {options.source!r} is neither a folder nor a parquet file")
    missing = [str(p) for p in parquet if not p.is_file()]
    if missing:
        raise ValueError(f"there is no file {missing[0]!r}")
    return open_table(options, [str(p) for p in parquet])


def open_class_folder(path):
    from torchvision.datasets import ImageFolder
    try:
        folder = ImageFolder(str(path), allow_empty=True)
    except FileNotFoundError as error:
        raise ValueError(f"{str(path)!r} has no subfolder per class: {error}") from None
    if not folder.samples:
        raise ValueError(f"{str(path)!r} has no images in its {len(folder.classes)} class folders")
    files, labels = zip(*folder.samples)
    names = [str(Path(file).relative_to(path)) for file in files]
    return Source(names, np.array(labels), folder.classes, lambda i: Image.open(files[i]))


def open_table(options, parquet):
    import datasets
    try:
        table = (datasets.load_dataset("parquet", data_files=parquet, split="train") if parquet
                 else datasets.load_dataset(options.source, split=options.split))
    except Exception as error:                     # the hub's client raises many kinds
        raise ValueError(f"{options.source!r} " + ("cannot be read as parquet " if parquet else
                         "is no existing path, and no dataset that can be loaded ") +
                         f"({type(error).__name__}: {error})") from None
    image_column = choose_column(table, "image", options.image_column, lambda name, kind:
                                 isinstance(kind, datasets.Image) or name in ("image", "img"))
    label_column = choose_column(table, "label", options.label_column, lambda name, kind:
                                 isinstance(kind, datasets.ClassLabel) or name in ("label", "labels"))
    kind, values = table.features[label_column], list(table[label_column])
    if any(value is None or isinstance(value, (list, dict)) or isinstance(kind, datasets.ClassLabel) and value < 0
           for value in values):
        raise ValueError(f"the label column {label_column!r} has rows without a label, or with several")
    labels = np.array(values)
    if isinstance(kind, datasets.ClassLabel):
        class_names = kind.names
    else:
        class_names, labels = np.unique(labels, return_inverse=True)
    if isinstance(table.features[image_column], datasets.Image):
        table = table.cast_column(image_column, datasets.Image(decode=False))     # so that we see which is damaged

    def load(i):
        value = table[i][image_column]
        data = value if isinstance(value, bytes) else value["bytes"]
        return Image.open(io.BytesIO(data) if data is not None else value["path"])

    return Source([f"row {i}" for i in range(len(table))], labels, [str(name) for name in class_names], load)


def choose_column(table, role, wanted, fits):
    columns = [wanted] if wanted else [name for name, kind in table.features.items() if fits(name, kind)]
    if len(columns) != 1 or columns[0] not in table.features:
        raise ValueError(f"the {role} column must be named with --{role}-column: "
                         f"{wanted or 'none was found for certain'!r} among {list(table.features)}")
    return columns[0]


def limited(source, limit):
    if limit is None:
        return source
    if limit < 1:
        raise ValueError(f"limit = {limit}: must be at least 1")
    count = len(source.names)
    chosen = [i * count // min(limit, count) for i in range(min(limit, count))]
    return Source([source.names[i] for i in chosen], source.labels[chosen], source.class_names,
                  lambda k: source.load(chosen[k]))


def to_rgb(image):
    """Any PIL mode as RGB: greys and CMYK converted, 16-bit greys scaled down, transparency laid on white."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image, size):
    """ADM's crop: halve by box filter while twice too large, bicubic to the shorter side, cut out the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def write_json(path, content):
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=1))
    os.replace(unfinished, path)


if __name__ == "__main__":
    main()

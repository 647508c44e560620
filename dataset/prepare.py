"""Turns images into the folder that the trainer reads. Running the same command again resumes it.

    python -m dataset.prepare digits --out data/digits
    python -m dataset.prepare path/to/train.parquet --out data/cifar10 --resolution 32
    python -m dataset.prepare uoft-cs/cifar10 --out data/cifar10 --resolution 32
    torchrun --nproc_per_node=8 -m dataset.prepare path/to/imagenet/train --out data/imagenet256 --resolution 256 \\
        --autoencoder sd-vae-ft-ema --encoder dinov2-vit-b

With --autoencoder the moments of the latents are stored too, with --encoder the tokens of frozen encoders. A folder
holds, for N images,

    images/CHUNK.bin, sizes.npy     the cropped images as PNG, 256 to a file; the bytes of each
    labels.npy                      (N) int64, -1 for images that could not be read
    latents/ID/moments.npy          (N, 2C, h, w) float16: mean and standard deviation; ID is the autoencoder's
    features/ID/tokens.npy          (N, T, dim) float16; ID is the encoder's

where --mirror appends N rows for the mirrored images. Each of the folders has a checksum per chunk in CHUNK.json, and
a meta.json that is written last. What is written does not depend on the number of processes.
"""

import hashlib
import io
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from tqdm import tqdm

from dataset.prepared import EncodedImages
from dataset.sources import center_crop, limited, open_source, to_rgb
from models.autoencoder import load_autoencoder
from models.encoders import FrozenEncoder
from runtime import Ranks, replaced

CHUNK = 256  # images in a file, and between two records of progress
PROBE = 16  # images that are timed before the first is written


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
    """Take only so many images, spread evenly over the source: a trial."""
    autoencoder: str = "pixels"
    """Store the latents of sd-vae-ft-mse, sd-vae-ft-ema, a folder saved by diffusers, or a hub name."""
    encoder: tuple[str, ...] = ()
    """Store the tokens of these frozen encoders, named as for training."""
    encoder_weights: tuple[str, ...] = ()
    """Local weights of the encoders, in their order."""
    token_grid: int | None = None
    """Tokens along one side; if not given, those of SiT with patch size 2."""
    mirror: bool = False
    """Store latents and tokens of the mirrored images too."""
    batch_size: int = 64
    """Images that a network takes at a time."""
    verify: bool = False
    """Compare a finished folder with its checksums and write nothing."""


def main(argv=None):
    options = tyro.cli(Options, args=argv, prog="python -m dataset.prepare", description=__doc__)
    with Ranks() as ranks:
        try:
            if options.verify:
                verify(Path(options.out))
            else:
                prepare(options, ranks)
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from None
        except KeyboardInterrupt:
            raise SystemExit("stopped; the same command again goes on from here") from None


def prepare(options, ranks):
    """Write the folder, or what is missing of it. Raises ValueError on sources and settings that cannot be used."""
    resolution = 8 if options.resolution is None and options.source == "digits" else options.resolution
    if resolution is None or resolution < 1:
        raise ValueError(f"resolution = {resolution}: say the side of the square images, such as --resolution 256")
    if options.batch_size < 1:
        raise ValueError(f"batch_size = {options.batch_size}: must be at least 1")
    if len(options.encoder_weights) not in (0, len(options.encoder)):
        raise ValueError(
            f"encoder_weights = {options.encoder_weights}: give one for each of the "
            f"{len(options.encoder)} encoders, or none"
        )
    with ranks.one_first():  # everything that may be downloaded, before the first image
        source = limited(open_source(options), options.limit)
        autoencoder = load_autoencoder(options.autoencoder)
        if resolution % autoencoder.downsampling:
            raise ValueError(
                f"resolution = {resolution} is not a multiple of the {autoencoder.downsampling} pixels "
                f"that one latent of {options.autoencoder!r} stands for"
            )
        size = resolution // autoencoder.downsampling
        grid = size // 2 if options.token_grid is None else options.token_grid
        if grid < 1:
            raise ValueError(f"token_grid = {grid}: must be at least 1")
        encoders = [
            FrozenEncoder(name, grid, *options.encoder_weights[i : i + 1]).to(ranks.device)
            for i, name in enumerate(options.encoder)
        ]
    folder = Path(options.out)
    stages = [Images(folder, source, options.source, resolution, ranks)]
    if options.autoencoder != "pixels":
        autoencoder.to(ranks.device)
        stages.append(
            Rows(
                folder / "latents" / autoencoder.fingerprint,
                "moments.npy",
                (2 * autoencoder.channels, size, size),
                autoencoder.moments,
                stages[0],
                options,
                autoencoder.name,
                {"fingerprint": autoencoder.fingerprint},
            )
        )
    for encoder in encoders:

        def tokens(images, encoder=encoder):
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=ranks.device.type == "cuda"):
                return encoder(images)

        stages.append(
            Rows(
                folder / "features" / encoder.fingerprint,
                "tokens.npy",
                (grid * grid, encoder.dim),
                tokens,
                stages[0],
                options,
                encoder.name,
                {"fingerprint": encoder.fingerprint, "grid": grid},
            )
        )
    if ranks.main:
        for stage in stages:
            stage.check()
        estimate(stages, folder)
    ranks.barrier()
    for stage in stages:
        stage.run()


class Stage:
    """Something that is made chunk by chunk, by any number of processes, each chunk recorded when it is complete."""

    def __init__(self, folder, count, settings, ranks):
        self.folder, self.count, self.settings, self.ranks = folder, count, settings, ranks
        self.chunks = range(-(-count // CHUNK))  # rounded up
        self.finished = (folder / "meta.json").is_file()

    def check(self):
        """Refuse a folder of other settings, or of other content, with a ValueError."""
        settings = self.folder / "settings.json"
        if settings.is_file():
            found = json.loads(settings.read_text())
            changed = [
                f"{key}: {found.get(key)!r} -> {value!r}"
                for key, value in self.settings.items()
                if found.get(key) != value
            ]
            if changed:
                raise ValueError(
                    f"{self.folder} was prepared with other settings ({'; '.join(changed)}); "
                    "give another --out, or delete that folder first"
                )
        elif self.folder.exists() and (
            not self.folder.is_dir() or {path.name for path in self.folder.iterdir()} - {"settings.json.unfinished"}
        ):
            raise ValueError(f"{self.folder} is not empty and was not made by this program; give another --out")

    def run(self):
        if self.finished:
            return self.say(f"{self.folder}: {self.what} already there")
        if self.ranks.main:
            self.open()
        self.ranks.barrier()
        mine = [
            (chunk, range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.count)))
            for chunk in self.chunks[self.ranks.rank :: self.ranks.world]
            if not self.record(chunk).is_file()
        ]
        with tqdm(
            total=sum(len(rows) for _, rows in mine),
            desc=f"{self.what} -> {self.folder}",
            unit="img",
            disable=not self.ranks.main,
        ) as bar:
            for chunk, rows in mine:
                write_json(self.record(chunk), self.make(chunk, rows))
                bar.update(len(rows))
        while not all(self.record(chunk).is_file() for chunk in self.chunks):
            time.sleep(0.5)  # a barrier would give up long before the slowest disk does
        if self.ranks.main:
            self.finish([json.loads(self.record(chunk).read_text()) for chunk in self.chunks])
        self.ranks.barrier()

    def open(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "settings.json", self.settings)

    def record(self, chunk):
        return self.folder / f"{chunk:05}.json"

    def say(self, text):
        if self.ranks.main:
            print(text, flush=True)


class Images(Stage):
    """The images of a source, cropped and encoded."""

    what = "images"

    def __init__(self, folder, source, source_name, resolution, ranks):
        self.source, self.resolution = source, resolution
        listing = hashlib.sha256(repr((source.names, source.labels.tolist())).encode()).hexdigest()
        super().__init__(
            folder,
            len(source.names),
            {
                "source": source_name,
                "resolution": resolution,
                "count": len(source.names),
                "listing": listing,
                "chunk": CHUNK,
            },
            ranks,
        )
        self.threads = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def open(self):
        super().open()
        (self.folder / "images").mkdir(exist_ok=True)

    def record(self, chunk):
        return self.folder / "images" / f"{chunk:05}.json"

    def probe(self):
        """Seconds and bytes per image, from some that are spread over the source."""
        rows = range(0, self.count, -(-self.count // PROBE))
        began = time.perf_counter()
        with ThreadPoolExecutor(self.threads) as pool:
            sizes = [len(data) for data, *_ in pool.map(self.read, rows)]
        return (time.perf_counter() - began) / len(rows), sum(sizes) / len(rows)

    def read(self, i):
        """Image i as PNG, the checksum of its pixels, and what is wrong with it if anything."""
        try:
            image = center_crop(to_rgb(self.source.load(i)), self.resolution)
        except Exception as error:  # a damaged file can raise nearly anything inside a decoder
            # Without the address of a buffer in memory, which differs from run to run.
            return b"", b"", re.sub(r"<(\S+) object at 0x\w+>", r"\1", f"{type(error).__name__}: {error}")
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)  # 6, the default, takes three times as long
        return buffer.getvalue(), hashlib.sha256(image.tobytes()).digest(), None

    def make(self, chunk, rows):
        with ThreadPoolExecutor(self.threads) as pool:
            made = list(pool.map(self.read, rows))
        data = b"".join(data for data, *_ in made)
        with replaced(self.record(chunk).with_suffix(".bin")) as file:
            file.write(data)
        return {
            "sha256": _checksum(data),
            "sizes": [len(data) for data, *_ in made],
            "pixels": hashlib.sha256(b"".join(digest for _, digest, _ in made)).hexdigest(),
            "damaged": {i: [self.source.names[i], problem] for i, (*_, problem) in zip(rows, made) if problem},
        }

    def finish(self, records):
        damaged = {int(i): value for record in records for i, value in record["damaged"].items()}
        for name, problem in damaged.values():
            print(f"left out: {name} ({problem})")
        if len(damaged) == self.count:
            raise ValueError(f"none of the {self.count} images of {self.settings['source']!r} could be read")
        labels = self.source.labels.astype(np.int64).copy()
        labels[list(damaged)] = -1
        np.save(self.folder / "labels.npy", labels)
        np.save(self.folder / "sizes.npy", np.concatenate([record["sizes"] for record in records]).astype(np.int64))
        content = hashlib.sha256("".join(record["pixels"] for record in records).encode() + labels.tobytes())
        write_json(
            self.folder / "meta.json",
            {
                **self.settings,
                "content": content.hexdigest(),
                "class_names": self.source.class_names,
                "damaged": list(damaged.values()),
            },
        )
        print(
            f"{self.folder}: {self.count - len(damaged)} images, {len(damaged)} damaged and left out, "
            f"{len(self.source.class_names)} classes",
            flush=True,
        )


class Rows(Stage):
    """What a network makes of each image, in one .npy file: `compute` maps uint8 (B, 3, H, W) to (B, *shape)."""

    def __init__(self, folder, file, shape, compute, images, options, name, settings):
        self.what, self.path, self.shape, self.compute = Path(file).stem, folder / file, shape, compute
        self.name = name  # a path may change while what lies there stays the same
        self.images, self.batch_size, self.copies = images, options.batch_size, 1 + options.mirror
        super().__init__(folder, images.count, {**settings, "mirror": options.mirror}, images.ranks)
        self.array_shape = (self.copies * self.count, *shape)

    def open(self):
        super().open()
        if not self.path.is_file():
            unfinished = self.path.with_name(self.path.name + ".unfinished")
            np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float16, shape=self.array_shape)
            os.replace(unfinished, self.path)

    @torch.no_grad()
    def network(self, images):
        return self.compute(images.to(self.ranks.device)).float().cpu().numpy()

    def probe(self):
        """Seconds and bytes per image."""
        side = self.images.resolution
        blank = torch.zeros(min(self.batch_size, self.count), 3, side, side, dtype=torch.uint8)
        self.network(blank)  # the first call sets things up
        began = time.perf_counter()
        self.network(blank)
        return self.copies * (time.perf_counter() - began) / len(blank), self.copies * 2 * int(np.prod(self.shape))

    def make(self, chunk, rows):
        array = np.load(self.path, mmap_mode="r+")
        images = EncodedImages(self.images.folder)
        digest = hashlib.sha256()
        for first in range(rows.start, rows.stop, self.batch_size):
            part = range(first, min(first + self.batch_size, rows.stop))
            pixels = torch.stack([images[row] for row in part])
            readable = np.array([images.sizes[row] > 0 for row in part])
            for copy in range(self.copies):
                made = self.network(pixels.flip(-1) if copy else pixels).astype(np.float16)
                if not np.isfinite(made).all():
                    raise ValueError(
                        f"{self.name!r} gave values in images {part.start} to {part.stop - 1} that float16 cannot hold"
                    )
                made[~readable] = 0
                array[copy * self.count + part.start : copy * self.count + part.stop] = made
                digest.update(made.tobytes())
        array.flush()
        return {"sha256": digest.hexdigest(), "batch_size": self.batch_size}

    def finish(self, records):
        write_json(self.folder / "meta.json", {**self.settings, "name": self.name})
        print(f"{self.folder}: {self.what} {self.array_shape}", flush=True)


def estimate(stages, folder):
    """Say how much disk and time the unfinished stages will take; ValueError where the disk is too small."""
    needed = 0
    for stage in stages:
        left = sum(not stage.record(chunk).is_file() for chunk in stage.chunks) / len(stage.chunks)
        if stage.finished or not left:
            continue
        time_each, bytes_each = stage.probe()
        stage_seconds = left * stage.count * time_each / stage.ranks.world
        needed += int(left * stage.count * bytes_each)
        print(
            f"{stage.what}: about {readable(left * stage.count * bytes_each)} and {stage_seconds / 60:.3g} minutes "
            f"({1 / time_each:.0f} images/s in each of {stage.ranks.world} processes)",
            flush=True,
        )
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"{folder} needs about {readable(needed)} more, the disk has {readable(free)}; "
            "give another --out, or try --limit"
        )


def readable(count):
    """Bytes as text."""
    power = min(4, max(0, int(count).bit_length() - 1) // 10)
    return f"{count / 1024**power:.3g} {['B', 'KiB', 'MiB', 'GiB', 'TiB'][power]}"


def verify(folder):
    """Compare every chunk with its checksum. Raises ValueError that names those that differ."""
    if not (folder / "meta.json").is_file():
        raise ValueError(f"{folder} is not finished, or is not a prepared folder")
    meta, bad = json.loads((folder / "meta.json").read_text()), []
    count, chunk_size = meta["count"], meta["chunk"]
    for record in sorted((folder / "images").glob("*.json")):
        path = record.with_suffix(".bin")
        if not path.is_file() or _checksum(path.read_bytes()) != json.loads(record.read_text())["sha256"]:
            bad.append(str(path))
    arrays = [*folder.glob("latents/*/moments.npy"), *folder.glob("features/*/tokens.npy")]
    for path in arrays:
        array = np.load(path, mmap_mode="r")
        for start in range(0, count, chunk_size):
            record, stop = path.parent / f"{start // chunk_size:05}.json", min(start + chunk_size, count)
            if not record.is_file():
                raise ValueError(f"{path.parent} is not finished; the same command without --verify goes on with it")
            record, digest = json.loads(record.read_text()), hashlib.sha256()
            for first in range(start, stop, record["batch_size"]):
                for copy in range(len(array) // count):
                    last = min(first + record["batch_size"], stop)
                    digest.update(array[copy * count + first : copy * count + last].tobytes())
            if digest.hexdigest() != record["sha256"]:
                bad.append(f"{path} rows {start} to {stop - 1}")
    if bad:
        raise ValueError(
            "these differ from their checksums: "
            + "; ".join(bad)
            + ". Delete the CHUNK.json of each and the meta.json beside it, and prepare again"
        )
    print(f"{folder}: images and {len(arrays)} arrays are as they were written")


def _checksum(data):
    return hashlib.sha256(data).hexdigest()


def write_json(path, content):
    with replaced(path) as file:
        file.write(json.dumps(content, indent=1).encode())


if __name__ == "__main__":
    main()

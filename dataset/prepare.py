"""Turns images into the folder that the trainer reads. Running the same command again resumes it.

    python -m dataset.prepare digits --out data/digits
    python -m dataset.prepare path/to/train.parquet --out data/cifar10 --resolution 32
    python -m dataset.prepare uoft-cs/cifar10 --out data/cifar10 --resolution 32
    python -m dataset.prepare path/to/repa_data --out data/imagenet256 --resolution 256 --autoencoder sd-vae-ft-mse
    torchrun --nproc_per_node=8 -m dataset.prepare path/to/imagenet/train --out data/imagenet256 --resolution 256 \\
        --autoencoder sd-vae-ft-ema --encoder dinov2-vit-b

Files may be BMP, JPEG, PNG, PPM, TIFF and WebP. What cannot be read, or is of another kind, is named and left out.
With --autoencoder the moments of the latents are stored too, with --encoder the tokens of frozen encoders. A folder
holds, for N images,

    images/NNNNN.bin, sizes.npy     the cropped images as PNG, 256 to a file; the bytes of each
    labels.npy                      (N) int64, -1 for images that could not be read
    latents/ID/moments.npy          (N, 2C, h, w) float16: mean and standard deviation; ID is the autoencoder's
    features/ID/tokens.npy          (N, T, dim) float16; ID is the encoder's

where --mirror appends N rows for the mirrored images. Each of these folders has a checksum for every 256 images in
NNNNN.json, and a meta.json that is written last. What is written does not depend on the number of processes.
"""

import contextlib
import functools
import hashlib
import io
import os
import re
import secrets
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import ImageOps
from tqdm import tqdm

from dataset.prepared import EncodedImages
from dataset.sources import Source, center_crop, limited, open_source, to_rgb, with_latents
from models.autoencoder import load_autoencoder
from models.encoders import FrozenEncoder
from runtime import Ranks, check_folder, lock_folder, plain_errors, read_json, replaced, write_array, write_json

IMAGES_PER_FILE = 256  # also between two records of progress
PROBE = 16  # images that are timed before the first is written


@dataclass(frozen=True)
class Options:
    source: Annotated[str, tyro.conf.Positional]
    """`digits`, a folder with one subfolder per class, a parquet file or a folder of them, a hub dataset name, a folder
    that REPA has prepared, with images/ and vae-sd/ in it, or LightningDiT's safetensors, latents without images."""
    out: str
    """Folder to write."""
    resolution: int | None = None
    """Side of the square images; larger ones are cropped and resized as in ADM. Digits are 8 if not given."""
    split: str = "train"
    """Split of a hub dataset, or of a folder of parquet files: that of their names, as for datasets.load_dataset."""
    image_column: str = ""
    """Column with the images of a parquet or hub dataset; found by its type if not given."""
    label_column: str = ""
    """Column with the labels; found by its type or name if not given."""
    exif: bool = False
    """Turn photographs upright by their EXIF orientation. ADM's ImageNet ignores it. TIFF files are always turned."""
    limit: int | None = None
    """Take only so many images, spread evenly over the source: a trial."""
    autoencoder: str = "pixels"
    """Store the latents of sd-vae-ft-mse, sd-vae-ft-ema, a hub name, a folder saved by diffusers, or a file of LDM."""
    encoder: tuple[str, ...] = ()
    """Store the tokens of these frozen encoders, named as for training."""
    encoder_weights: tuple[str, ...] = ()
    """Local weights of the encoders, in their order."""
    token_grid: int | None = None
    """Tokens along one side; if not given, those of SiT with patch size 2."""
    mirror: bool = False
    """Store latents and tokens of the mirrored images too."""
    statistics: bool = False
    """Also write the autoencoder with mean and deviation of these latents, for one that publishes none, beside them."""
    batch_size: int = 64
    """Images that a network takes at a time."""
    verify: bool = False
    """Compare a finished folder with its checksums and write nothing."""


def main(argv=None):
    options = tyro.cli(Options, args=argv, prog="python -m dataset.prepare", description=__doc__)
    with plain_errors(ValueError, OSError, KeyboardInterrupt), Ranks() as ranks:
        verify(Path(options.out)) if options.verify else prepare(options, ranks)


def prepare(options: Options, ranks: Ranks):
    """Write the folder, or what is missing of it. Raises ValueError on sources and settings that cannot be used."""
    resolution = 8 if options.resolution is None and options.source == "digits" else options.resolution
    if resolution is None or resolution < 1:
        raise ValueError(f"resolution = {resolution}: say the side of the square images, such as --resolution 256")
    if options.batch_size < 1:
        raise ValueError(f"batch_size = {options.batch_size}: must be at least 1")
    if options.statistics and options.autoencoder == "pixels":
        raise ValueError("statistics = True: is for latents; give an --autoencoder, or leave it out")
    weights = options.encoder_weights or ("",) * len(options.encoder)
    if len(weights) != len(options.encoder):
        raise ValueError(f"encoder_weights = {weights}: give one for each of {len(options.encoder)} encoders, or none")
    with ranks.one_first():  # everything that may be downloaded, before the first image
        source = limited(open_source(options), options.limit)
        autoencoder = load_autoencoder(options.autoencoder, normalised=not options.statistics)
        if options.statistics and autoencoder.quirk in ("squares", "unit"):
            raise ValueError(f"statistics = True: {options.autoencoder!r} comes with its own; leave it out")
        if source.moments and (options.autoencoder == "pixels" or options.mirror and not source.mirrored):
            raise ValueError(
                f"{options.source!r} holds latents: give the --autoencoder that made them (REPA's is sd-vae-ft-mse), "
                "and no --mirror unless it has mirrored ones"
            )
        if source.load is None and options.encoder:
            raise ValueError(f"encoder = {options.encoder}: {options.source!r} holds no images that they could encode")
        size, rest = divmod(resolution, autoencoder.downsampling)
        if rest:
            unit = f"{autoencoder.downsampling} pixels, one latent of {options.autoencoder!r}"
            raise ValueError(f"resolution = {resolution} is not a multiple of {unit}")
        if source.moments:
            source = with_latents(source, (2 * autoencoder.channels, size, size))
        grid = size // 2 if options.token_grid is None else options.token_grid
        if grid < 1:
            raise ValueError(f"token_grid = {grid}: must be at least 1")
        encoders = [FrozenEncoder(name, grid, file).to(ranks.device) for name, file in zip(options.encoder, weights)]
    stages = [Images(options, source, resolution, ranks)]
    if options.autoencoder != "pixels":
        shape, compute = (2 * autoencoder.channels, size, size), autoencoder.to(ranks.device).moments
        kind, settings = (Taken, {"taken": True}) if source.moments else (Rows, {})
        stages.append(kind("latents", "moments", autoencoder, compute, shape, settings, stages[0], options))
    for encoder in encoders:
        shape = (grid * grid, encoder.dim)
        stages.append(Rows("features", "tokens", encoder, encoder, shape, {"grid": grid}, stages[0], options))
    with claim(stages, ranks):
        for stage in stages:
            stage.run()
    if options.statistics and ranks.main:
        with lock_folder(stages[1].folder):
            write_normalised(autoencoder, stages[1])


def write_normalised(autoencoder, stage):
    """The autoencoder with mean and deviation of each channel of a stage's latents, as a folder of diffusers."""
    out, unfinished = stage.folder / "autoencoder", stage.folder / "autoencoder.unfinished"
    if out.exists():
        print(f"{out}: already there")
        return
    array, readable = np.load(stage.path, mmap_mode="r"), stage.images.readable
    first, second, count = 0, 0, 0  # sums of a posterior's first and second moments
    for rows in stage.parts:
        for start in range(0, len(array), stage.count):  # the mirrored ones follow
            part = array[start + rows.start : start + rows.stop][readable[rows]].astype(np.float64)
            mean, std = np.split(part, 2, axis=1)
            first, second = first + mean.sum((0, 2, 3)), second + (mean**2 + std**2).sum((0, 2, 3))
            count += mean.size // mean.shape[1]
    mean = first / count
    found = {"latents_mean": mean.tolist(), "latents_std": np.sqrt(second / count - mean**2).tolist()}
    autoencoder.model.register_to_config(**found, scaling_factor=1.0, shift_factor=None)
    autoencoder.model.save_pretrained(unfinished)
    unfinished.rename(out)
    print(f"written: {out}, with latents_mean and latents_std; train with --autoencoder {out}", flush=True)


def claim(stages: list, ranks: Ranks):
    """Lock the folder if anything is missing, and return the lock, once it is sure that all processes see that folder.

    Raises ValueError where the folder is foreign, in use, or not shared.
    """
    folder, lock = stages[0].folder, None
    mark = folder / ".shared"
    if ranks.main:
        for stage in stages:
            check_folder(stage.folder, "settings.json", stage.settings)
        for note in stages[0].source.notes:
            print(note)
        if not all(stage.meta.is_file() for stage in stages):
            estimate(stages, folder)
            lock = lock_folder(folder)
            for stage in stages:  # another run may have come first
                check_folder(stage.folder, "settings.json", stage.settings)
            with replaced(mark) as file:
                file.write(secrets.token_hex(8).encode())
    ranks.barrier()
    facts = {f"what process 0 wrote to {mark}": mark.read_text() if mark.is_file() else ""}
    for stage in stages:
        stage.finished = stage.meta.is_file()
        facts[str(stage.folder)] = {**stage.settings, "finished": stage.finished}
    ranks.agree(facts, "give all of them the same source and networks, and --out on a disk that all of them see")
    if lock:
        mark.unlink()
    return lock or contextlib.nullcontext()


class Stage:
    """Something that is made in parts, by any number of processes, each part recorded when it is complete."""

    def __init__(self, folder, count, settings, ranks):
        self.folder, self.count, self.settings, self.ranks = folder, count, settings, ranks
        self.records, self.meta = folder, folder / "meta.json"
        starts = range(0, count, IMAGES_PER_FILE)
        self.parts = [range(start, min(start + IMAGES_PER_FILE, count)) for start in starts]

    def run(self):
        if self.finished:
            if self.ranks.main:
                print(f"{self.folder}: {self.what} already there", flush=True)
            return
        if self.ranks.main:
            self.open()
        self.ranks.barrier()
        mine = [rows for rows in self.parts[self.ranks.rank :: self.ranks.world] if not self.record(rows).is_file()]
        for rows in tqdm(mine, f"{self.what} -> {self.folder}", unit="file", disable=not self.ranks.main):
            write_json(self.record(rows), self.make(rows))
        while not all(self.record(rows).is_file() for rows in self.parts):
            time.sleep(0.5)  # a shared disk may show the files of other machines late
        if self.ranks.main:
            self.finish([read_json(self.record(rows)) for rows in self.parts])
        self.ranks.barrier()

    def open(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "settings.json", self.settings)  # first: it says whose folder this is
        self.records.mkdir(exist_ok=True)

    def record(self, rows):
        return self.records / f"{rows.start // IMAGES_PER_FILE:05}.json"


class Images(Stage):
    """The images of a source, cropped and encoded."""

    what = "images"

    def __init__(self, options: Options, source: Source, resolution: int, ranks: Ranks):
        self.source, self.resolution, self.exif = source, resolution, options.exif
        settings = {
            "source": options.source,
            "resolution": resolution,
            "count": len(source.names),
            "listing": sha256(repr((source.names, source.labels.tolist())).encode()),
            "chunk": IMAGES_PER_FILE,
            "exif": options.exif,
        }
        super().__init__(Path(options.out), len(source.names), settings, ranks)
        self.records = self.folder / "images"
        self.some = range(0, self.count, -(-self.count // PROBE))  # spread over the source
        self.threads = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    @functools.cached_property
    def encoded(self):
        """They, once all are written."""
        return EncodedImages(self.folder)

    @functools.cached_property
    def readable(self):
        """Which are not damaged, once all are written: (N)."""
        return np.load(self.folder / "labels.npy") >= 0

    def probe(self):
        """Seconds and bytes per image, from some that are spread over the source."""
        began = time.perf_counter()
        with ThreadPoolExecutor(self.threads) as pool:
            sizes = [len(data) for data, *_ in pool.map(self.read, self.some)]
        return (time.perf_counter() - began) / len(self.some), sum(sizes) / len(self.some)

    def cropped(self, i):
        """Image i as it is stored; None where the source has latents alone. Raises what source and decoders raise."""
        image = self.source.load(i)
        if image is None:
            return None
        if self.exif:
            image = ImageOps.exif_transpose(image)
        return center_crop(to_rgb(image), self.resolution)

    def read(self, i):
        """Image i as PNG, the checksum of its pixels or, without an image, its latents; what is wrong, if anything."""
        try:
            image = self.cropped(i)
        except Exception as error:  # a damaged file can raise nearly anything inside a decoder
            # Without the address of a buffer in memory, which differs from run to run.
            return b"", b"", re.sub(r"<(\S+) object at 0x\w+>", r"\1", f"{type(error).__name__}: {error}")
        if image is None:
            return b"", hashlib.sha256(self.source.moments(i).tobytes()).digest(), None
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)  # 6, the default, takes three times as long
        return buffer.getvalue(), hashlib.sha256(image.tobytes()).digest(), None

    def make(self, rows):
        with ThreadPoolExecutor(self.threads) as pool:
            made = list(pool.map(self.read, rows))
        data = b"".join(data for data, *_ in made)
        with replaced(self.record(rows).with_suffix(".bin")) as file:
            file.write(data)
        return {
            "sha256": sha256(data),
            "sizes": [len(data) for data, *_ in made],
            "pixels": sha256(b"".join(digest for _, digest, _ in made)),
            "damaged": {i: [self.source.names[i], problem] for i, (*_, problem) in zip(rows, made) if problem},
        }

    def finish(self, records):
        damaged = {int(i): value for record in records for i, value in record["damaged"].items()}
        for name, problem in damaged.values():
            print(f"left out: {name} ({problem})")
        if len(damaged) == self.count:
            raise ValueError(f"none of the {self.count} images of {self.settings['source']!r} could be read")
        labels, class_names = self.source.labels.astype(np.int64), self.source.class_names
        labels[list(damaged)] = -1
        sizes = np.concatenate([record["sizes"] for record in records]).astype(np.int64)
        write_array(self.folder / "labels.npy", labels)
        write_array(self.folder / "sizes.npy", sizes)
        content = sha256("".join(record["pixels"] for record in records).encode() + labels.tobytes())
        found = {"content": content, "class_names": class_names, "damaged": list(damaged.values())}
        write_json(self.meta, {**self.settings, **found})
        if empty := len(class_names) - len(np.unique(labels[labels >= 0])):
            print(f"{empty} of {len(class_names)} classes have no image")
        counts = f"{self.count - len(damaged)} images, {len(damaged)} damaged and left out, {len(class_names)} classes"
        print(f"{self.folder}: {counts}", flush=True)


class Rows(Stage):
    """What a network makes of each image, in one .npy file: `compute` maps uint8 (B, 3, H, W) to (B, *shape)."""

    def __init__(self, kind, what, network, compute, shape, settings, images: Images, options: Options):
        self.what, self.shape, self.compute, self.images = what, shape, compute, images
        self.name = network.name  # a path may change while what lies there stays the same
        self.batch_size, self.copies = options.batch_size, 1 + options.mirror
        self.autocast = kind == "features" and images.ranks.device.type == "cuda"
        made_by = network.content if kind == "latents" else network.fingerprint
        settings = {"fingerprint": made_by, **settings, "mirror": options.mirror}
        super().__init__(images.folder / kind / made_by, images.count, settings, images.ranks)
        self.path, self.array_shape = self.folder / f"{what}.npy", (self.copies * self.count, *shape)

    def open(self):
        super().open()
        if not self.path.is_file():
            header = {"descr": "<f2", "fortran_order": False, "shape": self.array_shape}
            with replaced(self.path) as file:
                np.lib.format.write_array_header_1_0(file, header)
                file.flush()
                # All of it now: where a mapped file finds the disk full later, the process is killed.
                os.posix_fallocate(file.fileno(), file.tell(), 2 * int(np.prod(self.array_shape)))

    @torch.no_grad()
    def network(self, images):
        device = self.ranks.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            return self.compute(images.to(device)).float().cpu().numpy()

    def of(self, part, readable):
        """What is stored of these images, (B, *shape), and with `mirror` of their mirrored copies."""
        pixels = torch.stack([self.images.encoded[row] for row in part])
        return [self.network(pixels.flip(-1) if copy else pixels) for copy in range(self.copies)]

    def left(self):
        """Bytes per image that are not reserved yet."""
        return 0 if self.path.is_file() else self.copies * 2 * int(np.prod(self.shape))

    def probe(self):
        """Seconds per image, and bytes that are not reserved yet."""
        side = self.images.resolution
        blank = torch.zeros(min(self.batch_size, self.count), 3, side, side, dtype=torch.uint8)
        self.network(blank)  # the first call sets things up
        began = time.perf_counter()
        self.network(blank)
        seconds = self.copies * (time.perf_counter() - began) / len(blank)
        return seconds, self.left()

    def make(self, rows):
        array = np.load(self.path, mmap_mode="r+")
        for first in range(rows.start, rows.stop, self.batch_size):
            part = range(first, min(first + self.batch_size, rows.stop))
            readable = self.images.readable[part]
            for copy, made in enumerate(self.of(part, readable)):
                made = made.astype(np.float16)
                if not np.isfinite(made).all():
                    which = f"images {part.start} to {part.stop - 1}"
                    raise ValueError(f"{self.name!r} gave values beyond float16 in {which}")
                made[~readable] = 0
                array[copy * self.count + part.start : copy * self.count + part.stop] = made
        array.flush()
        return {"sha256": sha256(stored(array, rows, self.count))}

    def finish(self, records):
        write_json(self.meta, {**self.settings, "name": self.name})
        print(f"{self.folder}: {self.what} {self.array_shape}", flush=True)


class Taken(Rows):
    """Latents that the source has, as they are but for float16."""

    def of(self, part, readable):
        source = self.images.source

        def read(moments):
            def one(i, fine):
                return moments(i) if fine else np.zeros(self.shape)

            with ThreadPoolExecutor(self.images.threads) as pool:
                return np.stack([*pool.map(one, part, readable)])

        return [read(moments) for moments in (source.moments, source.mirrored)[: self.copies]]

    def probe(self):
        """Raises ValueError unless a few of them are what the autoencoder makes of their images, if it has any."""
        images, pairs, problem, began = self.images, [], "", time.perf_counter()
        for i in images.some:
            try:
                pairs.append((images.cropped(i), images.source.moments(i)))
            except Exception as error:  # as in Images.read
                problem = f"{images.source.names[i]}: {error}"
        seconds, name = (time.perf_counter() - began) / len(images.some), images.settings["source"]
        if not pairs:
            raise ValueError(f"none of the entries of {name!r} that were tried can be used; {problem}")
        if pairs[0][0] is None:
            return seconds / images.threads, self.left()
        pixels, latents = map(np.stack, zip(*pairs))
        made = self.network(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        error = np.sqrt(np.mean((latents - made) ** 2) / np.mean(made**2))
        if not error < 0.1:
            raise ValueError(
                f"the latents in {name!r} are not those of {self.name!r}: they differ by {error:.2g} of their RMS; "
                "give the --autoencoder that made them"
            )
        return seconds / images.threads, self.left()


def estimate(stages: list, folder: Path):
    """Say how much disk and time the unfinished stages will take; ValueError where the disk is too small."""
    needed, world, binary = 0, stages[0].ranks.world, functools.partial(tqdm.format_sizeof, suffix="iB", divisor=1024)
    for stage in stages:
        left = stage.count * sum(not stage.record(rows).is_file() for rows in stage.parts) / len(stage.parts)
        if left and not stage.meta.is_file():
            seconds, size = stage.probe()
            needed += int(left * size)
            amount = f"{binary(left * size)} and {left * seconds / world / 60:.3g} minutes"
            print(f"{stage.what}: about {amount} ({1 / seconds:.0f} images/s in each of {world} processes)", flush=True)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        remedy = "give another --out, or try --limit"
        raise ValueError(f"{folder} needs about {binary(needed)} more, the disk has {binary(free)}; {remedy}")


def verify(folder: Path):
    """Compare every chunk with its checksum. Raises ValueError that names those that differ."""
    if not (folder / "meta.json").is_file():
        raise ValueError(f"{folder} is not finished, or is not a prepared folder")
    meta, bad = read_json(folder / "meta.json"), []
    count, per_file = meta["count"], meta["chunk"]
    for record in sorted((folder / "images").glob("*.json")):
        path = record.with_suffix(".bin")
        if not path.is_file() or sha256(path.read_bytes()) != read_json(record)["sha256"]:
            bad.append(str(path))
    arrays = [*folder.glob("latents/*/moments.npy"), *folder.glob("features/*/tokens.npy")]
    for path in arrays:
        array = np.load(path, mmap_mode="r")
        for start in range(0, count, per_file):
            record, rows = path.parent / f"{start // per_file:05}.json", range(start, min(start + per_file, count))
            if not record.is_file():
                raise ValueError(f"{path.parent} is not finished; the same command without --verify goes on with it")
            if sha256(stored(array, rows, count)) != read_json(record)["sha256"]:
                bad.append(f"{path} rows {start} to {rows.stop - 1}")
    if bad:
        remedy = "Delete the NNNNN.json of each and the meta.json beside it, and prepare again"
        raise ValueError(f"these differ from their checksums: {'; '.join(bad)}. {remedy}")
    print(f"{folder}: images and {len(arrays)} arrays are as they were written")


def stored(array, rows, count):
    """The bytes of these rows, and of their mirrored copies, which are `count` rows further on."""
    return b"".join(array[first + rows.start : first + rows.stop].tobytes() for first in range(0, len(array), count))


def sha256(data):
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    main()

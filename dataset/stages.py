"""What `python -m dataset.prepare` makes, part by part: images, and what networks make of them and of their captions.

Shapes: N images, C channels, H = W pixels, h = w latents, T tokens of an image, L and W tokens and width of a caption.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from tqdm import tqdm

from dataset.prepared import EncodedImages
from dataset.sources import Source, center_crop, to_rgb
from runtime import Ranks, read_json, replaced, write_array, write_json

IMAGES_PER_FILE = 256  # also between two records of progress
PROBE = 16  # images that are timed before the first is written


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

    def __init__(self, options, source: Source, resolution: int, ranks: Ranks):
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
        """The stored images, once all are written."""
        return EncodedImages(self.folder)

    @functools.cached_property
    def readable(self):
        """(N) bool: the images that could be read, once all are written."""
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

    def __init__(self, kind, what, network, compute, shape, settings, images: Images, options):
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
        """What is stored of uint8 (B, 3, H, W): (B, *shape)."""
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

    def trial(self):
        """A batch to measure the time with."""
        side = self.images.resolution
        return torch.zeros(min(self.batch_size, self.count), 3, side, side, dtype=torch.uint8)

    def probe(self):
        """Seconds per image, and bytes that are not reserved yet."""
        blank = self.trial()
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


class Text(Rows):
    """What a text encoder makes of each caption, and of the empty one. A mirrored image has the same caption."""

    def __init__(self, encoder, images: Images, options):
        self.captions = images.source.captions
        settings = {"captions": sha256(json.dumps(self.captions).encode())}
        shape, options = (encoder.tokens, encoder.width + 1), dataclasses.replace(options, mirror=False)
        super().__init__("text", "tokens", encoder, encoder, shape, settings, images, options)

    def open(self):
        super().open()
        write_json(self.folder / "captions.json", self.captions)
        write_array(self.folder / "null.npy", self.network([""])[0].astype(np.float16))

    def network(self, captions):
        return self.compute(captions).cpu().numpy()

    def of(self, part, readable):
        return [self.network(self.captions[part.start : part.stop])]

    def trial(self):
        return self.captions[: self.batch_size]


def stored(array, rows, count):
    """The bytes of these rows, and of their mirrored copies, which are `count` rows further on."""
    return b"".join(array[first + rows.start : first + rows.stop].tobytes() for first in range(0, len(array), count))


def sha256(data):
    return hashlib.sha256(data).hexdigest()

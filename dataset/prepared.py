"""Reads a prepared folder, in an order that depends on the seed alone.

Shapes: B batch, C channels, H = W pixels, h = w latents, T tokens.
"""

import functools
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image


class EncodedImages:
    """The images of a prepared folder: `images[row]` is uint8 (3, H, W), zeros where none could be read."""

    def __init__(self, folder):
        meta = json.loads((Path(folder) / "meta.json").read_text())
        self.folder, self.resolution, self.chunk = Path(folder) / "images", meta["resolution"], meta["chunk"]
        self.sizes = np.load(Path(folder) / "sizes.npy")
        ends = self.sizes.cumsum()
        first = np.arange(len(self.sizes)) // self.chunk * self.chunk  # of the file in which a row is
        self.starts = ends - self.sizes - (ends - self.sizes)[first]

    def __getitem__(self, row):
        if not self.sizes[row]:
            return torch.zeros(3, self.resolution, self.resolution, dtype=torch.uint8)
        with open(self.folder / f"{row // self.chunk:05}.bin", "rb") as file:
            file.seek(self.starts[row])
            image = Image.open(io.BytesIO(file.read(self.sizes[row])))
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


class PreparedImages:
    """A folder made by `python -m dataset.prepare`, as a map-style dataset that is read a batch at a time.

    images:   serve the pixels.
    latents:  ID of the autoencoder whose stored moments are served; empty for none.
    features: IDs of the encoders whose stored tokens are served.
    mirror:   the mirrored images follow the others as further items.
    Items are counted without the damaged files. Attributes: resolution, num_classes, labels, and content, a
    fingerprint of its images and labels.
    Raises ValueError where the folder is missing, unfinished, or lacks what is asked for.
    """

    def __init__(self, folder, images=True, latents="", features=(), mirror=False):
        self.folder, self.mirror = Path(folder), mirror
        if not (self.folder / "meta.json").is_file():
            state = "is not finished" if (self.folder / "settings.json").is_file() else "is not a prepared folder"
            raise ValueError(f"data = {str(folder)!r} {state}; run `python -m dataset.prepare SOURCE --out {folder}`")
        if not (self.folder / "sizes.npy").is_file():
            raise ValueError(f"data = {str(folder)!r} was prepared by an older version; delete it and prepare it again")
        meta = json.loads((self.folder / "meta.json").read_text())
        self.resolution, self.num_classes = meta["resolution"], len(meta["class_names"])
        self.content = meta["content"]
        self.files = {}
        if latents:
            self.files["moments"] = self._finished("latents", latents, "moments.npy", "--autoencoder")
        for i, encoder in enumerate(features):
            self.files[f"tokens_{i}"] = self._finished(
                "features", encoder, "tokens.npy", "--encoder", ", or use --encoder-features online"
            )
        self.images = EncodedImages(folder) if images else None
        labels = np.load(self.folder / "labels.npy")
        self.count = len(labels)
        rows = np.flatnonzero(labels >= 0)  # prepare marks damaged images by -1
        self.labels = torch.from_numpy(labels[rows]).repeat(1 + mirror)
        self.rows = np.concatenate([rows, self.count + rows]) if mirror else rows

    def _finished(self, kind, name, file, option, otherwise=""):
        folder = self.folder / kind / name
        meta = json.loads((folder / "meta.json").read_text()) if (folder / "meta.json").is_file() else None
        if meta is None or self.mirror and not meta["mirror"]:
            mirrored = "mirrored ones of " if meta else ""
            raise ValueError(
                f"{self.folder} holds no finished {kind} {mirrored}{name}; run the "
                f"`python -m dataset.prepare` command that made the folder again, with {option} "
                f"{'and --mirror ' if self.mirror else ''}added{otherwise}"
            )
        return folder / file

    def __len__(self):
        return len(self.rows)

    def __getstate__(self):
        """Without the open maps, which would be copied whole into each reader process."""
        return {name: value for name, value in vars(self).items() if name != "_maps"}

    @functools.cached_property
    def _maps(self):
        return {name: np.load(path, mmap_mode="r") for name, path in self.files.items()}

    def __getitems__(self, items):
        """Returns a dict of what was asked for: "labels" (B), "images" uint8 (B, 3, H, W), "moments" float16
        (B, 2C, h, w) and, for encoder i, "tokens_i" float16 (B, T, dim)."""
        items = np.asarray(items)
        rows = self.rows[items]
        batch = {
            "labels": self.labels[items],
            **{name: torch.from_numpy(array[rows]) for name, array in self._maps.items()},
        }
        if self.images:
            batch["images"] = torch.stack(
                [self.images[row % self.count].flip(-1) if row >= self.count else self.images[row] for row in rows]
            )
        return batch


class ShuffledBatches:
    """Batch sampler: which items this process takes in each step from `start` to `stop`.

    The items of all epochs form one endless stream, each epoch shuffled by (seed, epoch) alone. Step s takes the
    entries s * batch_size onwards, and process r of `world` the r-th equal part of them. A step thus follows from its
    number: nothing has to be replayed on resuming, a batch may reach into the next epoch, no item is dropped.
    """

    def __init__(self, num_items, batch_size, seed, start, stop, rank=0, world=1):
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self.steps, self.rank, self.share = range(start, stop), rank, batch_size // world
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        for step in self.steps:
            first = step * self.batch_size + self.rank * self.share
            yield [int(self._epoch(i // self.num_items)[i % self.num_items]) for i in range(first, first + self.share)]

    def _shuffle(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_items)

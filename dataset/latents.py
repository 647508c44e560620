"""Reads a prepared folder through memory maps, in an order that depends on the seed alone.

Shapes: B batch, H = W size, T tokens.
"""

import functools
import json
from pathlib import Path

import numpy as np
import torch


class PreparedImages:
    """A folder made by `python -m dataset.prepare`, as a map-style dataset that is read a batch at a time.

    features: fingerprint of the encoder whose stored tokens are served as well; empty for none.
    Items are counted without the damaged files. Attributes: resolution, num_classes, autoencoder, labels,
    and content, a fingerprint of its images and labels.
    Raises ValueError where the folder is missing, unfinished, or lacks those features.
    """

    def __init__(self, folder, features=""):
        self.folder = Path(folder)
        if not (self.folder / "meta.json").is_file():
            state = "is not finished" if (self.folder / "progress.json").is_file() else "is not a prepared folder"
            raise ValueError(f"data = {str(folder)!r} {state}; run `python -m dataset.prepare SOURCE --out {folder}`")
        meta = json.loads((self.folder / "meta.json").read_text())
        self.resolution, self.num_classes = meta["resolution"], len(meta["class_names"])
        self.autoencoder, self.content = meta["autoencoder"], meta["content"]
        self.tokens_file = self.folder / "features" / features / "tokens.npy" if features else None
        if features and not self.tokens_file.with_name("meta.json").is_file():
            raise ValueError(f"{folder} holds no finished features of encoder {features}; run the "
                             "`python -m dataset.prepare` command that made the folder again, with --encoder added, "
                             "or use --encoder-features online")
        labels = np.load(self.folder / "labels.npy")
        self.rows = np.flatnonzero(labels >= 0)                    # prepare marks damaged images by -1
        self.labels = torch.from_numpy(labels[self.rows])

    def __len__(self):
        return len(self.rows)

    def __getstate__(self):
        """Without the open maps, which would be copied whole into each reader process."""
        return {name: value for name, value in vars(self).items() if name not in ("_images", "_tokens")}

    @functools.cached_property
    def _images(self):
        return np.load(self.folder / "images.npy", mmap_mode="r")

    @functools.cached_property
    def _tokens(self):
        return np.load(self.tokens_file, mmap_mode="r")

    def __getitems__(self, items):
        """Returns {"images": uint8 (B, 3, H, W), "labels": (B), and where asked for "tokens": float16 (B, T, dim)}."""
        items = np.asarray(items)
        rows = self.rows[items]
        batch = {"images": torch.from_numpy(self._images[rows]).permute(0, 3, 1, 2), "labels": self.labels[items]}
        if self.tokens_file:
            batch["tokens"] = torch.from_numpy(self._tokens[rows])
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

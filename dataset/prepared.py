"""Reads a prepared folder, in an order that depends on the seed alone.

Shapes: B batch, C channels, H = W pixels, h = w latents, T tokens.
"""

import atexit
import functools
import io
import json
import multiprocessing.queues
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

KEPT = 2**28  # bytes of pixels: a data set without more is decoded once, by each process that reads it
RASTER = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # none of them runs a program, as Pillow does for EPS


def open_image(file) -> Image.Image:
    """A PIL image from a path or a binary file. Raises an exception, of nearly any kind, on what is no raster image."""
    if not hasattr(file, "read") and not os.path.isfile(file):  # opening a pipe would wait for ever
        raise FileNotFoundError("there is no such file")
    return Image.open(file, formats=RASTER)


class EncodedImages:
    """The images of a prepared folder: `images[row]` is uint8 (3, H, W), zeros where none could be read."""

    def __init__(self, folder: Path):
        meta = json.loads((folder / "meta.json").read_text())
        self.folder, self.resolution, self.per_file = folder / "images", meta["resolution"], meta["chunk"]
        self.sizes = np.load(folder / "sizes.npy")
        ends = self.sizes.cumsum()
        first = np.arange(len(self.sizes)) // self.per_file * self.per_file  # of the file in which a row is
        self.starts = ends - self.sizes - (ends - self.sizes)[first]
        self.few = 3 * self.resolution**2 * len(self.sizes) <= KEPT
        self.decoded = {}

    def __getitem__(self, row):
        if row in self.decoded:
            return self.decoded[row]
        image = self._decode(row)
        if self.few:
            self.decoded[row] = image
        return image

    def _decode(self, row):
        if not self.sizes[row]:
            return torch.zeros(3, self.resolution, self.resolution, dtype=torch.uint8)
        with open(self.folder / f"{row // self.per_file:05}.bin", "rb") as file:
            file.seek(self.starts[row])
            image = open_image(io.BytesIO(file.read(self.sizes[row])))
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


class PreparedImages:
    """A folder made by `python -m dataset.prepare`, as a map-style dataset that is read a batch at a time.

    images:   serve the pixels.
    latents:  ID of the autoencoder whose stored moments are served; empty for none.
    features: IDs of the encoders whose stored tokens are served.
    text:     ID of the text encoder whose stored tokens are served; empty for none.
    mirror:   the mirrored images follow the others as further items.
    held_out: so many images, spread evenly, are left out; they are the only ones unless `training`.
    Items are counted without the damaged files. Attributes: resolution, num_classes (classes without an image
    included), labels (N), and content, a fingerprint of images and labels. With text, null_text is
    the tokens of an empty caption, float16 (L, W + 1); otherwise it is None.
    Raises ValueError where the folder is missing, unfinished, or lacks what is asked for.
    """

    def __init__(
        self, folder: str | Path, images: bool = True, latents: str = "", features=(), text: str = "",
        mirror: bool = False, held_out: int = 0, training: bool = True,
    ):  # fmt: skip
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
            otherwise = ", or use --encoder-features online"
            self.files[f"tokens_{i}"] = self._finished("features", encoder, "tokens.npy", "--encoder", otherwise)
        if text:
            self.files["text"] = self._finished("text", text, "tokens.npy", "--text-encoder")
        self.images = EncodedImages(self.folder) if images else None
        if images and not self.images.sizes.any():
            raise ValueError(
                f"{self.folder} holds latents without images, which are needed for pixels, encoders whose tokens are "
                "not stored, diagnoses, and judges that compare with them (--eval-every 0, or give a --fid-reference)"
            )
        labels = np.load(self.folder / "labels.npy")
        self.count = len(labels)
        rows = np.flatnonzero(labels >= 0)  # prepare marks damaged images by -1
        if held_out >= len(rows):
            raise ValueError(
                f"held_out = {held_out}: {folder} has {len(rows)} images, and some must be left to train on"
            )
        others = np.arange(held_out) * len(rows) // max(1, held_out)
        rows = np.delete(rows, others) if training else rows[others]
        self.labels = torch.from_numpy(labels[rows]).repeat(1 + mirror)
        self.rows = np.concatenate([rows, self.count + rows]) if mirror else rows
        self.null_text = torch.from_numpy(np.load(self.files["text"].parent / "null.npy")) if text else None

    def _finished(self, kind, name, file, option, otherwise=""):
        folder = self.folder / kind / name
        meta = json.loads((folder / "meta.json").read_text()) if (folder / "meta.json").is_file() else None
        mirror = self.mirror and kind != "text"  # a mirrored image has the same caption
        if meta is None or mirror and not meta["mirror"]:
            what = f"mirrored {kind}" if meta else kind
            raise ValueError(
                f"{self.folder} holds no finished {what} {name}; run the "
                f"`python -m dataset.prepare` command that made the folder again, with {option} "
                f"{'and --mirror ' if mirror else ''}added{otherwise}"
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

    def __getitems__(self, items) -> dict:
        """Returns a dict of what was asked for: "labels" (B), "images" uint8 (B, 3, H, W), "moments" float16
        (B, 2C, h, w), "text" float16 (B, L, W + 1) and, for encoder i, "tokens_i" float16 (B, T, dim)."""
        items = np.asarray(items)
        rows = self.rows[items]
        batch = {"labels": self.labels[items]}
        # Captions have no rows of their own for mirrored images: there, len(array) is self.count.
        batch |= {name: torch.from_numpy(array[rows % len(array)]) for name, array in self._maps.items()}
        if self.images:
            found = [self.images[row % self.count] for row in rows]
            batch["images"] = torch.stack([x.flip(-1) if row >= self.count else x for x, row in zip(found, rows)])
        return batch

    def conditions(self, items) -> torch.Tensor:
        """What the model is told about these items: "text" float16 (B, L, W + 1) if it is served, else labels (B)."""
        if "text" not in self.files:
            return self.labels[items]
        return torch.from_numpy(self._maps["text"][self.rows[np.asarray(items)] % self.count])


def text_encoders(folder: str | Path) -> dict:
    """{ID: facts} of the text encoders whose tokens a prepared folder holds: `name`, and a hash of the `captions`."""
    return {path.parent.name: json.loads(path.read_text()) for path in Path(folder).glob("text/*/meta.json")}


class ShuffledBatches:
    """Batch sampler: which items this process takes in each step from `start` to `stop`.

    The items of all epochs form one endless stream, each epoch shuffled by (seed, epoch) alone. Step s takes the
    entries s * batch_size onwards, and process r of `world` the r-th equal part of them. A step thus follows from its
    number: nothing has to be replayed on resuming, a batch may reach into the next epoch, no item is dropped.
    """

    def __init__(
        self, num_items: int, batch_size: int, seed: int, start: int, stop: int, rank: int = 0, world: int = 1
    ):
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


def load_batches(data, batch_sampler, num_workers: int = 0, pin_memory: bool = False):
    """Yields data.__getitems__(items) for each list of items in `batch_sampler`, which has a length.

    num_workers: processes that read ahead; with 0, this one reads. pin_memory: they hand over page-locked tensors.
    Raises OSError where such a process cannot be started, or ends.
    """
    if not num_workers or not len(batch_sampler):
        yield from map(data.__getitems__, batch_sampler)
        return
    settings = dict(collate_fn=_whole, num_workers=num_workers, pin_memory=pin_memory, worker_init_fn=_begin_reader)
    try:
        batches = iter(DataLoader(data, batch_sampler=batch_sampler, **settings))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise wherever the program happens to be
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        if str(error).startswith("Caught"):  # an exception within a reader, which torch repeats here
            raise
        raise OSError(
            f"a reader process has ended or could not start ({error}); see that memory and /dev/shm have room, or use "
            f"fewer than --num-workers {num_workers}; 0 needs neither"
        ) from None


def _whole(batch):
    return batch


def _begin_reader(worker):
    """In a reader process: signals are left to the process that reads from it, which finishes its step first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_reader)


@atexit.register
def _end_readers():
    """As they ignore what multiprocessing would end them by, the program would wait for them for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _end_reader(error, batch):
    """A batch cannot be handed over, say for a full /dev/shm. Python would drop it, and its reader wait for ever."""
    print(f"reader process {os.getpid()}: {error}", file=sys.stderr, flush=True)
    os._exit(1)

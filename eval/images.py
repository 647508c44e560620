"""Images for eval.metrics and analysis.spectrum: from an npz, a folder of png or jpg, or a folder of dataset.prepare.

Each source has a length, `__getitems__(indices)` -> uint8 (B, 3, H, W), `labels` (N) or None, `size` (H, W), and what
the report says of it: `uint8_conversion`, `settings`, `seconds` per 1000 images where known, `warnings`.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from dataset.prepared import PreparedImages, open_image

SUFFIXES = (".png", ".jpg", ".jpeg")
UNKNOWN_CONVERSION = "unknown: the file does not say how its floats became uint8 (rounded or truncated)"


class ArrayImages:
    """arr_0 of an npz, uint8 (N, H, W, 3), and arr_1, its labels, if any.

    Each process reads all of it into memory: 50 000 images of 256 x 256 pixels take 10 GB.
    Where settings.json of `eval.sample` is beside it, `settings` is what the images were drawn with.
    """

    warnings = []

    def __init__(self, path: Path):
        found = read_npz(path, "arr_0", "arr_1")
        if "arr_0" not in found:
            raise ValueError(f"{str(path)!r} has no arr_0; images are expected there, uint8 (N, H, W, 3)")
        self.array, self.labels = found["arr_0"], found.get("arr_1")
        if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[3] != 3:
            raise ValueError(
                f"{str(path)!r}: arr_0 is {self.array.dtype} {self.array.shape}; images must be uint8 (N, H, W, 3)"
            )
        if self.labels is not None and self.labels.shape != (len(self),):
            raise ValueError(
                f"{str(path)!r}: arr_1 is {self.labels.shape}; it must have one label for each of {len(self)} images"
            )
        self.size, made = self.array.shape[1:3], settings_beside(path)
        self.uint8_conversion, self.settings = made.get("uint8", UNKNOWN_CONVERSION), made.get("settings")
        self.seconds = made.get("seconds_per_1000_images")

    def __len__(self):
        return len(self.array)

    def __getitems__(self, indices):
        return torch.from_numpy(self.array[np.asarray(indices)]).permute(0, 3, 1, 2)


class FolderImages:
    """All png and jpg below a folder, in the order of their paths; subfolders count as classes.

    Hidden files and folders, and those of other suffixes, are left out; `warnings` has their number.
    """

    uint8_conversion, settings, seconds = UNKNOWN_CONVERSION, None, None

    def __init__(self, folder: Path):
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        self.paths = [path for path in files if path.suffix.lower() in SUFFIXES and not hidden(path, folder)]
        if not self.paths:
            raise ValueError(f"{str(folder)!r} has neither png nor jpg in it, and is no folder of dataset.prepare")
        parents = [str(path.parent) for path in self.paths]
        self.labels = np.unique(parents, return_inverse=True)[1] if len(set(parents)) > 1 else None
        self.size = None
        self.size = self._read(0).shape[1:]
        lossy = sum(path.suffix.lower() != ".png" for path in self.paths)
        self.warnings = [f"{lossy} images are JPEG, whose losses move FID"] if lossy else []
        if left := len(files) - len(self.paths):
            self.warnings.append(f"{left} files in {folder} are not judged: they are hidden, or neither png nor jpg")

    def __len__(self):
        return len(self.paths)

    def __getitems__(self, indices):
        with ThreadPoolExecutor(4) as pool:
            return torch.stack(list(pool.map(self._read, indices)))

    def _read(self, index):
        path = self.paths[index]
        try:
            with open_image(path) as image:
                mode, image = image.mode, np.array(image.convert("RGB"))
        except Exception as error:  # damaged files raise many kinds
            raise ValueError(f"{str(path)!r} cannot be read as an image ({error}); delete it") from None
        if mode[0] in "IF":
            raise ValueError(f"{str(path)!r} has more than 8 bits per value (mode {mode}); convert it first")
        if self.size and image.shape[:2] != self.size:
            raise ValueError(
                f"{str(path)!r} is {image.shape[0]} x {image.shape[1]} pixels, the first one "
                f"{self.size[0]} x {self.size[1]}; all must be of one size (dataset.prepare crops them)"
            )
        return torch.from_numpy(image).permute(2, 0, 1)


class FolderOfPrepare:
    uint8_conversion, settings, seconds, warnings = "none: images of the data set", None, None, []

    def __init__(self, folder: Path):
        self.data = PreparedImages(folder)
        self.labels, self.size = self.data.labels.numpy(), (self.data.resolution, self.data.resolution)

    def __len__(self):
        return len(self.data)

    def __getitems__(self, indices):
        return self.data.__getitems__(indices)["images"]


def hidden(path: Path, folder: Path) -> bool:
    """Whether a file below a folder is hidden, lies in a hidden folder, or is one of macOS's own."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)


def settings_beside(path: Path) -> dict:
    """What `eval.sample` has recorded in the folder of its npz; {} where it has not."""
    try:
        made = json.loads((path.parent / "settings.json").read_text())
    except (OSError, ValueError):
        return {}
    return made if isinstance(made, dict) and "uint8" in made else {}


def open_images(path: str | Path) -> ArrayImages | FolderImages | FolderOfPrepare:
    """The images at a path. Raises ValueError where there are none that can be judged."""
    path = Path(path)
    if path.is_file():
        return ArrayImages(path)
    if not path.is_dir():
        raise ValueError(f"there is no {str(path)!r}; give an npz, a folder of images, or one of dataset.prepare")
    if (path / "samples").is_dir() and (path / "settings.json").is_file():
        raise ValueError(f"{str(path)!r} is a folder of eval.sample; give the npz in it")
    prepared = any((path / name).is_file() for name in ("meta.json", "settings.json"))
    return FolderOfPrepare(path) if prepared else FolderImages(path)


def read_npz(path: str | Path, *names: str) -> dict:
    """Those of the named arrays that an npz has. Raises ValueError for other files, and for Python objects in one."""
    if not Path(path).is_file():
        raise ValueError(f"there is no {str(path)!r}; give an npz")
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in names if name in content.files}
    except Exception as error:  # files of other kinds raise many kinds
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{str(path)!r} is not an npz of plain arrays ({reason}); write it with numpy.savez") from None

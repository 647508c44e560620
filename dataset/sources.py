"""Where images come from (embedded digits, class folders, parquet tables, hub datasets), and how they become square."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.digits import load_digits


@dataclass(frozen=True)
class Source:
    """Images that can be read one by one: `load(i)` returns a PIL image or raises."""

    names: list
    labels: np.ndarray
    class_names: list
    load: callable


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
        table = (
            datasets.load_dataset("parquet", data_files=parquet, split="train")
            if parquet
            else datasets.load_dataset(options.source, split=options.split)
        )
    except Exception as error:  # the hub's client raises many kinds
        raise ValueError(
            f"{options.source!r} "
            + ("cannot be read as parquet " if parquet else "is no existing path, and no dataset that can be loaded ")
            + f"({type(error).__name__}: {error})"
        ) from None
    image_column = choose_column(
        table,
        "image",
        options.image_column,
        lambda name, kind: isinstance(kind, datasets.Image) or name in ("image", "img"),
    )
    label_column = choose_column(
        table,
        "label",
        options.label_column,
        lambda name, kind: isinstance(kind, datasets.ClassLabel) or name in ("label", "labels"),
    )
    kind, values = table.features[label_column], list(table[label_column])
    if any(
        value is None or isinstance(value, (list, dict)) or isinstance(kind, datasets.ClassLabel) and value < 0
        for value in values
    ):
        raise ValueError(f"the label column {label_column!r} has rows without a label, or with several")
    labels = np.array(values)
    if isinstance(kind, datasets.ClassLabel):
        class_names = kind.names
    else:
        class_names, labels = np.unique(labels, return_inverse=True)
    if isinstance(table.features[image_column], datasets.Image):
        table = table.cast_column(image_column, datasets.Image(decode=False))  # so that we see which is damaged

    def load(i):
        value = table[i][image_column]
        data = value if isinstance(value, bytes) else value["bytes"]
        return Image.open(io.BytesIO(data) if data is not None else value["path"])

    return Source([f"row {i}" for i in range(len(table))], labels, [str(name) for name in class_names], load)


def choose_column(table, role, wanted, fits):
    columns = [wanted] if wanted else [name for name, kind in table.features.items() if fits(name, kind)]
    if len(columns) != 1 or columns[0] not in table.features:
        raise ValueError(
            f"the {role} column must be named with --{role}-column: "
            f"{wanted or 'none was found for certain'!r} among {list(table.features)}"
        )
    return columns[0]


def limited(source, limit):
    if limit is None:
        return source
    if limit < 1:
        raise ValueError(f"limit = {limit}: must be at least 1")
    count = len(source.names)
    chosen = [i * count // min(limit, count) for i in range(min(limit, count))]
    return Source(
        [source.names[i] for i in chosen], source.labels[chosen], source.class_names, lambda k: source.load(chosen[k])
    )


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

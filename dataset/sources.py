"""Where images come from, and how they become square: embedded digits, class folders, parquet tables, hub datasets, and
folders that REPA's tools have prepared, which hold latents too, or LightningDiT's, which hold latents alone.

Class folders are read as torchvision's ImageFolder does: each subfolder is a class, and images may lie deeper in it.
Hidden files and folders, and __MACOSX, are passed over. Whatever else is not read is named in Source.notes.
Where captions are asked for, labels are not needed: all images may lie in one folder, or a table have no labels.
"""

import glob
import io
import json
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open

from dataset.prepared import open_image

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# What datasets.load_dataset calls a split, and the words for it in the names of files and folders.
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
NUMERALS = "zero one two three four five six seven eight nine".split()
WORDINGS = ("a handwritten {}", "the digit {}, written by hand", "a {} in grey ink")


@dataclass(frozen=True)
class Source:
    """Images that can be read one by one: `load(i)` returns a PIL image or raises; None: there are latents alone.

    notes: lines to tell the user. moments: where latents are there, `moments(i)` -> (2C, h, w), mean and standard
    deviation, or raises. mirrored: the same of the mirrored image. captions: of each image, None where it has none, if
    they are asked for and there are any.
    """

    names: list
    labels: np.ndarray
    class_names: list
    load: Callable | None
    notes: tuple = ()
    moments: Callable | None = None
    mirrored: Callable | None = None
    captions: list | None = None


def open_source(options) -> Source:
    """What `source` of dataset.prepare's options stands for. Raises ValueError where it cannot be used."""
    path = options.source
    if path != "digits" and not os.path.isdir(path):
        if not path.lower().endswith(".parquet"):
            if os.path.exists(path):
                raise ValueError(f"source {path!r} is neither a folder nor a parquet file")
            return open_table(options)
        if not os.path.exists(path):
            raise ValueError(f"there is no file {path!r}")
        return open_table(options, [path])
    repa = path != "digits" and is_of_repa(path)
    files = [] if path == "digits" or repa else list(files_below(path))
    tables = [name for name in files if name.lower().endswith(".parquet")]
    pictures = [name for name in files if name.lower().endswith(SUFFIXES) and os.sep in name]
    if tables and pictures:
        both = f"class folders ({shown(pictures[0])}) and parquet files ({shown(tables[0])})"
        raise ValueError(f"{path!r} holds both {both}; give a folder that holds one of them, or a file")
    if tables:
        splits, wanted = splits_among(tables), options.split.partition("[")[0]  # of train[:1000]
        if wanted not in splits:
            raise ValueError(f"split = {wanted!r}: {path!r} holds {', '.join(splits)}; name one of them with --split")
        notes = [f"{path}: split {wanted!r} of {', '.join(splits)}"] * (len(splits) > 1)
        notes += left_out("in no split", sorted(set(files).difference(*splits.values())))
        return open_table(options, [os.path.join(path, name) for name in splits[wanted]], notes)
    if options.split != "train":
        raise ValueError(f"split = {options.split!r}: {path!r} has no splits; name the folder of that split as source")
    if repa:
        return open_repa(path)
    if (shards := [name for name in files if name.endswith(".safetensors")]) and not pictures:
        return open_shards(path, shards)
    return embedded_digits() if path == "digits" else open_class_folder(path, files, options)


def embedded_digits() -> Source:
    """scikit-learn's 1797 handwritten digits: 8 x 8 grey levels 0..16, ten classes, no download.

    Their captions are made from the labels, in several wordings by turns.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = [Image.fromarray(np.round(grey * (255 / 16)).astype(np.uint8)).convert("RGB") for grey in found.images]
    names = [f"digit {i}" for i in range(len(images))]
    captions = [WORDINGS[i % len(WORDINGS)].format(NUMERALS[label]) for i, label in enumerate(found.target)]
    return Source(names, found.target, [str(k) for k in range(10)], images.__getitem__, captions=captions)


def files_below(root: str, inside: str = "", above: tuple = ()):
    """Yields the files below a folder by name, as paths relative to it. A link to a folder above is not followed."""
    here = os.path.join(root, inside)
    if (real := os.path.realpath(here)) in above:
        return
    for entry in sorted(os.scandir(here), key=lambda entry: entry.name):
        name = os.path.join(inside, entry.name)
        if hidden(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False) or entry.is_symlink() and os.path.isdir(entry.path):
            yield from files_below(root, name, (*above, real))
        else:
            yield name


def hidden(name):
    return name.startswith(".") or name == "__MACOSX"


def splits_among(tables):
    """{split: tables}, as datasets.load_dataset finds them: by the name in data/NAME-00000-of-00001, else by the words
    of SPLITS in the names of folders, else of files, else all are train. Tables without such a name are in no split."""
    numbered = [(found[1], name) for name in tables if (found := re.match(r"data/([^/]+)-\d{5}-of-\d{5}", name))]
    if numbered:
        return {split: [name for other, name in numbered if other == split] for split, _ in numbered}
    for part in (os.path.dirname, os.path.basename):
        words = {name: set(re.split(r"[-._ 0-9/]", part(name).lower())) for name in tables}
        splits = {split: [name for name in tables if words[name] & known] for split, known in SPLITS.items()}
        if any(splits.values()):
            return {split: names for split, names in splits.items() if names}
    return {"train": tables}


def left_out(reason, names):
    """A list of one line, or of none where there are no names."""
    examples = ", ".join(map(shown, names[:3])) + ", ..." * (len(names) > 3)
    return [f"left out, {reason}: {len(names)} ({examples})"] if names else []


def shown(name):
    """A file's name as text that can be printed, also where it is not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def open_class_folder(path, files, options) -> Source:
    """files: those below `path`, relative to it. Where captions are asked for, all images may lie in `path` itself."""
    classes = sorted(name for name in os.listdir(path) if not hidden(name) and os.path.isdir(os.path.join(path, name)))
    pictures = [name for name in files if name.lower().endswith(SUFFIXES)]
    chosen = [name for name in pictures if os.sep in name]
    flat = bool(options.text_encoder and pictures and not chosen)
    if flat:
        classes, chosen = ["image"], pictures
    if not classes:
        raise ValueError(f"{path!r} has no subfolder per class, and no parquet files")
    if not chosen:
        raise ValueError(f"{path!r} has no images in its {len(classes)} class folders")
    chosen.sort(key=lambda name: (name.partition(os.sep)[0], *os.path.split(name)))  # as ImageFolder does
    found = ["image" if flat else name.partition(os.sep)[0] for name in chosen]
    if set(found) <= set.union(*SPLITS.values()):
        raise ValueError(f"{path!r} holds splits, not classes; name one as source: {', '.join(sorted(set(found)))}")
    captions, read = None, set()
    if options.text_encoder:
        captions, read = captions_beside(path, files, chosen, options.caption_column or "text")
    number = {name: k for k, name in enumerate(classes)}
    others = sorted(set(files) - set(chosen) - read)
    inside = [name for name in others if flat or os.sep in name]
    notes = left_out("in no class folder", [name for name in others if not flat and os.sep not in name])
    notes += left_out(f"none of {' '.join(SUFFIXES)}", inside)

    def load(i):
        return open_image(os.path.join(path, chosen[i]))

    labels = np.array([number[name] for name in found])
    return Source([*map(shown, chosen)], labels, [*map(shown, classes)], load, notes, captions=captions)


def captions_beside(path, files, images, key):
    """The caption of each image, or None, and the files that were read: metadata.jsonl with lines that have a
    `file_name`, relative to it, and the caption as `key`, as the hub's image folders do; else NAME.txt beside NAME.png.

    Raises ValueError that names a file which holds anything else.
    """
    present, listed = set(files), {}
    tables = [name for name in files if os.path.basename(name) == "metadata.jsonl"]
    for table in tables:
        try:
            for line in filter(str.strip, read_text(path, table).split("\n")):
                entry = json.loads(line)
                name = os.path.normpath(os.path.join(os.path.dirname(table), entry["file_name"]))
                listed[name] = first_caption(entry.get(key))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{shown(os.path.join(path, table))} must have an object with file_name and {key} in each line "
                f"({type(error).__name__}: {error})"
            ) from None
    beside = {name: f"{os.path.splitext(name)[0]}.txt" for name in images}
    beside = {name: text for name, text in beside.items() if listed.get(name) is None and text in present}
    captions = [read_text(path, beside[name]).strip() if name in beside else listed.get(name) for name in images]
    return captions, {*tables, *beside.values()}


def read_text(path, name):
    """Raises ValueError that names a file which is no text."""
    try:
        with open(os.path.join(path, name), encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(os.path.join(path, name))} is no text in UTF-8 ({error})") from None


def first_caption(value):
    """A caption, or the first of several; None where there is none."""
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, str) else None


def is_of_repa(path):
    return all(os.path.isdir(f"{path}/{part}") or os.path.isfile(f"{path}/{part}.zip") for part in ("images", "vae-sd"))


def open_repa(path) -> Source:
    """What REPA's preprocessing/dataset_tools.py writes: images/00000/img00000000.png, the same numbers in
    vae-sd/00000/img-mean-std-00000000.npy, and labels by latent in vae-sd/dataset.json. Each part may be a zip.

    An image without latents, or latents without an image, cannot be loaded.
    """
    pictures, open_picture = open_part(f"{path}/images")
    latents, open_latents = open_part(f"{path}/vae-sd")
    try:
        labels = dict(json.load(open_latents("dataset.json"))["labels"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}/vae-sd has no labels in dataset.json ({type(error).__name__}: {error})") from None
    wrong = [name for name, label in labels.items() if not isinstance(label, int) or label < 0]
    if wrong or not labels:
        raise ValueError(
            f"{path}/vae-sd/dataset.json must have a label from 0 for each of its files; see {wrong or 'it'}"
        )
    picture_of, latents_of = ({os.path.basename(name)[-12:-4]: name for name in part} for part in (pictures, latents))
    names = sorted(labels, key=lambda name: name[-12:-4])
    numbers = [name[-12:-4] for name in names]
    unlabelled = sorted(latents_of.keys() - set(numbers))
    notes = left_out("without a label", [latents_of[number] for number in unlabelled])

    def moments(i):
        if numbers[i] not in latents_of:
            raise ValueError(f"there is no vae-sd/{names[i]}")
        with open_latents(latents_of[numbers[i]]) as file:
            return np.load(io.BytesIO(file.read()), allow_pickle=False)

    def load(i):
        if numbers[i] not in picture_of:
            raise ValueError(f"there is no image with the number {numbers[i]}")
        with open_picture(picture_of[numbers[i]]) as file:
            return open_image(io.BytesIO(file.read()))

    class_names = [str(k) for k in range(1 + max(labels.values()))]
    return Source(names, np.array([labels[name] for name in names]), class_names, load, notes, moments)


def open_part(path):
    """The names of the png and npy in a folder, or in the zip of that name, and a function that opens one of them."""
    if os.path.isdir(path):
        names, opener = files_below(path), lambda name: open(os.path.join(path, name), "rb")
    else:
        try:
            archive = zipfile.ZipFile(f"{path}.zip")
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path}.zip is damaged, or no zip ({error})") from None
        names, opener = archive.namelist(), archive.open
        names = [name for name in names if not any(map(hidden, name.split("/")))]
    return [name for name in names if name.endswith((".png", ".npy"))], opener


def open_shards(path, shards) -> Source:
    """What LightningDiT's extract_features.py writes: `latents` (N, C, h, w), each a draw from the posterior,
    `latents_flip` of the mirrored images, and `labels` (N), in files of safetensors."""
    files, labels_of = {}, {}
    for name in shards:
        try:
            files[name] = safe_open(os.path.join(path, name), "pt")
            count, labels = files[name].get_slice("latents").get_shape()[0], files[name].get_tensor("labels")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{os.path.join(path, name)} is damaged, or holds no latents and labels ({error})"
            ) from None
        if labels.shape != (count,) or labels.min() < 0:
            raise ValueError(
                f"{os.path.join(path, name)} has labels {tuple(labels.shape)} for {count} latents, or below 0"
            )
        labels_of[name] = labels.numpy()
    labels = np.concatenate([*labels_of.values()])
    rows = [(name, row) for name in files for row in range(len(labels_of[name]))]

    def reader(key):
        def moments(i):
            name, row = rows[i]
            drawn = files[name].get_slice(key)[row : row + 1][0].float().numpy()
            return np.concatenate([drawn, np.zeros_like(drawn)])  # without a deviation

        return moments

    flipped = all("latents_flip" in file.keys() for file in files.values())
    names, class_names = [f"{name}, row {row}" for name, row in rows], [str(k) for k in range(1 + labels.max())]
    notes = [f"{path}: latents without images, taken on trust; what needs images cannot use them"]
    return Source(
        names, labels, class_names, None, notes, reader("latents"), reader("latents_flip") if flipped else None
    )


def open_table(options, files=None, notes=()) -> Source:
    """files: local parquet files; if not given, the source is the name of a dataset on the hub."""
    import datasets

    try:
        if files:
            # As patterns that stand for these names alone.
            given = {options.split.partition("[")[0]: [glob.escape(name) for name in files]}
            table = datasets.load_dataset("parquet", data_files=given, split=options.split)
        else:
            table = datasets.load_dataset(options.source, split=options.split)
    except Exception as error:  # the hub's client raises many kinds
        what = "cannot be read as parquet" if files else "is no existing path, and no dataset that can be loaded"
        raise ValueError(f"{options.source!r} {what} ({type(error).__name__}: {error.__cause__ or error})") from None
    images = choose_column(table, "image", options.image_column, datasets.Image, ("image", "img"))
    captions, needed = None, True
    if options.text_encoder:
        column = choose_column(table, "caption", options.caption_column, (), ("text", "caption", "captions", "prompt"))
        captions, needed = [first_caption(value) for value in table[column]], False
    column = choose_column(table, "label", options.label_column, datasets.ClassLabel, ("label", "labels"), needed)
    values = list(table[column]) if column else ["image"] * len(table)
    unlabelled = [i for i, value in enumerate(values) if is_no_label(value)]
    if unlabelled:
        raise ValueError(
            f"the label column {column!r} has {len(unlabelled)} rows without a label, or with several, such as row "
            f"{unlabelled[0]} with {values[unlabelled[0]]!r}; take them out, or give another --label-column"
        )
    class_names, labels = np.unique(np.array(values), return_inverse=True)
    if column and isinstance(table.features[column], datasets.ClassLabel):
        class_names, labels = table.features[column].names, np.array(values)
    if isinstance(table.features[images], datasets.Image):
        table = table.cast_column(images, datasets.Image(decode=False))  # so that we see which is damaged

    def load(i):
        value = table[i][images]
        if isinstance(value, dict):
            value = value["path"] if value["bytes"] is None else value["bytes"]
        if value is None:
            raise ValueError("there is no image")
        return open_image(io.BytesIO(value) if isinstance(value, bytes) else value)

    names = [f"row {i}" for i in range(len(table))]
    return Source(names, labels, [str(name) for name in class_names], load, notes, captions=captions)


def choose_column(table, role, wanted, kind, names, needed=True):
    """The column that is wanted, or the only one of that kind or of these names; None if there is none and no need."""
    fitting = [name for name, found in table.features.items() if isinstance(found, kind) or name in names]
    columns = [wanted] if wanted else fitting
    if not columns and not needed:
        return None
    if len(columns) != 1 or columns[0] not in table.features:
        raise ValueError(
            f"the {role} column must be named with --{role}-column: "
            f"{wanted or 'none was found for certain'!r} among {list(table.features)}"
        )
    return columns[0]


def is_no_label(value):
    """Nothing, NaN, blank text, a negative number (the hub marks withheld labels by -1), or several values."""
    if isinstance(value, str | bytes):
        return not value.strip()
    negative = isinstance(value, int | float) and value < 0
    return value is None or negative or value != value or isinstance(value, list | dict)


def limited(source: Source, limit: int | None) -> Source:
    """So many images of a source, spread evenly over it."""
    if limit is None:
        return source
    if limit < 1:
        raise ValueError(f"limit = {limit}: must be at least 1")
    count = len(source.names)
    return taken(source, [i * count // min(limit, count) for i in range(min(limit, count))])


def with_captions(source: Source, path: str) -> Source:
    """The images that have a caption; an empty one is one. Raises ValueError where none has."""
    rows = [i for i, caption in enumerate(source.captions or ()) if caption is not None]
    if not rows:
        raise ValueError(
            f"source {path!r} has no captions for the --text-encoder; they may be in a column of a parquet file or hub "
            "dataset (--caption-column), in NAME.txt beside NAME.png, or in a metadata.jsonl with file_name and text"
        )
    none = [name for name, caption in zip(source.names, source.captions) if caption is None]
    return replace(taken(source, rows), notes=[*source.notes, *left_out("without a caption", none)])


def taken(source: Source, rows: list) -> Source:
    """These rows of a source."""

    def chosen(read):
        return read and (lambda k: read(rows[k]))

    readers = {name: chosen(getattr(source, name)) for name in ("load", "moments", "mirrored")}
    captions = source.captions and [source.captions[i] for i in rows]
    names, labels = [source.names[i] for i in rows], source.labels[rows]
    return replace(source, names=names, labels=labels, captions=captions, **readers)


def with_latents(source: Source, shape: tuple) -> Source:
    """A source of latents whose images cannot be loaded where the latents are not (2C, h, w) in float16.

    Its `load` returns None where there are no images.
    """

    def load(i):
        for read in filter(None, (source.moments, source.mirrored)):
            found = read(i)
            if found.shape != shape or not np.abs(found).max() <= np.finfo(np.float16).max:
                raise ValueError(f"its latents are {found.dtype} {found.shape}, not finite numbers of float16 {shape}")
        return source.load and source.load(i)

    return replace(source, load=load)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode as RGB: greys and CMYK converted, 16-bit greys scaled down, transparency laid on white.

    Raises ValueError where the range of the values is unknown: floating point, and integers beyond 16 bits.
    """
    if image.mode == "F":
        raise ValueError("which of its floating-point values is white is unknown; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        bits = min(16, *getattr(image, "tag_v2", {}).get(258, (16,)))  # TIFF's BitsPerSample: 12, 16 or 32
        if values.min() < 0 or values.max() >= 2**bits:
            raise ValueError(f"its values reach from {values.min()} to {values.max()}; convert it to 8 or 16 bits")
        image = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop: halve by box filter while twice too large, bicubic to the shorter side, cut out the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))

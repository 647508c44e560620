"""Reading images from every kind of source, and serving them in an order that follows from the seed.

Every image is drawn here. Checked are the conversion of each picture format, ADM's crop against a resampler written out
below, folders against torchvision and datasets, what is left out or refused, order, and reader processes.
"""

import collections
import ctypes
import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import zlib

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets.data_files import DataFilesDict, get_data_patterns
from PIL import EpsImagePlugin, Image
from torch.utils.data import dataloader

from dataset import prepare, sources
from dataset.prepared import PreparedImages, ShuffledBatches, load_batches
from tests.conftest import ROOT, forked

SIZE = 16


def run(source, out, *arguments):
    prepare.main([str(source), "--out", str(out), *map(str, arguments)])


def refusal(source, out, *arguments):
    """The message with which the command ends."""
    with pytest.raises(SystemExit) as raised:
        run(source, out, *arguments)
    assert str(raised.value.code).startswith("error: ") and "\n" not in str(raised.value.code)
    return str(raised.value.code)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text())


def stored_images(folder):
    """All images of a prepared folder (N, H, W, 3), the damaged ones as zeros: their bytes cut and decoded here."""
    meta, sizes = meta_of(folder), np.load(folder / "sizes.npy")
    assert len(sizes) == meta["count"]
    data, images = b"".join(path.read_bytes() for path in sorted((folder / "images").glob("*.bin"))), []
    for end, size in zip(sizes.cumsum(), sizes):
        image = Image.open(io.BytesIO(data[end - size : end])) if size else Image.new("RGB", [meta["resolution"]] * 2)
        images.append(np.asarray(image))
    return np.stack(images)


def reds(folder):
    """The images' red levels, which tell them apart."""
    return stored_images(folder)[:, 0, 0, 0].tolist()


def flat(color, size=(SIZE, SIZE), mode="RGB"):
    return Image.new(mode, size, color)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise_image(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pictures(root, *names):
    """Flat pictures under these names, the first of red level 10, the next of 20, and so on."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        flat((10 * (i + 1), 0, 0)).save(root / name, "PNG")
    return root


def on_small_disk(folder, options, call):
    """What `call` returns or how it fails, in a process that sees a disk of its own at `folder`."""

    def mounted():
        alone = ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS
        commands = "mount --make-rprivate /", f"mount -t tmpfs -o {options} tmpfs {folder}"
        return call() if alone and not any(map(os.system, commands)) else "skip"

    (outcome,) = forked(mounted)
    if outcome == "skip":
        pytest.skip("mounting a small disk is not permitted here")
    return outcome


# ---- class folders with pictures of each kind ----


def half_transparent_palette():
    """Left half transparent, right half the palette's (40, 50, 60)."""
    image = Image.new("P", (SIZE, SIZE), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.paste(0, (0, 0, SIZE // 2, SIZE))
    return image


def grey(value, dtype):
    return Image.fromarray(np.full((20, 17), value, dtype))


def twelve_bit_tiff(value):
    """A 4 x 4 grey TIFF of 12 bits a sample, which Pillow reads but does not write."""
    tags = [(256, 4), (257, 4), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 4), (279, 24)]
    pair = bytes([value >> 4, (value & 15) << 4 | value >> 8, value & 255])
    directory = b"".join(struct.pack("<HHIHH", tag, 3, 1, number, 0) for tag, number in tags)
    return b"II*\0" + struct.pack("<I", 32) + 8 * pair + struct.pack("<H", len(tags)) + directory + bytes(4)


def declared_huge_png():
    """A PNG that says it has 30000 x 30000 pixels."""
    header = b"IHDR" + struct.pack(">II5B", 30000, 30000, 8, 2, 0, 0, 0)
    whole = encoded(flat((1, 2, 3)))
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


# name: (bytes of the file, expected RGB). Over white, colour c of opacity a becomes a c + (1 - a) 255.
READABLE = {
    "cat/bilevel.png": (encoded(flat(1, (20, 30), "1")), (255, 255, 255)),
    "cat/cmyk.jpg": (encoded(flat((0, 255, 255, 0), (50, 40), "CMYK"), "JPEG", quality=100), (255, 0, 0)),
    "cat/grey.png": (encoded(flat(77, (40, 30), "L")), (77, 77, 77)),
    "cat/grey_alpha.PNG": (encoded(flat((200, 51), (40, 30), "LA")), (244, 244, 244)),
    "cat/large.jpg": (encoded(flat((10, 120, 230), (90, 70)), "JPEG", quality=100), (10, 120, 230)),
    "cat/two.jpg": (encoded(flat((0, 9, 9)), "MPO", append_images=[flat((9, 0, 0))], save_all=True), (0, 9, 9)),
    "dog/alpha.png": (encoded(flat((200, 0, 100, 51), (33, 33), "RGBA")), (244, 204, 224)),
    "dog/bitmap.bmp": (encoded(flat((4, 5, 6)), "BMP"), (4, 5, 6)),
    "dog/color_key.png": (encoded(flat((9, 8, 7)), transparency=(9, 8, 7)), (255, 255, 255)),
    "dog/deep/web.webp": (encoded(flat((60, 90, 30)), "WEBP", lossless=True), (60, 90, 30)),
    "dog/graymap.pgm": (b"P5 2 2 65535\n" + 4 * b"\xab\xcd", (0xAB, 0xAB, 0xAB)),
    "dog/sixteen.png": (encoded(grey(0xABCD, np.uint16)), (0xAB, 0xAB, 0xAB)),
    "dog/sixteen.tif": (encoded(grey(0xABCD, np.uint16), "TIFF"), (0xAB, 0xAB, 0xAB)),
    "dog/small.png": (encoded(flat((1, 2, 3), (5, 7))), (1, 2, 3)),
    "dog/thirtytwo.tiff": (encoded(grey(0xABCD, np.int32), "TIFF"), (0xAB, 0xAB, 0xAB)),
    "dog/twelve.tif": (twelve_bit_tiff(0xABC), (0xAB, 0xAB, 0xAB)),
}
TRUNCATED = encoded(Image.fromarray(noise_image(60, 60)), "JPEG")
DAMAGED = {
    "cat/empty.png": b"",
    "cat/float.tif": encoded(grey(0.5, np.float32), "TIFF"),
    "cat/huge.png": declared_huge_png(),
    "cat/program.jpg": encoded(flat((1, 2, 3)), "EPS"),
    "cat/wide.tif": encoded(grey(70000, np.int32), "TIFF"),
    "dog/broken.png": "link",  # to nowhere
    "dog/pipe.png": "pipe",  # to open it would wait for ever
    "dog/text.jpg": b"this is not a picture",
    "dog/truncated.jpg": TRUNCATED[: len(TRUNCATED) // 2],
}
IGNORED = ["cat/._x.png", "cat/.DS_Store", "__MACOSX/cat/a.png", ".ipynb_checkpoints/a.png", "dog/.cache/a.png"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "photos"
    pictures(folder, *IGNORED, "stray.png", "cat/a.gif", "cat/b.avif", "dog/notes.txt")
    (folder / "eel").mkdir()  # a class, though without an image
    for name, data in {**{name: data for name, (data, _) in READABLE.items()}, **DAMAGED}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, bytes):
            (folder / name).write_bytes(data)
        else:
            os.mkfifo(folder / name) if data == "pipe" else os.symlink("nowhere", folder / name)
    half_transparent_palette().save(folder / "dog" / "palette.png", transparency=0)
    (folder / "dog" / "loop").symlink_to(folder)
    return folder


NAMES = sorted([*READABLE, *DAMAGED, "dog/palette.png"], key=lambda name: (name[:3], *os.path.split(name)))


@pytest.fixture(scope="module")
def prepared_photos(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "photos"
    run(photos, out, "--resolution", SIZE)
    return out


def test_every_picture_format_becomes_rgb(prepared_photos):
    rows = dict(zip(NAMES, stored_images(prepared_photos), strict=True))
    for name, (_, color) in READABLE.items():
        assert rows[name].shape == (SIZE, SIZE, 3) and rows[name].dtype == np.uint8
        tolerance = 2 if name.endswith("jpg") else 1  # JPEG rounds; so does blending
        assert np.abs(rows[name].astype(int) - color).max() <= tolerance, name
    assert (rows["dog/palette.png"][:, : SIZE // 2] == 255).all()
    assert (rows["dog/palette.png"][:, SIZE // 2 :] == (40, 50, 60)).all()


def test_what_cannot_be_read_is_named_counted_and_never_served(photos, prepared_photos, tmp_path, capsys, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **options: started.append(arguments))
    run(photos, tmp_path / "out", "--resolution", SIZE)
    printed, meta = capsys.readouterr().out, meta_of(tmp_path / "out")
    assert not started and [name for name, problem in meta["damaged"] if problem] == list(DAMAGED)
    assert meta["count"] == len(NAMES) and meta["class_names"] == ["cat", "dog", "eel"]
    good = [i for i, name in enumerate(NAMES) if name not in DAMAGED]
    assert all(f"left out: {name} (" in printed for name in DAMAGED)
    assert f"{len(good)} images, {len(DAMAGED)} damaged and left out, 3 classes" in printed
    assert "in no class folder: 1 (stray.png)" in printed and "1 of 3 classes have no image" in printed
    assert ".webp: 3 (cat/a.gif, cat/b.avif, dog/notes.txt)" in printed
    labels = np.load(prepared_photos / "labels.npy")
    assert [NAMES[i] for i in np.flatnonzero(labels == -1)] == list(DAMAGED)
    data = PreparedImages(prepared_photos)
    batch = data.__getitems__(range(len(data)))
    assert (batch["images"].permute(0, 2, 3, 1).numpy() == stored_images(prepared_photos)[good]).all()
    assert batch["labels"].tolist() == [int(NAMES[i].startswith("dog")) for i in good] == data.labels.tolist()
    assert data.num_classes == 3


def test_rows_are_in_the_order_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    root = pictures(tmp_path / "root", "b/z.png", "b/a/x.png", "b/a-b/x.png", "b/a/b/x.png", "B/c.png", "a b/c.png")
    expected = [(os.path.relpath(file, root), label) for file, label in ImageFolder(root).samples]
    source = sources.open_source(prepare.Options(str(root), ""))
    assert list(zip(source.names, source.labels)) == expected and source.class_names == ImageFolder(root).classes


def test_names_that_are_not_utf8(tmp_path, capsys):
    for name in (b"caf\xe9", b"tea"):
        os.makedirs(os.path.join(os.fsencode(tmp_path), b"root", name))
    pictures(tmp_path / "root" / "tea", "a.png")
    for name in (b"caf\xe9/\xff.png", b"caf\xe9/\xfe.txt"):
        open(os.path.join(os.fsencode(tmp_path), b"root", name), "wb").close()
    run(tmp_path / "root", tmp_path / "out", "--resolution", 8)
    printed = capsys.readouterr().out
    assert r"left out: caf\xe9/\xff.png" in printed and r"(caf\xe9/\xfe.txt)" in printed
    assert "1 of 2 classes have no image" in printed


TURNED = {  # EXIF 2.3, tag 274: how the stored picture becomes upright
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x.transpose(1, 0, 2), 2),
    8: np.rot90,
}


def test_exif_turns_photographs_on_request(tmp_path):
    pixels = noise_image(8, 8)
    (tmp_path / "root" / "cat").mkdir(parents=True)
    for number in TURNED:
        exif = Image.Exif()
        exif[274] = number
        Image.fromarray(pixels).save(tmp_path / "root" / "cat" / f"{number}.png", exif=exif)
    run(tmp_path / "root", tmp_path / "stored", "--resolution", 8)
    assert (stored_images(tmp_path / "stored") == pixels).all()
    run(tmp_path / "root", tmp_path / "upright", "--resolution", 8, "--exif")
    assert (stored_images(tmp_path / "upright") == np.stack([turn(pixels) for turn in TURNED.values()])).all()
    assert "exif: False -> True" in refusal(tmp_path / "root", tmp_path / "stored", "--resolution", 8, "--exif")


def test_prepared_digits_are_the_embedded_ones(digits):
    from sklearn.datasets import load_digits

    expected, labels = np.round(load_digits().images * 255 / 16), load_digits().target
    data = PreparedImages(digits)
    assert (data.resolution, data.num_classes, len(data)) == (8, 10, 1797)
    images = data.__getitems__(range(1797))["images"]
    assert images.shape == (1797, 3, 8, 8) and images.dtype == torch.uint8
    assert (images.numpy() == expected[:, None]).all() and (data.labels.numpy() == labels).all()


# ---- ADM's crop ----


def resampled(pixels, width, height, kernel):
    """Separable resampling with a kernel stretched when shrinking, to 8 bits after each pass, from its definition."""

    def matrix(size_in, size_out):
        scale = size_in / size_out
        distance = np.arange(size_in) + 0.5 - (np.arange(size_out)[:, None] + 0.5) * scale
        weights = kernel(distance / max(1, scale))
        return weights / weights.sum(1, keepdims=True)

    def levels(values):
        return np.floor(values.clip(0, 255) + 0.5)

    across = levels(np.einsum("xw,hwc->hxc", matrix(pixels.shape[1], width), pixels))
    return levels(np.einsum("yh,hxc->yxc", matrix(pixels.shape[0], height), across))


def box(d):
    return ((d > -0.5) & (d <= 0.5)).astype(float)


def keys_cubic(d, a=-0.5):
    d = np.abs(d)
    inner, outer = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d < 1, inner, np.where(d < 2, outer, 0.0))


def adm_crop(pixels, size):
    halvings = int(math.log2(max(1, min(pixels.shape[:2]) // size)))
    for _ in range(halvings):
        pixels = resampled(pixels, pixels.shape[1] // 2, pixels.shape[0] // 2, box)
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    pixels = resampled(pixels, round(width * scale), round(height * scale), keys_cubic)
    top, left = math.floor((pixels.shape[0] - size) / 2), math.floor((pixels.shape[1] - size) / 2)
    return pixels[top : top + size, left : left + size]


# Powers of two, one side longer, odd sizes and odd margins, one pass of bicubic, enlarging, extreme shapes.
SIDES = "64x64 128x32 33x47 50x37 131x70 31x29 21x16 16x23 5x7 40x21 100x3 1x1 16x16"


@pytest.mark.parametrize("width, height", [[*map(int, sides.split("x"))] for sides in SIDES.split()])
def test_crop_matches_its_definition(width, height):
    pixels = noise_image(width, height, seed=width)
    got = np.asarray(sources.center_crop(Image.fromarray(pixels), SIZE)).astype(int)
    assert got.shape == (SIZE, SIZE, 3)
    # One level: Pillow's weights have a finite number of bits.
    assert np.abs(got - adm_crop(pixels.astype(float), SIZE)).max() <= 1
    assert (np.asarray(sources.center_crop(flat((3, 200, 77), (width, height)), SIZE)) == (3, 200, 77)).all()


# ---- parquet ----


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a parquet file from columns; the library's cache stays inside the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(name="table.parquet", **columns):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path

    return write


def cells(*reds):
    """One struct<bytes, path> per red level, as the hub stores images."""
    return [{"bytes": encoded(flat((red, 0, 0))), "path": None} for red in reds]


FOUR = cells(10, 20, 30, 40)


def test_parquet_with_declared_features(tmp_path, table):
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog", "owl"])})
    rows = {"photo": FOUR, "kind": [0, 1, 1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "photos.parquet")
    run(tmp_path / "photos.parquet", tmp_path / "out", "--resolution", 8)
    assert reds(tmp_path / "out") == [10, 20, 30, 40]
    assert meta_of(tmp_path / "out")["class_names"] == ["cat", "dog", "owl"]  # also the one that has no image
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [0, 1, 1, 0]
    # -1 is how the hub marks the rows of a test split whose labels are withheld.
    datasets.Dataset.from_dict({**rows, "kind": [0, -1, 1, 0]}, features=features).to_parquet(tmp_path / "test.parquet")
    assert "rows without a label" in refusal(tmp_path / "test.parquet", tmp_path / "none", "--resolution", 8)


BARE = [encoded(flat(100, mode="L")), encoded(flat((200, 0, 0, 51), mode="RGBA"))]


@pytest.mark.parametrize(
    "columns, class_names, levels",
    [
        ({"image": FOUR, "label": [7, 3, 3, 7]}, ["3", "7"], [10, 20, 30, 40]),
        ({"image": FOUR, "labels": ["tree", "sea", "sea", "tree"]}, ["sea", "tree"], [10, 20, 30, 40]),
        ({"img": BARE, "label": [True, False]}, ["False", "True"], [100, 244]),
    ],
)
def test_parquet_with_plain_columns_numbers_the_classes(tmp_path, table, columns, class_names, levels):
    run(table(**columns), tmp_path / "out", "--resolution", 8)
    assert reds(tmp_path / "out") == levels and meta_of(tmp_path / "out")["class_names"] == class_names
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [1, 0, 0, 1][: len(levels)]


def test_parquet_columns_that_are_not_certain_are_asked_for(tmp_path, table):
    path, out = table(picture=FOUR, kind=[0, 1, 1, 0]), tmp_path / "out"
    for given, words in (
        ([], ("--image-column", "'picture'", "'kind'")),
        (["--image-column", "picture"], ("--label-column", "'picture'", "'kind'")),
        (["--image-column", "nonesuch", "--label-column", "kind"], ("'nonesuch'", "'picture'")),
    ):
        message = refusal(path, out, "--resolution", 8, *given)
        assert all(word in message for word in words) and not out.exists()
    run(path, out, "--resolution", 8, "--image-column", "picture", "--label-column", "kind")
    assert reds(out) == [10, 20, 30, 40]
    path = table("two.parquet", image=FOUR, img=FOUR[::-1], label=[0, 1, 1, 0])
    message = refusal(path, tmp_path / "two", "--resolution", 8)
    assert "--image-column" in message and "'image'" in message and "'img'" in message
    run(path, tmp_path / "two", "--resolution", 8, "--image-column", "img")
    assert reds(tmp_path / "two") == [40, 30, 20, 10]


def test_damaged_rows_are_named_the_same_way_in_every_run(tmp_path, table, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **options: started.append(arguments))
    bad = [None, {"bytes": b"junk", "path": None}, {"bytes": None, "path": None}]
    bad += [{"bytes": encoded(flat((1, 2, 3)), "EPS"), "path": "a.jpg"}, {"bytes": None, "path": "/dev/zero"}]
    path = table(image=[FOUR[0], *bad, FOUR[3]], label=[0, 1, 1, 0, 1, 0, 1])
    for out in ("first", "second"):
        run(path, tmp_path / out, "--resolution", 8)
    damaged = meta_of(tmp_path / "first")["damaged"]
    assert [name for name, _ in damaged] == [f"row {i}" for i in range(1, 6)] and not started
    assert "there is no image" in damaged[0][1] and "there is no image" in damaged[2][1]
    assert np.load(tmp_path / "first" / "labels.npy").tolist() == [0, -1, -1, -1, -1, -1, 1]
    assert content(tmp_path / "first") == content(tmp_path / "second")


# A missing label, a mark for one, or one that is not a single value: none may pass in silence for a class.
NO_LABELS = {"None": [0, None, 1], "-1": [0, -1, 1], "NaN": [0.0, math.nan, 1.0], "blank": ["sea", " \n", "tree"]}
NO_LABELS |= {"lists": [[0, 1], [1, 1], [1, 0]]}


@pytest.mark.parametrize("kind", NO_LABELS)
def test_labels_that_are_no_classes_are_refused(tmp_path, table, kind):
    message = refusal(table(image=FOUR[:3], label=NO_LABELS[kind]), tmp_path / "out", "--resolution", 8)
    assert "'label' has" in message and "rows without a label" in message


# ---- splits, and folders that hold more than one thing ----


LAYOUTS = [
    "train.parquet test.parquet",
    "b.parquet a.parquet c/a.parquet",
    "train/1.parquet val/0.parquet train/0.parquet",
    "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet data/train2-00000-of-00001.parquet",
    "data/foo-00000-of-00001.parquet data/bar-00000-of-00001.parquet other.parquet",
    "my_train_set.parquet my-dev.parquet x/evaluation.1.parquet other.parquet",
    "plain/training-0.parquet plain/testing3.parquet",
    "train/x.parquet y.parquet test.parquet",
    "default/test/0000.parquet default/validation/0000.parquet",
    "latest.parquet contest.parquet trained.parquet",
]


@pytest.mark.parametrize("names", LAYOUTS)
def test_splits_are_those_of_datasets(tmp_path, names):
    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = DataFilesDict.from_patterns(get_data_patterns(str(tmp_path)), base_path=str(tmp_path))
    found = sources.splits_among(list(sources.files_below(str(tmp_path))))
    assert found == {
        str(split): sorted(os.path.relpath(file, tmp_path) for file in files) for split, files in expected.items()
    }


def test_the_split_of_a_folder_of_parquet_files(tmp_path, table, capsys):
    folder, out = tmp_path / "some [1]", tmp_path / "out"
    table("some [1]/train-b.parquet", image=FOUR[2:], label=[1, 1])
    table("some [1]/train-a.parquet", image=FOUR[:2], label=[0, 0])
    test = table("some [1]/Test.parquet", image=cells(50, 60), label=[0, 1])
    table("some [1]/.hidden/train.parquet", image=cells(70), label=[1])
    run(folder, out, "--resolution", 8)
    assert reds(out) == [10, 20, 30, 40] and np.load(out / "labels.npy").tolist() == [0, 0, 1, 1]
    assert "split 'train' of train, test" in capsys.readouterr().out
    for name, given, expected in (
        ("test", [folder, "--split", "test"], [50, 60]),
        ("part", [folder, "--split", "train[1:3]"], [20, 30]),
        ("file", [test], [50, 60]),
        ("named", [test, "--split", "test"], [50, 60]),
    ):
        run(given[0], tmp_path / name, "--resolution", 8, *given[1:])
        assert reds(tmp_path / name) == expected
    message = refusal(folder, tmp_path / "none", "--resolution", 8, "--split", "validation")
    assert "split = 'validation'" in message and "holds train, test" in message
    (folder / "odd.parquet").touch()
    run(folder, out, "--resolution", 8)
    assert "left out, in no split: 1 (odd.parquet)" in capsys.readouterr().out


def test_sources_that_cannot_be_used(tmp_path, table):
    def refused(source, *arguments, resolution=8):
        message = refusal(source, tmp_path / "out", "--resolution", resolution, *arguments)
        assert not (tmp_path / "out").exists()
        return message

    assert "missing.parquet" in refused(tmp_path / "missing.parquet")
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    assert "junk.parquet" in (message := refused(tmp_path / "junk.parquet")) and "no existing path" not in message
    (tmp_path / "notes.txt").write_text("text")
    assert "neither a folder nor a parquet file" in refused(tmp_path / "notes.txt")
    (tmp_path / "bare" / ".hidden").mkdir(parents=True)
    assert "no subfolder per class" in refused(tmp_path / "bare")
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    assert "has no images" in refused(tmp_path / "hollow")
    assert "'someone/some-images' is no existing path, and no dataset" in refused("someone/some-images")

    both = pictures(tmp_path / "both", "cat/a.png")
    table("both/stray.parquet", image=FOUR, label=[0, 1, 1, 0])
    message = refused(both)
    assert "cat/a.png" in message and "stray.parquet" in message
    splits = pictures(tmp_path / "splits", "train/cat/a.png", "val/cat/a.png")
    assert "holds splits, not classes" in (message := refused(splits)) and "train, val" in message
    assert "split = 'test'" in refused("digits", "--split", "test")

    # Without one, digits are 8 x 8; zero is not "without one".
    message = refused("digits", resolution=0)
    assert "resolution = 0" in message and "--resolution 256" in message
    assert "resolution = None" in refusal(splits / "train", tmp_path / "out")
    assert "limit = 0" in refused("digits", "--limit", 0) and "batch_size = 0" in refused("digits", "--batch-size", 0)


def test_source_without_one_readable_image_is_refused(tmp_path):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "a.png").write_bytes(b"junk")
    assert "none of the 1 images" in refusal(tmp_path / "photos", tmp_path / "out", "--resolution", 8)
    assert not (tmp_path / "out" / "meta.json").exists()


@pytest.mark.parametrize("limit, chosen", [(7, [0, 256, 513, 770, 1026, 1283, 1540]), (5000, range(1797))])
def test_limit_spreads_over_the_source(tmp_path, digits, limit, chosen):
    run("digits", tmp_path / "out", "--limit", limit)  # floor(i * 1797 / 7)
    assert (stored_images(tmp_path / "out") == stored_images(digits)[list(chosen)]).all()
    assert (np.load(tmp_path / "out" / "labels.npy") == np.load(digits / "labels.npy")[list(chosen)]).all()
    assert len(meta_of(tmp_path / "out")["class_names"]) == 10


# ---- reading ----


def stream(*arguments, **options):
    return [item for batch in ShuffledBatches(*arguments, **options) for item in batch]


def test_epochs_are_permutations_that_follow_from_the_seed_alone():
    order = stream(50, 10, seed=3, start=0, stop=10)
    assert sorted(order[:50]) == sorted(order[50:]) == list(range(50)) != order[:50]
    assert order == stream(50, 10, seed=3, start=0, stop=10)
    assert order == stream(50, 4, seed=3, start=0, stop=25)  # not from the batch size
    spanning = stream(13, 8, seed=1, start=0, stop=13)  # 104 entries, exactly 8 epochs: nothing is dropped
    assert collections.Counter(spanning) == {item: 8 for item in range(13)}
    # Nor may the next seed's first epoch be this seed's second one.
    assert len({tuple(epoch) for epoch in (order[:50], order[50:], stream(50, 10, seed=4, start=0, stop=5))}) == 3


# 13 items in eights: every second batch or so reaches into the next epoch. 5 in twelves: one batch spans three.
@pytest.mark.parametrize("num_items, batch_size", [(13, 8), (5, 12), (16, 8)])
def test_steps_and_shares_are_parts_of_one_stream(num_items, batch_size):
    whole = list(ShuffledBatches(num_items, batch_size, seed=1, start=0, stop=10))
    assert all(type(item) is int for batch in whole for item in batch)
    for world in (1, 2, 4):
        for start in (0, 1, 2, 5, 9):
            shares = [ShuffledBatches(num_items, batch_size, 1, start, 10, rank, world) for rank in range(world)]
            assert {len(share) for share in shares} == {10 - start}
            parts = list(zip(*shares))
            assert [sum(part, []) for part in parts] == whole[start:]
            assert {len(share) for part in parts for share in part} == {batch_size // world}


@pytest.mark.parametrize("mirror", [False, True])
def test_held_out_images_are_left_out_of_training(digits, mirror):
    """Each image is in one of the parts, and a mirrored one where it is itself."""
    whole = PreparedImages(digits)
    images = whole.__getitems__(range(len(whole)))["images"]
    for count in (1, 7, len(whole) - 1):
        training = PreparedImages(digits, mirror=mirror, held_out=count)
        held_out = PreparedImages(digits, held_out=count, training=False)
        assert len(held_out) == count and len(training) == (len(whole) - count) * (1 + mirror)
        assert sorted([*training.rows[: len(whole) - count], *held_out.rows]) == list(whole.rows)
        assert set(training.rows % training.count).isdisjoint(held_out.rows)
        assert torch.equal(held_out.__getitems__(range(count))["images"], images[held_out.rows])
        assert np.diff(held_out.rows).max(initial=0) <= -(-len(whole) // count)
    for part in (True, False):
        with pytest.raises(ValueError, match=f"held_out = {len(whole)}: .* has {len(whole)} images"):
            PreparedImages(digits, held_out=len(whole), training=part)


def test_missing_folder_and_missing_features_say_what_to_run(tmp_path, digits):
    with pytest.raises(ValueError, match="nowhere.*is not a prepared folder.*python -m dataset.prepare"):
        PreparedImages(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no finished features 0123456789ab.*--encoder"):
        PreparedImages(digits, features=["0123456789ab"])


def test_content_tells_sources_apart(digits, prepared_photos, tmp_path):
    run("digits", tmp_path / "some", "--limit", 3)
    run("digits", tmp_path / "same", "--limit", 3)
    folders = [digits, prepared_photos, tmp_path / "some", tmp_path / "same"]
    contents = [PreparedImages(folder).content for folder in folders]
    assert len(set(contents)) == 3 and contents[2] == contents[3]


def test_reader_process_serves_the_same_batches(digits):
    (fingerprint,) = os.listdir(digits / "features")
    data = PreparedImages(digits, features=[fingerprint])
    sampler = ShuffledBatches(len(data), 6, seed=0, start=298, stop=302)  # crosses the end of an epoch
    here, there = list(load_batches(data, sampler)), list(load_batches(data, sampler, num_workers=1))
    assert len(here) == len(there) == 4
    for a, b, items in zip(here, there, sampler):
        assert a.keys() == b.keys() == {"images", "labels", "tokens_0"}
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert a["labels"].tolist() == data.labels[items].tolist()
    assert list(load_batches(data, [], num_workers=1)) == []


class Numbers:
    """Batches of 64 KB; `act(item)` is called in the process that reads."""

    def __init__(self, act=lambda item: None):
        self.act = act

    def __getitems__(self, items):
        self.act(items[0])
        return torch.full((1 << 14,), float(items[0]))


BATCHES = [[i] for i in range(8)]


@pytest.fixture
def quick(monkeypatch):
    """PyTorch looks after its readers every 0.2 seconds in place of 5."""
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


def signal_itself(number):
    return lambda item: os.kill(os.getpid(), number) if item == 3 else None


def test_reader_that_is_killed_is_an_error_by_name(quick):
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(OSError, match="/dev/shm have room.*--num-workers 1"):
        for _ in load_batches(Numbers(signal_itself(signal.SIGKILL)), BATCHES, num_workers=1):
            # torch's own handler would raise here, of all places, as any child process ends.
            subprocess.run(["true"], check=True)
    assert signal.getsignal(signal.SIGCHLD) in (handler, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_readers_leave_signals_to_the_process_that_reads(number):
    before = signal.signal(number, signal.SIG_DFL)  # a shell's background jobs ignore SIGINT
    try:
        read = list(load_batches(Numbers(signal_itself(number)), BATCHES, num_workers=1))
    finally:
        signal.signal(number, before)
    assert [int(batch[0]) for batch in read] == list(range(8))


def test_error_of_a_reader_stays_what_it_is():
    def fail(item):
        raise OSError("image 3 has changed")

    for num_workers in (0, 1):
        with pytest.raises(OSError, match="image 3 has changed") as raised:
            list(load_batches(Numbers(fail), BATCHES, num_workers))
        assert "/dev/shm" not in str(raised.value)


def test_readers_do_not_outlive_the_program():
    """Also where the program ends by an error, in the middle of reading."""
    program = """
import torch
from dataset.prepared import load_batches
class Zeros:
    def __getitems__(self, items):
        return torch.zeros(1)
batches = load_batches(Zeros(), [[0]] * 8, num_workers=1)
print(next(batches).item(), flush=True)
1 / 0
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.stdout == "0.0\n" and "ZeroDivisionError" in ended.stderr


@pytest.mark.parametrize("size", ["4k", "64k", "150k"])  # too little for a semaphore, a batch, and several of them
def test_full_shared_memory_is_an_error_by_name(size, quick):
    def read():
        return len([batch for batch in load_batches(Numbers(), BATCHES, num_workers=1) if not kept.append(batch)])

    kept = []  # so that their memory stays in use
    message = on_small_disk("/dev/shm", f"size={size}", read)
    assert "OSError" in str(message) and "/dev/shm have room" in message and "--num-workers 1" in message

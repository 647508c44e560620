"""Preparing images and reading them back.

Every image is drawn here. Checked are the conversion of each picture format, ADM's crop against a resampler written out
below, damaged files, parquet tables, interrupted and repeated runs, refusals, and the order of the batches.
"""

import collections
import io
import json
import math
import os
import threading

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dataset import prepare
from dataset.digits import load_digits
from dataset.prepared import PreparedImages, ShuffledBatches
from models.encoders import FrozenEncoder

SIZE = 16


def run(source, out, *arguments):
    prepare.main([str(source), "--out", str(out), *map(str, arguments)])


def refusal(source, out, *arguments):
    """The message with which the command ends."""
    with pytest.raises(SystemExit) as raised:
        run(source, out, *arguments)
    assert str(raised.value.code).startswith("error: ")
    return str(raised.value.code)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text())


def stored_images(folder):
    """All images of a prepared folder (N, H, W, 3), the damaged ones as zeros: their bytes cut and decoded here."""
    meta, sizes = meta_of(folder), np.load(folder / "sizes.npy")
    assert len(sizes) == meta["count"]
    files = {path: path.read_bytes() for path in sorted((folder / "images").glob("*.bin"))}
    data, images = b"".join(files.values()), []
    for end, size in zip(sizes.cumsum(), sizes):
        image = Image.open(io.BytesIO(data[end - size : end])) if size else Image.new("RGB", [meta["resolution"]] * 2)
        images.append(np.asarray(image))
    return np.stack(images)


def flat(color, size=(SIZE, SIZE), mode="RGB"):
    return Image.new(mode, size, color)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise_image(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- a class folder with one picture of each kind ----


def half_transparent_palette():
    """Left half transparent, right half the palette's (40, 50, 60)."""
    image = Image.new("P", (SIZE, SIZE), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.paste(0, (0, 0, SIZE // 2, SIZE))
    return image


# name: (how it is saved, expected RGB). Over white, colour c of opacity a becomes a c + (1 - a) 255.
READABLE = {
    "cat/bilevel.png": (lambda path: flat(1, (20, 30), "1").save(path), (255, 255, 255)),
    "cat/cmyk.jpg": (lambda path: flat((0, 255, 255, 0), (50, 40), "CMYK").save(path, quality=100), (255, 0, 0)),
    "cat/grey.png": (lambda path: flat(77, (40, 30), "L").save(path), (77, 77, 77)),
    "cat/grey_alpha.png": (lambda path: flat((200, 51), (40, 30), "LA").save(path), (244, 244, 244)),
    "cat/large.jpg": (lambda path: flat((10, 120, 230), (90, 70)).save(path, quality=100), (10, 120, 230)),
    "dog/alpha.png": (lambda path: flat((200, 0, 100, 51), (33, 33), "RGBA").save(path), (244, 204, 224)),
    "dog/color_key.png": (lambda path: flat((9, 8, 7), (16, 16)).save(path, transparency=(9, 8, 7)), (255, 255, 255)),
    "dog/sixteen_bit.png": (
        lambda path: Image.fromarray(np.full((20, 17), 0xABCD, np.uint16)).save(path),
        (0xAB, 0xAB, 0xAB),
    ),
    "dog/small.png": (lambda path: flat((1, 2, 3), (5, 7)).save(path), (1, 2, 3)),
}
DAMAGED = ["cat/empty.png", "dog/text.jpg", "dog/truncated.jpg"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "photos"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
    for name, (save, _) in READABLE.items():
        save(folder / name)
    half_transparent_palette().save(folder / "dog" / "palette.png", transparency=0)
    (folder / "cat" / "empty.png").write_bytes(b"")
    (folder / "dog" / "text.jpg").write_text("this is not a picture")
    whole = encoded(Image.fromarray(noise_image(60, 60)), "JPEG")
    (folder / "dog" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "dog" / "notes.txt").write_text("not even named like a picture")
    return folder


@pytest.fixture(scope="module")
def prepared_photos(photos, tmp_path_factory, encoder_folder):
    out = tmp_path_factory.mktemp("prepared") / "photos"
    run(photos, out, "--resolution", SIZE, "--encoder", encoder_folder, "--token-grid", 4)
    return out


def names_in(photos):
    """Relative paths in the order of the rows: classes by name, files by name."""
    return sorted(str(path.relative_to(photos)) for path in photos.rglob("*.[pj][np]g"))


@pytest.mark.parametrize("name", READABLE)
def test_every_picture_format_becomes_rgb(photos, prepared_photos, name):
    row = stored_images(prepared_photos)[names_in(photos).index(name)]
    assert row.shape == (SIZE, SIZE, 3) and row.dtype == np.uint8
    tolerance = 2 if name.endswith("jpg") else 1  # JPEG rounds; so does blending
    assert np.abs(row.astype(int) - READABLE[name][1]).max() <= tolerance


def test_transparent_palette_entries_become_white(photos, prepared_photos):
    row = stored_images(prepared_photos)[names_in(photos).index("dog/palette.png")]
    assert (row[:, : SIZE // 2] == 255).all()
    assert (row[:, SIZE // 2 :] == (40, 50, 60)).all()


def test_damaged_files_are_named_and_counted(photos, tmp_path, capsys):
    run(photos, tmp_path / "out", "--resolution", SIZE)
    printed = capsys.readouterr().out
    meta = meta_of(tmp_path / "out")
    assert [name for name, _ in meta["damaged"]] == DAMAGED
    assert all(problem for _, problem in meta["damaged"])
    assert meta["count"] == len(READABLE) + 1 + len(DAMAGED)
    for name in DAMAGED:
        assert f"left out: {name} (" in printed
    assert f"{len(READABLE) + 1} images, {len(DAMAGED)} damaged and left out, 2 classes" in printed


def test_damaged_files_are_never_served(photos, prepared_photos):
    names = names_in(photos)
    good = [i for i, name in enumerate(names) if name not in DAMAGED]
    labels = np.load(prepared_photos / "labels.npy")
    assert [names[i] for i in np.flatnonzero(labels == -1)] == DAMAGED

    data = PreparedImages(prepared_photos)
    assert len(data) == len(good)
    batch = data.__getitems__(range(len(data)))
    stored = stored_images(prepared_photos)[good]
    assert (batch["images"].permute(0, 2, 3, 1).numpy() == stored).all()
    assert batch["labels"].tolist() == [int(names[i].startswith("dog")) for i in good] == data.labels.tolist()


def test_tokens_stay_beside_their_images_where_some_are_damaged(prepared_photos, encoder_folder):
    encoder = FrozenEncoder(str(encoder_folder), 4)
    batch = PreparedImages(prepared_photos, features=[encoder.fingerprint]).__getitems__([7, 2, 9])
    torch.testing.assert_close(batch["tokens_0"].float(), encoder(batch["images"]), rtol=2e-3, atol=2e-4)


def test_source_without_one_readable_image_is_refused(tmp_path):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "a.png").write_bytes(b"junk")
    assert "none of the 1 images" in refusal(tmp_path / "photos", tmp_path / "out", "--resolution", 8)
    assert not (tmp_path / "out" / "meta.json").exists()


def test_embedded_digits():
    images, labels = load_digits()
    assert len(images) == len(labels) == 1797
    assert sorted(set(labels.tolist())) == list(range(10))
    assert {image.mode for image in images} == {"RGB"} and {image.size for image in images} == {(8, 8)}
    assert max(np.asarray(image).max() for image in images) == 255  # 16 grey levels up to full white


def test_prepared_digits_are_the_embedded_ones(digits):
    images, labels = load_digits()
    data = PreparedImages(digits)
    assert (data.resolution, data.num_classes, len(data)) == (8, 10, 1797)
    batch = data.__getitems__([0, 1000, 1796])
    assert batch["images"].shape == (3, 3, 8, 8) and batch["images"].dtype == torch.uint8
    for served, i in zip(batch["images"], (0, 1000, 1796)):
        assert (served.permute(1, 2, 0).numpy() == np.asarray(images[i])).all()
    assert (data.labels.numpy() == labels).all()


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
@pytest.mark.parametrize(
    "width, height",
    [
        (64, 64),
        (128, 32),
        (33, 47),
        (50, 37),
        (131, 70),
        (31, 29),
        (21, 16),
        (16, 23),
        (5, 7),
        (40, 21),
        (100, 3),
        (1, 1),
        (16, 16),
    ],
)
def test_crop_matches_its_definition(width, height):
    pixels = noise_image(width, height, seed=width)
    got = np.asarray(prepare.center_crop(Image.fromarray(pixels), SIZE)).astype(int)
    assert got.shape == (SIZE, SIZE, 3)
    # One level: Pillow's weights have a finite number of bits.
    assert np.abs(got - adm_crop(pixels.astype(float), SIZE)).max() <= 1


def test_crop_of_a_power_of_two_is_the_box_average():
    pixels = noise_image(8 * SIZE, 8 * SIZE)
    average = pixels.reshape(SIZE, 8, SIZE, 8, 3).mean((1, 3))
    got = np.asarray(prepare.center_crop(Image.fromarray(pixels), SIZE))
    assert np.abs(got - average).max() <= 3  # three halvings, each rounded twice


@pytest.mark.parametrize("width, first", [(16, 0), (17, 0), (18, 1), (21, 2), (40, 12)])
def test_crop_takes_the_middle_and_the_left_one_of_two(width, first):
    columns = np.broadcast_to(np.arange(width, dtype=np.uint8)[:, None], (SIZE, width, 3))
    got = np.asarray(prepare.center_crop(Image.fromarray(np.ascontiguousarray(columns)), SIZE))
    assert (got == np.arange(first, first + SIZE)[:, None]).all()
    turned = np.ascontiguousarray(columns.transpose(1, 0, 2))
    assert (np.asarray(prepare.center_crop(Image.fromarray(turned), SIZE)) == got.transpose(1, 0, 2)).all()


@pytest.mark.parametrize("size", [(3, 5), (16, 40), (37, 33), (257, 64)])
def test_crop_of_a_flat_image_is_flat(size):
    assert (np.asarray(prepare.center_crop(flat((3, 200, 77), size), SIZE)) == (3, 200, 77)).all()


# ---- parquet ----


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a parquet file from columns; the library's cache stays inside the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(name="table.parquet", **columns):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path

    return write


def cells(*colors):
    """One struct<bytes, path> per colour, as the hub stores images."""
    return [{"bytes": encoded(flat(color)), "path": None} for color in colors]


COLORS = [(10, 0, 0), (20, 0, 0), (30, 0, 0), (40, 0, 0)]


def reds(folder):
    """The images' red levels, which tell them apart."""
    return stored_images(folder)[:, 0, 0, 0].tolist()


def test_parquet_with_declared_features(tmp_path, table):
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog", "owl"])})
    rows = {"photo": cells(*COLORS), "kind": [0, 1, 1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "photos.parquet")
    run(tmp_path / "photos.parquet", tmp_path / "out", "--resolution", 8)
    assert reds(tmp_path / "out") == [10, 20, 30, 40]
    assert meta_of(tmp_path / "out")["class_names"] == ["cat", "dog", "owl"]  # also the one that has no image
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    "labels, class_names", [([7, 3, 3, 7], ["3", "7"]), (["tree", "sea", "sea", "tree"], ["sea", "tree"])]
)
def test_parquet_with_plain_columns_numbers_the_classes(tmp_path, table, labels, class_names):
    run(table(image=cells(*COLORS), label=labels), tmp_path / "out", "--resolution", 8)
    assert reds(tmp_path / "out") == [10, 20, 30, 40]
    assert meta_of(tmp_path / "out")["class_names"] == class_names
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [1, 0, 0, 1]


def test_parquet_with_bare_bytes(tmp_path, table):
    images = [encoded(flat(100, mode="L")), encoded(flat((200, 0, 0, 51), mode="RGBA"))]
    run(table(img=images, labels=[0, 1]), tmp_path / "out", "--resolution", 8)
    assert reds(tmp_path / "out") == [100, 244]


def test_folder_of_parquet_files_is_read_in_order_of_name(tmp_path, table):
    table("shards/b.parquet", image=cells(*COLORS[2:]), label=[1, 1])
    table("shards/a.parquet", image=cells(*COLORS[:2]), label=[0, 0])
    run(tmp_path / "shards", tmp_path / "out", "--resolution", 8)
    assert reds(tmp_path / "out") == [10, 20, 30, 40]
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [0, 0, 1, 1]


def test_parquet_column_names_are_asked_for(tmp_path, table):
    path = table(picture=cells(*COLORS), kind=[0, 1, 1, 0])
    message = refusal(path, tmp_path / "out", "--resolution", 8)
    assert "--image-column" in message and "'picture'" in message and "'kind'" in message
    message = refusal(path, tmp_path / "out", "--resolution", 8, "--image-column", "picture")
    assert "--label-column" in message and "'picture'" in message and "'kind'" in message
    message = refusal(path, tmp_path / "out", "--resolution", 8, "--image-column", "nonesuch", "--label-column", "kind")
    assert "'nonesuch'" in message and "'picture'" in message
    assert not (tmp_path / "out").exists()
    run(path, tmp_path / "out", "--resolution", 8, "--image-column", "picture", "--label-column", "kind")
    assert reds(tmp_path / "out") == [10, 20, 30, 40]


def test_two_columns_that_fit_must_be_told_apart(tmp_path, table):
    path = table(image=cells(*COLORS), img=cells(*COLORS[::-1]), label=[0, 1, 1, 0])
    message = refusal(path, tmp_path / "out", "--resolution", 8)
    assert "--image-column" in message and "'image'" in message and "'img'" in message
    run(path, tmp_path / "out", "--resolution", 8, "--image-column", "img")
    assert reds(tmp_path / "out") == [40, 30, 20, 10]


def test_damaged_rows_are_named_the_same_way_in_every_run(tmp_path, table):
    images = cells(*COLORS)
    images[2]["bytes"] = b"junk"
    path = table(image=images, label=[0, 1, 1, 0])
    for out in ("first", "second"):
        run(path, tmp_path / out, "--resolution", 8)
    assert [name for name, _ in meta_of(tmp_path / "first")["damaged"]] == ["row 2"]
    assert np.load(tmp_path / "first" / "labels.npy").tolist() == [0, 1, -1, 0]
    assert content(tmp_path / "first") == content(tmp_path / "second")


# A missing label, one that is not a single value: neither can be trained on, and neither may pass in silence.
@pytest.mark.parametrize("labels", [[0, None, 1, 0], ["sea", None, "tree", "sea"], [[0, 1], [1, 1], [1, 0], [0, 0]]])
def test_labels_that_are_no_classes_are_refused(tmp_path, table, labels):
    assert "'label'" in refusal(table(image=cells(*COLORS), label=labels), tmp_path / "out", "--resolution", 8)


def test_unlabelled_rows_of_a_class_label_are_refused(tmp_path, table):
    # -1 is how the hub marks the rows of a test split whose labels are withheld.
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": cells(*COLORS), "label": [0, -1, 1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
    assert "'label'" in refusal(tmp_path / "test.parquet", tmp_path / "out", "--resolution", 8)


def test_parquet_file_that_is_none_is_not_called_missing(tmp_path, table):
    (tmp_path / "photos.parquet").write_bytes(b"junk")
    message = refusal(tmp_path / "photos.parquet", tmp_path / "out", "--resolution", 8)
    assert "photos.parquet" in message and "no existing path" not in message


# ---- sources and settings that cannot be used ----


def test_unknown_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    assert "missing.parquet" in refusal(tmp_path / "missing.parquet", out, "--resolution", 8)
    (tmp_path / "notes.txt").write_text("text")
    assert "neither a folder nor a parquet file" in refusal(tmp_path / "notes.txt", out, "--resolution", 8)
    (tmp_path / "empty").mkdir()
    assert "no subfolder per class" in refusal(tmp_path / "empty", out, "--resolution", 8)
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    assert "has no images" in refusal(tmp_path / "hollow", out, "--resolution", 8)
    # Not a path: taken for a name on the hub, which the tests cannot reach.
    message = refusal("someone/some-images", out, "--resolution", 8)
    assert "'someone/some-images' is no existing path, and no dataset" in message
    assert not out.exists()


# Without one, digits are 8 x 8; zero is not "without one".
@pytest.mark.parametrize(
    "source, arguments",
    [
        ("photos", []),
        ("photos", ["--resolution", 0]),
        ("digits", ["--resolution", 0]),
        ("photos", ["--resolution", -8]),
        ("digits", ["--resolution", -8]),
    ],
)
def test_resolution_is_needed_and_positive(photos, tmp_path, source, arguments):
    message = refusal("digits" if source == "digits" else photos, tmp_path / "out", *arguments)
    assert f"resolution = {arguments[-1] if arguments else None}" in message and "--resolution 256" in message


@pytest.mark.parametrize("arguments, words", [(["--limit", 0], "limit = 0"), (["--batch-size", 0], "batch_size = 0")])
def test_other_numbers_out_of_range(photos, tmp_path, arguments, words):
    assert words in refusal(photos, tmp_path / "out", "--resolution", 8, *arguments)


def test_limit_spreads_over_the_source(tmp_path):
    images, labels = load_digits()
    run("digits", tmp_path / "out", "--limit", 7)
    chosen = [0, 256, 513, 770, 1026, 1283, 1540]  # floor(i * 1797 / 7)
    assert (stored_images(tmp_path / "out") == np.stack([np.asarray(images[i]) for i in chosen])).all()
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == labels[chosen].tolist()
    assert len(meta_of(tmp_path / "out")["class_names"]) == 10


def test_limit_above_the_source_takes_all(photos, tmp_path, prepared_photos):
    run(photos, tmp_path / "out", "--resolution", SIZE, "--limit", 1000)
    assert (stored_images(tmp_path / "out") == stored_images(prepared_photos)).all()


def test_disk_that_is_too_small(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(prepare.shutil, "disk_usage", lambda path: usage(10, 0, 1797 * 70))  # a PNG needs more
        message = refusal("digits", tmp_path / "out")
    assert "needs about" in message and "KiB" in message and "--limit" in message
    assert not (tmp_path / "out").exists()
    run("digits", tmp_path / "out")  # after making room
    assert len(PreparedImages(tmp_path / "out")) == 1797


def test_foreign_folder_is_refused_and_left_alone(tmp_path):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("chapter 1")
    assert "not made by this program" in refusal("digits", out)
    assert content(out) == {"thesis.txt": b"chapter 1"}


def test_out_that_is_a_file_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("chapter 1")
    assert "thesis.txt" in refusal("digits", tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "chapter 1"


@pytest.mark.parametrize(
    "arguments, change",
    [(["--resolution", 8], "resolution: 16 -> 8"), (["--resolution", SIZE, "--limit", 5], "count: 13 -> 5")],
)
def test_other_settings_are_refused(photos, prepared_photos, arguments, change):
    before = content(prepared_photos)
    message = refusal(photos, prepared_photos, *arguments)
    assert change in message and "other settings" in message
    assert content(prepared_photos) == before


def test_other_source_is_refused(photos, prepared_photos):
    before = content(prepared_photos)
    message = refusal("digits", prepared_photos, "--resolution", SIZE)
    assert f"source: '{photos}' -> 'digits'" in message
    assert content(prepared_photos) == before


def test_source_that_has_changed_is_refused(tmp_path):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    for name in "ab":
        flat((1, 2, 3)).save(tmp_path / "photos" / "cat" / f"{name}.png")
    run(tmp_path / "photos", tmp_path / "out", "--resolution", 8)
    os.rename(tmp_path / "photos" / "cat" / "b.png", tmp_path / "photos" / "cat" / "c.png")
    assert "listing: " in refusal(tmp_path / "photos", tmp_path / "out", "--resolution", 8)


def test_finished_folder_is_reused(photos, prepared_photos, encoder_folder, capsys, monkeypatch):
    def never(*arguments):
        raise AssertionError("an image was read or encoded again")

    before = content(prepared_photos)
    monkeypatch.setattr(prepare, "center_crop", never)
    monkeypatch.setattr(FrozenEncoder, "forward", never)
    run(photos, prepared_photos, "--resolution", SIZE, "--encoder", encoder_folder, "--token-grid", 4)
    printed = capsys.readouterr().out
    assert f"{prepared_photos}: images already there" in printed and "tokens already there" in printed
    assert content(prepared_photos) == before


# ---- interrupted runs ----


class Interrupt:
    """Calls through to a function, but raises KeyboardInterrupt at call number `at` (from 0); None: never."""

    def __init__(self, function, at):
        self.function, self.at, self.calls, self.lock = function, at, 0, threading.Lock()

    def __call__(self, *arguments, **options):
        with self.lock:  # images are read by several threads
            self.calls += 1
            stop = self.calls - 1 == self.at
        if stop:
            raise KeyboardInterrupt
        return self.function(*arguments, **options)

    def __get__(self, instance, owner):
        """So that it can stand for a method."""
        return lambda *arguments: self(instance, *arguments)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 4)


@pytest.fixture
def twelve(tmp_path):
    """Twelve images, three chunks of 4; the third image is damaged, so that its record must survive."""
    folder = tmp_path / "twelve"
    for i in range(12):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise_image(20, 20 + i, seed=i)).save(folder / "ab"[i % 2] / f"{i:02}.png")
    (folder / "a" / "04.png").write_bytes(b"junk")
    return folder


def interrupted(patch, owner, name, at, source, out, *arguments):
    """Runs the command until that call of `owner.name`, and checks that it was stopped there, unfinished."""
    patch.setattr(prepare, "estimate", lambda stages, folder: None)  # which reads some images first
    patch.setattr(owner, name, Interrupt(getattr(owner, name), at))
    with pytest.raises(SystemExit, match="the same command again"):
        run(source, out, *arguments)
    assert not (out / "meta.json").exists()


@pytest.mark.parametrize("image", [0, 5, 10])  # in the first, a middle and the last chunk
def test_interrupted_images_end_up_the_same(twelve, tmp_path, monkeypatch, small_chunks, image):
    run(twelve, tmp_path / "whole", "--resolution", 8)
    with monkeypatch.context() as patch:
        interrupted(patch, prepare, "center_crop", image, twelve, tmp_path / "parts", "--resolution", 8)
    with pytest.raises(ValueError, match="not finished.*python -m dataset.prepare"):
        PreparedImages(tmp_path / "parts")
    counted = Interrupt(prepare.center_crop, None)
    monkeypatch.setattr(prepare, "center_crop", counted)
    monkeypatch.setattr(prepare, "estimate", lambda stages, folder: None)
    run(twelve, tmp_path / "parts", "--resolution", 8)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert set(content(tmp_path / "whole")) >= {"images/00002.bin", "sizes.npy", "labels.npy", "meta.json"}
    # 11 of the 12 can be read, 3 of them in the first chunk: finished chunks are not read again.
    assert counted.calls == {0: 11, 5: 8, 10: 4}[image]


# Every file that is put in place at once: settings.json, images and record of three chunks, and meta.json.
@pytest.mark.parametrize("file", range(8))
def test_interruption_before_any_record_is_in_place(twelve, tmp_path, monkeypatch, small_chunks, file):
    run(twelve, tmp_path / "whole", "--resolution", 8)
    with monkeypatch.context() as patch:
        interrupted(patch, prepare.os, "replace", file, twelve, tmp_path / "parts", "--resolution", 8)
    run(twelve, tmp_path / "parts", "--resolution", 8)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_interrupted_twice(twelve, tmp_path, monkeypatch, small_chunks):
    run(twelve, tmp_path / "whole", "--resolution", 8)
    for image in (5, 6):  # in the second chunk, then in the third
        with monkeypatch.context() as patch:
            interrupted(patch, prepare, "center_crop", image, twelve, tmp_path / "parts", "--resolution", 8)
    run(twelve, tmp_path / "parts", "--resolution", 8)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_interrupted_folder_refuses_other_settings_too(twelve, tmp_path, monkeypatch, small_chunks):
    with monkeypatch.context() as patch:
        interrupted(patch, prepare, "center_crop", 5, twelve, tmp_path / "parts", "--resolution", 8)
    assert "resolution: 8 -> 4" in refusal(twelve, tmp_path / "parts", "--resolution", 4)


@pytest.mark.parametrize("call", [0, 3])  # batches of 3 in chunks of 4: two calls each
def test_interrupted_features_end_up_the_same(twelve, tmp_path, encoder_folder, monkeypatch, small_chunks, call):
    arguments = ["--resolution", 8, "--encoder", encoder_folder, "--batch-size", 3]
    run(twelve, tmp_path / "whole", *arguments)
    parts = tmp_path / "parts"
    run(twelve, parts, "--resolution", 8)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "estimate", lambda stages, folder: None)
        patch.setattr(FrozenEncoder, "forward", Interrupt(FrozenEncoder.forward, call))
        with pytest.raises(SystemExit, match="the same command again"):
            run(twelve, parts, *arguments)
    (fingerprint,) = os.listdir(parts / "features")
    with pytest.raises(ValueError, match=f"no finished features {fingerprint}"):
        PreparedImages(parts, features=[fingerprint])
    counted = Interrupt(FrozenEncoder.forward, None)
    monkeypatch.setattr(FrozenEncoder, "forward", counted)
    monkeypatch.setattr(prepare, "estimate", lambda stages, folder: None)
    run(twelve, parts, *arguments)
    assert content(parts) == content(tmp_path / "whole")
    assert counted.calls == {0: 6, 3: 4}[call]
    assert f"features/{fingerprint}/tokens.npy" in content(parts)


# ---- reading ----


def stream(*arguments, **options):
    return [item for batch in ShuffledBatches(*arguments, **options) for item in batch]


def test_each_epoch_is_another_permutation():
    items = np.array(stream(10, 5, seed=3, start=0, stop=8)).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in items.tolist())
    assert len({tuple(epoch) for epoch in items.tolist()}) == 4


def test_order_follows_from_the_seed_alone():
    order = stream(50, 10, seed=3, start=0, stop=10)
    assert order == stream(50, 10, seed=3, start=0, stop=10)
    assert order == stream(50, 4, seed=3, start=0, stop=25)  # not from the batch size
    assert order[:50] != stream(50, 10, seed=4, start=0, stop=5)
    # Nor may the next seed's first epoch be this seed's second one.
    assert order[50:] != stream(50, 10, seed=4, start=0, stop=5)
    assert order[:50] != list(range(50))


@pytest.mark.parametrize("num_items, batch_size", [(13, 8), (5, 12), (16, 8)])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_of_the_processes_make_up_the_global_batches(num_items, batch_size, world):
    settings = dict(seed=1, start=2, stop=9)
    whole = list(ShuffledBatches(num_items, batch_size, **settings))
    shares = [list(ShuffledBatches(num_items, batch_size, rank=rank, world=world, **settings)) for rank in range(world)]
    assert [sum(parts, []) for parts in zip(*shares)] == whole
    assert {len(part) for share in shares for part in share} == {batch_size // world}
    assert all(type(item) is int for batch in whole for item in batch)


# 13 items in eights: every second batch or so reaches into the next epoch. 5 in twelves: one batch spans three.
@pytest.mark.parametrize("num_items, batch_size", [(13, 8), (5, 12), (8, 8)])
@pytest.mark.parametrize("start", [0, 1, 2, 5, 9])
def test_starting_late_skips_steps(num_items, batch_size, start):
    whole = list(ShuffledBatches(num_items, batch_size, seed=1, start=0, stop=10))
    late = ShuffledBatches(num_items, batch_size, seed=1, start=start, stop=10)
    assert list(late) == whole[start:]
    assert len(late) == 10 - start and len(whole) == 10


def test_batches_that_span_epochs_drop_nothing():
    items = stream(13, 8, seed=1, start=0, stop=13)  # 104 entries: exactly 8 epochs
    assert collections.Counter(items) == {item: 8 for item in range(13)}


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


def test_tokens_served_are_the_encoders(digits, encoder_folder):
    encoder = FrozenEncoder(str(encoder_folder), 4)
    data = PreparedImages(digits, features=[encoder.fingerprint])
    items = [0, 1796, 5, 900, 901]
    batch = data.__getitems__(items)
    assert set(batch) == {"images", "labels", "tokens_0"}
    assert batch["tokens_0"].dtype == torch.float16 and batch["tokens_0"].shape == (5, 16, 24)
    torch.testing.assert_close(batch["tokens_0"].float(), encoder(batch["images"]), rtol=2e-3, atol=2e-4)
    assert set(PreparedImages(digits).__getitems__(items)) == {"images", "labels"}


def test_reader_process_serves_the_same_batches(digits, encoder_folder):
    (fingerprint,) = os.listdir(digits / "features")

    def read(num_workers):
        data = PreparedImages(digits, features=[fingerprint])
        sampler = ShuffledBatches(len(data), 6, seed=0, start=298, stop=302)  # crosses the end of an epoch
        return list(DataLoader(data, batch_sampler=sampler, collate_fn=lambda batch: batch, num_workers=num_workers))

    here, there = read(0), read(1)
    assert len(here) == len(there) == 4
    for a, b in zip(here, there):
        assert a.keys() == b.keys() == {"images", "labels", "tokens_0"}
        assert all(torch.equal(a[name], b[name]) for name in a)

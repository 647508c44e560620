"""The metrics against numpy, scipy, torch-fidelity and closed forms; the command on images of every kind."""

import functools
import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from dataset import prepare
from dataset.prepared import PreparedImages
from eval import features as networks
from eval import metrics
from eval.images import open_images
from eval.metrics import FeatureStatistics, frechet_distance, measure, reference_of
from tests.conftest import ROOT, Group, forked


def features(count, dim, seed=0):
    """Correlated features with a mean well away from zero, as encoders give them."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dim, dim)) / math.sqrt(dim)
    return torch.from_numpy(rng.normal(size=(count, dim)) @ mixing + rng.normal(size=dim) * 3)


def statistics_of(*batches):
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


# ---- statistics ----


@pytest.mark.parametrize("count, dim", [(50, 7), (2, 3), (5, 20), (1000, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_statistics_against_numpy(count, dim, dtype):
    """In float64 whatever the features are, and in whatever batches they come, or processes that add up theirs."""
    x = (features(count, dim) * 100).to(dtype)
    expected, cuts = x.double().numpy(), np.sort(np.random.default_rng(dim).integers(0, count + 1, size=6))
    batches = torch.tensor_split(x, torch.from_numpy(cuts))  # some are empty
    halves = FeatureStatistics(dim)
    halves.sums += statistics_of(x[: count // 3]).sums + statistics_of(x[count // 3 :]).sums
    for statistics in (statistics_of(x), statistics_of(*batches), halves):
        mean, covariance = statistics.mean_and_covariance()
        assert mean.dtype == covariance.dtype == torch.float64 and statistics.sums[0] == count
        np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(expected, rowvar=False), rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("count", [0, 1])
def test_one_vector_has_no_covariance(count):
    with pytest.raises(ValueError, match=f"{count} feature vectors.*at least 2"):
        statistics_of(features(count, 4)).mean_and_covariance()


# ---- Fréchet distance ----


def random_covariance(dim, rank, seed):
    factor = np.random.default_rng(seed).normal(size=(dim, rank))
    return torch.from_numpy(factor @ factor.T / rank)


def test_distance_of_diagonal_covariances():
    """Commuting covariances: sum over directions of (m_a - m_b)^2 + (s_a - s_b)^2."""
    mean_a, mean_b = torch.tensor([0.0, 1, 5]), torch.tensor([2.0, 1, 4])
    deviation_a, deviation_b = torch.tensor([1.0, 2, 3]), torch.tensor([1.5, 0, 7])
    expected, parts = 4 + 0 + 1 + 0.25 + 4 + 16, []
    got = frechet_distance(mean_a, deviation_a.square().diag(), mean_b, deviation_b.square().diag())
    assert isinstance(got, float) and got == pytest.approx(expected, rel=1e-12)
    # The same in a rotated basis; b has no extent in one direction, where rounding weighs most.
    turn = torch.from_numpy(scipy.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0])
    for mean, deviation in ((mean_a, deviation_a), (mean_b, deviation_b)):
        parts += [turn @ mean.double(), turn @ deviation.double().square().diag() @ turn.T]
    assert frechet_distance(*parts) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dim", [1, 2, 12])
def test_distance_against_scipy(dim):
    mean_a, mean_b = torch.randn(2, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))
    a, b = random_covariance(dim, dim + 3, seed=1), random_covariance(dim, dim + 3, seed=2)
    root = scipy.linalg.sqrtm((a @ b).numpy())
    expected = (mean_a - mean_b).square().sum().item() + (a + b).trace().item() - 2 * np.trace(root).real
    assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(mean_b, b, mean_a, a) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("rank_a, rank_b", [(3, 20), (20, 3), (3, 5), (1, 1)])
def test_distance_of_rank_deficient_covariances(rank_a, rank_b):
    """tr (C_a C_b)^1/2 is the nuclear norm of A^T B for C_a = A A^T and C_b = B B^T, whatever their ranks."""
    rng = np.random.default_rng(rank_a)
    a, b = rng.normal(size=(12, rank_a)), rng.normal(size=(12, rank_b))
    expected = np.square(a).sum() + np.square(b).sum() - 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum()
    zero = torch.zeros(12)
    ca, cb = torch.from_numpy(a @ a.T), torch.from_numpy(b @ b.T)
    assert frechet_distance(zero, ca, zero, cb) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(zero, cb, zero, ca) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(zero, ca, zero, ca) == pytest.approx(0, abs=1e-5)


def test_distance_rejects_what_it_cannot_compare():
    mean, covariance = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"widths differ.*\(3,\).*\(4,\)"):
        frechet_distance(mean, covariance, torch.zeros(4), torch.eye(4))
    for value in (float("nan"), float("inf")):
        for position in range(4):
            parts = [mean.clone(), covariance.clone(), mean.clone(), covariance.clone()]
            parts[position].view(-1)[1] = value
            with pytest.raises(ValueError, match="not finite"):
                frechet_distance(*parts)


# ---- the definitions ----


def test_distance_is_the_library_s():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = features(50, 6), features(40, 6, seed=1)
    expected = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False)
    found = frechet_distance(*statistics_of(a).mean_and_covariance(), *statistics_of(b).mean_and_covariance())
    assert found == pytest.approx(expected["frechet_inception_distance"], rel=1e-9)


@pytest.mark.parametrize("chunk, chunks", [(100, 1), (20, 2), (15, 3)])
def test_inception_score_against_numpy(monkeypatch, chunk, chunks):
    monkeypatch.setattr(metrics, "IS_CHUNK", chunk)
    logits = 3 * features(48, 9).float()
    exponentials = np.exp(logits.double().numpy())
    p = exponentials / exponentials.sum(1, keepdims=True)
    expected = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in np.split(p, chunks)]
    assert metrics.inception_score(logits) == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-9)


def nearest(x, others, k=3):
    """Squared distances of `others` from x's rows, and the radius of each row: its k-th neighbour's but itself."""
    own = np.square(x[:, None] - x[None]).sum(-1)
    radii = np.sort(own + np.diag(np.full(len(x), np.inf)), 1)[:, k - 1]
    return np.square(others[:, None] - x[None]).sum(-1), radii


@pytest.mark.parametrize("seed", range(3))
def test_precision_and_recall_against_numpy(seed):
    rng = np.random.default_rng(seed)
    generated, real = 1.2 * rng.normal(size=(60, 5)) + 1, rng.normal(size=(45, 5))
    inside = [
        (distances <= radii).any(1).mean() for distances, radii in (nearest(real, generated), nearest(generated, real))
    ]
    found = metrics.precision_and_recall(torch.from_numpy(generated), torch.from_numpy(real))
    assert found == pytest.approx(inside, abs=1e-6)
    assert 0.1 < min(inside) and max(inside) < 1


@pytest.mark.parametrize("classes", [2, 10, 500])
def test_order_of_classes_is_noticed(classes):
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=2000)
    assert metrics.class_ordered(np.sort(labels))
    blocks = np.concatenate([np.flatnonzero(labels == kind) for kind in rng.permutation(classes)])
    assert metrics.class_ordered(labels[blocks])  # grouped, in another order
    noisy = np.where(rng.random(2000) < 0.5, labels, np.sort(labels))  # as a classifier would see them
    assert metrics.class_ordered(torch.from_numpy(noisy))
    for seed in range(20):
        assert not metrics.class_ordered(np.random.default_rng(seed).permutation(labels))
    assert metrics.class_ordered(np.arange(2000))  # in order, though no two neighbours are alike
    assert not metrics.class_ordered(np.resize(np.arange(classes), 2000))
    assert not metrics.class_ordered(np.zeros(2000)) and not metrics.class_ordered(np.zeros(0))


# ---- from images to numbers ----


class NarrowInception(torch.nn.Module):
    """In place of the network: a few numbers of each image, computed as fast as it takes to read them."""

    dims = {"pool3": 7, "spatial": 5, "logits": 4}
    file, sha256, fingerprint, is_published, dim = ROOT / "none", "0" * 64, "0" * 12, False, 7

    def __init__(self, weights=""):
        super().__init__()

    def forward(self, images):
        x = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)  # (B, 12)
        return {"pool3": x[:, :7].tanh() + x[:, :7] / 9, "spatial": x[:, 3:8] / 7, "logits": x[:, :4] / 50}


class Tokens(torch.nn.Module):
    dims = {"dinov2": 3}

    def forward(self, images):
        return {"dinov2": images.float().mean((2, 3)) / 9}


def some_images(count, seed=0, size=6):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size=(count, 3, size, size), dtype=np.uint8))


def save_images(path, images, **others):
    np.savez(path, images.permute(0, 2, 3, 1).numpy(), **others)
    return path


def reference_by(ranks, images, judges, batch_size=4, labels=None):
    """The reference of these images, and a function that shares out others."""

    def batches(images):
        return (images[list(part)] if part else None for part in metrics.shares(len(images), batch_size, ranks))

    return reference_of(batches(images), len(images), {}, judges, ranks, batch_size, labels), batches


def narrow(world, samples, reference, labels=None, judges=None):
    """`measure` in all processes of a group; the numbers of the main one."""
    judges = judges or [NarrowInception()]

    def judge(ranks):
        against, batches = reference_by(ranks, reference, judges)
        return measure(batches(samples), len(samples), against, judges, ranks, 4, labels)

    return Group(world).run(judge)[0]


def test_measure_against_numpy():
    samples, reference = some_images(30), some_images(25, seed=1)
    judges, expected = [NarrowInception(), Tokens()], {}
    found, warnings = narrow(1, samples, reference, judges=judges)
    a, b = ({**judges[0](images), **judges[1](images)} for images in (samples, reference))
    for name, metric in (("pool3", "fid"), ("spatial", "sfid"), ("dinov2", "fd_dinov2")):
        x, y = a[name].double().numpy(), b[name].double().numpy()
        cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        root = scipy.linalg.sqrtm(cx @ cy).real
        expected[metric] = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cx + cy - 2 * root)
    expected["inception_score"], expected["inception_score_std"] = metrics.inception_score(a["logits"])
    expected["precision"], expected["recall"] = metrics.precision_and_recall(a["pool3"], b["pool3"])
    assert found == pytest.approx(expected, rel=1e-6) and len({found[name] for name in expected}) > 5
    assert [warning.split(":")[0] for warning in warnings] == [
        "30 samples",
        "the inception score is of one chunk of 30 samples instead of 5000",
        "precision and recall are against 25 images instead of 10000",
    ]


def test_accuracy_of_labels_by_neighbours_in_the_reference():
    """Images of three levels of grey, of which two in fifteen samples are asked for by a wrong label."""
    levels = torch.tensor([20, 120, 220], dtype=torch.uint8)
    of_reference, of_samples = torch.arange(24) % 3, torch.arange(15) % 3
    reference, samples = (levels[of].view(-1, 1, 1, 1).expand(-1, 3, 6, 6) for of in (of_reference, of_samples))
    asked = of_samples.clone()
    asked[[3, 8]] = (asked[[3, 8]] + 1) % 3

    def judge(ranks):
        against, batches = reference_by(ranks, reference, [NarrowInception()], labels=of_reference.numpy())
        return measure(batches(samples), 15, against, [NarrowInception()], ranks, 4, asked.numpy())

    found, _ = Group(1).run(judge)[0]
    assert found["label_accuracy"] == pytest.approx(13 / 15)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_processes_measure_what_one_does(monkeypatch, world):
    monkeypatch.setattr(metrics, "IS_CHUNK", 7)  # so that the order matters
    samples, reference = some_images(30), some_images(21, seed=1)
    assert narrow(world, samples, reference) == narrow(1, samples, reference)


@pytest.mark.parametrize("world", [1, 2])
def test_precision_and_recall_look_at_part_of_a_large_reference(monkeypatch, world):
    monkeypatch.setattr(metrics, "REFERENCE_ROWS", 10)
    images, judges = some_images(45), [NarrowInception()]
    reference, *others = Group(world).run(lambda ranks: reference_by(ranks, images, judges)[0])
    assert len(set(reference.chosen)) == 10 and reference.chosen[9] > 20  # from all over it
    assert torch.equal(reference.rows, judges[0](images[reference.chosen])["pool3"])
    assert all(len(other.rows) == 0 for other in others)


def test_class_ordered_samples_are_warned_about(monkeypatch):
    monkeypatch.setattr(metrics, "IS_CHUNK", 12)
    samples, reference, labels = some_images(48), some_images(10, seed=1), np.arange(48) // 12
    assert "by their labels" in narrow(1, samples, reference, labels)[1][-1]
    assert not any("ordered" in text for text in narrow(1, samples, reference, 0 * labels)[1])
    # Without labels, by what the network takes the samples for.
    order = NarrowInception()(samples)["logits"].argmax(1).argsort()
    assert not any("ordered" in text for text in narrow(1, samples, reference)[1])
    assert "by their predicted classes" in narrow(1, samples[order], reference)[1][-1]


@pytest.mark.parametrize(
    "count, heads",
    [
        (10, ["10 samples: distances grow", "the inception score is of one chunk of 10 samples instead of 12"]),
        (30, ["30 samples: distances grow", "30 samples are no multiple of 12", "the samples look ordered by class"]),
    ],
)
def test_warnings_of_numbers_that_do_not_compare(monkeypatch, count, heads):
    for name, value in (("IS_CHUNK", 12), ("COMPARABLE", 40), ("REFERENCE_ROWS", 6)):
        monkeypatch.setattr(metrics, name, value)
    warnings = narrow(1, some_images(count), some_images(6, seed=1), np.arange(count) // 5)[1]
    assert len(warnings) == len(heads) and all(map(str.startswith, warnings, heads)), warnings


def test_too_few_images():
    with pytest.raises(ValueError, match="3 samples.*4 at least"):
        narrow(1, some_images(3), some_images(9))
    with pytest.raises(ValueError, match="3 images of the reference"):
        narrow(2, some_images(9), some_images(3))


# ---- the command ----


@pytest.fixture
def narrowed(monkeypatch):
    monkeypatch.setattr(networks, "InceptionFeatures", NarrowInception)


def command(samples, reference, *options):
    metrics.main([str(samples), "--reference", str(reference), "--num-workers", "0", *map(str, options)])
    return json.loads(samples.with_name(samples.name + ".metrics.json").read_text())


@pytest.fixture
def adm():
    """The arrays of a reference like ADM's, as wide as the narrow network."""
    images = some_images(12, seed=2)
    parts = {name: statistics_of(value).mean_and_covariance() for name, value in NarrowInception()(images).items()}
    pairs = [(key, part) for name, keys in metrics.STATISTICS.items() for key, part in zip(keys, parts[name])]
    return {"arr_0": images.permute(0, 2, 3, 1).numpy(), **{key: part.float().numpy() for key, part in pairs}}


def test_all_kinds_of_samples_give_the_same(adm, narrowed, tmp_path, monkeypatch):
    """Prepared digits, from their folder, as png, and in an npz: compressed, in Fortran order, in any batches."""
    folder = tmp_path / "digits"
    prepare.main(["digits", "--out", str(folder), "--limit", "90"])
    np.savez(tmp_path / "adm.npz", **adm)
    images = PreparedImages(folder).__getitems__(range(90))["images"]
    plain, rows = save_images(tmp_path / "plain.npz", images), images.permute(0, 2, 3, 1).numpy()
    np.savez_compressed(tmp_path / "packed.npz", rows)
    np.savez(tmp_path / "fortran.npz", np.asfortranarray(rows))
    (tmp_path / "png").mkdir()
    for i, image in enumerate(rows):
        Image.fromarray(image).save(tmp_path / "png" / f"{i:03}.png")
    results = [
        command(samples, tmp_path / "adm.npz", *options)
        for samples, *options in [
            (plain, "--batch-size", 7),
            (tmp_path / "packed.npz",),
            (tmp_path / "fortran.npz",),
            (tmp_path / "png",),
            (folder,),
            (plain, "--num-workers", 2),
        ]
    ]
    for result in results:
        assert result["metrics"] == pytest.approx(results[0]["metrics"], rel=1e-9)
        assert result["reference"]["statistics"] == "of the file"
        assert result["samples"]["count"] == 90 and result["environment"]["processes"] == 1
        assert any("8 x 8 pixels, the reference's images 6 x 6" in warning for warning in result["warnings"])
    assert results[0]["samples"]["uint8_conversion"].startswith("unknown")
    assert results[4]["samples"]["uint8_conversion"].startswith("none")
    # Beside an npz of eval.sample is what it was drawn with.
    (tmp_path / "settings.json").write_text(json.dumps({"uint8": "rounded", "settings": {"seed": 3}}))
    drawn = command(plain, tmp_path / "adm.npz")["samples"]
    assert drawn["uint8_conversion"] == "rounded" and drawn["settings"] == {"seed": 3}
    # Order is judged by the labels, where there are any.
    monkeypatch.setattr(metrics, "IS_CHUNK", 12)
    sorted_by_label = save_images(tmp_path / "sorted.npz", images, arr_1=np.arange(90) // 9)
    for samples, ordered in ((plain, False), (sorted_by_label, True)):
        warnings = command(samples, tmp_path / "adm.npz")["warnings"]
        assert any("ordered by class (by their labels)" in text for text in warnings) == ordered
    # Against itself, samples are perfect.
    perfect = command(folder, plain)["metrics"]
    assert perfect["fid"] == pytest.approx(0, abs=1e-4) and perfect["precision"] == perfect["recall"] == 1


def test_folder_of_images(tmp_path):
    """Subfolders are classes. What is hidden or of another suffix is no sample, and counted."""
    for i, (kind, mode) in enumerate([("b", "RGB"), ("a", "L"), ("a", "RGB"), (".copies", "RGB"), ("__MACOSX", "RGB")]):
        (tmp_path / kind).mkdir(exist_ok=True)
        Image.new(mode, (5, 4), i).save(tmp_path / kind / f"{i}.{'JPG' if i == 2 else 'png'}")
    Image.new("RGB", (5, 4)).save(tmp_path / "a" / ".hidden.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "b" / "moving.gif")
    source = open_images(tmp_path)
    assert len(source) == 3 and source.size == (4, 5) and source.labels.tolist() == [0, 0, 1]
    assert source.__getitems__([0, 1, 2]).shape == (3, 3, 4, 5) and "1 images are JPEG" in source.warnings[0]
    assert source.warnings[1].startswith("4 files in") and "are not judged" in source.warnings[1]


PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 4\nshowpage\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("wide.png", Image.new("RGB", (6, 4)), r"wide.png' is 4 x 6 pixels, the first one 4 x 5"),
        ("deep.png", Image.new("I;16", (5, 4), 300), "deep.png' has more than 8 bits per value"),
        ("text.png", b"no image", "text.png' cannot be read as an image"),
        ("program.jpg", PROGRAM, "program.jpg' cannot be read as an image"),
    ],
)
def test_images_that_cannot_be_judged(narrowed, tmp_path, monkeypatch, name, content, message):
    """Named in one line; Pillow would start Ghostscript for one of them."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **options: pytest.fail("a program ran"))
    for i in range(4):
        Image.new("RGB", (5, 4)).save(tmp_path / f"{i}.png")
    content.save(tmp_path / name) if isinstance(content, Image.Image) else (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        command(tmp_path, tmp_path)


def test_two_processes_compute_what_one_does(narrowed, tmp_path, capfd):
    samples = save_images(tmp_path / "samples.npz", some_images(23))
    reference = save_images(tmp_path / "images.npz", some_images(12, seed=2))
    alone = command(samples, reference, "--batch-size", 4, "--save-reference", tmp_path / "kept.npz")["metrics"]
    capfd.readouterr()
    words = [str(samples), "--reference", str(reference), "--num-workers=1", "--batch-size=4"]
    assert forked(*2 * [functools.partial(metrics.main, words)], ranks=True) == [None, None]
    assert capfd.readouterr().out.count("written to") == 1
    together = json.loads((tmp_path / "samples.npz.metrics.json").read_text())
    assert together["metrics"] == alone and together["environment"]["processes"] == 2
    # The statistics of the first run, read back instead of computed.
    assert command(samples, tmp_path / "kept.npz", "--batch-size", 4)["metrics"] == alone


def test_another_judge(judge_folder, tmp_path, capsys):
    """Two sets of samples in one command, without Inception, against scipy and torch-fidelity's definition."""
    samples = [save_images(tmp_path / f"{n}.npz", some_images(n, seed=n)) for n in (200, 250)]
    reference = save_images(tmp_path / "images.npz", some_images(220, seed=2))
    words = [*samples, "--reference", reference, "--num-workers", 0, "--judge", judge_folder]
    with pytest.raises(SystemExit, match="error: .*one file for 2 SAMPLES"):
        metrics.main([*map(str, words), "--out", str(tmp_path / "x.json")])
    (tmp_path / "settings.json").write_text('{"uint8": "", "seconds_per_1000_images": 2.5}')
    metrics.main([*map(str, words)])
    found, other = (json.loads(path.with_name(f"{path.name}.metrics.json").read_text()) for path in samples)
    network = networks.PooledFeatures(str(judge_folder))
    a, b = (network(some_images(n, seed=seed))["pooled"].double() for n, seed in ((200, 200), (220, 2)))
    x, y = a.numpy(), b.numpy()
    cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(cx @ cy).real
    distance = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cx + cy - 2 * root)
    precision, recall = metrics.precision_and_recall(a, b)
    expected = {"frechet_distance": distance, "precision": precision, "recall": recall}
    assert found["metrics"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found["judge"] == {"name": str(judge_folder), "fingerprint": network.fingerprint}
    assert "inception" not in found
    row = f"| {samples[0]} | {distance:.4g} | {precision:.4g} | {recall:.4g} | 2.5 |"
    assert row in capsys.readouterr().out.splitlines()
    assert other["samples"]["count"] == 250 and other["metrics"] != found["metrics"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mu": np.zeros(6)}, r"mu is float64 \(6,\).*shape \(7,\)"),
        ({"sigma": np.full((7, 7), np.nan)}, "sigma is.*finite"),
        ({"mu": np.array([None] * 7)}, "not an npz of plain arrays.*Object arrays cannot be loaded"),
        ({"arr_0": np.zeros((9, 3, 6, 6), np.uint8)}, r"arr_0 is uint8 \(9, 3, 6, 6\)"),
    ],
)
def test_references_that_cannot_be_used(adm, narrowed, tmp_path, change, message):
    np.savez(tmp_path / "adm.npz", **{name: value for name, value in (adm | change).items() if value is not None})
    save_images(tmp_path / "samples.npz", some_images(6))
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        command(tmp_path / "samples.npz", tmp_path / "adm.npz")


def test_samples_and_options_that_cannot_be_used(adm, narrowed, judge_folder, tmp_path):
    np.savez(tmp_path / "adm.npz", **adm)
    (tmp_path / "empty").mkdir()
    (tmp_path / "dar" / "samples").mkdir(parents=True)
    (tmp_path / "dar" / "settings.json").write_text("{}")
    (tmp_path / "damaged.npz").write_bytes(save_images(tmp_path / "whole.npz", some_images(9)).read_bytes()[:600])
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    save_images(tmp_path / "labels.npz", some_images(6), arr_1=np.zeros((6, 2)))
    for name, message, *options in [
        ("missing", "there is no .*missing"),
        ("damaged.npz", "damaged.npz' is not an npz"),
        ("other.npz", "other.npz' has no arr_0"),
        ("empty", "neither png nor jpg"),
        ("dar", "dar' is a folder of eval.sample; give the npz in it"),
        ("labels.npz", r"arr_1 is \(6, 2\).*6 images"),
        ("whole.npz", "holds Inception's statistics", "--save-reference", tmp_path / "x.npz", "--judge", judge_folder),
        ("whole.npz", "must end in .npz", "--save-reference", tmp_path / "x"),
    ]:
        with pytest.raises(SystemExit, match=f"error: .*{message}") as error:
            command(tmp_path / name, tmp_path / "adm.npz", *options)
        assert "\n" not in str(error.value)


def test_a_full_disk_is_named_and_leaves_nothing(narrowed, tmp_path):
    """/dev/full is one."""
    samples = save_images(tmp_path / "samples.npz", some_images(6))
    options = ["--save-reference", tmp_path / "kept.npz"]
    for name in ("kept.npz", "samples.npz.metrics.json"):
        (tmp_path / f"{name}.unfinished").symlink_to("/dev/full")
        with pytest.raises(SystemExit, match=f"error: no space left for .*{name}"):
            command(samples, samples, *options)
        assert not (tmp_path / name).exists() and not (tmp_path / f"{name}.unfinished").is_symlink()
    assert command(samples, samples, *options)["samples"]["count"] == 6

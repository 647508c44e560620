"""The metrics against numpy, scipy and closed forms; the evaluation that runs during training.

Several processes are played by threads that add up their numbers as torch.distributed would.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from config import Config
from dataset import prepare
from dataset.prepared import PreparedImages
from eval import features, metrics, online
from eval.metrics import FeatureStatistics, Reference, SampleFeatures, frechet_distance, measure
from eval.online import OnlineEvaluation
from eval.samplers import IndexedNoise, sample_ode, sample_sde
from models.autoencoder import load_autoencoder
from models.encoders import FrozenEncoder
from runtime import EVALUATION, Ranks, derive_seed
from tests.conftest import ROOT, save_tiny_encoder


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


@pytest.mark.parametrize("count, dim", [(50, 7), (2, 3), (5, 20)])
def test_statistics_against_numpy(count, dim):
    x = features(count, dim)
    mean, covariance = statistics_of(x).mean_and_covariance()
    assert mean.dtype == covariance.dtype == torch.float64
    np.testing.assert_allclose(mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_statistics_do_not_depend_on_the_batches(seed):
    x = features(60, 5)
    cuts = np.sort(np.random.default_rng(seed).integers(0, 61, size=6))  # some batches are empty
    batches = np.split(x.numpy(), cuts)
    parts = statistics_of(*map(torch.from_numpy, batches))
    assert parts.sums[0] == 60
    torch.testing.assert_close(parts.sums, statistics_of(x).sums, rtol=1e-12, atol=1e-12)
    # Processes add up theirs.
    halves = [statistics_of(x[:23]), statistics_of(x[23:])]
    torch.testing.assert_close(halves[0].sums + halves[1].sums, parts.sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_features_are_summed_in_double(dtype):
    x = (features(1000, 3) * 100).to(dtype)
    mean, covariance = statistics_of(*x.split(100)).mean_and_covariance()
    np.testing.assert_allclose(mean, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-8)


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
    expected = 4 + 0 + 1 + 0.25 + 4 + 16
    got = frechet_distance(mean_a, deviation_a.square().diag(), mean_b, deviation_b.square().diag())
    assert isinstance(got, float) and got == pytest.approx(expected, rel=1e-12)
    # The same in a rotated basis; b has no extent in one direction, where rounding weighs most.
    turn = torch.from_numpy(scipy.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0])
    turned = [
        turn @ mean_a.double(),
        turn @ deviation_a.double().square().diag() @ turn.T,
        turn @ mean_b.double(),
        turn @ deviation_b.double().square().diag() @ turn.T,
    ]
    assert frechet_distance(*turned) == pytest.approx(expected, rel=1e-6)


def test_distance_of_equal_covariances_is_that_of_the_means():
    covariance = random_covariance(6, 6, seed=0)
    mean, shift = torch.randn(6, dtype=torch.float64), torch.tensor([3.0, 0, 0, 4, 0, 0], dtype=torch.float64)
    assert frechet_distance(mean, covariance, mean + shift, covariance) == pytest.approx(25, rel=1e-9)
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)
    trace = covariance.trace().item()
    assert frechet_distance(mean, covariance, mean, 4 * covariance) == pytest.approx(trace, rel=1e-9)


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


def test_distance_of_fewer_samples_than_dimensions():
    x = features(8, 30)
    same = statistics_of(x).mean_and_covariance()
    assert frechet_distance(*same, *same) == pytest.approx(0, abs=1e-5)
    other = statistics_of(features(8, 30, seed=1)).mean_and_covariance()
    assert frechet_distance(*same, *other) == pytest.approx(frechet_distance(*other, *same), rel=1e-6)
    assert frechet_distance(*same, *other) > 1


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


def test_precision_and_recall_know_collapse_and_noise():
    rng = np.random.default_rng(0)
    real = torch.from_numpy(rng.normal(size=(80, 4)))
    assert metrics.precision_and_recall(real, real) == (1, 1)
    collapsed = real[:1] + 1e-3 * torch.from_numpy(rng.normal(size=(80, 4)))
    precision, recall = metrics.precision_and_recall(collapsed, real)
    assert precision == 1 and recall < 1.5 / 80
    precision, recall = metrics.precision_and_recall(20 * torch.from_numpy(rng.normal(size=(80, 4))), real)
    assert precision < 0.1 and recall > 0.9


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

    dims, dim = {"pool3": 7, "spatial": 5, "logits": 4}, 7
    file, sha256, fingerprint, is_published = ROOT / "none", "0" * 64, "0" * 12, False

    def __init__(self, weights=""):
        super().__init__()

    def forward(self, images):
        x = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)  # (B, 12)
        return {"pool3": x[:, :7].tanh() + x[:, :7] / 9, "spatial": x[:, 3:8] / 7, "logits": x[:, :4] / 50}


def some_images(count, seed=0, size=6):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size=(count, 3, size, size), dtype=np.uint8))


def save_images(path, images, **others):
    np.savez(path, images.permute(0, 2, 3, 1).numpy(), **others)
    return path


def narrow(group, samples, reference, labels=None, batch_size=4):
    """`measure` in all processes of a group; the numbers of the main one."""

    def judge(ranks):
        networks = [NarrowInception()]

        def batches(images):
            return (images[list(part)] if part else None for part in metrics.shares(len(images), batch_size, ranks))

        against = Reference({}, batches(reference), len(reference), networks, ranks, batch_size)
        return measure(batches(samples), against, networks, ranks, batch_size, labels)

    return group.run(judge)[0]


def test_measure_against_numpy():
    samples, reference = some_images(30), some_images(25, seed=1)
    found, warnings = narrow(Group(1), samples, reference)
    network, expected = NarrowInception(), {}
    a, b = network(samples), network(reference)
    for name, metric in (("pool3", "fid"), ("spatial", "sfid")):
        x, y = a[name].double().numpy(), b[name].double().numpy()
        cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        root = scipy.linalg.sqrtm(cx @ cy).real
        expected[metric] = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cx + cy - 2 * root)
    expected["inception_score"], expected["inception_score_std"] = metrics.inception_score(a["logits"])
    expected["precision"], expected["recall"] = metrics.precision_and_recall(a["pool3"], b["pool3"])
    assert found == pytest.approx(expected, rel=1e-6)
    assert [warning.split(":")[0] for warning in warnings] == [
        "30 samples",
        "the inception score is of one chunk of 30 samples instead of 5000",
        "precision and recall are against 25 images instead of 10000",
    ]


def test_fd_dinov2_is_the_distance_of_its_own_features():
    class Tokens(torch.nn.Module):
        dims = {"dinov2": 3}

        def forward(self, images):
            return {"dinov2": images.float().mean((2, 3)) / 9}

    samples, reference = some_images(30), some_images(25, seed=1)
    networks, ranks = [NarrowInception(), Tokens()], Group(1).ranks[0]
    against = Reference({}, reference.split(4), 25, networks, ranks, 4)
    found, _ = measure(samples.split(4), against, networks, ranks, 4)
    x, y = (Tokens()(images)["dinov2"].double().numpy() for images in (samples, reference))
    cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cx + cy - 2 * scipy.linalg.sqrtm(cx @ cy).real)
    assert found["fd_dinov2"] == pytest.approx(expected, rel=1e-6) and found["fd_dinov2"] != found["fid"]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_processes_measure_what_one_does(monkeypatch, world):
    monkeypatch.setattr(metrics, "IS_CHUNK", 7)  # so that the order matters
    samples, reference = some_images(30), some_images(21, seed=1)
    assert narrow(Group(world), samples, reference) == narrow(Group(1), samples, reference)


def test_precision_and_recall_look_at_part_of_a_large_reference(monkeypatch):
    monkeypatch.setattr(metrics, "REFERENCE_ROWS", 10)
    images = some_images(45)
    for world in (1, 2):

        def load(ranks):
            mine = (images[list(part)] if part else None for part in metrics.shares(45, 4, ranks))
            return Reference({}, mine, 45, [NarrowInception()], ranks, 4)

        reference, *others = Group(world).run(load)
        assert len(set(reference.chosen)) == 10 and reference.chosen[9] > 20  # from all over it
        assert torch.equal(reference.pool3, NarrowInception()(images[reference.chosen])["pool3"])
        assert all(len(other.pool3) == 0 for other in others)


def test_class_ordered_samples_are_warned_about(monkeypatch):
    monkeypatch.setattr(metrics, "IS_CHUNK", 12)
    samples, reference, labels = some_images(48), some_images(10, seed=1), np.arange(48) // 12
    assert "by their labels" in narrow(Group(1), samples, reference, labels)[1][-1]
    assert not any("ordered" in text for text in narrow(Group(1), samples, reference, labels[::-1] * 0)[1])
    # Without labels, by what the network takes the samples for.
    order = NarrowInception()(samples)["logits"].argmax(1).argsort()
    assert not any("ordered" in text for text in narrow(Group(1), samples, reference)[1])
    assert "by their predicted classes" in narrow(Group(1), samples[order], reference)[1][-1]


@pytest.mark.parametrize(
    "count, heads",
    [
        (10, ["10 samples: distances grow", "the inception score is of one chunk of 10 samples instead of 12"]),
        (20, ["20 samples: distances grow", "20 samples are no multiple of 12"]),  # one chunk: order is all the same
        (30, ["30 samples: distances grow", "30 samples are no multiple of 12", "the samples look ordered by class"]),
        (40, ["40 samples are no multiple of 12", "the samples look ordered by class"]),
        (48, ["the samples look ordered by class"]),
    ],
)
def test_warnings_of_numbers_that_do_not_compare(monkeypatch, count, heads):
    for name, value in (("IS_CHUNK", 12), ("COMPARABLE", 40), ("REFERENCE_ROWS", 6)):
        monkeypatch.setattr(metrics, name, value)
    warnings = narrow(Group(1), some_images(count), some_images(6, seed=1), np.arange(count) // 5)[1]
    assert len(warnings) == len(heads) and all(map(str.startswith, warnings, heads)), warnings


def test_too_few_images_and_too_large_batches():
    with pytest.raises(ValueError, match="3 samples.*4 at least"):
        narrow(Group(1), some_images(3), some_images(9))
    with pytest.raises(ValueError, match="3 images of the reference"):
        narrow(Group(2), some_images(9), some_images(3))
    with pytest.raises(ValueError, match="5 images at a time.*batch_size = 4"):
        SampleFeatures([NarrowInception()], Group(1).ranks[0], 4).update(some_images(5))


@pytest.fixture
def narrowed(monkeypatch):
    monkeypatch.setattr(features, "InceptionFeatures", NarrowInception)


def command(samples, reference, *options):
    metrics.main([str(samples), "--reference", str(reference), "--num-workers", "0", *map(str, options)])
    target = samples.with_name(samples.name + ".metrics.json")
    return json.loads(target.read_text())


@pytest.fixture
def adm(tmp_path):
    """A reference like ADM's, as wide as the narrow network."""
    images = some_images(12, seed=2)
    parts = {name: statistics_of(value).mean_and_covariance() for name, value in NarrowInception()(images).items()}
    arrays = {
        key: part.float().numpy() for name, keys in metrics.STATISTICS.items() for key, part in zip(keys, parts[name])
    }
    return {"arr_0": images.permute(0, 2, 3, 1).numpy(), **arrays}


def test_all_kinds_of_samples_give_the_same(folder, adm, narrowed, tmp_path):
    """The prepared digits, once from their folder, once as png, once in an npz, compressed or not, in any batches."""
    np.savez(tmp_path / "adm.npz", **adm)
    images = all_images(PreparedImages(folder))
    save_images(tmp_path / "plain.npz", images)
    np.savez_compressed(tmp_path / "packed.npz", images.permute(0, 2, 3, 1).numpy())
    (tmp_path / "png").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "png" / f"{i:03}.png")
    results = [
        command(samples, tmp_path / "adm.npz", *options)
        for samples, *options in [
            (tmp_path / "plain.npz", "--batch-size", 7),
            (tmp_path / "packed.npz",),
            (tmp_path / "png",),
            (folder,),
            (tmp_path / "plain.npz", "--num-workers", 2),
        ]
    ]
    for result in results:
        assert result["metrics"] == pytest.approx(results[0]["metrics"], rel=1e-9)
        assert result["reference"]["statistics"] == "of the file"
        assert result["samples"]["count"] == 90 and result["environment"]["processes"] == 1
        assert any("8 x 8 pixels, the reference's images 6 x 6" in warning for warning in result["warnings"])
    assert results[0]["samples"]["uint8_conversion"].startswith("unknown")
    assert results[3]["samples"]["uint8_conversion"].startswith("none")
    # Beside an npz of eval.sample is what it was drawn with.
    (tmp_path / "settings.json").write_text(json.dumps({"uint8": "rounded", "settings": {"seed": 3}}))
    drawn = command(tmp_path / "plain.npz", tmp_path / "adm.npz")["samples"]
    assert drawn["uint8_conversion"] == "rounded" and drawn["settings"] == {"seed": 3}
    # Against itself, samples are perfect.
    perfect = command(folder, tmp_path / "plain.npz")["metrics"]
    assert perfect["fid"] == pytest.approx(0, abs=1e-4) and perfect["precision"] == perfect["recall"] == 1


def test_images_of_an_npz_are_mapped_not_loaded(tmp_path):
    images = some_images(9)
    source = metrics.open_images(save_images(tmp_path / "images.npz", images, arr_1=np.arange(9)))
    assert isinstance(source.array, np.memmap) and "array" not in source.__getstate__()
    assert torch.equal(source.__getitems__([3, 0]), images[[3, 0]]) and source.labels.tolist() == list(range(9))


def test_an_array_in_fortran_order_is_read_as_it_is(tmp_path):
    images = some_images(5)
    np.savez(tmp_path / "images.npz", np.asfortranarray(images.permute(0, 2, 3, 1).numpy()))
    source = metrics.open_images(tmp_path / "images.npz")
    assert isinstance(source.array, np.memmap) and torch.equal(source.__getitems__([3, 0]), images[[3, 0]])


def test_order_is_judged_by_the_labels_of_the_npz(adm, narrowed, tmp_path, monkeypatch):
    """Where it has them, whatever the network takes the images for."""
    monkeypatch.setattr(metrics, "IS_CHUNK", 12)
    np.savez(tmp_path / "adm.npz", **adm)
    images, labels = some_images(48), np.arange(48) // 12
    for name, given, expected in (("ordered", {"arr_1": labels}, True), ("unknown", {}, False)):
        path = save_images(tmp_path / f"{name}.npz", images, **given)
        warnings = command(path, tmp_path / "adm.npz")["warnings"]
        assert any("ordered by class (by their labels)" in text for text in warnings) == expected


def test_folder_of_images(tmp_path):
    for i, (kind, mode) in enumerate([("b", "RGB"), ("a", "L"), ("a", "RGB")]):
        (tmp_path / kind).mkdir(exist_ok=True)
        Image.new(mode, (5, 4), i).save(tmp_path / kind / f"{i}.{'JPG' if i == 2 else 'png'}")
    source = metrics.open_images(tmp_path)
    assert len(source) == 3 and source.size == (4, 5) and source.labels.tolist() == [0, 0, 1]
    assert source.__getitems__([0, 1, 2]).shape == (3, 3, 4, 5) and "1 images are JPEG" in source.warnings[0]
    Image.new("RGB", (6, 4)).save(tmp_path / "b" / "wide.png")
    with pytest.raises(ValueError, match=r"wide.png' is 4 x 6 pixels, the first one 4 x 5"):
        metrics.open_images(tmp_path).__getitems__([3])


def test_two_processes_compute_what_one_does(narrowed, tmp_path):
    samples = save_images(tmp_path / "samples.npz", some_images(23))
    reference = save_images(tmp_path / "images.npz", some_images(12, seed=2))
    options = [samples, "--reference", reference, "--num-workers=1", "--batch-size=4"]
    alone = command(samples, reference, "--batch-size", 4, "--save-reference", tmp_path / "kept.npz")["metrics"]
    script = (
        "import sys; from eval import features, metrics; from tests.test_metrics import NarrowInception;"
        "features.InceptionFeatures = NarrowInception; metrics.main(sys.argv[1:])"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "--no-python",
            sys.executable,
            "-c",
            script,
            *options,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written to") == 1
    together = json.loads((tmp_path / "samples.npz.metrics.json").read_text())
    assert together["metrics"] == alone and together["environment"]["processes"] == 2
    # The statistics of the first run, read back instead of computed.
    assert command(samples, tmp_path / "kept.npz", "--batch-size", 4)["metrics"] == alone


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mu": None}, "lacks mu; a reference has arr_0, mu, sigma, mu_s, sigma_s"),
        ({"arr_0": None, "sigma_s": None}, "lacks arr_0, sigma_s"),
        ({"mu": np.zeros(6)}, r"mu is float64 \(6,\).*shape \(7,\)"),
        ({"sigma_s": np.zeros((5, 7), np.float32)}, r"sigma_s is float32 \(5, 7\).*shape \(5, 5\)"),
        ({"sigma": np.full((7, 7), np.nan)}, "sigma is.*finite"),
        ({"mu": np.array([None] * 7)}, "mu holds Python objects, which are never loaded"),
        ({"arr_0": np.zeros((9, 6, 6, 3), np.float32)}, r"arr_0 is float32 \(9, 6, 6, 3\); images must be uint8"),
        ({"arr_0": np.zeros((9, 3, 6, 6), np.uint8)}, r"arr_0 is uint8 \(9, 3, 6, 6\)"),
        ({"arr_0": np.zeros((3, 6, 6, 3), np.uint8)}, "3 images of the reference"),
    ],
)
def test_references_that_cannot_be_used(adm, narrowed, tmp_path, change, message):
    changed = {name: value for name, value in (adm | change).items() if value is not None}
    np.savez(tmp_path / "adm.npz", **changed)
    save_images(tmp_path / "samples.npz", some_images(6))
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        command(tmp_path / "samples.npz", tmp_path / "adm.npz")


def test_samples_that_cannot_be_used(adm, narrowed, tmp_path):
    np.savez(tmp_path / "adm.npz", **adm)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no zip")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    save_images(tmp_path / "labels.npz", some_images(6), arr_1=np.zeros((6, 2)))
    np.savez(tmp_path / "none.npz", np.zeros((0, 6, 6, 3), np.uint8))
    for name, message in [
        ("missing", "there is no .*missing"),
        ("text.npz", "not an npz"),
        ("other.npz", r"no arr_0, but \['images'\]"),
        ("empty", "neither png nor jpg"),
        ("labels.npz", r"arr_1 is \(6, 2\).*6 images"),
        ("none.npz", "0 samples"),
    ]:
        with pytest.raises(SystemExit, match=message):
            command(tmp_path / name, tmp_path / "adm.npz")
    save_images(tmp_path / "samples.npz", some_images(6))
    for options, message in [
        (["--batch-size", "0"], "batch_size = 0"),
        (["--save-reference", tmp_path / "x.npz"], "has its statistics"),
    ]:
        with pytest.raises(SystemExit, match=message):
            command(tmp_path / "samples.npz", tmp_path / "adm.npz", *options)


def test_weights_are_asked_for_within_seconds(adm, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    save_images(tmp_path / "samples.npz", some_images(6))
    start = time.perf_counter()
    with pytest.raises(SystemExit, match="inception-2015-12-05.*--inception FILE"):
        command(tmp_path / "samples.npz", tmp_path / "samples.npz")
    assert time.perf_counter() - start < 10


# ---- evaluation during training ----


class Group:
    """Ranks of `world` processes that are threads, each with the methods of runtime.Ranks used by the evaluation."""

    def __init__(self, world):
        self.barrier, self.slots, self.reduced = threading.Barrier(world, timeout=60), [None] * world, []
        self.ranks = [ThreadRank(self, rank, world) for rank in range(world)]

    def run(self, function):
        """Results of function(ranks) in every process."""

        def guarded(ranks):
            try:
                return function(ranks)
            except BaseException:
                self.barrier.abort()  # or the others would wait for it
                raise

        with ThreadPoolExecutor(len(self.ranks)) as pool:
            futures = [pool.submit(guarded, ranks) for ranks in self.ranks]
        failures = [future.exception() for future in futures if future.exception()]
        for failure in sorted(failures, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise failure
        return [future.result() for future in futures]


class ThreadRank:
    def __init__(self, group, rank, world):
        self.group, self.rank, self.world, self.main, self.device = group, rank, world, rank == 0, torch.device("cpu")

    def _gather(self, value):
        self.group.slots[self.rank] = value
        self.group.barrier.wait()
        values = list(self.group.slots)
        self.group.barrier.wait()
        return values

    def sum(self, tensor):
        tensor.copy_(sum(self._gather(tensor.clone())))
        if self.main:
            self.group.reduced.append(tensor.clone())
        return tensor

    def any(self, flag):
        return max(self._gather(flag))


class Recall:
    """The exact velocity towards one image per label or per sample: target(noise, y) gives uint8 (B, 3, H, W)."""

    num_classes = 10

    def __init__(self, target):
        self.target = target

    def __call__(self, x, t, y):
        assert (t == 1).all()  # for one Euler step from 1 to 0 only
        return x - load_autoencoder("pixels").encode(self.target(x, y)), []


def by_label(x, y):
    """Flat images whose grey level is 20 times the label."""
    return (20 * y).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "digits"
    prepare.main(["digits", "--out", str(folder), "--limit", "90"])
    return folder


@pytest.fixture(scope="module")
def encoder(encoder_folder):
    return FrozenEncoder(str(encoder_folder), 4)


@pytest.fixture
def data(folder):
    """The prepared images, without statistics of an earlier test."""
    for file in folder.glob("statistics-*.pt"):
        file.unlink()
    return PreparedImages(folder)


def evaluation(data, encoder, ranks=None, **changes):
    settings = dict(seed=5, eval_samples=30, eval_batch_size=7, sampler="euler", sample_steps=1) | changes
    return OnlineEvaluation(
        Config(**settings),
        data,
        encoder,
        load_autoencoder("pixels"),
        (3, data.resolution, data.resolution),
        ranks or Ranks(),
        contextlib.nullcontext,
    )


def reference_of(evaluation):
    return evaluation.judges[0].reference


def distance_to(evaluation, model):
    return evaluation(model)[0]["frechet_distance"]


def pooled(encoder, images):
    return encoder(images).mean(1)


def all_images(data):
    return data.__getitems__(range(len(data)))["images"]


def test_reference_is_of_all_training_images(data, encoder):
    mean, covariance = reference_of(evaluation(data, encoder))
    vectors = pooled(encoder, all_images(data)).double().numpy()
    np.testing.assert_allclose(mean, vectors.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(covariance, np.cov(vectors, rowvar=False), rtol=1e-3, atol=1e-5)


def test_reference_of_a_large_set_takes_part_of_it(data, encoder, monkeypatch):
    monkeypatch.setattr(online, "REFERENCE_IMAGES", 20)
    group = Group(1)
    group.run(lambda ranks: evaluation(data, encoder, ranks))
    sums = group.reduced[0]
    assert sums[0] == 20
    # Taken from all over the folder, which may be sorted by class: not the first twenty.
    first = pooled(encoder, all_images(data)[:20]).double().sum(0)
    assert not torch.allclose(sums[1 : 1 + encoder.dim], first, rtol=1e-3)


def test_reference_is_kept_and_reused(data, encoder, tmp_path, monkeypatch):
    first = reference_of(evaluation(data, encoder))
    (file,) = data.folder.glob("statistics-*.pt")
    assert encoder.fingerprint in file.name

    with monkeypatch.context() as patch:

        def never(*arguments):
            raise AssertionError("the images were read again")

        patch.setattr(PreparedImages, "__getitems__", never)
        again = reference_of(evaluation(data, encoder))
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        # It belongs to the encoder: another one needs its own.
        save_tiny_encoder(tmp_path / "other", seed=1)
        other = FrozenEncoder(str(tmp_path / "other"), 4)
        with pytest.raises(AssertionError, match="read again"):
            evaluation(data, other)
    assert not torch.allclose(reference_of(evaluation(data, other))[0], first[0])
    assert len(list(data.folder.glob("statistics-*.pt"))) == 2


def test_model_that_recalls_the_training_images_has_distance_zero(data, encoder):
    """Each sample is the training image of its index, recognised by its noise: the same set of images."""
    count = len(data)
    judge = evaluation(data, encoder, eval_samples=count, eval_batch_size=16)
    seeds = [derive_seed(5, EVALUATION, i) for i in range(count)]
    index = {value.item(): i for i, value in enumerate(IndexedNoise(seeds, (3, 8, 8), "cpu")()[:, 0, 0, 0])}
    images, asked = all_images(data), {}

    def recalled(x, y):
        rows = [index[value.item()] for value in x[:, 0, 0, 0]]
        asked.update(zip(rows, y.tolist()))
        return images[rows]

    distance = distance_to(judge, Recall(recalled))
    assert distance == pytest.approx(0, abs=1e-5)
    assert asked == dict(enumerate(judge.labels.tolist()))
    # A model of one image, or of grey ones, is far from that.
    for target in (lambda x, y: images[:1].expand(len(x), -1, -1, -1), lambda x, y: torch.full_like(x, 128).byte()):
        assert distance_to(judge, Recall(target)) > 1e-3


def test_same_samples_at_every_call(data, encoder):
    judge = evaluation(data, encoder, eval_batch_size=30)
    seen = []

    def target(x, y):
        seen.append((x, y))
        return by_label(x, y)

    results = [judge(Recall(target)) for _ in range(2)]
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert len(seen[0][0].flatten(1).unique(dim=0)) == 30  # all different noises
    evaluation(data, encoder, eval_batch_size=30, seed=6)(Recall(target))
    assert not torch.equal(seen[0][0], seen[2][0]) and not torch.equal(seen[0][1], seen[2][1])


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "euler", "cfg_scale": 3.0},
        {"sampler": "sde", "path": "cosine"},
        {"sampler": "heun", "cfg_scale": 2.0, "guidance_interval": (0.3, 0.8)},
    ],
    ids=str,
)
def test_samples_are_drawn_as_the_options_say(data, encoder, changes):
    """Against the samplers themselves, which tests/test_samplers.py compares with closed forms."""

    class Smooth:
        num_classes = 10

        def __call__(self, x, t, y):
            return (0.2 * y - t).view(-1, 1, 1, 1) * x, []

    judge = evaluation(data, encoder, sample_steps=4, **changes)
    noise = IndexedNoise([derive_seed(5, EVALUATION, i) for i in (2, 3, 4)], (3, 8, 8), "cpu")
    options = {"num_steps": 4, "cfg_scale": 1.0, "guidance_interval": (0.0, 1.0), "path": "linear", **changes}
    sampler, first, y = options.pop("sampler"), noise(), judge.labels[2:5]
    x = (
        sample_sde(Smooth(), first, y, step_noise=noise, **options)
        if sampler == "sde"
        else sample_ode(Smooth(), first, y, solver=sampler, **options)
    )
    assert torch.equal(judge.sample(Smooth(), range(2, 5)), load_autoencoder("pixels").decode(x))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("sampler, steps", [("euler", 1), ("sde", 3)])
def test_processes_add_up_to_one(data, encoder, world, sampler, steps):
    class Elementwise:  # the same for a sample in any batch
        num_classes = 10

        def __call__(self, x, t, y):
            return x - (y.view(-1, 1, 1, 1) / 9 - 0.5), []

    def judge(ranks):
        this = evaluation(data, encoder, ranks, sampler=sampler, sample_steps=steps)
        return this.labels, this(Elementwise())

    alone, together = Group(1), Group(world)
    ((labels, (distances, _)),) = alone.run(judge)
    for file in data.folder.glob("statistics-*.pt"):  # so that the reference is shared out as well
        file.unlink()
    results = together.run(judge)
    reference, samples = together.reduced
    assert (reference[0], samples[0]) == (len(data), 30)
    torch.testing.assert_close(reference, alone.reduced[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(samples, alone.reduced[1], rtol=1e-5, atol=1e-4)
    for other_labels, (other_distances, _) in results:
        assert torch.equal(other_labels, labels)
        assert other_distances == pytest.approx(distances, rel=1e-3) and distances.keys() == {"frechet_distance"}
    assert len(list(data.folder.glob("statistics-*.pt"))) == 1


def test_more_processes_than_samples(data, encoder):
    evaluation(data, encoder)  # so that only the samples are shared out
    group = Group(4)
    results = group.run(lambda ranks: evaluation(data, encoder, ranks, eval_samples=3)(Recall(by_label)))
    assert group.reduced[0][0] == 3
    assert len({distances["frechet_distance"] for distances, _ in results}) == 1


def test_labels_are_as_frequent_as_in_the_training_set(data, encoder):
    data.labels = torch.tensor([1] * 60 + [7] * 30)
    labels = evaluation(data, encoder, eval_samples=3000).labels
    assert set(labels.tolist()) == {1, 7}
    # 2000 of 3000 expected; the standard deviation is 26.
    assert (labels == 1).sum().item() == pytest.approx(2000, abs=5 * 26)
    assert 600 < (labels[:1000] == 1).sum().item() < 730  # in random order


@pytest.mark.parametrize("samples, rows, columns", [(9, 3, 3), (12, 4, 3), (70, 8, 8)])
def test_grid_is_ordered_by_label(data, encoder, samples, rows, columns):
    judge = evaluation(data, encoder, eval_samples=samples)
    _, grid = judge(Recall(by_label))
    side, step = 32, 34  # 8 pixels magnified 4 times, and a margin of 2
    assert grid.shape == (3, rows * step + 2, columns * step + 2) and grid.dtype == torch.uint8
    levels = []
    for row in range(rows):
        for column in range(columns):
            top, left = 2 + step * row, 2 + step * column
            tile = grid[:, top : top + side, left : left + side]
            assert (tile == tile[0, 0, 0]).all()
            levels.append(tile[0, 0, 0].item())
    assert levels == (20 * judge.labels[:64].sort().values).tolist()
    assert len(set(levels)) > 3


def test_small_images_are_magnified_by_repetition(data, encoder):
    """One label asked for, so that the order is that of the samples: the images must appear as they are."""
    data.labels = torch.zeros(len(data), dtype=torch.long)
    images = all_images(data)[:4]
    _, grid = evaluation(data, encoder, eval_samples=4)(Recall(lambda x, y: images))
    for i in range(4):
        top, left = 2 + 34 * (i // 2), 2 + 34 * (i % 2)
        assert torch.equal(grid[:, top : top + 32 : 4, left : left + 32 : 4], images[i])
        assert torch.equal(grid[:, top + 3 : top + 32 : 4, left + 3 : left + 32 : 4], images[i])


def test_a_folder_of_the_sampling_script_is_pointed_to_its_npz(tmp_path):
    (tmp_path / "dar" / "samples").mkdir(parents=True)
    (tmp_path / "dar" / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="dar' is a folder of eval.sample; give the npz in it"):
        metrics.open_images(tmp_path / "dar")


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("given", [False, True])
def test_fid_of_the_first_samples_and_of_all(data, encoder, monkeypatch, world, given):
    """At each count it is the distance of exactly the first so many samples, whoever makes them, beside the other."""
    monkeypatch.setattr(online, "FID_AT", (8, 21, 30, 50))
    judged = NarrowInception()
    other = statistics_of(judged(some_images(40, seed=3))["pool3"]).mean_and_covariance()

    def flat(x, y):  # a grey level of its own for each sample
        return (128 + 40 * x[:, :1, :1, :1]).clamp(0, 255).to(torch.uint8).expand(-1, 3, 8, 8)

    def judge(ranks):
        settings = Config(seed=5, eval_samples=30, eval_batch_size=7, sampler="euler", sample_steps=1)
        return OnlineEvaluation(
            settings,
            data,
            encoder,
            load_autoencoder("pixels"),
            (3, 8, 8),
            ranks,
            contextlib.nullcontext,
            judged,
            other if given else None,
        )(Recall(flat))[0]

    noise = IndexedNoise([derive_seed(5, EVALUATION, i) for i in range(30)], (3, 8, 8), "cpu")()
    features = judged(flat(noise, None))["pool3"]
    against = other if given else statistics_of(judged(all_images(data))["pool3"]).mean_and_covariance()
    expected = {
        name: frechet_distance(*statistics_of(features[:count]).mean_and_covariance(), *against)
        for name, count in (("fid_8", 8), ("fid_21", 21), ("fid", 30))
    }
    for found in Group(world).run(judge):
        assert found.pop("frechet_distance") > 0
        assert found == pytest.approx(expected, rel=1e-4)

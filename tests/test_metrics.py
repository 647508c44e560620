"""Fréchet distance and its statistics against numpy, scipy and closed forms; the evaluation that runs during training.

Several processes are played by threads that add up their numbers as torch.distributed would.
"""

import contextlib
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.linalg
import torch

from config import Config
from dataset import prepare
from dataset.latents import PreparedImages
from eval import online
from eval.metrics import FeatureStatistics, frechet_distance
from eval.online import OnlineEvaluation
from eval.samplers import IndexedNoise
from models.autoencoder import load_autoencoder
from models.encoders import FrozenEncoder
from runtime import EVALUATION, Ranks, derive_seed
from tests.conftest import save_tiny_encoder


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
    cuts = np.sort(np.random.default_rng(seed).integers(0, 61, size=6))          # some batches are empty
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
    turned = [turn @ mean_a.double(), turn @ deviation_a.double().square().diag() @ turn.T,
              turn @ mean_b.double(), turn @ deviation_b.double().square().diag() @ turn.T]
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
                self.barrier.abort()                                   # or the others would wait for it
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
        assert (t == 1).all()                                          # for one Euler step from 1 to 0 only
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
    return OnlineEvaluation(Config(**settings), data, encoder, load_autoencoder("pixels"),
                            (3, data.resolution, data.resolution), ranks or Ranks(), contextlib.nullcontext)


def pooled(encoder, images):
    return encoder(images).mean(1)


def all_images(data):
    return data.__getitems__(range(len(data)))["images"]


def test_reference_is_of_all_training_images(data, encoder):
    mean, covariance = evaluation(data, encoder).reference
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
    assert not torch.allclose(sums[1:1 + encoder.dim], first, rtol=1e-3)


def test_reference_is_kept_and_reused(data, encoder, tmp_path, monkeypatch):
    first = evaluation(data, encoder).reference
    file, = data.folder.glob("statistics-*.pt")
    assert encoder.fingerprint in file.name

    with monkeypatch.context() as patch:
        def never(*arguments):
            raise AssertionError("the images were read again")
        patch.setattr(PreparedImages, "__getitems__", never)
        again = evaluation(data, encoder).reference
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        # It belongs to the encoder: another one needs its own.
        save_tiny_encoder(tmp_path / "other", seed=1)
        other = FrozenEncoder(str(tmp_path / "other"), 4)
        with pytest.raises(AssertionError, match="read again"):
            evaluation(data, other)
    assert not torch.allclose(evaluation(data, other).reference[0], first[0])
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

    distance, _ = judge(Recall(recalled))
    assert distance == pytest.approx(0, abs=1e-5)
    assert asked == dict(enumerate(judge.labels.tolist()))
    # A model of one image, or of grey ones, is far from that.
    for target in (lambda x, y: images[:1].expand(len(x), -1, -1, -1), lambda x, y: torch.full_like(x, 128).byte()):
        assert judge(Recall(target))[0] > 1e-3


def test_same_samples_at_every_call(data, encoder):
    judge = evaluation(data, encoder, eval_batch_size=30)
    seen = []

    def target(x, y):
        seen.append((x, y))
        return by_label(x, y)

    results = [judge(Recall(target)) for _ in range(2)]
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert len(seen[0][0].flatten(1).unique(dim=0)) == 30               # all different noises
    evaluation(data, encoder, eval_batch_size=30, seed=6)(Recall(target))
    assert not torch.equal(seen[0][0], seen[2][0]) and not torch.equal(seen[0][1], seen[2][1])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("sampler, steps", [("euler", 1), ("sde", 3)])
def test_processes_add_up_to_one(data, encoder, world, sampler, steps):
    class Elementwise:                                                 # the same for a sample in any batch
        num_classes = 10

        def __call__(self, x, t, y):
            return x - (y.view(-1, 1, 1, 1) / 9 - 0.5), []

    def judge(ranks):
        this = evaluation(data, encoder, ranks, sampler=sampler, sample_steps=steps)
        return this.labels, this(Elementwise())

    alone, together = Group(1), Group(world)
    (labels, (distance, _)), = alone.run(judge)
    for file in data.folder.glob("statistics-*.pt"):                   # so that the reference is shared out as well
        file.unlink()
    results = together.run(judge)
    reference, samples = together.reduced
    assert (reference[0], samples[0]) == (len(data), 30)
    torch.testing.assert_close(reference, alone.reduced[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(samples, alone.reduced[1], rtol=1e-5, atol=1e-4)
    for other_labels, (other_distance, _) in results:
        assert torch.equal(other_labels, labels)
        assert other_distance == pytest.approx(distance, rel=1e-3)
    assert len(list(data.folder.glob("statistics-*.pt"))) == 1


def test_more_processes_than_samples(data, encoder):
    evaluation(data, encoder)                                          # so that only the samples are shared out
    group = Group(4)
    results = group.run(lambda ranks: evaluation(data, encoder, ranks, eval_samples=3)(Recall(by_label)))
    assert group.reduced[0][0] == 3
    assert len({distance for distance, _ in results}) == 1


def test_labels_are_as_frequent_as_in_the_training_set(data, encoder):
    data.labels = torch.tensor([1] * 60 + [7] * 30)
    labels = evaluation(data, encoder, eval_samples=3000).labels
    assert set(labels.tolist()) == {1, 7}
    # 2000 of 3000 expected; the standard deviation is 26.
    assert (labels == 1).sum().item() == pytest.approx(2000, abs=5 * 26)
    assert 600 < (labels[:1000] == 1).sum().item() < 730               # in random order


@pytest.mark.parametrize("samples, rows, columns", [(9, 3, 3), (12, 4, 3), (70, 8, 8)])
def test_grid_is_ordered_by_label(data, encoder, samples, rows, columns):
    judge = evaluation(data, encoder, eval_samples=samples)
    _, grid = judge(Recall(by_label))
    side, step = 32, 34                                                # 8 pixels magnified 4 times, and a margin of 2
    assert grid.shape == (3, rows * step + 2, columns * step + 2) and grid.dtype == torch.uint8
    levels = []
    for row in range(rows):
        for column in range(columns):
            top, left = 2 + step * row, 2 + step * column
            tile = grid[:, top:top + side, left:left + side]
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
        assert torch.equal(grid[:, top:top + 32:4, left:left + 32:4], images[i])
        assert torch.equal(grid[:, top + 3:top + 32:4, left + 3:left + 32:4], images[i])

"""The evaluation during training, with few samples and small judges."""

import contextlib
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from config import Config
from dataset import prepare
from dataset.inputs import Inputs
from dataset.prepared import PreparedImages
from eval import features, online
from eval.features import PooledFeatures
from eval.metrics import frechet_distance
from eval.online import OnlineEvaluation
from eval.samplers import IndexedNoise, draw
from models.autoencoder import load_autoencoder
from models.encoders import FrozenEncoder
from runtime import Ranks, Use, derive_seed
from tests.conftest import Group, save_tiny_encoder
from tests.test_metrics import NarrowInception
from tests.test_samplers import coefficients


class Recall:
    """The exact velocity towards one image per label or per sample: target(noise, y) gives uint8 (B, 3, H, W)."""

    step_times = ()

    def null(self, count):
        return torch.full((count,), 10)

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
def judge_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "tiny"
    save_tiny_encoder(folder, seed=3)
    return folder


@pytest.fixture
def data(folder):
    """The prepared images, without statistics of an earlier test."""
    for file in folder.glob("statistics-*"):
        file.unlink()
    return PreparedImages(folder)


@pytest.fixture
def evaluation(data, judge_folder):
    def build(ranks=None, aligned=(), **changes):
        settings = {
            "data": str(data.folder),
            "seed": 5,
            "eval_samples": 30,
            "eval_batch_size": 7,
            "sampler": "euler",
            "sample_steps": 1,
        }
        config = Config(**settings | {"eval_encoder": (str(judge_folder),)} | changes)
        inputs, ranks = Inputs(config, ranks or Ranks()), ranks or Ranks()
        inputs.encoders = aligned
        return OnlineEvaluation(config, ranks, inputs, contextlib.nullcontext)

    return build


def all_images(data):
    return data.__getitems__(range(len(data)))["images"]


def moments(vectors):
    vectors = vectors.double().numpy()
    return torch.from_numpy(vectors.mean(0)), torch.from_numpy(np.cov(vectors, rowvar=False))


def distance_to(judge, model):
    return judge(model)[0]["frechet_distance"]


# ---- the reference ----


def test_reference_is_of_all_training_images_and_kept(data, evaluation, judge_folder, tmp_path, monkeypatch):
    first = evaluation()
    assert not list(data.folder.glob("statistics-*"))  # nothing is written before the run may write
    distance = distance_to(first, Recall(by_label))
    mean, covariance = first.judges[0].reference
    expected = moments(PooledFeatures(str(judge_folder))(all_images(data))["pooled"])
    np.testing.assert_allclose(mean, expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(covariance, expected[1], rtol=1e-3, atol=1e-5)
    (file,) = data.folder.glob("statistics-*")
    assert file.name == f"statistics-{first.fingerprints[0]}.pt"
    with monkeypatch.context() as patch:
        patch.setattr(PreparedImages, "__getitems__", lambda *arguments: pytest.fail("the images were read again"))
        assert distance_to(evaluation(), Recall(by_label)) == distance
        save_tiny_encoder(tmp_path / "other", seed=1)  # the reference belongs to the judge: another one needs its own
        with pytest.raises(pytest.fail.Exception):
            distance_to(evaluation(eval_encoder=(str(tmp_path / "other"),)), Recall(by_label))


def test_reference_of_a_large_set_takes_part_of_it(data, evaluation, judge_folder, monkeypatch):
    monkeypatch.setattr(online, "REFERENCE_IMAGES", 20)
    group = Group(1)
    group.run(lambda ranks: evaluation(ranks)(Recall(by_label)))
    sums = group.reduced[0]
    assert sums[0] == 20
    # Taken from all over the folder, which may be sorted by class: not the first twenty.
    first = PooledFeatures(str(judge_folder))(all_images(data)[:20])["pooled"].double().sum(0)
    assert not torch.allclose(sums[1:25], first, rtol=1e-3)


@pytest.mark.parametrize(
    "where, error", [("runtime.open", OSError(30, "read-only")), ("torch.save", RuntimeError("no"))]
)
def test_a_folder_that_cannot_be_written_to_costs_time_alone(data, evaluation, capsys, monkeypatch, where, error):
    def refuse(*arguments):
        raise error

    judge = evaluation()
    monkeypatch.setattr(where, refuse, raising=False)
    assert distance_to(judge, Recall(by_label)) > 0
    assert f"is not kept for later runs: {error}" in capsys.readouterr().out
    assert not list(data.folder.glob("statistics-*"))


@pytest.mark.parametrize("content", [pickle.dumps(os.getpid, protocol=2), {"sums": torch.zeros(3)}])
def test_statistics_of_another_kind_are_refused_at_once(data, evaluation, content):
    distance_to(evaluation(), Recall(by_label))
    (file,) = data.folder.glob("statistics-*")
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match=file.name) as error:
        evaluation()
    assert "\n" not in str(error.value)


def test_interrupted_evaluations_say_nothing(evaluation):
    judge = evaluation()
    for answers in (3, 15):  # in the reference of 13 batches, and in the samples
        flags = iter([False] * (answers - 1) + [True])
        assert judge(Recall(by_label), interrupted=lambda: next(flags)) == (None, None)  # noqa: B023 - called at once
    assert judge(Recall(by_label))[0].keys() == {"frechet_distance"}


# ---- samples ----


def test_model_that_recalls_the_training_images_has_distance_zero(data, evaluation):
    """Each sample is the training image of its index, recognised by its noise: the same set of images."""
    count, images, asked = len(data), all_images(data), {}
    judge = evaluation(eval_samples=count, eval_batch_size=16)
    seeds = [derive_seed(5, Use.SAMPLE, i) for i in range(count)]
    index = {value.item(): i for i, value in enumerate(IndexedNoise(seeds, (3, 8, 8), "cpu")()[:, 0, 0, 0])}

    def recalled(x, y):
        rows = [index[value.item()] for value in x[:, 0, 0, 0]]
        asked.update(zip(rows, y.tolist()))
        return images[rows]

    assert distance_to(judge, Recall(recalled)) == pytest.approx(0, abs=1e-5)
    assert asked == dict(enumerate(judge.labels.tolist()))
    # A model of one image, or of grey ones, is far from that.
    for target in (lambda x, y: images[:1].expand(len(x), -1, -1, -1), lambda x, y: torch.full_like(x, 128).byte()):
        assert distance_to(judge, Recall(target)) > 1e-3


def test_same_samples_at_every_call(evaluation):
    judge, seen = evaluation(eval_batch_size=30), []

    def target(x, y):
        seen.append((x, y))
        return by_label(x, y)

    results = [judge(Recall(target)) for _ in range(2)]
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert len(seen[0][0].flatten(1).unique(dim=0)) == 30  # all different noises
    evaluation(eval_batch_size=30, seed=6)(Recall(target))
    assert not torch.equal(seen[0][0], seen[2][0]) and not torch.equal(seen[0][1], seen[2][1])


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "euler", "cfg_scale": 3.0},
        {"sampler": "sde", "path": "cosine"},
        {"sampler": "heun", "cfg_scale": 2.0, "guidance_interval": (0.3, 0.8)},
        {"sampler": "euler", "sample_shift": 3.0},
    ],
    ids=str,
)
def test_samples_are_drawn_as_the_options_say(evaluation, changes):
    """Against the samplers themselves, which tests/test_samplers.py compares with closed forms."""

    class Smooth:
        step_times = ()

        def null(self, count):
            return torch.full((count,), 10)

        def __call__(self, x, t, y):
            return (0.2 * y - t).view(-1, 1, 1, 1) * x, []

    judge, seeds = evaluation(sample_steps=4, **changes), [derive_seed(5, Use.SAMPLE, i) for i in (2, 3, 4)]
    changes = {"time_shift" if name == "sample_shift" else name: value for name, value in changes.items()}
    x = draw(Smooth(), seeds, (3, 8, 8), judge.labels[2:5], num_steps=4, **changes)
    assert torch.equal(judge.sample(Smooth(), range(2, 5)), load_autoencoder("pixels").decode(x))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("sampler, steps", [("euler", 1), ("sde", 3)])
def test_processes_add_up_to_one(data, evaluation, world, sampler, steps):
    class Elementwise:  # the same for a sample in any batch
        step_times = ()

        def null(self, count):
            return torch.full((count,), 10)

        def __call__(self, x, t, y):
            return x - (y.view(-1, 1, 1, 1) / 9 - 0.5), []

    def judge(ranks):
        this = evaluation(ranks, sampler=sampler, sample_steps=steps)
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
    assert len(list(data.folder.glob("statistics-*"))) == 1


def test_more_processes_than_samples_and_one_that_has_no_reference(evaluation):
    group, expected = Group(4), distance_to(evaluation(eval_samples=3), Recall(by_label))

    def judge(ranks):
        this = evaluation(ranks, eval_samples=3)
        this.judges[0].reference = None if ranks.rank == 2 else this.judges[0].reference
        return distance_to(this, Recall(by_label))

    assert group.run(judge) == pytest.approx([expected] * 4, rel=1e-3)
    assert group.reduced[1][0] == 3  # all compute the reference first, together


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_loss_on_held_out_images(data, evaluation, path):
    """Of a model with a known velocity: the closed form, whatever seed, batches and processes."""

    class Linear(Recall):
        def __call__(self, x, t, y):
            return 2 * x + y.view(-1, 1, 1, 1), []

    def judge(ranks, seed=5):
        return evaluation(ranks, held_out=11, path=path, seed=seed)._held_out_loss(Linear(None))

    held_out, errors = PreparedImages(data.folder, held_out=11, training=False), []
    for i, (image, label) in enumerate(zip(all_images(held_out), held_out.labels)):
        generator = torch.Generator().manual_seed(derive_seed(0, Use.HELD_OUT, i))
        _, noise = (torch.randn(3, 8, 8, generator=generator) for _ in range(2))  # the first is for latents
        t, x = (i + 1) * (5**0.5 - 1) / 2 % 1, image / 127.5 - 1
        alpha, sigma, falls, rises = coefficients(t, path)
        errors.append((2 * (alpha * x + sigma * noise) + label - falls * x - rises * noise).square().mean())
    expected = torch.stack(errors).mean().item()
    assert judge(None) == judge(None, seed=6) == pytest.approx(expected, rel=1e-5)
    assert Group(3).run(judge) == [pytest.approx(expected, rel=1e-5)] * 3


def test_labels_are_as_frequent_as_in_the_training_set(data, evaluation, monkeypatch):
    data.labels = torch.tensor([1] * 60 + [7] * 30)
    monkeypatch.setattr(online, "PreparedImages", lambda folder, **options: data)
    labels = evaluation(eval_samples=3000).labels
    assert set(labels.tolist()) == {1, 7}
    # 2000 of 3000 expected; the standard deviation is 26.
    assert (labels == 1).sum().item() == pytest.approx(2000, abs=5 * 26)
    assert 600 < (labels[:1000] == 1).sum().item() < 730  # in random order


@pytest.mark.parametrize("samples, rows, columns", [(9, 3, 3), (12, 4, 3), (70, 8, 8)])
def test_grid_is_ordered_by_label(evaluation, samples, rows, columns):
    judge = evaluation(eval_samples=samples)
    _, grid = judge(Recall(by_label))
    side, step = 32, 34  # 8 pixels magnified 4 times, and a margin of 2
    assert grid.shape == (3, rows * step + 2, columns * step + 2) and grid.dtype == torch.uint8
    corners = [(2 + step * row, 2 + step * column) for row in range(rows) for column in range(columns)]
    tiles = [grid[:, top : top + side, left : left + side] for top, left in corners]
    assert all((tile == tile[0, 0, 0]).all() for tile in tiles)
    levels = [tile[0, 0, 0].item() for tile in tiles]
    assert levels == (20 * judge.labels[:64].sort().values).tolist() and len(set(levels)) > 3


# ---- judges ----


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("given", [False, True])
def test_fid_of_the_first_samples_and_of_all(data, evaluation, judge_folder, monkeypatch, world, given):
    """At each count it is the distance of exactly the first so many samples, whoever makes them, beside the other."""
    monkeypatch.setattr(online, "FID_AT", (8, 21, 30, 50))
    monkeypatch.setattr(features, "InceptionFeatures", NarrowInception)
    judged, other = NarrowInception(), torch.from_numpy(np.random.default_rng(0).normal(size=(40, 7)))
    monkeypatch.setattr(online, "npz_statistics", lambda path, network: {"pool3": moments(other)})

    def flat(x, y):  # a grey level of its own for each sample
        return (128 + 40 * x[:, :1, :1, :1]).clamp(0, 255).to(torch.uint8).expand(-1, 3, 8, 8)

    changes = {"eval_encoder": ("inception", str(judge_folder)), "fid_reference": __file__ if given else ""}
    noise = IndexedNoise([derive_seed(5, Use.SAMPLE, i) for i in range(30)], (3, 8, 8), "cpu")()
    found = judged(flat(noise, None))["pool3"]
    against = moments(other if given else judged(all_images(data))["pool3"])
    expected = {
        name: frechet_distance(*moments(found[:count]), *against)
        for name, count in (("fid_8", 8), ("fid_21", 21), ("fid", 30))
    }
    for distances, _ in Group(world).run(lambda ranks: evaluation(ranks, **changes)(Recall(flat))):
        assert distances.pop("frechet_distance") > 0
        assert distances == pytest.approx(expected, rel=1e-4)


def test_a_judge_that_runs_are_aligned_to_says_so_or_is_refused(evaluation, judge_folder, tmp_path, monkeypatch):
    """Known by its name in the study's options, also to arms without alignment, or by its weights under any name."""
    shutil.copytree(judge_folder, tmp_path / "copy")
    save_tiny_encoder(tmp_path / "other", seed=1)
    encoder, other = FrozenEncoder(str(tmp_path / "copy"), 2), FrozenEncoder(str(tmp_path / "other"), 4)
    other.model.pos_embed.copy_(PooledFeatures(str(judge_folder)).network.pos_embed)  # as fixed sines would be equal
    assert evaluation(aligned=[other]).judges[0].counts == {"frechet_distance": 30}
    monkeypatch.chdir(judge_folder.parent)
    for changes in ({"aligned": [encoder]}, {"encoder": ("dinov2-vit-b", f"./{judge_folder.name}/")}):
        with pytest.raises(ValueError, match="runs are aligned to it.*standin_encoder.*--kind convnet.*--eval-aligned"):
            evaluation(**changes)
        both = (str(judge_folder), str(tmp_path / "other"))
        judge = evaluation(eval_aligned=True, eval_encoder=both, **changes)
        assert judge(Recall(by_label))[0].keys() == {"frechet_distance_aligned", "frechet_distance"}


def test_judges_that_cannot_be_used(evaluation, judge_folder, tmp_path, monkeypatch):
    save_tiny_encoder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="two of them log frechet_distance"):
        evaluation(eval_encoder=(str(judge_folder), str(tmp_path / "other")))
    with pytest.raises(ValueError, match="'no-such-network' cannot judge"):
        evaluation(eval_encoder=("no-such-network",))
    monkeypatch.setattr(features, "InceptionFeatures", NarrowInception)
    np.savez(tmp_path / "images.npz", np.zeros((4, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "kept.npz", mu=0, sigma=0, mu_s=0, sigma_s=0, inception_sha256="sharp")
    for name, message in (
        ("nowhere.npz", "nowhere.npz': there is no such file"),
        ("images.npz", "images.npz' holds no statistics.*--save-reference"),
        ("kept.npz", "kept.npz' was made with the Inception weights sharp, not 0000"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation(eval_encoder=("inception",), fid_reference=str(tmp_path / name))

"""FID, sFID, IS, precision and recall of generated images, and FD-DINOv2, in one pass over them.

    python -m eval.metrics samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python -m eval.metrics samples/ --reference data/cifar10 --inception FILE --fd-dinov2
    torchrun --nproc_per_node=8 -m eval.metrics samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python -m eval.metrics student-1.npz student-4.npz --reference teacher.npz --judge data/digits/judge

SAMPLES is an npz (arr_0: uint8 NHWC; arr_1: labels, if any), a folder of png or jpg, or a folder of dataset.prepare.
An npz is read whole by each process: 50 000 images of 256 x 256 pixels take 10 GB each time.
The reference is the npz of ADM's evaluator (arr_0, mu, sigma, mu_s, sigma_s) or anything that can be SAMPLES, whose
statistics are then computed; --save-reference keeps them in such an npz. Prints a table, and writes the numbers with
all that they depend on to SAMPLES.metrics.json. With --judge another network takes Inception's place: its Fréchet
distance, precision and recall compare with no other network's.

The definitions are those of ADM's TensorFlow evaluator (github.com/openai/guided-diffusion, evaluations/evaluator.py),
computed by torch-fidelity where it has them. sFID is ours, and so is the Fréchet distance: the library wants all
features at once, and takes eigenvalues of a product that is not symmetric. FID during training is in eval/online.py.

Shapes: N images, B batch, H, W pixels, D features.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from sklearn.neighbors import KNeighborsClassifier
from tqdm import tqdm

import models  # noqa: F401 - before torch_fidelity, which imports torchvision: see its docstring
from torch_fidelity import metric_isc, metric_prc

from dataset.prepared import load_batches
from eval import features
from eval.images import open_images, read_npz
from runtime import Ranks, environment, plain_errors, replaced, table, tf32, write_json

IS_CHUNK = 5000  # the score is the mean over chunks of so many consecutive images
NEIGHBOURS = 3  # of precision and recall
CLASSIFYING = 5  # nearest neighbours that tell a sample's label
REFERENCE_ROWS = 10_000  # images of the reference that precision and recall look at
COMPARABLE = 50_000  # samples behind the published numbers
DISTANCES = {"pool3": "fid", "spatial": "sfid", "dinov2": "fd_dinov2", "pooled": "frechet_distance"}
# Keys in ADM's reference and the features that they are the mean and the covariance of.
STATISTICS = {"pool3": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
LIBRARIES = ("torch", "torchvision", "torch-fidelity", "timm", "numpy", "pillow")


@dataclass(frozen=True)
class Options:
    samples: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """npz, folders of images, or folders of dataset.prepare, each judged by itself."""
    reference: Path
    """ADM's reference npz, or images as for SAMPLES."""
    inception: str = ""
    """Weights file of torch-fidelity's Inception v3; downloaded once if not given."""
    judge: str = "inception"
    """The network that judges: Inception, or another one, timm:NAME or a folder, as --eval-encoder of the training."""
    label_accuracy: bool = False
    """Also how many of the samples have the label that most of their nearest neighbours in the reference have, in the
    judge's space. Both need labels of the same meaning: of classes, or of prompts that are in the order of classes."""
    fd_dinov2: bool = False
    """Also the Fréchet distance between class tokens of DINOv2."""
    dinov2: str = "dinov2-vit-l"
    """DINOv2 as a name or folder, as --encoder of the training."""
    dinov2_weights: str = ""
    """Local weights of it; downloaded if not given."""
    batch_size: int = 64
    """Images that the networks of one process take at a time."""
    num_workers: int = 2
    """Processes that read images, for each of the processes that compute."""
    save_reference: str = ""
    """npz to keep the statistics of reference images in, for use as --reference."""
    out: str = ""
    """JSON file to write; SAMPLES.metrics.json if not given. For one SAMPLES only."""


def main(argv: list | None = None):
    options = tyro.cli(Options, args=argv, prog="python -m eval.metrics", description=__doc__)
    with Ranks() as ranks, plain_errors(ValueError, OSError):
        run(options, ranks)


def run(options: Options, ranks: Ranks):
    """The whole command. Raises ValueError on input that cannot be judged."""
    kept = options.save_reference
    for name, low in (("batch_size", 1), ("num_workers", 0)):
        if getattr(options, name) < low:
            raise ValueError(f"{name} = {getattr(options, name)}: must be at least {low}")
    if kept and not kept.endswith(".npz"):
        raise ValueError(f"save_reference = {kept!r}: must end in .npz")
    if not options.samples:
        raise ValueError("samples = (): give npz files or folders to judge")
    if options.out and len(options.samples) != 1:
        raise ValueError(f"out = {options.out!r}: one file for {len(options.samples)} SAMPLES; leave it out")
    inception = options.judge == "inception"
    with ranks.one_first():
        if not inception:
            network = features.PooledFeatures(options.judge).to(ranks.device)
            facts = {"judge": {"name": options.judge, "fingerprint": network.fingerprint}}
        else:
            network = features.InceptionFeatures(options.inception).to(ranks.device)
            made = {"file": network.file.name, "sha256": network.sha256, "published": network.is_published}
            facts = {"inception": made}
        networks = [network]
        if options.fd_dinov2:
            dinov2 = features.DinoV2Features(options.dinov2, options.dinov2_weights).to(ranks.device)
            networks.append(dinov2)
            facts["dinov2"] = {"name": dinov2.name, "fingerprint": dinov2.encoder.fingerprint}
            facts["dinov2"]["position_embedding"] = dinov2.position_embedding
    known = npz_statistics(options.reference, network) if inception and options.reference.is_file() else {}
    if kept and (known or not inception):
        problem = f"{str(options.reference)!r} has its own" if inception else "holds Inception's statistics"
        raise ValueError(f"save_reference = {kept!r}: {problem}")
    images = open_images(options.reference)
    if options.label_accuracy and images.labels is None:
        raise ValueError(f"label_accuracy = True: {str(options.reference)!r} has no labels; leave it out")

    def batches(source, what):
        return read(source, options.batch_size, ranks, options.num_workers, what)

    common = networks, ranks, options.batch_size
    labels = images.labels if options.label_accuracy else None
    reference = reference_of(batches(images, "reference"), len(images), known, *common, labels)
    if kept and ranks.main:
        save_reference(kept, reference, images, network)
        print(f"reference kept in {kept}")
    facts |= {
        "reference": {
            "path": str(options.reference),
            "statistics": "of the file" if known else "computed",
            "images": len(images),
            "precision_recall_images": len(reference.chosen),
        },
        "precision": "float32 without TF32; statistics in float64",
        "batch_size": options.batch_size,
        "versions": {name: version(name) for name in LIBRARIES},
        "environment": environment(ranks),
    }
    rows = []
    for path in options.samples:
        samples = open_images(path)  # one at a time, as an npz is held in memory
        if labels is not None and samples.labels is None:
            raise ValueError(f"label_accuracy = True: {str(path)!r} has no labels; leave it out")
        metrics, warnings = measure(batches(samples, str(path)), len(samples), reference, *common, samples.labels)
        if not ranks.main:
            continue
        if samples.size != images.size:
            own, other = (f"{source.size[0]} x {source.size[1]}" for source in (samples, images))
            warnings.append(f"samples are {own} pixels, the reference's images {other}: resizing differs too")
        if inception and not network.is_published:
            unknown = f"{network.file} is not the published Inception file (by its checksum)"
            warnings.append(f"{unknown}: numbers compare only with others of the same file")
        warnings += samples.warnings + [f"reference: {warning}" for warning in images.warnings]
        report(path, samples, metrics, warnings, facts, options)
        seconds = "unknown" if samples.seconds is None else f"{samples.seconds:.3g}"
        rows.append([path, *(f"{value:.4g}" for value in metrics.values()), seconds])
    if len(rows) > 1:
        print(table(["samples", *metrics, "seconds for 1000"], rows))


def report(path: Path, samples, metrics: dict, warnings: list, facts: dict, options: Options):
    """Print the metrics of one set of samples, and write them with `facts`, all that they depend on."""
    print(f"{len(samples)} samples of {path} against {options.reference}")
    for name, value in metrics.items():
        print(f"  {name:28} {value:.5f}")
    for warning in warnings:
        print(f"warning: {warning}")
    whole = path.resolve()
    target = Path(options.out) if options.out else whole.with_name(f"{whole.name}.metrics.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    made = {"path": str(path), "count": len(samples), "size": list(samples.size)}
    made |= {"uint8_conversion": samples.uint8_conversion, "settings": samples.settings}
    write_json(target, {"metrics": metrics, "warnings": warnings, "samples": made, **facts})
    print(f"written to {target}")


# ---- what the numbers are computed from ----


class FeatureStatistics:
    """Count, mean and covariance of feature vectors that come in batches.

    All of it is in one float64 vector `sums`, which several processes may add up.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.sums = torch.zeros(1 + dim + dim * dim, dtype=torch.float64, device=device)
        self.dim = dim

    def update(self, features: torch.Tensor):
        """features: (B, dim)."""
        features = features.double()
        self.sums[0] += len(features)
        self.sums[1 : 1 + self.dim] += features.sum(0)
        self.sums[1 + self.dim :] += (features.T @ features).flatten()

    def mean_and_covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(dim) and (dim, dim), the covariance with n - 1. Raises ValueError for fewer than two vectors."""
        count, total, outer = self.sums.split([1, self.dim, self.dim**2])
        if count < 2:
            raise ValueError(f"{int(count)} feature vectors have no covariance; at least 2 are needed")
        mean = total / count
        return mean, (outer.view(self.dim, self.dim) - count * torch.outer(mean, mean)) / (count - 1)


def collect(batches, count, networks, ranks, batch_size, statistics, rows, chosen=None) -> tuple[dict, dict]:
    """Features of `count` images that all processes work through together, in the order of the images.

    batches:    uint8 (B, 3, H, W), this process's of each round of world * batch_size images (see `shares`), or None
                where none is left for it: equally many for all processes.
    networks:   modules that take uint8 images to a dict of features, with their widths in `dims`.
    statistics: names of the features whose mean and covariance are wanted. They are those of one process to the last
                bit: each process adds up all batches, one after the other.
    rows:       names of the features that the main process keeps: of all images, or of those `chosen`.
    Returns ({name: (mean, covariance)}, {name: (N, D) on the main process, (0, D) on others}).
    """
    dims = {name: dim for network in networks for name, dim in network.dims.items()}
    sums = {name: FeatureStatistics(dims[name], ranks.device) for name in statistics}
    kept = {name: [torch.zeros(0, dims[name])] for name in rows}
    chosen, first = np.arange(count) if chosen is None else chosen, 0
    for images in batches:
        parts = torch.zeros(ranks.world, batch_size, sum(dims.values()), device=ranks.device)
        if images is not None:
            found = {name: value for network in networks for name, value in network(images.to(ranks.device)).items()}
            parts[ranks.rank, : len(images)] = torch.cat([found[name] for name in dims], 1)
        ranks.sum(parts)  # each process has filled its own part; x + 0 is exactly x
        for batch in parts.flatten(0, 1)[: count - first].split(batch_size):  # only the last one may be smaller
            found = dict(zip(dims, batch.split(list(dims.values()), 1)))
            for name, each in sums.items():
                each.update(found[name])
            wanted = chosen[(chosen >= first) & (chosen < first + len(batch))] - first
            for name, each in kept.items() if ranks.main else ():
                each.append(found[name].cpu()[wanted])
            first += len(batch)
    return (
        {name: each.mean_and_covariance() for name, each in sums.items()},
        {name: torch.cat(each) for name, each in kept.items()},
    )


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: {features' name: (mean, covariance)}, and on the main process the first network's
    features (n, D) of the images `chosen`, and their labels (n) if the accuracy of the samples' labels is wanted."""

    statistics: dict
    rows: torch.Tensor
    chosen: np.ndarray
    labels: np.ndarray | None = None


def reference_of(
    batches: Iterable, count: int, known: dict, networks: list, ranks: Ranks, batch_size: int, labels=None
) -> Reference:
    """The reference of `count` images in `batches`, as for `collect`. known: statistics that need no computing.

    labels: (N), if the accuracy of the samples' labels is wanted.
    """
    enough(count, "images of the reference")
    main = next(iter(networks[0].dims))
    names = {name for network in networks for name in network.dims} - {"logits"} - known.keys()
    # Spread at random, as a folder may be sorted by class; ADM's file has exactly so many.
    chosen = np.sort(np.random.default_rng(0).permutation(count)[:REFERENCE_ROWS])
    computed, rows = collect(batches, count, networks, ranks, batch_size, sorted(names), (main,), chosen)
    return Reference(known | computed, rows[main], chosen, None if labels is None else labels[chosen])


def measure(
    batches: Iterable, count: int, reference: Reference, networks: list, ranks: Ranks, batch_size: int, labels=None
) -> tuple[dict, list]:
    """All metrics of the `count` images in `batches`, as for `collect`: (numbers, warnings); ({}, []) but on main.

    labels: (N) classes asked for, where known; the accuracy of labels needs them.
    Raises ValueError for fewer than 4 samples, or features that are not finite.
    """
    enough(count, "samples")
    names, main = sorted(reference.statistics), next(iter(networks[0].dims))
    kept = [main, "logits"] if "logits" in networks[0].dims else [main]
    found, rows = collect(batches, count, networks, ranks, batch_size, names, kept)
    if not ranks.main:
        return {}, []
    metrics = {
        metric: frechet_distance(*found[name], *reference.statistics[name])
        for name, metric in DISTANCES.items()
        if name in found
    }
    metrics["precision"], metrics["recall"] = precision_and_recall(rows[main], reference.rows, ranks.device)
    if reference.labels is not None:
        classifier = KNeighborsClassifier(min(CLASSIFYING, len(reference.rows))).fit(
            reference.rows.numpy(), reference.labels
        )
        metrics["label_accuracy"] = float(classifier.score(rows[main].numpy(), labels))
    warnings, published = [], main == "pool3"
    if published:
        metrics["inception_score"], metrics["inception_score_std"] = inception_score(rows["logits"])
    if published and count < COMPARABLE:
        warnings.append(f"{count} samples: distances grow as samples get fewer; published ones are of {COMPARABLE}")
    if published and count < IS_CHUNK:
        warnings.append(f"the inception score is of one chunk of {count} samples instead of {IS_CHUNK}: it is too low")
    elif published and count % IS_CHUNK:
        warnings.append(f"{count} samples are no multiple of {IS_CHUNK}: the inception score's chunks are larger")
    if len(reference.rows) < REFERENCE_ROWS:
        warnings.append(f"precision and recall are against {len(reference.rows)} images instead of {REFERENCE_ROWS}")
    if published and count >= 2 * IS_CHUNK and class_ordered(rows["logits"].argmax(1) if labels is None else labels):
        source = "predicted classes" if labels is None else "labels"
        warnings.append(
            f"the samples look ordered by class (by their {source}): the inception score is of "
            "consecutive chunks, and wrong unless classes are in random order"
        )
    return metrics, warnings


# ---- definitions ----


def frechet_distance(
    mean_a: torch.Tensor, covariance_a: torch.Tensor, mean_b: torch.Tensor, covariance_b: torch.Tensor
) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)   (Heusel et al. 2017, Eq. 6).

    Square roots by eigenvalues, so that rank-deficient covariances (fewer samples than dimensions) are exact too.
    Means (dim), covariances (dim, dim). Raises ValueError where shapes differ or a value is not finite.
    """
    parts = [part.double().cpu() for part in (mean_a, covariance_a, mean_b, covariance_b)]
    mean_a, covariance_a, mean_b, covariance_b = parts
    if mean_a.shape != mean_b.shape or covariance_a.shape != covariance_b.shape:
        raise ValueError(f"feature widths differ: {tuple(mean_a.shape)} and {tuple(mean_b.shape)}")
    if not all(part.isfinite().all() for part in parts):
        raise ValueError("features are not finite, so they have no Fréchet distance")
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross)


def inception_score(logits: torch.Tensor) -> tuple[float, float]:
    """exp E KL(p(y|x) || p(y)) (Salimans et al. 2016): mean and deviation over chunks of consecutive images.

    logits: (N, D), without bias, in the order of the images.
    """
    found = metric_isc.isc_features_to_metric(logits, splits=max(1, len(logits) // IS_CHUNK), shuffle=False)
    return found[metric_isc.KEY_METRIC_ISC_MEAN], found[metric_isc.KEY_METRIC_ISC_STD]


def precision_and_recall(generated: torch.Tensor, real: torch.Tensor, device="cpu") -> tuple[float, float]:
    """Shares of images no further from one of the other set than its 3rd neighbour (Kynkäänniemi et al. 2019, Eq. 2).

    generated, real: pool3 (N, D). ADM's evaluator computes distances in float16, which moves both by about 0.002.
    """
    options = dict(prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    with tf32(False):
        found = metric_prc.prc_features_to_metric(generated.float().to(device), real.float().to(device), **options)
    return found[metric_prc.KEY_METRIC_PRECISION], found[metric_prc.KEY_METRIC_RECALL]


def enough(count: int, what: str):
    if count <= NEIGHBOURS:
        raise ValueError(
            f"{count} {what}: precision and recall need {NEIGHBOURS + 1} at least, and FID of less than "
            "thousands says little"
        )


def class_ordered(labels) -> bool:
    """Whether classes (N) come in order, or neighbours share theirs far more often than in random order."""
    labels = np.asarray(labels)
    shares = np.unique(labels, return_counts=True)[1] / max(1, len(labels))
    if len(labels) < 10 or len(shares) < 2:
        return False
    expected, seen = np.square(shares).sum(), (labels[1:] == labels[:-1]).mean()
    deviation = np.sqrt(expected * (1 - expected) / (len(labels) - 1))
    return bool((labels[1:] >= labels[:-1]).all() or seen - expected > max(6 * deviation, 0.02))


# ---- files, and who reads what ----


def npz_statistics(path: str | Path, inception) -> dict:
    """{features' name: (mean, covariance)} in float64, of ADM's reference; {} where the npz has images alone.

    inception: the network that the statistics must be of, InceptionFeatures.
    Raises ValueError where a part is missing, has the wrong shape, or is of other weights by the file's own word.
    """
    keys = [key for pair in STATISTICS.values() for key in pair]
    found = read_npz(path, *keys, "inception_sha256")
    made_with = str(found.pop("inception_sha256", inception.sha256))
    if missing := [key for key in keys if key not in found]:
        if len(missing) == len(keys):
            return {}
        raise ValueError(
            f"{str(path)!r} lacks {', '.join(missing)}; a reference has arr_0, {', '.join(keys)} (ADM publishes them), "
            "or images alone in arr_0"
        )
    if made_with != inception.sha256:
        raise ValueError(
            f"{str(path)!r} was made with the Inception weights {made_with[:12]}, not {inception.fingerprint} "
            f"({inception.file})"
        )
    for name, pair in STATISTICS.items():
        dim = inception.dims[name]
        for key, shape in zip(pair, ((dim,), (dim, dim))):
            if found[key].shape != shape or found[key].dtype.kind != "f" or not np.isfinite(found[key]).all():
                raise ValueError(
                    f"{str(path)!r}: {key} is {found[key].dtype} {found[key].shape}; it must be finite floats of "
                    f"shape {shape}"
                )
    statistics = {key: torch.from_numpy(value.astype(np.float64)) for key, value in found.items()}
    return {name: tuple(statistics[key] for key in pair) for name, pair in STATISTICS.items()}


def save_reference(path: str, reference: Reference, images, inception):
    """Keep a computed reference as ADM's evaluator does. The images are those of precision and recall."""
    arrays = {"arr_0": images.__getitems__(reference.chosen).permute(0, 2, 3, 1).numpy()}
    for name, pair in STATISTICS.items():
        arrays |= {key: part.cpu().numpy() for key, part in zip(pair, reference.statistics[name])}
    with replaced(Path(path)) as file:
        np.savez(file, inception_sha256=inception.sha256, **arrays)


def shares(count: int, batch_size: int, ranks: Ranks) -> list[range]:
    """This process's ranges of range(count), one for each round of world * batch_size; the last ones may be empty.

    The r-th process has the r-th batch of each round, so that taking the processes in turn gives the order of one.
    """
    starts = [first + ranks.rank * batch_size for first in range(0, count, batch_size * ranks.world)]
    return [range(min(start, count), min(start + batch_size, count)) for start in starts]


def read(source, batch_size: int, ranks: Ranks, num_workers: int, what: str) -> Iterator:
    """This process's batches of a source, and None where a round has none for it: as `collect` wants them."""
    rounds = shares(len(source), batch_size, ranks)
    mine = [list(indices) for indices in rounds if indices]
    with tqdm(desc=what, total=len(rounds), disable=not ranks.main) as bar:
        for batch in load_batches(source, mine, num_workers):
            yield batch
            bar.update()
        yield from [None] * (len(rounds) - len(mine))


if __name__ == "__main__":
    main()

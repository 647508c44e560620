"""FID, sFID, IS, precision and recall of generated images, and FD-DINOv2, in one pass over them.

    python -m eval.metrics samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python -m eval.metrics samples/ --reference data/cifar10 --inception FILE --fd-dinov2
    torchrun --nproc_per_node=8 -m eval.metrics samples.npz --reference VIRTUAL_imagenet256_labeled.npz

SAMPLES is an npz (arr_0: uint8 NHWC; arr_1: labels, if any), a folder of png or jpg, or a folder of dataset.prepare.
The reference is the npz of ADM's evaluator (arr_0, mu, sigma, mu_s, sigma_s) or anything that can be SAMPLES, whose
statistics are then computed; --save-reference keeps them in such an npz. Prints a table, and writes the numbers with
all that they depend on to SAMPLES.metrics.json.

The definitions are those of ADM's TensorFlow evaluator (github.com/openai/guided-diffusion, evaluations/evaluator.py),
computed by torch-fidelity where it has them. sFID is ours, and so is the Fréchet distance: the library wants all
features at once, and takes eigenvalues of a product that is not symmetric. `measure` takes images from anywhere, also
straight from a sampler. FID during training is in eval/online.py.

Shapes: N images, B batch, H, W pixels, D features.
"""

import functools
import itertools
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.prepared import PreparedImages
from runtime import Ranks, environment, replaced

IS_CHUNK = 5000  # the score is the mean over chunks of so many consecutive images
NEIGHBOURS = 3  # of precision and recall
REFERENCE_ROWS = 10_000  # images of the reference that precision and recall look at
COMPARABLE = 50_000  # samples behind the published numbers
# Keys in ADM's reference and the features that they are the mean and the covariance of.
STATISTICS = {"pool3": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
UNKNOWN_CONVERSION = "unknown: the file does not say how its floats became uint8 (rounded or truncated)"


@dataclass(frozen=True)
class Options:
    samples: Annotated[Path, tyro.conf.Positional]
    """npz, folder of images, or folder of dataset.prepare."""
    reference: Path
    """ADM's reference npz, or images as for SAMPLES."""
    inception: str = ""
    """Weights file of torch-fidelity's Inception v3; downloaded once if not given."""
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
    """JSON file to write; SAMPLES.metrics.json if not given."""


def main(argv=None):
    options = tyro.cli(Options, args=argv, prog="python -m eval.metrics", description=__doc__)
    with Ranks() as ranks:
        try:
            run(options, ranks)
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from None


def run(options, ranks):
    """The whole command. Raises ValueError on input that cannot be judged."""
    from eval.features import DinoV2Features, InceptionFeatures  # here: the trainer can do without torch-fidelity

    if options.batch_size < 1 or options.num_workers < 0:
        raise ValueError(
            f"batch_size = {options.batch_size} must be at least 1, and num_workers = {options.num_workers} at least 0"
        )
    samples = open_images(options.samples)
    statistics, images = open_reference(options.reference)
    if options.save_reference and not options.save_reference.endswith(".npz"):
        raise ValueError(f"save_reference = {options.save_reference!r}: must end in .npz")
    if options.save_reference and statistics:
        raise ValueError(f"save_reference = {options.save_reference!r}: {str(options.reference)!r} has its statistics")
    with ranks.one_first():
        inception = InceptionFeatures(options.inception).to(ranks.device)
        dinov2 = DinoV2Features(options.dinov2, options.dinov2_weights).to(ranks.device) if options.fd_dinov2 else None
    if statistics:
        check_weights(options.reference, inception)
    networks = [inception, *([dinov2] if dinov2 else [])]

    def batches(source, what):
        return read(source, options.batch_size, ranks, options.num_workers, what)

    reference = Reference(statistics, batches(images, "reference"), len(images), networks, ranks, options.batch_size)
    if options.save_reference and ranks.main:
        save_reference(options.save_reference, reference, images, inception)
        print(f"reference kept in {options.save_reference}")
    metrics, warnings = measure(
        batches(samples, "samples"), reference, networks, ranks, options.batch_size, samples.labels
    )
    if not ranks.main:
        return
    if samples.size != images.size:
        warnings.append(
            f"samples are {samples.size[0]} x {samples.size[1]} pixels, the reference's images "
            f"{images.size[0]} x {images.size[1]}: resizing differs too"
        )
    if not inception.is_published:
        warnings.append(
            f"{inception.file} is not the published Inception file (by its checksum): numbers compare only "
            "with others of the same file"
        )
    result = {
        "metrics": metrics,
        "warnings": warnings + samples.warnings,
        "samples": {
            "path": str(options.samples),
            "count": len(samples),
            "size": list(samples.size),
            "uint8_conversion": samples.uint8_conversion,
            "settings": samples.settings,
        },
        "reference": {
            "path": str(options.reference),
            "statistics": "of the file" if statistics else "computed",
            "images": len(images),
            "precision_recall_images": len(reference.chosen),
        },
        "inception": {"file": inception.file.name, "sha256": inception.sha256, "published": inception.is_published},
        "dinov2": dinov2
        and {
            "name": dinov2.name,
            "fingerprint": dinov2.encoder.fingerprint,
            "reference_images": len(images),
            "position_embedding": dinov2.position_embedding,
        },
        "precision": "float32 without TF32; statistics in float64",
        "batch_size": options.batch_size,
        "versions": {
            name: version(name) for name in ("torch", "torchvision", "torch-fidelity", "timm", "numpy", "pillow")
        },
        "environment": environment(ranks),
    }
    target = (
        Path(options.out)
        if options.out
        else options.samples.resolve().with_name(options.samples.resolve().name + ".metrics.json")
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with replaced(target) as file:
        file.write(json.dumps(result, indent=1).encode())
    print(f"{len(samples)} samples of {options.samples} against {options.reference}")
    for name, value in metrics.items():
        print(f"  {name:28} {value:.5f}")
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    print(f"written to {target}")


# ---- what the numbers are computed from ----


class FeatureStatistics:
    """Count, mean and covariance of feature vectors that come in batches.

    All of it is in one float64 vector `sums`, which several processes may add up.
    """

    def __init__(self, dim, device="cpu"):
        self.sums = torch.zeros(1 + dim + dim * dim, dtype=torch.float64, device=device)
        self.dim = dim

    def update(self, features):
        """features: (B, dim)."""
        features = features.double()
        self.sums[0] += len(features)
        self.sums[1 : 1 + self.dim] += features.sum(0)
        self.sums[1 + self.dim :] += (features.T @ features).flatten()

    def mean_and_covariance(self):
        """(dim) and (dim, dim), the covariance with n - 1. Raises ValueError for fewer than two vectors."""
        count, total, outer = (
            self.sums[0],
            self.sums[1 : 1 + self.dim],
            self.sums[1 + self.dim :].view(self.dim, self.dim),
        )
        if count < 2:
            raise ValueError(f"{int(count)} feature vectors have no covariance; at least 2 are needed")
        mean = total / count
        return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)


class SampleFeatures:
    """Features of images that all processes work through together, collected in the order of the images.

    networks:   modules that take uint8 images to a dict of features, with their widths in `dims`.
    batch_size: the most images that a process gives to `update`.
    statistics: names of the features whose mean and covariance are wanted; every process gets the same.
    rows:       names of the features that the main process keeps: all, or those of the images `chosen`, in order.
    """

    def __init__(self, networks, ranks, batch_size, statistics=(), rows=(), chosen=None):
        self.networks, self.ranks, self.batch_size = networks, ranks, batch_size
        self.dims = {name: dim for network in networks for name, dim in network.dims.items()}
        self.statistics = {name: FeatureStatistics(self.dims[name], ranks.device) for name in statistics}
        self.kept, self.chosen, self.count = {name: [] for name in rows}, chosen, 0

    def update(self, images):
        """images: uint8 (B, 3, H, W), this process's of the next world * batch_size, or None where none is left.

        All processes must call it equally often. Statistics are those of one process to the last bit: each process
        adds up all batches, one after the other.
        """
        features = {}
        if images is not None and len(images):
            if len(images) > self.batch_size:
                raise ValueError(f"{len(images)} images at a time are more than batch_size = {self.batch_size}")
            for network in self.networks:
                features |= network(images.to(self.ranks.device))
        for batch in self._of_all_processes(features):
            for name, statistics in self.statistics.items():
                statistics.update(batch[name])
            size = len(batch[next(iter(batch))])
            wanted = slice(None)
            if self.chosen is not None:
                wanted = self.chosen[(self.chosen >= self.count) & (self.chosen < self.count + size)] - self.count
            if self.ranks.main:
                for name, rows in self.kept.items():
                    rows.append(batch[name][wanted].cpu())
            self.count += size

    def _of_all_processes(self, features):
        """One dict of features per process that had images, in the order of the processes."""
        if self.ranks.world == 1:
            return [features] if features else []
        # Each process fills its own part; x + 0 is exactly x. The first column marks rows that are there.
        parts = torch.zeros(self.ranks.world, self.batch_size, 1 + sum(self.dims.values()), device=self.ranks.device)
        if features:
            rows = torch.cat([features[name] for name in self.dims], 1)
            parts[self.ranks.rank, : len(rows), 0] = 1
            parts[self.ranks.rank, : len(rows), 1:] = rows
        self.ranks.sum(parts)
        sizes = parts[:, :, 0].sum(1).int().tolist()
        return [
            dict(zip(self.dims, part[:size, 1:].split(list(self.dims.values()), 1)))
            for part, size in zip(parts, sizes)
            if size
        ]

    def rows(self, name):
        """(N, D) on the main process, (0, D) on the others."""
        return torch.cat([torch.zeros(0, self.dims[name]), *self.kept[name]])


class Reference:
    """What samples are compared with: `statistics` of features by name, and `pool3` of the images `chosen`.

    statistics: mean and covariance by the features' names, as far as they are known; others are computed.
    batches:    the reference's images, `count` in all, as for `measure`.
    """

    def __init__(self, statistics, batches, count, networks, ranks, batch_size):
        names = {name for network in networks for name in network.dims} - {"logits"} - statistics.keys()
        # Spread at random, as a folder may be sorted by class; ADM's file has exactly so many.
        self.chosen = np.sort(np.random.default_rng(0).permutation(count)[:REFERENCE_ROWS])
        features = SampleFeatures(networks, ranks, batch_size, sorted(names), ("pool3",), self.chosen)
        for images in batches:
            features.update(images)
        enough(features.count, "images of the reference")
        self.pool3 = features.rows("pool3")
        computed = {name: found.mean_and_covariance() for name, found in features.statistics.items()}
        self.statistics = statistics | computed


def measure(batches, reference, networks, ranks, batch_size, labels=None):
    """All metrics of the images in `batches`, in one pass: (dict of numbers, list of warnings); ({}, []) but on main.

    batches: uint8 (B, 3, H, W), this process's of each round of world * batch_size images (see `shares`), or None
             where none is left for it: equally many for all processes.
    labels:  (N) classes asked for, where known; they only serve to find out whether IS can be trusted.
    Raises ValueError for fewer than 4 samples, or features that are not finite.
    """
    samples = SampleFeatures(networks, ranks, batch_size, sorted(reference.statistics), ("pool3", "logits"))
    for images in batches:
        samples.update(images)
    enough(samples.count, "samples")
    if not ranks.main:
        return {}, []
    count, logits, warnings = samples.count, samples.rows("logits"), []
    distances = {
        name: frechet_distance(*samples.statistics[name].mean_and_covariance(), *reference.statistics[name])
        for name in reference.statistics
    }
    score, spread = inception_score(logits)
    precision, recall = precision_and_recall(samples.rows("pool3"), reference.pool3, ranks.device)
    metrics = {
        "fid": distances["pool3"],
        "sfid": distances["spatial"],
        "inception_score": score,
        "inception_score_std": spread,
        "precision": precision,
        "recall": recall,
    }
    if "dinov2" in distances:
        metrics["fd_dinov2"] = distances["dinov2"]
    if count < COMPARABLE:
        warnings.append(f"{count} samples: distances grow as samples get fewer; published ones are of {COMPARABLE}")
    if count < IS_CHUNK:
        warnings.append(f"the inception score is of one chunk of {count} samples instead of {IS_CHUNK}: it is too low")
    elif count % IS_CHUNK:
        warnings.append(f"{count} samples are no multiple of {IS_CHUNK}: the inception score's chunks are larger")
    if len(reference.pool3) < REFERENCE_ROWS:
        warnings.append(f"precision and recall are against {len(reference.pool3)} images instead of {REFERENCE_ROWS}")
    if count >= 2 * IS_CHUNK and class_ordered(logits.argmax(1) if labels is None else labels):
        source = "predicted classes" if labels is None else "labels"
        warnings.append(
            f"the samples look ordered by class (by their {source}): the inception score is of "
            "consecutive chunks, and wrong unless classes are in random order"
        )
    return metrics, warnings


# ---- definitions ----


def frechet_distance(mean_a, covariance_a, mean_b, covariance_b):
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)   (Heusel et al. 2017, Eq. 6).

    Square roots by eigenvalues, so that rank-deficient covariances (fewer samples than dimensions) are exact too.
    Means (dim), covariances (dim, dim). Returns a float.
    Raises ValueError where shapes differ or a value is not finite.
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


def inception_score(logits):
    """exp E KL(p(y|x) || p(y)) (Salimans et al. 2016): mean and deviation over chunks of consecutive images.

    logits: (N, D), without bias, in the order of the images.
    """
    from torch_fidelity import metric_isc

    found = metric_isc.isc_features_to_metric(logits, splits=max(1, len(logits) // IS_CHUNK), shuffle=False)
    return found[metric_isc.KEY_METRIC_ISC_MEAN], found[metric_isc.KEY_METRIC_ISC_STD]


def precision_and_recall(generated, real, device="cpu"):
    """Shares of images no further from one of the other set than its 3rd neighbour (Kynkäänniemi et al. 2019, Eq. 2).

    generated, real: pool3 (N, D). ADM's evaluator computes distances in float16, which moves both by about 0.002.
    """
    from torch_fidelity import metric_prc

    from eval.features import full_precision

    enough(min(len(generated), len(real)), "images in a set")
    with full_precision(device):
        found = metric_prc.prc_features_to_metric(
            generated.float().to(device),
            real.float().to(device),
            prc_neighborhood=NEIGHBOURS,
            save_cpu_ram=True,
            verbose=False,
        )
    return found[metric_prc.KEY_METRIC_PRECISION], found[metric_prc.KEY_METRIC_RECALL]


def enough(count, what):
    if count <= NEIGHBOURS:
        raise ValueError(
            f"{count} {what}: precision and recall need {NEIGHBOURS + 1} at least, and FID of less than "
            "thousands says little"
        )


def class_ordered(labels):
    """Whether classes (N) come in order, or neighbours share theirs far more often than in random order."""
    labels = np.asarray(labels)
    shares = np.unique(labels, return_counts=True)[1] / max(1, len(labels))
    if len(labels) < 10 or len(shares) < 2:
        return False
    expected, seen = np.square(shares).sum(), (labels[1:] == labels[:-1]).mean()
    deviation = np.sqrt(expected * (1 - expected) / (len(labels) - 1))
    return bool((labels[1:] >= labels[:-1]).all() or seen - expected > max(6 * deviation, 0.02))


# ---- reading images ----


class ArrayImages:
    """arr_0 of an npz, uint8 (N, H, W, 3), read where it lies unless it is compressed. arr_1 has the labels, if any.

    Where settings.json of `eval.sample` is beside it, `settings` is what the images were drawn with.
    """

    warnings = []

    def __init__(self, path):
        with open_npz(path) as content:
            if "arr_0" not in content.files:
                raise ValueError(
                    f"{str(path)!r} has no arr_0, but {content.files}; images are expected there, uint8 (N, H, W, 3)"
                )
        self.path, self.labels = path, npz_array(path, "arr_1") if "arr_1" in content.files else None
        made = settings_beside(path)
        self.uint8_conversion, self.settings = made.get("uint8", UNKNOWN_CONVERSION), made.get("settings")
        if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[3] != 3:
            raise ValueError(
                f"{str(path)!r}: arr_0 is {self.array.dtype} {self.array.shape}; images must be uint8 (N, H, W, 3)"
            )
        if self.labels is not None and self.labels.shape != (len(self),):
            raise ValueError(
                f"{str(path)!r}: arr_1 is {self.labels.shape}; it must hold one label for each of the "
                f"{len(self)} images"
            )
        self.size = self.array.shape[1:3]

    @functools.cached_property
    def array(self):
        return npz_array(self.path, "arr_0")

    def __getstate__(self):
        """Without the open map, which would be copied whole into each reader process."""
        return {name: value for name, value in vars(self).items() if name != "array"}

    def __len__(self):
        return len(self.array)

    def __getitems__(self, indices):
        return torch.from_numpy(np.array(self.array[indices])).permute(0, 3, 1, 2)


class FolderImages:
    """All png and jpg below a folder, in the order of their paths; subfolders count as classes."""

    def __init__(self, folder):
        self.paths = sorted(
            path for path in Path(folder).rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg")
        )
        if not self.paths:
            raise ValueError(f"{str(folder)!r} has neither png nor jpg in it, and is no folder of dataset.prepare")
        parents = [str(path.parent) for path in self.paths]
        self.labels = np.unique(parents, return_inverse=True)[1] if len(set(parents)) > 1 else None
        with Image.open(self.paths[0]) as image:
            self.size = image.size[::-1]
        self.uint8_conversion, self.settings = UNKNOWN_CONVERSION, None
        lossy = sum(path.suffix.lower() != ".png" for path in self.paths)
        self.warnings = [f"{lossy} images are JPEG, whose losses move FID"] if lossy else []

    def __len__(self):
        return len(self.paths)

    def __getitems__(self, indices):
        with ThreadPoolExecutor(4) as pool:
            return torch.stack(list(pool.map(self._read, indices)))

    def _read(self, index):
        with Image.open(self.paths[index]) as image:
            image = np.array(image.convert("RGB"))
        if image.shape[:2] != self.size:
            raise ValueError(
                f"{str(self.paths[index])!r} is {image.shape[0]} x {image.shape[1]} pixels, the first one "
                f"{self.size[0]} x {self.size[1]}; all must be of one size (dataset.prepare crops them)"
            )
        return torch.from_numpy(image).permute(2, 0, 1)


class FolderOfPrepare:
    uint8_conversion, settings, warnings = "none: images of the data set", None, []

    def __init__(self, folder):
        self.data = PreparedImages(folder)
        self.labels, self.size = self.data.labels.numpy(), (self.data.resolution, self.data.resolution)

    def __len__(self):
        return len(self.data)

    def __getitems__(self, indices):
        return self.data.__getitems__(indices)["images"]


def settings_beside(path):
    """What `eval.sample` has recorded in the folder of its npz, as a dict; empty where it has not."""
    try:
        made = json.loads((Path(path).parent / "settings.json").read_text())
    except (OSError, ValueError):
        return {}
    return made if isinstance(made, dict) and "uint8" in made else {}


def open_images(path):
    """Something with a length, `__getitems__(indices)` -> uint8 (B, 3, H, W), labels (N) or None, and size (H, W)."""
    path = Path(path)
    if path.is_dir():
        if (path / "samples").is_dir():
            raise ValueError(f"{str(path)!r} is a folder of eval.sample; give the npz in it")
        prepared = any((path / name).is_file() for name in ("meta.json", "settings.json"))
        return FolderOfPrepare(path) if prepared else FolderImages(path)
    if not path.is_file():
        raise ValueError(f"there is no {str(path)!r}; give an npz, a folder of images, or one of dataset.prepare")
    return ArrayImages(path)


def open_reference(path):
    """(statistics in the file by the features' names, {} for images alone; its images).

    Raises ValueError where ADM's file lacks a part, or has one of the wrong shape.
    """
    path = Path(path)
    return npz_statistics(path) if path.is_file() else {}, open_images(path)


def npz_statistics(path):
    """Mean and covariance, float64, by the features' names: of ADM's reference; {} where the file has images alone."""
    keys = [key for pair in STATISTICS.values() for key in pair]
    with open_npz(path) as content:
        missing = [key for key in ["arr_0", *keys] if key not in content.files]
        if not any(key in content.files for key in keys):
            return {}
        if missing:
            raise ValueError(
                f"{str(path)!r} lacks {', '.join(missing)}; a reference has arr_0, {', '.join(keys)} "
                "(ADM publishes them), or images alone in arr_0"
            )
    from eval.features import InceptionFeatures

    arrays, found = {key: npz_array(path, key) for key in keys}, {}
    for name, (mean, covariance) in STATISTICS.items():
        dim = InceptionFeatures.dims[name]
        for key, shape in ((mean, (dim,)), (covariance, (dim, dim))):
            if arrays[key].shape != shape or arrays[key].dtype.kind != "f" or not np.isfinite(arrays[key]).all():
                raise ValueError(
                    f"{str(path)!r}: {key} is {arrays[key].dtype} {arrays[key].shape}; it must be finite "
                    f"floats of shape {shape}"
                )
        found[name] = tuple(torch.from_numpy(arrays[key].astype(np.float64)) for key in (mean, covariance))
    return found


def check_weights(path, inception):
    """Raises ValueError where the statistics of an npz are, by its own word, of other Inception weights."""
    made_with = npz_text(path, "inception_sha256")
    if made_with and made_with != inception.sha256:
        raise ValueError(
            f"{str(path)!r} was made with the Inception weights {made_with[:12]}, not "
            f"{inception.fingerprint} ({inception.file})"
        )


def save_reference(path, reference, images, inception):
    """Keep a computed reference as ADM's evaluator does. The images are those of precision and recall."""
    arrays = {
        key: part.cpu().numpy()
        for name, keys in STATISTICS.items()
        for key, part in zip(keys, reference.statistics[name])
    }
    with replaced(Path(path)) as file:
        np.savez(
            file,
            arr_0=images.__getitems__(reference.chosen).permute(0, 2, 3, 1).numpy(),
            inception_sha256=inception.sha256,
            **arrays,
        )


def open_npz(path):
    """np.load of an npz that may hold no Python objects. Raises ValueError for any other file."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{str(path)!r} is not an npz (a zip of arrays); write it with numpy.savez")
    return np.load(path, allow_pickle=False)


def npz_text(path, name):
    """A text in an npz, empty where it has none of this name."""
    with open_npz(path) as content:
        return str(npz_array(path, name)) if name in content.files else ""


def npz_array(path, name):
    """One array of an npz, mapped where it lies: 50 000 images are 10 GB, and each process needs its share only."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            info = archive.getinfo(f"{name}.npy")
            major = np.lib.format.read_magic(member)[0]
            read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[major]
            shape, fortran, dtype = read_header(member)
            header = member.tell()
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(f"{str(path)!r}: {name} cannot be read ({error})") from None
    if dtype.hasobject:
        raise ValueError(f"{str(path)!r}: {name} holds Python objects, which are never loaded; store plain numbers")
    if info.compress_type != zipfile.ZIP_STORED or 0 in shape:
        with open_npz(path) as content:
            return content[name]
    with open(path, "rb") as file:  # sizes of the name and the extra field before the data
        file.seek(info.header_offset + 26)
        before = 30 + sum(int.from_bytes(file.read(2), "little") for _ in range(2))
    return np.memmap(path, dtype, "r", info.header_offset + before + header, shape, order="F" if fortran else "C")


def shares(count, batch_size, ranks):
    """This process's ranges of range(count), one for each round of world * batch_size; the last ones may be empty.

    The r-th process has the r-th batch of each round, so that taking the processes in turn gives the order of one.
    """
    starts = range(
        ranks.rank * batch_size,
        -(-count // (batch_size * ranks.world)) * batch_size * ranks.world,
        batch_size * ranks.world,
    )
    return [range(min(start, count), min(start + batch_size, count)) for start in starts]


def read(source, batch_size, ranks, num_workers=0, what="images"):
    """This process's batches of a source, and None where a round has none for it: as `measure` wants them."""
    rounds = shares(len(source), batch_size, ranks)
    mine = [list(indices) for indices in rounds if indices]
    loader = DataLoader(source, batch_sampler=mine, collate_fn=as_it_is, num_workers=num_workers if mine else 0)
    yield from tqdm(
        itertools.chain(loader, [None] * (len(rounds) - len(mine))), what, total=len(rounds), disable=not ranks.main
    )


def as_it_is(batch):
    return batch


if __name__ == "__main__":
    main()

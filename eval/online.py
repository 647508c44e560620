"""Judges a model while it trains: a grid of samples, their distance to the training images, and its loss on others.

The distance is the Fréchet distance between features of a network that no run is aligned to: Inception, which makes it
FID, or another one, whose distance ranks the runs of one study and compares with nothing else. It depends on the number
of samples. They are judged as they are made and kept nowhere.

Shapes: B batch, C channels, H = W size.
"""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import models  # noqa: F401 - before torchvision: see its docstring
from torchvision.utils import make_grid

from dataset.prepared import PreparedImages
from eval import features
from eval.metrics import FeatureStatistics, frechet_distance, npz_statistics
from eval.samplers import IndexedNoise, draw
from loss import denoising_loss, interpolant
from runtime import Ranks, Use, derive_seed, replaced
from weights import load_file

REFERENCE_IMAGES = 50_000  # the distance is to at most so many training images
GRID = 64  # samples shown
FID_AT = (5_000, 10_000)  # FID is told at these counts too, as it falls with the number of samples


@dataclass
class Judge:
    """features: uint8 (B, 3, H, W) -> float32 (B, dim). counts: {name of a distance: samples that it is of}.

    reference: mean and covariance of what samples are compared with; None until they are computed.
    kept: the file that has its sums, or None where the reference is not of the training images.
    """

    features: Callable
    dim: int
    counts: dict
    reference: tuple | None
    kept: Path | None


class OnlineEvaluation:
    """Samples from the same noise and labels at every call, shared among the processes by index.

    inputs: what the run reads (dataset.inputs); autocast: the context that the model computes in.
    Writes nothing before the first call. `fingerprints` are those of the judges.
    Raises ValueError where a judge cannot be had, or is aligned to.
    """

    def __init__(self, config, ranks: Ranks, inputs, autocast: Callable):
        self.config, self.ranks, self.inputs, self.autocast = config, ranks, inputs, autocast
        compared = config.eval_encoder != ("inception",) or not config.fid_reference
        self.data = data = PreparedImages(config.data, images=compared, text=inputs.text)
        # Labels or captions as frequent as in the training set, in random order.
        self.chosen = np.random.default_rng(derive_seed(config.seed, Use.LABELS)).integers(
            len(data), size=config.eval_samples
        )
        self.labels = data.labels[self.chosen]
        self.judges, self.fingerprints = [], []
        for name in config.eval_encoder:
            with ranks.one_first():
                judge = self._inception() if name == "inception" else self._network(name)
            if any(judge.counts.keys() & other.counts.keys() for other in self.judges):
                raise ValueError(
                    f"eval_encoder = {config.eval_encoder}: two of them log {list(judge.counts)[-1]}; give one of them"
                )
            self.judges.append(judge)

    def __call__(self, model: Callable, interrupted=lambda: False) -> tuple[dict | None, torch.Tensor | None]:
        """Returns {name: figure} and a grid (3, H', W') uint8 of the main process's first samples, ordered by label.

        interrupted: asked before each batch, by all processes; once it is true, (None, None) is returned.
        """
        for judge in self.judges:
            if self.ranks.any(judge.reference is None) and not self._compute_reference(judge, interrupted):
                return None, None
        # One sum for the samples between each count and the next, whichever process makes them.
        sums = [{name: self._statistics(judge) for name in judge.counts} for judge in self.judges]
        shown = []
        for indices in self._batches(self.config.eval_samples):
            if interrupted():
                return None, None
            # All processes must call a sharded model equally often. One without a sample left draws one for nothing.
            images = self.sample(model, indices or range(1))
            for judge, parts in zip(self.judges, sums):
                found, first = judge.features(images), 0
                for name, count in judge.counts.items():
                    parts[name].update(found[max(first - indices.start, 0) : max(count - indices.start, 0)])
                    first = count
            shown.append(images[: max(0, GRID - sum(map(len, shown)))].cpu())
        distances = {}
        for judge, parts in zip(self.judges, sums):
            so_far = self._statistics(judge)
            for name, part in parts.items():
                so_far.sums += self.ranks.sum(part.sums)
                distances[name] = frechet_distance(*so_far.mean_and_covariance(), *judge.reference)
        if self.inputs.held_out:
            distances["held_out_loss"] = self._held_out_loss(model)
        return distances, grid_of(torch.cat(shown), self.labels) if shown else None

    def sample(self, model: Callable, indices: range) -> torch.Tensor:
        """The samples with these indices, uint8 (B, 3, H, W)."""
        config = self.config
        seeds = [derive_seed(config.seed, Use.SAMPLE, i) for i in indices]
        options = {name: getattr(config, name) for name in ("sampler", "cfg_scale", "guidance_interval", "path")}
        options |= {"num_steps": config.sample_steps, "time_shift": config.sample_shift}
        if model.step_times:
            options = {"sampler": "few-step", "times": model.step_times}
        y = self.data.conditions(self.chosen[indices]).to(self.ranks.device)
        with self.autocast():
            x = draw(model, seeds, self.inputs.shape, y, **options)
        return self.inputs.decoder.decode(x)

    @torch.no_grad()
    def _held_out_loss(self, model):
        """Mean denoising loss over the images that are not trained on.

        An image's time and noise follow from its number alone, so that they are the same at each call, in all runs and
        for any number of processes. Times are spread over [0, 1] by the golden ratio.
        """
        inputs, device, total = self.inputs, self.ranks.device, torch.zeros(1, dtype=torch.float64)
        for counted in self._batches(len(inputs.held_out)):
            indices = counted or range(1)  # as in __call__
            batch = {name: value.to(device) for name, value in inputs.held_out.__getitems__(indices).items()}
            noise = IndexedNoise([derive_seed(0, Use.HELD_OUT, i) for i in indices], inputs.shape, device)
            x, t = inputs.clean(batch, noise()), torch.tensor([0.618033988749895 * (i + 1) % 1 for i in indices])
            x_t, target = interpolant(x, noise(), t.to(device), self.config.path)
            with self.autocast():
                velocity, _ = model(x_t, t.to(device), inputs.conditions(batch))
            total += len(counted) * denoising_loss(velocity, target).item()
        return self.ranks.sum(total.to(device)).item() / len(inputs.held_out)

    # ---- judges ----

    def _inception(self):
        config, count = self.config, self.config.eval_samples
        if config.fid_reference and not Path(config.fid_reference).is_file():  # said before anything is downloaded
            raise ValueError(f"fid_reference = {config.fid_reference!r}: there is no such file")
        network = features.InceptionFeatures(config.inception).to(self.ranks.device)
        given = npz_statistics(config.fid_reference, network) if config.fid_reference else None
        if given == {}:
            raise ValueError(
                f"fid_reference = {config.fid_reference!r} holds no statistics (mu, sigma); "
                "`python -m eval.metrics --save-reference` makes a file that does"
            )
        counts = {**{f"fid_{n}": n for n in FID_AT if n < count}, "fid": count}
        return self._judge("pool3", network, counts, given and given["pool3"])

    def _network(self, name):
        config, network = self.config, features.PooledFeatures(name).to(self.ranks.device)
        of_study = features.timm_source(name) in map(features.timm_source, config.encoder)
        if not (of_study or any(matrices(network) & matrices(encoder) for encoder in self.inputs.encoders)):
            return self._judge("pooled", network, {"frechet_distance": config.eval_samples})
        if not config.eval_aligned:
            raise ValueError(
                f"eval_encoder = {name!r}: runs are aligned to it, so it cannot judge them. Train another one, as by "
                f"`python -m dataset.standin_encoder {self.data.folder} --kind convnet --out FOLDER`, take inception, "
                "or give --eval-aligned for a distance that says so by its name"
            )
        return self._judge("pooled", network, {"frechet_distance_aligned": config.eval_samples})

    def _judge(self, name, network, counts, reference=None):
        """A judge by these features of a network, of the given reference or of the one that an earlier run has kept."""
        self.fingerprints.append(network.fingerprint)
        path = None if reference else self.data.folder / f"statistics-{network.fingerprint}.pt"
        judge = Judge(lambda images: network(images)[name], network.dim, counts, reference, path)
        if path and path.is_file():
            found, statistics = load_file(path, self.ranks.device), self._statistics(judge)
            sums = found.get("sums") if isinstance(found, dict) else None
            if not isinstance(sums, torch.Tensor) or sums.shape != statistics.sums.shape:
                raise ValueError(
                    f"{path} does not hold the sums of {judge.dim} features; delete it to have it made anew"
                )
            statistics.sums.copy_(sums)
            judge.reference = statistics.mean_and_covariance()
        return judge

    # ---- sums ----

    def _statistics(self, judge):
        return FeatureStatistics(judge.dim, self.ranks.device)

    def _batches(self, count):
        """This process's share of range(count), in ranges of at most eval_batch_size; as many for every process."""
        size, share = self.config.eval_batch_size, -(-count // self.ranks.world)  # rounded up
        start = self.ranks.rank * share
        stop = min(start + share, count)
        return [range(first, min(first + size, stop)) for first in range(start, start + share, size)]

    def _compute_reference(self, judge, interrupted):
        """Mean and covariance over the training images, which are kept in the data folder. False if interrupted."""
        statistics, count = self._statistics(judge), min(REFERENCE_IMAGES, len(self.data))
        order = np.random.default_rng(0).permutation(len(self.data))[:count]  # the folder may be sorted by class
        for items in self._batches(count):
            if interrupted():
                return False
            if items:
                images = self.data.__getitems__(order[items])["images"]
                statistics.update(judge.features(images.to(self.ranks.device)))
        self.ranks.sum(statistics.sums)
        judge.reference = statistics.mean_and_covariance()
        if self.ranks.main:
            own = judge.kept.with_name(
                f"{judge.kept.name}.{platform.node()}.{os.getpid()}"
            )  # others may be at the same
            try:
                with replaced(own) as file:
                    torch.save({"sums": statistics.sums.cpu()}, file)
                os.replace(own, judge.kept)
            except (OSError, RuntimeError) as error:  # torch has its own kind for a file that cannot be written
                print(f"note: {judge.kept} is not kept for later runs: {error}")
        return True


def matrices(network: torch.nn.Module) -> set:
    """The beginnings of a network's larger weights, by which it is known under any name, token grid or library."""
    values = [value for name, value in network.named_parameters() if value.ndim > 1 and "pos" not in name]
    return {tuple(value.detach().flatten()[:64].tolist()) for value in values}


def grid_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> one picture (3, H', W'), ordered by label."""
    images = images[labels[: len(images)].argsort(stable=True)]
    magnify = max(1, 32 // images.shape[-1])  # tiny images would be hard to see
    images = images.repeat_interleave(magnify, -1).repeat_interleave(magnify, -2)
    return make_grid(images, nrow=round(len(images) ** 0.5), padding=2)

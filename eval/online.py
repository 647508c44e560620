"""Judges a model while it trains: a grid of samples, and their distance to the training images.

The distance is the Fréchet distance between mean-pooled patch tokens of the frozen encoder. It ranks runs of one study;
it is not FID, and depends on the encoder and on the number of samples. FID itself can be had beside it, from the same
samples, which are judged as they are made and kept nowhere.

Shapes: B batch, C channels, H = W size, T tokens.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import models  # noqa: F401  (before torchvision: see its docstring)
from torchvision.utils import make_grid

from eval.metrics import FeatureStatistics, frechet_distance
from eval.samplers import IndexedNoise, sample_ode, sample_sde
from runtime import EVALUATION, derive_seed, load_file

REFERENCE_IMAGES = 50_000  # the distance is to at most so many training images
GRID = 64  # samples shown
FID_AT = (5_000, 10_000)  # FID is told at these counts too, as it falls with the number of samples


@dataclass(frozen=True)
class Judge:
    """Features of uint8 images (B, 3, H, W) -> (B, dim), in float32; of which the distances are by number of samples.

    reference: their mean and covariance over what samples are compared with. counts: {name of the distance: samples}.
    """

    features: Callable
    dim: int
    reference: tuple
    counts: dict


class OnlineEvaluation:
    """Samples from the same noise and labels at every call, shared among the processes by index.

    data: PreparedImages; encoder: FrozenEncoder; autoencoder: decodes what the model makes, of this shape (C, H, W);
    autocast: the context that it computes in. inception: InceptionFeatures for FID as well; fid_reference: its mean
    and covariance, if not those of the training images.
    """

    def __init__(self, config, data, encoder, autoencoder, shape, ranks, autocast, inception=None, fid_reference=None):
        self.config, self.autoencoder = config, autoencoder
        self.shape, self.ranks, self.autocast = shape, ranks, autocast
        # Labels as frequent as in the training set, in random order.
        chosen = np.random.default_rng([config.seed, EVALUATION]).integers(len(data), size=config.eval_samples)
        self.labels = data.labels[chosen]
        count = config.eval_samples
        self.judges = [self._judge(data, lambda images: encoder(images).mean(1), encoder, {"frechet_distance": count})]
        if inception:
            counts = {**{f"fid_{n}": n for n in FID_AT if n < count}, "fid": count}
            self.judges.append(
                self._judge(data, lambda images: inception(images)["pool3"], inception, counts, fid_reference)
            )

    def __call__(self, model, interrupted=lambda: False):
        """Returns {name: distance} and a grid (3, H', W') uint8 of the main process's first samples, ordered by label.

        interrupted: asked before each batch, by all processes; once it is true, (None, None) is returned.
        """
        # One sum for the samples between each count and the next, whichever process makes them.
        sums = [
            {name: FeatureStatistics(judge.dim, self.ranks.device) for name in judge.counts} for judge in self.judges
        ]
        shown = []
        for indices in self._batches(self.config.eval_samples):
            if interrupted():
                return None, None
            if not indices:
                continue
            images = self.sample(model, indices)
            for judge, parts in zip(self.judges, sums):
                features, first = judge.features(images), 0
                for name, count in judge.counts.items():
                    parts[name].update(features[max(first - indices.start, 0) : max(count - indices.start, 0)])
                    first = count
            shown.append(images[: max(0, GRID - sum(map(len, shown)))].cpu())
        distances = {}
        for judge, parts in zip(self.judges, sums):
            so_far = FeatureStatistics(judge.dim, self.ranks.device)
            for name, part in parts.items():
                so_far.sums += self.ranks.sum(part.sums)
                distances[name] = frechet_distance(*so_far.mean_and_covariance(), *judge.reference)
        return distances, grid_of(torch.cat(shown), self.labels) if shown else None

    def sample(self, model, indices):
        """The samples with these indices, uint8 (B, 3, H, W)."""
        config, device = self.config, self.ranks.device
        noise = IndexedNoise([derive_seed(config.seed, EVALUATION, i) for i in indices], self.shape, device)
        settings = dict(
            num_steps=config.sample_steps,
            cfg_scale=config.cfg_scale,
            guidance_interval=config.guidance_interval,
            path=config.path,
        )
        y = self.labels[list(indices)].to(device)
        with self.autocast():
            if config.sampler == "sde":
                x = sample_sde(model, noise(), y, step_noise=noise, **settings)
            else:
                x = sample_ode(model, noise(), y, solver=config.sampler, **settings)
        return self.autoencoder.decode(x)

    def _batches(self, count):
        """This process's share of range(count), in ranges of at most eval_batch_size; as many for every process."""
        size, share = self.config.eval_batch_size, -(-count // self.ranks.world)  # rounded up
        start = self.ranks.rank * share
        stop = min(start + share, count)
        return [range(first, min(first + size, stop)) for first in range(start, start + share, size)]

    def _judge(self, data, features, network, counts, reference=None):
        """features: what is compared, of a network with `dim` and `fingerprint`."""
        return Judge(features, network.dim, reference or self._reference(data, features, network), counts)

    def _reference(self, data, features, network):
        """Mean and covariance over the training images; computed once and kept in the data folder."""
        path = data.folder / f"statistics-{network.fingerprint}.pt"
        statistics = FeatureStatistics(network.dim, self.ranks.device)
        found = path.is_file()
        if self.ranks.any(not found):  # all processes go the same way
            count = min(REFERENCE_IMAGES, len(data))
            order = np.random.default_rng(0).permutation(len(data))[:count]
            for items in filter(len, self._batches(count)):
                statistics.update(features(data.__getitems__(order[items])["images"].to(self.ranks.device)))
            self.ranks.sum(statistics.sums)
            if self.ranks.main:
                self._keep(statistics, path)
        else:
            statistics.sums = load_file(path, self.ranks.device)["sums"]
        return statistics.mean_and_covariance()

    def _keep(self, statistics, path):
        own = path.with_name(f"{path.name}.{os.getpid()}")  # other runs may be at the same
        try:
            torch.save({"sums": statistics.sums.cpu()}, own)
            os.replace(own, path)
        except OSError as error:  # the data folder may be read-only
            print(f"not kept for later runs: {path} ({error})")


def grid_of(images, labels):
    """uint8 (B, 3, H, W) -> one picture (3, H', W'), ordered by label."""
    images = images[labels[: len(images)].argsort(stable=True)]
    magnify = max(1, 32 // images.shape[-1])  # tiny images would be hard to see
    images = images.repeat_interleave(magnify, -1).repeat_interleave(magnify, -2)
    return make_grid(images, nrow=round(len(images) ** 0.5), padding=2)

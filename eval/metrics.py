"""Fréchet distance between two sets of features, in float64."""

import torch


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
        self.sums[1:1 + self.dim] += features.sum(0)
        self.sums[1 + self.dim:] += (features.T @ features).flatten()

    def mean_and_covariance(self):
        """(dim) and (dim, dim), the covariance with n - 1. Raises ValueError for fewer than two vectors."""
        count, total, outer = self.sums[0], self.sums[1:1 + self.dim], self.sums[1 + self.dim:].view(self.dim, self.dim)
        if count < 2:
            raise ValueError(f"{int(count)} feature vectors have no covariance; at least 2 are needed")
        mean = total / count
        return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)


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

"""Projectors: map hidden tokens into the space of a frozen encoder.

Shapes: B batch, T = grid * grid tokens, row by row.
"""

import torch
from torch import nn

PROJECTORS = ("mlp", "conv")


def project(projectors: nn.ModuleList, align_depth: tuple, z: torch.Tensor, k: int) -> list:
    """The state z after block k as the encoders' tokens, one per encoder; [] where nothing is projected.

    projectors: by depth of align_depth, then by encoder. z: (B, T, width). Returns a list of (B, T, dim).
    """
    if k not in align_depth:
        return []
    encoders = len(projectors) // len(align_depth)
    first = align_depth.index(k) * encoders
    return [projector(z) for projector in projectors[first : first + encoders]]


class Projector(nn.Sequential):
    """REPA (arXiv 2410.06940): Linear-SiLU-Linear-SiLU-Linear, (B, T, width) -> (B, T, dim), without normalisation."""

    def __init__(self, width: int, hidden: int, dim: int):
        super().__init__(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim)
        )


class ConvProjector(nn.Conv2d):
    """iREPA (arXiv 2512.10794, Algorithm 1): one 3 x 3 convolution of the zero-padded grid, to (B, T, dim)."""

    def __init__(self, width: int, grid: int, dim: int):
        super().__init__(width, dim, kernel_size=3, padding=1)
        self.grid = grid

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (B, width, grid, grid)
        return super().forward(x).flatten(2).transpose(1, 2)  # (B, T, dim)


def xavier(module: nn.Module):
    """For `nn.Module.apply`: Xavier's uniform weights and zero biases in linear layers, as in DiT."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

"""REPA's projector (arXiv 2410.06940): maps hidden tokens into the space of a frozen encoder."""

from torch import nn


class Projector(nn.Sequential):
    """Linear-SiLU-Linear-SiLU-Linear on the last axis, (B, T, width) -> (B, T, dim), without normalisation."""

    def __init__(self, width, hidden, dim):
        super().__init__(
            nn.Linear(width, hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, dim),
        )

"""Diffusion-Adaptive Routing (DAR, arXiv 2605.20708): what takes the place of residual addition.

Sublayers are numbered l = 1..L (attention, MLP, attention, ...); v_0 is the embedded input and v_l the output of
sublayer l. Aggregator l forms the input h_l of sublayer l from earlier outputs; one more forms the input of the head.
Block Attention Residuals (AttnRes, arXiv 2603.15031), a baseline, are the same with other sources.

Shapes: B batch, T tokens, D width.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from kernels import BACKENDS

QUERIES = ("static", "timestep", "dynamic")
CHUNK_SUMMARIES = ("last", "sum")
FINAL_AGGREGATORS = ("dedicated", "shared")


# Eq. 7
def source_plan(num_sublayers: int, chunk_size: int) -> list[tuple[int, ...]]:
    """Indices of the outputs that each state is routed from.

    Chunk n holds sublayers (n-1)S+1 .. nS and is summarised by its last output v_{nS}. A state sees the summaries
    of all finished chunks and every output of its own. S need not divide L; the last chunk is then shorter.

    Returns L + 1 tuples in ascending order: entry l - 1 is S_l, the last one S_final.
    Raises ValueError unless 1 <= chunk_size <= num_sublayers.
    """
    if num_sublayers < 1:
        raise ValueError(f"num_sublayers = {num_sublayers}: at least one sublayer is needed")
    if not 1 <= chunk_size <= num_sublayers:
        raise ValueError(f"chunk_size = {chunk_size} is not between 1 and the {num_sublayers} sublayers of the model")
    plan = []
    for latest in range(num_sublayers + 1):  # v_latest = v_{l-1} is the newest output
        chunk = math.ceil(min(latest + 1, num_sublayers) / chunk_size)  # the head belongs to the last chunk
        summaries = range(0, chunk * chunk_size, chunk_size)  # c_0 .. c_{n-1}
        plan.append((*summaries, *range((chunk - 1) * chunk_size + 1, latest + 1)))
    return plan


# Prop. 1
def optimal_chunk_size(num_sublayers: int, alpha: float) -> float:
    """S* = sqrt(L (1 - alpha) / (1 + alpha)), the minimum of log(L/S + S) + alpha log S.

    alpha weighs the information lost by summarising; Prop. 1 needs 0 <= alpha < 1 (ValueError otherwise).
    """
    if num_sublayers < 1:
        raise ValueError(f"num_sublayers = {num_sublayers}: at least one sublayer is needed")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha = {alpha} is not in [0, 1), where the cost has an inner minimum")
    return math.sqrt(num_sublayers * (1 - alpha) / (1 + alpha))


def head_aggregator(choice: str, align_dims: tuple) -> str:
    """The final aggregator that "auto" means: shared with alignment, dedicated without (Appendix C.3)."""
    return choice if choice != "auto" else "shared" if align_dims else "dedicated"


# Eq. 6 and "timestep injection"
class Aggregator(nn.Module):
    """Query and norm weight of one aggregation over depth. Zero queries make it start as a plain mean.

    query: "static" w; "timestep" w + e(t); "dynamic" W v, where v is the newest source.
    scale: multiplies a static query.
    """

    def __init__(self, width: int, query: str, scale: float = 1.0):
        super().__init__()
        self.kind, self.scale = query, scale
        self.query = nn.Parameter(torch.zeros(width, width) if query == "dynamic" else torch.zeros(width))
        self.norm_weight = nn.Parameter(torch.ones(width))

    def forward(self, newest: torch.Tensor, t_embedding: torch.Tensor) -> torch.Tensor:
        """The query. newest: the last source (B, T, D); t_embedding: (B, D)."""
        if self.kind == "static":
            return self.scale * self.query  # (D)
        if self.kind == "timestep":
            return self.query + t_embedding  # (B, D)
        return F.linear(newest, self.query)  # (B, T, D)


class DepthRouter(nn.Module):
    """All aggregators of a network of L sublayers. The sources of each follow from the chunk size S (`source_plan`).

    final_aggregator: "dedicated" gives the head's state its own parameters (L + 1 aggregators); "shared" reuses those
    of the last sublayer (L aggregators; Appendix C.3).
    backend: "auto", "torch", "triton" or "cpu" (`kernels.route`).
    chunk_summary: "last" is Eq. 7. With "sum" v_l is the sum of the outputs of l's chunk up to sublayer l, so that
    v_{nS} summarises all of chunk n. A state sees v_0, the summaries of all finished chunks and the sum of its own
    chunk so far, if that has begun; the head sees v_0 and all chunks. So do Block Attention Residuals.
    """

    def __init__(
        self, num_sublayers, width, query, chunk_size, final_aggregator, backend="auto", chunk_summary="last",
        query_scale=1.0,
    ):  # fmt: skip
        super().__init__()
        for name, value, known in (
            ("query", query, QUERIES),
            ("final_aggregator", final_aggregator, FINAL_AGGREGATORS),
            ("route_backend", backend, BACKENDS),
            ("chunk_summary", chunk_summary, CHUNK_SUMMARIES),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
        self.backend = backend
        self.plan, self.summed = source_plan(num_sublayers, chunk_size), 1
        if chunk_summary == "sum":
            self.summed = chunk_size  # outputs that are added up in one source (RoutedStream.write)
            self.plan = [(*range(0, latest, chunk_size), latest) for latest in range(num_sublayers + 1)]
        count = num_sublayers + (final_aggregator == "dedicated")
        self.aggregators = nn.ModuleList(Aggregator(width, query, query_scale) for _ in range(count))

    def aggregation(self, v: list, t_embedding: torch.Tensor) -> tuple[tuple, torch.Tensor, torch.Tensor]:
        """What forms the next state h_l from v = [v_0 .. v_{l-1}]: the indices S_l, the query and the norm weight."""
        index = len(v) - 1
        aggregator = self.aggregators[min(index, len(self.aggregators) - 1)]  # a shared head reuses the last
        return self.plan[index], aggregator(v[-1], t_embedding), aggregator.norm_weight


def make_router(
    routing: str, num_sublayers: int, width: int, query: str, chunk_size: int, final_aggregator: str, backend: str,
    chunk_summary: str,
) -> DepthRouter | None:  # fmt: skip
    """The router of a model with "dar" or "attnres" routing, None with others; the arguments are DepthRouter's.

    Block Attention Residuals take of them only the chunk size (of their blocks) and the backend: chunks are summed,
    queries are static, the head has its own, and logits are w . k without the 1 / sqrt(D) by which the kernels divide.
    """
    if routing == "dar":
        return DepthRouter(num_sublayers, width, query, chunk_size, final_aggregator, backend, chunk_summary)
    if routing == "attnres":
        return DepthRouter(num_sublayers, width, "static", chunk_size, "dedicated", backend, "sum", math.sqrt(width))
    return None

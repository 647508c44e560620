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

from kernels import BACKENDS, resolve_backend, route, route_modulate

QUERIES = ("static", "timestep", "dynamic")
FINAL_AGGREGATORS = ("dedicated", "shared")


# Eq. 7
def source_plan(num_sublayers, chunk_size):
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
def optimal_chunk_size(num_sublayers, alpha):
    """S* = sqrt(L (1 - alpha) / (1 + alpha)), the minimum of log(L/S + S) + alpha log S.

    alpha weighs the information lost by summarising; Prop. 1 needs 0 <= alpha < 1 (ValueError otherwise).
    """
    if num_sublayers < 1:
        raise ValueError(f"num_sublayers = {num_sublayers}: at least one sublayer is needed")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha = {alpha} is not in [0, 1), where the cost has an inner minimum")
    return math.sqrt(num_sublayers * (1 - alpha) / (1 + alpha))


# Eq. 6 and "timestep injection"
class Aggregator(nn.Module):
    """Query and norm weight of one aggregation over depth. Zero queries make it start as a plain mean.

    query: "static" w; "timestep" w + e(t); "dynamic" W v, with v the newest source.
    """

    def __init__(self, width, query):
        super().__init__()
        self.kind = query
        self.query = nn.Parameter(torch.zeros(width, width) if query == "dynamic" else torch.zeros(width))
        self.norm_weight = nn.Parameter(torch.ones(width))

    def forward(self, newest, t_embedding):
        """The query. newest: the last source (B, T, D); t_embedding: (B, D)."""
        if self.kind == "static":
            return self.query  # (D)
        if self.kind == "timestep":
            return self.query + t_embedding  # (B, D)
        return F.linear(newest, self.query)  # (B, T, D)


class DepthRouter(nn.Module):
    """All aggregators of a network of L sublayers.

    chunk_size S: 1 and L are both dense, anything between summarises (Eq. 7).
    final_aggregator: "dedicated" gives the head's state its own parameters (L + 1 aggregators); "shared" reuses those
    of the last sublayer (L aggregators; Appendix C.3).
    backend: "auto", "torch" or "triton" (`kernels.route`).
    """

    summed = 1  # outputs added up in one source (RoutedStream.write): with DAR none are

    def __init__(self, num_sublayers, width, query, chunk_size, final_aggregator, backend="auto"):
        super().__init__()
        if query not in QUERIES:
            raise ValueError(f"query {query!r} is unknown; choose one of {', '.join(QUERIES)}")
        if final_aggregator not in FINAL_AGGREGATORS:
            raise ValueError(
                f"final_aggregator {final_aggregator!r} is unknown; choose one of {', '.join(FINAL_AGGREGATORS)}"
            )
        if backend not in BACKENDS:
            raise ValueError(f"route_backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        self.backend = backend
        self.plan = source_plan(num_sublayers, chunk_size)
        count = num_sublayers + (final_aggregator == "dedicated")
        self.aggregators = nn.ModuleList(Aggregator(width, query) for _ in range(count))

    def forward(self, v, t_embedding, return_weights=False):
        """The state that follows from the outputs so far.

        v: list of v_0 .. v_{l-1}, each (B, T, D); t_embedding: (B, D).
        Returns h_l (B, T, D), or the head's state once all L outputs are there; with `return_weights` also the
        weights (n, B, T) of the sources plan[l - 1].
        """
        read, query, norm_weight = self.aggregation(v, t_embedding)
        return route([v[i] for i in read], query, norm_weight, backend=self.backend, return_weights=return_weights)

    def aggregation(self, v, t_embedding):
        """What forms the next state: the indices of its sources, the query and the norm weight."""
        index = len(v) - 1
        aggregator = self.aggregators[min(index, len(self.aggregators) - 1)]  # a shared head reuses the last
        return self.plan[index], aggregator(v[-1], t_embedding), aggregator.norm_weight


# AttnRes, its block variant
class AttnResRouter(DepthRouter):
    """All aggregators of Block Attention Residuals for L sublayers in chunks of S (their blocks).

    With it v_l is the sum of the outputs of l's chunk up to sublayer l, so that v_{nS} summarises chunk n. A state
    sees v_0, the summaries of all finished chunks and the sum of its own chunk so far, if that has begun; the head
    sees v_0 and all chunks. Queries are static, the head has its own, and logits are w . k without 1 / sqrt(D).
    S = 1 sees every output by itself (full AttnRes). S need not divide L; the last chunk is then shorter. Sums have the
    dtype of sources, which under autocast is half precision with the fused kernels and float32 without.
    """

    def __init__(self, num_sublayers, width, chunk_size, backend="auto"):
        super().__init__(num_sublayers, width, "static", chunk_size, "dedicated", backend)
        self.summed = chunk_size
        self.plan = [(*range(0, latest, chunk_size), latest) for latest in range(num_sublayers + 1)]

    def aggregation(self, v, t_embedding):
        read, query, norm_weight = super().aggregation(v, t_embedding)
        return read, math.sqrt(len(query)) * query, norm_weight  # by which the kernels divide


class RoutedStream:
    """The states of one forward pass with a router: what `ResidualStream` (models/sit.py) is to residual addition.

    tokens: v_0 (B, T, D); t_embedding: (B, D).
    """

    def __init__(self, router, tokens, t_embedding):
        # Under autocast the kernels take the half precision that sublayers give. PyTorch would keep a float32 copy for
        # the backward of every aggregator that reads a source; there one cast for all of them is cheaper.
        device = tokens.device.type
        if torch.is_autocast_enabled(device) and resolve_backend(router.backend, tokens.device) == "triton":
            tokens = tokens.to(torch.get_autocast_dtype(device))
        self.router, self.v, self.t_embedding = router, [tokens], t_embedding

    def read(self, shift, scale):
        """LayerNorm and adaLN (shift, scale: (B, D)) of the next state, and that state: both (B, T, D)."""
        read, query, norm_weight = self.router.aggregation(self.v, self.t_embedding)
        x, h, sources = route_modulate(
            [self.v[i] for i in read], query, norm_weight, shift, scale, backend=self.router.backend
        )
        for i, source in zip(read, sources):
            self.v[i] = source
        return x, h

    def write(self, output):
        """v_l from the output of the sublayer that read last: that output, or with AttnRes its chunk's sum."""
        begins = (len(self.v) - 1) % self.router.summed == 0
        output = output.to(self.v[0].dtype)
        self.v.append(output if begins else self.v[-1] + output)

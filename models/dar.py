"""Diffusion-Adaptive Routing (DAR, arXiv 2605.20708): what takes the place of residual addition.

Sublayers are numbered l = 1..L (attention, MLP, attention, ...); v_0 is the embedded input and v_l the output of
sublayer l. Aggregator l forms the input h_l of sublayer l from earlier outputs; one more forms the input of the head.

Shapes: B batch, T tokens, D width.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from kernels import route

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
    for latest in range(num_sublayers + 1):                       # v_latest = v_{l-1} is the newest output
        chunk = math.ceil(min(latest + 1, num_sublayers) / chunk_size)          # the head belongs to the last chunk
        summaries = range(0, chunk * chunk_size, chunk_size)                    # c_0 .. c_{n-1}
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

    def forward(self, sources, t_embedding, return_weights=False):
        if self.kind == "static":
            query = self.query                                    # (D)
        elif self.kind == "timestep":
            query = self.query + t_embedding                      # (B, D)
        else:
            query = F.linear(sources[-1], self.query)             # (B, T, D)
        return route(sources, query, self.norm_weight, return_weights=return_weights)


class DepthRouter(nn.Module):
    """All aggregators of a network of L sublayers.

    chunk_size S: 1 and L are both dense, anything between summarises (Eq. 7).
    final_aggregator: "dedicated" gives the head's state its own parameters (L + 1 aggregators); "shared" reuses those
    of the last sublayer (L aggregators; Appendix C.3).
    """

    def __init__(self, num_sublayers, width, query, chunk_size, final_aggregator):
        super().__init__()
        if query not in QUERIES:
            raise ValueError(f"query {query!r} is unknown; choose one of {', '.join(QUERIES)}")
        if final_aggregator not in FINAL_AGGREGATORS:
            raise ValueError(f"final_aggregator {final_aggregator!r} is unknown; "
                             f"choose one of {', '.join(FINAL_AGGREGATORS)}")
        self.plan = source_plan(num_sublayers, chunk_size)
        count = num_sublayers + (final_aggregator == "dedicated")
        self.aggregators = nn.ModuleList(Aggregator(width, query) for _ in range(count))

    def forward(self, v, t_embedding, return_weights=False):
        """The state that follows from the outputs so far.

        v: list of v_0 .. v_{l-1}, each (B, T, D); t_embedding: (B, D).
        Returns h_l (B, T, D), or the head's state once all L outputs are there; with `return_weights` also the
        weights (n, B, T) of the sources plan[l - 1].
        """
        index = len(v) - 1
        sources = [v[i] for i in self.plan[index]]
        aggregator = self.aggregators[min(index, len(self.aggregators) - 1)]    # a shared head reuses the last
        return aggregator(sources, t_embedding, return_weights)

"""Depth routing in plain PyTorch: the definition that every faster backend is compared with.

Shapes: B batch, T tokens, D width, n sources.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def route(sources: Sequence[Tensor], query: Tensor, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h = sum_i a_i v_i with a = softmax_i(q . k_i / sqrt(D)) and k_i = g * RMSNorm(v_i)   (Eq. 5-6).

    Arguments are those of `kernels.route`, validated and with sources of one dtype. Returns h (B, T, D) and the
    weights a (n, B, T).

    Each source is read twice, once for its logit and once for the sum. A running softmax would read it once, but
    autograd would then keep n rescaled partial sums (B, T, D). Only the logits, D times smaller than the sources, are
    stacked here. The norm weight is folded into the query, so that no key is stored.
    """
    width = sources[0].shape[-1]
    dtype = sources[0].dtype
    # Float32 at least: half precision loses small differences of logits.
    compute = torch.promote_types(dtype, torch.float32)
    query = query.to(compute) * norm_weight.to(compute) / math.sqrt(width)
    if query.ndim == 2:
        query = query.unsqueeze(1)  # (B, D) -> (B, 1, D)

    logits = []
    for v in sources:
        v = v.to(compute)
        inverse_rms = torch.rsqrt(v.square().mean(-1) + eps)  # (B, T)
        logits.append((v * query).sum(-1) * inverse_rms)  # (B, T)
    alpha = torch.stack(logits).softmax(0)  # (n, B, T)

    h = alpha[0].unsqueeze(-1) * sources[0].to(compute)
    for a, v in zip(alpha[1:], sources[1:]):
        h = torch.addcmul(h, a.unsqueeze(-1), v.to(compute))  # (B, T, D)
    return h.to(dtype), alpha

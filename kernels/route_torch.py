"""Depth routing in PyTorch as it is trained with where no fused kernel can be had.

The arithmetic is reference.py's, with its derivative written out. Autograd would keep several tensors of a source's
size for every source of every aggregator, and fill as many again backward; this keeps the sources and their weights.

Shapes: B batch, T tokens, D width, n sources.
"""

import math

import torch
from torch.nn import functional as F

from kernels.operators import register


def _folded(query, norm_weight, compute):
    """q' = g * q / sqrt(D) and q, in a shape that broadcasts over (B, T, D). A logit is v . q' / rms(v)."""
    query = query.to(compute).unsqueeze(1) if query.ndim == 2 else query.to(compute)
    return query * norm_weight.to(compute) / math.sqrt(query.shape[-1]), query


def _logits(sources, folded, eps):
    """The logits and 1 / rms of the sources, (2, n, B, T)."""
    norms = torch.stack([torch.linalg.vector_norm(v, dim=-1) for v in sources])
    inverse = (norms.square() / sources[0].shape[-1] + eps).rsqrt()
    return torch.stack([torch.stack([(v * folded).sum(-1) for v in sources]) * inverse, inverse])


def _forward(sources, query, norm_weight, eps, shift=None, scale=None, norm_eps=0.0, dtype=None):
    compute = torch.promote_types(sources[0].dtype, torch.float32)
    rows = [v.to(compute) for v in sources]
    logits = _logits(rows, _folded(query, norm_weight, compute)[0], eps)
    alpha = logits[0].softmax(0)
    h = alpha[0].unsqueeze(-1) * rows[0]
    for a, v in zip(alpha[1:], rows[1:]):
        h.addcmul_(a.unsqueeze(-1), v)
    h = h.to(sources[0].dtype)
    if shift is None:
        return h, logits
    normalized = F.layer_norm(h, h.shape[-1:], eps=norm_eps)
    return h, logits, torch.addcmul(shift.unsqueeze(1), normalized, 1 + scale.unsqueeze(1)).to(dtype)


def _backward(dx, dh, h, logits, sources, known, query, norm_weight, eps, shift=None, scale=None, norm_eps=0.0):
    """With r = 1 / rms(v) and s = r (v . q'):

    ds_i = a_i (dh . v_i - sum_j a_j dh . v_j),  dv = known + a dh + ds r (q' - s r / D v),  dq' = sum_i ds_i r_i v_i
    """
    dmodulation = []
    if dx is not None:
        dh, *dmodulation = _modulate_backward(dx, dh, h, shift, scale, norm_eps)
    compute, width, (logits, inverse) = logits.dtype, h.shape[-1], logits
    alpha = logits.softmax(0)
    (folded, q), rows, dh = _folded(query, norm_weight, compute), [v.to(compute) for v in sources], dh.to(compute)
    gains = torch.stack([(v * dh).sum(-1) for v in rows])
    along_q = alpha * (gains - (alpha * gains).sum(0)) * inverse
    along_v = -along_q * logits * inverse / width
    gradients, dfolded = [], torch.zeros_like(dh)
    for i, (v, a, to_q, to_v) in enumerate(zip(rows, *(each.unsqueeze(-1) for each in (alpha, along_q, along_v)))):
        dv = a * dh if known[i] is None else torch.addcmul(known[i].to(compute), a, dh)
        gradients.append(dv.addcmul_(to_q, folded).addcmul_(to_v, v).to(sources[i].dtype))
        dfolded.addcmul_(to_q, v)
    dquery = (dfolded * (norm_weight / math.sqrt(width))).sum_to_size(q.shape).view_as(query)
    dweight = (dfolded * (q / math.sqrt(width))).sum((0, 1))
    return gradients, dquery.to(query.dtype), dweight.to(norm_weight.dtype), *dmodulation


def _modulate_backward(dx, dh, h, shift, scale, norm_eps):
    normalized, mean, inverse = torch.native_layer_norm(h, h.shape[-1:], None, None, norm_eps)
    dx = dx.to(mean.dtype)
    dn = (dx * (1 + scale.unsqueeze(1))).to(h.dtype)
    total, *_ = torch.ops.aten.native_layer_norm_backward(
        dn, h, h.shape[-1:], mean, inverse, None, None, [True, False, False]
    )
    total = total if dh is None else total + dh
    return total, dx.sum(1).to(shift.dtype), (dx * normalized).sum(1).to(scale.dtype)


register("torch", _forward, _backward)

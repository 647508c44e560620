"""Fused depth routing in Triton: one read of every source forward, one read backward (kernels/README.md).

`kernels.route` and `kernels.route_modulate` check the arguments and choose this backend; operators.py has derivatives.

One program handles one token forward, and a few of a sample one after the other backward, with one warp per 1280
numbers of width. A row then lives in registers, and its sums need no shared memory. Triton's tensors have powers of
two as sizes, so a row is held in two pieces, HEAD + TAIL: 1152 = 1024 + 128, 768 = 512 + 256 and 384 = 256 + 128 waste
nothing.

The kernels take the sources' addresses as launch arguments, in tuples padded to 8, 16, 32, ... entries, and keep them
in registers. Nothing is stacked, no table is copied to the device, CUDA graphs can record the launch, and one compiled
kernel serves every number of sources up to the padding. The addresses are plain integers: Triton's launcher takes
several times as long over a tensor.

Shapes: B batch, T tokens, D width, n sources, P programs per sample.
"""

import functools
import itertools
import math

import torch
import triton
import triton.language as tl

from kernels.operators import gradient_tensors, register

# Tokens per program of the backward passes. More of them write fewer partial sums; fewer fill the GPU.
BACKWARD_ROWS, MODULATE_ROWS = 8, 4
STAGES = 3  # a source is loaded two iterations before it is used
WIDTH_PER_WARP = 1280
FEWEST_SLOTS = 8


# ---- rows ----


@triton.jit
def _load(pointer, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    tail = HEAD + tl.arange(0, TAIL)
    return (
        tl.load(pointer + tl.arange(0, HEAD)).to(tl.float32),
        tl.load(pointer + tail, mask=tail < D, other=0.0).to(tl.float32),
    )


@triton.jit
def _store(pointer, a, b, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    tail = HEAD + tl.arange(0, TAIL)
    tl.store(pointer + tl.arange(0, HEAD), a.to(pointer.dtype.element_ty))
    tl.store(pointer + tail, b.to(pointer.dtype.element_ty), mask=tail < D)


# Masked without a branch, so that loads can run iterations ahead.
@triton.jit
def _load_if(wanted, pointer, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Zeros, and no traffic, unless `wanted`."""
    head, tail = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    return (
        tl.load(pointer + head, mask=wanted & (head < D), other=0.0).to(tl.float32),
        tl.load(pointer + tail, mask=wanted & (tail < D), other=0.0).to(tl.float32),
    )


@triton.jit
def _dot(a, b, c, d):
    return tl.sum(a * c) + tl.sum(b * d)


# ---- addresses ----


@triton.jit
def _in_registers(addresses):
    """A tuple of addresses as one tensor (slots)."""
    slots = tl.arange(0, len(addresses))
    table = tl.zeros([len(addresses)], tl.int64)
    for i in tl.static_range(len(addresses)):
        table = tl.where(slots == i, addresses[i].to(tl.int64), table)
    return table


@triton.jit
def _entry(table, i):
    return tl.sum(tl.where(tl.arange(0, table.shape[0]) == i, table, 0))


@triton.jit
def _row_at(address, like, offset, ALIGN: tl.constexpr):
    """Pointer to the row at `offset` of the tensor at this address; `like` is a pointer of the same dtype."""
    return tl.multiple_of(address.to(like.dtype), ALIGN) + offset


# ---- kernels ----

# Or n = 1 and n = 16, and addresses that are a multiple of 16, would each be compiled again.
UNSPECIALIZED = ["sources", "known", "gradients", "num_sources", "tokens"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward(
    sources, num_sources, query, query_sample_stride, query_row_stride, weight, eps,
    h, lse, x, shift, scale, shift_stride, scale_stride, norm_eps, tokens, MODULATE: tl.constexpr,
    ALIGN: tl.constexpr, STAGES: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """h = softmax-weighted sum of the sources (Eq. 5-6); with MODULATE also x = LayerNorm(h) (1 + scale) + shift."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // tokens
    table = _in_registers(sources)
    g_a, g_b = _load(weight, D, HEAD, TAIL)
    q_a, q_b = _load(query + sample * query_sample_stride + row * query_row_stride, D, HEAD, TAIL)
    q_a, q_b = q_a * g_a * (1 / D**0.5), q_b * g_b * (1 / D**0.5)
    largest, total = float("-inf"), 0.0
    h_a, h_b = tl.zeros([HEAD], tl.float32), tl.zeros([TAIL], tl.float32)
    for i in tl.range(0, num_sources, num_stages=STAGES):
        v_a, v_b = _load(_row_at(_entry(table, i), h, row * D, ALIGN), D, HEAD, TAIL)
        logit = _dot(v_a, v_b, q_a, q_b) * tl.math.rsqrt(_dot(v_a, v_b, v_a, v_b) / D + eps)
        new = tl.maximum(largest, logit)
        shrink, p = tl.exp(largest - new), tl.exp(logit - new)
        total = total * shrink + p
        h_a, h_b = h_a * shrink + p * v_a, h_b * shrink + p * v_b
        largest = new
    h_a, h_b = h_a / total, h_b / total
    _store(h + row * D, h_a, h_b, D, HEAD, TAIL)
    # A single source has all the weight. -inf makes the backward see exactly that, whatever its logit rounds to.
    tl.store(lse + row, tl.where(num_sources == 1, float("-inf"), largest + tl.log(total)))
    if MODULATE:
        n_a, n_b, _ = _normalized(h_a, h_b, norm_eps, D, HEAD, TAIL)
        s_a, s_b = _load(scale + sample * scale_stride, D, HEAD, TAIL)
        b_a, b_b = _load(shift + sample * shift_stride, D, HEAD, TAIL)
        _store(x + row * D, n_a * (1 + s_a) + b_a, n_b * (1 + s_b) + b_b, D, HEAD, TAIL)


@triton.jit
def _normalized(a, b, eps, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """(a, b) without its mean and divided by its deviation, and the reciprocal of that deviation."""
    mean = (tl.sum(a) + tl.sum(b)) / D
    a, b = a - mean, tl.where(HEAD + tl.arange(0, TAIL) < D, b - mean, 0.0)
    inverse = tl.math.rsqrt(_dot(a, b, a, b) / D + eps)
    return a * inverse, b * inverse, inverse


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward(
    sources, num_sources, known, gradients, dh, h, lse,
    query, query_sample_stride, query_row_stride, weight, eps, dquery, parts, tokens, PER_TOKEN: tl.constexpr,
    ALIGN: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Gradients of all sources in one read of them, each added to what is `known` of it unless that address is 0.

    With s = r (v . q') / sqrt(D), q' = g * q and r = 1 / rms(v):
        ds = a (dh . v - dh . h)             as sum_j a_j (dh . v_j) = dh . h, no second pass over the sources
        dv = a dh + ds (r q' / sqrt(D) - s r^2 v / D)
        dq' = sum over sources, and tokens where they share a query, of ds r v / sqrt(D)
    parts is one sum per program, (B, P, D): of dq', or with PER_TOKEN of q dq', the gradient of g.

    In half precision the kept h is rounded, and the ds sum to some e (`excess`) instead of 0. That hardly shows in
    dv, but dq' is a small difference of large terms where sources resemble each other, so e is taken out:
        dq' = (sum of ds r v - e * sum of a r v) / sqrt(D)
    """
    blocks = tl.cdiv(tokens, ROWS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * ROWS
    source_table, known_table = _in_registers(sources), _in_registers(known)
    gradient_table = _in_registers(gradients)
    query += sample * query_sample_stride
    dq_a, dq_b = tl.zeros([HEAD], tl.float32), tl.zeros([TAIL], tl.float32)
    dg_a, dg_b = tl.zeros([HEAD], tl.float32), tl.zeros([TAIL], tl.float32)
    for token in range(first, tl.minimum(first + ROWS, tokens)):
        row = sample * tokens + token
        g_a, g_b = _load(weight, D, HEAD, TAIL)
        q_a, q_b = _load(query + row * query_row_stride, D, HEAD, TAIL)
        q_a, q_b = q_a * g_a * (1 / D**0.5), q_b * g_b * (1 / D**0.5)
        dh_a, dh_b = _load(dh + row * D, D, HEAD, TAIL)
        h_a, h_b = _load(h + row * D, D, HEAD, TAIL)
        dh_h = _dot(dh_a, dh_b, h_a, h_b)
        logsumexp = tl.load(lse + row)
        if PER_TOKEN:
            dq_a, dq_b = tl.zeros([HEAD], tl.float32), tl.zeros([TAIL], tl.float32)
        excess = 0.0
        mean_a, mean_b = tl.zeros([HEAD], tl.float32), tl.zeros([TAIL], tl.float32)
        for i in tl.range(0, num_sources, num_stages=STAGES):
            v_a, v_b = _load(_row_at(_entry(source_table, i), h, row * D, ALIGN), D, HEAD, TAIL)
            r = tl.math.rsqrt(_dot(v_a, v_b, v_a, v_b) / D + eps)
            logit = r * _dot(v_a, v_b, q_a, q_b)
            a = tl.minimum(tl.exp(logit - logsumexp), 1.0)
            ds = tl.where(a < 1.0, a * (_dot(v_a, v_b, dh_a, dh_b) - dh_h), 0.0)
            along_q, along_v = ds * r, -ds * logit * r * r / D
            k = _entry(known_table, i)
            k_a, k_b = _load_if(k != 0, _row_at(k, h, row * D, ALIGN), D, HEAD, TAIL)
            dv_a = k_a + a * dh_a + along_q * q_a + along_v * v_a
            dv_b = k_b + a * dh_b + along_q * q_b + along_v * v_b
            _store(_row_at(_entry(gradient_table, i), h, row * D, ALIGN), dv_a, dv_b, D, HEAD, TAIL)
            dq_a, dq_b = dq_a + along_q * v_a, dq_b + along_q * v_b
            mean_a, mean_b = mean_a + (a * r) * v_a, mean_b + (a * r) * v_b
            excess += ds
        dq_a, dq_b = dq_a - excess * mean_a, dq_b - excess * mean_b
        if PER_TOKEN:
            q_a, q_b = _load(query + row * query_row_stride, D, HEAD, TAIL)
            g_a, g_b = _load(weight, D, HEAD, TAIL)
            _store(dquery + row * D, dq_a * g_a / D**0.5, dq_b * g_b / D**0.5, D, HEAD, TAIL)
            dg_a, dg_b = dg_a + dq_a * q_a, dg_b + dq_b * q_b
    if not PER_TOKEN:
        dg_a, dg_b = dq_a, dq_b
    _store(parts + tl.program_id(0).to(tl.int64) * D, dg_a / D**0.5, dg_b / D**0.5, D, HEAD, TAIL)


@triton.jit(do_not_specialize=["tokens"])
def _modulate_backward(
    dx, dh_direct, h, scale, scale_stride, norm_eps, dh, dshift_parts, dscale_parts, tokens,
    ROWS: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Gradients of x = LayerNorm(h) (1 + scale) + shift; dh_direct, unless None, is what reached h past x."""
    blocks = tl.cdiv(tokens, ROWS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * ROWS
    shift_a, shift_b = tl.zeros([HEAD], tl.float32), tl.zeros([TAIL], tl.float32)
    scale_a, scale_b = tl.zeros([HEAD], tl.float32), tl.zeros([TAIL], tl.float32)
    for token in range(first, tl.minimum(first + ROWS, tokens)):
        at = (sample * tokens + token) * D
        dx_a, dx_b = _load(dx + at, D, HEAD, TAIL)
        n_a, n_b = _load(h + at, D, HEAD, TAIL)
        n_a, n_b, inverse = _normalized(n_a, n_b, norm_eps, D, HEAD, TAIL)
        shift_a, shift_b = shift_a + dx_a, shift_b + dx_b
        scale_a, scale_b = scale_a + dx_a * n_a, scale_b + dx_b * n_b
        s_a, s_b = _load(scale + sample * scale_stride, D, HEAD, TAIL)
        dn_a, dn_b = dx_a * (1 + s_a), dx_b * (1 + s_b)
        mean, along = (tl.sum(dn_a) + tl.sum(dn_b)) / D, _dot(dn_a, dn_b, n_a, n_b) / D
        dh_a, dh_b = inverse * (dn_a - mean - along * n_a), inverse * (dn_b - mean - along * n_b)
        if dh_direct is not None:
            k_a, k_b = _load(dh_direct + at, D, HEAD, TAIL)
            dh_a, dh_b = dh_a + k_a, dh_b + k_b
        _store(dh + at, dh_a, dh_b, D, HEAD, TAIL)
    part = tl.program_id(0).to(tl.int64) * D
    _store(dshift_parts + part, shift_a, shift_b, D, HEAD, TAIL)
    _store(dscale_parts + part, scale_a, scale_b, D, HEAD, TAIL)


# ---- launches ----

INTERPRETED = not isinstance(_forward, triton.JITFunction)  # TRITON_INTERPRET=1: NumPy on the CPU


@functools.cache
def _options(width):
    """What the kernels of this width are compiled with."""
    head = 1 << max(0, (width - 1).bit_length() - 1)  # more than half of the row
    tail = 1 << max(0, width - head - 1).bit_length()
    warps = min(16, 1 << (-(-width // WIDTH_PER_WARP) - 1).bit_length())
    return {"D": width, "HEAD": head, "TAIL": tail, "num_warps": warps}


def _addresses(*lists):
    """The addresses of the tensors of each list, 0 for None, padded; and their common alignment in bytes."""
    tables = [[0 if tensor is None else tensor.data_ptr() for tensor in tensors] for tensors in lists]
    slots = max(FEWEST_SLOTS, 1 << (len(tables[0]) - 1).bit_length())
    padded = [(*table, *[0] * (slots - len(table))) for table in tables]
    return *padded, math.gcd(16, *itertools.chain(*tables))


def _strides(query):
    """The query of a row of (B * T, D) lies at sample * first + row * second."""
    width = query.shape[-1]
    return ((0, 0), (width, 0), (0, width))[query.ndim - 1]


def _launch_forward(sources, query, norm_weight, eps, shift=None, scale=None, norm_eps=0.0, dtype=None):
    sources, query, norm_weight = [v.contiguous() for v in sources], query.contiguous(), norm_weight.contiguous()
    batch, tokens, width = sources[0].shape
    h = torch.empty_like(sources[0])
    lse = h.new_empty(batch, tokens, dtype=torch.float32)
    x, modulation = None, (None, None, 0, 0)
    if shift is not None:
        x = torch.empty_like(h, dtype=dtype)
        shift, scale = (value if value.stride(-1) == 1 else value.contiguous() for value in (shift, scale))
        modulation = (shift, scale, shift.stride(0), scale.stride(0))
    if h.numel():
        addresses, align = _addresses(sources)
        with torch.cuda.device_of(h):
            _forward[batch * tokens,](
                addresses, len(sources), query, *_strides(query), norm_weight, eps, h, lse, x, *modulation, norm_eps,
                tokens, MODULATE=x is not None, ALIGN=align, STAGES=STAGES, **_options(width),
            )  # fmt: skip
    return (h, lse) if x is None else (h, lse, x)


def _launch_modulate_backward(dx, dh, h, shift, scale, norm_eps):
    dx, dh = dx.contiguous(), None if dh is None else dh.contiguous()
    scale = scale if scale.stride(-1) == 1 else scale.contiguous()
    batch, tokens, width = h.shape
    total = torch.empty_like(h)
    parts = h.new_empty((2, batch, -(-tokens // MODULATE_ROWS), width), dtype=torch.float32)
    if h.numel():
        with torch.cuda.device_of(h):
            _modulate_backward[batch * parts.shape[2],](
                dx, dh, h, scale, scale.stride(0), norm_eps, total, parts[0], parts[1], tokens,
                ROWS=MODULATE_ROWS, **_options(width),
            )  # fmt: skip
    return total, parts[0].sum(1).to(shift.dtype), parts[1].sum(1).to(scale.dtype)


def _launch_backward(
    dx, dh, h, lse, sources, known, query, norm_weight, eps, shift=None, scale=None, norm_eps=0.0, in_place=False
):  # fmt: skip
    dmodulation = []
    if dx is not None:
        dh, *dmodulation = _launch_modulate_backward(dx, dh, h, shift, scale, norm_eps)
    sources, known = [v.contiguous() for v in sources], [g if g is None else g.contiguous() for g in known]
    dh, query, norm_weight = dh.contiguous(), query.contiguous(), norm_weight.contiguous()
    batch, tokens, width = h.shape
    programs = -(-tokens // BACKWARD_ROWS)
    per_token = query.ndim == 3
    gradients = gradient_tensors(h, known, in_place)
    # One partial sum per program, added up below in a fixed order: float atomics would vary from run to run.
    parts = h.new_empty((batch, programs, width), dtype=torch.float32)
    dquery = torch.empty_like(query) if per_token else None
    if h.numel():
        *addresses, align = _addresses(sources, known, gradients)
        with torch.cuda.device_of(h):
            _backward[batch * programs,](
                addresses[0], len(sources), *addresses[1:], dh, h, lse,
                query, *_strides(query), norm_weight, eps, dquery, parts, tokens,
                PER_TOKEN=per_token, ALIGN=align, STAGES=STAGES, ROWS=BACKWARD_ROWS, **_options(width),
            )  # fmt: skip
    if per_token:
        return gradients, dquery, parts.sum((0, 1)).to(norm_weight.dtype), *dmodulation
    dq = parts.sum((1, 0)[: 3 - query.ndim])
    dweight = (dq * query).reshape(-1, width).sum(0)
    return gradients, (dq * norm_weight).to(query.dtype), dweight.to(norm_weight.dtype), *dmodulation


register("triton", _launch_forward, _launch_backward, namespace="dar")

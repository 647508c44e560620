"""The public routing operator and its choice of backend.

    from kernels import route
    h = route(sources, query, norm_weight)

Shapes: B batch, T tokens, D width, n sources.
"""

from kernels import reference

BACKENDS = {"torch": reference.route}


def route(sources, query, norm_weight, eps=1e-6, backend="auto", return_weights=False):
    """Aggregate earlier sublayer outputs by a softmax over depth, one per token (DAR, arXiv 2605.20708, Eq. 5-6).

        h = sum_i a_i v_i,   a = softmax_i(q . k_i / sqrt(D)),   k_i = norm_weight * RMSNorm(v_i)

    sources:     sequence of n >= 1 tensors (B, T, D); their dtypes may differ.
    query:       (D) shared, (B, D) one per sample, or (B, T, D) one per token.
    norm_weight: (D).
    eps:         added to the mean square inside the RMSNorm.
    backend:     "torch" (plain PyTorch, runs anywhere) or "auto" (the fastest that the device has).
    Returns h (B, T, D) in the common dtype of the sources; with `return_weights`, also a (n, B, T).
    Normalisation, logits, softmax and sum are float32 (float64 for float64 sources).
    Raises ValueError on an empty list, on shapes that do not fit together, and on an unknown backend.
    """
    _check_shapes(sources, query, norm_weight)
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(['auto', *BACKENDS])}")
    h, alpha = BACKENDS["torch" if backend == "auto" else backend](sources, query, norm_weight, eps)
    return (h, alpha) if return_weights else h


def _check_shapes(sources, query, norm_weight):
    if len(sources) == 0:
        raise ValueError("sources is empty; a state needs at least v_0 to be routed from")
    shape = sources[0].shape
    if len(shape) != 3:
        raise ValueError(f"sources must be (B, T, D); source 0 is {tuple(shape)}")
    for i, v in enumerate(sources):
        if v.shape != shape:
            raise ValueError(f"all sources must have one shape; source 0 is {tuple(shape)}, "
                             f"source {i} {tuple(v.shape)}")
    batch, tokens, width = shape
    if tuple(query.shape) not in {(width,), (batch, width), (batch, tokens, width)}:
        raise ValueError(f"query is {tuple(query.shape)}; sources {tuple(shape)} need ({width},), "
                         f"({batch}, {width}) or ({batch}, {tokens}, {width})")
    if tuple(norm_weight.shape) != (width,):
        raise ValueError(f"norm_weight is {tuple(norm_weight.shape)}; sources {tuple(shape)} need ({width},)")

"""Fused depth routing on a CPU: compiles route_cpu.c once and calls it by ctypes (kernels/README.md).

The library is kept in $XDG_CACHE_HOME or ~/.cache under a hash of all that it depends on, the processor included: a
home may be shared by machines that differ.

Shapes: B batch, T tokens, D width, n sources.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from ctypes import c_float, c_int, c_ssize_t, c_void_p
from pathlib import Path

import torch

from kernels.operators import gradient_tensors, register

SOURCE = Path(__file__).with_suffix(".c")
# Not -ffast-math: to load its result would flush denormal numbers in the whole process, and NaN would be lost.
FLAGS = "-O3 -march=native -fPIC -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math"
FLAGS += " -funroll-loops -fvariable-expansion-in-unroller"
# With OpenMP where PyTorch's own can serve it, as it is not linked; otherwise one thread.
THREADS = ("-fopenmp", "-fopenmp-simd")


class Shape(ctypes.Structure):
    _fields_ = [*((name, c_ssize_t) for name in "BTDn"), ("threads", c_int)]


class Rows(ctypes.Structure):
    _fields_ = [("first", c_void_p), ("sample_stride", c_ssize_t), ("token_stride", c_ssize_t)]


P = c_void_p
ARGUMENTS = {
    "dar_forward": (Shape, P, Rows, P, c_float, P, P, P, Rows, Rows, c_float),
    "dar_backward": (Shape, P, P, P, P, P, P, Rows, P, c_float, Rows, c_float, P, Rows, P, P, P),
}


# ---- the library ----


@torch.compiler.assume_constant_result
def why_not() -> str:
    """Why this backend cannot be had here, "" if it can."""
    return "" if isinstance(_library(), ctypes.CDLL) else _library()


@functools.cache
def _library():
    """The loaded library, or why there is none."""
    try:
        library = _loaded()
    except OSError as error:
        return str(error)
    for name, types in ARGUMENTS.items():
        getattr(library, name).argtypes, getattr(library, name).restype = types, None
    return library


def _loaded():
    if os.name != "posix":
        raise OSError(f"route_cpu.c is not compiled on {sys.platform}")
    folder, compiler, failure = _folder(), shlex.split(os.environ.get("CC", "cc")), None
    for threads in THREADS:
        command = [*compiler, *FLAGS.split(), threads]
        key = hashlib.sha256(repr((SOURCE.read_bytes(), command, _processor())).encode()).hexdigest()
        path = folder / f"route_cpu-{key[:16]}.so"
        try:
            if not _intact(path):
                _build(command, compiler, path)
            return ctypes.CDLL(str(path))
        except OSError as error:
            failure = failure or error
    raise failure


def _folder():
    """A private one: who could write to it could run code as this user."""
    for parent in (os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", tempfile.gettempdir()):
        folder = Path(parent, f"dar-{os.getuid()}")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.lstat()
        except OSError:
            continue
        if found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    raise OSError(f"no folder to compile in: {folder} is not this user's alone")


def _processor():
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.platform()
    return re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*", text.partition("\n\n")[0], re.MULTILINE)


def _intact(path):
    """Its last 32 bytes, which the loader ignores, are a checksum: half a library would end the process."""
    content = path.read_bytes() if path.exists() else b""
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _build(command, compiler, path):
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, "made")
        parts = f"{made}.o"
        for words in ([*command, "-c", SOURCE, "-o", parts], [*compiler, "-shared", parts, "-o", made, "-lm"]):
            try:
                done = subprocess.run(words, capture_output=True, text=True)
            except OSError as error:
                raise OSError(f"no C compiler: {compiler[0]}: {error.strerror} (CC names another)") from None
            if done.returncode:
                raise OSError(f"{compiler[0]} cannot compile route_cpu.c: {done.stderr.strip().splitlines()[-1:]}")
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        made.replace(path)  # atomic: several processes may be at it
    print(f"compiled {SOURCE.name} in {time.perf_counter() - began:.1f} s, kept as {path}", file=sys.stderr, flush=True)


# ---- calls ----


# Between large sources the caches are cold, and each call into PyTorch takes some 20 us: these avoid what they can.


def _cast(tensor, dtype):
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _plain(tensor):
    tensor = _cast(tensor, torch.float32)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def _pointers(tensors):
    return _array(len(tensors))(*map(_pointer, tensors))


@functools.cache
def _array(length):
    return c_void_p * length


def _query_rows(query, tokens):
    width = query.shape[-1]
    return Rows(query.data_ptr(), *((0, 0), (width, 0), (tokens * width, width))[query.ndim - 1])


def _modulation(tensor):
    """(B, D) as float32 with contiguous rows, and its Rows. One of adaLN's six chunks is not copied."""
    tensor = _cast(tensor, torch.float32)
    tensor = tensor if tensor.stride(1) == 1 else tensor.contiguous()
    return tensor, Rows(tensor.data_ptr(), tensor.stride(0), 0)


def _forward(sources, query, norm_weight, eps, shift=None, scale=None, norm_eps=0.0, dtype=None):
    sources, query, norm_weight = [_plain(v) for v in sources], _plain(query), _plain(norm_weight)
    batch, tokens, width = sources[0].shape
    h, x, rows = torch.empty_like(sources[0]), None, (Rows(), Rows())
    lse = h.new_empty(batch, tokens)
    if shift is not None:
        x, (shift, *shift_rows), (scale, *scale_rows) = torch.empty_like(h), _modulation(shift), _modulation(scale)
        rows = (*shift_rows, *scale_rows)
    _library().dar_forward(
        Shape(batch, tokens, width, len(sources), torch.get_num_threads()), _pointers(sources),
        _query_rows(query, tokens), norm_weight.data_ptr(), eps, h.data_ptr(), lse.data_ptr(), _pointer(x), *rows,
        norm_eps,
    )  # fmt: skip
    return (h, lse) if x is None else (h, lse, _cast(x, dtype))


def _backward(
    dx, dh, h, lse, sources, known, query, norm_weight, eps, shift=None, scale=None, norm_eps=0.0, in_place=False
):  # fmt: skip
    kinds = [tensor.dtype for tensor in (query, norm_weight, shift, scale) if tensor is not None]
    sources, known = [_plain(v) for v in sources], [None if g is None else _plain(g) for g in known]
    query, norm_weight, dh = _plain(query), _plain(norm_weight), None if dh is None else _plain(dh)
    batch, tokens, width = h.shape
    gradients = gradient_tensors(h, known, in_place)
    totals = [torch.empty_like(query), torch.empty_like(norm_weight)]
    rows, parts = Rows(), h.new_empty(2, batch, width)
    if dx is not None:
        dx, (scale, rows) = _plain(dx), _modulation(scale)
        totals += [h.new_empty(batch, width), h.new_empty(batch, width)]
    dquery, *pointers = totals if dx is not None else (*totals, None, None)
    _library().dar_backward(
        Shape(batch, tokens, width, len(sources), torch.get_num_threads()), _pointers(sources), _pointers(known),
        _pointers(gradients), _pointer(dx), _pointer(dh), h.data_ptr(), _query_rows(query, tokens),
        norm_weight.data_ptr(), eps, rows, norm_eps, parts.data_ptr(), _query_rows(dquery, tokens),
        *map(_pointer, pointers),
    )  # fmt: skip
    return gradients, *map(_cast, totals, kinds)


register("cpu", _forward, _backward, namespace="dar_cpu")

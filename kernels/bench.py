"""Times the routing kernels beside PyTorch and the public packages, and a training step with and without them.

    python -m kernels.bench --out kernels/bench-h100

Measures one aggregation (forward, backward, both) for every number of sources, width and query; then all aggregators
of a model; then its training step. Every method is first compared with float64, gradients included; one that differs
is reported as wrong and not timed. Writes OUT.json and OUT.md, with the goals beside the measurements. The part `tune`
times the kernels alone, with other rows per program and loads ahead than those that are set.

Device times: each call is recorded as a CUDA graph and replayed with a cold L2 cache. Steps are timed as they run.
"""

import functools
import importlib.metadata
import itertools
import sys
import time
import unittest.mock
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import triton
import tyro
from torch.nn import functional as F

from kernels import reference, resolve_backend, route, route_triton
from models.dar import QUERIES, DepthRouter
from models.sit import SIT_MODELS
from models.streams import ResidualStream, RoutedStream
from runtime import Ranks, environment, write_json

TOLERANCE = 2e-2  # of a norm in bf16: operands with 2^-9 each, and logits that grow with sqrt(D)
QUANTILES = (0.2, 0.5, 0.8)
PARTS = ("operators", "stacks", "steps", "tune")
METHODS = ("eager", "compiled", "fla", "liger", "fused")
STEPS = {
    "residual": {},
    "DAR eager": {"routing": "dar", "route_backend": "torch"},
    "DAR fused": {"routing": "dar", "route_backend": "triton"},
    "DAR fused, dynamic": {"routing": "dar", "route_backend": "triton", "query": "dynamic"},
}
COMPILED = {f"{name}, compiled": name for name in STEPS if name != "DAR eager"}  # whose 522 reads would be unrolled
PEERS = {"fla": "flash-linear-attention", "liger": "liger-kernel"}


@dataclass(frozen=True)
class Options:
    out: Path = Path("kernels/bench")
    """Where to write, without suffix."""
    parts: tuple[Literal[PARTS], ...] = PARTS[:3]
    """One aggregation; all aggregators of a model; its training step; settings of the kernels."""
    methods: tuple[Literal[METHODS], ...] = METHODS
    """Of one aggregation; compiling takes most of the time."""
    sources: tuple[int, ...] = (1, 4, 8, 18, 32, 57)
    widths: tuple[int, ...] = (384, 768, 1152)
    queries: tuple[Literal[QUERIES], ...] = QUERIES
    batch: int = 32
    tokens: int = 256
    """Of one aggregation; a model has its own."""
    model: Literal[tuple(SIT_MODELS)] = "SiT-XL/2"
    depth: int | None = None
    """Blocks, if not those of the model."""
    input_size: int = 32
    chunk_sizes: tuple[int, ...] = (1, 4, 8)
    step_arms: tuple[Literal[(*STEPS, *COMPILED)], ...] = (*STEPS, *COMPILED)
    """Of the training steps; compiling DAR takes minutes."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu, with TRITON_INTERPRET=1, tries the script; its times mean nothing."""


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if the fused kernels were wrong in any row, otherwise 0."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    device = torch.device(options.device)
    try:
        resolve_backend("triton", device)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device here; with TRITON_INTERPRET=1, --device cpu tries the script")
    if device.type == "cuda":  # a backward pass runs where its forward pass ran, and the default stream is not recorded
        torch.cuda.set_stream(torch.cuda.Stream())
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # or a compiled backward could be called only once
    versions = {package: version_of(package) for package in ("triton", *PEERS.values())}
    result = environment(Ranks()) | {"versions": versions, "batch": options.batch, "tokens": options.tokens}
    result["device"] = result["gpu"] if device.type == "cuda" else f"{result['cpu']}, interpreted"
    result["copy_gb_per_s"] = copy_bandwidth(device) / 1e6
    print(f"{result['device']}: copies {result['copy_gb_per_s']:.0f} GB/s, read and write counted", flush=True)
    for kind in QUERIES:  # what stacks and steps are made of
        error = parity(method_named("fused", kind, 9), options, max(options.widths), kind, 9, device)
        if not error < TOLERANCE:
            raise SystemExit(f"error: the fused kernels are wrong ({kind} query, error {error:.1e}): nothing is timed")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        result[part] = []
        for row in {"operators": operators, "stacks": stacks, "steps": steps, "tune": tune}[part](options, device):
            result[part].append(row)
            print(" | ".join(map(cell, row.values())), flush=True)
            result["goals"] = goals(result)
            write_json(Path(f"{options.out}.json"), result)  # after every row, so that an interrupted run keeps it
            Path(f"{options.out}.md").write_text(markdown(result))
    print(f"wrote {options.out}.json and {options.out}.md")
    return int(any("wrong" in row for part in options.parts for row in result[part] if row.get("method") == "fused"))


# ---- one aggregation ----


def operators(options, device):
    methods = [name for name in METHODS if name in options.methods]
    for width, kind, n, name in itertools.product(options.widths, options.queries, options.sources, methods):
        torch.compiler.reset()
        if method := method_named(name, kind, n):
            row = {"width": width, "query": kind, "sources": n, "method": name}
            yield row | attempt(time_operator, method, options, width, kind, n, device)


def method_named(name, kind, n):
    """A function of (list of sources, query, norm weight) that returns h; None where there is none for these."""
    if name in ("eager", "fused"):
        return functools.partial(route, backend="torch" if name == "eager" else "triton")
    if name == "compiled":
        return torch.compile(functools.partial(route, backend="torch"), fullgraph=True, dynamic=False)
    if kind != "static" or version_of(PEERS[name]) is None:
        return None
    if name == "fla":
        from fla.ops.attnres import fused_attnres

        return lambda v, q, g: fused_attnres(q.to(v[0].dtype), v, g.to(v[0].dtype), scale=len(q) ** -0.5)
    if n > 32:
        return None
    from liger_kernel.ops.attn_res import LigerAttnResFunction

    # It has no 1 / sqrt(D). Its sources are one stacked tensor: the stacking is part of what it costs.
    return lambda v, q, g: LigerAttnResFunction.apply(
        torch.stack(v), (q * len(q) ** -0.5).to(v[0].dtype), g.to(v[0].dtype), 1e-6
    )


def time_operator(method, options, width, kind, n, device):
    error = parity(method, options, width, kind, n, device)
    if not error < TOLERANCE:
        return {"wrong": error}
    sources, query, weight, dh = inputs(options.batch, options.tokens, width, kind, n, device)
    leaves = [*sources, query, weight]
    h, before = method(sources, query, weight), reset_memory(device)
    row = {"error": error} | measure(
        device,
        before,
        forward=lambda: torch.no_grad()(method)(sources, query, weight),
        backward=lambda: torch.autograd.grad(h, leaves, dh, retain_graph=True),
        both=lambda: torch.autograd.grad(method(sources, query, weight), leaves, dh),
    )
    # Of a copy's bandwidth. Forward: sources, h. Backward: sources, their gradients, h, dh.
    for part, tensors in (("forward", n + 1), ("backward", 2 * n + 2)):
        row[f"{part}_share"] = tensors * dh.nbytes / row[part][1] / copy_bandwidth(device)
    return row


def inputs(batch, tokens, width, kind, n, device):
    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    shape = {"static": (width,), "timestep": (batch, width), "dynamic": (batch, tokens, width)}[kind]
    sources = [normal(batch, tokens, width) for _ in range(n)]
    query = normal(*shape, dtype=torch.bfloat16 if kind == "dynamic" else torch.float32)
    return sources, query, normal(width, dtype=torch.float32), normal(batch, tokens, width).detach()


def parity(method, options, width, kind, n, device):
    """Largest relative error, in norm, of h and the gradients, against float64 on two samples; NaN if any is."""
    sources, query, weight, dh = inputs(min(2, options.batch), options.tokens, width, kind, n, device)
    leaves = [*sources, query, weight]
    h = method(sources, query, weight)
    found = [h, *torch.autograd.grad(h, leaves, dh)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    h, _ = reference.route(exact[:n], exact[-2], exact[-1], 1e-6)
    expected = [h, *torch.autograd.grad(h, exact, dh.double())]
    errors = [(a.double() - b).norm() / (b.norm() if b.norm() else 1) for a, b in zip(found, expected)]
    return torch.stack(errors).max().item()


def tune(options, device):
    for width, kind, n in itertools.product(options.widths, options.queries, options.sources):
        for settings in itertools.product((4, 8, 16), (4, 8, 16), (2, 3, 4)):
            names = dict(zip(("BACKWARD_ROWS", "MODULATE_ROWS", "STAGES"), settings))
            with unittest.mock.patch.multiple(route_triton, **names):
                row = {"width": width, "query": kind, "sources": n, **names}
                yield row | attempt(time_launches, options, width, kind, n, device)


def time_launches(options, width, kind, n, device):
    sources, query, weight, dh = inputs(options.batch, options.tokens, width, kind, n, device)
    sources, known = [v.detach() for v in sources], [torch.randn_like(v) for v in sources]
    shift, scale = torch.randn(2, options.batch, width, device=device)
    before = reset_memory(device)
    common = query.detach(), weight.detach(), 1e-6
    modulation = *common[:2], shift, scale, 1e-6, 1e-6, dh.dtype
    x, h, lse = route_triton.route_modulate(sources, *modulation)
    return measure(
        device,
        before,
        forward=lambda: route_triton.route(sources, *common),
        forward_modulated=lambda: route_triton.route_modulate(sources, *modulation),
        backward=lambda: route_triton.route_backward(dh, h, lse, sources, [], *common),
        backward_with_known=lambda: route_triton.route_backward(dh, h, lse, sources, known, *common),
        backward_of_modulation=lambda: route_triton.modulate_backward(dh, None, h, shift, scale, 1e-6),
    )


# ---- all aggregators of a model, and its training step ----


def stacks(options, device):
    """Every read of a state (routing, LayerNorm, adaLN) of one pass, with sublayers that cost nothing."""
    yield {"method": "residual", "query": None, "chunk_size": None} | attempt(time_stack, None, options, device)
    backends = (("eager", "torch"), ("fused", "triton"))
    for size, kind, (name, backend) in itertools.product(options.chunk_sizes, options.queries, backends):
        row = {"method": name, "query": kind, "chunk_size": size}
        yield row | attempt(time_stack, (kind, size, backend), options, device)


def time_stack(routing, options, device):
    model = build(options, device)
    tokens_per_sample, width = model.pos_embed.shape[-2:]
    layers, router = 2 * len(model.blocks), None
    if routing:
        kind, size, backend = routing
        router = DepthRouter(layers, width, kind, min(size, layers), "dedicated", backend).to(device)
    tokens = torch.randn(options.batch, tokens_per_sample, width, device=device, requires_grad=True)
    e, shift, scale = (torch.randn(options.batch, width, device=device, requires_grad=True) for _ in range(3))
    leaves = [tokens, e, shift, scale, *(router.parameters() if router else ())]

    def forward():
        with torch.autocast(device.type, torch.bfloat16):
            stream = RoutedStream(router, tokens, e) if router else ResidualStream(tokens)
            for _ in range(layers):
                x, _ = stream.read(shift, scale)
                stream.write(x.to(torch.bfloat16))
            return stream.read(shift, scale)[0].float().sum()

    def both():
        torch.autograd.grad(forward(), leaves, allow_unused=True)

    return measure(device, reset_memory(device), forward=torch.no_grad()(forward), both=both)


def steps(options, device):
    """Forward in bf16 autocast, backward and fused AdamW, as the trainer runs them."""
    for name in options.step_arms:
        compiled = name in COMPILED
        arm = STEPS[COMPILED.get(name, name)]
        yield {"method": name} | attempt(time_step, arm, compiled, options, device)


def time_step(arm, compiled, options, device):
    torch.compiler.reset()
    before = reset_memory(device)
    model = build(options, device, **arm).train()
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x, target = torch.randn(2, options.batch, model.in_channels, model.input_size, model.input_size, device=device)
    t = torch.rand(options.batch, device=device)
    labels = torch.randint(model.num_classes, (options.batch,), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            velocity, _ = model(x, t, labels)
        F.mse_loss(velocity.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return measure(device, before, graph=False, step=step)


def build(options, device, **arm):
    depth = {"depth": options.depth} if options.depth else {}
    return SIT_MODELS[options.model](input_size=options.input_size, align_dims=(), **depth, **arm).to(device)


# ---- measuring ----


def attempt(measure, *arguments):
    """What it measured, or why it could not: a method that fails must not end the others' comparison."""
    try:
        return measure(*arguments)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:  # of a peer package or the compiler, whatever it may be
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:100]}


def measure(device, before, graph=True, **calls):
    """Times of all calls, and the peak of memory of the last one above `before`."""
    *_, last = calls.values()
    for _ in range(2):  # the first step allocates the optimizer's state
        last()
    peak = round((torch.cuda.max_memory_allocated() - before) / 2**20)
    return {name: quantiles(call, device, graph) for name, call in calls.items()} | {"peak_mib": peak}


def quantiles(function, device, graph=True):
    """20, 50 and 80 % quantiles of the time of a call, in milliseconds; on a CPU the time of one call."""
    if device.type != "cuda":
        began = time.perf_counter()
        function()
        return [1e3 * (time.perf_counter() - began)] * 3
    if not graph:
        return list(triton.testing.do_bench(function, warmup=500, rep=2000, quantiles=QUANTILES))
    for _ in range(3):  # compiles, and fills the allocator, before the recording
        function()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded, stream=torch.cuda.current_stream()):
        function()
    return list(triton.testing.do_bench(recorded.replay, warmup=20, rep=100, quantiles=QUANTILES))


@functools.cache
def copy_bandwidth(device):
    """Bytes per millisecond, read and write counted."""
    source = torch.empty(2**29 if device.type == "cuda" else 2**20, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    # Not as a graph: there a copy goes through the copy engines, which are slower.
    return 2 * source.nbytes / quantiles(lambda: target.copy_(source), device, graph=False)[1]


def reset_memory(device):
    """The bytes in use; a peak counts from here."""
    torch.cuda.empty_cache()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def version_of(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- the report ----


def cell(value):
    if isinstance(value, list):
        return "{1:.3f} ({0:.3f}-{2:.3f})".format(*value)
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def table(rows):
    header = list(dict.fromkeys(key for row in rows for key in row))
    lines = [header, ["---"] * len(header), *([cell(row.get(key)) for key in header] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def goals(result):
    """What was measured for each goal, in the worst of its shapes; None if nothing was."""
    rows = [row for row in result.get("operators", []) if "forward" in row]
    rows = {(row["method"], row["width"], row["query"], row["sources"]): row for row in rows}
    wide = [row for (method, width, _, n), row in rows.items() if (method, width) == ("fused", 1152) and n >= 8]

    def over_fused(method, parts, count=None):
        shapes = [shape for name, *shape in rows if name == method and ("fused", *shape) in rows]
        shapes = [shape for shape in shapes if count in (None, shape[2])]
        return [rows[method, *shape][part][1] / rows["fused", *shape][part][1] for shape in shapes for part in parts]

    found, forward = {}, [row["forward_share"] for row in wide]
    # The floor reads the sources and writes their gradients: 2 n of the 2 n + 2 tensors.
    backward = [(1 + 1 / row["sources"]) / row["backward_share"] for row in wide]
    found["forward, share of copy bandwidth, n >= 8, D = 1152: at least 0.85"] = min(forward, default=None)
    found["backward, times the floor, n >= 8, D = 1152: at most 1.3"] = max(backward, default=None)
    for peer in PEERS:
        ratios = over_fused(peer, ("forward", "backward"))
        found[f"static query, {peer} / fused: at least 1"] = min(ratios, default=None)
    for part, least in (("forward", 11.5), ("backward", 8.5)):
        ratios = over_fused("eager", (part,), 57)
        found[f"{part} at n = 57, eager / fused: at least {least}"] = min(ratios, default=None)
    done = {row["method"]: row for row in result.get("steps", []) if "step" in row}
    for suffix in ("", ", compiled"):
        residual, dar = done.get(f"residual{suffix}"), done.get(f"DAR fused{suffix}")
        times = dar["step"][1] / residual["step"][1] if residual and dar else None
        peaks = dar["peak_mib"] / max(1, residual["peak_mib"]) if residual and dar else None
        found[f"step of DAR S = 4{suffix} / residual{suffix}: at most 1.10"] = times
        found[f"memory of DAR S = 4{suffix} / residual{suffix}: at most 1.15"] = peaks
    return found


def markdown(result):
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in result["versions"].items())
    text = f"""# {result["device"]}

`{result["command"]}`

torch {result["torch"]}, {versions}, commit {result["commit"]}.
One aggregation: B = {result["batch"]}, T = {result["tokens"]}, bf16. Times are medians in milliseconds with 20 and 80 %
quantiles. A copy moves {result["copy_gb_per_s"]:.0f} GB/s, read and write counted; shares are of that, and count each
tensor that has to be read or written once. peak_mib is the peak of memory above that before.

"""
    measured = [{"goal": goal, "measured": value} for goal, value in result["goals"].items()]
    text += table([row if row["measured"] else row | {"measured": "not measured"} for row in measured])
    return text + "".join(f"\n## {part.capitalize()}\n\n{table(result[part])}" for part in PARTS if part in result)


if __name__ == "__main__":
    sys.exit(main())

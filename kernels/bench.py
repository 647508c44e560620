"""Times the routing kernels beside PyTorch and the public packages, and a training step with and without them.

    python -m kernels.bench --out kernels/bench-h100

On a GPU Triton's kernels are measured in bf16, on a CPU the C ones in float32, in CPU time of one thread.
Measures one aggregation (forward, backward, both) for every number of sources, width and query; then all aggregators
of a model; then its training step. Every method is first compared with float64, gradients included; one that differs
is reported as wrong and not timed. Writes OUT.json and OUT.md, with the goals beside the measurements. The part `tune`
times the kernels alone, with other rows per program and loads ahead than those that are set.

Device times: each call is recorded as a CUDA graph and replayed with a cold L2 cache. Steps are timed as they run; on
a CPU, of two sizes, in turns.
"""

import dataclasses
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

from kernels import reference, route, route_triton, why_not_fused
from kernels.bench_report import PARTS, PEERS, cell, goals, markdown
from models.dar import QUERIES, DepthRouter
from models.sit import SIT_MODELS
from models.streams import ResidualStream, RoutedStream
from runtime import Ranks, environment, write_json

DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
TOLERANCE = {"cuda": 2e-2, "cpu": 1e-4}  # of a norm: operands with 2^-9 each, and logits that grow with sqrt(D)
CPU_ROUNDS = 30
QUANTILES = (0.2, 0.5, 0.8)
METHODS = ("eager", "compiled", "fla", "liger", "torch", "fused")  # the first two: of reference.py
STEPS = {
    "residual": {},
    "DAR eager": {"routing": "dar", "route_backend": "torch"},
    "DAR fused": {"routing": "dar"},
    "DAR fused, dynamic": {"routing": "dar", "query": "dynamic"},
    "DAR fused, S = 1": {"routing": "dar", "chunk_size": 1},
}
COMPILED = {f"{name}, compiled": name for name in STEPS if name != "DAR eager"}  # whose 522 reads would be unrolled


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
    hidden_size: int | None = None
    num_heads: int | None = None
    input_size: int = 32
    chunk_sizes: tuple[int, ...] = (1, 4, 8)
    step_arms: tuple[Literal[(*STEPS, *COMPILED)], ...] = (*STEPS, *COMPILED)
    """Of the training steps; compiling DAR takes minutes."""
    device: Literal["cuda", "cpu"] = "cuda"


OF_CPU = Options(
    sources=(1, 4, 9, 18), widths=(64, 384), batch=64, tokens=16, model="SiT-S/2", hidden_size=64, num_heads=2,
    input_size=8, chunk_sizes=(1, 4), device="cpu",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if the fused kernels were wrong in any row, otherwise 0."""
    default = Options() if torch.cuda.is_available() else OF_CPU
    options = tyro.cli(Options, args=argv, description=__doc__, default=default)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device here; choose --device cpu")
    if reason := why_not_fused(device):
        raise SystemExit(f"error: no fused kernels to measure: {reason}")
    if device.type == "cpu":
        torch.set_num_threads(1)
    if device.type == "cuda":  # a backward pass runs where its forward pass ran, and the default stream is not recorded
        torch.cuda.set_stream(torch.cuda.Stream())
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # or a compiled backward could be called only once
    versions = {package: version_of(package) for package in ("triton", *PEERS.values())}
    result = environment(Ranks()) | {"versions": versions, "batch": options.batch, "tokens": options.tokens}
    result["device"] = result["gpu"] if device.type == "cuda" else f"{result['cpu']}, one thread"
    result["copy_gb_per_s"] = copy_bandwidth(device) / 1e6
    print(f"{result['device']}: copies {result['copy_gb_per_s']:.0f} GB/s, read and write counted", flush=True)
    for kind in QUERIES:  # what stacks and steps are made of
        error = parity(method_named("fused", kind, 9), options, max(options.widths), kind, 9, device)
        if not error < TOLERANCE[device.type]:
            raise SystemExit(f"error: the fused kernels are wrong ({kind} query, error {error:.1e}): nothing is timed")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        result[part] = []
        for row in {"operators": operators, "stacks": stacks, "steps": steps, "tune": tune}[part](options, device):
            result[part].append(row)
            print(" | ".join(map(cell, row.values())), flush=True)
            result["goals"] = goals(result) if device.type == "cuda" else {}
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


def plain(sources, query, norm_weight):
    return reference.route(sources, query, norm_weight, 1e-6)[0]


def method_named(name, kind, n):
    """A function of (list of sources, query, norm weight) that returns h; None where there is none for these."""
    if name in ("torch", "fused"):
        return functools.partial(route, backend="torch" if name == "torch" else "auto")
    if name in ("eager", "compiled"):
        return torch.compile(plain, fullgraph=True, dynamic=False) if name == "compiled" else plain
    if kind != "static" or version_of(PEERS[name]) is None:
        return None
    if name == "fla":
        from fla.ops.attnres import fused_attnres, naive_attnres

        theirs = {"cuda": fused_attnres, "cpu": naive_attnres}
        return lambda v, q, g: theirs[q.device.type](q.to(v[0].dtype), v, g.to(v[0].dtype), scale=len(q) ** -0.5)
    if n > 32 or not torch.cuda.is_available():
        return None
    from liger_kernel.ops.attn_res import LigerAttnResFunction

    # It has no 1 / sqrt(D). Its sources are one stacked tensor: the stacking is part of what it costs.
    return lambda v, q, g: LigerAttnResFunction.apply(
        torch.stack(v), (q * len(q) ** -0.5).to(v[0].dtype), g.to(v[0].dtype), 1e-6
    )


def time_operator(method, options, width, kind, n, device):
    error = parity(method, options, width, kind, n, device)
    if not error < TOLERANCE[device.type]:
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
    def normal(*shape, dtype=DTYPE[device.type]):
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    shape = {"static": (width,), "timestep": (batch, width), "dynamic": (batch, tokens, width)}[kind]
    sources = [normal(batch, tokens, width) for _ in range(n)]
    query = normal(*shape, dtype=DTYPE[device.type] if kind == "dynamic" else torch.float32)
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
    modulation, operators, unknown = (*common, shift, scale, 1e-6, dh.dtype), torch.ops.dar, [None] * n
    h, lse, x = operators.route_modulate(sources, *modulation)
    return measure(
        device,
        before,
        forward=lambda: operators.route(sources, *common),
        forward_modulated=lambda: operators.route_modulate(sources, *modulation),
        backward=lambda: operators.route_backward(dh, h, lse, sources, unknown, *common),
        backward_with_known=lambda: operators.route_backward(dh, h, lse, sources, known, *common),
        backward_of_modulation=lambda: route_triton._launch_modulate_backward(dh, None, h, shift, scale, 1e-6),
    )


# ---- all aggregators of a model, and its training step ----


def stacks(options, device):
    """Every read of a state (routing, LayerNorm, adaLN) of one pass, with sublayers that cost nothing."""
    yield {"method": "residual", "query": None, "chunk_size": None} | attempt(time_stack, None, options, device)
    backends = (("torch", "torch"), ("fused", "auto"))
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
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            stream = RoutedStream(router, tokens, e) if router else ResidualStream(tokens)
            for _ in range(layers):
                x, _ = stream.read(shift, scale)
                stream.write(x.to(DTYPE[device.type]))
            return stream.read(shift, scale)[0].float().sum()

    def both():
        torch.autograd.grad(forward(), leaves, allow_unused=True)

    return measure(device, reset_memory(device), forward=torch.no_grad()(forward), both=both)


def steps(options, device):
    """Forward, on a GPU in bf16 autocast, backward and fused AdamW, as the trainer runs them."""
    if device.type == "cpu":
        yield from steps_in_turns(options, device)
        return
    for name in options.step_arms:
        compiled = name in COMPILED
        arm = STEPS[COMPILED.get(name, name)]
        yield {"method": name} | attempt(time_step, arm, compiled, options, device)


def steps_in_turns(options, device):
    for depth in (options.depth,) if options.depth else (8, 28):
        sized = dataclasses.replace(options, depth=depth)
        names = dict.fromkeys(["residual", *(name for name in options.step_arms if name in STEPS)])
        calls = {name: step_of(STEPS[name], False, sized, device) for name in names}
        rounds = [{name: cpu_time(call) for name, call in calls.items()} for _ in range(2 + CPU_ROUNDS)][2:]
        for name in calls:  # the machine's pace changes, so each step is compared with the one beside it
            times, ratios = [times[name] for times in rounds], [times[name] / times["residual"] for times in rounds]
            measured = {"step": quantiles_of(times), "over residual": quantiles_of(ratios)}
            yield {"depth": depth, "method": name} | measured


def time_step(arm, compiled, options, device):
    before = reset_memory(device)
    return measure(device, before, graph=False, step=step_of(arm, compiled, options, device))


def step_of(arm, compiled, options, device):
    torch.compiler.reset()
    model = build(options, device, **arm).train()
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x, target = torch.randn(2, options.batch, model.in_channels, model.input_size, model.input_size, device=device)
    t = torch.rand(options.batch, device=device)
    labels = torch.randint(model.num_classes, (options.batch,), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            velocity, _ = model(x, t, labels)
        F.mse_loss(velocity.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def build(options, device, **arm):
    sizes = {name: getattr(options, name) for name in ("depth", "hidden_size", "num_heads") if getattr(options, name)}
    return SIT_MODELS[options.model](input_size=options.input_size, align_dims=(), **sizes, **arm).to(device)


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
    """20, 50 and 80 % quantiles of the time of a call, in milliseconds."""
    if device.type != "cuda":
        return quantiles_of([cpu_time(function) for _ in range(CPU_ROUNDS)])
    if not graph:
        return list(triton.testing.do_bench(function, warmup=500, rep=2000, quantiles=QUANTILES))
    for _ in range(3):  # compiles, and fills the allocator, before the recording
        function()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded, stream=torch.cuda.current_stream()):
        function()
    return list(triton.testing.do_bench(recorded.replay, warmup=20, rep=100, quantiles=QUANTILES))


def quantiles_of(times):
    return torch.tensor(times).quantile(torch.tensor(QUANTILES)).tolist()


def cpu_time(function):
    began = time.process_time()
    function()
    return 1e3 * (time.process_time() - began)


@functools.cache
def copy_bandwidth(device):
    """Bytes per millisecond, read and write counted."""
    source = torch.empty(2**29 if device.type == "cuda" else 2**24, dtype=torch.bfloat16, device=device)
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


if __name__ == "__main__":
    sys.exit(main())

"""Times the routing kernels beside PyTorch and the public packages, and a training step with and without them.

    python -m kernels.bench --out kernels/bench-h100

One aggregation (forward, backward, both) for every number of sources, width and query; then all aggregators of a
model; then its training step. Every method is first compared with float64, gradients included; one that differs is
reported as wrong and is not timed. Writes OUT.json and OUT.md, the goals beside the measurements.

Device times: each call is recorded as a CUDA graph and replayed with a cold L2 cache. Steps are timed as they run.
"""

import functools
import importlib.metadata
import importlib.util
import json
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import triton
import tyro
from torch.nn import functional as F

from kernels import reference, resolve_backend, route
from kernels.route_triton import backward_bytes, forward_bytes
from models.dar import QUERIES, DepthRouter, RoutedStream
from models.sit import SIT_MODELS, ResidualStream

TOLERANCE = 2e-2  # of a norm in bf16: operands with 2^-9 each, and logits that grow with sqrt(D)
QUANTILES = (0.2, 0.5, 0.8)


METHODS = ("eager", "compiled", "fla", "liger", "fused")


@dataclass(frozen=True)
class Options:
    out: Path = Path("kernels/bench")
    """Where to write, without suffix."""
    parts: tuple[Literal["operators", "stacks", "steps"], ...] = ("operators", "stacks", "steps")
    """One aggregation; all aggregators of a model; its training step."""
    methods: tuple[Literal["eager", "compiled", "fla", "liger", "fused"], ...] = METHODS
    """Of one aggregation; compiling takes most of the time."""
    sources: tuple[int, ...] = (1, 4, 8, 18, 32, 57)
    widths: tuple[int, ...] = (384, 768, 1152)
    queries: tuple[Literal["static", "timestep", "dynamic"], ...] = QUERIES
    batch: int = 32
    tokens: int = 256
    """Of one aggregation; a model has its own."""
    model: str = "SiT-XL/2"
    depth: int | None = None
    """Blocks, if not those of the model."""
    input_size: int = 32
    chunk_sizes: tuple[int, ...] = (1, 4, 8)
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu, with TRITON_INTERPRET=1, tries the script; its times mean nothing."""


def main(argv=None):
    options = tyro.cli(Options, args=argv, description=__doc__)
    try:
        device = torch.device(options.device)
        resolve_backend("triton", device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("no CUDA device here; with TRITON_INTERPRET=1, --device cpu tries the script")
        if options.model not in SIT_MODELS:
            raise ValueError(f"model {options.model!r} is unknown; choose one of {', '.join(SIT_MODELS)}")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # or a compiled backward could be called but once
    typed = sys.argv[1:] if argv is None else argv
    result = {
        "command": shlex.join(["python", "-m", "kernels.bench", *typed]),
        **environment(device),
        "batch_and_tokens": [options.batch, options.tokens],
        "copy_gb_per_s": copy_bandwidth(device),
    }
    print(f"{result['device']}: copies {result['copy_gb_per_s']:.0f} GB/s, read and write counted", flush=True)
    for kind in QUERIES:  # what stacks and steps are made of
        error = parity(method_named("fused", kind, 9), options, max(options.widths), kind, 9, device)
        if not error < TOLERANCE:
            raise SystemExit(f"error: the fused kernels are wrong ({kind} query, error {error:.1e}): nothing is timed")
    for part in options.parts:
        result[part] = []
        for row in {"operators": operators, "stacks": stacks, "steps": steps}[part](options, device):
            result[part].append(row)
            print(" | ".join(filter(None, cells(row, part, result["copy_gb_per_s"]))), flush=True)
            result["goals"] = goals(result)
            write(result, options.out)  # after every row: what was measured survives what comes next
    print(f"wrote {options.out}.json and {options.out}.md")
    return int(any("wrong" in row for part in options.parts for row in result[part] if row["method"] == "fused"))


def write(result, out):
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(f"{out}.md").write_text(markdown(result))


# ---- one aggregation ----


def operators(options, device):
    for width in options.widths:
        for kind in options.queries:
            for n in options.sources:
                for name in (name for name in METHODS if name in options.methods):
                    method = method_named(name, kind, n)
                    if method is None:
                        continue
                    torch.compiler.reset()
                    row = {"width": width, "query": kind, "sources": n, "method": name}
                    yield row | attempt(functools.partial(time_operator, method, options, width, kind, n, device))


def method_named(name, kind, n):
    """A function of (list of sources, query, norm weight) that returns h; None where there is none for these."""
    if name == "eager":
        return functools.partial(route, backend="torch")
    if name == "compiled":
        return torch.compile(functools.partial(route, backend="torch"), fullgraph=True, dynamic=False)
    if name == "fused":
        return functools.partial(route, backend="triton")
    if name == "fla" and kind == "static" and installed("fla"):
        from fla.ops.attnres import fused_attnres

        return lambda v, q, g: fused_attnres(q.to(v[0].dtype), v, g.to(v[0].dtype), scale=len(q) ** -0.5)
    if name == "liger" and kind == "static" and n <= 32 and installed("liger_kernel"):
        from liger_kernel.ops.attn_res import LigerAttnResFunction

        # It has no 1 / sqrt(D). Its sources are one stacked tensor: the stacking is part of what it costs.
        return lambda v, q, g: LigerAttnResFunction.apply(
            torch.stack(v), (q * len(q) ** -0.5).to(v[0].dtype), g.to(v[0].dtype), 1e-6
        )
    return None


def time_operator(method, options, width, kind, n, device):
    error = parity(method, options, width, kind, n, device)
    if not error < TOLERANCE:
        return {"wrong": error}
    sources, query, weight, dh = inputs(options.batch, options.tokens, width, kind, n, device)
    leaves = [*sources, query, weight]
    before = reset_memory(device)
    torch.autograd.grad(method(sources, query, weight), leaves, dh)
    memory = peak_memory(device) - before
    h = method(sources, query, weight)

    def forward():
        with torch.no_grad():
            return method(sources, query, weight)

    timed = {
        "error": error,
        "peak_bytes": memory,
        "forward": quantiles(forward, device),
        "backward": quantiles(lambda: torch.autograd.grad(h, leaves, dh, retain_graph=True), device),
        "both": quantiles(lambda: torch.autograd.grad(method(sources, query, weight), leaves, dh), device),
    }
    numel = dh.numel()
    return timed | {"forward_bytes": forward_bytes(n, numel, 2), "backward_bytes": backward_bytes(n, numel, 2)}


def inputs(batch, tokens, width, kind, n, device):
    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    shape = {"static": (width,), "timestep": (batch, width), "dynamic": (batch, tokens, width)}[kind]
    sources = [normal(batch, tokens, width) for _ in range(n)]
    query = normal(*shape, dtype=torch.bfloat16 if kind == "dynamic" else torch.float32)
    return sources, query, normal(width, dtype=torch.float32), normal(batch, tokens, width).detach()


def parity(method, options, width, kind, n, device):
    """Largest relative error, in norm, of h and the gradients, against float64 on two samples."""
    sources, query, weight, dh = inputs(min(2, options.batch), options.tokens, width, kind, n, device)
    leaves = [*sources, query, weight]
    h = method(sources, query, weight)
    got = [h, *torch.autograd.grad(h, leaves, dh)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    h, _ = reference.route(exact[:n], exact[-2], exact[-1], 1e-6)
    expected = [h, *torch.autograd.grad(h, exact, dh.double())]
    errors = [
        ((a.double() - b).norm() / b.norm() if b.norm() else a.double().norm()).item() for a, b in zip(got, expected)
    ]
    return max(errors) if all(error == error for error in errors) else float("nan")


# ---- all aggregators of a model, and its training step ----


def stacks(options, device):
    """Every read of a state (routing, LayerNorm, adaLN) of one pass, with sublayers that cost nothing."""
    yield {"method": "residual"} | attempt(functools.partial(time_stack, None, options, device))
    for size in options.chunk_sizes:
        for kind in options.queries:
            for name, backend in (("eager", "torch"), ("fused", "triton")):
                row = {"method": name, "query": kind, "chunk_size": size}
                yield row | attempt(functools.partial(time_stack, (kind, size, backend), options, device))


def time_stack(routing, options, device):
    model = build(options, device)
    width, layers = model.pos_embed.shape[-1], 2 * len(model.blocks)
    router = None
    if routing:
        kind, size, backend = routing
        router = DepthRouter(layers, width, kind, min(size, layers), "dedicated", backend).to(device)
    batch, shape = options.batch, (options.batch, model.pos_embed.shape[1], width)
    tokens = torch.randn(shape, device=device, requires_grad=True)
    e, shift, scale = (torch.randn(batch, width, device=device, requires_grad=True) for _ in range(3))
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

    before = reset_memory(device)
    both()
    return {
        "peak_bytes": peak_memory(device) - before,
        "forward": quantiles(torch.no_grad()(forward), device),
        "both": quantiles(both, device),
    }


def steps(options, device):
    """Forward in bf16 autocast, backward and fused AdamW, as the trainer runs them."""
    arms = [
        ("residual", {}),
        ("DAR eager", {"routing": "dar", "route_backend": "torch"}),
        ("DAR fused", {"routing": "dar", "route_backend": "triton"}),
        ("DAR fused, dynamic", {"routing": "dar", "route_backend": "triton", "query": "dynamic"}),
    ]
    for compiled in (False, True):
        for name, arm in arms:
            if not (compiled and arm.get("route_backend") == "torch"):  # the compiler unrolls XL's 522 reads
                row = {"method": name + ", compiled" * compiled}
                yield row | attempt(functools.partial(time_step, arm, compiled, options, device))


def time_step(arm, compiled, options, device):
    torch.compiler.reset()
    before = reset_memory(device)
    model = build(options, device, **arm).train()
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    size, channels = model.input_size, model.in_channels
    x, target = torch.randn(2, options.batch, channels, size, size, device=device)
    t = torch.rand(options.batch, device=device)
    labels = torch.randint(model.num_classes, (options.batch,), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            velocity, _ = model(x, t, labels)
        F.mse_loss(velocity.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    memory = peak_memory(device) - before
    return {"peak_bytes": memory, "step": quantiles(step, device, graph=False)}


def build(options, device, **arm):
    depth = {"depth": options.depth} if options.depth else {}
    return SIT_MODELS[options.model](input_size=options.input_size, align_dims=(), **depth, **arm).to(device)


# ---- measuring ----


def attempt(measure):
    """What it measured, or why it could not: a method that fails must not end the others' comparison."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:  # of a peer package or the compiler, whatever it may be
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:100]}


def quantiles(function, device, graph=True):
    """20, 50 and 80 % quantiles of the time of a call, in milliseconds."""
    if device.type != "cuda":
        times = []
        function()
        for _ in range(3):
            began = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - began))
        return torch.tensor(times).quantile(torch.tensor(QUANTILES)).tolist()
    if not graph:
        return list(triton.testing.do_bench(function, warmup=500, rep=2000, quantiles=QUANTILES))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles, and fills the allocator, before the recording
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        function()
    return list(triton.testing.do_bench(recorded.replay, warmup=20, rep=100, quantiles=QUANTILES))


def copy_bandwidth(device):
    source = torch.empty(2**29 if device.type == "cuda" else 2**20, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / quantiles(lambda: target.copy_(source), device)[1] / 1e6


def reset_memory(device):
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory(device):
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def installed(package):
    return importlib.util.find_spec(package) is not None


def environment(device):
    versions = {}
    for package in ("torch", "triton", "flash-linear-attention", "liger-kernel"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, interpreted"
    return {"device": name, "versions": versions, "cuda": torch.version.cuda, "commit": commit.stdout.strip() or None}


# ---- the report ----

LABELS = {
    "operators": ("width", "query", "sources", "method"),
    "stacks": ("method", "query", "chunk_size"),
    "steps": ("method",),
}
TIMES = {"operators": ("forward", "backward", "both"), "stacks": ("forward", "both"), "steps": ("step",)}


def cells(row, part, copy):
    """A row of measurements as text: what it is of, then times with bandwidths, and memory."""
    text = [str(row.get(label, "")) for label in LABELS[part]]
    if "wrong" in row or "failed" in row:
        return [
            *text,
            f"wrong: error {row['wrong']:.1e}" if "wrong" in row else row["failed"],
            *[""] * len(TIMES[part]),
        ]
    for key in TIMES[part]:
        low, middle, high = row[key]
        text.append(f"{middle:.3f} ({low:.3f}-{high:.3f})")
        if f"{key}_bytes" in row:
            rate = row[f"{key}_bytes"] / middle / 1e6
            text[-1] += f", {rate:.0f} GB/s, {rate / copy:.0%}"
    return [*text, f"{row['peak_bytes'] / 2**20:.0f}"]


def goals(result):
    """(goal, measured or None) of issue and paper, from what was measured; None where it was not."""
    rows = [row for row in result.get("operators", []) if "forward" in row]
    copy = result["copy_gb_per_s"]

    def of(method, **fixed):
        return {
            (row["width"], row["query"], row["sources"]): row
            for row in rows
            if row["method"] == method and all(row[key] == value for key, value in fixed.items())
        }

    def worst(values, choose):
        values = list(values)
        return choose(values) if values else None

    fused = of("fused")
    wide = [row for (width, _, n), row in fused.items() if width == 1152 and n >= 8]
    floor = {
        id(row): (row["backward_bytes"] - 2 * row["forward_bytes"] / (row["sources"] + 1)) / copy / 1e6 for row in wide
    }  # without dh and h: each source read, each gradient written
    found = [
        (
            "forward, share of copy bandwidth, n >= 8, D = 1152: at least 85 %",
            worst((row["forward_bytes"] / row["forward"][1] / 1e6 / copy for row in wide), min),
        ),
        (
            "backward, times the floor, n >= 8, D = 1152: at most 1.3",
            worst((row["backward"][1] / floor[id(row)] for row in wide), max),
        ),
    ]
    for peer in ("fla", "liger"):
        found.append(
            (
                f"static query, time of fused / {peer}, worst shape: at most 1",
                worst(
                    (
                        fused[key][part][1] / row[part][1]
                        for key, row in of(peer).items()
                        if key in fused
                        for part in ("forward", "backward")
                    ),
                    max,
                ),
            )
        )
    for part, least in (("forward", 11.5), ("backward", 8.5)):
        found.append(
            (
                f"{part} at n = 57, eager / fused, worst shape: at least {least}",
                worst(
                    (
                        row[part][1] / fused[key][part][1]
                        for key, row in of("eager", sources=57).items()
                        if key in fused
                    ),
                    min,
                ),
            )
        )
    step = {row["method"]: row for row in result.get("steps", []) if "step" in row}
    for suffix in ("", ", compiled"):
        pair = [step.get(f"{name}{suffix}") for name in ("residual", "DAR fused")]
        for what, most, value in (
            ("step", 1.10, lambda row: row["step"][1]),
            ("memory", 1.15, lambda row: row["peak_bytes"]),
        ):
            found.append(
                (
                    f"{what} of DAR S = 4{suffix} / residual{suffix}: at most {most:.2f}",
                    value(pair[1]) / value(pair[0]) if all(pair) and value(pair[0]) else None,
                )
            )
    return found


def markdown(result):
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in result["versions"].items())
    copy = result["copy_gb_per_s"]
    lines = [
        f"# {result['device']}",
        "",
        f"`{result['command']}`",
        "",
        f"{versions}, CUDA {result['cuda']}, commit {result['commit']}.",
        f"One aggregation: B, T = {result['batch_and_tokens']}, bf16. A copy moves {copy:.0f} GB/s, read and",
        "write counted. Times are medians in milliseconds with 20 and 80 % quantiles; bandwidth counts each",
        "tensor that has to be read or written once; then the peak of memory in MiB above that before.",
    ]
    lines += _table(
        ["goal", "measured"],
        [[goal, "not measured" if value is None else f"{value:.2f}"] for goal, value in result["goals"]],
    )
    for part in ("operators", "stacks", "steps"):
        if part in result:
            lines += ["", f"## {part.capitalize()}"]
            lines += _table([*LABELS[part], *TIMES[part], "MiB"], [cells(row, part, copy) for row in result[part]])
    return "\n".join(lines) + "\n"


def _table(header, rows):
    return ["", *(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))]


if __name__ == "__main__":
    sys.exit(main())

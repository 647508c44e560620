"""The tables of kernels/bench.py, and its goals for a GPU beside what was measured."""

PARTS = ("operators", "stacks", "steps", "tune")
PEERS = {"fla": "flash-linear-attention", "liger": "liger-kernel"}


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
One aggregation: B = {result["batch"]}, T = {result["tokens"]}; bf16, or float32 on a CPU. Times are medians in
milliseconds with 20 and 80 % quantiles. A copy moves {result["copy_gb_per_s"]:.0f} GB/s, read and write counted; shares
are of that, and count each tensor that has to be read or written once. peak_mib is the peak of a GPU's memory above
that before.

"""
    measured = [{"goal": goal, "measured": value} for goal, value in result["goals"].items()]
    if measured:
        text += table([row if row["measured"] else row | {"measured": "not measured"} for row in measured])
    return text + "".join(f"\n## {part.capitalize()}\n\n{table(result[part])}" for part in PARTS if part in result)

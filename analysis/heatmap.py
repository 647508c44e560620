"""The result of a sweep: heat maps of alignment depth x chunk size, as picture, Markdown and JSON.

`sweep.py` writes it whenever a cell is complete. A cell has the attributes name, folder (of its run), config, settings
(the options that tell it from the others), state and reason (of one that is not "done").
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from config import plain
from analysis.convergence import machines, read_run, shown, starts_beyond, time_to_target
from models.dar import optimal_chunk_size
from models.sit import SIT_MODELS, SIT_SIZES
from runtime import command, replaced

AXES = ("align_depth", "chunk_size")  # rows and columns
REPA_DEPTH = {"S": 4, "B": 4, "L": 8, "XL": 8, "Plus": 8}  # for S and Plus as for B and XL, as in configs/
ALPHAS = (0.6, 0.4)  # Prop. 1: the range of the paper; the first gives the smaller S*


def write_result(cells, out, metric, goal="min", target=None):
    """OUT/sweep.json, sweep.md and sweep.png. Returns the Markdown."""
    result = summarise(cells, metric, goal, target)
    out, table = Path(out), markdown(result)
    with replaced(out / "sweep.json") as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
    with replaced(out / "sweep.md") as file:
        file.write(table.encode())
    with replaced(out / "sweep.png") as file:
        draw(result, file)
    return table


def summarise(cells, metric, goal="min", target=None):
    """Everything that is shown, as plain values. Without a target it is the worst of the runs' best values."""
    runs = {}
    for cell in cells:
        if cell.state == "done":
            try:
                runs[cell.name] = curve(cell, metric)
            except ValueError as error:
                cell.reason = str(error)
    best = {name: float((np.min if goal == "min" else np.max)(run.y)) for name, run in runs.items()}
    if target is None and runs:
        target = (max if goal == "min" else min)(best.values())
    records = []
    for cell in cells:
        record = {"name": cell.name, "settings": plain(cell.settings), "state": cell.state, "reason": cell.reason}
        if cell.name in runs:
            run = runs[cell.name]
            steps = time_to_target(run.x["step"], run.y, target, goal)
            bound = ">" if steps is None else "<" if starts_beyond(run.y, target, goal) else ""
            record |= {
                "last": float(run.y[-1]),
                "last_step": int(run.x["step"][-1]),
                "best": best[cell.name],
                "steps_to_target": float(run.x["step"][-1]) if steps is None else steps,
                "bound": bound,
                "samples_per_second": run.samples_per_second,
            }
        records.append(record)
    maps = {}
    for cell, record in zip(cells, records):
        rest = {key: value for key, value in record["settings"].items() if key not in (*AXES, "seed")}
        maps.setdefault(json.dumps(rest), []).append((cell, record))
    return {
        "metric": metric,
        "goal": goal,
        "target": target,
        "command": command(),
        "cells": records,
        "maps": [heat_map(json.loads(rest), members) for rest, members in maps.items()],
        "encoders": sorted({shown(cell.config.encoder) for cell in cells}),
        "environments": machines(runs.values()),
    }


def curve(cell, metric):
    """The cell's run up to max_steps, beyond which an earlier sweep may have taken it. Raises ValueError for none."""
    run = read_run(cell.folder, metric)
    kept = run.x["step"] <= cell.config.max_steps
    run = dataclasses.replace(run, x={axis: x[kept] for axis, x in run.x.items()}, y=run.y[kept])
    if not len(run.y) or not np.isfinite(run.y).all():
        raise ValueError(f"{metric} is not a finite number all along")
    return run


def heat_map(rest, members):
    """Depths x chunk sizes of the cells, pairs (cell, record), that have the other settings `rest`."""
    config = members[0][0].config
    depths, chunks = (
        sorted(
            {
                record["settings"][key] if key == "chunk_size" else tuple(record["settings"][key])
                for _, record in members
                if key in record["settings"]
            }
        )
        for key in AXES
    )
    entries = {}
    for _, record in members:
        settings = record["settings"]
        place = tuple(settings.get("align_depth", ())), settings.get("chunk_size")
        entries.setdefault(place, {})[str(settings["seed"])] = record
    depths, chunks = depths or [()], chunks or [None]
    return {
        "settings": rest,
        "model": config.model,
        "blocks": blocks(config),
        "optimal_chunk_size": [optimal_chunk_size(2 * blocks(config), alpha) for alpha in ALPHAS],
        "repa_depth": REPA_DEPTH[size_of(config.model)],
        "align_depth": list(map(list, depths)),
        "chunk_size": chunks,
        "metric": [[over_seeds(entries.get((depth, chunk), {}), "last") for chunk in chunks] for depth in depths],
        "steps_to_target": [
            [over_seeds(entries.get((depth, chunk), {}), "steps_to_target") for chunk in chunks] for depth in depths
        ],
    }


def over_seeds(records, key):
    """{seed: record} of one place. The mean is None where a seed is missing or has only a bound."""
    there = {seed: record for seed, record in records.items() if key in record}
    values = [record[key] for record in there.values()]
    bounds = {seed: record["bound"] if key == "steps_to_target" else "" for seed, record in there.items()}
    exact = values and len(there) == len(records) and not any(bounds.values())
    return {
        "mean": float(np.mean(values)) if exact else None,
        "lowest": min(values) if exact else None,
        "highest": max(values) if exact else None,
        "per_seed": {seed: {"value": record[key], "bound": bounds[seed]} for seed, record in there.items()},
        "missing": {
            seed: f"{record['state']} {record['reason']}".strip()
            for seed, record in records.items()
            if seed not in there
        },
    }


def entry_text(entry, spread=True):
    """A place as text: the mean over seeds, or what there is of each."""
    if entry["mean"] is not None:
        low, high = number(entry["lowest"]), number(entry["highest"])
        return number(entry["mean"]) + (f" [{low}, {high}]" if spread and len(entry["per_seed"]) > 1 else "")
    texts = [seed["bound"] + number(seed["value"]) for seed in entry["per_seed"].values()]
    return ", ".join([*texts, *(reason.split()[0] for reason in entry["missing"].values())]) or "none"


def number(value):
    return f"{value:.4g}" if abs(value) < 9999 else f"{value:.0f}"


def title(settings):
    return ", ".join(f"{key} = {shown(value)}" for key, value in settings.items()) or "all cells"


def caption(grid):
    """Sentences on what is marked."""
    low, high = grid["optimal_chunk_size"]
    words = []
    if grid["chunk_size"] != [None]:
        words.append(
            f"S* of Prop. 1 for {2 * grid['blocks']} sublayers is {low:.1f} at alpha = {ALPHAS[0]} and "
            f"{high:.1f} at alpha = {ALPHAS[1]}."
        )
    if grid["align_depth"] != [[]]:
        words.append(
            f"REPA aligns {grid['model']}, of {SIT_SIZES[size_of(grid['model'])][0]} blocks, after block "
            f"{grid['repa_depth']}."
        )
    return words


def markdown(result):
    goal = "lower" if result["goal"] == "min" else "higher"
    parts = {"metric": f"Last `{result['metric']}` ({goal} is better)"}
    if result["target"] is not None:
        parts["steps_to_target"] = f"Steps until `{result['metric']}` reaches {result['target']:.6g}"
    lines = []
    for grid in result["maps"]:
        lines += [f"## {title(grid['settings'])}", ""]
        for key, heading in parts.items():
            columns = [column_label(grid, chunk) for chunk in grid["chunk_size"]]
            lines += [
                f"{heading}:",
                "",
                f"| aligned after block | {' | '.join(columns)} |",
                "| --- |" + " --- |" * len(columns),
            ]
            lines += [
                f"| {row_label(grid, depth)} | {' | '.join(map(entry_text, row))} |"
                for depth, row in zip(grid["align_depth"], grid[key])
            ]
            lines.append("")
        lines += [" ".join(caption(grid)), ""] if caption(grid) else []
    lines += [
        "Mean [lowest, highest] over seeds. < and >: a bound, where a run had passed the target before its first "
        "evaluation, or never reached it; such places list their seeds and have no mean.",
        "",
    ]
    missing = [cell for cell in result["cells"] if "last" not in cell]
    if missing:
        lines += ["Missing:", "", *(f"- {cell['name']}: {cell['state']} {cell['reason']}" for cell in missing), ""]
    lines.append(f"Frozen encoder: {', '.join(f'`{name}`' for name in result['encoders'])}.")
    for machine in result["environments"]:
        lines.append("Measured on: " + ", ".join(f"{key} {value}" for key, value in machine.items()) + ".")
    return "\n".join(lines) + "\n"


def row_label(grid, depth):
    return (shown(depth) or "none") + (" (REPA)" if depth == [grid["repa_depth"]] else "")


def column_label(grid, chunk):
    low, high = grid["optimal_chunk_size"]
    return "no chunks" if chunk is None else f"chunk size {chunk}" + (" (S*)" if low <= chunk <= high else "")


def draw(result, file):
    """One row of panels for each map: the metric, and the steps to the target where one of the runs is complete."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    maps, metric = result["maps"], result["metric"].replace("_", " ")
    parts = {"metric": f"last {metric}"}
    if result["target"] is not None:
        parts["steps_to_target"] = f"steps to {metric} {result['target']:.4g}"
    heights = [1.9 + 0.5 * len(grid["align_depth"]) for grid in maps]
    height = sum(heights)
    width = max(2.6 + 0.9 * len(grid["chunk_size"]) for grid in maps)
    figure, panels = plt.subplots(
        len(maps), len(parts), figsize=(width * len(parts), height), squeeze=False, height_ratios=heights
    )
    for column, (key, heading) in zip(panels.T, parts.items()):
        values = [
            np.array([[np.nan if entry["mean"] is None else entry["mean"] for entry in row] for row in grid[key]])
            for grid in maps
        ]
        known = np.concatenate([value[np.isfinite(value)] for value in values])
        scale = dict(vmin=known.min(), vmax=known.max()) if len(known) else {}  # one for all maps
        # Dark is good: a low metric, unless it is to be high, and few steps.
        colours = "viridis" if key == "steps_to_target" or result["goal"] == "min" else "viridis_r"
        for panel, grid, value in zip(column, maps, values):
            draw_map(panel, grid, grid[key], value, plt.get_cmap(colours), scale)
            panel.set_title(f"{heading}\n{title(grid['settings'])}".removesuffix("\nall cells"), fontsize=9, pad=14)
    figure.text(0.01, 0.005, " ".join(dict.fromkeys(words for grid in maps for words in caption(grid))), fontsize=7)
    figure.tight_layout(rect=(0, 0.03 + 0.12 / height * len(maps), 1, 1))
    figure.savefig(file, dpi=140, format="png")
    plt.close(figure)


def draw_map(panel, grid, entries, values, colours, scale):
    """One heat map. values: (depths, chunk sizes), nan where there is no mean; those places show their text on grey."""
    image = panel.imshow(
        np.ma.masked_invalid(values), cmap=colours.with_extremes(bad="0.85"), aspect="auto", origin="lower", **scale
    )
    for (row, column), value in np.ndenumerate(values):
        dark = np.isfinite(value) and sum(image.cmap(image.norm(value))[:3]) < 1.5
        panel.text(
            column,
            row,
            entry_text(entries[row][column], spread=False).replace(", ", "\n"),
            ha="center",
            va="center",
            fontsize=7,
            color="white" if dark else "black",
        )
    chunks, (low, high) = grid["chunk_size"], grid["optimal_chunk_size"]
    panel.set_xticks(range(len(chunks)), ["none" if chunk is None else chunk for chunk in chunks])
    panel.set_yticks(range(len(values)), [row_label(grid, depth) for depth in grid["align_depth"]])
    panel.set_xlabel("chunk size")
    panel.set_ylabel("aligned after block")
    if chunks[0] is not None and chunks[0] <= high and low <= chunks[-1]:
        # Where Prop. 1's range lies between the columns, which are even in log2 where sizes double.
        ends = np.interp(np.log2([low, high]), np.log2(chunks), range(len(chunks)))
        panel.axvspan(*ends, ymin=1.01, ymax=1.05, clip_on=False, color="tab:red")
        panel.annotate(
            " S*",
            (ends[1], 1.01),
            xycoords=("data", "axes fraction"),
            fontsize=7,
            color="tab:red",
            annotation_clip=False,
        )
    for row, depth in enumerate(grid["align_depth"]):
        if depth == [grid["repa_depth"]]:
            panel.axhspan(row - 0.48, row + 0.48, fill=False, edgecolor="tab:red", linestyle="--")


def blocks(config):
    if config.model not in SIT_MODELS:
        raise ValueError(f"model = {config.model!r} is unknown; choose one of {', '.join(SIT_MODELS)}")
    return config.depth or SIT_SIZES[size_of(config.model)][0]


def size_of(model):
    return model.removeprefix("SiT-").partition("/")[0]

"""The result of a sweep: heat maps of alignment depth x chunk size, as picture, Markdown and JSON.

    python -m analysis.heatmap sweeps/depth-chunk/sweep.json                # draws it again from its JSON

`sweep.py` writes it whenever a cell is complete. A cell has the attributes name, folder (of its run), config, settings
(the options that tell it from the others), state and reason (of one that is not "done").
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from analysis.convergence import Run, crossing, machines, networks, provenance, read_run, shown, written
from config import plain
from models.dar import optimal_chunk_size
from models.registry import constructor
from runtime import command, plain_errors, read_json, table

AXES = ("align_depth", "chunk_size")  # rows and columns
# For S and Plus as for B and XL, as in configs/. Of other models REPA says nothing.
REPA_DEPTH = {"SiT-S": 4, "SiT-B": 4, "SiT-L": 8, "SiT-XL": 8, "SiT-Plus": 8, "MMDiT-B": 8}
ALPHAS = (0.6, 0.4)  # Prop. 1: the range of the paper; the first gives the smaller S*


def write_result(cells: list, out: Path, metric: str, goal: str = "min", target: float | None = None) -> str:
    """OUT/sweep.json, sweep.md and sweep.png. Returns the Markdown."""
    result = summarise(cells, metric, goal, target)
    text = markdown(result)
    draw(result, Path(out) / "sweep", text)
    return text


def summarise(cells: list, metric: str, goal: str = "min", target: float | None = None) -> dict:
    """Everything that is shown, as plain values. Without a target it is the worst of the runs' best values."""
    best, worst = (np.min, max) if goal == "min" else (np.max, min)
    runs = {}
    for cell in cells:
        if cell.state == "done":
            try:
                runs[cell.name] = curve(cell, metric)
            except ValueError as error:
                cell.reason = str(error)
    if target is None and runs:
        target = worst(float(best(run.y)) for run in runs.values())
    records, maps = [], {}
    for cell in cells:
        record = {"name": cell.name, "settings": plain(cell.settings), "state": cell.state, "reason": cell.reason}
        if run := runs.get(cell.name):
            steps, bound = crossing(run.x["step"], run.y, target, goal)
            record |= {"last": float(run.y[-1]), "last_step": int(run.x["step"][-1]), "best": float(best(run.y))}
            record |= {"steps_to_target": steps, "bound": bound, "samples_per_second": run.samples_per_second}
        records.append(record)
        rest = {key: value for key, value in record["settings"].items() if key not in (*AXES, "seed")}
        maps.setdefault(json.dumps(rest), []).append((cell, record))
    found = networks(dataclasses.asdict(cell.config) for cell in cells)
    return {
        "metric": metric,
        "goal": goal,
        "target": target,
        "command": command(),
        "cells": records,
        "maps": [heat_map(json.loads(rest), members) for rest, members in maps.items()],
        "encoders": found["encoder"],
        "judges": found["judge"],
        "environments": machines(runs.values()),
    }


def curve(cell, metric: str) -> Run:
    """The cell's run up to max_steps, beyond which an earlier sweep may have taken it. Raises ValueError for none."""
    run = read_run(cell.folder, metric)
    kept = run.x["step"] <= cell.config.max_steps
    run = dataclasses.replace(run, x={axis: x[kept] for axis, x in run.x.items()}, y=run.y[kept])
    if not len(run.y) or not np.isfinite(run.y).all():
        raise ValueError(f"{metric} is not a finite number all along")
    return run


def heat_map(rest: dict, members: list[tuple]) -> dict:
    """Depths x chunk sizes of the cells, pairs (cell, record), that have the other settings `rest`."""
    config, places = members[0][0].config, {}
    for _, record in members:
        settings = record["settings"]
        place = tuple(settings.get("align_depth", ())), settings.get("chunk_size")
        places.setdefault(place, {})[str(settings["seed"])] = record
    depths = sorted({depth for depth, _ in places if depth}) or [()]
    chunks = sorted({chunk for _, chunk in places if chunk}) or [None]
    return {
        "settings": rest,
        "model": config.model,
        "blocks": blocks(config),
        "optimal_chunk_size": [optimal_chunk_size(2 * blocks(config), alpha) for alpha in ALPHAS],
        "repa_depth": REPA_DEPTH.get(config.model.partition("/")[0]),
        "align_depth": list(map(list, depths)),
        "chunk_size": chunks,
        **{
            part: [[over_seeds(places.get((depth, chunk), {}), key) for chunk in chunks] for depth in depths]
            for part, key in (("metric", "last"), ("steps_to_target", "steps_to_target"))
        },
    }


def over_seeds(records: dict, key: str) -> dict:
    """{seed: record} of one place. The mean is None where a seed is missing or has only a bound."""
    there = {seed: record for seed, record in records.items() if key in record}
    bounds = {seed: record["bound"] if key == "steps_to_target" else "" for seed, record in there.items()}
    values = [record[key] for record in there.values()]
    exact = values and len(there) == len(records) and not any(bounds.values())
    missing = {seed: record for seed, record in records.items() if seed not in there}
    return {
        "mean": float(np.mean(values)) if exact else None,
        "lowest": min(values) if exact else None,
        "highest": max(values) if exact else None,
        "per_seed": {seed: {"value": record[key], "bound": bounds[seed]} for seed, record in there.items()},
        "missing": {seed: f"{record['state']} {record['reason']}".strip() for seed, record in missing.items()},
    }


# ---- what is shown ----


def entry_text(entry: dict) -> str:
    """A place as text: the mean over seeds, or what there is of each."""
    if entry["mean"] is not None:
        low, high = number(entry["lowest"]), number(entry["highest"])
        return number(entry["mean"]) + (f" [{low}, {high}]" if len(entry["per_seed"]) > 1 else "")
    texts = [seed["bound"] + number(seed["value"]) for seed in entry["per_seed"].values()]
    return ", ".join([*texts, *(reason.split()[0] for reason in entry["missing"].values())]) or "none"


def number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 9999 else f"{value:.0f}"


def title(settings: dict) -> str:
    return ", ".join(f"{key} = {shown(value)}" for key, value in settings.items()) or "all cells"


def caption(grid: dict) -> list[str]:
    """Sentences on what is marked."""
    low, high = grid["optimal_chunk_size"]
    words, (first, last) = [], ALPHAS
    if grid["chunk_size"] != [None]:
        words.append(
            f"S* of Prop. 1 for {2 * grid['blocks']} sublayers is {low:.1f} at alpha = {first} and {high:.1f} at "
            f"alpha = {last}."
        )
    if grid["align_depth"] != [[]] and grid["repa_depth"]:
        size = constructor(grid["model"]).keywords["depth"]
        words.append(f"REPA aligns {grid['model']}, of {size} blocks, after block {grid['repa_depth']}.")
    return words


def markdown(result: dict) -> str:
    goal = "lower" if result["goal"] == "min" else "higher"
    parts = {"metric": f"Last `{result['metric']}` ({goal} is better)"}
    if result["target"] is not None:
        parts["steps_to_target"] = f"Steps until `{result['metric']}` reaches {result['target']:.6g}"
    text = ""
    for grid in result["maps"]:
        text += f"## {title(grid['settings'])}\n\n"
        head = ["aligned after block", *(column_label(grid, chunk) for chunk in grid["chunk_size"])]
        for key, heading in parts.items():
            rows = [[row_label(grid, k), *map(entry_text, row)] for k, row in zip(grid["align_depth"], grid[key])]
            text += f"{heading}:\n\n{table(head, rows)}\n"
        text += "".join(f"{words}\n\n" for words in [" ".join(caption(grid))] if words)
    text += (
        "Mean [lowest, highest] over seeds. < and >: a bound, where a run had passed the target before its first "
        "evaluation, or never reached it; such places list their seeds and have no mean.\n"
    )
    missing = [cell for cell in result["cells"] if "last" not in cell]
    if missing:
        lines = [f"- {cell['name']}: {cell['state']} {cell['reason']}\n" for cell in missing]
        text += "\nMissing:\n\n" + "".join(lines)
    return text + provenance([{"encoder": result["encoders"], "judge": result["judges"]}], result["environments"])


def row_label(grid: dict, depth: list) -> str:
    return (shown(depth) or "none") + " (REPA)" * (depth == [grid["repa_depth"]])


def column_label(grid: dict, chunk: int | None) -> str:
    low, high = grid["optimal_chunk_size"]
    return "no chunks" if chunk is None else f"chunk size {chunk}" + " (S*)" * (low <= chunk <= high)


def draw(result: dict, stem: Path, text: str):
    """One row of panels for each map: the metric, and the steps to the target where one of the runs is complete."""
    maps, metric = result["maps"], result["metric"].replace("_", " ")
    parts = {"metric": f"last {metric}"}
    if result["target"] is not None:
        parts["steps_to_target"] = f"steps to {metric} {result['target']:.4g}"
    heights = [1.9 + 0.5 * len(grid["align_depth"]) for grid in maps]
    size = max(2.6 + 0.9 * len(grid["chunk_size"]) for grid in maps) * len(parts), sum(heights)
    layout = dict(figsize=size, height_ratios=heights)
    with written(stem, result, text, len(maps), len(parts), **layout) as (figure, panels):
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
                draw_map(panel, grid, grid[key], value, colours, scale)
                panel.set_title(f"{heading}\n{title(grid['settings'])}".removesuffix("\nall cells"), fontsize=9, pad=14)
        figure.text(0.01, 0.005, " ".join(dict.fromkeys(words for grid in maps for words in caption(grid))), fontsize=7)
        figure.tight_layout(rect=(0, 0.03 + 0.12 / sum(heights) * len(maps), 1, 1))


def draw_map(panel, grid: dict, entries: list[list], values: np.ndarray, colours: str, scale: dict):
    """One heat map. values: (depths, chunk sizes), nan where there is no mean; those places show their text on grey."""
    from matplotlib import colormaps

    colours = colormaps[colours].with_extremes(bad="0.85")
    image = panel.imshow(np.ma.masked_invalid(values), cmap=colours, aspect="auto", origin="lower", **scale)
    for (row, column), value in np.ndenumerate(values):
        dark = np.isfinite(value) and sum(image.cmap(image.norm(value))[:3]) < 1.5
        words = entry_text(entries[row][column])
        words = words.replace(" [", "\n[") if np.isfinite(value) else words.replace(", ", "\n")
        panel.text(column, row, words, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    chunks, (low, high) = grid["chunk_size"], grid["optimal_chunk_size"]
    panel.set_xticks(range(len(chunks)), ["none" if chunk is None else chunk for chunk in chunks])
    panel.set_yticks(range(len(values)), [row_label(grid, depth) for depth in grid["align_depth"]])
    panel.set_xlabel("chunk size")
    panel.set_ylabel("aligned after block")
    if chunks[0] is not None and chunks[0] <= high and low <= chunks[-1]:
        # Where Prop. 1's range lies between the columns, which are even in log2 where sizes double.
        ends = np.interp(np.log2([low, high]), np.log2(chunks), range(len(chunks)))
        panel.axvspan(*ends, ymin=1.01, ymax=1.05, clip_on=False, color="tab:red")
        place = dict(xycoords=("data", "axes fraction"), annotation_clip=False)
        panel.annotate(" S*", (ends[1], 1.01), fontsize=7, color="tab:red", **place)
    for row, depth in enumerate(grid["align_depth"]):
        if depth == [grid["repa_depth"]]:
            panel.axhspan(row - 0.48, row + 0.48, fill=False, edgecolor="tab:red", linestyle="--")


def blocks(config) -> int:
    usual = constructor(config.model).keywords["depth"]  # refuses an unknown model, also where a depth is given
    return config.depth or usual


if __name__ == "__main__":
    with plain_errors(ValueError, OSError):
        for path in map(Path, sys.argv[1:]):
            draw(result := read_json(path), path.with_suffix(""), markdown(result))

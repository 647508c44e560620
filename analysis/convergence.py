"""Plots runs against each other, and says how much sooner one arm reaches what another reaches.

    python -m analysis.convergence runs/digits/* --out convergence
    python -m analysis.convergence runs/cifar10/* --metric loss --x images --reference "residual + REPA"

Runs that differ only in their seed form one arm. Writes OUT.png (mean over seeds, band from lowest to highest),
OUT.md and OUT.json. A speedup is the steps (or seconds of training) that the reference arm needs to reach a value,
divided by those of the other arm with the same seed: above 1, the other arm is faster.
"""

import contextlib
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from config import DEFAULTS, NOT_THE_ARM, idle, load_saved, plain
from runtime import parsed, plain_errors, replaced, table, write_json

AXES = {
    "step": "training steps", "images": "images seen", "epoch": "epochs", "seconds": "seconds of training"
}  # fmt: skip
NAMES = {"dar": "DAR", "attnres": "AttnRes", "unet": "U-ViT skips"}  # of routings; others keep their own
COLUMNS = {  # of the table of targets, for each axis
    "step": ["steps", "speedup"], "epoch": ["epochs", "speedup in epochs"], "seconds": ["seconds", "speedup in time"]
}  # fmt: skip
TARGETS_AT = (0.25, 0.5, 0.75, 1.0)  # default targets: what the reference has reached at these shares of its run


@dataclass(frozen=True)
class Options:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders of train_repa_dar.py."""
    metric: str = "frechet_distance"
    """Any number in metrics.jsonl."""
    x: tuple[Literal["step", "images", "epoch", "seconds"], ...] = ("step", "seconds")
    """Horizontal axes, one panel each."""
    reference: str = ""
    """Arm that the others are compared with; the first run's if not given."""
    targets: tuple[float, ...] = ()
    """Values to reach; if not given, the best that the reference had by each quarter of its run."""
    goal: Literal["min", "max"] = "min"
    """Whether the metric is better when small or when large."""
    out: str = "convergence"
    """Path of the three files, without suffix."""


@dataclass(frozen=True)
class Run:
    """One metric of one run: `x[axis]` and `y`, both (points), in the order of training; where each start ran."""

    folder: str
    config: dict
    x: dict
    y: np.ndarray
    samples_per_second: float | None
    environments: list


def main(argv: list[str] | None = None):
    options = tyro.cli(Options, args=argv, prog="python -m analysis.convergence", description=__doc__)
    with plain_errors(ValueError, OSError):
        # `runs/*` may well name plain files too, such as an earlier plot.
        arms = group([read_run(folder, options.metric) for folder in options.runs if not folder.is_file()])
        result = compare(arms, options)
        plot(arms, options, result)
    print(markdown(result))
    print(f"written: {options.out}.png, {options.out}.md, {options.out}.json")


def read_run(folder: Path, metric: str) -> Run:
    """Raises ValueError where the folder is no run, or never logged the metric."""
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file() or not (folder / "config.yaml").is_file():
        raise ValueError(f"{str(folder)!r} is not a run folder: it has no metrics.jsonl and config.yaml")
    records = [parsed(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = [record for record in records if isinstance(record.get(metric), int | float)]
    if not points:
        known = ", ".join(sorted({key for record in records for key in record} - set(AXES)))
        raise ValueError(f"{folder} never logged {metric!r}; it has {known or 'nothing yet'}")
    rates = [record["samples_per_second"] for record in records if "samples_per_second" in record]
    environment = folder / "environment.jsonl"
    starts = environment.read_text().splitlines() if environment.is_file() else []
    return Run(
        str(folder),
        plain(DEFAULTS) | load_saved(folder / "config.yaml"),  # an option younger than the run had its default
        # Runs of older versions have no epochs.
        {axis: np.array([point[axis] for point in points], dtype=float) for axis in AXES if axis in points[0]},
        np.array([point[metric] for point in points], dtype=float),
        float(np.median(rates)) if rates else None,
        [start for line in starts if (start := parsed(line, "from_step"))],
    )


def group(runs: list[Run]) -> dict[str, dict[int, Run]]:
    """Runs by arm, {label: {seed: run}}. Raises ValueError for no runs, or two with the same settings and seed."""
    if not runs:
        raise ValueError("no run folders were given")
    keys = sorted({key for run in runs for key in run.config} - NOT_THE_ARM)
    varied = [key for key in keys if len({repr(run.config.get(key)) for run in runs}) > 1]
    arms = {}
    for run in runs:
        seeds, seed = arms.setdefault(label(run.config, varied), {}), run.config["seed"]
        if seed in seeds:
            raise ValueError(f"{run.folder} and {seeds[seed].folder} have the same settings and seed {seed}")
        seeds[seed] = run
    return arms


def label(config: dict, varied: list[str]) -> str:
    """A name for an arm from the settings in which the given runs differ."""
    name = NAMES.get(config["routing"], config["routing"]) + " + REPA" * (config["alignment"] == "repa")
    unsaid = {"routing", "alignment"} | idle(config)
    return ", ".join([name, *(f"{key}={shown(config.get(key))}" for key in varied if key not in unsaid)])


def shown(value) -> str:
    """A setting as text; several values as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def crossing(x: np.ndarray, y: np.ndarray, target: float, goal: str = "min") -> tuple[float, str]:
    """Where the curve first reaches the target, interpolated on the line between two points, and a bound.

    x, y: (points). The bound is "" for a measured place; "<" with x[0] where the curve starts beyond the target; ">"
    with x[-1] where it never gets there.
    """
    gap = (y - target) * (1 if goal == "min" else -1)  # above 0 until the target is reached
    reached = np.flatnonzero(gap <= 0)
    if len(reached) == 0:
        return float(x[-1]), ">"
    i = reached[0]
    if i == 0:
        return float(x[0]), "<" if gap[0] < 0 else ""
    return float(x[i - 1] + (x[i] - x[i - 1]) * gap[i - 1] / (gap[i - 1] - gap[i])), ""


def speedup(reference: Run, other: Run, target: float, axis: str, goal: str = "min") -> tuple[float | None, str]:
    """How many times sooner `other` reaches the target than `reference`, two runs of one seed.

    Returns (ratio, bound). The bound is "" for a measured ratio; ">" where the reference never arrives (its whole run
    is taken instead) or the other had arrived before its first point; "<" where it is the other way round. The ratio is
    None where both hold: neither arrives, or both had before their first points.
    """
    (a, bound_a), (b, bound_b) = (crossing(run.x[axis], run.y, target, goal) for run in (reference, other))
    above, below = bound_a == ">" or bound_b == "<", bound_b == ">" or bound_a == "<"  # of the true ratio
    return (None, "") if above and below else (a / b, ">" if above else "<" if below else "")


def compare(arms: dict, options: Options) -> dict:
    """Everything the table shows, as plain values. Raises ValueError where the arms cannot be compared."""
    reference, goal = options.reference or next(iter(arms)), options.goal
    if reference not in arms:
        raise ValueError(f"reference {reference!r} is not among the arms: {', '.join(map(repr, arms))}")
    best, rows, summary = min if goal == "min" else max, [], {}
    everything = [run for seeds in arms.values() for run in seeds.values()]
    for axis, run in ((axis, run) for axis in options.x for run in everything):
        if axis not in run.x:
            raise ValueError(f"x = {axis!r}: {run.folder} is of an older version, which did not log it")
    axes = [axis for axis in COLUMNS if all(axis in run.x for run in everything)]
    for target in options.targets or default_targets(arms[reference].values(), goal):
        for name, runs in arms.items():
            row = {"target": target, "arm": name}
            for axis in axes:
                found = {seed: crossing(run.x[axis], run.y, target, goal) for seed, run in runs.items()}
                times = {seed: None if bound == ">" else place for seed, (place, bound) in found.items()}
                row[axis] = {"per_seed": times, "mean": mean(times.values())}
                ratios = {
                    seed: dict(zip(("ratio", "bound"), speedup(arms[reference][seed], run, target, axis, goal)))
                    for seed, run in runs.items()
                    if seed in arms[reference]
                }
                row[f"{axis}_speedup"] = {"per_seed": ratios}
            rows.append(row)
    for name, seeds in arms.items():
        runs = seeds.values()
        summary[name] = {
            "seeds": sorted(seeds),
            "last": mean(run.y[-1] for run in runs),
            "best": mean(best(run.y) for run in runs),
            "samples_per_second": mean(run.samples_per_second for run in runs),
            "last_step": max(int(run.x["step"][-1]) for run in runs),
            "folders": [run.folder for run in runs],
            **networks(run.config for run in runs),
        }
    head = {"metric": options.metric, "goal": goal, "reference": reference}
    return head | {"arms": summary, "targets": rows, "environments": machines(everything)}


def networks(configs) -> dict:
    """The encoders that the runs are aligned to, and the judges of their samples."""
    configs = list(configs)
    aligned = {shown(config["encoder"]) for config in configs if config["alignment"] == "repa"}
    judges = {shown(config["eval_encoder"]) for config in configs if config["eval_every"]}
    return {"encoder": sorted(aligned), "judge": sorted(judges)}


def machines(runs) -> list[dict]:
    """The different environments in which the runs were started."""
    of_one_start, starts = ("command", "from_step"), [start for run in runs for start in run.environments]
    kept = [{key: value for key, value in start.items() if key not in of_one_start} for start in starts]
    return [json.loads(machine) for machine in sorted({json.dumps(start, sort_keys=True) for start in kept})]


def mean(values) -> float | None:
    """None where one of the values is."""
    values = list(values)
    return None if None in values else float(np.mean(values))


def default_targets(runs, goal: str) -> tuple:
    """The best value that every seed of the reference had seen by each share of its run."""
    better, worst = (np.minimum, np.max) if goal == "min" else (np.maximum, np.min)
    steps, values = common_steps(list(runs))
    so_far = worst(better.accumulate(values, axis=1), axis=0)
    chosen = [so_far[max(0, np.searchsorted(steps, share * steps[-1], side="right") - 1)] for share in TARGETS_AT]
    return tuple(dict.fromkeys(map(float, chosen)))


def common_steps(runs: list[Run], axis: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """x (points), the mean over runs, and y (runs, points) at the steps that all runs have."""
    steps = functools.reduce(np.intersect1d, [run.x["step"] for run in runs])
    if not len(steps):
        raise ValueError(f"{', '.join(run.folder for run in runs)} have no step in common")
    rows = [np.searchsorted(run.x["step"], steps) for run in runs]
    x = np.mean([run.x[axis][row] for run, row in zip(runs, rows)], axis=0)
    return x, np.array([run.y[row] for run, row in zip(runs, rows)])


# ---- what is shown ----


def markdown(result: dict) -> str:
    metric, lines = result["metric"], []
    for name, arm in result["arms"].items():
        seeds = ", ".join(map(str, arm["seeds"]))
        speed = "–" if arm["samples_per_second"] is None else f"{arm['samples_per_second']:.0f}"
        lines.append([name, seeds, f"{arm['last']:.4g}", f"{arm['best']:.4g}", arm["last_step"], speed])
    text = table(["arm", "seeds", f"last `{metric}`", "best", "at step", "images/s"], lines)
    text += (
        f"\nSpeedups over **{result['reference']}** (above 1: sooner; mean [lowest, highest] over seeds; < and >: a "
        "bound for each seed, where an arm never gets there, or got there before its first point):\n\n"
    )
    lines, axes = [], [axis for axis in COLUMNS if axis in result["targets"][0]]
    for row in result["targets"]:
        line = [f"{row['target']:.4g}", row["arm"]]
        for axis in axes:
            times, average = row[axis]["per_seed"], row[axis]["mean"]
            missed = sum(time is None for time in times.values())
            line.append(f"not reached by {missed} of {len(times)}" if missed else f"{average:.{int(average < 10)}f}")
            line.append("reference" if row["arm"] == result["reference"] else ratio_text(row[f"{axis}_speedup"]))
        lines.append(line)
    text += table([f"`{metric}` reaches", "arm", *(head for axis in axes for head in COLUMNS[axis])], lines)
    return text + provenance(list(result["arms"].values()), result["environments"])


def provenance(found: list[dict], environments: list[dict]) -> str:
    """Lines on the networks (`found`: of `networks`) and machines of the runs."""
    names = {key: sorted({name for each in found for name in each[key]}) for key in ("judge", "encoder")}
    judges, encoders = (", ".join(f"`{name}`" for name in names[key]) or "none" for key in names)
    lines = ["", f"Judge of the samples: {judges}. Aligned to: {encoders}."]
    for machine in environments:
        lines.append("Measured on: " + ", ".join(f"{key} {value}" for key, value in machine.items()) + ".")
    return "\n".join(lines) + "\n"


def ratio_text(cell: dict) -> str:
    known = [(entry["ratio"], entry["bound"]) for entry in cell["per_seed"].values() if entry["ratio"] is not None]
    if not known:
        return "not comparable" if cell["per_seed"] else "no seed in common"
    ratios = [ratio for ratio, _ in known]
    if any(bound for _, bound in known) or len(known) < len(cell["per_seed"]):
        return "; ".join(f"{bound}{ratio:.2f}" for ratio, bound in known)  # a mean over bounds would mean nothing
    return f"{np.mean(ratios):.2f}" + (f" [{min(ratios):.2f}, {max(ratios):.2f}]" if len(ratios) > 1 else "")


@contextlib.contextmanager
def written(stem: Path, result: dict, text: str, rows: int, columns: int, **layout):
    """Yields a figure and its panels (rows, columns), and writes them, as filled by the block, as STEM.png.

    Also writes `result` as STEM.json and `text` as STEM.md.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(rows, columns, squeeze=False, **layout)
    yield figure, panels
    stem.parent.mkdir(parents=True, exist_ok=True)
    with replaced(stem.with_name(f"{stem.name}.png")) as file:
        figure.savefig(file, dpi=140, format="png")
    plt.close(figure)
    write_json(stem.with_name(f"{stem.name}.json"), result)
    with replaced(stem.with_name(f"{stem.name}.md")) as file:
        file.write(text.encode())


def plot(arms: dict, options: Options, result: dict):
    from matplotlib import colormaps
    from matplotlib.ticker import LogFormatter

    layout = dict(figsize=(5.2 * len(options.x) + 2.2, 3.8), sharey=True, layout="constrained")
    with written(Path(options.out), result, markdown(result), 1, len(options.x), **layout) as (figure, panels):
        for panel, axis in zip(panels[0], options.x):
            if len(arms) > 10:  # where the usual colours begin again
                panel.set_prop_cycle(color=colormaps["tab20"].colors)
            for name, runs in arms.items():
                x, y = common_steps(list(runs.values()), axis)
                title = f"{name} ({len(runs)} seeds)" if len(runs) > 1 else name
                (line,) = panel.plot(x, y.mean(0), marker="o", markersize=3, label=title)
                if len(runs) > 1:
                    panel.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
            values = np.concatenate([run.y for runs in arms.values() for run in runs.values()])
            if values.min() > 0 and values.max() > 10 * values.min():
                panel.set_yscale("log")
                panel.yaxis.set_major_formatter(LogFormatter())  # 40 rather than 4 x 10^1
                panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
            panel.set_xlabel(AXES[axis])
            panel.grid(alpha=0.3)
        panels[0][0].set_ylabel(options.metric.replace("_", " ").replace("frechet", "Fréchet"))
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center", fontsize="small")


if __name__ == "__main__":
    main()

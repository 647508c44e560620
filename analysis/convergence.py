"""Plots runs against each other, and says how much sooner one arm reaches what another reaches.

    python -m analysis.convergence runs/digits/* --out convergence
    python -m analysis.convergence runs/cifar10/* --metric loss --x images --reference "residual + REPA"

Runs that differ only in their seed form one arm. Writes OUT.png (mean over seeds, band from lowest to highest),
OUT.md and OUT.json. A speedup is the steps (or seconds of training) that the reference arm needs to reach a value,
divided by those of the other arm with the same seed: above 1, the other arm is faster.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
import yaml

from config import Config, idle, plain

# Settings that tell one run of an arm from another, or say nothing about how it learns.
NOT_THE_ARM = {
    "seed",
    "out",
    "max_steps",
    "num_workers",
    "checkpoint_every",
    "snapshot_every",
    "tensorboard",
    "log_every",
    "micro_batch_size",
    "dry_run",
    "checkpoint_activations",
    "eval_metric",
    "inception",
    "diagnose_every",
    "diagnose_images",
}
AXES = {"step": "training steps", "images": "images seen", "seconds": "seconds of training"}
NAMES = {"dar": "DAR", "attnres": "AttnRes", "unet": "U-ViT skips"}  # of routings; others by their own
TARGETS_AT = (0.25, 0.5, 0.75, 1.0)  # default targets: what the reference has reached at these shares of its run


@dataclass(frozen=True)
class Options:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders of train_repa_dar.py."""
    metric: str = "frechet_distance"
    """Any number in metrics.jsonl."""
    x: tuple[Literal["step", "images", "seconds"], ...] = ("step", "seconds")
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


def main(argv=None):
    options = tyro.cli(Options, args=argv, prog="python -m analysis.convergence", description=__doc__)
    try:
        if not options.x:
            raise ValueError(f"x is empty; choose from {', '.join(AXES)}")
        # `runs/*` may well name plain files too, such as an earlier plot.
        arms = group([read_run(folder, options.metric) for folder in options.runs if not folder.is_file()])
        result = compare(arms, options)
        table = markdown(result)
        out = Path(options.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        plot(arms, options, out.with_name(out.name + ".png"))  # first, as it may find that runs do not compare
        out.with_name(out.name + ".json").write_text(json.dumps(result, indent=1) + "\n")
        out.with_name(out.name + ".md").write_text(table)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(table)
    print(f"written: {out}.png, {out}.md, {out}.json")


def read_run(folder, metric):
    """Raises ValueError where the folder is no run, or never logged the metric."""
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file() or not (folder / "config.yaml").is_file():
        raise ValueError(f"{str(folder)!r} is not a run folder: it has no metrics.jsonl and config.yaml")
    text = (folder / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # a running log may end midway
    points = [record for record in records if isinstance(record.get(metric), (int, float))]
    if not points:
        known = sorted({key for record in records for key in record} - set(AXES))
        raise ValueError(f"{folder} never logged {metric!r}; it has {', '.join(known) or 'nothing yet'}")
    rates = [record["samples_per_second"] for record in records if "samples_per_second" in record]
    environment = folder / "environment.jsonl"
    # An option that is younger than the run had, in effect, its default.
    config = {**plain(asdict(Config())), **yaml.safe_load((folder / "config.yaml").read_text())}
    return Run(
        str(folder),
        config,
        {axis: np.array([point[axis] for point in points], dtype=float) for axis in AXES},
        np.array([point[metric] for point in points], dtype=float),
        float(np.median(rates)) if rates else None,
        [json.loads(line) for line in environment.read_text().splitlines()] if environment.is_file() else [],
    )


def group(runs):
    """Runs by arm, {label: {seed: run}}. Raises ValueError for no runs, or two with the same settings and seed."""
    if not runs:
        raise ValueError("no run folders were given")
    keys = sorted({key for run in runs for key in run.config} - NOT_THE_ARM)
    varied = [key for key in keys if len({repr(run.config.get(key)) for run in runs}) > 1]
    arms = {}
    for run in runs:
        seeds = arms.setdefault(label(run.config, varied), {})
        seed = run.config["seed"]
        if seed in seeds:
            raise ValueError(f"{run.folder} and {seeds[seed].folder} have the same settings and seed {seed}")
        seeds[seed] = run
    return arms


def label(config, varied):
    """A name for an arm from the settings in which the given runs differ."""
    routing = config.get("routing", "run")
    name = NAMES.get(routing, routing)
    if config.get("alignment") == "repa":
        name += " + REPA"
    unsaid = {"routing", "alignment"} | idle(config)  # the name has the two, and nothing reads the others
    extra = [f"{key}={shown(config.get(key))}" for key in varied if key not in unsaid]
    return ", ".join([name, *extra])


def shown(value):
    """A setting as text; several values as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def time_to_target(x, y, target, goal="min"):
    """Where the curve first reaches the target, interpolated on the line between two points.

    x, y: (points). Returns x[0] if the curve starts at or beyond the target, so that the true place may be earlier
    (see `starts_beyond`), and None if it never gets there.
    """
    gap = (y - target) * (1 if goal == "min" else -1)  # above 0 until the target is reached
    reached = np.flatnonzero(gap <= 0)
    if len(reached) == 0:
        return None
    i = reached[0]
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (x[i] - x[i - 1]) * gap[i - 1] / (gap[i - 1] - gap[i]))


def starts_beyond(y, target, goal="min"):
    """Whether the first point has passed the target already, somewhere that was not measured."""
    return bool(y[0] < target if goal == "min" else y[0] > target)


def speedup(reference, other, target, axis, goal="min"):
    """How many times sooner `other` reaches the target than `reference`, two runs of one seed.

    Returns (ratio, bound). The bound is "" for a measured ratio; ">" where the reference never arrives (its whole run
    is taken instead) or the other had arrived before its first point; "<" where it is the other way round. The ratio is
    None where that leaves nothing to say: neither arrives, or both had before their first points.
    """
    a = time_to_target(reference.x[axis], reference.y, target, goal)
    b = time_to_target(other.x[axis], other.y, target, goal)
    above = a is None or starts_beyond(other.y, target, goal)  # the true ratio is larger
    below = b is None or starts_beyond(reference.y, target, goal)  # the true ratio is smaller
    if above and below:
        return None, ""
    a = float(reference.x[axis][-1]) if a is None else a
    b = float(other.x[axis][-1]) if b is None else b
    return a / b, ">" if above else "<" if below else ""


def compare(arms, options):
    """Everything the table shows, as plain values. Raises ValueError where the arms cannot be compared."""
    reference = options.reference or next(iter(arms))
    if reference not in arms:
        raise ValueError(f"reference {reference!r} is not among the arms: {', '.join(repr(name) for name in arms)}")
    targets = options.targets or default_targets(arms[reference].values(), options.goal)
    best = min if options.goal == "min" else max
    rows = []
    for target in targets:
        for name, runs in arms.items():
            row = {"target": target, "arm": name}
            for axis in ("step", "seconds"):
                times = {seed: time_to_target(run.x[axis], run.y, target, options.goal) for seed, run in runs.items()}
                row[axis] = {"per_seed": times, "mean": mean(list(times.values()))}
                pairs = {
                    seed: speedup(arms[reference][seed], run, target, axis, options.goal)
                    for seed, run in runs.items()
                    if seed in arms[reference]
                }
                row[f"{axis}_speedup"] = {
                    "per_seed": {seed: {"ratio": ratio, "bound": bound} for seed, (ratio, bound) in pairs.items()}
                }
            rows.append(row)
    summary = {
        name: {
            "seeds": sorted(runs),
            "last": float(np.mean([run.y[-1] for run in runs.values()])),
            "best": float(np.mean([best(run.y) for run in runs.values()])),
            "samples_per_second": mean([run.samples_per_second for run in runs.values()]),
            "last_step": max(int(run.x["step"][-1]) for run in runs.values()),
            "folders": [run.folder for run in runs.values()],
            "encoder": sorted({shown(run.config.get("encoder", "")) for run in runs.values()}),
        }
        for name, runs in arms.items()
    }
    return {
        "metric": options.metric,
        "goal": options.goal,
        "reference": reference,
        "arms": summary,
        "targets": rows,
        "environments": machines(run for runs in arms.values() for run in runs.values()),
    }


def machines(runs):
    """The different environments in which the runs were started, as dicts."""
    of_one_start = {"command", "from_step"}
    found = {
        json.dumps({key: value for key, value in start.items() if key not in of_one_start}, sort_keys=True)
        for run in runs
        for start in run.environments
    }
    return [json.loads(machine) for machine in sorted(found)]


def mean(values):
    """None where one of the values is."""
    return None if None in values else float(np.mean(values))


def default_targets(runs, goal):
    """The best value that every seed of the reference had seen by each share of its run."""
    better, worst = (np.minimum, np.max) if goal == "min" else (np.maximum, np.min)
    steps, values = common_steps(list(runs))
    so_far = worst(better.accumulate(values, axis=1), axis=0)
    chosen = [so_far[max(0, np.searchsorted(steps, share * steps[-1], side="right") - 1)] for share in TARGETS_AT]
    return tuple(dict.fromkeys(float(value) for value in chosen))


def common_steps(runs, axis="step"):
    """x (points), the mean over runs, and y (runs, points) at the steps that all runs have."""
    steps = sorted(set.intersection(*(set(run.x["step"]) for run in runs)))
    if not steps:
        raise ValueError(f"{', '.join(run.folder for run in runs)} have no step in common")
    rows = [[int(np.flatnonzero(run.x["step"] == step)[0]) for step in steps] for run in runs]
    x = np.mean([run.x[axis][row] for run, row in zip(runs, rows)], axis=0)
    return x, np.array([run.y[row] for run, row in zip(runs, rows)])


def markdown(result):
    metric = result["metric"]
    lines = [f"| arm | seeds | last `{metric}` | best | at step | images/s |", "| --- | --- | --- | --- | --- | --- |"]
    for name, arm in result["arms"].items():
        seeds = ", ".join(map(str, arm["seeds"]))
        speed = "–" if arm["samples_per_second"] is None else f"{arm['samples_per_second']:.0f}"
        lines.append(f"| {name} | {seeds} | {arm['last']:.4g} | {arm['best']:.4g} | {arm['last_step']} | {speed} |")
    lines += [
        "",
        f"Speedups over **{result['reference']}** (above 1: sooner; mean [lowest, highest] over seeds; "
        "< and >: a bound for each seed, where an arm never gets there, or got there before its first point):",
        "",
        f"| `{metric}` reaches | arm | steps | speedup | seconds | speedup in time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["targets"]:
        cells = [f"{row['target']:.4g}", row["arm"]]
        for axis in ("step", "seconds"):
            missed = sum(time is None for time in row[axis]["per_seed"].values())
            mean_time = row[axis]["mean"]
            cells.append(
                f"not reached by {missed} of {len(row[axis]['per_seed'])}"
                if missed
                else f"{mean_time:.0f}"
                if mean_time >= 10
                else f"{mean_time:.1f}"
            )
            cells.append("reference" if row["arm"] == result["reference"] else ratio_text(row[f"{axis}_speedup"]))
        lines.append("| " + " | ".join(cells) + " |")
    encoders = sorted({encoder for arm in result["arms"].values() for encoder in arm["encoder"]})
    lines += ["", f"Frozen encoder: {', '.join(f'`{name}`' for name in encoders) or 'unknown'}."]
    for machine in result["environments"]:
        if machine:
            lines.append("Measured on: " + ", ".join(f"{key} {value}" for key, value in machine.items()) + ".")
    return "\n".join(lines) + "\n"


def ratio_text(cell):
    known = [(entry["ratio"], entry["bound"]) for entry in cell["per_seed"].values() if entry["ratio"] is not None]
    if not known:
        return "no seed in common" if not cell["per_seed"] else "not comparable"
    ratios, bounds = [ratio for ratio, _ in known], {bound for _, bound in known}
    if bounds == {""} and len(known) == len(cell["per_seed"]):
        spread = f" [{min(ratios):.2f}, {max(ratios):.2f}]" if len(ratios) > 1 else ""
        return f"{np.mean(ratios):.2f}{spread}"
    return "; ".join(f"{bound}{ratio:.2f}" for ratio, bound in known)  # a mean over bounds would mean nothing


def plot(arms, options, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    figure, panels = plt.subplots(
        1, len(options.x), figsize=(5.2 * len(options.x) + 2.2, 3.8), squeeze=False, sharey=True, layout="constrained"
    )
    for panel, axis in zip(panels[0], options.x):
        if len(arms) > 10:  # where the usual colours begin again
            panel.set_prop_cycle(color=plt.get_cmap("tab20").colors)
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
    figure.savefig(path, dpi=140)
    plt.close(figure)


if __name__ == "__main__":
    main()

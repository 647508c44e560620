"""The convergence plot and its table, on run folders written here whose curves have known crossings."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import config
from analysis import convergence
from analysis.convergence import Options, Run, common_steps, compare, crossing, default_targets, group, label
from analysis.convergence import ratio_text, read_run, speedup
from config import Config

STEPS, BATCH = range(100, 1001, 100), 64
DAR, ATTNRES, UNET, REPA = {"routing": "dar"}, {"routing": "attnres"}, {"routing": "unet"}, {"alignment": "repa"}


def line(slope):
    """The metric 100 - slope * step."""
    return [(step, 100 - slope * step) for step in STEPS]


def write_run(folder, points, seconds_per_step=0.5, rate=128.0, environment=(), **settings):
    """A run folder as the trainer leaves it: at every point a line of the log, then one of the evaluation."""
    folder.mkdir(parents=True)
    config.save(dataclasses.replace(Config(), batch_size=BATCH, **settings), folder / "config.yaml")
    lines = []
    for step, value in points:
        axes = {"step": step, "images": step * BATCH, "seconds": round(step * seconds_per_step, 3)}
        lines.append({**axes, "loss": 1 + 10 / step, **({"samples_per_second": rate} if rate else {})})
        lines.append({**axes, "frechet_distance": value, "evaluation_seconds": 3.0})
    for name, records in (("metrics", lines), ("environment", environment)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def curve(points, seconds_per_step=0.5, seed=0, folder="run", **settings):
    """The same run, already read."""
    steps, values = np.array(points, dtype=float).T
    saved = config.plain(dataclasses.asdict(dataclasses.replace(Config(), seed=seed, **settings)))
    x = {"step": steps, "images": steps * BATCH, "seconds": steps * seconds_per_step}
    return Run(folder, saved, x, values, 128.0, [])


def comparison(*runs, **changes):
    return compare(group(list(runs)), dataclasses.replace(Options(runs=()), **changes))


def row(result, arm):
    return next(entry for entry in result["targets"] if entry["arm"] == arm)


def strict_json(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def table_rows(markdown, first_column):
    """Cells of the table whose head begins with that column, without head and rule."""
    body = markdown.partition(f"| {first_column} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in text.strip("|").split("|")] for text in body if text.startswith("|")]


# ---- time to target ----


@pytest.mark.parametrize("target, expected", [(73, 540), (90, 200), (51, 980), (94.99, 100.2), (50, 1000)])
def test_crossing_of_a_straight_line(target, expected):
    run = curve(line(0.05))
    assert crossing(run.x["step"], run.y, target) == (pytest.approx(expected, rel=1e-12), "")


@pytest.mark.parametrize("target", [0.9, 0.5, 0.2, 0.06])
def test_crossing_of_an_exponential(target):
    x = np.array([0.0, 1, 2, 4, 8, 16, 32])
    y = np.exp(-x / 10)
    k = np.searchsorted(-y, -target)  # the first point at or below the target
    expected = x[k - 1] + (x[k] - x[k - 1]) * (y[k - 1] - target) / (y[k - 1] - y[k])
    found, bound = crossing(x, y, target)
    assert found == pytest.approx(expected, rel=1e-12) and not bound
    # Chords of a convex curve lie above it: later than the curve itself, but before its next point.
    assert -10 * np.log(target) <= found <= x[k]


@pytest.mark.parametrize("seed", range(5))
def test_crossing_of_a_monotone_curve_is_linear_interpolation(seed):
    rng = np.random.default_rng(seed)
    x, y = np.sort(rng.random(20)), np.sort(rng.random(20))[::-1]
    for target in rng.uniform(y[-1], y[0], 10):
        expected = pytest.approx(np.interp(target, y[::-1], x[::-1]), rel=1e-9)
        assert crossing(x, y, target) == crossing(x, -y, -target, "max") == (expected, "")


@pytest.mark.parametrize(
    "y, target, goal, expected, bound",
    [
        ([9, 6, 3, 1], 9.5, "min", 10.0, "<"),  # reached before the first point
        ([9, 6, 3, 1], 9, "min", 10.0, ""),
        ([9, 6, 3, 1], 6, "min", 20.0, ""),  # a hit on a point is that point
        ([9, 6, 3, 1], 1, "min", 40.0, ""),
        ([9, 6, 3, 1], 0.5, "min", 40.0, ">"),
        ([9, 9, 6, 6], 9, "min", 10.0, ""),
        ([9, 6, 6, 3], 6, "min", 20.0, ""),  # the beginning of a plateau
        ([10, 4, 8, 2], 5, "min", 10 + 10 * 5 / 6, ""),  # later worse again: the first crossing counts
        ([10, 4, 8, 2], 3, "min", 30 + 10 * 5 / 6, ""),
        ([1, 5, 3, 9], 4, "max", 10 + 10 * 3 / 4, ""),
        ([1, 5, 3, 9], 5, "max", 20.0, ""),
        ([1, 5, 3, 9], 7, "max", 30 + 10 * 4 / 6, ""),
        ([1, 5, 3, 9], 10, "max", 40.0, ">"),
        ([1, 5, 3, 9], 0, "max", 10.0, "<"),
    ],
)
def test_first_crossing(y, target, goal, expected, bound):
    x = np.array([10.0, 20, 30, 40])
    assert crossing(x, np.array(y, dtype=float), target, goal) == (pytest.approx(expected, rel=1e-12), bound)


# ---- speedups ----

SLOW, FAST = curve(line(0.05), 0.5), curve(line(0.1), 0.8)
NEVER = curve([(step, 95) for step in STEPS])
UP, FAST_UP = (curve([(step, step * slope) for step in STEPS]) for slope in (0.05, 0.1))


@pytest.mark.parametrize(
    "reference, other, target, axis, goal, ratio, bound",
    [
        # 70 is reached at step 600 and 300, that is after 300 and 240 seconds.
        (SLOW, FAST, 70, "step", "min", 2.0, ""),
        (SLOW, FAST, 70, "seconds", "min", 1.25, ""),
        (FAST, SLOW, 70, "step", "min", 0.5, ""),
        # 20: the fast one at step 800 (640 s), the slow one not by 1000 (500 s). Below -1: neither.
        (SLOW, FAST, 20, "step", "min", 1.25, ">"),
        (SLOW, FAST, 20, "seconds", "min", 500 / 640, ">"),
        (FAST, SLOW, 20, "step", "min", 0.8, "<"),
        (FAST, SLOW, 20, "seconds", "min", 640 / 500, "<"),
        (SLOW, FAST, -1, "step", "min", None, ""),
        # 92: the fast one is at 90 by its first point, step 100; the slow one arrives at step 160. By 97 both were.
        (SLOW, FAST, 92, "step", "min", 1.6, ">"),
        (FAST, SLOW, 92, "step", "min", 1 / 1.6, "<"),
        (SLOW, FAST, 90, "step", "min", 2.0, ""),  # the first point is a measurement
        (SLOW, FAST, 97, "step", "min", None, ""),
        # One had arrived before its first point and the other never does: the bound holds all the more.
        (NEVER, FAST, 92, "step", "min", 10.0, ">"),
        (FAST, NEVER, 92, "step", "min", 0.1, "<"),
        (UP, FAST_UP, 30, "step", "max", 2.0, ""),
        (UP, FAST_UP, 80, "step", "max", 1.25, ">"),
    ],
)
def test_speedup(reference, other, target, axis, goal, ratio, bound):
    expected = None if ratio is None else pytest.approx(ratio, rel=1e-12)
    assert speedup(reference, other, target, axis, goal) == (expected, bound)


def test_seeds_are_paired():
    # Steps to 70: 600 and 300 for seed 0, 750 and 250 for seed 1. Crosswise the ratios would be 2.4 and 2.5.
    runs = (
        curve(line(0.05), seed=0),
        curve(line(0.04), seed=1),
        curve(line(0.12), seed=1, **DAR),
        curve(line(0.1), **DAR),
    )
    result = comparison(*runs, targets=(70,))
    cell = row(result, "DAR")["step_speedup"]
    assert result["reference"] == "residual" and ratio_text(cell) == "2.50 [2.00, 3.00]"
    assert {seed: entry["ratio"] for seed, entry in cell["per_seed"].items()} == pytest.approx({0: 2.0, 1: 3.0})
    assert row(result, "residual")["step"]["mean"] == pytest.approx(675)
    assert row(result, "DAR")["step"] == {"per_seed": pytest.approx({0: 300, 1: 250}), "mean": pytest.approx(275)}
    reverse = row(comparison(*runs, targets=(70,), reference="DAR"), "residual")["step_speedup"]["per_seed"]
    assert reverse[0] == {"ratio": pytest.approx(0.5), "bound": ""}
    with pytest.raises(ValueError, match="'dense'.*'residual', 'DAR'"):
        comparison(*runs, reference="dense")


def test_three_seeds_have_their_mean_and_not_their_median():
    # Steps to 70: 600, 750 and 500 for the reference, 300, 250 and 250 for DAR; ratios 2, 3 and 2.
    slopes = {"residual": (0.05, 0.04, 0.06), "dar": (0.1, 0.12, 0.12)}
    runs = [curve(line(s), seed=seed, routing=name) for name in slopes for seed, s in enumerate(slopes[name])]
    result = comparison(*runs, targets=(70,))
    assert row(result, "residual")["step"]["mean"] == pytest.approx(1850 / 3)
    assert row(result, "DAR")["step"]["mean"] == pytest.approx(800 / 3)
    assert ratio_text(row(result, "DAR")["step_speedup"]) == "2.33 [2.00, 3.00]"
    assert result["arms"]["DAR"]["last"] == result["arms"]["DAR"]["best"] == pytest.approx(-40 / 3)


def test_a_seed_that_never_arrives_leaves_no_mean_time():
    # 70: at step 600 by seed 0; seed 1 is at 80 when its run ends.
    result = comparison(curve(line(0.05), seed=0), curve(line(0.02), seed=1), targets=(70,))
    assert row(result, "residual")["step"] == {"per_seed": {0: pytest.approx(600), 1: None}, "mean": None}
    (cells,) = table_rows(convergence.markdown(result), "`frechet_distance` reaches")
    assert cells[2] == cells[4] == "not reached by 1 of 2"


def test_a_metric_that_is_better_when_large():
    """Targets, times, ratios and bounds of 0.05 step and 0.1 step; the latter is at 10 by its first point."""
    runs = [curve([(step, slope * step) for step in STEPS], **arm) for slope, arm in ((0.05, {}), (0.1, DAR))]
    rows = [entry for entry in comparison(*runs, goal="max")["targets"] if entry["arm"] == "DAR"]
    assert [entry["target"] for entry in rows] == pytest.approx([10, 25, 35, 50])  # of steps 200, 500, 700, 1000
    assert [entry["step"]["mean"] for entry in rows] == pytest.approx([100, 250, 350, 500])
    assert [entry["step_speedup"]["per_seed"][0] for entry in rows] == [{"ratio": pytest.approx(2), "bound": ""}] * 4
    for target, ratio in ((80, 1000 / 800), (8, 160 / 100)):
        found = row(comparison(*runs, goal="max", targets=(target,)), "DAR")["step_speedup"]["per_seed"][0]
        assert found == {"ratio": pytest.approx(ratio), "bound": ">"}


def test_seeds_of_one_arm_alone_have_no_ratio():
    runs = [curve(line(0.05), seed=0), curve(line(0.05), seed=3), curve(line(0.1), seed=2, **DAR)]
    dar = row(comparison(*runs, curve(line(0.1), seed=0, **DAR), targets=(70,)), "DAR")
    assert set(dar["step_speedup"]["per_seed"]) == {0}
    assert set(dar["step"]["per_seed"]) == {0, 2}, "its own time is known all the same"
    assert ratio_text(row(comparison(*runs, targets=(70,)), "DAR")["step_speedup"]) == "no seed in common"


@pytest.mark.parametrize(
    "entries, text",
    [
        ([(2.0, "")], "2.00"),
        ([(2.0, ""), (3.0, "")], "2.50 [2.00, 3.00]"),
        ([(1.25, ">")], ">1.25"),
        ([(0.8, "<")], "<0.80"),
        ([(None, "")], "not comparable"),
        ([(None, ""), (None, "")], "not comparable"),
        ([(2.0, ""), (1.25, ">")], "2.00; >1.25"),
        ([(1.25, ">"), (1.5, ">")], ">1.25; >1.50"),
        ([(2.0, ""), (None, ""), (3.0, "")], "2.00; 3.00"),  # a seed where neither arrives is not averaged over
        ([], "no seed in common"),
    ],
)
def test_ratio_in_the_table(entries, text):
    cell = {"per_seed": {seed: {"ratio": ratio, "bound": bound} for seed, (ratio, bound) in enumerate(entries)}}
    assert ratio_text(cell) == text


def test_summary_of_an_arm():
    curves = [[(100, 9.0), (200, 3.0), (300, 4.0)], [(100, 8.0), (200, 5.0)]]
    settings = dict(encoder=["tiny"], eval_encoder=["a", "b"], **REPA)
    runs = [curve(points, seed=seed, folder=f"run{seed}", **settings) for seed, points in enumerate(curves)]
    expected = {
        "seeds": [0, 1],
        "last": 4.5,
        "best": 4.0,
        "samples_per_second": 128.0,
        "last_step": 300,  # an arm is as long as its longest run, in whatever order they come
        "folders": ["run0", "run1"],
        "encoder": ["tiny"],
        "judge": ["a b"],
    }
    assert comparison(*runs)["arms"] == {"residual + REPA": expected}
    assert comparison(*runs, goal="max")["arms"]["residual + REPA"]["best"] == 8.5
    assert comparison(*runs[::-1])["arms"]["residual + REPA"]["last_step"] == 300
    silent = comparison(curve(line(0.1), eval_every=0))["arms"]["residual"]
    assert (silent["judge"], silent["encoder"]) == ([], [])


# ---- arms ----

IREPA = {"projector": "conv", "spatial_norm": 0.6, "align_steps": 9}


@pytest.mark.parametrize(
    "settings, name",
    [
        ({}, "residual"),
        (DAR, "DAR"),
        (REPA, "residual + REPA"),
        (DAR | REPA, "DAR + REPA"),
        ({"lr": 0.5}, "residual, lr=0.5"),
        (DAR | {"chunk_size": 2, "lr": 0.5}, "DAR, chunk_size=2, lr=0.5"),
        (REPA | {"align_depth": (2, 3)}, "residual + REPA, align_depth=2 3"),
        ({"chunk_size": 2, "query": "static", "final_aggregator": "shared"}, "residual"),
        (DAR | {"align_depth": (2,), "proj_coeff": 1.0, "projector_dim": 8, "encoder_features": "prepared"}, "DAR"),
        (IREPA, "residual"),
        (REPA | IREPA | {"projector_dim": 8}, "residual + REPA, align_steps=9, projector=conv, spatial_norm=0.6"),
        (REPA | {"projector_dim": 8}, "residual + REPA, projector_dim=8"),
        (ATTNRES, "AttnRes"),
        (UNET | REPA, "U-ViT skips + REPA"),
        (ATTNRES | {"chunk_size": 2, "route_backend": "torch"}, "AttnRes, chunk_size=2, route_backend=torch"),
        (ATTNRES | {"query": "static", "final_aggregator": "shared"}, "AttnRes"),
        (UNET | {"query": "static", "chunk_size": 2, "route_backend": "torch", "lr": 0.5}, "U-ViT skips, lr=0.5"),
        (DAR | {"query": "static", "final_aggregator": "shared"}, "DAR, final_aggregator=shared, query=static"),
        ({"eval_encoder": ("tiny", "hf:small")}, "residual, eval_encoder=tiny hf:small"),  # it measures the distance
    ],
)
def test_label_names_what_differs_and_is_read(settings, name):
    assert label(curve(line(0.1), **settings).config, sorted(settings)) == name
    assert label(curve(line(0.1), **settings).config, []) == name.partition(",")[0]


def test_every_option_that_changes_what_is_learnt_or_measured_tells_arms_apart():
    """And no other; with everything switched on, so that each option is read."""
    others = {"seed", "out", "max_steps", "micro_batch_size", "num_workers", "checkpoint_activations", "dry_run"}
    others |= {"log_every", "checkpoint_every", "snapshot_every", "tensorboard", "inception"}
    others |= {"diagnose_every", "diagnose_images"}
    on = {"seed": 0, "init_from": "a", "cfg_scale": 2.0, "diagnose_every": 1, **DAR, **REPA}
    for field in dataclasses.fields(Config):
        other = 7 if field.name in ("eval_every", "diagnose_every") else "another"
        arms = group([curve(line(0.1), **on), curve(line(0.1), **{**on, "seed": 1, field.name: other})])
        assert len(arms) == (1 if field.name in others else 2), field.name


def test_idle_options_neither_split_nor_name_arms():
    idle = dict(chunk_size=2, query="static", align_depth=(2,))
    runs = [curve(line(0.1)), curve(line(0.1), seed=1, **idle), curve(line(0.1), **DAR)]
    assert {name: sorted(seeds) for name, seeds in group([*runs, curve(line(0.1), chunk_size=2, **DAR)]).items()} == {
        "residual": [0, 1],
        "DAR, chunk_size=4, query=timestep": [0],
        "DAR, chunk_size=2, query=timestep": [0],
    }
    with pytest.raises(ValueError, match="b and a have the same settings and seed 1"):
        group([curve(line(0.1), seed=1, folder="a"), curve(line(0.1), seed=1, folder="b", max_steps=7)])


def test_a_run_from_before_an_option_had_its_default(tmp_path):
    """But runs from before there were judges were judged by their first encoder."""
    old = write_run(tmp_path / "old", line(0.1), encoder=("tiny", "b"), **REPA)
    lines = (old / "config.yaml").read_text().replace("eval_encoder:\n- inception\n", "").splitlines(keepends=True)
    (old / "config.yaml").write_text("".join(text for text in lines if not text.startswith(("projector:", "mirror:"))))
    settings = dict(encoder=("tiny", "b"), **REPA)
    new = write_run(tmp_path / "new", line(0.2), seed=1, eval_encoder=("tiny",), **settings)
    other = write_run(tmp_path / "other", line(0.2), projector="conv", eval_encoder=("tiny",), **settings)
    arms = group([read_run(folder, "frechet_distance") for folder in (old, new, other)])
    assert {name: sorted(seeds) for name, seeds in arms.items()} == {
        "residual + REPA, projector=mlp": [0, 1],
        "residual + REPA, projector=conv": [0],
    }


# ---- curves and targets ----


def test_common_steps_is_over_the_steps_that_all_seeds_have():
    runs = [curve([(100, 8.0), (200, 6.0), (300, 4.0)], 0.5), curve([(200, 2.0), (300, 8.0), (400, 1.0)], 1.0, seed=1)]
    x, y = common_steps(runs, "step")
    assert [x.tolist(), y.tolist()] == [[200, 300], [[6, 4], [2, 8]]]
    assert common_steps(runs, "seconds")[0].tolist() == [150, 225], "the mean of 100 and 200, of 150 and 300 seconds"
    assert common_steps(runs, "images")[0].tolist() == [200 * BATCH, 300 * BATCH]
    with pytest.raises(ValueError, match="a, b have no step in common"):
        common_steps([curve([(100, 1.0)], folder="a"), curve([(150, 1.0)], folder="b")], "step")


def test_default_targets_are_the_best_by_each_quarter():
    points = list(zip(range(100, 801, 100), [9.0, 8.0, 7.0, 9.5, 5.0, 6.0, 4.0, 4.5]))
    assert default_targets([curve(points)], "min") == (8.0, 7.0, 5.0, 4.0)
    assert default_targets([curve([(step, -value) for step, value in points])], "max") == (-8.0, -7.0, -5.0, -4.0)
    assert default_targets([curve([(step, 100 - step) for step in range(1, 101)])], "min") == (75, 50, 25, 0)
    # A value that is not improved on is one target, and every seed reaches what is asked for.
    assert default_targets([curve(points)], "max") == (9.0, 9.5)
    crossed = [(step, {300: 8.5, 700: 3.0, 800: 6.0}.get(step, value + 1)) for step, value in points]
    assert default_targets([curve(points), curve(crossed, seed=1)], "min") == (9.0, 8.5, 6.0, 4.0)
    assert default_targets([curve([(500, 3.0)])], "min") == (3.0,)


# ---- reading ----


def test_reading_a_run(tmp_path):
    machines = [{"from_step": 0, "gpu": "old"}, {"from_step": 300, "gpu": "new"}]
    folder = write_run(tmp_path / "a", [(100, 9.0), (200, 7.0)], 0.25, None, machines, seed=5, **DAR)
    with open(folder / "metrics.jsonl", "a") as file:
        for rate in (10.0, 100.0, 130.0, 110.0, 900.0):  # the median: a slow beginning, or a pause, counts once
            file.write(json.dumps({"step": 250, "loss": 1.0, "samples_per_second": rate}) + "\n")
        file.write('{"step": 300, "images": 19200, "seconds": 150.0, "frechet_dist')  # a log that is being written
    run = read_run(folder, "frechet_distance")
    assert run.y.tolist() == [9.0, 7.0] and run.environments == machines
    assert {axis: x.tolist() for axis, x in run.x.items()} == {
        "step": [100, 200],
        "seconds": [25, 50],
        "images": [100 * BATCH, 200 * BATCH],
    }
    assert (run.config["seed"], run.config["routing"], run.samples_per_second) == (5, "dar", 110.0)


def test_what_is_no_run_or_lacks_the_metric_is_refused(tmp_path):
    folder = write_run(tmp_path / "a", [(100, 9.0)])
    logged = "evaluation_seconds, frechet_distance, loss, samples_per_second"
    with pytest.raises(ValueError, match=f"{folder} never logged 'fid'; it has {logged}$"):
        read_run(folder, "fid")
    with pytest.raises(ValueError, match="nothing yet"):
        read_run(write_run(tmp_path / "b", []), "frechet_distance")
    for missing in ("metrics.jsonl", "config.yaml"):
        (folder / missing).rename(folder / "aside")
        with pytest.raises(ValueError, match="not a run folder"):
            read_run(folder, "loss")
        (folder / "aside").rename(folder / missing)


# ---- the command ----


@pytest.fixture
def study(tmp_path):
    """Two arms with two seeds each; 70 is reached 2 and 3 times sooner in steps, 1.25 and 1.875 in seconds."""
    machine, runs = {"gpu": "none", "torch": "x"}, []
    for name, seed, slope, seconds, rate, settings in [
        ("residual", 0, 0.05, 0.5, 128.0, {}),
        ("residual", 1, 0.04, 0.5, 128.0, {}),
        ("dar", 0, 0.1, 0.8, 80.0, DAR),
        ("dar", 1, 0.12, 0.8, 80.0, DAR),
    ]:
        start = [{"from_step": 0, "command": f"command {name}{seed}", **machine}]
        runs.append(
            write_run(tmp_path / "runs" / f"{name}{seed}", line(slope), seconds, rate, start, seed=seed, **settings)
        )
    return [str(run) for run in runs], tmp_path / "out" / "plot"


def test_command_writes_plot_table_and_numbers_that_agree(study, capsys):
    runs, out = study
    convergence.main([*runs, "--out", str(out), "--targets", "70", "30", "5", "-90"])
    result, table = strict_json(out.with_suffix(".json")), out.with_suffix(".md").read_text()
    assert table in capsys.readouterr().out
    assert (result["metric"], result["goal"], result["reference"]) == ("frechet_distance", "min", "residual")
    assert table_rows(table, "arm") == [
        ["residual", "0, 1", "55", "55", "1000", "128"],
        ["DAR", "0, 1", "-10", "-10", "1000", "80"],
    ]
    rows, missed = table_rows(table, "`frechet_distance` reaches"), "not reached by 2 of 2"
    assert [cells[0] for cells in rows] == [f"{entry['target']:.4g}" for entry in result["targets"]]
    assert [cells[1:] for cells in rows] == [
        ["residual", "675", "reference", "338", "reference"],
        ["DAR", "275", "2.50 [2.00, 3.00]", "220", "1.56 [1.25, 1.88]"],
        # 30: DAR at 700 and 583, residual not by 1000. 5: DAR at 950 and 792. -90: nobody.
        ["residual", missed, "reference", missed, "reference"],
        ["DAR", "642", ">1.43; >1.71", "513", ">0.89; >1.07"],
        ["residual", missed, "reference", missed, "reference"],
        ["DAR", "871", ">1.05; >1.26", "697", ">0.66; >0.79"],
        ["residual", missed, "reference", missed, "reference"],
        ["DAR", missed, "not comparable", missed, "not comparable"],
    ]
    measured = result["targets"][1]
    assert measured["step_speedup"]["per_seed"]["1"] == {"ratio": pytest.approx(3.0), "bound": ""}
    assert measured["seconds_speedup"]["per_seed"]["0"] == {"ratio": pytest.approx(1.25), "bound": ""}
    assert result["targets"][3]["step_speedup"]["per_seed"]["0"] == {"ratio": pytest.approx(1000 / 700), "bound": ">"}
    assert result["targets"][7]["step"] == {"per_seed": {"0": None, "1": None}, "mean": None}

    # Said once, although four runs were made with four commands.
    assert result["environments"] == [{"gpu": "none", "torch": "x"}]
    assert table.count("Measured on: gpu none, torch x.") == 1
    assert "Judge of the samples: `inception`. Aligned to: none." in table
    with Image.open(out.with_suffix(".png")) as image:
        image.load()
        assert min(image.size) > 100
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 10, "an empty page"


def test_command_takes_reference_metric_and_axis_of_its_choice(study):
    runs, out = study
    convergence.main([*runs, "--out", str(out), "--reference", "DAR", "--x", "step"])
    result = strict_json(out.with_suffix(".json"))
    # What the slower seed, 100 - 0.1 step, has at the last points up to steps 250, 500, 750 and 1000.
    assert sorted({entry["target"] for entry in result["targets"]}) == pytest.approx([0, 30, 50, 80])
    assert "Speedups over **DAR**" in out.with_suffix(".md").read_text()
    assert row(result, "residual")["step_speedup"]["per_seed"]["0"]["ratio"] == pytest.approx(0.5)
    convergence.main([*runs, "--metric", "loss", "--out", str(out), "--x", "seconds"])
    result = strict_json(out.with_suffix(".json"))
    assert result["metric"] == "loss"
    assert row(result, "DAR")["step_speedup"]["per_seed"]["0"]["ratio"] == pytest.approx(1.0)


def plotted(monkeypatch, arguments):
    """The figure of a command, kept open."""
    import matplotlib.pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    convergence.main(arguments)
    (figure,) = kept
    monkeypatch.undo()
    plt.close(figure)
    return figure


def test_plot_over_images(study, monkeypatch):
    runs, out = study
    figure = plotted(monkeypatch, [*runs, "--out", str(out), "--x", "images"])
    (panel,), (legend,) = figure.axes, figure.legends
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("images seen", "Fréchet distance")
    assert [text.get_text() for text in legend.get_texts()] == ["residual (2 seeds)", "DAR (2 seeds)"]
    images = np.array(STEPS) * BATCH
    for drawn, band, slopes in zip(panel.lines, panel.collections, [(0.05, 0.04), (0.1, 0.12)]):
        assert drawn.get_xdata().tolist() == images.tolist()
        assert drawn.get_ydata() == pytest.approx(100 - np.mean(slopes) * np.array(STEPS))
        corners = band.get_paths()[0].vertices
        last = corners[corners[:, 0] == images[-1]][:, 1]
        assert (last.min(), last.max()) == pytest.approx((100 - 1000 * max(slopes), 100 - 1000 * min(slopes)))


def test_plot_has_a_panel_for_each_axis_and_the_mean_of_three_seeds(study, tmp_path, monkeypatch):
    runs, out = study
    figure = plotted(monkeypatch, [runs[0], runs[2], "--out", str(out)])
    assert [panel.get_xlabel() for panel in figure.axes] == ["training steps", "seconds of training"]
    assert figure.axes[1].lines[1].get_xdata().tolist() == [0.8 * step for step in STEPS]
    assert not figure.axes[0].collections, "one seed has no band"
    third = write_run(tmp_path / "third", line(0.1), seed=2)
    (panel,) = plotted(monkeypatch, [*runs[:2], str(third), "--out", str(out), "--x", "step"]).axes
    assert panel.lines[0].get_ydata() == pytest.approx(100 - (0.05 + 0.04 + 0.1) / 3 * np.array(STEPS))


def test_machines_are_all_named_and_numbers_are_valid_json_without_a_speed(tmp_path):
    """An evaluation may come before the first line of the log. The name of the output may have dots."""
    runs = [
        write_run(tmp_path / gpu, line(0.1), rate=None, environment=[{"gpu": gpu, "command": "x"}], seed=seed)
        for seed, gpu in enumerate(["H100", "A100"])
    ]
    convergence.main([*map(str, runs), "--out", str(tmp_path / "lr0.1"), "--x", "step"])
    assert sorted(path.name for path in tmp_path.glob("lr0*")) == ["lr0.1.json", "lr0.1.md", "lr0.1.png"]
    result, text = strict_json(tmp_path / "lr0.1.json"), (tmp_path / "lr0.1.md").read_text()
    assert result["environments"] == [{"gpu": "A100"}, {"gpu": "H100"}]
    assert result["arms"]["residual"]["samples_per_second"] is None and "nan" not in text
    assert all(f"Measured on: gpu {gpu}." in text for gpu in ("A100", "H100"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--metric", "fid"], "never logged 'fid'; it has evaluation_seconds"),
        (["--reference", "dense"], "reference 'dense' is not among the arms: 'residual', 'DAR'"),
        (["nowhere"], "'nowhere' is not a run folder"),
        (["--x"], "x is empty"),
    ],
)
def test_command_ends_in_a_clear_error(study, changes, message):
    runs, out = study
    with pytest.raises(SystemExit) as stop:
        convergence.main(["--out", str(out), *runs, *changes])
    assert str(stop.value.code).startswith("error: ") and message in str(stop.value.code)
    assert not out.with_suffix(".json").exists()


def test_command_without_runs_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        convergence.main(["--out", str(tmp_path / "plot")])
    assert "run" in str(stop.value.code) + capsys.readouterr().err

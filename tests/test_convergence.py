"""The convergence plot and its table, on run folders written here whose curves have known crossings."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import config
from config import Config
from analysis import convergence
from analysis.convergence import (
    Options,
    Run,
    common_steps,
    compare,
    default_targets,
    group,
    label,
    ratio_text,
    read_run,
    speedup,
    time_to_target,
)

STEPS = range(100, 1001, 100)
BATCH = 64
DAR = {"routing": "dar"}
ATTNRES, UNET = {"routing": "attnres"}, {"routing": "unet"}
REPA = {"alignment": "repa"}


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
        lines.append(
            {
                **axes,
                "loss": 1 + 10 / step,
                "denoising_loss": 1 + 10 / step,
                "grad_norm": 1.0,
                "skipped_steps": 0,
                **({"samples_per_second": rate} if rate else {}),
            }
        )
        lines.append({**axes, "frechet_distance": value, "evaluation_seconds": 3.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    if environment:
        (folder / "environment.jsonl").write_text("".join(json.dumps(record) + "\n" for record in environment))
    return folder


def curve(points, seconds_per_step=0.5, seed=0, folder="run", **settings):
    """The same run, already read."""
    steps = np.array([step for step, _ in points], dtype=float)
    saved = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(dataclasses.replace(Config(), seed=seed, **settings)).items()
    }
    return Run(
        folder,
        saved,
        {"step": steps, "images": steps * BATCH, "seconds": steps * seconds_per_step},
        np.array([value for _, value in points], dtype=float),
        128.0,
        {},
    )


def options(**changes):
    return dataclasses.replace(Options(runs=()), **changes)


def strict_json(path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def table_rows(markdown, first_column):
    """Cells of the table whose head begins with that column, without head and rule."""
    lines = markdown.splitlines()
    start = next(i for i, text in enumerate(lines) if text.startswith(f"| {first_column} |"))
    rows = []
    for text in lines[start + 2 :]:
        if not text.startswith("|"):
            break
        rows.append([cell.strip() for cell in text.strip("|").split("|")])
    return rows


# ---- time to target ----


@pytest.mark.parametrize("target, expected", [(73, 540), (90, 200), (51, 980), (94.99, 100.2), (50, 1000)])
def test_crossing_of_a_straight_line(target, expected):
    run = curve(line(0.05))
    assert time_to_target(run.x["step"], run.y, target) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("target", [0.9, 0.5, 0.2, 0.06])
def test_crossing_of_an_exponential(target):
    x = np.array([0.0, 1, 2, 4, 8, 16, 32])
    y = np.exp(-x / 10)
    k = np.searchsorted(-y, -target)  # the first point at or below the target
    expected = x[k - 1] + (x[k] - x[k - 1]) * (y[k - 1] - target) / (y[k - 1] - y[k])
    found = time_to_target(x, y, target)
    assert found == pytest.approx(expected, rel=1e-12)
    # Chords of a convex curve lie above it: later than the curve itself, but before its next point.
    assert -10 * np.log(target) <= found <= x[k]


@pytest.mark.parametrize("seed", range(5))
def test_crossing_of_a_monotone_curve_is_linear_interpolation(seed):
    rng = np.random.default_rng(seed)
    x, y = np.sort(rng.random(20)), np.sort(rng.random(20))[::-1]
    for target in rng.uniform(y[-1], y[0], 10):
        expected = np.interp(target, y[::-1], x[::-1])
        assert time_to_target(x, y, target) == pytest.approx(expected, rel=1e-9)
        assert time_to_target(x, -y, -target, "max") == pytest.approx(expected, rel=1e-9)


X = np.array([10.0, 20, 30, 40])


@pytest.mark.parametrize(
    "y, target, goal, expected",
    [
        ([9, 6, 3, 1], 9.5, "min", 10.0),  # reached before the first point
        ([9, 6, 3, 1], 9, "min", 10.0),
        ([9, 6, 3, 1], 6, "min", 20.0),  # a hit on a point is that point
        ([9, 6, 3, 1], 1, "min", 40.0),
        ([9, 6, 3, 1], 0.5, "min", None),
        ([9, 9, 6, 6], 9, "min", 10.0),
        ([9, 6, 6, 3], 6, "min", 20.0),  # the beginning of a plateau
        ([10, 4, 8, 2], 5, "min", 10 + 10 * 5 / 6),  # later worse again: the first crossing counts
        ([10, 4, 8, 2], 3, "min", 30 + 10 * 5 / 6),
        ([1, 5, 3, 9], 4, "max", 10 + 10 * 3 / 4),
        ([1, 5, 3, 9], 5, "max", 20.0),
        ([1, 5, 3, 9], 7, "max", 30 + 10 * 4 / 6),
        ([1, 5, 3, 9], 10, "max", None),
        ([1, 5, 3, 9], 0, "max", 10.0),
    ],
)
def test_first_crossing(y, target, goal, expected):
    found = time_to_target(X, np.array(y, dtype=float), target, goal)
    assert found is None if expected is None else found == pytest.approx(expected, rel=1e-12)


# ---- speedups ----


def test_arm_that_is_twice_as_fast():
    reference, other = curve(line(0.05), 0.5), curve(line(0.1), 0.8)
    # 70 is reached at step 600 and 300, that is after 300 and 240 seconds.
    assert speedup(reference, other, 70, "step") == (pytest.approx(2.0, rel=1e-12), "")
    assert speedup(reference, other, 70, "seconds") == (pytest.approx(1.25, rel=1e-12), "")
    assert speedup(other, reference, 70, "step") == (pytest.approx(0.5, rel=1e-12), "")


def test_bounds_where_an_arm_never_arrives():
    slow, fast = curve(line(0.05), 0.5), curve(line(0.1), 0.8)
    # 20: the fast one at step 800 (640 s), the slow one not by 1000 (500 s). Below -1: neither.
    assert speedup(slow, fast, 20, "step") == (pytest.approx(1.25), ">")
    assert speedup(slow, fast, 20, "seconds") == (pytest.approx(500 / 640), ">")
    assert speedup(fast, slow, 20, "step") == (pytest.approx(0.8), "<")
    assert speedup(fast, slow, 20, "seconds") == (pytest.approx(640 / 500), "<")
    assert speedup(slow, fast, -1, "step") == (None, "")


def test_bounds_where_an_arm_had_arrived_before_its_first_point():
    slow, fast = curve(line(0.05)), curve(line(0.1))
    # 92: the fast one is at 90 by its first point, step 100; the slow one arrives at step 160.
    assert speedup(slow, fast, 92, "step") == (pytest.approx(1.6), ">")
    assert speedup(fast, slow, 92, "step") == (pytest.approx(1 / 1.6), "<")
    assert speedup(slow, fast, 90, "step") == (pytest.approx(2.0), "")  # the first point is a measurement
    assert speedup(slow, fast, 97, "step") == (None, "")  # both had
    # One had arrived before its first point and the other never does: the bound holds all the more.
    never = curve([(step, 95) for step in STEPS])
    assert speedup(never, fast, 92, "step") == (pytest.approx(10.0), ">")
    assert speedup(fast, never, 92, "step") == (pytest.approx(0.1), "<")


def test_speedup_towards_a_large_value():
    slow, fast = curve([(step, step * 0.05) for step in STEPS]), curve([(step, step * 0.1) for step in STEPS])
    assert speedup(slow, fast, 30, "step", "max") == (pytest.approx(2.0), "")
    assert speedup(slow, fast, 80, "step", "max") == (pytest.approx(1.25), ">")


def arms_of(*runs):
    return group(list(runs))


def row(result, arm):
    return next(entry for entry in result["targets"] if entry["arm"] == arm)


def test_seeds_are_paired():
    # Steps to 70: 600 and 300 for seed 0, 750 and 250 for seed 1. Crosswise the ratios would be 2.4 and 2.5.
    arms = arms_of(
        curve(line(0.05), seed=0),
        curve(line(0.04), seed=1),
        curve(line(0.12), seed=1, **DAR),
        curve(line(0.1), seed=0, **DAR),
    )
    result = compare(arms, options(targets=(70,)))
    assert result["reference"] == "residual"
    cell = row(result, "DAR")["step_speedup"]
    assert {seed: entry["ratio"] for seed, entry in cell["per_seed"].items()} == pytest.approx({0: 2.0, 1: 3.0})
    assert ratio_text(cell) == "2.50 [2.00, 3.00]"
    assert row(result, "residual")["step"]["mean"] == pytest.approx(675)
    assert row(result, "DAR")["step"] == {"per_seed": pytest.approx({0: 300, 1: 250}), "mean": pytest.approx(275)}


def test_three_seeds_have_their_mean_and_not_their_median():
    # Steps to 70: 600, 750 and 500 for the reference, 300, 250 and 250 for DAR; ratios 2, 3 and 2.
    slopes = {"residual": (0.05, 0.04, 0.06), "dar": (0.1, 0.12, 0.12)}
    arms = arms_of(
        *(
            curve(line(slope), seed=seed, routing=routing)
            for routing in slopes
            for seed, slope in enumerate(slopes[routing])
        )
    )
    result = compare(arms, options(targets=(70,)))
    assert row(result, "residual")["step"]["mean"] == pytest.approx(1850 / 3)
    assert row(result, "DAR")["step"]["mean"] == pytest.approx(800 / 3)
    assert ratio_text(row(result, "DAR")["step_speedup"]) == "2.33 [2.00, 3.00]"
    assert result["arms"]["DAR"]["last"] == result["arms"]["DAR"]["best"] == pytest.approx(-40 / 3)


def test_a_seed_that_never_arrives_leaves_no_mean_time():
    # 70: at step 600 by seed 0; seed 1 is at 80 when its run ends.
    result = compare(arms_of(curve(line(0.05), seed=0), curve(line(0.02), seed=1)), options(targets=(70,)))
    assert row(result, "residual")["step"] == {"per_seed": {0: pytest.approx(600), 1: None}, "mean": None}
    (cells,) = table_rows(convergence.markdown(result), "`frechet_distance` reaches")
    assert cells[2] == cells[4] == "not reached by 1 of 2"


def test_a_metric_that_is_better_when_large():
    """Targets, times, ratios and bounds of 0.05 step and 0.1 step; the latter is at 10 by its first point."""
    slow, fast = ([(step, slope * step) for step in STEPS] for slope in (0.05, 0.1))
    arms = arms_of(curve(slow), curve(fast, **DAR))
    result = compare(arms, options(goal="max"))
    rows = [entry for entry in result["targets"] if entry["arm"] == "DAR"]
    assert [entry["target"] for entry in rows] == pytest.approx([10, 25, 35, 50])  # of steps 200, 500, 700, 1000
    assert [entry["step"]["mean"] for entry in rows] == pytest.approx([100, 250, 350, 500])
    assert [entry["step_speedup"]["per_seed"][0] for entry in rows] == [{"ratio": pytest.approx(2), "bound": ""}] * 4
    never, before = (row(compare(arms, options(goal="max", targets=(target,))), "DAR") for target in (80, 8))
    assert never["step_speedup"]["per_seed"][0] == {"ratio": pytest.approx(1000 / 800), "bound": ">"}
    assert before["step_speedup"]["per_seed"][0] == {"ratio": pytest.approx(160 / 100), "bound": ">"}


def test_seeds_of_one_arm_alone_have_no_ratio():
    arms = arms_of(
        curve(line(0.05), seed=0),
        curve(line(0.05), seed=3),
        curve(line(0.1), seed=0, **DAR),
        curve(line(0.1), seed=2, **DAR),
    )
    dar = row(compare(arms, options(targets=(70,))), "DAR")
    assert set(dar["step_speedup"]["per_seed"]) == {0}
    assert set(dar["step"]["per_seed"]) == {0, 2}, "its own time is known all the same"


def test_arms_without_a_common_seed():
    arms = arms_of(curve(line(0.05), seed=0), curve(line(0.1), seed=1, **DAR))
    assert ratio_text(row(compare(arms, options(targets=(70,))), "DAR")["step_speedup"]) == "no seed in common"


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
        ([], "no seed in common"),
    ],
)
def test_ratio_in_the_table(entries, text):
    cell = {"per_seed": {seed: {"ratio": ratio, "bound": bound} for seed, (ratio, bound) in enumerate(entries)}}
    assert ratio_text(cell) == text


def test_a_seed_where_neither_arrives_is_not_averaged_over():
    ratios = {seed: {"ratio": ratio, "bound": ""} for seed, ratio in enumerate([2.0, None, 3.0])}
    assert ratio_text({"per_seed": ratios}) == "2.00; 3.00"


def test_reference_can_be_chosen():
    arms = arms_of(curve(line(0.05)), curve(line(0.1), **DAR))
    result = compare(arms, options(targets=(70,), reference="DAR"))
    assert row(result, "residual")["step_speedup"]["per_seed"][0] == {"ratio": pytest.approx(0.5), "bound": ""}


def test_unknown_reference_lists_the_arms():
    with pytest.raises(ValueError, match="'dense'.*'residual', 'DAR'"):
        compare(arms_of(curve(line(0.05)), curve(line(0.1), **DAR)), options(reference="dense"))


def test_summary_of_an_arm():
    curves = [[(100, 9.0), (200, 3.0), (300, 4.0)], [(100, 8.0), (200, 5.0), (300, 6.0)]]
    runs = [curve(points, seed=seed, folder=f"run{seed}", encoder="tiny") for seed, points in enumerate(curves)]
    expected = {
        "seeds": [0, 1],
        "last": 5.0,
        "best": 4.0,
        "samples_per_second": 128.0,
        "last_step": 300,
        "folders": ["run0", "run1"],
        "encoder": ["tiny"],
    }
    assert compare(arms_of(*runs), options())["arms"] == {"residual": expected}
    assert compare(arms_of(*runs), options(goal="max"))["arms"]["residual"]["best"] == 8.5


def test_an_arm_is_as_long_as_its_longest_run():
    short, long = curve(line(0.05)[:4], seed=0), curve(line(0.05)[:7], seed=1)
    for runs in ((short, long), (long, short)):
        assert compare(arms_of(*runs), options(targets=(90,)))["arms"]["residual"]["last_step"] == 700


# ---- arms ----


@pytest.mark.parametrize(
    "settings, varied, name",
    [
        ({}, [], "residual"),
        (DAR, ["routing"], "DAR"),
        (REPA, ["alignment"], "residual + REPA"),
        (DAR | REPA, ["routing", "alignment"], "DAR + REPA"),
        ({"lr": 0.5}, [], "residual"),
        ({"lr": 0.5}, ["lr"], "residual, lr=0.5"),
        (DAR | {"chunk_size": 2, "lr": 0.5}, ["chunk_size", "lr", "routing"], "DAR, chunk_size=2, lr=0.5"),
        (REPA | {"align_depth": (2, 3)}, ["align_depth"], "residual + REPA, align_depth=2 3"),
        ({"chunk_size": 2, "query": "static"}, ["chunk_size", "query"], "residual"),
        ({"final_aggregator": "shared"}, ["final_aggregator"], "residual"),
        (DAR | {"align_depth": (2,), "proj_coeff": 1.0}, ["align_depth", "proj_coeff"], "DAR"),
        (DAR | {"projector_dim": 8, "encoder_features": "prepared"}, ["projector_dim", "encoder_features"], "DAR"),
        (
            {"projector": "conv", "spatial_norm": 0.6, "align_steps": 9},
            ["align_steps", "projector", "spatial_norm"],
            "residual",
        ),
        (
            REPA | {"projector": "conv", "spatial_norm": 0.6, "align_steps": 9, "projector_dim": 8},
            ["align_steps", "projector", "projector_dim", "spatial_norm"],
            "residual + REPA, align_steps=9, projector=conv, spatial_norm=0.6",
        ),
        (
            REPA | {"projector_dim": 8},
            ["projector", "projector_dim"],
            "residual + REPA, projector=mlp, projector_dim=8",
        ),
        (ATTNRES, ["routing"], "AttnRes"),
        (UNET | REPA, ["routing", "alignment"], "U-ViT skips + REPA"),
        (
            ATTNRES | {"chunk_size": 2, "route_backend": "torch"},
            ["chunk_size", "route_backend"],
            "AttnRes, chunk_size=2, route_backend=torch",
        ),
        (ATTNRES | {"query": "static", "final_aggregator": "shared"}, ["query", "final_aggregator"], "AttnRes"),
        (
            UNET
            | {"query": "static", "chunk_size": 2, "final_aggregator": "shared", "route_backend": "torch", "lr": 0.5},
            ["query", "chunk_size", "final_aggregator", "route_backend", "lr"],
            "U-ViT skips, lr=0.5",
        ),
        (
            DAR | {"query": "static", "final_aggregator": "shared", "route_backend": "torch"},
            ["query", "final_aggregator", "route_backend"],
            "DAR, query=static, final_aggregator=shared, route_backend=torch",
        ),
        ({"encoder": "tiny"}, ["encoder"], "residual, encoder=tiny"),  # it measures the distance too
    ],
)
def test_label(settings, varied, name):
    assert label(curve(line(0.1), **settings).config, varied) == name


def test_a_run_from_before_an_option_had_its_default(tmp_path):
    old = write_run(tmp_path / "old", line(0.1), **REPA)
    lines = (old / "config.yaml").read_text().splitlines(keepends=True)
    (old / "config.yaml").write_text("".join(text for text in lines if not text.startswith(("projector:", "mirror:"))))
    new = write_run(tmp_path / "new", line(0.2), seed=1, **REPA)
    other = write_run(tmp_path / "other", line(0.2), projector="conv", **REPA)
    arms = group([read_run(folder, "frechet_distance") for folder in (old, new, other)])
    assert {name: sorted(seeds) for name, seeds in arms.items()} == {
        "residual + REPA, projector=mlp": [0, 1],
        "residual + REPA, projector=conv": [0],
    }


def test_idle_options_neither_split_nor_name_arms():
    runs = [
        curve(line(0.1), seed=0),
        curve(line(0.1), seed=1, chunk_size=2, query="static", align_depth=(2,)),
        curve(line(0.1), seed=0, **DAR),
        curve(line(0.1), seed=0, chunk_size=2, **DAR),
    ]
    arms = group(runs)
    assert {name: sorted(seeds) for name, seeds in arms.items()} == {
        "residual": [0, 1],
        "DAR, chunk_size=4, query=timestep": [0],
        "DAR, chunk_size=2, query=timestep": [0],
    }


@pytest.mark.parametrize(
    "name, value",
    [
        ("out", "x"),
        ("max_steps", 7),
        ("num_workers", 3),
        ("checkpoint_every", 7),
        ("snapshot_every", 7),
        ("tensorboard", False),
        ("log_every", 7),
        ("micro_batch_size", 8),
        ("eval_metric", "fid"),
        ("diagnose_every", 7),
    ],
)
def test_settings_that_do_not_tell_arms_apart(name, value):
    assert list(group([curve(line(0.1)), curve(line(0.1), seed=1, **{name: value})])) == ["residual"]


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", 0.5),
        ("batch_size", 8),
        ("data", "flowers"),
        ("eval_samples", 9),
        ("sampler", "heun"),
        ("model", "SiT-S/2"),
        ("compile", True),
    ],
)
def test_settings_that_tell_arms_apart(name, value):
    plain, other = group([curve(line(0.1)), curve(line(0.1), **{name: value})])
    assert (plain, other) == (f"residual, {name}={getattr(Config(), name)}", f"residual, {name}={value}")


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_every_option_that_changes_what_is_learnt_or_measured_tells_arms_apart(name):
    """And no other; with everything switched on, so that each option is read."""
    others = {
        "seed",
        "out",
        "max_steps",
        "micro_batch_size",
        "num_workers",
        "checkpoint_activations",
        "dry_run",
        "log_every",
        "checkpoint_every",
        "snapshot_every",
        "tensorboard",
        "eval_metric",
        "inception",
        "diagnose_every",
        "diagnose_images",
    }
    on = {"seed": 0, "eval_metric": "fid", "cfg_scale": 2.0, "diagnose_every": 1, **DAR, **REPA}
    other = 7 if name in ("eval_every", "diagnose_every") else "another"
    runs = [curve(line(0.1), **on), curve(line(0.1), **{**on, "seed": 1, name: other})]
    assert len(group(runs)) == (1 if name in others else 2)


def test_several_values_are_named_as_on_the_command_line():
    plain, other = group([curve(line(0.1)), curve(line(0.1), encoder=["tiny", "hf:small"])])
    assert (plain, other) == ("residual, encoder=dinov2-vit-b", "residual, encoder=tiny hf:small")


def test_same_settings_and_seed_twice_are_refused():
    with pytest.raises(ValueError, match="b and a have the same settings and seed 1"):
        group([curve(line(0.1), seed=1, folder="a"), curve(line(0.1), seed=1, folder="b", max_steps=7)])


# ---- curves and targets ----


def test_common_steps_is_over_the_steps_that_all_seeds_have():
    runs = [curve([(100, 8.0), (200, 6.0), (300, 4.0)], 0.5), curve([(200, 2.0), (300, 8.0), (400, 1.0)], 1.0, seed=1)]
    x, y = common_steps(runs, "step")
    assert [x.tolist(), y.tolist()] == [[200, 300], [[6, 4], [2, 8]]]
    assert common_steps(runs, "seconds")[0].tolist() == [150, 225], "the mean of 100 and 200, of 150 and 300 seconds"
    assert common_steps(runs, "images")[0].tolist() == [200 * BATCH, 300 * BATCH]


def test_common_steps_without_a_common_step_is_refused():
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


def test_default_targets_of_a_single_point():
    assert default_targets([curve([(500, 3.0)])], "min") == (3.0,)


# ---- reading ----


def test_reading_a_run(tmp_path):
    machines = [{"from_step": 0, "gpu": "old"}, {"from_step": 300, "gpu": "new"}]
    folder = write_run(tmp_path / "a", [(100, 9.0), (200, 7.0)], 0.25, 64.0, machines, seed=5, **DAR)
    run = read_run(folder, "frechet_distance")
    assert run.y.tolist() == [9.0, 7.0]
    assert {axis: x.tolist() for axis, x in run.x.items()} == {
        "step": [100, 200],
        "seconds": [25, 50],
        "images": [100 * BATCH, 200 * BATCH],
    }
    assert (run.config["seed"], run.config["routing"], run.samples_per_second) == (5, "dar", 64.0)
    assert run.environments == machines


def test_speed_is_the_median_of_the_log(tmp_path):
    """So that a slow beginning, or a pause, counts once."""
    folder = write_run(tmp_path / "a", [(100, 9.0)], rate=None)
    with open(folder / "metrics.jsonl", "a") as file:
        for step, rate in ((200, 10.0), (300, 100.0), (400, 130.0), (500, 110.0), (600, 900.0)):
            file.write(json.dumps({"step": step, "loss": 1.0, "samples_per_second": rate}) + "\n")
    assert read_run(folder, "frechet_distance").samples_per_second == 110.0


def test_last_line_of_a_running_log_is_left_out(tmp_path):
    folder = write_run(tmp_path / "a", [(100, 9.0), (200, 7.0)])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 300, "images": 19200, "seconds": 150.0, "frechet_dist')
    assert read_run(folder, "frechet_distance").y.tolist() == [9.0, 7.0]


def test_unknown_metric_lists_those_that_were_logged(tmp_path):
    folder = write_run(tmp_path / "a", [(100, 9.0)])
    with pytest.raises(ValueError) as error:
        read_run(folder, "fid")
    assert "'fid'" in str(error.value) and str(folder) in str(error.value)
    assert str(error.value).endswith(
        "it has denoising_loss, evaluation_seconds, frechet_distance, grad_norm, loss, "
        "samples_per_second, skipped_steps"
    )


def test_run_without_any_line_has_no_metric(tmp_path):
    with pytest.raises(ValueError, match="nothing yet"):
        read_run(write_run(tmp_path / "a", []), "frechet_distance")


@pytest.mark.parametrize("missing", ["metrics.jsonl", "config.yaml"])
def test_folder_that_is_no_run_is_refused(tmp_path, missing):
    folder = write_run(tmp_path / "a", [(100, 9.0)])
    (folder / missing).unlink()
    with pytest.raises(ValueError, match="not a run folder"):
        read_run(folder, "loss")


# ---- the command ----


@pytest.fixture
def study(tmp_path):
    """Two arms with two seeds each; 70 is reached 2 and 3 times sooner in steps, 1.25 and 1.875 in seconds."""
    machine = {"gpu": "none", "torch": "x"}
    runs = [
        write_run(
            tmp_path / "runs" / f"{arm}{seed}",
            line(slope),
            seconds,
            rate,
            [{"from_step": 0, "command": f"command {arm}{seed}", **machine}],
            seed=seed,
            **settings,
        )
        for arm, seed, slope, seconds, rate, settings in [
            ("residual", 0, 0.05, 0.5, 128.0, {}),
            ("residual", 1, 0.04, 0.5, 128.0, {}),
            ("dar", 0, 0.1, 0.8, 80.0, DAR),
            ("dar", 1, 0.12, 0.8, 80.0, DAR),
        ]
    ]
    return [str(run) for run in runs], tmp_path / "out" / "plot"


def test_command_writes_plot_table_and_numbers_that_agree(study, capsys):
    runs, out = study
    convergence.main([*runs, "--out", str(out), "--targets", "70", "30", "5", "-90"])
    result, table = strict_json(out.with_suffix(".json")), out.with_suffix(".md").read_text()
    assert table in capsys.readouterr().out
    assert (result["metric"], result["goal"], result["reference"]) == ("frechet_distance", "min", "residual")

    arms = {cells[0]: cells[1:] for cells in table_rows(table, "arm")}
    assert arms.keys() == result["arms"].keys() == {"residual", "DAR"}
    for name, arm in result["arms"].items():
        assert arms[name] == [
            ", ".join(map(str, arm["seeds"])),
            f"{arm['last']:.4g}",
            f"{arm['best']:.4g}",
            str(arm["last_step"]),
            f"{arm['samples_per_second']:.0f}",
        ]
    assert arms["DAR"] == ["0, 1", "-10", "-10", "1000", "80"]

    rows = table_rows(table, "`frechet_distance` reaches")
    assert [cells[0] for cells in rows] == [f"{entry['target']:.4g}" for entry in result["targets"]]
    assert [cells[1:] for cells in rows] == [
        ["residual", "675", "reference", "338", "reference"],
        ["DAR", "275", "2.50 [2.00, 3.00]", "220", "1.56 [1.25, 1.88]"],
        # 30: DAR at 700 and 583, residual not by 1000. 5: DAR at 950 and 792. -90: nobody.
        ["residual", "not reached by 2 of 2", "reference", "not reached by 2 of 2", "reference"],
        ["DAR", "642", ">1.43; >1.71", "513", ">0.89; >1.07"],
        ["residual", "not reached by 2 of 2", "reference", "not reached by 2 of 2", "reference"],
        ["DAR", "871", ">1.05; >1.26", "697", ">0.66; >0.79"],
        ["residual", "not reached by 2 of 2", "reference", "not reached by 2 of 2", "reference"],
        ["DAR", "not reached by 2 of 2", "not comparable", "not reached by 2 of 2", "not comparable"],
    ]
    measured = result["targets"][1]
    assert measured["step_speedup"]["per_seed"]["1"] == {"ratio": pytest.approx(3.0), "bound": ""}
    assert measured["seconds_speedup"]["per_seed"]["0"] == {"ratio": pytest.approx(1.25), "bound": ""}
    assert result["targets"][3]["step_speedup"]["per_seed"]["0"] == {"ratio": pytest.approx(1000 / 700), "bound": ">"}
    assert result["targets"][7]["step"] == {"per_seed": {"0": None, "1": None}, "mean": None}

    # Said once, although four runs were made with four commands.
    assert result["environments"] == [{"gpu": "none", "torch": "x"}]
    assert table.count("Measured on: gpu none, torch x.") == 1
    assert "Frozen encoder: `dinov2-vit-b`." in table
    with Image.open(out.with_suffix(".png")) as image:
        image.load()
        assert min(image.size) > 100
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 10, "an empty page"


def test_command_with_default_targets_uses_the_reference_of_its_choice(study):
    runs, out = study
    convergence.main([*runs, "--out", str(out), "--reference", "DAR", "--x", "step"])
    result = strict_json(out.with_suffix(".json"))
    # What the slower seed, 100 - 0.1 step, has at the last points up to steps 250, 500, 750 and 1000.
    assert sorted({entry["target"] for entry in result["targets"]}) == pytest.approx([0, 30, 50, 80])
    assert "Speedups over **DAR**" in out.with_suffix(".md").read_text()
    assert row(result, "residual")["step_speedup"]["per_seed"]["0"]["ratio"] == pytest.approx(0.5)


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
    (panel,) = figure.axes
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("images seen", "Fréchet distance")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["residual (2 seeds)", "DAR (2 seeds)"]
    images = np.array(STEPS) * BATCH
    for drawn, band, slopes in zip(panel.lines, panel.collections, [(0.05, 0.04), (0.1, 0.12)]):
        assert drawn.get_xdata().tolist() == images.tolist()
        assert drawn.get_ydata() == pytest.approx(100 - np.mean(slopes) * np.array(STEPS))
        corners = band.get_paths()[0].vertices
        last = corners[corners[:, 0] == images[-1]][:, 1]
        assert (last.min(), last.max()) == pytest.approx((100 - 1000 * max(slopes), 100 - 1000 * min(slopes)))


def test_plot_of_three_seeds_is_their_mean(tmp_path, monkeypatch):
    slopes = 0.05, 0.06, 0.1
    runs = [write_run(tmp_path / str(seed), line(slope), seed=seed) for seed, slope in enumerate(slopes)]
    (panel,) = plotted(monkeypatch, [*map(str, runs), "--out", str(tmp_path / "plot"), "--x", "step"]).axes
    assert panel.lines[0].get_ydata() == pytest.approx(100 - sum(slopes) / 3 * np.array(STEPS))


def test_plot_has_a_panel_for_each_axis(study, monkeypatch):
    runs, out = study
    figure = plotted(monkeypatch, [runs[0], runs[2], "--out", str(out)])
    assert [panel.get_xlabel() for panel in figure.axes] == ["training steps", "seconds of training"]
    assert figure.axes[1].lines[1].get_xdata().tolist() == [0.8 * step for step in STEPS]
    assert not figure.axes[0].collections, "one seed has no band"


def test_command_on_the_loss(study):
    runs, out = study
    convergence.main([*runs, "--metric", "loss", "--out", str(out), "--x", "seconds"])
    result = strict_json(out.with_suffix(".json"))
    assert result["metric"] == "loss"
    assert row(result, "DAR")["step_speedup"]["per_seed"]["0"]["ratio"] == pytest.approx(1.0)


def test_numbers_are_valid_json_where_no_speed_was_logged(tmp_path):
    # An evaluation may come before the first line of the log.
    folder = write_run(tmp_path / "a", line(0.1), rate=None)
    convergence.main([str(folder), "--out", str(tmp_path / "plot"), "--x", "step"])
    assert strict_json(tmp_path / "plot.json")["arms"]["residual"]["seeds"] == [0]
    assert "nan" not in (tmp_path / "plot.md").read_text()


def test_two_machines_are_both_named(tmp_path):
    runs = [
        write_run(tmp_path / gpu, line(0.1), environment=[{"gpu": gpu, "command": "x", "from_step": 0}], seed=seed)
        for seed, gpu in enumerate(["H100", "A100"])
    ]
    convergence.main([*map(str, runs), "--out", str(tmp_path / "plot"), "--x", "step"])
    assert strict_json(tmp_path / "plot.json")["environments"] == [{"gpu": "A100"}, {"gpu": "H100"}]
    assert all(f"Measured on: gpu {gpu}." in (tmp_path / "plot.md").read_text() for gpu in ("A100", "H100"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--metric", "fid"], "never logged 'fid'; it has denoising_loss"),
        (["--reference", "dense"], "reference 'dense' is not among the arms: 'residual', 'DAR'"),
    ],
)
def test_command_ends_in_a_clear_error(study, changes, message):
    runs, out = study
    with pytest.raises(SystemExit) as stop:
        convergence.main([*runs, "--out", str(out), *changes])
    assert str(stop.value.code).startswith("error: ") and message in str(stop.value.code)
    assert not out.with_suffix(".json").exists()


def test_command_refuses_a_folder_that_is_no_run(study, tmp_path):
    with pytest.raises(SystemExit, match="nowhere' is not a run folder"):
        convergence.main([*study[0], str(tmp_path / "nowhere"), "--out", str(study[1])])


def test_command_without_runs_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        convergence.main(["--out", str(tmp_path / "plot")])
    assert "run" in str(stop.value.code) + capsys.readouterr().err


def test_name_of_the_output_may_have_dots(study, tmp_path):
    convergence.main([study[0][0], "--out", str(tmp_path / "lr0.1"), "--x", "step"])
    assert sorted(path.name for path in tmp_path.glob("lr0*")) == ["lr0.1.json", "lr0.1.md", "lr0.1.png"]

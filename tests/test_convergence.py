"""The convergence plot and its table, on run folders written here whose curves have known crossings."""

import dataclasses
import json

import numpy as np
import pytest
import yaml
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


def write_run(folder, points, seconds_per_step=0.5, rate=128.0, environment=(), epoch=0, **settings):
    """A run folder as the trainer leaves it: at every point a line of the log, then one of the evaluation."""
    folder.mkdir(parents=True)
    config.save(dataclasses.replace(Config(), batch_size=BATCH, **settings), folder / "config.yaml")
    lines = []
    for step, value in points:
        axes = {"step": step, "images": step * BATCH, "seconds": round(step * seconds_per_step, 3)}
        axes |= {"epoch": step * BATCH / epoch} if epoch else {}
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


@pytest.mark.parametrize("seed", range(5))
def test_crossing_of_a_monotone_curve_is_linear_interpolation(seed):
    rng = np.random.default_rng(seed)
    x, y = np.sort(rng.random(20)), np.sort(rng.random(20))[::-1]
    for target in rng.uniform(y[-1], y[0], 10):
        expected = pytest.approx(np.interp(target, y[::-1], x[::-1]), rel=1e-9)
        assert crossing(x, y, target) == crossing(x, -y, -target, "max") == (expected, "")


@pytest.mark.parametrize(
    "goal, y, expected",
    [
        # Reached before the first point, on a point, never.
        ("min", [9, 6, 3, 1], {9.5: (10, "<"), 9: (10, ""), 6: (20, ""), 1: (40, ""), 0.5: (40, ">")}),
        ("min", [9, 9, 6, 6], {9: (10, "")}),
        ("min", [9, 6, 6, 3], {6: (20, "")}),  # the beginning of a plateau
        ("min", [10, 4, 8, 2], {5: (10 + 10 * 5 / 6, ""), 3: (30 + 10 * 5 / 6, "")}),  # the first of two crossings
        (
            "max",
            [1, 5, 3, 9],
            {4: (10 + 10 * 3 / 4, ""), 5: (20, ""), 7: (30 + 10 * 4 / 6, ""), 10: (40, ">"), 0: (10, "<")},
        ),
    ],
)
def test_first_crossing(goal, y, expected):
    x, y = np.array([10.0, 20, 30, 40]), np.array(y, dtype=float)
    for target, (place, bound) in expected.items():
        assert crossing(x, y, target, goal) == (pytest.approx(place, rel=1e-12), bound)


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


def test_seeds_are_paired_and_averaged():
    # Steps to 70: 600, 750 and 500 for the reference, 300, 250 and 250 for DAR; ratios 2, 3 and 2.
    slow, fast = {0: 0.05, 1: 0.04, 2: 0.06}, {1: 0.12, 0: 0.1, 2: 0.12}
    runs = [curve(line(slope), seed=seed) for seed, slope in slow.items()]
    runs += [curve(line(slope), seed=seed, **DAR) for seed, slope in fast.items()]
    result = comparison(*runs, targets=(70,))
    cell = row(result, "DAR")["step_speedup"]
    assert result["reference"] == "residual" and ratio_text(cell) == "2.33 [2.00, 3.00]"
    assert {seed: entry["ratio"] for seed, entry in cell["per_seed"].items()} == pytest.approx({0: 2.0, 1: 3.0, 2: 2.0})
    assert row(result, "residual")["step"]["mean"] == pytest.approx(1850 / 3)  # not the median
    times = {"per_seed": pytest.approx({0: 300, 1: 250, 2: 250}), "mean": pytest.approx(800 / 3)}
    assert row(result, "DAR")["step"] == times
    assert result["arms"]["DAR"]["last"] == result["arms"]["DAR"]["best"] == pytest.approx(-40 / 3)
    reverse = row(comparison(*runs, targets=(70,), reference="DAR"), "residual")["step_speedup"]["per_seed"]
    assert reverse[0] == {"ratio": pytest.approx(0.5), "bound": ""}
    with pytest.raises(ValueError, match="'dense'.*'residual', 'DAR'"):
        comparison(*runs, reference="dense")


def test_seeds_that_never_arrive_or_that_one_arm_lacks():
    # 70: at step 600 by seed 0 of the reference; its seed 1 is at 80 when its run ends. DAR has seeds 0 and 2.
    runs = [curve(line(0.05), seed=0), curve(line(0.02), seed=1), curve(line(0.1), seed=2, **DAR)]
    result = comparison(*runs, curve(line(0.1), seed=0, **DAR), targets=(70,))
    assert row(result, "residual")["step"] == {"per_seed": {0: pytest.approx(600), 1: None}, "mean": None}
    cells = table_rows(convergence.markdown(result), "`frechet_distance` reaches")[0]
    assert cells[2] == cells[4] == "not reached by 1 of 2"
    assert set(row(result, "DAR")["step_speedup"]["per_seed"]) == {0}
    assert set(row(result, "DAR")["step"]["per_seed"]) == {0, 2}, "its own time is known all the same"
    assert ratio_text(row(comparison(*runs, targets=(70,)), "DAR")["step_speedup"]) == "no seed in common"


def test_a_metric_that_is_better_when_large():
    """Targets, times, ratios and bounds of 0.05 step and 0.1 step."""
    runs = [curve([(step, slope * step) for step in STEPS], **arm) for slope, arm in ((0.05, {}), (0.1, DAR))]
    rows = [entry for entry in comparison(*runs, goal="max")["targets"] if entry["arm"] == "DAR"]
    assert [entry["target"] for entry in rows] == pytest.approx([10, 25, 35, 50])  # of steps 200, 500, 700, 1000
    assert [entry["step"]["mean"] for entry in rows] == pytest.approx([100, 250, 350, 500])
    assert [entry["step_speedup"]["per_seed"][0] for entry in rows] == [{"ratio": pytest.approx(2), "bound": ""}] * 4


@pytest.mark.parametrize(
    "entries, text",
    [
        ([(2.0, ""), (3.0, "")], "2.50 [2.00, 3.00]"),
        ([(2.0, ""), (1.25, ">")], "2.00; >1.25"),
        ([(2.0, ""), (None, ""), (3.0, "")], "2.00; 3.00"),  # a seed where neither arrives is not averaged over
    ],
)
def test_ratio_in_the_table(entries, text):
    cell = {"per_seed": {seed: {"ratio": ratio, "bound": bound} for seed, (ratio, bound) in enumerate(entries)}}
    assert ratio_text(cell) == text


def test_summary_of_an_arm():
    """It is as long as its longest run, in whatever order they come."""
    curves = [[(100, 9.0), (200, 3.0), (300, 4.0)], [(100, 8.0), (200, 5.0)]]
    settings = dict(encoder=["tiny"], eval_encoder=["a", "b"], **REPA)
    runs = [curve(points, seed=seed, folder=f"run{seed}", **settings) for seed, points in enumerate(curves)]
    expected = dict(seeds=[0, 1], last=4.5, best=4.0, samples_per_second=128.0, last_step=300)
    expected |= dict(folders=["run0", "run1"], encoder=["tiny"], judge=["a b"])
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
        (DAR | REPA, "DAR + REPA"),
        (DAR | {"chunk_size": 2, "lr": 0.5}, "DAR, chunk_size=2, lr=0.5"),
        (DAR | {"align_depth": (2,), "proj_coeff": 1.0, "projector_dim": 8, "encoder_features": "prepared"}, "DAR"),
        (REPA | IREPA | {"projector_dim": 8}, "residual + REPA, align_steps=9, projector=conv, spatial_norm=0.6"),
        (UNET | REPA, "U-ViT skips + REPA"),
        (ATTNRES | {"chunk_size": 2, "route_backend": "torch"}, "AttnRes, chunk_size=2, route_backend=torch"),
        ({"eval_encoder": ("tiny", "hf:small")}, "residual, eval_encoder=tiny hf:small"),  # it measures the distance
    ],
)
def test_label_names_what_differs_and_is_read(settings, name):
    assert label(curve(line(0.1), **settings).config, sorted(settings)) == name
    assert label(curve(line(0.1), **settings).config, []) == name.partition(",")[0]


def test_idle_options_neither_split_nor_name_arms():
    idle = dict(chunk_size=2, query="static", align_depth=(2,))
    runs = [curve(line(0.1)), curve(line(0.1), seed=1, **idle), curve(line(0.1), **DAR)]
    arms = {name: sorted(seeds) for name, seeds in group([*runs, curve(line(0.1), chunk_size=2, **DAR)]).items()}
    assert arms == {"residual": [0, 1], **{f"DAR, chunk_size={size}, query=timestep": [0] for size in (4, 2)}}
    with pytest.raises(ValueError, match="b and a have the same settings and seed 1"):
        group([curve(line(0.1), seed=1, folder="a"), curve(line(0.1), seed=1, folder="b", max_steps=7)])


def test_a_run_from_before_an_option_had_its_default(tmp_path):
    old, new = (write_run(tmp_path / str(seed), line(0.1), seed=seed, **REPA) for seed in (0, 1))
    saved = yaml.safe_load((old / "config.yaml").read_text())
    young = {key: value for key, value in saved.items() if key not in ("projector", "mirror", "eval_encoder")}
    (old / "config.yaml").write_text(yaml.safe_dump(young))
    other = write_run(tmp_path / "other", line(0.2), **REPA, projector="conv")
    arms = group([read_run(folder, "frechet_distance") for folder in (old, new, other)])
    names = [f"residual + REPA, projector={projector}" for projector in ("mlp", "conv")]
    assert {name: sorted(seeds) for name, seeds in arms.items()} == {names[0]: [0, 1], names[1]: [0]}


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
    with open(folder / "environment.jsonl", "a") as file:
        file.write('{"from_step": 400, "gp')  # of a start that was killed
    run = read_run(folder, "frechet_distance")
    assert run.y.tolist() == [9.0, 7.0] and run.environments == machines
    axes = {"step": [100, 200], "images": [100 * BATCH, 200 * BATCH], "seconds": [25, 50]}
    assert {axis: x.tolist() for axis, x in run.x.items()} == axes
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


def test_epochs_stand_beside_the_steps_where_all_runs_know_theirs(tmp_path):
    runs = [write_run(tmp_path / "a", line(0.05), epoch=6400), write_run(tmp_path / "b", line(0.1), epoch=3200, **DAR)]
    convergence.main([*map(str, runs), "--out", str(tmp_path / "c"), "--targets", "70", "--x", "epoch"])
    rows = table_rows((tmp_path / "c.md").read_text(), "`frechet_distance` reaches")
    assert rows == [
        [
            "70",
            "residual",
            "600",
            "reference",
            "6.0",
            "reference",
            "300",
            "reference",
        ],  # 600 steps of 64 images are 6 times 6400
        ["70", "DAR", "300", "2.00", "6.0", "1.00", "150", "2.00"],
    ]
    older = write_run(tmp_path / "older", line(0.02), seed=1)
    convergence.main([*map(str, [*runs, older]), "--out", str(tmp_path / "d"), "--targets", "70"])
    assert "epoch" not in (tmp_path / "d.md").read_text()
    with pytest.raises(SystemExit, match="error: x = 'epoch': .*older is of an older version"):
        convergence.main([*map(str, [*runs, older]), "--out", str(tmp_path / "e"), "--x", "epoch"])


def plotted(monkeypatch, arguments):
    """The figure of a command, kept open."""
    import matplotlib.pyplot as plt

    with monkeypatch.context() as patch:
        patch.setattr(plt, "close", lambda figure: None)
        convergence.main(arguments)
    figure = plt.gcf()
    plt.close(figure)
    return figure


def test_plot_of_means_and_bands(study, tmp_path, monkeypatch):
    runs, out = study
    third = write_run(tmp_path / "third", line(0.1), seed=2)
    figure = plotted(monkeypatch, [*runs[:3], str(third), "--out", str(out), "--x", "images", "seconds"])
    (legend,), (panel, other) = figure.legends, figure.axes
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("images seen", "Fréchet distance")
    assert other.get_xlabel() == "seconds of training"
    assert [text.get_text() for text in legend.get_texts()] == ["residual (3 seeds)", "DAR"]
    images, slopes = np.array(STEPS) * BATCH, (0.05, 0.04, 0.1)
    mean, single = panel.lines
    (band,) = panel.collections  # one seed has none
    assert mean.get_xdata().tolist() == single.get_xdata().tolist() == images.tolist()
    assert mean.get_ydata() == pytest.approx(100 - sum(slopes) / 3 * np.array(STEPS))
    corners = band.get_paths()[0].vertices
    last = corners[corners[:, 0] == images[-1]][:, 1]
    assert (last.min(), last.max()) == pytest.approx((100 - 1000 * max(slopes), 100 - 1000 * min(slopes)))
    assert other.lines[1].get_xdata().tolist() == [0.8 * step for step in STEPS]


def test_machines_are_all_named_and_numbers_are_valid_json_without_a_speed(tmp_path):
    """An evaluation may come before the first line of the log. The name of the output may have dots."""
    runs = [
        write_run(tmp_path / gpu, line(0.1), rate=None, environment=[{"from_step": 0, "gpu": gpu}], seed=seed)
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
        (None, "no run folders were given"),
    ],
)
def test_command_ends_in_a_clear_error(study, changes, message):
    runs, out = study
    with pytest.raises(SystemExit) as stop:
        convergence.main(["--out", str(out), *([*runs, *changes] if changes else [])])
    assert str(stop.value.code).startswith("error: ") and message in str(stop.value.code)
    assert not out.with_suffix(".json").exists()

"""The sweep: which cells it makes, what its heat map says, and whole sweeps on digits that fail, stop and go on."""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import config
import sweep
import train_repa_dar
from analysis import heatmap
from runtime import load_file, lock_folder
from tests.conftest import ROOT, read_lines
from tests.test_trainer import wait_for

STEPS = 60


@pytest.fixture
def arguments(small_data, encoder_folder):
    """The command line of a sweep of tiny models."""

    def build(out, *extra, steps=STEPS):
        values = {
            "data": small_data,
            "encoder": encoder_folder,
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "projector_dim": 32,
            "lr": 1e-3,
            "batch_size": 8,
            "max_steps": steps,
            "ema_decays": 0.5,
            "log_every": 2,
            "checkpoint_every": 1000,
            "eval_every": steps // 3,
            "eval_samples": 6,
            "eval_batch_size": 4,
            "sample_steps": 2,
            "tensorboard": False,
        }
        words = {f"--{key.replace('_', '-')}": str(value) for key, value in values.items()}
        kept = [word for option in words if option not in extra for word in (option, words[option])]
        return ["--out", str(out), *kept, *map(str, extra)]

    return build


@pytest.fixture
def cells(arguments, tmp_path):
    """The cells of a command line, before anything is run."""

    def build(*extra, out=tmp_path / "sweep"):
        options, words = sweep.tyro.cli(sweep.Options, args=arguments(out, *extra), return_unknown_args=True)
        return sweep.make_cells(options, words)

    return build


GRID = ("--routing", "dar", "--alignment", "repa", "--align-depth", 1, 2, "--chunk-size", 1, 4)


def names(made):
    return [cell.name for cell in made]


# ---- which cells ----


def test_every_combination_is_a_cell_and_one_seed_comes_before_the_next(cells):
    made = cells(*GRID, "--seeds", 0, 7)
    assert names(made) == [
        f"align_depth={k},chunk_size={s},seed={seed}" for seed in (0, 7) for k in (1, 2) for s in (1, 4)
    ]
    for cell in made:
        values = dict(part.split("=") for part in cell.name.split(","))
        assert (cell.config.align_depth, cell.config.chunk_size, cell.config.seed) == (
            (int(values["align_depth"]),),
            int(values["chunk_size"]),
            int(values["seed"]),
        )
        # What is run is the user's own command: the trainer reads the same from it.
        parsed = config.parse(cell.words)
        assert parsed == dataclasses.replace(cell.config, out=str(cell.folder))


def test_options_that_nothing_reads_make_no_cells(cells):
    """Residual routing has no chunks, and without alignment there is no depth: each combination once."""
    made = cells(
        "--routing",
        "residual",
        "dar",
        "--alignment",
        "none",
        "repa",
        "--chunk-size",
        1,
        4,
        "--query",
        "static",
        "dynamic",
        "--align-depth",
        1,
        2,
        "--seeds",
        0,
        1,
    )
    expected = set()
    for seed in (0, 1):
        expected.add(("residual", "none", seed))
        expected |= {("residual", "repa", k, seed) for k in (1, 2)}
        expected |= {("dar", "none", s, q, seed) for s in (1, 4) for q in ("static", "dynamic")}
        expected |= {("dar", "repa", s, q, k, seed) for s in (1, 4) for q in ("static", "dynamic") for k in (1, 2)}
    assert len(made) == len(set(names(made))) == len(expected)
    residual = [cell for cell in made if cell.config.routing == "residual"]
    assert all("chunk_size" not in cell.name and "query" not in cell.name for cell in residual)
    # What is not read stays the preset's, whichever values the rest of the sweep has.
    assert {(cell.config.chunk_size, cell.config.query) for cell in residual} == {(4, "timestep")}
    # And whether the sweep has one of them or several, so that another may be added later.
    one, several = (cells("--routing", "residual", "dar", "--chunk-size", *sizes) for sizes in ([2], [2, 4]))
    assert one[0] == several[0] and one[0].config.chunk_size == 4 and one[1].config.chunk_size == 2


OF_DAR, OF_REPA = ("routing", "residual"), ("alignment", "none")


@pytest.mark.parametrize(
    "option, switches",
    [
        ("query", [OF_DAR, ("routing", "attnres"), ("routing", "unet")]),
        ("chunk_size", [OF_DAR, ("routing", "unet")]),
        ("final_aggregator", [OF_DAR, ("routing", "attnres"), ("routing", "unet")]),
        ("route_backend", [OF_DAR, ("routing", "unet")]),
        ("align_depth", [OF_REPA]),
        ("proj_coeff", [OF_REPA]),
        ("projector", [OF_REPA]),
        ("projector_dim", [OF_REPA, ("projector", "conv")]),
        ("encoder_features", [OF_REPA]),
        ("spatial_norm", [OF_REPA]),
        ("align_steps", [OF_REPA]),
        *(
            (option, [("eval_every", 0)])
            for option in ("eval_metric", "eval_samples", "eval_batch_size", "sampler", "sample_steps", "cfg_scale")
        ),
        ("guidance_interval", [("eval_every", 0), ("cfg_scale", 1.0)]),
        *((option, [("eval_every", 0), ("eval_metric", "encoder")]) for option in ("inception", "fid_reference")),
        ("diagnose_images", [("diagnose_every", 0)]),
    ],
)
def test_what_is_idle(option, switches):
    on = {
        "routing": "dar",
        "alignment": "repa",
        "eval_every": 1,
        "eval_metric": "fid",
        "diagnose_every": 1,
        "cfg_scale": 1.5,
    }
    assert config.idle(on) == set() and option in {field.name for field in dataclasses.fields(config.Config)}
    off = [
        (switch, value)
        for switch, value in {
            OF_DAR,
            OF_REPA,
            ("routing", "attnres"),
            ("routing", "unet"),
            ("projector", "conv"),
            ("eval_metric", "encoder"),
            ("eval_every", 0),
            ("diagnose_every", 0),
            ("cfg_scale", 1.0),
        }
        if option in config.idle({**on, switch: value})
    ]
    assert sorted(off) == sorted(switches)


def test_no_other_option_is_ever_idle():
    """With everything off: an option that is wrongly among these would make one cell, or arm, of two that differ."""
    off = {
        "routing": "residual",
        "alignment": "none",
        "projector": "conv",
        "eval_every": 0,
        "eval_metric": "encoder",
        "diagnose_every": 0,
    }
    assert config.idle(off) == {
        "query",
        "final_aggregator",
        "chunk_size",
        "route_backend",
        "align_depth",
        "proj_coeff",
        "spatial_norm",
        "align_steps",
        "projector",
        "projector_dim",
        "encoder_features",
        "eval_metric",
        "eval_samples",
        "eval_batch_size",
        "sampler",
        "sample_steps",
        "cfg_scale",
        "guidance_interval",
        "inception",
        "fid_reference",
        "diagnose_images",
    }


def test_commas_join_the_values_of_one_cell(cells):
    made = cells(
        "--routing", "dar", "--alignment", "repa", "--align-depth", 1, "1,2", "--betas", "0.9,0.99", "0.8,0.95"
    )
    assert [(cell.config.align_depth, cell.config.betas) for cell in made] == [
        ((1,), (0.9, 0.99)),
        ((1,), (0.8, 0.95)),
        ((1, 2), (0.9, 0.99)),
        ((1, 2), (0.8, 0.95)),
    ]
    assert names(made)[2] == "align_depth=1+2,chunk_size=4,betas=0.9+0.99,seed=0"


def test_the_same_value_twice_is_one_cell(cells):
    assert len(cells("--lr", "1e-3", "0.001", "1e-03", "--seeds", 0, 0)) == 1


@pytest.mark.parametrize(
    "values",
    [
        [{"model": "SiT-S/2"}, {"model": "SiT-S-2"}, {"model": "SiT-S:2"}],
        [{"encoder": ("a+b",)}, {"encoder": ("a", "b")}],
        [{"encoder": ("a+b", "c")}, {"encoder": ("a", "b+c")}],
        [{"data": "a,seed=1"}, {"data": "a", "seed": 1}],
        [{"encoder": ("x" * 300 + end,)} for end in "ab"],
        [{"data": "café"}, {"data": "cafè"}],
        [{"data": ".."}, {"data": "."}],
    ],
)
def test_names_differ_where_settings_do(values):
    made = [sweep.cell_name(settings) for settings in values]
    assert len(set(made)) == len(values)
    for name in made:
        assert re.fullmatch(r"[A-Za-z0-9_.,=+-]{1,200}", name)  # any file system, and no %j of submitit or Slurm


@pytest.mark.parametrize(
    "extra, message",
    [
        (("--chunk-sizes", 1, 2), "unknown option --chunk-sizes.*'chunk_size'"),
        (("--chunk-size", 1, 0), "chunk_size = 0: must be at least 1"),
        (("--chunk-size", 1, 5, "--routing", "dar"), "chunk_size = 5 is not between 1 and the 4 sublayers"),
        (("--align-depth", 1, 3, "--alignment", "repa"), "align_depth = 3: the model has only 2 blocks"),
        (("--model", "SiT-S/2", "SiT-M/2"), "'SiT-M/2' is unknown"),
        (("--lr", 1, "--lr", 2), "--lr is given twice"),
        (("--eval-every", 0), "'frechet_distance' is only logged with eval_every above 0"),
        (("--metric", "fid"), "metric = 'fid' is only logged with --eval-metric fid"),
        (("--metric", "fid_5000", "--eval-metric", "fid", "--eval-every", 0), "'fid_5000' .* eval_every above 0"),
        (("--config", "nothing"), "'nothing' is neither a preset"),
        (("--jobs", 0), "jobs = 0"),
        (("--gpus-per-run", 3), "batch_size = 8 cannot be shared evenly.* 3"),
        (("--slurm", "partition=gpu"), "only read with --cluster slurm"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(arguments, tmp_path, extra, message):
    with pytest.raises(SystemExit, match=f"(?s)error: .*{message}"):
        sweep.main(arguments(tmp_path / "sweep", *extra))
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "extra, shown",
    [
        (("--chunk-size", 1, "many"), "many"),
        (("--cluster", "cloud"), "cloud"),
        (("--routing", "dar", "sum"), "sum"),
        (("--betas", 0.9, 0.999), "commas join a list"),
    ],
)
def test_values_that_cannot_be_read_name_themselves(arguments, tmp_path, capsys, extra, shown):
    with pytest.raises(SystemExit) as stop:
        sweep.main(arguments(tmp_path / "sweep", *extra))
    assert stop.value.code == 2 and shown in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_missing_data_are_refused(arguments, tmp_path):
    # Of 16 cells, not one should have to be started to find that out.
    words = arguments(tmp_path / "sweep", *GRID)
    words[words.index("--data") + 1] = str(tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="nowhere.*is not a prepared folder"):
        sweep.main(words)


# ---- where they run ----


def options(**changes):
    return dataclasses.replace(sweep.Options(out="somewhere"), **changes)


@pytest.mark.parametrize(
    "gpus, visible, changes, expected",
    [
        (4, None, {}, ["0", "1", "2", "3"]),
        (4, None, {"gpus_per_run": 2}, ["0,1", "2,3"]),
        (5, None, {"gpus_per_run": 2}, ["0,1", "2,3"]),
        (4, None, {"jobs": 3}, ["0", "1", "2"]),
        (3, "4,6,7", {}, ["4", "6", "7"]),
        (2, "GPU-a,GPU-b", {"gpus_per_run": 2}, ["GPU-a,GPU-b"]),
    ],
)
def test_gpus_are_shared_out(monkeypatch, gpus, visible, changes, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    places = sweep.free_places(options(**changes), 100)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == expected
    assert len(sweep.free_places(options(**changes), 1)) == 1


@pytest.mark.parametrize(
    "changes, need", [({"jobs": 5}, 5), ({"gpus_per_run": 8}, 8), ({"jobs": 3, "gpus_per_run": 2}, 6)]
)
def test_more_gpus_than_there_are(monkeypatch, changes, need):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=f"need {need} GPUs; this machine has 4"):
        sweep.free_places(options(**changes), 100)


@pytest.mark.parametrize(
    "changes, count, threads",
    [({}, 1, 12), ({"jobs": 3}, 3, 4), ({"jobs": 3, "gpus_per_run": 2}, 3, 2), ({"jobs": 20}, 20, 1)],
)
def test_cores_are_shared_out(monkeypatch, changes, count, threads):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert sweep.free_places(options(**changes), 100) == [{"OMP_NUM_THREADS": str(threads)}] * count


@pytest.mark.parametrize(
    "slurm, message",
    [
        ((), "--slurm time=: give the limit"),
        (("time=24:00:00",), "whole minutes"),
        (("time=60", "colour=red"), "colour"),
    ],
)
def test_wrong_slurm_options_are_refused(arguments, tmp_path, fake_slurm, slurm, message):
    with pytest.raises(SystemExit, match=f"(?s)error: .*{message}"):
        sweep.main(arguments(tmp_path / "sweep", "--cluster", "slurm", *(["--slurm", *slurm] if slurm else [])))
    assert not (tmp_path / "sweep").exists()


def test_slurm_is_missing(arguments, tmp_path):
    with pytest.raises(SystemExit, match="error: .*srun"):
        sweep.main(arguments(tmp_path / "sweep", "--cluster", "slurm", "--slurm", "time=5"))
    assert not (tmp_path / "sweep").exists()


# ---- the heat map ----


def made_cell(folder, points, settings, state="done", max_steps=100, reason="", **others):
    """A cell as the sweep leaves it. points: [(step, distance)]."""
    name = ",".join(f"{key}={value}" for key, value in settings.items())
    values = {
        "align_depth": (4,),
        "chunk_size": 4,
        "routing": "dar",
        "alignment": "repa",
        "model": "SiT-B/2",
        **others,
        **settings,
    }
    full = dataclasses.replace(config.Config(), max_steps=max_steps, **values)
    (folder / name).mkdir(parents=True)
    config.save(full, folder / name / "config.yaml")
    lines = [{"step": step, "images": step, "seconds": step / 2, "frechet_distance": y} for step, y in points]
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return types.SimpleNamespace(
        name=name, folder=folder / name, config=full, settings=settings, state=state, reason=reason
    )


def place(depth, chunk, seed):
    return {"align_depth": (depth,), "chunk_size": chunk, "seed": seed}


def random_curve(rng, last=100):
    steps = np.arange(last // 5, last + 1, last // 5)
    return [(int(step), float(y)) for step, y in zip(steps, 30 * np.exp(-steps / 60) * rng.uniform(0.7, 1.3, 5))]


def first_crossing(points, target):
    """(steps, bound) from the definition: on the line between the first point at the target and the one before."""
    for (a, ya), (b, yb) in zip([(None, None), *points], points):
        if yb <= target:
            return (b, "<" if yb < target else "") if a is None else (a + (b - a) * (ya - target) / (ya - yb), "")
    return points[-1][0], ">"


@pytest.mark.parametrize("seed", range(3))
def test_heat_map_of_random_runs(tmp_path, seed):
    """Every entry of JSON, Markdown and picture against means taken here from the points that were written."""
    rng = np.random.default_rng(seed)
    depths, chunks, seeds = [2, 3, 7], [1, 2, 4, 8, 16], [0, 5]
    written = {(k, s, i): random_curve(rng) for k in depths for s in chunks for i in seeds}
    made = [made_cell(tmp_path, points, place(*key)) for key, points in written.items()]
    rng.shuffle(made)
    heatmap.write_result(made, tmp_path, "frechet_distance")
    result = json.loads((tmp_path / "sweep.json").read_text())
    target = max(min(y for _, y in points) for points in written.values())
    assert result["target"] == target
    (grid,) = result["maps"]
    assert grid["align_depth"] == [[k] for k in depths] and grid["chunk_size"] == chunks
    tables = markdown_tables((tmp_path / "sweep.md").read_text())
    for row, k in enumerate(depths):
        for column, s in enumerate(chunks):
            last = [written[k, s, i][-1][1] for i in seeds]
            entry = grid["metric"][row][column]
            assert entry["mean"] == pytest.approx(sum(last) / 2)
            assert (entry["lowest"], entry["highest"]) == (min(last), max(last))
            assert tables[0][row][1 + column] == f"{sum(last) / 2:.4g} [{min(last):.4g}, {max(last):.4g}]"
            times = [first_crossing(written[k, s, i], target) for i in seeds]
            entry = grid["steps_to_target"][row][column]
            assert {i: (v["value"], v["bound"]) for i, v in entry["per_seed"].items()} == {
                str(i): (pytest.approx(t), bound) for i, (t, bound) in zip(seeds, times)
            }
            if any(bound for _, bound in times):
                assert entry["mean"] is None and tables[1][row][1 + column].count(",") == 1
            else:
                assert entry["mean"] == pytest.approx(sum(t for t, _ in times) / 2)
    for cell in result["cells"]:
        points = written[cell["settings"]["align_depth"][0], cell["settings"]["chunk_size"], cell["settings"]["seed"]]
        assert (cell["last"], cell["best"]) == (points[-1][1], min(y for _, y in points))
    with Image.open(tmp_path / "sweep.png") as picture:
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 30


def markdown_tables(text):
    """The body rows of each table, as lists of cells."""
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        tables.append([[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]])
    return tables


def test_what_is_never_reached_is_no_number(tmp_path):
    falling = [(50, 9.0), (100, 3.0)]
    flat = [(50, 9.0), (100, 8.0)]
    early = [(50, 2.0), (100, 1.0)]
    made = [
        made_cell(tmp_path, points, place(2, chunk, seed))
        for chunk, pair in {1: (falling, falling), 2: (falling, flat), 4: (flat, flat), 8: (early, falling)}.items()
        for seed, points in enumerate(pair)
    ]
    heatmap.write_result(made, tmp_path, "frechet_distance", target=6.0)
    row = markdown_tables((tmp_path / "sweep.md").read_text())[1][0]
    assert row == ["2", "75 [75, 75]", "75, >100", ">100, >100", "<50, 75"]
    entries = json.loads((tmp_path / "sweep.json").read_text())["maps"][0]["steps_to_target"][0]
    assert [entry["mean"] for entry in entries] == [75, None, None, None]


def test_cells_that_are_not_complete_are_missing_with_their_reason(tmp_path):
    """Also one whose run has diverged. None of them counts for the default target or a mean."""
    curve = [(50, 9.0), (100, 3.0)]
    made = [
        made_cell(tmp_path, curve, place(2, 1, 0)),
        made_cell(tmp_path, curve, place(2, 1, 1), "failed", reason="exit status 9"),
        made_cell(tmp_path, [(50, 70.0)], place(2, 2, 0), "stopped"),
        made_cell(tmp_path, [(50, 9.0), (100, math.nan)], place(6, 1, 0)),
        made_cell(tmp_path, curve, place(6, 2, 0), "waiting"),
    ]
    text = heatmap.write_result(made, tmp_path, "frechet_distance")
    assert [row[1:] for row in markdown_tables(text)[0]] == [["3, failed", "stopped"], ["done", "waiting"]]
    assert "align_depth=(2,),chunk_size=1,seed=1: failed exit status 9" in text
    assert "align_depth=(6,),chunk_size=1,seed=0: done frechet_distance is not a finite number" in text
    result = json.loads((tmp_path / "sweep.json").read_text(), parse_constant=pytest.fail)
    assert result["target"] == 3.0 and result["maps"][0]["metric"][0][0]["mean"] is None
    assert result["maps"][0]["metric"][0][0]["missing"] == {"1": "failed exit status 9"}


def test_nothing_complete_still_gives_a_result(tmp_path):
    made = [made_cell(tmp_path, [], place(2, 1, 0), "failed", reason="exit status 1")]
    assert "failed" in heatmap.write_result(made, tmp_path, "frechet_distance")
    assert (tmp_path / "sweep.png").is_file()


def test_a_run_that_went_further_is_read_up_to_max_steps(tmp_path):
    made = [made_cell(tmp_path, [(50, 9.0), (100, 3.0), (150, 1.0)], place(2, 1, 0))]
    heatmap.write_result(made, tmp_path, "frechet_distance")
    (cell,) = json.loads((tmp_path / "sweep.json").read_text())["cells"]
    assert (cell["last"], cell["last_step"], cell["best"]) == (3.0, 100, 3.0)


@pytest.mark.parametrize("goal, target, steps", [("min", 4.0, [90, 50]), ("max", 8.0, [50, 90])])
def test_the_default_target_is_reached_by_every_run(tmp_path, goal, target, steps):
    curves = {1: [(50, 8.0), (100, 3.0)], 2: [(50, 4.0), (100, 9.0)]}
    made = [made_cell(tmp_path, points, place(2, chunk, 0)) for chunk, points in curves.items()]
    result = heatmap.summarise(made, "frechet_distance", goal)
    assert result["target"] == target
    assert [cell["bound"] for cell in result["cells"]] == ["", ""]  # one is there at its first point, exactly
    assert [cell["steps_to_target"] for cell in result["cells"]] == pytest.approx(steps)


def test_bounds_where_large_is_better(tmp_path):
    curves = {1: [(50, 2.0), (100, 4.0)], 2: [(50, 7.0), (100, 9.0)], 4: [(50, 2.0), (100, 10.0)]}
    made = [made_cell(tmp_path, points, place(2, chunk, 0)) for chunk, points in curves.items()]
    text = heatmap.write_result(made, tmp_path, "frechet_distance", "max", 6.0)
    assert markdown_tables(text)[1] == [["2", ">100", "<50", "75"]]


def test_three_seeds_have_their_mean_and_not_their_median(tmp_path):
    made = [made_cell(tmp_path, [(100, last)], place(2, 1, seed)) for seed, last in enumerate([1.0, 1.0, 4.0])]
    text = heatmap.write_result(made, tmp_path, "frechet_distance", target=5.0)
    assert markdown_tables(text)[0] == [["2", "2 [1, 4]"]]


def test_one_map_for_each_combination_of_the_other_settings(tmp_path):
    """A residual baseline has no chunks: its map is one column."""
    made = [
        made_cell(tmp_path, [(100, 10 * k + s)], {**place(k, s, 0), "query": query})
        for query in ("static", "dynamic")
        for k in (2, 4)
        for s in (1, 4)
    ]
    made += [
        made_cell(tmp_path, [(100, 50 + k)], {"align_depth": (k,), "routing": "residual", "seed": 0}) for k in (2, 4)
    ]
    text = heatmap.write_result(made, tmp_path, "frechet_distance", target=1)
    maps = json.loads((tmp_path / "sweep.json").read_text())["maps"]
    assert [grid["settings"] for grid in maps] == [{"query": "static"}, {"query": "dynamic"}, {"routing": "residual"}]
    assert [[entry["mean"] for entry in row] for row in maps[1]["metric"]] == [[21, 24], [41, 44]]
    assert [[entry["mean"] for entry in row] for row in maps[2]["metric"]] == [[52], [54]] and "no chunks" in text


@pytest.mark.parametrize(
    "model, depth, marked, low, high",
    [
        ("SiT-S/2", None, 4, 2.449, 3.207),
        ("SiT-B/2", None, 4, 2.449, 3.207),
        ("SiT-L/2", None, 8, 3.464, 4.536),
        ("SiT-XL/2", None, 8, 3.742, 4.899),
        ("SiT-XL/2", 50, 8, 5.0, 6.547),
        ("SiT-Plus/2", None, 8, 3.742, 4.899),
    ],
)
def test_the_marks(tmp_path, model, depth, marked, low, high):
    """Prop. 1, sqrt(L (1 - a) / (1 + a)) for a = 0.6 and 0.4 with L = 2 x depth, worked out by hand; REPA's depths."""
    made = [
        made_cell(tmp_path, [(100, 1.0)], place(k, s, 0), model=model, depth=depth) for k in (4, 8) for s in (1, 4, 8)
    ]
    text = heatmap.write_result(made, tmp_path, "frechet_distance")
    (grid,) = json.loads((tmp_path / "sweep.json").read_text())["maps"]
    assert grid["optimal_chunk_size"] == pytest.approx([low, high], abs=1e-3) and grid["repa_depth"] == marked
    assert f"| {marked} (REPA) |" in text and text.count("(REPA)") == 2
    assert ("chunk size 4 (S*)" in text) == (low <= 4 <= high) and "chunk size 8 (S*)" not in text
    assert (
        f"S* of Prop. 1 for {2 * (depth or blocks_of(model))} sublayers is {low:.1f} at alpha = 0.6 and "
        f"{high:.1f} at alpha = 0.4. REPA aligns {model}, of {blocks_of(model)} blocks, after block "
        f"{marked}."
    ) in text


def test_several_depths_are_not_the_one_of_repa(tmp_path):
    made = [
        made_cell(tmp_path, [(100, 1.0)], {"align_depth": depths, "chunk_size": 1, "seed": 0})
        for depths in ((4,), (4, 8))
    ]
    rows = markdown_tables(heatmap.write_result(made, tmp_path, "frechet_distance"))[0]
    assert [row[0] for row in rows] == ["4 (REPA)", "4 8"]


def blocks_of(model):
    return {"S": 12, "B": 12, "L": 24, "XL": 28, "Plus": 28}[model[4:-2]]


def test_the_picture_shows_the_values_and_the_marks(tmp_path):
    """The drawn arrays are the means, and the band of S* lies between the columns of 2 and 4, even in log2."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = [made_cell(tmp_path, [(100, float(k * s))], place(k, s, 0)) for k in (2, 4) for s in (1, 2, 4)]
    grid = heatmap.summarise(made, "frechet_distance", target=6)["maps"][0]
    figure, panel = plt.subplots()
    values = np.array([[2.0, 4, 8], [4, 8, 16]])
    heatmap.draw_map(panel, grid, grid["metric"], values, plt.get_cmap("viridis"), {})
    assert [text.get_text() for text in panel.texts[:6]] == ["2", "4", "8", "4", "8", "16"]
    assert np.array_equal(panel.images[0].get_array(), values) and panel.images[0].origin == "lower"
    positions = [text.get_position() for text in panel.texts[:6]]
    assert positions == [(column, row) for row in (0, 1) for column in (0, 1, 2)]
    band, row = panel.patches
    left, right = np.log2(math.sqrt(24 * 0.4 / 1.6)), np.log2(math.sqrt(24 * 0.6 / 1.4))
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((left, right))
    assert row.get_y() < 1 < row.get_y() + row.get_height() and row.get_y() > 0.5
    plt.close(figure)


@pytest.mark.parametrize(
    "value, text",
    [
        (0.123456, "0.1235"),
        (31.0, "31"),
        (9998.4, "9998"),
        (12345.6, "12346"),
        (400_000.4, "400000"),
        (-12345.6, "-12346"),
    ],
)
def test_numbers_have_four_digits_and_steps_all_of_theirs(value, text):
    assert heatmap.number(value) == text


@pytest.mark.parametrize("goal, colours", [("min", "viridis"), ("max", "viridis_r")])
def test_the_picture_is_of_means_in_one_scale_and_dark_is_good(tmp_path, monkeypatch, goal, colours):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    sign = 1 if goal == "min" else -1
    made = [
        made_cell(
            tmp_path, [(50, 60.0 * sign), (100, sign * (size * s + 3.0 * seed))], {**place(2, s, seed), "query": query}
        )
        for query, size in (("static", 1), ("dynamic", 4))
        for s in (1, 2)
        for seed in (0, 1)
    ]
    heatmap.write_result(made, tmp_path, "frechet_distance", goal, 30.0 * sign)
    figure = plt.gcf()
    images = [image for panel in figure.axes for image in panel.images]
    monkeypatch.undo()
    plt.close(figure)
    lasts = [np.array([[size * s + 1.5 for s in (1, 2)]]) * sign for size in (1, 4)]
    steps = [
        np.array([[np.mean([50 + 50 * 30 / (60 - size * s - 3 * seed) for seed in (0, 1)]) for s in (1, 2)]])
        for size in (1, 4)
    ]
    for (above, below), expected, name in ((images[::2], lasts, colours), (images[1::2], steps, "viridis")):
        for image, values in ((above, expected[0]), (below, expected[1])):
            np.testing.assert_allclose(image.get_array(), values)
            assert image.get_clim() == pytest.approx((np.min(expected), np.max(expected)))
            assert image.get_cmap().name == name


# ---- what is there already ----


def test_dry_run_writes_nothing_and_counts_steps(arguments, tmp_path, capsys):
    out = tmp_path / "sweep"
    sweep.main(arguments(out, *GRID, "--seeds", 0, 1, "--dry-run"))
    printed = capsys.readouterr().out
    assert f"8 cells, 0 complete; {8 * STEPS} steps to go; 1 at a time" in printed
    assert "time: unknown" in printed and not out.exists()
    command = shlex.split(printed.partition("the first: ")[2])
    assert command[:2] == ["python", "train_repa_dar.py"]
    assert config.parse(command[2:]).out == str(out / "align_depth=1,chunk_size=1,seed=0")


def test_dry_run_estimates_from_what_was_logged(cells, tmp_path, capsys, arguments):
    """8 images a step at 2 images a second: 4 s a step; evaluations after steps 20, 40 and 60 take 5 s each."""
    first, second = cells("--seeds", 0, 1)
    first.folder.mkdir(parents=True)
    (first.folder / "metrics.jsonl").write_text(
        json.dumps({"step": 20, "samples_per_second": 2.0})
        + "\n"
        + json.dumps({"step": 20, "frechet_distance": 3.0, "evaluation_seconds": 5.0})
        + '\n{"step": 2'
    )
    before = sorted(tmp_path.rglob("*"))
    sweep.main(arguments(tmp_path / "sweep", "--seeds", 0, 1, "--jobs", 2, "--dry-run"))
    printed = capsys.readouterr().out
    assert f"{STEPS - 20 + STEPS} steps to go; 2 at a time" in printed
    one, two = 40 * 4 + 2 * 5, 60 * 4 + 3 * 5
    assert (round((one + two) / 2 / 60), round((one + two) / 60)) == (4, 7)
    assert "time: about 4 min (7 min one after the other), by the speed that 1 of the cells logged last" in printed
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "every, step, evaluations",
    [(20, 0, 4), (20, 39, 3), (20, 40, 2), (20, 61, 1), (20, 70, 0), (35, 0, 2), (0, 0, 0), (100, 0, 1)],
)
def test_time_left_counts_the_evaluations_that_are_left(every, step, evaluations):
    """Of 70 steps; the last one is always followed by an evaluation."""
    settings = dataclasses.replace(config.Config(), max_steps=70, eval_every=every, batch_size=6)
    pace = {"samples_per_second": 3.0, "evaluation_seconds": 1000.5}
    assert sweep.seconds_left(settings, {"step": step}, pace) == (70 - step) * 2 + evaluations * 1000.5
    assert sweep.seconds_left(settings, {"step": step}, {}) is None


@pytest.mark.parametrize(
    "seconds, text",
    [(12.4, "12 s"), (100, "2 min"), (3600, "1 h 00 min"), (90061, "25 h 01 min"), (400_000, "4.6 days")],
)
def test_durations(seconds, text):
    assert sweep.duration(seconds) == text


def test_only_a_run_with_these_settings_at_its_end_is_complete(cells):
    (cell,) = cells("--diagnose-every", 20)
    checkpoint = {
        "config": {**dataclasses.asdict(cell.config), "content of data": "x"},
        "step": STEPS,
        "log_lines": 3,
        "evaluation_due": False,
        "model": {"weight": torch.zeros(3)},
    }
    cell.folder.mkdir(parents=True)
    assert not sweep.complete(cell)
    for change, expected in (
        ({}, True),
        ({"step": STEPS + 5}, True),
        ({"step": STEPS - 1}, False),
        ({"evaluation_due": True}, False),
        ({"diagnosis_due": True}, False),
        ({"diagnosis_due": False}, True),
        ({"config": {**checkpoint["config"], "lr": 7.0}}, False),
        ({"config": {**checkpoint["config"], "num_workers": 7}}, True),
    ):
        torch.save({**checkpoint, **change}, cell.folder / "last.pt")
        assert sweep.complete(cell) == expected, change
    torch.save({**checkpoint, "diagnosis_due": True}, cell.folder / "last.pt")  # which is no longer wanted
    assert sweep.complete(dataclasses.replace(cell, config=dataclasses.replace(cell.config, diagnose_every=0)))
    for content in ([1], {"ema": {}}):
        torch.save(content, cell.folder / "last.pt")
        assert not sweep.complete(cell)
    (cell.folder / "last.pt").write_bytes(b"cut")
    assert not sweep.complete(cell)


def test_one_sweep_in_a_folder_at_a_time(arguments, tmp_path):
    with lock_folder(tmp_path / "sweep"), pytest.raises(SystemExit, match="in use by another"):
        sweep.main(arguments(tmp_path / "sweep"))


def test_earlier_jobs_make_no_further_places(cells, tmp_path, monkeypatch):
    """Three of five still run from a command without --jobs; from now on it is to be one at a time."""
    made, running, most = cells("--seeds", 0, 1, 2, 3, 4), set(), []

    class Job:
        state, looks = "RUNNING", 0

        def done(self, force_check=False):
            self.looks += 1
            return self.looks > 2

    def start(cell, options):
        cell.job = Job()
        running.add(cell.name)
        most.append(len(running))

    def finish(cell, stop):
        cell.job, cell.state = None, "done"
        running.discard(cell.name)

    monkeypatch.setattr(sweep, "earlier_job", lambda cell, options: Job() if cell.config.seed < 3 else None)
    for name, stand_in in (("start", start), ("finish", finish), ("write_result", lambda *anything: None)):
        monkeypatch.setattr(sweep, name, stand_in)
    monkeypatch.setitem(sweep.POLL, "local", 0)
    sweep.run_all(made, options(), [{}], types.SimpleNamespace(signal=0))
    assert most == [1, 1] and {cell.state for cell in made} == {"done"}


def test_a_run_that_goes_on_elsewhere_is_seen(tmp_path):
    assert not sweep.in_use(tmp_path / "run") and not (tmp_path / "run").exists()
    with lock_folder(tmp_path / "run"):
        assert sweep.in_use(tmp_path / "run")
    assert not sweep.in_use(tmp_path / "run")


# ---- whole sweeps ----


def start_sweep(words):
    """As a shell starts it: with a process group of its own, to which a terminal's Ctrl-C goes."""
    return subprocess.Popen(
        [sys.executable, "sweep.py", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def without_times(folder):
    return [
        {key: value for key, value in line.items() if "second" not in key}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def test_a_sweep_fails_in_one_cell_is_interrupted_and_goes_on(arguments, tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    command = arguments(out, *GRID, "--jobs", 2, steps=300)
    foreign, first = out / "align_depth=1,chunk_size=4,seed=0", out / "align_depth=1,chunk_size=1,seed=0"
    foreign.mkdir(parents=True)
    config.save(dataclasses.replace(config.Config(), lr=0.7), foreign / "config.yaml")

    process = start_sweep(command)
    wait_for(lambda: len(read_lines(first / "metrics.jsonl")) > 3)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on" in printed
    stopped_at = load_file(first / "last.pt")["step"]
    assert 8 <= stopped_at < 300  # saved, although no checkpoint was due

    process = start_sweep(command)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "1 of 4 cells are not complete" in errors and f"{foreign.name}: exit status 1" in errors
    assert f"{foreign.name} failed: exit status 1" in printed and "lr: 0.7 -> 0.001" in printed  # the end of its log
    assert "frechet_distance" in printed and f"{first.name}  done" in printed

    whole = tmp_path / "whole"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train_repa_dar.main(
        [
            *config_words(command),
            "--routing",
            "dar",
            "--alignment",
            "repa",
            "--align-depth",
            "1",
            "--chunk-size",
            "1",
            "--out",
            str(whole),
        ]
    )
    assert without_times(first) == without_times(whole)
    assert [line["from_step"] for line in read_lines(first / "environment.jsonl")] == [0, stopped_at]

    result = json.loads((out / "sweep.json").read_text())
    assert_agrees_with_the_logs(result, out, missing={foreign.name})
    assert "failed" in markdown_tables((out / "sweep.md").read_text())[0][0][2]

    # Once the cause is gone only that cell is run, here in two processes.
    before = {path: path.read_bytes() for path in out.glob("*/*.jsonl")}
    shutil.rmtree(foreign)
    process = start_sweep([*command, "--gpus-per-run", "2"])
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert before == {path: path.read_bytes() for path in before}
    assert read_lines(foreign / "environment.jsonl")[0]["processes"] == 2
    assert_agrees_with_the_logs(json.loads((out / "sweep.json").read_text()), out, missing=set())
    assert not list(out.glob("*/job"))


def config_words(command):
    """The trainer's part of the common options of a sweep."""
    return command[2 : command.index("--routing")]


def assert_agrees_with_the_logs(result, out, missing):
    (grid,) = result["maps"]
    for row, depth in zip(grid["metric"], (1, 2)):
        for entry, chunk in zip(row, (1, 4)):
            name = f"align_depth={depth},chunk_size={chunk},seed=0"
            if name in missing:
                assert entry["mean"] is None and list(entry["missing"]) == ["0"]
                continue
            logged = [
                line["frechet_distance"]
                for line in read_lines(out / name / "metrics.jsonl")
                if "frechet_distance" in line
            ]
            assert len(logged) == 3 and entry["mean"] == logged[-1]
    last = {name["name"]: name["last"] for name in result["cells"] if "last" in name}
    assert len(last) == 4 - len(missing) and len(set(last.values())) > 1


FAKE_SLURM = '''#!{python}
"""sbatch, srun, sacct, scancel and scontrol of a cluster of one machine, as far as submitit uses them."""
import os, signal, subprocess, sys
from pathlib import Path
root, name, arguments = Path({root!r}), Path(sys.argv[0]).name, sys.argv[1:]
quiet = dict(start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
if name == "sbatch" and arguments[0] != "run":
    job = str(101 + len(list(root.glob("*.script"))))
    (root / f"{{job}}.script").write_text(Path(arguments[0]).read_text())
    (root / f"{{job}}.state").write_text("PENDING")
    subprocess.Popen([sys.argv[0], "run", job], **quiet)
    print("Submitted batch job", job)
elif name == "sbatch":
    job = arguments[1]
    environment = dict(os.environ, SLURM_JOB_ID=job, SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1", SLURM_PROCID="0",
                       SLURM_LOCALID="0", SLURM_NODEID="0")
    while True:
        (root / f"{{job}}.state").write_text("RUNNING")
        subprocess.run(["bash", str(root / f"{{job}}.script")], env=environment)
        if not (root / f"{{job}}.requeue").exists():
            break
        (root / f"{{job}}.requeue").rename(root / f"{{job}}.requeued")
    (root / f"{{job}}.state").write_text("CANCELLED" if (root / f"{{job}}.cancel").exists() else "COMPLETED")
elif name == "srun":
    job = os.environ["SLURM_JOB_ID"]
    while arguments[0].startswith("--"):
        option = arguments.pop(0)
        if option != "--unbuffered":
            path = arguments.pop(0).replace("%j", job).replace("%t", "0")
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1 if option == "--output" else 2)
    (root / f"{{job}}.task").write_text(str(os.getpid()))
    os.execvp(arguments[0], arguments)
elif name == "sacct":
    print("JobID|State|NodeList")
    for job in arguments[arguments.index("-j") + 1::2]:
        print(f"{{job}}|{{(root / f'{{job}}.state').read_text()}}|here")
elif name == "scancel":
    (root / f"{{arguments[0]}}.cancel").touch()
    task = int((root / f"{{arguments[0]}}.task").read_text())
    os.kill(task, signal.SIGTERM)
    subprocess.Popen(["sh", "-c", f"sleep 8; kill -9 {{task}}"], **quiet)
elif name == "scontrol":
    (root / f"{{arguments[1]}}.requeue").touch()
'''


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name in ("sbatch", "srun", "sacct", "scancel", "scontrol"):
        (folder / name).write_text(FAKE_SLURM.format(python=sys.executable, root=str(folder)))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_slurm_jobs_outlive_the_sweep_are_preempted_and_cancelled(arguments, tmp_path, fake_slurm):
    """With stand-ins for Slurm's commands; what they do is submitit's reading of Slurm, not a cluster."""
    out = tmp_path / "sweep"
    command = arguments(out, "--cluster", "slurm", "--slurm", "time=90", "partition=fast", "mem_gb=3", steps=30_000)
    run, steps = out / "seed=0", lambda: len(read_lines(out / "seed=0" / "metrics.jsonl"))
    process = start_sweep(command)
    wait_for(lambda: steps() > 2)
    process.kill()  # as when the login node reboots
    process.communicate()
    script = (fake_slurm / "101.script").read_text()
    for flag in ("--time=90", "--partition=fast", "--mem=3GB", "--gpus-per-node=1", "--job-name=sweep"):
        assert f"#SBATCH {flag}\n" in script

    process = start_sweep(command)
    task = int((fake_slurm / "101.task").read_text())
    before = steps()
    os.kill(task, signal.SIGUSR2)  # Slurm warns that time is up
    wait_for(lambda: len(read_lines(run / "environment.jsonl")) == 2)
    saved = read_lines(run / "environment.jsonl")[1]["from_step"]
    assert saved >= 2 * before and (fake_slurm / "101.requeued").exists()
    wait_for(lambda: steps() > saved / 2 + 3)
    process.terminate()
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert load_file(run / "last.pt")["step"] > saved
    assert "seed=0  stopped" in printed
    assert len(list(fake_slurm.glob("*.script"))) == 1  # the job was found again, not sent again

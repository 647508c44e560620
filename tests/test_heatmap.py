"""The heat map of a sweep: its numbers, its tables and its picture."""

import dataclasses
import json
import math
import re
import types

import numpy as np
import pytest
from PIL import Image

import config
from analysis import heatmap


def made_cell(folder, points, depth=None, chunk=None, seed=0, state="done", reason="", others=(), **settings):
    """A cell as the sweep leaves it. points: [(step, distance)]; others: options that all cells share."""
    place = {"align_depth": depth if isinstance(depth, tuple) else (depth,), "chunk_size": chunk}
    settings = {
        **{key: value for key, value in place.items() if value not in (None, (None,))},
        **settings,
        "seed": seed,
    }
    name = ",".join(f"{key}={value}" for key, value in settings.items())
    full = {"routing": "dar", "alignment": "repa", **dict(others), **settings}
    full = dataclasses.replace(config.Config(), max_steps=100, **full)
    (folder / name).mkdir(parents=True)
    config.save(full, folder / name / "config.yaml")
    lines = [{"step": step, "images": step, "seconds": step / 2, "frechet_distance": y} for step, y in points]
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return types.SimpleNamespace(
        name=name, folder=folder / name, config=full, settings=settings, state=state, reason=reason
    )


def written(made, folder, *words, **options):
    """The tables of the Markdown, its text, and the JSON."""
    text = heatmap.write_result(made, folder, "frechet_distance", *words, **options)
    assert text == (folder / "sweep.md").read_text()
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        tables.append([[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()[2:]])
    return tables, text, json.loads((folder / "sweep.json").read_text(), parse_constant=pytest.fail)


def first_crossing(points, target):
    """(steps, bound) from the definition: on the line between the first point at the target and the one before."""
    for (a, ya), (b, yb) in zip([(None, None), *points], points):
        if yb <= target:
            return (b, "<" if yb < target else "") if a is None else (a + (b - a) * (ya - target) / (ya - yb), "")
    return points[-1][0], ">"


@pytest.mark.parametrize("seed", range(2))
def test_heat_map_of_random_runs(tmp_path, seed):
    """Every entry of JSON, Markdown and picture against means taken here from the points that were written."""
    rng = np.random.default_rng(seed)
    depths, chunks, seeds, steps = [2, 3, 7], [1, 2, 4, 8, 16], [0, 5], np.arange(20, 101, 20)
    curves = {
        (k, s, i): [(int(t), float(y)) for t, y in zip(steps, 30 * np.exp(-steps / 60) * rng.uniform(0.7, 1.3, 5))]
        for k in depths
        for s in chunks
        for i in seeds
    }
    made = [made_cell(tmp_path, points, *key) for key, points in curves.items()]
    rng.shuffle(made)
    tables, _, result = written(made, tmp_path)
    target = max(min(y for _, y in points) for points in curves.values())
    (grid,) = result["maps"]
    assert result["target"] == target and grid["align_depth"] == [[k] for k in depths] and grid["chunk_size"] == chunks
    for row, k in enumerate(depths):
        for column, s in enumerate(chunks):
            last = [curves[k, s, i][-1][1] for i in seeds]
            entry = grid["metric"][row][column]
            assert entry["mean"] == pytest.approx(sum(last) / 2)
            assert (entry["lowest"], entry["highest"]) == (min(last), max(last))
            assert tables[0][row][1 + column] == f"{sum(last) / 2:.4g} [{min(last):.4g}, {max(last):.4g}]"
            times = [first_crossing(curves[k, s, i], target) for i in seeds]
            entry = grid["steps_to_target"][row][column]
            assert {i: (v["value"], v["bound"]) for i, v in entry["per_seed"].items()} == {
                str(i): (pytest.approx(t), bound) for i, (t, bound) in zip(seeds, times)
            }
            if any(bound for _, bound in times):
                assert entry["mean"] is None and tables[1][row][1 + column].count(",") == 1
            else:
                assert entry["mean"] == pytest.approx(sum(t for t, _ in times) / 2)
    for cell in result["cells"]:
        points = curves[cell["settings"]["align_depth"][0], cell["settings"]["chunk_size"], cell["settings"]["seed"]]
        assert (cell["last"], cell["best"]) == (points[-1][1], min(y for _, y in points))
    with Image.open(tmp_path / "sweep.png") as picture:
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 30


def test_what_is_never_reached_is_no_number(tmp_path):
    falling, flat, early = [(50, 9.0), (100, 3.0)], [(50, 9.0), (100, 8.0)], [(50, 2.0), (100, 1.0)]
    pairs = {1: (falling, falling), 2: (falling, flat), 4: (flat, flat), 8: (early, falling)}
    made = [made_cell(tmp_path, y, 2, chunk, seed) for chunk, pair in pairs.items() for seed, y in enumerate(pair)]
    tables, _, result = written(made, tmp_path, target=6.0)
    assert tables[1] == [["2", "75 [75, 75]", "75, >100", ">100, >100", "<50, 75"]]
    assert [entry["mean"] for entry in result["maps"][0]["steps_to_target"][0]] == [75, None, None, None]
    curves = {1: [(50, 2.0), (100, 4.0)], 2: [(50, 7.0), (100, 9.0)], 4: [(50, 2.0), (100, 10.0)]}
    made = [made_cell(tmp_path / "max", points, 2, chunk) for chunk, points in curves.items()]
    tables, *_ = written(made, tmp_path / "max", "max", 6.0)
    assert tables[1] == [["2", ">100", "<50", "75"]]
    tables, _, result = written(made, tmp_path / "max", "max")  # by default, what every run reaches
    assert result["target"] == 4.0 and tables[1] == [["2", "100", "<50", "62.5"]]


def test_cells_that_are_not_complete_are_missing_with_their_reason(tmp_path):
    """Also one whose run has diverged. None of them counts for the default target or a mean."""
    curve = [(50, 9.0), (100, 3.0)]
    made = [
        made_cell(tmp_path, [*curve, (150, 1.0)], 2, 1, 0),  # went further: it is read up to max_steps
        made_cell(tmp_path, curve, 2, 1, 1, "failed", "exit status 9"),
        made_cell(tmp_path, [(50, 70.0)], 2, 2, 0, "stopped"),
        made_cell(tmp_path, [(50, 9.0), (100, math.nan)], 6, 1),
        made_cell(tmp_path, curve, 6, 2, 0, "waiting"),
    ]
    tables, text, result = written(made, tmp_path)
    assert [row[1:] for row in tables[0]] == [["3, failed", "stopped"], ["done", "waiting"]]
    assert "align_depth=(2,),chunk_size=1,seed=1: failed exit status 9" in text
    assert "align_depth=(6,),chunk_size=1,seed=0: done frechet_distance is not a finite number" in text
    assert result["target"] == 3.0 and result["maps"][0]["metric"][0][0]["mean"] is None
    assert result["maps"][0]["metric"][0][0]["missing"] == {"1": "failed exit status 9"}
    assert [result["cells"][0][key] for key in ("last", "last_step", "best")] == [3.0, 100, 3.0]
    tables, *_ = written(made[1:2], tmp_path)  # nothing is complete
    assert tables == [[["2", "failed"]]] and (tmp_path / "sweep.png").is_file()


def test_one_map_for_each_combination_of_the_other_settings(tmp_path):
    """A residual baseline has no chunks: its map is one column. Three seeds have their mean, not their median."""
    made = [
        made_cell(tmp_path, [(100, 10 * k + s)], k, s, query=query)
        for query in ("static", "dynamic")
        for k in (2, 4)
        for s in (1, 4)
    ]
    made += [made_cell(tmp_path, [(100, 50 + k)], k, routing="residual") for k in (2, 4)]
    made += [made_cell(tmp_path, [(100, y)], (4, 8), 1, seed, lr=0.5) for seed, y in enumerate([1.0, 1.0, 4.0])]
    tables, text, result = written(made, tmp_path, target=1)
    maps = result["maps"]
    settings = [{"query": "static"}, {"query": "dynamic"}, {"routing": "residual"}, {"lr": 0.5}]
    assert [grid["settings"] for grid in maps] == settings and "no chunks" in text
    assert [[entry["mean"] for entry in row] for row in maps[1]["metric"]] == [[21, 24], [41, 44]]
    assert [[entry["mean"] for entry in row] for row in maps[2]["metric"]] == [[52], [54]]
    assert tables[6] == [["4 8", "2 [1, 4]"]]  # several depths are not the one of REPA
    assert "Judge of the samples: `inception`. Aligned to: `dinov2-vit-b`." in text


@pytest.mark.parametrize(
    "model, depth, marked, low, high", [("SiT-B/2", None, 4, 2.449, 3.207), ("SiT-XL/2", 50, 8, 5.0, 6.547)]
)
def test_the_marks(tmp_path, model, depth, marked, low, high):
    """Prop. 1, sqrt(L (1 - a) / (1 + a)) for a = 0.6 and 0.4 with L = 2 x depth, worked out by hand; REPA's depths."""
    others = dict(model=model, depth=depth)
    made = [made_cell(tmp_path, [(100, 1.0)], k, s, others=others) for k in (4, 8) for s in (1, 4, 8)]
    (grid,) = written(made, tmp_path)[2]["maps"]
    assert grid["optimal_chunk_size"] == pytest.approx([low, high], abs=1e-3) and grid["repa_depth"] == marked


def test_the_picture_shows_means_in_one_scale_and_the_marks(tmp_path, monkeypatch):
    """The drawn arrays are the means, and the band of S* lies between the columns of 2 and 4 in log2."""
    import matplotlib.pyplot as plt

    chunks, sizes = np.array([1, 2, 4]), {"static": 1, "dynamic": 4}
    made = [
        made_cell(tmp_path, [(50, 99.0), (100, size * s * k + 3.0 * seed)], k, s, seed, query=query)
        for query, size in sizes.items()
        for k in (2, 4)
        for s in (1, 2, 4)
        for seed in (0, 1)
    ]
    with monkeypatch.context() as patch:
        patch.setattr(plt, "close", lambda figure: None)
        heatmap.write_result(made, tmp_path, "frechet_distance", "min", 70.0)
    figure = plt.gcf()
    plt.close(figure)
    metric, steps = figure.axes[::2], figure.axes[1::2]
    values = [size * np.outer([2, 4], chunks) for size in sizes.values()]
    lasts = [value + 1.5 for value in values]
    times = [np.mean([50 + 50 * 29 / (99 - value - 3 * seed) for seed in (0, 1)], axis=0) for value in values]
    for panels, expected in ((metric, lasts), (steps, times)):
        for panel, means in zip(panels, expected):
            (image,) = panel.images
            np.testing.assert_allclose(image.get_array(), means)
            assert image.get_clim() == pytest.approx((np.min(expected), np.max(expected)))
            assert image.origin == "lower"
            band, row = panel.patches
            left, right = np.log2(math.sqrt(24 * 0.4 / 1.6)), np.log2(math.sqrt(24 * 0.6 / 1.4))
            assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((left, right))
            assert row.get_y() < 1 < row.get_y() + row.get_height() and row.get_y() > 0.5

"""kernels.bench without a GPU: what it refuses, what it writes, and the arithmetic behind its goals."""

import functools
import json

import pytest
import torch

from kernels import bench, route

TINY = [
    "--device",
    "cpu",
    "--batch",
    "2",
    "--tokens",
    "3",
    "--sources",
    "3",
    "--widths",
    "12",
    "--queries",
    "timestep",
    "--methods",
    "eager",
    "fused",
]


def test_a_table_of_one_aggregation(tmp_path, capsys):
    assert bench.main([*TINY, "--parts", "operators", "--out", str(tmp_path / "new" / "table")]) == 0
    result = json.loads((tmp_path / "new" / "table.json").read_text())
    assert [row["method"] for row in result["operators"]] == ["eager", "fused"]
    for row in result["operators"]:
        assert 0 < row["error"] < bench.TOLERANCE
        for part in ("forward", "backward", "both"):
            assert 0 < row[part][0] <= row[part][1] <= row[part][2]
        assert row["forward_bytes"] == (3 + 1) * 2 * 3 * 12 * 2  # n sources and h, (2, 3, 12) in bf16
        assert row["backward_bytes"] == (3 + 3 + 2) * 2 * 3 * 12 * 2  # sources, their gradients, h and dh
    assert result["command"].startswith("python -m kernels.bench --device cpu") and result["versions"]["torch"]
    text = (tmp_path / "new" / "table.md").read_text()
    assert "| 12 | timestep | 3 | fused |" in text and "not measured" in text
    assert "timestep | 3 | fused" in capsys.readouterr().out


def test_a_wrong_kernel_is_not_timed(tmp_path, monkeypatch):
    honest = bench.method_named

    def method_named(name, kind, n):
        method = honest(name, kind, n)
        return (lambda v, q, g: 1.1 * method(v, q, g)) if name == "fused" and n == 3 else method

    monkeypatch.setattr(bench, "method_named", method_named)
    assert bench.main([*TINY, "--parts", "operators", "--out", str(tmp_path / "table")]) == 1
    rows = json.loads((tmp_path / "table.json").read_text())["operators"]
    assert "forward" in rows[0] and "forward" not in rows[1] and rows[1]["wrong"] == pytest.approx(0.1, abs=0.01)
    assert "wrong: error" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(bench, "method_named", lambda name, *rest: lambda *inputs: 1.1 * honest(name, *rest)(*inputs))
    with pytest.raises(SystemExit, match="nothing is timed"):
        bench.main([*TINY, "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize(
    "broken",
    [
        lambda v, q, g: route(v, q, g) * float("nan"),
        lambda v, q, g: route(v, q, g.detach()) + 0 * g.sum(),  # right forward, no gradient of the weight
        lambda v, q, g: route([v[0].detach() + 0 * v[0], *v[1:]], q, g),
    ],
)
def test_parity_sees_wrong_gradients(broken):
    options = bench.Options(batch=2, tokens=3)
    good = bench.parity(functools.partial(route, backend="torch"), options, 12, "static", 3, torch.device("cpu"))
    assert good < bench.TOLERANCE
    assert not bench.parity(broken, options, 12, "static", 3, torch.device("cpu")) < bench.TOLERANCE


def test_a_failing_method_is_reported(tmp_path, monkeypatch):
    def fails(*inputs):
        raise RuntimeError("no such kernel")

    honest = bench.method_named
    monkeypatch.setattr(bench, "method_named", lambda name, *rest: fails if name == "eager" else honest(name, *rest))
    assert bench.main([*TINY, "--parts", "operators", "--out", str(tmp_path / "table")]) == 0
    assert "RuntimeError: no such kernel" in (tmp_path / "table.md").read_text()


def test_stacks_and_steps_run(tmp_path):
    assert (
        bench.main(
            [
                *TINY,
                "--parts",
                "stacks",
                "--model",
                "SiT-S/8",
                "--depth",
                "1",
                "--input-size",
                "8",
                "--batch",
                "1",
                "--chunk-sizes",
                "1",
                "--out",
                str(tmp_path / "t"),
            ]
        )
        == 0
    )
    rows = json.loads((tmp_path / "t.json").read_text())["stacks"]
    assert [row["method"] for row in rows] == ["residual", "eager", "fused"] and all("both" in row for row in rows)
    step = bench.time_step(
        {"routing": "dar", "chunk_size": 2, "route_backend": "torch"},
        False,
        bench.Options(model="SiT-S/8", depth=1, input_size=8, batch=1),
        torch.device("cpu"),
    )
    assert step["step"][1] > 0


def test_goals_from_known_measurements():
    def row(method, width=1152, query="static", n=57, forward=1.0, backward=2.0):
        return {
            "method": method,
            "width": width,
            "query": query,
            "sources": n,
            "forward": [0, forward, 0],
            "backward": [0, backward, 0],
            "forward_bytes": 58 * 10**6,
            "backward_bytes": 116 * 10**6,
        }

    result = {
        "copy_gb_per_s": 100.0,
        "operators": [
            row("eager", forward=12, backward=20),
            row("fused"),
            row("fla", forward=0.5, backward=4),
            row("fused", query="dynamic", forward=0.8, backward=4),
            row("eager", query="dynamic", forward=8, backward=20),
            row("fused", n=4, forward=9),
            {"method": "liger", "width": 1152, "query": "static", "sources": 57, "failed": "x"},
        ],
        "steps": [
            {"method": "residual", "step": [0, 100.0, 0], "peak_bytes": 10},
            {"method": "DAR fused", "step": [0, 108.0, 0], "peak_bytes": 12},
            {"method": "residual, compiled", "failed": "out of memory"},
        ],
    }
    found = {goal.split(":")[0]: value for goal, value in bench.goals(result)}
    assert found["forward, share of copy bandwidth, n >= 8, D = 1152"] == pytest.approx(0.58)  # 58 MB in 1 ms
    assert found["backward, times the floor, n >= 8, D = 1152"] == pytest.approx(4 / 1.14)  # 114 MB at 100 GB/s
    assert found["static query, time of fused / fla, worst shape"] == pytest.approx(2.0)
    assert found["static query, time of fused / liger, worst shape"] is None
    assert found["forward at n = 57, eager / fused, worst shape"] == pytest.approx(10.0)
    assert found["backward at n = 57, eager / fused, worst shape"] == pytest.approx(5.0)
    assert found["step of DAR S = 4 / residual"] == pytest.approx(1.08)
    assert found["memory of DAR S = 4 / residual"] == pytest.approx(1.2)
    assert found["step of DAR S = 4, compiled / residual, compiled"] is None
    assert "| 0.58 |" in bench.markdown(
        {
            **result,
            "command": "",
            "device": "",
            "versions": {},
            "cuda": None,
            "commit": None,
            "batch_and_tokens": [1, 1],
            "goals": bench.goals(result),
            "operators": [],
        }
    )


@pytest.mark.parametrize("typed, message", [(["--device", "cuda"], "CUDA"), (["--model", "SiT-H/2"], "SiT-H/2")])
def test_what_it_refuses(typed, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        bench.main(["--device", "cpu", *typed, "--out", str(tmp_path / "x")])

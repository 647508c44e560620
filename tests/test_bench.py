"""kernels.bench without a GPU: what it refuses, what it writes, and the arithmetic behind its goals."""

import functools
import json

import pytest
import torch

from kernels import bench, route

CPU = torch.device("cpu")
TINY = "--device cpu --batch 1 --tokens 2 --sources 3 --widths 12 --queries timestep --hidden-size 12 --num-heads 1"
TINY = f"{TINY} --methods eager fused".split()


def test_it_measures_what_is_right_and_says_what_is_not(tmp_path, monkeypatch, capsys):
    """Operators: one is right, one fails, one is wrong. Then stacks, and a step, of a small model."""
    honest = bench.method_named

    def method_named(name, kind, n):
        if name == "compiled":
            return lambda v, q, g: v[0].view(7)
        method = honest(name, kind, n)
        return (lambda v, q, g: 1.1 * method(v, q, g)) if name == "fused" and n == 3 else method

    monkeypatch.setattr(bench, "method_named", method_named)
    monkeypatch.setattr(bench, "CPU_ROUNDS", 2)
    out = tmp_path / "new" / "table"
    small = "--model SiT-S/8 --depth 2 --input-size 8 --chunk-sizes 1 --step-arms".split() + ["residual", "DAR fused"]
    assert bench.main([*TINY, "compiled", *small, "--out", str(out)]) == 1  # as the fused kernels are wrong
    result, text = json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md").read_text()
    eager, compiled, fused = result["operators"]
    assert (
        0 < eager["error"] < bench.TOLERANCE["cpu"]
        and eager["forward"][0] <= eager["forward"][1] <= eager["forward"][2]
    )
    for part, tensors in (("forward", 3 + 1), ("backward", 3 + 3 + 2)):  # sources, h; also their gradients, dh
        rate = tensors * 2 * 12 * 4 / eager[part][1] / 1e6  # (1, 2, 12) in float32
        assert eager[f"{part}_share"] == pytest.approx(rate / result["copy_gb_per_s"])
    assert compiled["failed"].startswith("RuntimeError: shape '[7]' is invalid") and compiled["failed"] in text
    assert "forward" not in fused and fused["wrong"] == pytest.approx(0.1, abs=0.01)
    assert [row["method"] for row in result["stacks"]] == ["residual", "torch", "fused"]
    assert all(row["both"][1] > 0 for row in result["stacks"])
    residual, dar = result["steps"]
    assert (residual["method"], dar["method"]) == ("residual", "DAR fused") and residual["over residual"] == [1, 1, 1]
    assert 0 < dar["step"][0] and 0 < dar["over residual"][0] <= dar["over residual"][2]
    assert result["torch"] and result["versions"]["triton"]
    assert "| 12 | timestep | 3 | fused |" in text and "12 | timestep | 3 | fused" in capsys.readouterr().out
    monkeypatch.setattr(bench, "method_named", lambda name, *rest: lambda *inputs: 1.1 * honest(name, *rest)(*inputs))
    with pytest.raises(SystemExit, match="nothing is timed"):
        bench.main([*TINY, "--out", str(tmp_path / "none")])
    monkeypatch.setattr(bench, "why_not_fused", lambda device: "no C compiler")
    with pytest.raises(SystemExit, match="no fused kernels to measure: no C compiler"):
        bench.main([*TINY, "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none.json").exists()


def test_parity_sees_wrong_gradients():
    parity = functools.partial(bench.parity, options=bench.Options(batch=2, tokens=3), width=12, kind="static", n=3)
    assert parity(functools.partial(route, backend="torch"), device=CPU) < bench.TOLERANCE["cpu"]
    for broken in (
        lambda v, q, g: route(v, q, g) * float("nan"),
        lambda v, q, g: route(v, q, g.detach()) + 0 * g.sum(),  # right forward, no gradient of the weight
        lambda v, q, g: route([v[0].detach() + 0 * v[0], *v[1:]], q, g),
    ):
        assert not parity(broken, device=CPU) < bench.TOLERANCE["cpu"]


def test_a_step_is_compared_with_the_residual_one_of_its_own_round(monkeypatch):
    paces = iter(
        [7.0, 7.0, 7.0, 7.0, 1.0, 1.2, 10.0, 11.0, 2.0, 2.6]
    )  # two rounds are not counted; then the machine slows down
    monkeypatch.setattr(bench, "cpu_time", lambda step: next(paces))
    monkeypatch.setattr(bench, "CPU_ROUNDS", 3)
    options = bench.Options(model="SiT-S/8", depth=2, input_size=8, batch=1, step_arms=("DAR fused",))
    residual, dar = bench.steps_in_turns(options, CPU)
    assert residual["over residual"] == [1, 1, 1] and residual["step"][1] == 2
    assert dar["over residual"][1] == pytest.approx(1.2) and dar["step"][1] == pytest.approx(2.6)  # not 2.6 / 2
    assert dar["over residual"][0] < 1.2 < dar["over residual"][2]


@pytest.mark.parametrize(
    "typed, message", [(["--device", "cuda"], "no CUDA device"), (["--model", "SiT-H/2"], "SiT-H")]
)
def test_what_it_refuses(typed, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--device", "cpu", *typed, "--out", str(tmp_path / "x")])
    assert message in f"{stopped.value}{capsys.readouterr()}"

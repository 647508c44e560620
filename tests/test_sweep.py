"""The sweep: which cells it makes, what its heat map says, and whole sweeps that fail, stop and go on."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import types
from io import StringIO

import cloudpickle
import numpy as np
import pytest
import submitit
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.live import Live
from submitit.slurm.test_slurm import mocked_slurm

import config
import sweep
import train_repa_dar
from analysis import heatmap
from checkpoint import FORMAT, load_file
from runtime import lock_folder
from tests.conftest import read_lines
from tests.test_trainer import wait_for

STEPS = 60
GRID = ("--routing", "dar", "--alignment", "repa", "--align-depth", 1, 2, "--chunk-size", 1, 4)


@pytest.fixture
def arguments(small_data, encoder_folder, judge_folder, tmp_path):
    """The command line of a sweep of tiny models."""

    def build(*extra, steps=STEPS):
        values = dict(data=small_data, encoder=encoder_folder, eval_encoder=judge_folder, eval_every=steps // 3)
        values |= dict(depth=2, hidden_size=32, num_heads=2, projector_dim=32, ema_decays=0.5, tensorboard=False)
        values |= dict(lr=1e-3, batch_size=8, max_steps=steps, log_every=2, checkpoint_every=1000)
        values |= dict(eval_samples=6, eval_batch_size=4, sample_steps=2)
        words = {f"--{key.replace('_', '-')}": str(value) for key, value in values.items()}
        kept = [word for option in words if option not in extra for word in (option, words[option])]
        return ["--out", str(tmp_path / "sweep"), *kept, *map(str, extra)]

    return build


@pytest.fixture
def cells(arguments):
    """The cells of a command line, before anything is run."""

    def build(*extra):
        options, words = tyro.cli(sweep.Options, args=arguments(*extra), return_unknown_args=True)
        return sweep.make_cells(options, words)

    return build


def options(**changes):
    return dataclasses.replace(sweep.Options(out="somewhere"), **changes)


# ---- which cells ----


def test_every_combination_is_a_cell_and_one_seed_comes_before_the_next(cells):
    made = cells(*GRID, "--seeds", 0, 7)
    assert [cell.name for cell in made] == [
        f"align_depth={k},chunk_size={s},seed={seed}" for seed in (0, 7) for k in (1, 2) for s in (1, 4)
    ]
    for cell in made:
        values = {key: int(value) for key, value in (part.split("=") for part in cell.name.split(","))}
        assert {"align_depth": cell.config.align_depth[0]} | {
            key: getattr(cell.config, key) for key in ("chunk_size", "seed")
        } == values
        # What is run is the user's own command: the trainer reads the same from it.
        assert config.parse(cell.words) == cell.config


def test_options_without_effect_create_no_extra_runs(cells):
    """Residual routing has no chunks, and without alignment there is no depth: each combination once."""
    words = "--routing residual dar --alignment none repa --chunk-size 1 4 --query static dynamic --align-depth 1 2"
    made, expected = cells(*words.split(), "--seeds", 0, 1), set()
    for seed in (0, 1):
        expected.add(("residual", "none", seed))
        expected |= {("residual", "repa", k, seed) for k in (1, 2)}
        expected |= {("dar", "none", s, q, seed) for s in (1, 4) for q in ("static", "dynamic")}
        expected |= {("dar", "repa", s, q, k, seed) for s in (1, 4) for q in ("static", "dynamic") for k in (1, 2)}
    assert len(made) == len({cell.name for cell in made}) == len(expected)
    residual = [cell for cell in made if cell.config.routing == "residual"]
    assert all("chunk_size" not in cell.name and "query" not in cell.name for cell in residual)
    # What has no effect stays the preset's, whichever values the rest of the sweep has.
    assert {(cell.config.chunk_size, cell.config.query) for cell in residual} == {(4, "timestep")}
    # And whether the sweep has one of them or several, so that another may be added later.
    one, several = (cells("--routing", "residual", "dar", "--chunk-size", *sizes) for sizes in ([2], [2, 4]))
    assert one[0] == several[0] and one[0].config.chunk_size == 4 and one[1].config.chunk_size == 2
    assert len(cells("--lr", "1e-3", "0.001", "1e-03", "--seeds", 0, 0)) == 1  # a value that is given twice


def test_what_has_no_effect():
    """With everything on, nothing; then each switch alone. A wrong entry would make one cell, or arm, of two."""
    on = dict(routing="dar", alignment="repa", eval_every=1, diagnose_every=1, cfg_scale=1.5, init_from="x")
    of_routers = {"query", "chunk_size", "final_aggregator", "route_backend"}
    alignment = {"align_depth", "proj_coeff", "projector", "projector_dim", "spatial_norm", "align_steps"}
    evaluation = {"eval_encoder", "eval_aligned", "inception", "fid_reference", "eval_samples", "eval_batch_size"}
    expected = {
        ("routing", "residual"): of_routers,
        ("routing", "unet"): of_routers,
        ("routing", "attnres"): {"query", "final_aggregator"},
        ("alignment", "none"): alignment | {"encoder", "encoder_weights", "encoder_features"},
        ("projector", "conv"): {"projector_dim"},
        ("eval_every", 0): evaluation | {"decoder", "sampler", "sample_steps", "cfg_scale", "guidance_interval"},
        ("cfg_scale", 1.0): {"guidance_interval"},
        ("diagnose_every", 0): {"diagnose_images"},
        ("init_from", ""): {"new_labels"},
        ("lr", 7.0): set(),
    }
    assert {(key, value): config.idle({**on, key: value}) for key, value in expected} == expected


def test_commas_join_the_values_of_one_cell(cells):
    words = "--routing dar --alignment repa --align-depth 1 1,2 --betas 0.9,0.99 0.8,0.95"
    made = cells(*words.split())
    pairs = [((1,), (0.9, 0.99)), ((1,), (0.8, 0.95)), ((1, 2), (0.9, 0.99)), ((1, 2), (0.8, 0.95))]
    assert [(cell.config.align_depth, cell.config.betas) for cell in made] == pairs
    assert made[2].name == "align_depth=1+2,chunk_size=4,betas=0.9+0.99,seed=0"


@pytest.mark.parametrize(
    "extra, message",
    [
        ("--chunk-sizes 1 2", "unknown option --chunk-sizes.*'chunk_size'"),
        ("--chunk-size 1 0", "chunk_size = 0: must be at least 1"),
        ("--chunk-size 1 5 --routing dar", "chunk_size = 5 is not between 1 and the 4 sublayers"),
        ("--align-depth 1 3 --alignment repa", "align_depth = 3: the model has only 2 blocks"),
        ("--model SiT-S/2 SiT-M/2", "'SiT-M/2' is unknown"),
        ("--lr 1 --lr 2", "--lr is given twice"),
        ("stray", "'stray' belongs to no option"),
        ("--eval-every 0", "'frechet_distance' is not logged with eval_every = 0 .*give --metric loss"),
        ("--metric fid", "'fid' is not logged with .*give --metric frechet_distance"),
        ("--metric fid_5000 --eval-encoder inception --eval-every 0", "'fid_5000' is not logged with eval_every = 0"),
        ("--eval-encoder inception", "'frechet_distance' is not logged with .*give --metric fid"),
        (
            "--alignment repa --align-depth 1 --eval-encoder a --encoder a",
            "is not logged with .*give --metric frechet_distance_aligned",
        ),
        ("--config nothing", "'nothing' is neither a preset"),
        ("--data nowhere", "nowhere.*is not a prepared folder"),  # not one cell has to start to find that out
        ("--jobs 0", "jobs = 0"),
        ("--gpus-per-run 3", "batch_size = 8 cannot be shared evenly.* 3"),
        ("--slurm partition=gpu", "only read with --cluster slurm"),
        ("--cluster slurm --slurm time=5", "srun"),
        ("--cluster slurm", "--slurm time=: give the limit"),
        ("--cluster slurm --slurm time=24:00:00", "whole minutes"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(arguments, tmp_path, extra, message):
    words = arguments(*extra.split()) if extra != "stray" else ["stray", *arguments()]
    with pytest.raises(SystemExit, match=f"(?s)error: .*{message}"):
        sweep.main(words)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "extra, shown",
    [
        ("--chunk-size 1 many", "many"),
        ("--cluster cloud", "cloud"),
        ("--routing dar sum", "sum"),
        ("--betas 0.9 0.999", "commas join a list"),
    ],
)
def test_values_that_cannot_be_read_name_themselves(arguments, tmp_path, capsys, extra, shown):
    with pytest.raises(SystemExit) as stop:
        sweep.main(arguments(*extra.split()))
    assert stop.value.code == 2 and shown in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "metric, judges",
    [("fid", "inception"), ("fid_5000", "a inception"), ("frechet_distance", "a inception"), ("loss", "a")],
)
def test_metrics_that_will_be_logged_are_allowed(cells, metric, judges):
    sweep.check(cells("--eval-encoder", ",".join(judges.split())), options(metric=metric))


# ---- where they run ----


@pytest.mark.parametrize(
    "gpus, visible, changes, expected",
    [
        (4, None, {}, ["0", "1", "2", "3"]),
        (4, None, {"gpus_per_run": 2}, ["0,1", "2,3"]),
        (5, None, {"gpus_per_run": 2}, ["0,1", "2,3"]),
        (4, None, {"jobs": 3}, ["0", "1", "2"]),
        (3, "4,6,7", {}, ["4", "6", "7"]),
        (2, "GPU-a,GPU-b", {"gpus_per_run": 2}, ["GPU-a,GPU-b"]),
        (4, None, {"jobs": 5}, "need 5 GPUs"),
        (4, None, {"gpus_per_run": 8}, "need 8 GPUs"),
        (4, None, {"jobs": 3, "gpus_per_run": 2}, "need 6 GPUs; this machine has 4"),
    ],
)
def test_gpus_are_shared_out(monkeypatch, gpus, visible, changes, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            sweep.make_places(options(**changes), 100)
        return
    places = sweep.make_places(options(**changes), 100)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == expected
    assert len(sweep.make_places(options(**changes), 1)) == 1


@pytest.mark.parametrize(
    "changes, count, threads",
    [({}, 1, 12), ({"jobs": 3}, 3, 4), ({"jobs": 3, "gpus_per_run": 2}, 3, 2), ({"jobs": 20}, 20, 1)],
)
def test_cores_are_shared_out(monkeypatch, changes, count, threads):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert sweep.make_places(options(**changes), 100) == [{"OMP_NUM_THREADS": str(threads)}] * count


# ---- what is there already ----


def test_dry_run_writes_nothing_and_says_what_is_left(arguments, cells, tmp_path, capsys):
    out = tmp_path / "sweep"
    sweep.main(arguments(*GRID, "--seeds", 0, 1, "--dry-run"))
    printed = capsys.readouterr().out
    assert f"8 cells: 8 waiting, {8 * STEPS} steps to go; 1 at a time on local" in printed and not out.exists()
    command = shlex.split(printed.partition("the first: ")[2])
    assert command[:2] == ["python", "train_repa_dar.py"]
    assert config.parse(command[2:]).out == str(out / "align_depth=1,chunk_size=1,seed=0")

    # 20 steps took 70 s, and a slower cell's 60 steps 630 s: 7 s at the median for each of 40 + 60 steps.
    first, second, third = cells("--seeds", 0, 1, 2)
    save_checkpoint(second)
    first_log = [{"step": 19, "loss": 1.0}, {"step": 20, "seconds": 70.0}]
    for cell, records in ((first, first_log), (second, [{"step": 60, "seconds": 630.0}])):
        cell.folder.mkdir(parents=True, exist_ok=True)
        (cell.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in records) + '{"step": 2')
    before = sorted(tmp_path.rglob("*"))
    sweep.main(arguments("--seeds", 0, 1, 2, "--jobs", 2, "--metric", "loss", "--dry-run"))
    printed = capsys.readouterr().out
    assert f"{first.name}  waiting  20/60  1\n" in printed and f"{second.name}  done  60/60" in printed
    assert "3 cells: 2 waiting, 1 done, 100 steps to go, 0:11:40 of training; 2 at a time" in printed
    assert sorted(tmp_path.rglob("*")) == before


def save_checkpoint(cell, **changes):
    """last.pt as the trainer leaves it at the end of the cell's run, but for `changes`."""
    contents = {"content of data": "x", "classes with images": [0]}
    checkpoint = {"format": FORMAT, "config": config.plain(dataclasses.asdict(cell.config)) | contents, "arguments": {}}
    progress = {"step": cell.config.max_steps, "evaluation_due": False, "diagnosis_due": False}
    cell.folder.mkdir(parents=True, exist_ok=True)
    torch.save({**checkpoint, **progress, "model": {"weight": torch.zeros(3)}, **changes}, cell.folder / "last.pt")


def test_only_a_run_of_this_trainer_with_these_settings_at_its_end_is_complete(cells):
    (cell,) = cells("--diagnose-every", 20)
    settings = config.plain(dataclasses.asdict(cell.config))
    assert not sweep.complete(cell)
    for change, expected in (
        ({}, True),
        ({"step": STEPS + 5}, True),
        ({"step": STEPS - 1}, False),
        ({"evaluation_due": True}, False),
        ({"diagnosis_due": True}, False),
        ({"config": settings | {"lr": 7.0}}, False),
        ({"config": settings | {"num_workers": 7}}, True),
        ({"config": settings | {"of_a_later_version": 7}}, False),
        ({"format": FORMAT - 1}, False),
        ({"format": FORMAT + 1}, False),
    ):
        save_checkpoint(cell, **change)
        assert sweep.complete(cell) == expected, change
    save_checkpoint(cell, diagnosis_due=True)  # which is no longer wanted
    assert sweep.complete(dataclasses.replace(cell, config=dataclasses.replace(cell.config, diagnose_every=0)))
    progress = {"step": STEPS, "evaluation_due": False, "diagnosis_due": False}
    for content in ([1], {"ema": {}}, {"config": {}, **progress}, {"config": settings, "log_lines": 3, **progress}):
        torch.save(content, cell.folder / "last.pt")
        assert not sweep.complete(cell)
    (cell.folder / "last.pt").write_bytes(b"cut")
    assert not sweep.complete(cell)


# ---- whole sweeps ----

FAKE_TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
words = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
out, saved = Path(words["out"]), Path(words["out"]) / "saved"
def stop(*_):
    if not (out.parent / "deaf").exists():
        saved.write_text(str(step))
        sys.exit(143)
signal.signal(signal.SIGTERM, stop)
step = int(saved.read_text()) if saved.exists() else 0
start = {"from": step, "pid": os.getpid(), "parent": os.getppid(), "alone": os.getsid(0) == os.getpid()}
start |= {"rank": os.environ.get("RANK"), "threads": os.environ["OMP_NUM_THREADS"]}
start |= {"ignored": signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN}
with open(out / "starts", "a") as file:
    file.write(json.dumps(start) + chr(10))
while step < int(words["max-steps"]):
    step += 1
    (out / "metrics.jsonl").write_text(json.dumps({"step": step, "seconds": step / 8, "loss": 1 / step}) + chr(10))
    print(f" {step} 9.1step/s", end=chr(13), flush=True)
    if (out.parent / "broken").exists() and out.name.endswith("seed=1"):
        print("line", "\\nreason: broken", file=sys.stderr)
        sys.exit(3)
    time.sleep(0.02)
(out / "complete").touch()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The sweep's own scheduling, of a trainer that only counts. Returns how a cell was started so far."""
    (tmp_path / "trainer.py").write_text(FAKE_TRAINER)
    (tmp_path / "sweep").mkdir()
    monkeypatch.setattr(sweep, "TRAINER", tmp_path / "trainer.py")
    monkeypatch.setattr(sweep, "POLL", dict.fromkeys(("local", "slurm", "debug"), 0.05))
    monkeypatch.setattr(sweep, "complete", lambda cell: (cell.folder / "complete").exists())
    monkeypatch.setattr(sweep, "write_result", lambda *anything: "the table")
    handler = signal.getsignal(signal.SIGTERM)
    yield lambda seed: read_lines(tmp_path / "sweep" / f"seed={seed}" / "starts")
    signal.signal(signal.SIGTERM, handler)  # which a job in this process replaces


@contextlib.contextmanager
def once(condition, action):
    """Does something in the background of the block, when the condition comes true."""
    thread = threading.Thread(target=lambda: (wait_for(condition), action()))
    thread.start()
    yield
    thread.join()


def interrupt(number):
    os.kill(os.getpid(), number)


def exit_code(words):
    """What the sweep exits with, a number or a message; 0 where it returns."""
    try:
        sweep.main(words)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_all_running_cells_and_the_same_command_goes_on(arguments, fake, capfd, number):
    words = arguments("--seeds", 0, 1, 2, "--jobs", 2, "--metric", "loss", "--max-steps", 2000)
    with once(lambda: fake(0) and fake(1), lambda: (time.sleep(0.2), interrupt(number))):
        assert exit_code(words) == 128 + number
    printed = capfd.readouterr()
    assert "the running cells are saved first" in printed.err and "the same command resumes" in printed.out
    assert "seed=0  stopped  " in printed.out and not fake(2)
    assert exit_code([*words[:-1], "60"]) == 0
    for seed, times in ((0, 2), (1, 2), (2, 1)):
        assert len(fake(seed)) == times
        assert all(start["alone"] and start["ignored"] and start["threads"] == "1" for start in fake(seed))
    assert fake(0)[1]["from"] > 0 and fake(1)[1]["from"] > 0
    printed = capfd.readouterr().out
    assert "seed=2  running" in printed and "seed=2  done  60/60  0.01667" in printed and "the table" in printed
    assert exit_code([*words[:-1], "60"]) == 0 and len(fake(0)) == 2  # there is nothing left to do


def test_a_second_interrupt_does_not_wait(arguments, fake, tmp_path):
    (tmp_path / "sweep" / "deaf").touch()
    twice = lambda: (interrupt(signal.SIGINT), time.sleep(0.3), interrupt(signal.SIGINT))  # noqa: E731
    with once(lambda: fake(0), twice):
        assert exit_code(arguments("--metric", "loss", "--max-steps", 2000)) == 130
    os.kill(fake(0)[0]["pid"], signal.SIGKILL)  # it still ran


def test_a_cell_fails_while_another_command_runs_one_and_the_rest_goes_on(arguments, fake, tmp_path, capfd):
    """The cell that runs elsewhere is left alone, and looked at again until it is complete."""
    elsewhere, out = tmp_path / "sweep" / "seed=0", tmp_path / "sweep"
    words = arguments("--seeds", 0, 1, 2, "--metric", "loss", "--max-steps", 20)
    (out / "broken").touch()
    lock = lock_folder(elsewhere)
    with once((out / "seed=2" / "complete").exists, lambda: ((elsewhere / "complete").touch(), lock.close())):
        message = exit_code(words)
    assert message.startswith("1 of 3 cells are not complete") and "  seed=1: exit status 3: reason: broken" in message
    printed = capfd.readouterr().out
    assert "seed=1 failed: exit status 3: reason: broken\n    line \n    reason: broken\n" in printed
    assert "seed=0  elsewhere" in printed and "seed=0  done" in printed and not fake(0) and len(fake(2)) == 1
    (out / "broken").unlink()
    assert exit_code(words) == 0 and len(fake(1)) == 2 and len(fake(2)) == 1
    with lock_folder(out):
        assert "is in use by another" in exit_code(words)


def test_a_run_of_several_processes(arguments, fake):
    assert exit_code(arguments("--gpus-per-run", 2, "--metric", "loss", "--max-steps", 3)) == 0
    assert sorted(start["rank"] for start in fake(0)) == ["0", "1"]


def test_what_cannot_start_fails_and_a_full_disk_is_named(cells, fake, tmp_path, monkeypatch):
    made, stop = cells("--seeds", 0, 1), types.SimpleNamespace(signal=0)

    def full(*anything):
        raise OSError("no space left")

    monkeypatch.setattr(sweep, "write_result", full)
    monkeypatch.setattr(
        sweep, "start", lambda cell, options, start=sweep.start: full() if cell is made[0] else start(cell, options)
    )
    sweep.run_all(made, options(), [{}], stop, lambda cells: None)
    assert [(cell.state, cell.reason) for cell in made] == [("failed", "no space left"), ("done", "")]
    assert exit_code([f"--out={tmp_path / 'sweep'}", *made[1].words[:-1], "--metric", "loss"]) == "error: no space left"


def test_the_table_on_a_terminal(cells):
    first, second = cells("--seeds", 0, 1)
    second.state = "running"
    second.folder.mkdir(parents=True)
    (second.folder / "metrics.jsonl").write_text('{"step": 15, "seconds": 30.0, "loss": 0.25}\n')
    console = Console(file=StringIO(), force_terminal=True, width=100, height=20)
    with Live(auto_refresh=False, console=console) as screen:
        sweep.show([first, second], options(metric="loss"), screen, {})
        print("above the table")
    drawn = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", console.file.getvalue())
    assert "1 running, 1 waiting, 105 steps to go, 0:03:30 of training" in drawn and "above the table" in drawn
    rows = [re.split(r"\s*│\s*", line.strip("│ ")) for line in drawn.splitlines() if "│" in line]
    assert rows[-2:] == [["seed=1", "running", "15/60", "0.25"], ["seed=0", "waiting", "0/60"]]


def test_a_real_sweep_fails_in_one_cell_is_interrupted_and_goes_on(arguments, tmp_path, monkeypatch, capfd):
    """The run that was stopped and resumed equals one that was not, and the heat map agrees with the logs."""
    monkeypatch.setitem(sweep.POLL, "local", 0.2)
    out, words = tmp_path / "sweep", [*GRID[:5], 1, *GRID[7:]]
    command = arguments(*words, "--jobs", 2, steps=45)
    first, foreign = (out / f"align_depth=1,chunk_size={size},seed=0" for size in (1, 4))
    foreign.mkdir(parents=True)
    config.save(dataclasses.replace(config.Config(), lr=0.7), foreign / "config.yaml")
    with once(lambda: len(read_lines(first / "metrics.jsonl")) > 3, lambda: interrupt(signal.SIGINT)):
        assert exit_code(command) == 130
    stopped_at = load_file(first / "last.pt")["step"]
    assert 8 <= stopped_at < 45  # saved, although no checkpoint was due

    message = exit_code(command)
    assert "1 of 2 cells are not complete" in message and f"{foreign.name}: exit status 1" in message
    assert "lr: 0.7 -> 0.001" in capfd.readouterr().out  # the end of its log
    assert [line["from_step"] for line in read_lines(first / "environment.jsonl")] == [0, stopped_at]
    assert "failed" in (out / "sweep.md").read_text()

    train_repa_dar.main([*sweep.make_cells(*parsed(command))[0].words[:-1], f"--out={tmp_path / 'whole'}"])
    resumed, whole = (
        [
            {key: value for key, value in line.items() if "second" not in key}
            for line in read_lines(path / "metrics.jsonl")
        ]
        for path in (first, tmp_path / "whole")
    )
    assert resumed == whole

    before = {path: path.read_bytes() for path in first.glob("*.*")}
    shutil.rmtree(foreign)  # once the cause is gone only that cell is run
    assert exit_code(command) == 0
    assert before == {path: path.read_bytes() for path in before}
    (grid,) = json.loads((out / "sweep.json").read_text())["maps"]
    for entry, folder in zip(grid["metric"][0], (first, foreign)):
        logged = [
            line["frechet_distance"] for line in read_lines(folder / "metrics.jsonl") if "frechet_distance" in line
        ]
        assert len(logged) == 3 and entry["mean"] == logged[-1]


def parsed(words):
    return tyro.cli(sweep.Options, args=words, return_unknown_args=True)


# ---- Slurm ----

SLURM = options(cluster="slurm", slurm=("time=90", "partition=fast", "mem_gb=3"))


def test_jobs_run_by_submitit(cells, fake, tmp_path):
    """In submitit's executor for debugging, which runs each job in this process when it is asked for its state."""
    (tmp_path / "sweep" / "broken").touch()
    made = cells("--seeds", 0, 1, "--max-steps", 3)
    debug = options(cluster="debug", slurm=("time=5",))
    sweep.run_all(made, debug, [{}], types.SimpleNamespace(signal=0), lambda cells: None)
    assert [(cell.state, cell.reason) for cell in made] == [("done", ""), ("failed", "exit status 3: reason: broken")]
    with pytest.raises(ValueError, match="colour"):
        sweep.make_executor(dataclasses.replace(debug, slurm=("time=5", "colour=red")), tmp_path)


def test_a_cancelled_job_saves_and_leaves_the_rest_to_slurm(cells, fake, tmp_path, monkeypatch):
    """A job that ended would be over for Slurm, which may be about to queue it again."""
    (cell,) = cells("--max-steps", 2000)
    monkeypatch.setattr(sweep, "LINGER", 0.7)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    (tmp_path / "sweep" / "seed=0").mkdir()
    job = sweep.Command([sys.executable, str(sweep.TRAINER), *cell.words], os.devnull, {"OMP_NUM_THREADS": "1"})
    ended, saved = [], cell.folder / "saved"
    with once(
        lambda: fake(0), lambda: (interrupt(signal.SIGTERM), wait_for(saved.exists), ended.append(time.monotonic()))
    ):
        assert job() == 143
    assert time.monotonic() - ended[0] > 0.4 and fake(0)[0]["ignored"]


def test_a_job_whose_time_is_up_is_saved_queued_again_and_goes_on(cells, fake, tmp_path):
    """By submitit's executor for this machine, which starts such a job again."""
    (cell,) = cells()
    cell.folder.mkdir()
    executor = submitit.LocalExecutor(tmp_path / "job")
    executor.update_parameters(timeout_min=5)
    arguments = [sys.executable, str(sweep.TRAINER), *cell.words, "--max-steps=250"], str(cell.folder / "log"), {}
    cloudpickle.register_pickle_by_value(sweep)  # as where sweep.py is the main program
    job = executor.submit(sweep.Command(*arguments))
    cloudpickle.unregister_pickle_by_value(sweep)
    wait_for(lambda: fake(0))
    time.sleep(0.2)
    os.kill(fake(0)[0]["parent"], signal.SIGUSR2)
    assert job.result() == 0
    assert [start["from"] > 0 for start in fake(0)] == [False, True]


def test_slurm_jobs_outlive_the_sweep_and_are_cancelled(cells, fake, monkeypatch):
    """With submitit's stand-ins for Slurm's commands."""
    (cell,), calls = cells(), []
    cell.folder.mkdir()
    with mocked_slurm() as slurm:

        def cancel(job, check):
            calls.append(job.job_id)
            slurm.set_job_state(job.job_id, "CANCELLED")

        monkeypatch.setattr(submitit.SlurmJob, "cancel", cancel)
        assert sweep.make_places(SLURM, 5) == [{}] * 5
        cell.place = {}
        sweep.start(cell, SLURM)  # and then the login node reboots
        script = next((cell.folder / "job").glob("*.sh")).read_text()
        for flag in ("time=90", "partition=fast", "mem=3GB", "gpus-per-node=1", "job-name=somewhere"):
            assert f"#SBATCH --{flag}\n" in script

        (again,), stop = cells(), types.SimpleNamespace(signal=0)
        assert sweep.earlier_job(again, SLURM).job_id == cell.job.job_id
        states = []

        def show(cells):
            states.append(again.state)
            stop.signal = signal.SIGINT

        began = time.monotonic()
        sweep.run_all([again], SLURM, [{}], stop, show)
        assert time.monotonic() - began < 10  # it does not wait for a result that will not come
        assert states[0] == "running" and (again.state, again.reason) == ("stopped", "by a signal")
        assert calls == [cell.job.job_id] and slurm.job_count == int(cell.job.job_id) + 1  # not sent again
        assert sweep.earlier_job(again, SLURM) is None


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
    sweep.run_all(made, options(), [{}], types.SimpleNamespace(signal=0), lambda cells: None)
    assert most == [1, 1] and {cell.state for cell in made} == {"done"}


# ---- the heat map ----


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
    assert written(made, tmp_path / "max", "max", 6.0)[0][1] == [["2", ">100", "<50", "75"]]


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


@pytest.mark.parametrize("goal, target, steps", [("min", 4.0, [90, 50]), ("max", 8.0, [50, 90])])
def test_the_default_target_is_reached_by_every_run(tmp_path, goal, target, steps):
    curves = {1: [(50, 8.0), (100, 3.0)], 2: [(50, 4.0), (100, 9.0)]}
    made = [made_cell(tmp_path, points, 2, chunk) for chunk, points in curves.items()]
    result = heatmap.summarise(made, "frechet_distance", goal)
    assert result["target"] == target
    assert [cell["bound"] for cell in result["cells"]] == ["", ""]  # one is there at its first point, exactly
    assert [cell["steps_to_target"] for cell in result["cells"]] == pytest.approx(steps)


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
    "model, depth, blocks, marked, low, high",
    [
        ("SiT-S/2", None, 12, 4, 2.449, 3.207),
        ("SiT-B/2", None, 12, 4, 2.449, 3.207),
        ("SiT-L/2", None, 24, 8, 3.464, 4.536),
        ("SiT-XL/2", None, 28, 8, 3.742, 4.899),
        ("SiT-XL/2", 50, 28, 8, 5.0, 6.547),
        ("SiT-Plus/2", None, 28, 8, 3.742, 4.899),
    ],
)
def test_the_marks(tmp_path, model, depth, blocks, marked, low, high):
    """Prop. 1, sqrt(L (1 - a) / (1 + a)) for a = 0.6 and 0.4 with L = 2 x depth, worked out by hand; REPA's depths."""
    others = dict(model=model, depth=depth)
    made = [made_cell(tmp_path, [(100, 1.0)], k, s, others=others) for k in (4, 8) for s in (1, 4, 8)]
    _, text, result = written(made, tmp_path)
    (grid,) = result["maps"]
    assert grid["optimal_chunk_size"] == pytest.approx([low, high], abs=1e-3) and grid["repa_depth"] == marked
    assert f"| {marked} (REPA) |" in text and text.count("(REPA)") == 2
    assert ("chunk size 4 (S*)" in text) == (low <= 4 <= high) and "chunk size 8 (S*)" not in text
    assert (
        f"S* of Prop. 1 for {2 * (depth or blocks)} sublayers is {low:.1f} at alpha = 0.6 and {high:.1f} at alpha = "
        f"0.4. REPA aligns {model}, of {blocks} blocks, after block {marked}."
    ) in text


def test_the_picture_shows_the_values_and_the_marks(tmp_path):
    """The drawn arrays are the means, and the band of S* lies between the columns of 2 and 4, even in log2."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = [made_cell(tmp_path, [(100, float(k * s))], k, s) for k in (2, 4) for s in (1, 2, 4)]
    grid = heatmap.summarise(made, "frechet_distance", target=6)["maps"][0]
    figure, panel = plt.subplots()
    values = np.array([[2.0, 4, 8], [4, 8, 16]])
    heatmap.draw_map(panel, grid, grid["metric"], values, "viridis", {})
    assert [text.get_text() for text in panel.texts[:6]] == ["2", "4", "8", "4", "8", "16"]
    assert np.array_equal(panel.images[0].get_array(), values) and panel.images[0].origin == "lower"
    positions = [text.get_position() for text in panel.texts[:6]]
    assert positions == [(column, row) for row in (0, 1) for column in (0, 1, 2)]
    band, row = panel.patches
    left, right = np.log2(math.sqrt(24 * 0.4 / 1.6)), np.log2(math.sqrt(24 * 0.6 / 1.4))
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((left, right))
    assert row.get_y() < 1 < row.get_y() + row.get_height() and row.get_y() > 0.5
    plt.close(figure)


def test_numbers_have_four_digits_and_steps_all_of_theirs():
    values = (0.123456, 31.0, 9998.4, 12345.6, 400_000.4, -12345.6)
    assert [heatmap.number(value) for value in values] == ["0.1235", "31", "9998", "12346", "400000", "-12346"]


@pytest.mark.parametrize("goal, colours, sign", [("min", "viridis", 1), ("max", "viridis_r", -1)])
def test_the_picture_is_of_means_in_one_scale_and_dark_is_good(tmp_path, monkeypatch, goal, colours, sign):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    made = [
        made_cell(tmp_path, [(50, 60.0 * sign), (100, sign * (size * s + 3.0 * seed))], 2, s, seed, query=query)
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
    for drawn, expected, name in ((images[::2], lasts, colours), (images[1::2], steps, "viridis")):
        for image, values in zip(drawn, expected):
            np.testing.assert_allclose(image.get_array(), values)
            assert image.get_clim() == pytest.approx((np.min(expected), np.max(expected)))
            assert image.get_cmap().name == name

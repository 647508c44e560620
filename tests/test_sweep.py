"""The sweep: which cells it makes, and whole sweeps that fail, stop and go on."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import threading
import time
import types
from io import StringIO

import cloudpickle
import pytest
import submitit
import torch
import tyro
from rich.console import Console
from rich.live import Live
from submitit.slurm.test_slurm import mocked_slurm

import config
import sweep
import train_repa_dar
from runtime import lock_folder
from tests.conftest import read_lines
from tests.test_trainer import wait_for
from weights import FORMAT

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
        settings = cell.config.align_depth[0], cell.config.chunk_size, cell.config.seed
        assert cell.name == "align_depth={},chunk_size={},seed={}".format(*settings)
        # What is run is the user's own command: the trainer reads the same from it.
        assert config.parse(cell.words) == cell.config


def test_options_without_effect_create_no_extra_runs(cells):
    """Residual routing has no chunks, and without alignment there is no depth: each combination once."""
    words = "--routing residual dar --alignment none repa --chunk-size 1 4 --query static dynamic --align-depth 1 2"
    made, expected = cells(*words.split()), {("residual", "none")} | {("residual", "repa", k) for k in (1, 2)}
    routers = [(s, q) for s in (1, 4) for q in ("static", "dynamic")]
    expected |= {("dar", "none", s, q) for s, q in routers} | {
        ("dar", "repa", s, q, k) for s, q in routers for k in (1, 2)
    }
    assert len(made) == len({cell.name for cell in made}) == len(expected)
    residual = [cell for cell in made if cell.config.routing == "residual"]
    assert all("chunk_size" not in cell.name and "query" not in cell.name for cell in residual)
    # What has no effect stays the preset's, whichever values the rest of the sweep has.
    assert {(cell.config.chunk_size, cell.config.query) for cell in residual} == {(4, "timestep")}
    # And whether the sweep has one of them or several, so that another may be added later.
    one, several = (cells("--routing", "residual", "dar", "--chunk-size", *sizes) for sizes in ([2], [2, 4]))
    assert one[0] == several[0] and one[0].config.chunk_size == 4 and one[1].config.chunk_size == 2
    assert len(cells("--lr", "1e-3", "0.001", "1e-03", "--seeds", 0, 0)) == 1  # a value that is given twice


def test_commas_join_the_values_of_one_cell(cells):
    words = "--routing dar --alignment repa --align-depth 1 1,2 --betas 0.9,0.99 0.8,0.95"
    made = cells(*words.split())
    pairs = [((1,), (0.9, 0.99)), ((1,), (0.8, 0.95)), ((1, 2), (0.9, 0.99)), ((1, 2), (0.8, 0.95))]
    assert [(cell.config.align_depth, cell.config.betas) for cell in made] == pairs
    assert made[2].name == "align_depth=1+2,chunk_size=4,betas=0.9+0.99,seed=0"


@pytest.mark.parametrize(
    "extra, message",
    [
        ("--chunk-size 1 0", "chunk_size = 0: must be at least 1"),
        ("--chunk-size 1 5 --routing dar", "chunk_size = 5 is not between 1 and the 4 sublayers"),
        ("--model SiT-S/2 SiT-M/2", "'SiT-M/2' is unknown"),
        ("stray", "'stray' belongs to no option"),
        ("--eval-every 0", "'frechet_distance' is not logged with eval_every = 0 .*give --metric loss"),
        ("--eval-encoder inception", "'frechet_distance' is not logged with .*give --metric fid"),
        (
            "--alignment repa --align-depth 1 --eval-encoder a --encoder a",
            "is not logged with .*give --metric frechet_distance_aligned",
        ),
        ("--data nowhere", "nowhere.*is not a prepared folder"),  # not one cell has to start to find that out
        ("--gpus-per-run 3", "batch_size = 8 cannot be shared evenly.* 3"),
        ("--cluster slurm --slurm time=5", "srun"),
        ("--cluster slurm", "--slurm time=: give the limit"),
        ("--cluster slurm --slurm time=24:00:00", "whole minutes"),
        # What tyro cannot read.
        ("--routing dar sum", "sum"),
        ("--betas 0.9 0.999", "commas join a list"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(arguments, tmp_path, capsys, extra, message):
    code = exit_code(arguments(*extra.split()) if extra != "stray" else ["stray", *arguments()])
    assert code == 2 or code.startswith("error: ")
    assert re.search(message, str(code) + capsys.readouterr().err, re.DOTALL)
    assert not (tmp_path / "sweep").exists()


def exit_code(words):
    """What the sweep exits with, a number or a message; 0 where it returns."""
    try:
        sweep.main(words)
    except SystemExit as stop:
        return stop.code
    return 0


def test_metrics_that_will_be_logged_are_allowed(cells):
    (cell,) = cells("--eval-encoder", "a,inception")
    for metric in ("fid", "fid_5000", "frechet_distance", "loss"):
        sweep.check([cell], options(metric=metric))


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
        (2, None, {"jobs": 5}, ["0", "1", "0", "1", "0"]),
        (5, None, {"jobs": 3, "gpus_per_run": 2}, ["0,1", "2,3", "0,1"]),
        (4, None, {"gpus_per_run": 8}, "gpus_per_run = 8: this machine has 4 GPUs"),
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


def test_every_core_takes_a_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    for jobs, each, cells, count in ((None, 1, 100, 12), (None, 5, 100, 2), (None, 1, 4, 4), (3, 1, 100, 3)):
        places = sweep.make_places(options(jobs=jobs, gpus_per_run=each), cells)
        assert places == [{"OMP_NUM_THREADS": "1"}] * count
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert sweep.make_places(options(), 1) == [{"OMP_NUM_THREADS": "3"}]


# ---- what is there already ----


def test_dry_run_writes_nothing_and_says_what_is_left(arguments, cells, tmp_path, capsys):
    cores = min(8, len(os.sched_getaffinity(0)))
    sweep.main(arguments(*GRID, "--seeds", 0, 1, "--dry-run"))
    assert f"8 cells: 8 waiting, {8 * STEPS} steps to go; {cores} at a time on local" in capsys.readouterr().out
    assert not (tmp_path / "sweep").exists()

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
    for change in ({}, {"step": STEPS + 5}, {"config": settings | {"num_workers": 7}}):
        save_checkpoint(cell, **change)
        assert sweep.complete(cell), change
    for change in (
        {"step": STEPS - 1},
        {"evaluation_due": True},
        {"config": settings | {"lr": 7.0}},
        {"config": settings | {"of_a_later_version": 7}},
        {"format": FORMAT - 1},
        {"format": FORMAT + 1},
        {"diagnosis_due": True},
    ):
        save_checkpoint(cell, **change)
        assert not sweep.complete(cell), change
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
start |= {"threads": os.environ["OMP_NUM_THREADS"]}
start |= {"ignored": signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN}
with open(out / "starts", "a") as file:
    file.write(json.dumps(start) + chr(10))
while step < int(words["max-steps"]):
    step += 1
    (out / "metrics.jsonl").write_text(json.dumps({"step": step, "seconds": step / 8, "loss": 1 / step}) + chr(10))
    print(f" {step} 9.1step/s", end=chr(13), flush=True)
    if (out.parent / "broken").exists() and out.name.endswith("seed=1"):
        print("line", "\\nreason: broken", file=sys.stderr)
        sys.exit(int((out.parent / "broken").read_text()))
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
    handler = signal.signal(signal.SIGTERM, lambda *anything: None)  # one that comes too late must not end the tests
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


def test_a_signal_saves_all_running_cells_and_the_same_command_goes_on(arguments, fake, capfd):
    words = arguments("--seeds", 0, 1, 2, "--jobs", 2, "--metric", "loss", "--max-steps", 2000)
    with once(lambda: fake(0) and fake(1), lambda: (time.sleep(0.2), interrupt(signal.SIGTERM))):
        assert exit_code(words) == 128 + signal.SIGTERM
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
    (out / "broken").write_text("3")
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


def test_a_run_of_several_processes(cells, monkeypatch):
    (cell,), calls = cells("--eval-every", 0), []
    cell.place = {"CUDA_VISIBLE_DEVICES": "4,5"}
    monkeypatch.setattr(sweep, "Process", lambda *arguments: calls.append(arguments))
    sweep.start(cell, options(gpus_per_run=2))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(sweep.TRAINER)]
    sweep.start(cell, options())
    alone = [sys.executable, str(sweep.TRAINER)]
    assert calls == [([*words, *cell.words], str(cell.folder / "log"), cell.place) for words in (launch, alone)]


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
    assert "1 running, 1 waiting, 105 steps to go, " in drawn and "above the table" in drawn
    rows = [re.split(r"\s*│\s*", line.strip("│ ")) for line in drawn.splitlines() if "│" in line]
    assert rows[-2:] == [["seed=1", "running", "15/60", "0.25"], ["seed=0", "waiting", "0/60"]]


def test_a_real_run(arguments, tmp_path, monkeypatch):
    """It is the run of the trainer alone, the heat map agrees with its log, and then it is complete."""
    monkeypatch.setitem(sweep.POLL, "local", 0.2)
    command = arguments(*GRID[:5], 1, *GRID[7:9], steps=6)
    assert exit_code(command) == 0
    options, words = tyro.cli(sweep.Options, args=command, return_unknown_args=True)
    (cell,), alone = sweep.make_cells(options, words), tmp_path / "alone"
    train_repa_dar.main([*cell.words[:-1], f"--out={alone}"])
    ours, alone = (read_lines(folder / "metrics.jsonl") for folder in (cell.folder, alone))
    for line, other in zip(ours, alone, strict=True):
        assert all(line[key] == other[key] for key in line | other if "second" not in key)
    (grid,) = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["maps"]
    distances = [line["frechet_distance"] for line in alone if "frechet_distance" in line]
    assert len(distances) == 3 and grid["metric"][0][0]["mean"] == distances[-1]
    assert sweep.complete(cell)


# ---- Slurm ----

SLURM = options(cluster="slurm", slurm=("time=90", "partition=fast", "mem_gb=3"))


def test_jobs_run_by_submitit(cells, fake, tmp_path):
    """In submitit's executor for debugging, which runs each job in this process when it is asked for its state."""
    (tmp_path / "sweep" / "broken").write_text("3")
    made = cells("--seeds", 0, 1, "--max-steps", 3)
    debug = options(cluster="debug", slurm=("time=5",))
    sweep.run_all(made, debug, [{"OMP_NUM_THREADS": "3"}], types.SimpleNamespace(signal=0), lambda cells: None)
    assert [(cell.state, cell.reason) for cell in made] == [("done", ""), ("failed", "exit status 3: reason: broken")]
    assert fake(0)[0]["threads"] == "3"
    (tmp_path / "sweep" / "broken").write_text("143")  # on a signal that did not come from here
    made[1].state = "waiting"
    sweep.run_all(made, debug, [{}], types.SimpleNamespace(signal=0), lambda cells: None)
    assert (made[1].state, made[1].reason) == ("stopped", "by a signal")
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
    arguments = [sys.executable, str(sweep.TRAINER), *cell.words, "--max-steps=60"], str(cell.folder / "log"), {}
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
    (cell,), calls, forced = cells(), [], []
    cell.folder.mkdir()
    with mocked_slurm() as slurm:

        def cancel(job, check):
            calls.append(job.job_id)
            slurm.set_job_state(job.job_id, "CANCELLED")

        def done(job, force_check=False, original=submitit.SlurmJob.done):
            forced.append(force_check)
            return original(job, force_check)

        monkeypatch.setattr(submitit.SlurmJob, "cancel", cancel)
        monkeypatch.setattr(submitit.SlurmJob, "done", done)
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
        assert forced == [True, True, False, False, True]  # once cancelled, Slurm is asked at once
        assert states[0] == "running" and (again.state, again.reason) == ("stopped", "by a signal")
        assert calls == [cell.job.job_id] and slurm.job_count == int(cell.job.job_id) + 1  # not sent again
        assert sweep.earlier_job(again, SLURM) is None and not (cell.folder / "job").exists()


def test_earlier_jobs_make_no_further_places(cells, fake, monkeypatch):
    """Three of five still run from a command without --jobs; from now on it is to be one at a time."""
    made, most = cells("--seeds", 0, 1, 2, 3, 4), []

    def job():
        looks = iter([False, False, True])
        return types.SimpleNamespace(state="RUNNING", done=lambda force_check: next(looks), result=lambda: 0)

    def start(cell, options):
        cell.job = job()
        most.append(sum(cell.job is not None for cell in made))

    monkeypatch.setattr(sweep, "earlier_job", lambda cell, options: job() if cell.config.seed < 3 else None)
    monkeypatch.setattr(sweep, "start", start)
    sweep.run_all(made, options(), [{}], types.SimpleNamespace(signal=0), lambda cells: None)
    assert most == [1, 1] and {cell.state for cell in made} == {"done"}

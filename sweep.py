"""Trains a grid of runs: alignment depth x chunk size, crossed with any other option of a run.

    python sweep.py --config digits --out sweeps/depth-chunk --routing dar --alignment repa \\
        --align-depth 2 4 6 --chunk-size 1 2 4 8 --seeds 0 1

Every option of train_repa_dar.py (see its --help) takes several values here, and every combination is a cell: a run in
OUT/NAME. Options without effect for a combination create no extra runs. Commas join the values of an option that is a
list: `--align-depth 4 2,6` makes two cells, the second aligned after two blocks. The cells run side by side on the GPUs
of this machine, on its CPU cores where it has none, or on Slurm. Giving the same command again resumes the sweep. It
writes OUT/sweep.png, sweep.md and sweep.json whenever a cell is complete.
"""

import contextlib
import functools
import itertools
import json
import operator
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import submitit
import torch
import tyro
from rich.console import Group
from rich.live import Live
from rich.table import Table

import config as configuration
from analysis.convergence import shown
from analysis.heatmap import AXES, blocks, write_result
from dataset.prepared import PreparedImages
from models.dar import source_plan
from runtime import InUse, Stop, lock_folder, parsed, plain_errors
from weights import is_ours, load_file

TRAINER = Path(__file__).resolve().with_name("train_repa_dar.py")
REQUEUES = 1000  # a run that needs many time slots is queued again for each
LINGER = 300  # seconds that a stopped job leaves to Slurm to requeue or end it
POLL = {"local": 1.0, "slurm": 5.0}  # seconds between two looks at the running cells
ORDER = ("running", "failed", "stopped", "queued", "elsewhere", "waiting", "done")  # of the rows of the table


@dataclass(frozen=True)
class Options:
    out: str
    """Folder of the sweep."""
    config: str = "digits"
    """Preset, or YAML file, of all cells."""
    metric: str = "frechet_distance"
    """What the heat map shows: any number in metrics.jsonl."""
    goal: Literal["min", "max"] = "min"
    """Whether the metric is better when small or when large."""
    target: float | None = None
    """Value whose first crossing is timed; if not given, the best of the worst cell, which all cells reach."""
    jobs: int | None = None
    """Cells at a time; if not given, as many as the GPUs or the CPU cores take, all of them on Slurm. More than that
    share the GPUs: small models leave one mostly idle, but their seconds then mean nothing."""
    gpus_per_run: int = 1
    """GPUs of each run; on a machine without any, its processes."""
    cluster: Literal["local", "slurm"] = "local"
    """Where the cells run."""
    slurm: tuple[str, ...] = ()
    """NAME=VALUE for submitit's Slurm executor: time=MINUTES (required), partition=NAME, mem_gb=64, ..."""
    dry_run: bool = False
    """Print the cells and their steps to go, and write nothing."""


@dataclass
class Cell:
    """One run. `settings`: the options that tell it from the others, and the seed. `words`: the trainer's command."""

    name: str
    folder: Path
    config: configuration.Config
    settings: dict
    words: list
    state: str = "waiting"  # any of ORDER; elsewhere: another command is running it
    reason: str = ""
    job: Any = None
    place: dict | None = None  # environment variables of the place that it takes


def main(argv: list[str] | None = None):
    form = dict(prog="sweep.py", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    options, words = tyro.cli(Options, args=argv, return_unknown_args=True, **form)
    with plain_errors(ValueError):
        cells = make_cells(options, words)
        check(cells, options)
        places = make_places(options, len(cells))
        for cell in cells:
            cell.state = "done" if complete(cell) else "waiting"
        if options.dry_run:
            rows, left = view(cells, options.metric)
            total = f"{len(cells)} cells: {left}; {len(places)} at a time on {options.cluster}"
            print(*("  ".join(row) for row in rows), total, sep="\n")
            return
        lock = lock_folder(Path(options.out))
    screen = Live(auto_refresh=False) if sys.stdout.isatty() else None
    with lock, screen or contextlib.nullcontext(), Stop("stopping: the running cells are saved first") as stop:
        run_all(cells, options, places, stop, functools.partial(show, options=options, screen=screen, told={}))
    with plain_errors(OSError):
        print(write_result(cells, options.out, options.metric, options.goal, options.target))
    if stop.signal:
        print("stopped; the same command resumes the sweep")
        raise SystemExit(128 + stop.signal)
    if missing := [f"\n  {cell.name}: {cell.reason}" for cell in cells if cell.state != "done"]:
        head = f"{len(missing)} of {len(cells)} cells are not complete; the same command tries them again:"
        raise SystemExit(head + "".join(missing))


# ---- the cells ----


def make_cells(options: Options, words: list[str]) -> list[Cell]:
    """One cell for each combination of the given values, all cells of one seed before those of the next.

    Raises ValueError on an unknown option or a value out of range; tyro exits on what it cannot read.
    """
    values = values_by_key(words)
    values = {key: values[key] for key in sorted(values, key=lambda key: key != "seed")}
    varied = [key for key, given in values.items() if len(given) > 1 and key != "seed"]
    preset, cells = resolve(trainer_words(options, {})), {}
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination))
        config = resolve(trainer_words(options, chosen))
        unread = configuration.idle(asdict(config))
        settings = {key: getattr(config, key) for key in [*AXES, *varied, "seed"] if key not in unread}
        name = configuration.folder_name(settings)
        folder = Path(options.out) / name
        # What has no effect stays as in the preset, so that a run does not depend on the other cells of its sweep.
        config = replace(config, out=str(folder), **{key: getattr(preset, key) for key in unread})
        line = trainer_words(options, {key: word for key, word in chosen.items() if key not in unread})
        cells.setdefault(name, Cell(name, folder, config, settings, [*line, f"--out={folder}"]))
    return list(cells.values())


def values_by_key(words):
    """The words of the command line by the option they follow, {key: [word, ...]}; [None] for a switch."""
    values = {}
    for word in words:
        option, equals, value = word.partition("=")
        if word.startswith("--"):
            key = "seed" if option == "--seeds" else option[2:].replace("-", "_")
            if key in values:
                raise ValueError(f"{option} is given twice; give all its values at once")
            values[key] = [value] if equals else []
        elif values:
            values[key].append(word)
        else:
            raise ValueError(f"{word!r} belongs to no option")
    return {key: given or [None] for key, given in values.items()}


def trainer_words(options, chosen):
    """The trainer's command line for {key: word}; commas join the values of an option that is a list."""
    words = ["--config", options.config]
    for key, word in chosen.items():
        name, several = f"--{key.replace('_', '-')}", isinstance(configuration.DEFAULTS.get(key), tuple)
        words += [name] if word is None else [name, *word.split(",")] if several else [f"{name}={word}"]
    return words


def resolve(words):
    try:
        return configuration.resolve(words)
    except SystemExit:  # tyro has printed what it cannot read, but knows nothing of cells
        print("note: each word is the value of one cell; commas join a list, as in --betas 0.9,0.999", file=sys.stderr)
        raise


def check(cells: list[Cell], options: Options):
    """Raises ValueError for what would make a cell fail only when its turn comes."""
    for data, autoencoder in {(cell.config.data, cell.config.autoencoder) for cell in cells}:
        PreparedImages(data, images=autoencoder == "pixels")
    for cell in cells:
        config, depth, each = cell.config, blocks(cell.config), options.gpus_per_run
        if "chunk_size" in cell.settings:
            source_plan(2 * depth, config.chunk_size)
        if "align_depth" in cell.settings and max(config.align_depth) > depth:
            raise ValueError(f"align_depth = {shown(config.align_depth)}: the model has only {depth} blocks")
        if config.batch_size % each:
            raise ValueError(f"batch_size = {config.batch_size} cannot be shared evenly among gpus_per_run = {each}")
        judges, aligned = set(config.eval_encoder) if config.eval_every else set(), set(config.encoder)
        logged = {"fid": judges & {"inception"}, "frechet_distance": judges - {"inception"} - aligned}
        logged |= {"frechet_distance_aligned": judges & aligned}
        if logged.get(options.metric.removesuffix("_5000").removesuffix("_10000")) == set():
            there = " or ".join(name for name in logged if logged[name]) or "loss"
            judges = f"eval_every = {config.eval_every} and eval_encoder = {shown(config.eval_encoder)}"
            raise ValueError(f"metric = {options.metric!r} is not logged with {judges}; give --metric {there}")


def complete(cell: Cell) -> bool:
    """Whether the run has ended as this cell wants it. What else is in its folder is for the trainer to judge."""
    try:
        checkpoint = load_file(cell.folder / "last.pt", mmap=True)
    except ValueError:
        return False
    if not is_ours(checkpoint) or checkpoint["step"] < cell.config.max_steps or checkpoint["evaluation_due"]:
        return False
    saved = {key: value for key, value in checkpoint["config"].items() if " " not in key}  # less what is no option
    due = cell.config.diagnose_every and checkpoint["diagnosis_due"]
    return not due and not configuration.differences(asdict(cell.config), saved)


# ---- where they run ----


def make_places(options: Options, count: int) -> list[dict]:
    """The environment of each cell that runs at a time. Raises ValueError where the machine has not that many."""
    each, jobs, gpus = options.gpus_per_run, options.jobs, torch.cuda.device_count()
    if each < 1 or jobs is not None and jobs < 1:
        raise ValueError(f"jobs = {jobs} and gpus_per_run = {each} must be at least 1")
    if options.cluster == "slurm":
        make_executor(options, Path(options.out))
        return [{}] * min(jobs or count, count)
    if options.slurm:
        raise ValueError(f"slurm = {' '.join(options.slurm)!r} is only read with --cluster slurm")
    if not gpus:
        jobs = jobs or max(1, len(os.sched_getaffinity(0)) // each)
        # At sizes that a CPU can train, more threads mostly wait for each other.
        return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}] * min(jobs, count)
    if each > gpus:
        raise ValueError(f"gpus_per_run = {each}: this machine has {gpus} GPUs")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[:gpus]
    names = visible if len(visible) == gpus and all(visible) else [str(i) for i in range(gpus)]
    shares = [",".join(names[i : i + each]) for i in range(0, gpus - each + 1, each)]
    places = itertools.islice(itertools.cycle(shares), min(jobs or len(shares), count))
    return [{"CUDA_VISIBLE_DEVICES": share} for share in places]


def make_executor(options: Options, folder: Path) -> submitit.Executor:
    """submitit's executor for one cell. Raises ValueError on parameters that it does not know, and without Slurm."""
    given = dict(word.partition("=")[::2] for word in options.slurm)
    if not (minutes := given.get("time", "")).isdigit():
        rest = "a run that needs longer is saved, queued again and goes on"
        raise ValueError(f"--slurm time={minutes}: give the limit of a job in whole minutes, as time=1440; {rest}")
    parameters = {"name": Path(options.out).name, "tasks_per_node": 1}
    if not given.keys() & {"gres", "gpus_per_node", "gpus_per_task"}:
        parameters["gpus_per_node"] = options.gpus_per_run
    for name, value in given.items():
        with contextlib.suppress(ValueError):
            value = json.loads(value)  # a number, if it is one
        parameters[f"slurm_{name}"] = value
    try:
        executor = submitit.AutoExecutor(folder, cluster=options.cluster, slurm_max_num_timeout=REQUEUES)
        executor.update_parameters(**parameters)
    except (RuntimeError, NameError) as error:
        raise ValueError(f"cluster = {options.cluster!r}, slurm = {' '.join(options.slurm)!r}: {error}") from None
    return executor


class Process(subprocess.Popen):
    """The trainer of one cell, with the methods of submitit's jobs. Its output goes to the cell's log."""

    state, result = "RUNNING", subprocess.Popen.wait

    def __init__(self, words, log, environment):
        quiet = functools.partial(signal.signal, signal.SIGUSR2, signal.SIG_IGN)  # Slurm may send it to all processes
        with open(log, "ab") as file:
            # In a session of its own, so that a Ctrl-C in the terminal reaches it only once, from here.
            streams = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
            super().__init__(words, env={**os.environ, **environment}, preexec_fn=quiet, **streams)

    def done(self, force_check=False):
        return self.poll() is not None

    def cancel(self, check=True):
        self.terminate()  # the trainer saves


class Command:
    """What a Slurm job runs: the trainer, which resumes. It is pickled, hence built from plain values."""

    def __init__(self, *words_log_environment):
        self.arguments, self.process, self.stopping = words_log_environment, None, False

    def __call__(self) -> int:
        """Returns the exit status."""
        signal.signal(signal.SIGTERM, self.stop)
        self.process = Process(*self.arguments)
        if self.stopping:
            self.stop()
        self.wait()
        if self.stopping and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            # Cancelled, or preempted and then to be queued again: only Slurm knows. A job that ended would be over.
            time.sleep(LINGER)
        return self.process.wait()

    def stop(self, *_):
        self.stopping = True
        if self.process:
            self.process.terminate()

    def wait(self):
        """Unlike Popen.wait, this may be called by a signal handler that has interrupted it."""
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

    def checkpoint(self):
        """submitit calls this before the time limit and on preemption, and queues what is returned."""
        if self.process:
            self.stop()
            self.wait()
        return submitit.helpers.DelayedSubmission(Command(*self.arguments))


def start(cell: Cell, options: Options):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.gpus_per_run}"]
    words = [sys.executable, *(launch if options.gpus_per_run > 1 else []), str(TRAINER), *cell.words]
    arguments = words, str((cell.folder / "log").resolve()), cell.place
    if options.cluster == "local":
        cell.job = Process(*arguments)
        return
    shutil.rmtree(cell.folder / "job", ignore_errors=True)  # of a sweep that was killed
    with submitit.helpers.clean_env():
        cell.job = make_executor(options, cell.folder / "job").submit(Command(*arguments))


def earlier_job(cell: Cell, options: Options):
    """The Slurm job that an earlier command started for this cell, if it may still come to run."""
    paths = (cell.folder / "job").glob("*_submitted.pkl") if options.cluster == "slurm" else ()
    jobs = (submitit.SlurmJob(path.parent, path.name.partition("_")[0]) for path in paths)
    return next((job for job in jobs if not job.done(force_check=True)), None)


# ---- the loop ----


def run_all(cells: list[Cell], options: Options, places: list[dict], stop: Stop, show):
    """Run what is not complete, as many cells at a time as there are places. Returns when nothing runs any more."""
    free, cancelled = list(places), False
    for cell in cells:
        if cell.state == "waiting" and (job := earlier_job(cell, options)):
            cell.job, cell.place = job, free.pop() if free else None  # such jobs may be more than the places
    while True:
        for i, cell in enumerate([cell for cell in cells if cell.job]):
            # Slurm is asked at once where its answer is waited for; one answer is about all jobs.
            if not cell.job.done(force_check=cancelled and i == 0):
                cell.state = "queued" if cell.job.state in ("PENDING", "REQUEUED", "UNKNOWN") else "running"
                continue
            finish(cell, stop)
            free += [] if cell.place is None else [cell.place]
            if cell.state == "failed":
                print(f"{cell.name} failed: {cell.reason}", *log_end(cell), sep="\n    ", flush=True)
            with contextlib.suppress(OSError):  # a full disk must not end the other runs; `main` names it
                write_result(cells, options.out, options.metric, options.goal, options.target)
        if stop.signal and not cancelled:
            cancelled = True
            for job in filter(None, [cell.job for cell in cells]):
                job.cancel(check=False)
        for cell in cells:
            if cell.state in ("waiting", "elsewhere") and free and not stop.signal:
                take_up(cell, free, options)
        show(cells)
        if not any(cell.job or cell.state in ("waiting", "elsewhere") and not stop.signal for cell in cells):
            return
        time.sleep(POLL[options.cluster])


def take_up(cell: Cell, free: list[dict], options: Options):
    """Start a cell in a free place, unless it is complete by now or another command is running it."""
    try:
        lock_folder(cell.folder).close()
        cell.state = "done" if complete(cell) else "running"
        if cell.state == "running":
            cell.place = free[0]
            start(cell, options)
            del free[0]
    except (ValueError, OSError, RuntimeError) as error:  # also no space left, or sbatch refuses
        cell.reason = one_line(error)
        cell.state = "elsewhere" if isinstance(error, InUse) else "failed"


def finish(cell: Cell, stop: Stop):
    """The state of a cell whose job has ended."""
    job, cell.job, status = cell.job, None, None
    try:
        status = None if stop.signal else job.result()  # a cancelled job has none, for which submitit would wait
        cell.reason = f"exit status {status}"
    except Exception as error:  # whatever the job raised, in words of submitit
        cell.reason = one_line(error)
    if status == 0 or complete(cell):
        cell.state, cell.reason = "done", ""
    elif stop.signal or status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        cell.state, cell.reason = "stopped", "by a signal"
    else:
        cell.state, cell.reason = "failed", ": ".join([cell.reason, *log_end(cell)[-1:]])
    shutil.rmtree(cell.folder / "job", ignore_errors=True)  # what is there from now on may still come to run


def one_line(error):
    return " ".join(str(error).split())[-300:]


def log_end(cell: Cell) -> list[str]:
    """The last lines that the run printed, without the progress bar that it drew over again."""
    path = cell.folder / "log"
    text = path.read_bytes()[-20_000:].decode(errors="replace") if path.is_file() else ""
    return [line for line in text.splitlines() if line.strip() and "step/s" not in line and "s/step" not in line][-15:]


def show(cells: list[Cell], options: Options, screen: Live | None, told: dict):
    """Draw the cells as a table on a terminal; elsewhere print a line when a cell has a new state or metric."""
    rows, left = view(cells, options.metric)
    if screen:
        table = Table("cell", "state", "step", options.metric)
        for row in sorted(rows, key=lambda row: ORDER.index(row[1])):
            table.add_row(*row)
        screen.update(Group(left, table), refresh=True)
        return
    for name, state, step, metric in rows:
        if (state, metric) != told.get(name, ("waiting", metric)):
            print(name, state, step, metric, sep="  ", flush=True)
        told[name] = state, metric


def view(cells: list[Cell], metric: str) -> tuple[list[tuple], str]:
    """Rows (name, state, step, metric), and what is left, with the time of training at the median speed so far."""
    logs, states = [newest(cell) for cell in cells], [cell.state for cell in cells]
    rows = []
    for cell, log in zip(cells, logs):
        value = f"{log[metric]:.4g}" if metric in log else ""
        rows.append((cell.name, cell.state, f"{log.get('step', 0)}/{cell.config.max_steps}", value))
    left = [max(0, c.config.max_steps - log.get("step", 0)) for c, log in zip(cells, logs) if c.state != "done"]
    paces = [log["seconds"] / log["step"] for log in logs if log.get("step") and "seconds" in log]
    words = [f"{states.count(state)} {state}" for state in ORDER if state in states] + [f"{sum(left)} steps to go"]
    words += [f"{timedelta(seconds=round(np.median(paces) * sum(left)))} of training"] if paces else []
    return rows, ", ".join(words)


def newest(cell: Cell) -> dict:
    """The newest value of everything in the cell's log; {} where there is none."""
    path = cell.folder / "metrics.jsonl"
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))  # the log of a long run is read every second
        lines = file.read().decode(errors="replace").splitlines()  # the first and the last may be cut
    return functools.reduce(operator.or_, map(parsed, lines), {})


if __name__ == "__main__":
    main()

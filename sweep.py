"""The grid of training runs: alignment depth x chunk size, crossed with any other option of a run.

    python sweep.py --config cifar10 --out sweeps/depth-chunk --routing dar --alignment repa \\
        --align-depth 2 4 6 --chunk-size 1 2 4 8 --seeds 0 1

Every option of train_repa_dar.py takes several values here, and every combination is one cell, a run of its own in
OUT/NAME. Where an option is itself a list, commas join it: `--align-depth 4 2,6` is two cells, the second aligned after
two blocks. Runs go on the GPUs of this machine side by side, on a CPU one after the other, or on Slurm. The same
command again goes on. Writes OUT/sweep.png, sweep.md and sweep.json whenever a cell is complete.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import submitit
import torch
import tyro

import config as configuration
from dataset.prepared import PreparedImages
from analysis.convergence import shown
from analysis.heatmap import AXES, blocks, write_result
from models.dar import source_plan
from runtime import load_file, lock_folder

TRAINER = Path(__file__).resolve().with_name("train_repa_dar.py")
NO_LIMIT = 10 * 365 * 24 * 60  # minutes; submitit ends local jobs after two by default
REQUEUES = 1000  # a run that needs many time slots is queued again for each
LINGER = 300  # seconds that a stopped job leaves to Slurm to requeue or end it
POLL = {"local": 1.0, "slurm": 5.0}  # seconds between two looks at the running cells
ORDER = ("running", "failed", "stopped", "queued", "elsewhere", "waiting", "done")  # of what a small terminal shows
LOG_TAIL = 1 << 16  # bytes of metrics.jsonl that a look reads


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
    """Value whose first crossing is timed; if not given, the best of the worst cell, so that every cell has one."""
    jobs: int | None = None
    """Cells at a time; if not given, as many as the GPUs take, one on a CPU, all of them on Slurm."""
    gpus_per_run: int = 1
    """GPUs of each run; on a machine without any, its processes."""
    cluster: Literal["local", "slurm"] = "local"
    """Where the cells run."""
    slurm: tuple[str, ...] = ()
    """NAME=VALUE for submitit's Slurm executor: time=MINUTES (required), partition=NAME, mem_gb=64, ..."""
    dry_run: bool = False
    """Print the cells, their steps and an estimate of their time, and write nothing."""


@dataclass
class Cell:
    """One run. `settings` are the options that tell it from the others, and the seed."""

    name: str
    folder: Path
    config: Any
    settings: dict
    words: list
    state: str = "waiting"  # any of ORDER; elsewhere: some other command runs it
    reason: str = ""
    job: Any = None
    place: Any = None


def main(argv=None):
    description = __doc__ + "\nAll other options: `python train_repa_dar.py --help`."
    options, words = tyro.cli(
        Options,
        args=argv,
        prog="sweep.py",
        description=description,
        return_unknown_args=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        cells = make_cells(options, words)
        check(cells, options)
        places = free_places(options, len(cells))
        if options.dry_run:
            print(forecast(cells, options, len(places)))
            return
        lock = lock_folder(Path(options.out))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    with lock, Stop() as stop:
        run_all(cells, options, places, stop)
        print(write_result(cells, options.out, options.metric, options.goal, options.target))
    if stop.signal:
        print("stopped; the same command goes on from here")
        raise SystemExit(128 + stop.signal)
    incomplete = [cell for cell in cells if cell.state != "done"]
    if incomplete:
        raise SystemExit(
            "\n".join(
                [
                    f"{len(incomplete)} of {len(cells)} cells are not complete; the same command tries them again:",
                    *(f"  {cell.name}: {cell.reason}" for cell in incomplete),
                ]
            )
        )


# ---- the cells ----


def make_cells(options, words):
    """One cell for every combination of the given values that something in its run tells from the others.

    Raises ValueError on an unknown option or a wrong value; tyro exits on what it cannot read.
    """
    values = values_by_key(words)
    values.setdefault("seed", [])
    fixed = {key: given for key, given in values.items() if len(given) < 2 and (given or key != "seed")}
    varied = {key: given for key, given in values.items() if len(given) > 1}
    varied = {key: varied[key] for key in sorted(varied, key=lambda key: key != "seed")}  # a whole seed comes first
    cells = {}
    for combination in itertools.product(*varied.values()):
        chosen = {**fixed, **{key: [word] for key, word in zip(varied, combination)}}
        # What nothing reads stays as in the preset, so that a run does not depend on the other cells of its sweep.
        unread = configuration.idle(dataclasses.asdict(resolve(options, chosen)))
        chosen = {key: given for key, given in chosen.items() if key not in unread}
        config = resolve(options, chosen)
        named = [key for key in dict.fromkeys([*AXES, *varied, "seed"]) if key not in unread and key != "seed"]
        settings = {key: getattr(config, key) for key in [*named, "seed"]}
        name = cell_name(settings)
        folder = Path(options.out) / name
        line = ["--config", options.config, *(word for key, given in chosen.items() for word in as_option(key, given))]
        cells.setdefault(name, Cell(name, folder, config, settings, [*line, f"--out={folder}"]))
    return list(cells.values())


def values_by_key(words):
    """The words of the command line by the option they follow, {key: [word, ...]}."""
    values = {}
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            key = "seed" if option == "--seeds" else option[2:].replace("-", "_")
            if key in values:
                raise ValueError(f"{option} is given twice; give all its values at once")
            values[key] = [value] if equals else []
        elif values:
            values[next(reversed(values))].append(word)
        else:
            raise ValueError(f"{word!r} belongs to no option")
    return values


def as_option(key, given):
    """The trainer's words for no value or one; of a list, commas join the values of one cell."""
    name = f"--{key.replace('_', '-')}"
    several = isinstance(getattr(configuration.Config, key, None), tuple)
    return [name, *given[0].split(",")] if given and several else [f"{name}={given[0]}"] if given else [name]


def resolve(options, chosen):
    words = [word for key, given in chosen.items() for word in as_option(key, given)]
    try:
        return configuration.resolve(["--config", options.config, *words])[0]
    except SystemExit:  # tyro has printed what is wrong, but knows nothing of cells
        if any(
            given and "," not in given[0] and isinstance(getattr(configuration.Config, key, None), tuple)
            for key, given in chosen.items()
        ):
            print(
                "note: here a word is the value of one cell; commas join a list, as in --betas 0.9,0.999",
                file=sys.stderr,
            )
        raise


def cell_name(settings):
    """A folder name that no other settings have: what a name cannot hold is replaced, and a digest tells it apart."""
    name = ",".join(
        f"{key}={'+'.join(map(str, value)) if isinstance(value, tuple) else value}" for key, value in settings.items()
    )
    plain = re.sub(r"[^\w.,=+-]", "-", name, flags=re.ASCII)
    exact = (
        plain == name
        and len(name) <= 160
        and not any(
            "+" in str(word) or "," in str(word)
            for value in settings.values()
            if isinstance(value, tuple | str)
            for word in ([value] if isinstance(value, str) else value)
        )
    )
    return name if exact else f"{plain[:140]}-{hashlib.sha256(repr(settings).encode()).hexdigest()[:8]}"


def check(cells, options):
    """Raises ValueError for what would make a cell fail only when its turn comes."""
    for data in {cell.config.data for cell in cells}:
        PreparedImages(data)
    for cell in cells:
        config = cell.config
        depth = blocks(config)
        if "chunk_size" in cell.settings:
            source_plan(2 * depth, config.chunk_size)
        if "align_depth" in cell.settings and max(config.align_depth) > depth:
            raise ValueError(f"align_depth = {shown(config.align_depth)}: the model has only {depth} blocks")
        if config.batch_size % options.gpus_per_run:
            raise ValueError(
                f"batch_size = {config.batch_size} cannot be shared evenly among gpus_per_run = {options.gpus_per_run}"
            )
        if options.metric == "frechet_distance" and not config.eval_every:
            raise ValueError(
                "metric = 'frechet_distance' is only logged with eval_every above 0; "
                "give another --metric, such as loss"
            )
        if options.metric.startswith("fid") and not (config.eval_every and config.eval_metric == "fid"):
            raise ValueError(
                f"metric = {options.metric!r} is only logged with --eval-metric fid, and eval_every above 0"
            )


def complete(cell):
    """Whether the run has ended as this cell wants it. What else is in its folder is for the trainer to judge."""
    try:
        checkpoint = load_file(cell.folder / "last.pt", mmap=True)
        wanted = dataclasses.asdict(cell.config)
        saved = {key: value for key, value in checkpoint["config"].items() if key in wanted}
        diagnosis_due = cell.config.diagnose_every and checkpoint.get("diagnosis_due", False)
        return (
            checkpoint["step"] >= cell.config.max_steps
            and not checkpoint["evaluation_due"]
            and not diagnosis_due
            and not configuration.differences(wanted, saved)
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


# ---- where they run ----


def free_places(options, count):
    """One environment for each cell that runs at a time. Raises ValueError where the machine has not that many."""
    each = options.gpus_per_run
    if each < 1 or options.jobs is not None and options.jobs < 1:
        raise ValueError(f"jobs = {options.jobs} and gpus_per_run = {each} must be at least 1")
    if options.cluster == "slurm":
        make_executor(options, Path(options.out))
        return [{}] * min(options.jobs or count, count)
    if options.slurm:
        raise ValueError(f"slurm = {' '.join(options.slurm)!r} is only read with --cluster slurm")
    gpus = torch.cuda.device_count()
    if not gpus:
        jobs = min(options.jobs or 1, count)
        threads = max(1, len(os.sched_getaffinity(0)) // (jobs * each))
        return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}] * jobs
    jobs = options.jobs or gpus // each
    if not 1 <= jobs * each <= gpus:
        raise ValueError(
            f"{jobs or 1} runs at a time with gpus_per_run = {each} need {max(jobs, 1) * each} GPUs; "
            f"this machine has {gpus}"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[:gpus]
    names = visible if len(visible) == gpus and all(visible) else [str(i) for i in range(gpus)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[i * each : (i + 1) * each])} for i in range(min(jobs, count))]


def make_executor(options, folder):
    """submitit's executor for one cell. Raises ValueError on parameters that it does not know, and without Slurm."""
    try:
        executor = submitit.AutoExecutor(folder, cluster=options.cluster, slurm_max_num_timeout=REQUEUES)
    except RuntimeError as error:
        raise ValueError(f"cluster = {options.cluster!r}: {error}") from None
    if options.cluster == "local":
        executor.update_parameters(timeout_min=NO_LIMIT)
        return executor
    given = dict(word.partition("=")[::2] for word in options.slurm)
    if not given.get("time", "").isdigit():
        raise ValueError(
            f"--slurm time={given.get('time', '')}: give the limit of one job in whole minutes, such as "
            f"time=1440; a run that needs longer is saved, queued again and goes on"
        )
    parameters = {f"slurm_{name}": json_or_text(value) for name, value in given.items()}
    if not given.keys() & {"gres", "gpus_per_node", "gpus_per_task"}:
        parameters["gpus_per_node"] = options.gpus_per_run
    try:
        executor.update_parameters(**{"name": Path(options.out).name, "tasks_per_node": 1, **parameters})
    except NameError as error:
        raise ValueError(f"slurm = {' '.join(options.slurm)!r}: {error}") from None
    return executor


def json_or_text(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


class Command:
    """The process of one cell, as submitit's job runs it: the user's own command, which resumes.

    It is pickled into the job, hence built from plain values.
    """

    def __init__(self, words, log, environment):
        self.words, self.log, self.environment = words, log, environment
        self.process, self.stopping = None, False

    def __call__(self):
        """Returns the exit status."""
        signal.signal(signal.SIGTERM, self.stop)
        with open(self.log, "ab") as log:
            # In a session of its own, so that it gets each signal once, from here.
            self.process = subprocess.Popen(
                self.words,
                env={**os.environ, **self.environment},
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=plain_signals,
            )
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
            self.process.terminate()  # the trainer saves

    def wait(self):
        """Unlike Popen.wait, this may be called by a signal handler that has interrupted it."""
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

    def checkpoint(self):
        """submitit calls this before the time limit and on preemption, and queues what is returned."""
        if self.process:
            self.stop()
            self.wait()
        return submitit.helpers.DelayedSubmission(Command(self.words, self.log, self.environment))


def plain_signals():
    """Undoes in the trainer what its parents need: see `start`, and Slurm may send SIGUSR2 to every process."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def start(cell, options):
    launch = [sys.executable]
    if options.gpus_per_run > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.gpus_per_run}"]
    cell.folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(cell.folder / "job", ignore_errors=True)
    command = Command([*launch, str(TRAINER), *cell.words], str((cell.folder / "log").resolve()), cell.place)
    executor = make_executor(options, cell.folder / "job")
    # A Ctrl-C in the terminal goes to submitit's processes too; those that inherit the mask leave it to this one.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with submitit.helpers.clean_env():
            cell.job = executor.submit(command)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    cell.state = "running"


def earlier_job(cell, options):
    """The Slurm job that an earlier command started for this cell, if it may still come to run."""
    if options.cluster == "slurm":
        for path in (cell.folder / "job").glob("*_submitted.pkl"):
            job = submitit.SlurmJob(cell.folder / "job", path.name.partition("_")[0])
            if not job.done(force_check=True):
                return job
    return None


def in_use(folder):
    """Whether a run is in the folder that this command did not start, such as one whose sweep was killed."""
    try:
        if (folder / ".lock").exists():
            lock_folder(folder).close()
    except ValueError:
        return True
    return False


def stop_job(job):
    if isinstance(job, submitit.LocalJob):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job.job_id), signal.SIGTERM)  # its cancel() would kill, rather than let save
    else:
        job.cancel(check=False)


class Stop:
    """Within its block, SIGINT and SIGTERM are remembered; the second one leaves at once."""

    def __init__(self):
        self.signal = 0

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._set) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _set(self, number, frame):
        if self.signal:
            raise SystemExit(128 + number)
        os.write(2, b"\nstopping: the running cells are saved first\n")
        self.signal = number


# ---- the loop ----


def run_all(cells, options, places, stop):
    """Run what is not complete, so many at a time as there are places. Returns when nothing runs any more."""
    free, told, table = list(places), False, Table(options)
    for cell in cells:
        if complete(cell):
            cell.state = "done"
        elif job := earlier_job(cell, options):
            cell.job, cell.state, cell.place = job, "running", free.pop() if free else None
    while True:
        for i, cell in enumerate(cell for cell in cells if cell.job):
            # Slurm is asked at once where that was waited for; one answer is about all jobs.
            if not cell.job.done(force_check=told and i == 0):
                cell.state = "queued" if cell.job.state in ("PENDING", "REQUEUED", "UNKNOWN") else "running"
            else:
                finish(cell, stop)
                if cell.place is not None:  # earlier jobs may be more than there are places
                    free.append(cell.place)
                if cell.state == "failed":
                    table.say(f"{cell.name} failed: {cell.reason}\n{indented(log_end(cell))}")
                if cell.state == "done":
                    write_result(cells, options.out, options.metric, options.goal, options.target)
        if stop.signal and not told:
            told = True
            for cell in cells:
                if cell.job:
                    stop_job(cell.job)
        for cell in cells:
            if cell.state in ("waiting", "elsewhere") and free and not stop.signal:
                take_up(cell, free, options)
        table.show(cells)
        if not any(cell.job or cell.state in ("waiting", "elsewhere") and not stop.signal for cell in cells):
            return
        time.sleep(POLL[options.cluster])


def take_up(cell, free, options):
    """Start a cell in a free place, unless there turns out to be nothing to do, or somebody else is at it."""
    if in_use(cell.folder):
        cell.state = "elsewhere"
    elif complete(cell):
        cell.state = "done"
    else:
        cell.place = free.pop(0)
        start(cell, options)


def finish(cell, stop):
    """The state of a cell whose job has ended."""
    job, cell.job = cell.job, None
    try:
        status = job.result() if job.paths.result_pickle.exists() else None
        cell.reason = f"exit status {status}"
        if status is None:
            cell.reason = f"job {job.job_id} ended in state {job.state} {job.stderr() or ''}"
    except Exception as error:  # whatever the job raised, in words of submitit
        status, cell.reason = None, str(error)
    cell.reason = " ".join(cell.reason.split())[-300:]
    if status == 0 or complete(cell):
        cell.state, cell.reason = "done", ""
    elif stop.signal or status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        cell.state, cell.reason = "stopped", "by a signal"
    else:
        cell.state, cell.reason = "failed", f"{cell.reason}: {log_end(cell, lines=1)}".removesuffix(": ")
    shutil.rmtree(cell.folder / "job", ignore_errors=True)  # what is there now may still come to run


def log_end(cell, lines=15):
    """The last lines that the run printed, without the progress bar that it drew over again."""
    path = cell.folder / "log"
    text = path.read_bytes()[-20_000:].decode(errors="replace") if path.is_file() else ""
    kept = [line for line in text.splitlines() if line.strip() and "step/s" not in line and "s/step" not in line]
    return "\n".join(kept[-lines:])


def indented(text):
    return "\n".join(f"    {line}" for line in text.splitlines())


# ---- progress ----


class Table:
    """The cells as they stand: redrawn on a terminal, and elsewhere a line whenever there is news of a cell."""

    def __init__(self, options):
        self.options, self.drawn, self.told = options, 0, {}

    def show(self, cells):
        logs = {cell.name: newest(cell) for cell in cells}
        left = total_seconds(cells, logs, self.options)
        running = [cell for cell in cells if cell.job]
        counts = {state: sum(cell.state == state for cell in cells) for state in ORDER}
        head = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        if left and running:
            head += f"; about {duration(left / len(running))} left"
        rows = {cell.name: self.row(cell, logs[cell.name], max(map(len, logs))) for cell in cells}
        if sys.stdout.isatty():
            width, height = shutil.get_terminal_size()
            chosen = sorted(cells, key=lambda cell: ORDER.index(cell.state))[: height - 3]
            lines = [head, *(rows[cell.name] for cell in cells if cell in chosen)]
            self.erase()
            print("\n".join(line[: width - 1] for line in lines), flush=True)
            self.drawn = len(lines)
            return
        for cell in cells:
            news = cell.state, logs[cell.name].get(self.options.metric)
            if news != self.told.get(cell.name, ("waiting", news[1])):
                print(rows[cell.name], flush=True)
            self.told[cell.name] = news

    def row(self, cell, log, width):
        metric = log.get(self.options.metric)
        left = seconds_left(cell.config, log, log) if cell.state == "running" else None
        return (
            f"{cell.name:<{width}}  {cell.state:<9}  {log.get('step', 0):>7}/{cell.config.max_steps}"
            + (f"  {self.options.metric} {metric:.4g}" if isinstance(metric, (int, float)) else "")
            + (f"  {duration(left)} left" if left is not None else "")
        )

    def say(self, text):
        """Something to stay above the table."""
        self.erase()
        print(text, flush=True)

    def erase(self):
        if self.drawn:
            print(f"\x1b[{self.drawn}F\x1b[J", end="")
        self.drawn = 0


def newest(cell):
    """The newest value of everything in the cell's log; {} where there is none."""
    try:
        with open(cell.folder / "metrics.jsonl", "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG_TAIL))
            lines = file.read().split(b"\n")[size > LOG_TAIL : -1]  # the first and the last may be cut
        return functools.reduce(lambda known, line: known | json.loads(line), lines, {})
    except (OSError, ValueError, TypeError):  # the trainer says what is wrong with it
        return {}


def seconds_left(config, log, pace):
    """Training and evaluations from the log's step on at the speed of `pace`, a log; None where it has none."""
    if not pace.get("samples_per_second"):
        return None
    step, last, every = log.get("step", 0), config.max_steps, config.eval_every
    steps = max(0, last - step)
    evaluations = last // every - step // every + (last % every > 0) if every and steps else 0
    return steps * config.batch_size / pace["samples_per_second"] + evaluations * pace.get("evaluation_seconds", 0)


def total_seconds(cells, logs, options):
    """Seconds of all that is left, one after the other; cells that logged no speed have the median. None: unknown."""
    known = [log for log in logs.values() if log.get("samples_per_second")]
    median = {
        key: float(np.median([log[key] for log in known if key in log]))
        for key in ("samples_per_second", "evaluation_seconds")
        if any(key in log for log in known)
    }
    times = [
        seconds_left(cell.config, logs[cell.name], median | logs[cell.name])
        for cell in cells
        if cell.state in ("waiting", "elsewhere", "queued", "running")
    ]
    return None if None in times else sum(times)


def duration(seconds):
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes < 2880 else f"{minutes / 1440:.1f} days"


def forecast(cells, options, at_a_time):
    """What a dry run prints."""
    logs = {cell.name: newest(cell) for cell in cells}
    width = max(map(len, logs))
    lines, to_go = [], 0
    for cell in cells:
        cell.state = "done" if complete(cell) else "waiting"
        steps = 0 if cell.state == "done" else max(0, cell.config.max_steps - logs[cell.name].get("step", 0))
        to_go += steps
        lines.append(
            f"{cell.name:<{width}}  "
            + ("complete" if cell.state == "done" else f"{steps} of {cell.config.max_steps} steps to go")
        )
    lines.append(
        f"{len(cells)} cells, {sum(cell.state == 'done' for cell in cells)} complete; {to_go} steps to go; "
        f"{min(at_a_time, len(cells))} at a time on {options.cluster}"
    )
    seconds = total_seconds(cells, logs, options)
    measured = sum("samples_per_second" in log for log in logs.values())
    if seconds is None:
        lines.append("time: unknown until a cell has logged its speed, in the first log_every steps of the sweep")
    else:
        lines.append(
            f"time: about {duration(seconds / at_a_time)} ({duration(seconds)} one after the other), by the "
            f"speed that {measured} of the cells logged last, where the others are taken to be as fast; "
            f"without starting and saving"
        )
    waiting = [cell for cell in cells if cell.state == "waiting"]
    if waiting:
        lines.append(f"the first: {shlex.join(['python', TRAINER.name, *waiting[0].words])}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

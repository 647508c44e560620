"""What every command needs around its work: processes, stop signals, seeds, locks, whole files, the log of a run."""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import io
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

PATIENCE = datetime.timedelta(days=2)  # of processes that wait for another one
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class Use(IntEnum):
    """What random numbers are for. Each use has a word of its own, so that no two share a seed."""

    WEIGHTS = 1
    ORDER = 2
    STEP = 3
    SAMPLE = 4
    LABELS = 5
    DIAGNOSIS = 6
    HELD_OUT = 7


def derive_seed(seed: int, use: Use, *numbers: int) -> int:
    """A 63-bit seed for one use of a run's seed, such as derive_seed(0, Use.STEP, step)."""
    return int(np.random.SeedSequence([seed, use, *numbers]).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def plain_errors(*kinds: type):
    """End the program with one line, not a traceback, for errors of these kinds: a user's mistake, or a full disk."""
    try:
        yield
    except kinds as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        raise SystemExit("stopped; the same command again completes it" if interrupted else f"error: {error}") from None


# ---- processes ----


class Ranks:
    """The processes of a run: all of torchrun's, or this one alone."""

    def __init__(self):
        given = [name for name in LAUNCHER if name in os.environ]
        if given and len(given) < len(LAUNCHER):
            missing = ", ".join(name for name in LAUNCHER if name not in given)
            raise SystemExit(
                f"error: {', '.join(given)} are set without {missing}, so this process cannot know its GPU. Use "
                "torchrun, or set all of them: under srun, LOCAL_RANK is $SLURM_LOCALID"
            )
        try:
            self.rank, self.world, self.local_rank = (
                (int(os.environ[name]) for name in LAUNCHER) if given else (0, 1, 0)
            )
        except ValueError as error:
            raise SystemExit(f"error: {', '.join(LAUNCHER)} must be whole numbers: {error}") from None
        self.main = self.rank == 0
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            if self.local_rank >= torch.cuda.device_count():
                raise SystemExit(
                    f"error: process {self.local_rank} of this machine has no GPU; there are "
                    f"{torch.cuda.device_count()}, so use --nproc_per_node={torch.cuda.device_count()}"
                )
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
            # The suspect of non-finite gradients that an H200 gave at 64 tokens; see pytorch/pytorch#196678.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.host_group = None
        if given:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            # Flags travel by gloo, so that exchanging them never waits for the device. What one process does while the
            # others wait, such as a diagnosis or a download, may take longer than gloo's half hour; torchrun ends those
            # that wait for one that has died.
            self.host_group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a device tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: int) -> int:
        """Whether a host flag is set in any process; the largest one where flags are numbers."""
        if self.world == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.host_group)
        return int(value)

    def barrier(self):
        if self.world > 1:
            dist.barrier(group=self.host_group)

    def agree(self, facts: dict, remedy: str):
        """Raises ValueError in every process unless all have the same `facts`, which decide what they do together.

        Names the first fact that differs, in the order given.
        """
        if self.world == 1:
            return
        found = [None] * self.world
        dist.all_gather_object(found, (platform.node(), facts), group=self.host_group)
        host, expected = found[0]
        for rank, (other, theirs) in enumerate(found):
            for key in dict.fromkeys([*expected, *theirs]):
                if theirs.get(key) != expected.get(key):
                    raise ValueError(
                        f"the processes disagree: {key} is {expected.get(key)!r} in process 0 on {host}, and "
                        f"{theirs.get(key)!r} in process {rank} on {other}; {remedy}"
                    )

    @contextlib.contextmanager
    def one_first(self):
        """The block runs in one process of each machine, then in the others, which find downloads in the cache."""
        if self.local_rank > 0:
            self.barrier()
        yield
        if self.local_rank == 0:
            self.barrier()

    def __enter__(self):
        return self

    def __exit__(self, exception, *_):
        # After an error the others may be waiting in an exchange that never comes; torchrun ends them.
        if self.host_group is not None and exception is None:
            dist.destroy_process_group()


class Stop:
    """Within its block, SIGINT and SIGTERM are remembered until the loop can save and leave.

    notice: what the user is told at the first signal. A second Ctrl-C leaves at once.
    """

    def __init__(self, notice: str, ranks: Ranks | None = None):
        self.notice, self.ranks, self.signal = notice, ranks, 0

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._set) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _set(self, number, frame):
        alone = (
            self.ranks is None or self.ranks.world == 1
        )  # torchrun forwards signals, so a second one is no second Ctrl-C
        if self.signal and number == signal.SIGINT and alone:
            raise SystemExit(128 + number)
        if not self.signal and (self.ranks is None or self.ranks.main):
            os.write(2, f"\n{self.notice}\n".encode())
        self.signal = number

    def agreed(self) -> int:
        """The signal that all processes stop for, or 0."""
        return self.ranks.any(self.signal) if self.ranks else self.signal


# ---- numbers and networks ----


@contextlib.contextmanager
def tf32(enabled: bool):
    """Turns TF32 for float32 products on or off in this block; PyTorch's default is on for convolutions only."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def fingerprint(module: torch.nn.Module, identity: str) -> str:
    """Twelve hexadecimal digits that change with any weight, and with `identity`: what else makes the network."""
    digest = hashlib.sha256(identity.encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


# ---- files ----


class InUse(ValueError):
    """Another run has locked a folder."""


def lock_folder(folder: Path):
    """Create a folder and keep other runs from writing into it, for as long as the returned file is open.

    Raises ValueError where the folder cannot be made, and InUse where another run has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise ValueError(f"out = {str(folder)!r} cannot be written to: {error}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise InUse(f"{str(folder)!r} is in use by another run; wait for it, or give another --out") from None
    except OSError as error:  # some network file systems have no locks
        print(f"note: {folder} cannot be locked ({error}); see that no other run writes there", file=sys.stderr)
    return lock


def check_folder(folder: Path, record: str, settings: dict, within: str = "") -> dict:
    """The JSON file `record` of a folder, {} where it has none. `within` is the part of it that holds the settings.

    Raises ValueError unless the folder is empty or made with these settings.
    """
    try:
        names = {path.name for path in folder.iterdir()}  # listed once, as another run may be at it
    except FileNotFoundError:
        return {}
    except NotADirectoryError:
        names = {folder.name}
    if record in names:
        content = read_json(folder / record)
        found, wanted = content.get(within, content), json.loads(json.dumps(settings))
        changed = [f"{key}: {found.get(key)!r} -> {new!r}" for key, new in wanted.items() if found.get(key) != new]
        if changed:
            remedy = "give another --out, or delete that folder first"
            raise ValueError(f"{folder} was made with other settings ({'; '.join(changed)}); {remedy}")
        return content
    if names - {".lock", ".shared", ".shared.unfinished", f"{record}.unfinished"}:  # those of a run that ended at once
        raise ValueError(f"{folder} is not empty and was not made by this program; give another --out")
    return {}


@contextlib.contextmanager
def replaced(path: Path):
    """A binary file to write, which takes the place of `path` at once when the block ends, and not before.

    Whatever goes wrong leaves no unfinished file behind. Raises OSError that names a full disk, which torch.save
    otherwise reports as a RuntimeError of its own.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        causes = {getattr(cause, "errno", None) for cause in (error, error.__context__)}
        if causes & {errno.ENOSPC, errno.EDQUOT}:
            raise OSError(f"no space left for {path}; make room, and give the same command again") from None
        raise


def one_line(error: Exception) -> str:
    """Kind and text of an error, such as one of another library, to be quoted in a message of ours."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def table(head: list, rows: list[list]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in [head, ["---"] * len(head), *rows])


def write_json(path: Path, content):
    """`content` as JSON in the place of whatever is at `path`."""
    with replaced(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def write_array(path: Path, array: np.ndarray):
    """`array` as .npy in the place of whatever is at `path`."""
    whole = io.BytesIO()  # numpy does not say why a write to a file fails
    np.save(whole, array)
    with replaced(path) as file:
        file.write(whole.getbuffer())


def read_json(path: Path) -> dict:
    """What `write_json` has written. Raises ValueError that names a file that holds anything else."""
    with contextlib.suppress(ValueError):
        if isinstance(content := json.loads(path.read_text()), dict):
            return content
    raise ValueError(f"{path} is damaged, or was not made by this program; delete it, or give another folder")


# ---- records ----


def environment(ranks: Ranks) -> dict:
    """Hardware, versions, commit and command of this run."""
    cpu = platform.processor() or "unknown"
    if Path("/proc/cpuinfo").is_file():
        names = [line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        cpu = names[0] if names else cpu
    commit = ""
    if shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return {
        "processes": ranks.world,
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or "unknown",
        "command": command(),
    }


def command() -> str:
    """What this process was started with, less the folder that the project lies in."""
    module = sys.modules["__main__"].__spec__  # of `python -m`, whose argv[0] is a whole path
    return shlex.join(["python", *(["-m", module.name] if module else sys.argv[:1]), *sys.argv[1:]])


class MetricsLog:
    """metrics.jsonl, one JSON object a line, and the same numbers for TensorBoard. Silent but in the main process.

    Opening keeps the records that `kept` accepts: the run is about to write the others again.
    """

    def __init__(self, folder: Path, kept, step: int, tensorboard: bool, ranks: Ranks):
        self.file = self.board = None
        if not ranks.main:
            return
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        with replaced(path) as file:
            file.write("".join(f"{line}\n" for line in lines if (record := parsed(line)) and kept(record)).encode())
        self.file = open(path, "a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, record: dict):
        if self.file is None:
            return
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for name, value in record.items():
            if self.board and name != "step":
                self.board.add_scalar(name, value, record["step"])

    def image(self, name: str, image: torch.Tensor, step: int):
        """image: (3, H, W) uint8."""
        if self.board:
            self.board.add_image(name, image, step)

    def close(self):
        for stream in (self.file, self.board):
            if stream:
                stream.close()


def parsed(line: str, key: str = "step") -> dict:
    """The record of a line of metrics.jsonl, or of another log whose records all have `key`; {} for a cut-off line."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) and key in record else {}

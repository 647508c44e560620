"""What every run needs around its training step: processes, the run folder, averaged weights, checkpoints, logs."""

import argparse
import contextlib
import copy
import datetime
import fcntl
import json
import os
import pickle
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist


# What random numbers are for, so that no two uses share a seed (see derive_seed).
INITIAL_WEIGHTS, TRAINING, EVALUATION = range(3)
PATIENCE = datetime.timedelta(days=2)  # of processes that wait for another one


def derive_seed(*numbers):
    """One 63-bit seed from several integers, such as (run seed, purpose, step)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class Ranks:
    """The processes of a run: all of torchrun's, or this one alone."""

    def __init__(self):
        distributed = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()
        self.rank, self.world, self.local_rank = 0, 1, 0
        if distributed:
            self.rank, self.world, self.local_rank = (
                int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
            )
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
        if distributed:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        # Flags travel by gloo, so that exchanging them never waits for the device. What one process does while the
        # others wait, such as a diagnosis or a download, may take longer than gloo's half hour; torchrun ends those
        # that wait for one that has died.
        self.host_group = dist.new_group(backend="gloo", timeout=PATIENCE) if distributed else None

    def sum(self, tensor):
        """Sum a device tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """Whether a host flag is set in any process; the largest one where flags are numbers."""
        if self.world == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.host_group)
        return int(value)

    def barrier(self):
        if self.world > 1:
            dist.barrier(group=self.host_group)

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


class StopFlag:
    """Within its block, remembers SIGINT and SIGTERM until the loop can save and leave."""

    def __init__(self, ranks):
        self.ranks, self.signal = ranks, 0

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._set) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _set(self, number, frame):
        if self.signal == number == signal.SIGINT and self.ranks.world == 1:
            raise KeyboardInterrupt  # asked twice; torchrun repeats by itself what it is sent
        if self.ranks.main and not self.signal:
            os.write(2, b"\nstopping: the run is saved first\n")
        self.signal = number

    def agreed(self):
        """The signal that all processes stop for after this step, or 0."""
        return self.ranks.any(self.signal)


class EMA:
    """Exponential moving averages of the weights, one frozen copy of the model per decay."""

    def __init__(self, model, decays):
        self.models = {decay: copy.deepcopy(model).eval().requires_grad_(False) for decay in decays}

    @torch.no_grad()
    def update(self, model):
        """One step of every average; after a skipped optimiser step, towards weights that have not changed."""
        for decay, average in self.models.items():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)

    def state_dict(self):
        return {str(decay): model.state_dict() for decay, model in self.models.items()}

    def load_state_dict(self, state):
        for decay, model in self.models.items():
            model.load_state_dict(state[str(decay)])


def lock_folder(folder):
    """Create a run folder and keep other runs from writing into it, for as long as the returned file is open.

    Raises ValueError where the folder cannot be made, or is in use.
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
        raise ValueError(f"{str(folder)!r} is in use by another run; wait for it, or give another --out") from None
    return lock


def environment(ranks):
    """What a measurement is worth nothing without: hardware, versions, commit and command."""
    cpu = platform.processor() or "unknown"
    if Path("/proc/cpuinfo").is_file():
        names = [line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        cpu = names[0] if names else cpu
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        ).stdout.strip()
    return {
        "processes": ranks.world,
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or "unknown",
        "command": command(),
    }


def command():
    """What this process was started with, less the folder that the project lies in."""
    module = sys.modules["__main__"].__spec__  # of `python -m`, whose argv[0] is a whole path
    return shlex.join(["python", *(["-m", module.name] if module else sys.argv[:1]), *sys.argv[1:]])


@contextlib.contextmanager
def replaced(path):
    """A binary file to write, which takes the place of `path` at once when the block ends, and not before."""
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load_file(path, device="cpu", mmap=False):
    """The content of a checkpoint, read without executing any code that it may hold; with `mmap`, tensors only when
    they are looked at.

    Raises ValueError, with the path, where there is no such file or it is not a checkpoint of tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no weights file {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device=str(device))
        with torch.serialization.safe_globals([argparse.Namespace]):  # REPA keeps its arguments in one
            return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, safetensors.SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{str(path)!r} is not a weights file, or holds code, which is never executed ({type(error).__name__})"
        ) from None


def load_weights(path):
    """Model weights from one of our checkpoints, SiT's, REPA's, or a bare state dict: `ema` where there is one."""
    content = load_file(path)
    content = content if isinstance(content, dict) else {}
    for key in ("ema", "model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = {str(name).removeprefix("module."): value for name, value in content.items()}
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{str(path)!r} holds no state dict, neither bare nor under 'ema', 'model' or 'state_dict'")
    return weights


class MetricsLog:
    """metrics.jsonl, one JSON object a line, and the same numbers for TensorBoard. Silent but in the main process.

    Opening keeps the first `lines`, those of the checkpoint at `step`: the run is about to write the others again.
    """

    def __init__(self, folder, lines, step, tensorboard, ranks):
        self.file = self.board = None
        self.lines = lines
        if not ranks.main:
            return
        path = folder / "metrics.jsonl"
        kept = path.read_text().splitlines(keepends=True)[:lines] if path.exists() else []
        with replaced(path) as file:
            file.write("".join(kept).encode())
        self.file = open(path, "a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, record):
        if self.file is None:
            return
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        self.lines += 1
        for name, value in record.items():
            if self.board and name != "step":
                self.board.add_scalar(name, value, record["step"])

    def image(self, name, image, step):
        """image: (3, H, W) uint8."""
        if self.board:
            self.board.add_image(name, image, step)

    def close(self):
        for stream in (self.file, self.board):
            if stream:
                stream.close()

"""Shared by all tests: no network, one thread, and small real inputs made once a session."""

import os

# Before any import that reads them; the tests' own child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit-identity is promised on a CPU; tests/test_gpu.py undoes this
os.environ["TRITON_INTERPRET"] = "1"  # the kernels run on a CPU where a test asks for them
os.environ["COLUMNS"] = "1000"  # messages are not wrapped in the middle of a path
os.environ["OMP_NUM_THREADS"] = "1"  # shapes are so small that threads only wait for each other

import contextlib
import functools
import json
import multiprocessing
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import models  # noqa: F401  (before timm: see its docstring)
import timm
from timm.models import save_for_hf

from dataset import prepare

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
# A run of the trainer that takes milliseconds a step.
TINY = "--depth 2 --hidden-size 32 --num-heads 2 --align-depth 1 --projector-dim 16 --batch-size 8 --tensorboard False"


def pytest_collection_modifyitems(items):
    """Two processes end at the same time if the longest files are not left for the end."""
    long = "test_trainer test_kernels test_text_to_image test_shard test_distill test_compiled_kernels".split()
    items.sort(key=lambda item: item.path.stem not in long)


def save_tiny_encoder(folder, width=24, img_size=8, patch_size=2, seed=0):
    """A timm vision transformer with random weights, in the folder format that `--encoder` takes."""
    architecture = dict(img_size=img_size, patch_size=patch_size, embed_dim=width, depth=2, num_heads=2, num_classes=0)
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **architecture)
    save_for_hf(model, str(folder), model_args=architecture, safe_serialization=True)
    return model.eval()


class Harmful:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def read_lines(path):
    """The records of a metrics.jsonl that may still be written; [] before it is there."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def forked(*calls, ranks=False):
    """Makes each call in a process of its own, side by side; with `ranks` they are those of one torchrun.

    Returns what each call returned, its error as "ValueError: ...", or minus the signal that ended it.
    """
    context = multiprocessing.get_context("fork")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])

    def run(rank, call, pipe):
        world = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(len(calls))) | {"MASTER_ADDR": "127.0.0.1"}
        os.environ.update(world | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port} if ranks else {})
        try:
            outcome = call()
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        pipe.send(outcome)

    pipes = [context.Pipe(duplex=False) for _ in calls]
    children = [context.Process(target=run, args=(i, call, pipes[i][1])) for i, call in enumerate(calls)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    codes = [child.exitcode or "no answer" for child in children]
    for child in children:
        child.kill()
    return [here.recv() if here.poll() else code for code, (here, _) in zip(codes, pipes)]


def ending(end, where, name, when=lambda *arguments: True):
    """The function `where.name`, which first calls `end` with its arguments where `when` says so of them."""
    original = getattr(where, name)

    @functools.wraps(original)
    def patched(*arguments, **options):
        if when(*arguments):
            end(*arguments)
        return original(*arguments, **options)

    return patched


def killed(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


class Group:
    """Ranks of `world` processes that are threads, each with the methods of runtime.Ranks used by the evaluation."""

    def __init__(self, world):
        self.barrier, self.slots, self.reduced = threading.Barrier(world, timeout=60), [None] * world, []
        self.ranks = [ThreadRank(self, rank, world) for rank in range(world)]

    def run(self, function):
        """Results of function(ranks) in every process."""

        def guarded(ranks):
            try:
                return function(ranks)
            except BaseException:
                self.barrier.abort()  # or the others would wait for it
                raise

        with ThreadPoolExecutor(len(self.ranks)) as pool:
            futures = [pool.submit(guarded, ranks) for ranks in self.ranks]
        failures = [future.exception() for future in futures if future.exception()]
        for failure in sorted(failures, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise failure
        return [future.result() for future in futures]


class ThreadRank:
    one_first = contextlib.nullcontext

    def __init__(self, group, rank, world):
        self.group, self.rank, self.world, self.main, self.device = group, rank, world, rank == 0, torch.device("cpu")

    def _gather(self, value):
        self.group.slots[self.rank] = value
        self.group.barrier.wait()
        values = list(self.group.slots)
        self.group.barrier.wait()
        return values

    def sum(self, tensor):
        tensor.copy_(sum(self._gather(tensor.clone())))
        if self.main:
            self.group.reduced.append(tensor.clone())
        return tensor

    def any(self, flag):
        return max(self._gather(flag))


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    save_tiny_encoder(folder)
    return folder


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory):
    """A small convolutional network with random weights, as `--eval-encoder` takes one."""
    folder = tmp_path_factory.mktemp("judge") / "tiny"
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=10)
    model.pretrained_cfg = model.pretrained_cfg | {"num_classes": 10, "input_size": (3, 32, 32)}
    save_for_hf(model, str(folder), model_args={"num_classes": 10}, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory, encoder_folder):
    """All 1797 digits, prepared by the project's own command, with the tiny encoder's features."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare.main(["digits", "--out", str(folder), "--encoder", str(encoder_folder)])
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory, encoder_folder):
    """The first 70 of them."""
    folder = tmp_path_factory.mktemp("data") / "some-digits"
    prepare.main(["digits", "--out", str(folder), "--encoder", str(encoder_folder), "--limit", "70"])
    return folder


@pytest.fixture(scope="module")
def teacher(small_data, encoder_folder, tmp_path_factory):
    """Checkpoints of one step of the trainer, by the words that they were made with."""
    import train_repa_dar  # and with it the kernels, before which tests/test_gpu.py has something to undo

    folder = tmp_path_factory.mktemp("teachers")

    @functools.cache
    def made(words=""):
        out = folder / str(len(list(folder.iterdir())))
        line = f"--data {small_data} --out {out} --encoder {encoder_folder} {TINY} --max-steps 1 --eval-every 0"
        train_repa_dar.main(f"{line} --lr 1e-2 --ema-decays 0 --alignment repa {words}".split())
        return out / "last.pt"

    return made


@pytest.fixture
def updates(monkeypatch):
    """For each update of a run, its weights and their gradients before these are clipped, in float64."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def recorded(weights, limit):
        seen.append([(weight.detach().double(), weight.grad.double()) for weight in weights])
        return clip(weights, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded)
    return seen

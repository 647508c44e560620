"""Shared by all tests: no network, one thread, and small real inputs made once a session."""

import os

# Before any import that reads them; the tests' own child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit-identity is promised on a CPU; tests/test_gpu.py undoes this
os.environ["TRITON_INTERPRET"] = "1"  # the kernels run on a CPU where a test asks for them
os.environ["COLUMNS"] = "1000"  # messages are not wrapped in the middle of a path
os.environ["OMP_NUM_THREADS"] = "1"  # shapes are so small that threads only wait for each other

import json
from pathlib import Path

import pytest
import torch

import models  # noqa: F401  (before timm: see its docstring)
import timm
from timm.models import save_for_hf

from dataset import prepare

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)


def save_tiny_encoder(folder, width=24, img_size=8, patch_size=2, seed=0):
    """A timm vision transformer with random weights, in the folder format that `--encoder` takes."""
    architecture = dict(img_size=img_size, patch_size=patch_size, embed_dim=width, depth=2, num_heads=2, num_classes=0)
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **architecture)
    save_for_hf(model, str(folder), model_args=architecture, safe_serialization=True)
    return model.eval()


def read_lines(path):
    """The records of a metrics.jsonl that may still be written; [] before it is there."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


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

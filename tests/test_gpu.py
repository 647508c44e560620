"""What only a GPU can show. Skipped, visibly, where there is none."""

import ctypes
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT, read_lines
from weights import load_file

# In this process conftest hides the GPU from torch, and has Triton interpreted.
HIDING = ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")
VISIBLE = {name: value for name, value in os.environ.items() if name not in HIDING}


def run(*command):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=VISIBLE, capture_output=True, text=True)


def gpu_found():
    try:
        ctypes.CDLL("libcuda.so.1")  # without the driver there is no need to start a process
    except OSError:
        return False
    return run("-c", "import torch; print(torch.cuda.is_available())").stdout.strip() == "True"


pytestmark = pytest.mark.skipif(not gpu_found(), reason="no GPU")

ARMS = [
    "residual",
    "dar",
    "dar --query dynamic",
    "attnres",
    "unet",
    "dar --projector conv --spatial-norm 0.7 --align-steps 150",
]


@pytest.mark.parametrize("routing", ARMS)
def test_run_on_a_gpu(digits, encoder_folder, judge_folder, tmp_path, routing):
    """bf16 autocast, the fused optimiser and online features: the loss falls, the run resumes, nothing is skipped."""
    arm = f"--encoder-features online --alignment repa --lr 1e-3 --routing {routing}"
    steps = "--log-every 10 --eval-every 100 --checkpoint-every 50"
    folders = f"--data={digits} --encoder={encoder_folder} --eval-encoder={judge_folder} --out={tmp_path / 'run'}"
    for most in (100, 200):
        words = f"--config digits {folders} {arm} {steps} --max-steps {most}".split()
        done = run("train_repa_dar.py", *words)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "bf16 autocast" in done.stdout
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    losses = [line for line in lines if "loss" in line]
    assert losses[-1]["denoising_loss"] < 0.7 * losses[0]["denoising_loss"]
    assert losses[-1]["skipped_steps"] == 0 and losses[-1]["peak_memory_mib"] > 0
    distances = [line["frechet_distance"] for line in lines if "frechet_distance" in line]
    assert len(distances) == 2 and all(0 < distance < 10 for distance in distances)  # a random network's space
    weights = load_file(tmp_path / "run" / "last.pt")["model"]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())


def test_attention_of_64_tokens_has_a_gradient():
    """Where a softmax adds up to less than float32 holds, as heads come to have; cuDNN's backward gives NaN there."""
    code = """
import torch
from runtime import Ranks
Ranks()
q, k, v = torch.randn(3, 8, 6, 64, 64, device="cuda", dtype=torch.bfloat16) / 8
q[..., 0], k[..., 0] = 8, -120
leaves = [x.requires_grad_() for x in (q, k, v)]
torch.nn.functional.scaled_dot_product_attention(*leaves).square().sum().backward()
print(all(x.grad.isfinite().all() for x in leaves))
"""
    assert run("-c", code).stdout.strip() == "True"


def test_fused_kernels_on_a_gpu(tmp_path):
    """Compiled, recorded in a CUDA graph, and equal to float64 for every query; odd widths and one to 128 sources."""
    shapes = "--sources 1 9 128 --widths 7 384 1152 2500 --batch 3 --tokens 37"
    words = f"--parts operators --methods fused {shapes} --out {tmp_path / 'bench'}".split()
    done = run("-m", "kernels.bench", *words)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = json.loads((tmp_path / "bench.json").read_text())["operators"]
    assert len(rows) == 3 * 4 * 3 and all("forward" in row for row in rows), [row for row in rows if "failed" in row]

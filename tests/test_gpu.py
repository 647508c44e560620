"""What only a GPU can show. Skipped, visibly, where there is none."""

import json
import os
import subprocess
import sys

import pytest
import torch

from runtime import load_file
from tests.conftest import ROOT, read_lines

# Asked in a process of its own: in this one conftest hides the GPU from torch, and has Triton interpreted.
HIDING = ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")
VISIBLE = {name: value for name, value in os.environ.items() if name not in HIDING}
GPUS = int(
    subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        env=VISIBLE,
        capture_output=True,
        text=True,
    ).stdout
    or 0
)


@pytest.mark.skipif(GPUS == 0, reason="no GPU")
@pytest.mark.parametrize(
    "routing, extra",
    [
        ("residual", ()),
        ("dar", ()),
        ("dar", ("--query", "dynamic")),
        ("attnres", ()),
        ("unet", ()),
        ("dar", ("--projector", "conv", "--spatial-norm", 0.7, "--align-steps", 150)),
    ],
)
def test_run_on_a_gpu(digits, encoder_folder, tmp_path, routing, extra):
    """bf16 autocast, the fused optimiser and online features: the loss falls, the run resumes, nothing is skipped."""
    command = [
        sys.executable,
        "train_repa_dar.py",
        "--config",
        "digits",
        "--data",
        digits,
        "--encoder",
        encoder_folder,
        "--encoder-features",
        "online",
        "--alignment",
        "repa",
        "--routing",
        routing,
        *extra,
        "--out",
        tmp_path / "run",
        "--log-every",
        10,
        "--eval-every",
        100,
        "--checkpoint-every",
        50,
        "--lr",
        1e-3,
    ]
    for steps in (100, 200):
        done = subprocess.run(
            [*map(str, command), "--max-steps", str(steps)], cwd=ROOT, env=VISIBLE, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "bf16 autocast" in done.stdout
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    losses = [line for line in lines if "loss" in line]
    assert losses[-1]["denoising_loss"] < 0.7 * losses[0]["denoising_loss"]
    assert losses[-1]["skipped_steps"] == 0 and losses[-1]["peak_memory_mib"] > 0
    distances = [line["frechet_distance"] for line in lines if "frechet_distance" in line]
    assert len(distances) == 2 and distances[1] < distances[0]
    weights = load_file(tmp_path / "run" / "last.pt")["model"]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())


@pytest.mark.skipif(GPUS == 0, reason="no GPU")
def test_fused_kernels_on_a_gpu(tmp_path):
    """Compiled, recorded in a CUDA graph, and equal to float64 for every query; odd widths and one to 128 sources."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "kernels.bench",
            "--out",
            str(tmp_path / "bench"),
            "--parts",
            "operators",
            "--methods",
            "fused",
            "--sources",
            "1",
            "9",
            "128",
            "--widths",
            "7",
            "384",
            "1152",
            "2500",
            "--batch",
            "3",
            "--tokens",
            "37",
        ],
        cwd=ROOT,
        env=VISIBLE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = json.loads((tmp_path / "bench.json").read_text())["operators"]
    assert len(rows) == 3 * 4 * 3 and all("forward" in row for row in rows), [row for row in rows if "failed" in row]

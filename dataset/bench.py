"""Measures the reader alone: how many images per second it hands over, without a model behind it.

    python -m dataset.bench data/imagenet256 --num-workers 8 --out reader.json

One line each for what the folder holds: latents, images, latents and images (online alignment), latents and tokens
(prepared features). On a GPU the batches are copied to it. A run needs more than its samples_per_second of these.
"""

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch.utils.data import DataLoader

from dataset.prepared import PreparedImages, ShuffledBatches


@dataclass(frozen=True)
class Options:
    data: Annotated[Path, tyro.conf.Positional]
    """Prepared folder."""
    batch_size: int = 256
    num_workers: int = 4
    """Reader processes."""
    steps: int = 50
    """Batches that are timed, after two that are not."""
    out: str = ""
    """JSON file to write."""


def main(argv=None):
    options = tyro.cli(Options, args=argv, prog="python -m dataset.bench", description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        latents, features = (
            [path.parent.name for path in sorted((options.data / kind).glob("*/meta.json"))]
            for kind in ("latents", "features")
        )
        wanted = {"images": {}}
        for name in latents:
            wanted |= {
                f"latents {name}": {"images": False, "latents": name},
                f"latents {name} + images": {"latents": name},
            }
        for name in features:
            wanted[f"latents {latents[0]} + tokens {name}" if latents else f"images + tokens {name}"] = {
                "images": not latents,
                "latents": latents[0] if latents else "",
                "features": [name],
            }
        rates = {}
        for title, served in wanted.items():
            rates[title] = rate(PreparedImages(options.data, **served), options, device)
            print(f"{rates[title]:10.0f} images/s   {title}", flush=True)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if options.out:
        record = {
            "images_per_second": rates,
            "options": {**asdict(options), "data": str(options.data)},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}",
            "torch": torch.__version__,
        }
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


def rate(data, options, device):
    """Images per second over `steps` batches of random items."""
    if min(options.batch_size, options.steps) < 1 or options.num_workers < 0:
        raise ValueError(
            f"batch_size = {options.batch_size} and steps = {options.steps} must be at least 1, "
            f"num_workers = {options.num_workers} at least 0"
        )
    sampler = ShuffledBatches(len(data), options.batch_size, seed=0, start=0, stop=options.steps + 2)
    loader = DataLoader(
        data,
        batch_sampler=sampler,
        collate_fn=lambda batch: batch,
        num_workers=options.num_workers,
        pin_memory=device.type == "cuda",
    )
    for step, batch in enumerate(loader):
        for value in batch.values():
            value.to(device, non_blocking=True)
        if step == 1:
            began = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return options.steps * options.batch_size / (time.perf_counter() - began)


if __name__ == "__main__":
    main()

"""Trains a small vision transformer to classify a prepared folder, to stand in for DINOv2 where that cannot be had.

    python -m dataset.standin_encoder data/digits --out data/digits/encoder

It has seen the labels and these very images, so a comparison made with it says nothing about DINOv2: it only lets the
alignment and the evaluation run anywhere. The result is a folder that `--encoder` accepts, in timm's own format.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch.nn import functional as F
from tqdm import tqdm

from dataset.prepared import PreparedImages, ShuffledBatches
import models  # noqa: F401  (before timm: see its docstring)
import timm
from timm.models import save_for_hf

ARCHITECTURE = "vit_tiny_patch16_224"
HELD_OUT = 10  # one image in so many is kept to measure the accuracy


@dataclass(frozen=True)
class Options:
    data: Annotated[str, tyro.conf.Positional]
    """Prepared folder with labels."""
    out: str
    """Folder to write."""
    patch_size: int = 2
    """Patch size in pixels."""
    width: int = 64
    """Token width."""
    depth: int = 3
    """Blocks."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 64
    """Images per step."""
    lr: float = 1e-3
    """Peak AdamW learning rate; one cycle."""
    seed: int = 0
    """Initial weights, order and shifts."""


def main(argv=None):
    options = tyro.cli(Options, args=argv, prog="python -m dataset.standin_encoder", description=__doc__)
    folder = Path(options.out)
    record = folder / "training.json"
    if record.is_file():
        trained = json.loads(record.read_text())["options"]
        if trained != asdict(options):
            raise SystemExit(
                f"error: {options.out} holds an encoder trained with other options {trained}; "
                "give another --out, or delete that folder first"
            )
        return print(f"{options.out}: already trained")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is not empty and was not made by this program; give another --out")
        for name in ("patch_size", "width", "depth", "epochs", "batch_size", "lr"):
            if getattr(options, name) <= 0:
                raise ValueError(f"{name} = {getattr(options, name)}: must be above 0")
        train(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; nothing was written") from None


def train(options):
    data = PreparedImages(options.data)
    if data.resolution % options.patch_size:
        raise ValueError(f"patch_size = {options.patch_size} does not divide the images' {data.resolution} pixels")
    num_heads = max(1, options.width // 32)
    if options.width % num_heads:
        raise ValueError(f"width = {options.width}: is not shared evenly by {num_heads} heads; take a multiple of 32")
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The final norm stays in front of the pooling, so that patch tokens come out normalised, as DINOv2's do.
    architecture = dict(
        img_size=data.resolution,
        patch_size=options.patch_size,
        embed_dim=options.width,
        depth=options.depth,
        num_heads=num_heads,
        num_classes=data.num_classes,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
    )
    model = timm.create_model(ARCHITECTURE, weight_init="jax", **architecture)
    # timm starts positions at a standard deviation of 0.02, which a small model on few images takes long to outgrow:
    # until then it sees a bag of patches.
    torch.nn.init.normal_(model.pos_embed, std=0.5)
    model.to(device)

    everything = data.__getitems__(range(len(data)))
    held_out = torch.arange(len(data)) % HELD_OUT == 0
    kept = (~held_out).nonzero().flatten()
    # Its own pretrained_cfg carries this normalisation to whoever loads the folder.
    model.pretrained_cfg = {
        "architecture": ARCHITECTURE,
        "tag": "standin",
        "num_classes": data.num_classes,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic",
        "input_size": (3, data.resolution, data.resolution),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }

    def batch(rows):
        images = everything["images"][rows].to(device) / 127.5 - 1
        return images, everything["labels"][rows].to(device)

    steps = max(1, options.epochs * len(kept) // options.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps)
    shift = data.resolution // 16  # augmentation in pixels; none for digits, which one pixel deforms
    for rows in tqdm(ShuffledBatches(len(kept), options.batch_size, options.seed, 0, steps), desc="stand-in encoder"):
        images, labels = batch(kept[rows])
        padded = F.pad(images, [shift] * 4, mode="replicate")
        left, top = torch.randint(0, 2 * shift + 1, (2,)).tolist()
        images = padded[:, :, top : top + data.resolution, left : left + data.resolution]
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    model.eval()
    with torch.no_grad():
        right = [
            model(images).argmax(-1) == labels for images, labels in map(batch, held_out.nonzero().flatten().split(256))
        ]
    accuracy = torch.cat(right).float().mean().item()
    folder = Path(options.out)
    save_for_hf(model, str(folder), model_args=architecture, safe_serialization=True)
    (folder / "model.safetensors").chmod(0o644)  # written for the owner alone, but runs share encoders
    record = {"options": asdict(options), "held_out_accuracy": accuracy, "held_out_images": int(held_out.sum())}
    (folder / "training.json").write_text(json.dumps(record, indent=1))
    print(f"{options.out}: {accuracy:.1%} of {int(held_out.sum())} held-out images classified correctly")


if __name__ == "__main__":
    main()

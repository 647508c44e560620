"""Trains a small network to classify a prepared folder, to stand in where published encoders cannot be had.

    python -m dataset.standin_encoder data/digits --out data/digits/encoder
    python -m dataset.standin_encoder data/digits --kind convnet --out data/digits/judge

The vision transformer stands in for DINOv2: `--encoder` takes its folder, and runs align to its tokens. The ConvNeXt
judges samples by its pooled features. It differs in architecture, seed and training, so that no run is ranked in the
space that it is trained towards. Both have seen the labels and these very images: a comparison made with them says
nothing about DINOv2 or Inception. The result is a folder in timm's own format.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch.nn import functional as F
from tqdm import tqdm

from dataset.prepared import PreparedImages, ShuffledBatches
import models  # noqa: F401  (before timm: see its docstring)
import timm
from timm.models import save_for_hf

from runtime import Use, check_folder, derive_seed, lock_folder, plain_errors, replaced, write_json

HELD_OUT = 10  # one image in so many is kept to measure the accuracy


@dataclass(frozen=True)
class Options:
    data: Annotated[str, tyro.conf.Positional]
    """Prepared folder with labels."""
    out: str
    """Folder to write."""
    kind: Literal["vit", "convnet"] = "vit"
    """What to train: a vision transformer to align to, or a ConvNeXt that judges."""
    patch_size: int = 2
    """Patch size in pixels; the ConvNeXt begins with patches of half of it, and halves the sides three times more."""
    width: int = 64
    """Token width, or number of pooled features."""
    depth: int = 3
    """Blocks of the vision transformer. The ConvNeXt has one in each of its four stages."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 64
    """Images per step."""
    lr: float = 1e-3
    """Peak AdamW learning rate; one cycle."""
    seed: int = 0
    """Initial weights, order and augmentation. Those of the two kinds differ also for one seed."""


def main(argv=None):
    options = tyro.cli(Options, args=argv, prog="python -m dataset.standin_encoder", description=__doc__)
    with plain_errors(ValueError, OSError, KeyboardInterrupt):
        train(options)


def train(options: Options):
    """Write the folder unless it is there. Raises ValueError where options or folder cannot be used."""
    folder, settings = Path(options.out), asdict(options)
    del settings["out"]  # a folder may be moved
    record = folder / "training.json"
    if "held_out_accuracy" in check_folder(folder, record.name, settings, "options"):
        return print(f"{folder}: already trained")
    for name in ("patch_size", "width", "depth", "epochs", "batch_size", "lr"):
        if settings[name] <= 0:
            raise ValueError(f"{name} = {settings[name]}: must be above 0")
    data, convnet = PreparedImages(options.data), options.kind == "convnet"
    seed = derive_seed(options.seed, Use.WEIGHTS) if convnet else options.seed
    torch.manual_seed(seed)
    model, architecture = build(options, data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    with lock_folder(folder):
        check_folder(folder, record.name, settings, "options")  # another run may have come first
        everything = data.__getitems__(range(len(data)))
        held_out = torch.arange(len(data)) % HELD_OUT == 0
        kept = (~held_out).nonzero().flatten()

        def batch(rows):
            images = everything["images"][rows].to(device) / 127.5 - 1
            return images, everything["labels"][rows].to(device)

        steps = max(1, options.epochs * len(kept) // options.batch_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps)
        shift = data.resolution // 16  # augmentation in pixels; none for digits, which one pixel deforms
        order = ShuffledBatches(len(kept), options.batch_size, seed, 0, steps)
        for rows in tqdm(order, f"stand-in {options.kind}"):
            images, labels = batch(kept[rows])
            padded = F.pad(images, [shift] * 4, mode="replicate")
            left, top = torch.randint(0, 2 * shift + 1, (2,)).tolist()
            images = padded[:, :, top : top + data.resolution, left : left + data.resolution]
            if convnet:  # mixup (arXiv 1710.09412), and smoothed labels
                share, labels = torch.rand(()).item(), F.one_hot(labels, data.num_classes).float()
                images, labels = (share * x + (1 - share) * x.flip(0) for x in (images, labels))
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1 * convnet)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

        model.eval()
        with torch.no_grad():
            parts = map(batch, held_out.nonzero().flatten().split(256))
            accuracy = torch.cat([model(images).argmax(-1) == labels for images, labels in parts]).float().mean().item()
        write_json(record, {"options": settings})  # whose folder this is, should the rest find the disk full
        with tempfile.TemporaryDirectory() as made:
            save_for_hf(model, made, model_args=architecture, safe_serialization=True)
            for path in Path(made).iterdir():
                with replaced(folder / path.name) as file:
                    file.write(path.read_bytes())
        count = int(held_out.sum())
        write_json(record, {"options": settings, "held_out_accuracy": accuracy, "held_out_images": count})
    print(f"{folder}: {accuracy:.1%} of {count} held-out images classified correctly")


def build(options: Options, data: PreparedImages):
    """An untrained model, and the arguments that build it again. Raises ValueError where they do not fit the data."""
    patch, width, convnet = options.patch_size, options.width, options.kind == "convnet"
    num_heads, stem = max(1, width // 32), max(1, patch // 2)
    if data.resolution % patch:
        raise ValueError(f"patch_size = {patch} does not divide the images' {data.resolution} pixels")
    if convnet and data.resolution < 8 * stem:
        raise ValueError(f"patch_size = {patch}: images of {data.resolution} pixels are too small for four stages")
    if width % (4 if convnet else num_heads):
        raise ValueError(f"width = {width}: take a multiple of {4 if convnet else 32}")
    if convnet:
        name, first, head = "convnext_tiny", "stem.0", "head.fc"
        architecture = dict(depths=(1, 1, 1, 1), dims=(width // 4, width // 2, width, width), kernel_sizes=3)
        architecture |= dict(patch_size=stem, ls_init_value=1.0, num_classes=data.num_classes)
        model = timm.create_model(name, **architecture)
    else:
        name, first, head = "vit_tiny_patch16_224", "patch_embed.proj", "head"
        # The final norm stays in front of the pooling, so that patch tokens come out normalised, as DINOv2's do.
        architecture = dict(img_size=data.resolution, patch_size=patch, embed_dim=width, depth=options.depth)
        architecture |= dict(num_heads=num_heads, class_token=False, global_pool="avg", fc_norm=False)
        architecture |= dict(num_classes=data.num_classes)
        model = timm.create_model(name, weight_init="jax", **architecture)
        # timm starts positions at a standard deviation of 0.02, which a small model on few images takes long to
        # outgrow: until then it sees a bag of patches.
        torch.nn.init.normal_(model.pos_embed, std=0.5)
    # Its own pretrained_cfg carries this normalisation to whoever loads the folder.
    half, size = (0.5, 0.5, 0.5), (3, data.resolution, data.resolution)
    model.pretrained_cfg = dict(architecture=name, tag="standin", num_classes=data.num_classes, mean=half, std=half)
    model.pretrained_cfg |= dict(interpolation="bicubic", input_size=size, first_conv=first, classifier=head)
    return model, architecture


if __name__ == "__main__":
    main()

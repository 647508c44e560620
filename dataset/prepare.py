"""Turns images into the folder that the trainer reads. Running the same command again resumes it.

    python -m dataset.prepare digits --out data/digits
    python -m dataset.prepare path/to/train.parquet --out data/cifar10 --resolution 32
    python -m dataset.prepare uoft-cs/cifar10 --out data/cifar10 --resolution 32
    python -m dataset.prepare path/to/repa_data --out data/imagenet256 --resolution 256 --autoencoder sd-vae-ft-mse
    torchrun --nproc_per_node=8 -m dataset.prepare path/to/imagenet/train --out data/imagenet256 --resolution 256 \\
        --autoencoder sd-vae-ft-ema --encoder dinov2-vit-b
    python -m dataset.prepare path/to/captioned --out data/coco256 --resolution 256 --autoencoder sd-vae-ft-ema \\
        --text-encoder openai/clip-vit-large-patch14

Files may be BMP, JPEG, PNG, PPM, TIFF and WebP. What cannot be read, or is of another kind, is named and left out.
With --autoencoder the moments of the latents are stored too, with --encoder the tokens of frozen encoders, with
--text-encoder those of the captions. A folder holds, for N images,

    images/NNNNN.bin, sizes.npy     the cropped images as PNG, 256 to a file; the bytes of each
    labels.npy                      (N) int64, -1 for images that could not be read
    latents/ID/moments.npy          (N, 2C, h, w) float16: mean and standard deviation; ID is the autoencoder's
    features/ID/tokens.npy          (N, T, dim) float16; ID is the encoder's
    text/ID/tokens.npy, null.npy    (N, L, W + 1) float16, and (L, W + 1) of an empty caption: tokens, and their mask as
                                    last channel; ID is the text encoder's. captions.json beside them has the captions

where --mirror appends N rows for the mirrored images, but not to text: their captions are the same. Each of these
folders has a checksum for every 256 images in NNNNN.json, and a meta.json that is written last. What is written does
not depend on the number of processes.
"""

import contextlib
import functools
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from dataset.sources import limited, open_source, with_captions, with_latents
from dataset.stages import Images, Rows, Taken, Text, sha256, stored
from models.autoencoder import load_autoencoder
from models.encoders import FrozenEncoder
from models.text import load_text_encoder
from runtime import Ranks, check_folder, lock_folder, plain_errors, read_json, replaced


@dataclass(frozen=True)
class Options:
    source: Annotated[str, tyro.conf.Positional]
    """`digits`, a folder with one subfolder per class, a parquet file or a folder of them, a hub dataset name, a folder
    that REPA has prepared, with images/ and vae-sd/ in it, or LightningDiT's safetensors, latents without images."""
    out: str
    """Folder to write."""
    resolution: int | None = None
    """Side of the square images; larger ones are cropped and resized as in ADM. Digits are 8 if not given."""
    split: str = "train"
    """Split of a hub dataset, or of a folder of parquet files: that of their names, as for datasets.load_dataset."""
    image_column: str = ""
    """Column with the images of a parquet or hub dataset; found by its type if not given."""
    label_column: str = ""
    """Column with the labels; found by its type or name if not given."""
    exif: bool = False
    """Turn photographs upright by their EXIF orientation. ADM's ImageNet ignores it. TIFF files are always turned."""
    limit: int | None = None
    """Take only so many images, spread evenly over the source: a trial."""
    autoencoder: str = "pixels"
    """Store the latents of sd-vae-ft-mse, sd-vae-ft-ema, a hub name, a folder saved by diffusers, or a file of LDM."""
    encoder: tuple[str, ...] = ()
    """Store the tokens of these frozen encoders, named as for training."""
    encoder_weights: tuple[str, ...] = ()
    """Local weights of the encoders, in their order."""
    token_grid: int | None = None
    """Tokens along one side; if not given, those of SiT with patch size 2."""
    text_encoder: str = ""
    """Store the tokens of captions: `words`, which needs no download, or a folder or hub name of a text encoder of
    transformers, such as CLIP and T5, or of a QwenImagePipeline. Labels are then not needed."""
    text_tokens: int | None = None
    """Tokens of each caption, which are cut or padded to; 8 of `words` and 77 of others if not given."""
    caption_column: str = ""
    """Column with the captions, or their key in metadata.jsonl; found by its name if not given."""
    mirror: bool = False
    """Store latents and tokens of the mirrored images too."""
    statistics: bool = False
    """Also write the autoencoder with mean and deviation of these latents, for one that publishes none, beside them."""
    batch_size: int = 64
    """Images that a network takes at a time."""
    verify: bool = False
    """Compare a finished folder with its checksums and write nothing."""


def main(argv=None):
    options = tyro.cli(Options, args=argv, prog="python -m dataset.prepare", description=__doc__)
    with plain_errors(ValueError, OSError, KeyboardInterrupt), Ranks() as ranks:
        verify(Path(options.out)) if options.verify else prepare(options, ranks)


def prepare(options: Options, ranks: Ranks):
    """Write the folder, or what is missing of it. Raises ValueError on sources and settings that cannot be used."""
    resolution = 8 if options.resolution is None and options.source == "digits" else options.resolution
    if resolution is None or resolution < 1:
        raise ValueError(f"resolution = {resolution}: say the side of the square images, such as --resolution 256")
    if options.batch_size < 1:
        raise ValueError(f"batch_size = {options.batch_size}: must be at least 1")
    if options.statistics and options.autoencoder == "pixels":
        raise ValueError("statistics = True: is for latents; give an --autoencoder, or leave it out")
    weights = options.encoder_weights or ("",) * len(options.encoder)
    if len(weights) != len(options.encoder):
        raise ValueError(f"encoder_weights = {weights}: give one for each of {len(options.encoder)} encoders, or none")
    if not options.text_encoder and (options.text_tokens is not None or options.caption_column):
        raise ValueError("text_tokens and caption_column are for captions; give a --text-encoder, or leave them out")
    with ranks.one_first():  # everything that may be downloaded, before the first image
        source = open_source(options)
        if options.text_encoder:
            source = with_captions(source, options.source)
        source = limited(source, options.limit)
        autoencoder = load_autoencoder(options.autoencoder, normalised=not options.statistics)
        if options.statistics and autoencoder.quirk in ("squares", "unit"):
            raise ValueError(f"statistics = True: {options.autoencoder!r} comes with its own; leave it out")
        if source.moments and (options.autoencoder == "pixels" or options.mirror and not source.mirrored):
            raise ValueError(
                f"{options.source!r} holds latents: give the --autoencoder that made them (REPA's is sd-vae-ft-mse), "
                "and no --mirror unless it has mirrored ones"
            )
        if source.load is None and options.encoder:
            raise ValueError(f"encoder = {options.encoder}: {options.source!r} holds no images that they could encode")
        size, rest = divmod(resolution, autoencoder.downsampling)
        if rest:
            unit = f"{autoencoder.downsampling} pixels, one latent of {options.autoencoder!r}"
            raise ValueError(f"resolution = {resolution} is not a multiple of {unit}")
        if source.moments:
            source = with_latents(source, (2 * autoencoder.channels, size, size))
        grid = size // 2 if options.token_grid is None else options.token_grid
        if grid < 1:
            raise ValueError(f"token_grid = {grid}: must be at least 1")
        encoders = [FrozenEncoder(name, grid, file).to(ranks.device) for name, file in zip(options.encoder, weights)]
        if options.text_encoder:
            text_encoder = load_text_encoder(options.text_encoder, options.text_tokens).to(ranks.device)
    stages = [Images(options, source, resolution, ranks)]
    if options.autoencoder != "pixels":
        shape, compute = (2 * autoencoder.channels, size, size), autoencoder.to(ranks.device).moments
        kind, settings = (Taken, {"taken": True}) if source.moments else (Rows, {})
        stages.append(kind("latents", "moments", autoencoder, compute, shape, settings, stages[0], options))
    for encoder in encoders:
        shape = (grid * grid, encoder.dim)
        stages.append(Rows("features", "tokens", encoder, encoder, shape, {"grid": grid}, stages[0], options))
    if options.text_encoder:
        stages.append(Text(text_encoder, stages[0], options))
    with claim(stages, ranks):
        for stage in stages:
            stage.run()
    if options.statistics and ranks.main:
        with lock_folder(stages[1].folder):
            write_normalised(autoencoder, stages[1])


def write_normalised(autoencoder, stage):
    """The autoencoder with mean and deviation of each channel of a stage's latents, as a folder of diffusers."""
    out, unfinished = stage.folder / "autoencoder", stage.folder / "autoencoder.unfinished"
    if out.exists():
        print(f"{out}: already there")
        return
    array, readable = np.load(stage.path, mmap_mode="r"), stage.images.readable
    first, second, count = 0, 0, 0  # sums of a posterior's first and second moments
    for rows in stage.parts:
        for start in range(0, len(array), stage.count):  # the mirrored ones follow
            part = array[start + rows.start : start + rows.stop][readable[rows]].astype(np.float64)
            mean, std = np.split(part, 2, axis=1)
            first, second = first + mean.sum((0, 2, 3)), second + (mean**2 + std**2).sum((0, 2, 3))
            count += mean.size // mean.shape[1]
    mean = first / count
    found = {"latents_mean": mean.tolist(), "latents_std": np.sqrt(second / count - mean**2).tolist()}
    autoencoder.model.register_to_config(**found, scaling_factor=1.0, shift_factor=None)
    autoencoder.model.save_pretrained(unfinished)
    unfinished.rename(out)
    print(f"written: {out}, with latents_mean and latents_std; train with --autoencoder {out}", flush=True)


def claim(stages: list, ranks: Ranks):
    """Lock the folder if anything is missing, and return the lock, once it is sure that all processes see that folder.

    Raises ValueError where the folder is foreign, in use, or not shared.
    """
    folder, lock = stages[0].folder, None
    mark = folder / ".shared"
    if ranks.main:
        for stage in stages:
            check_folder(stage.folder, "settings.json", stage.settings)
        for note in stages[0].source.notes:
            print(note)
        if not all(stage.meta.is_file() for stage in stages):
            estimate(stages, folder)
            lock = lock_folder(folder)
            for stage in stages:  # another run may have come first
                check_folder(stage.folder, "settings.json", stage.settings)
            with replaced(mark) as file:
                file.write(secrets.token_hex(8).encode())
    ranks.barrier()
    facts = {f"what process 0 wrote to {mark}": mark.read_text() if mark.is_file() else ""}
    for stage in stages:
        stage.finished = stage.meta.is_file()
        facts[str(stage.folder)] = {**stage.settings, "finished": stage.finished}
    ranks.agree(facts, "give all of them the same source and networks, and --out on a disk that all of them see")
    if lock:
        mark.unlink()
    return lock or contextlib.nullcontext()


def estimate(stages: list, folder: Path):
    """Say how much disk and time the unfinished stages will take; ValueError where the disk is too small."""
    needed, world, binary = 0, stages[0].ranks.world, functools.partial(tqdm.format_sizeof, suffix="iB", divisor=1024)
    for stage in stages:
        left = stage.count * sum(not stage.record(rows).is_file() for rows in stage.parts) / len(stage.parts)
        if left and not stage.meta.is_file():
            seconds, size = stage.probe()
            needed += int(left * size)
            amount = f"{binary(left * size)} and {left * seconds / world / 60:.3g} minutes"
            print(f"{stage.what}: about {amount} ({1 / seconds:.0f} images/s in each of {world} processes)", flush=True)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        remedy = "give another --out, or try --limit"
        raise ValueError(f"{folder} needs about {binary(needed)} more, the disk has {binary(free)}; {remedy}")


def verify(folder: Path):
    """Compare every chunk with its checksum. Raises ValueError that names those that differ."""
    if not (folder / "meta.json").is_file():
        raise ValueError(f"{folder} is not finished, or is not a prepared folder")
    meta, bad = read_json(folder / "meta.json"), []
    count, per_file = meta["count"], meta["chunk"]
    for record in sorted((folder / "images").glob("*.json")):
        path = record.with_suffix(".bin")
        if not path.is_file() or sha256(path.read_bytes()) != read_json(record)["sha256"]:
            bad.append(str(path))
    arrays = [path for kind in ("latents/*/moments", "*/*/tokens") for path in folder.glob(f"{kind}.npy")]
    for path in arrays:
        array = np.load(path, mmap_mode="r")
        for start in range(0, count, per_file):
            record, rows = path.parent / f"{start // per_file:05}.json", range(start, min(start + per_file, count))
            if not record.is_file():
                raise ValueError(f"{path.parent} is not finished; the same command without --verify goes on with it")
            if sha256(stored(array, rows, count)) != read_json(record)["sha256"]:
                bad.append(f"{path} rows {start} to {rows.stop - 1}")
    if bad:
        remedy = "Delete the NNNNN.json of each and the meta.json beside it, and prepare again"
        raise ValueError(f"these differ from their checksums: {'; '.join(bad)}. {remedy}")
    print(f"{folder}: images and {len(arrays)} arrays are as they were written")


if __name__ == "__main__":
    main()

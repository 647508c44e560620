"""Draws images from a checkpoint: an npz in the layout of ADM's evaluator, a grid, and all settings beside them.

    python -m eval.sample runs/imagenet256/dar/last.pt --preset repa-sde-250 --num-samples 50000 --seed 0
    torchrun --nproc_per_node=8 -m eval.sample runs/imagenet256/dar/last.pt --preset repa-sde-250
    python -m eval.sample SiT-XL-2-256x256.pt --model SiT-XL/2 --autoencoder sd-vae-ft-ema --preset sit-ode-250

Several guidance scales or averages make several sets of the same noise and labels, which one `eval.metrics` compares.
The same command again, with any number of processes, goes on where it stopped. An image depends on the settings, the
seed and its index alone: other processes or batch sizes change it by rounding alone, in float32 at most one grey level.
The folder, which all processes must see, is named after the checkpoint, the sampler, and a hash of every setting that
moves FID. It holds

    NAME.npz            arr_0, uint8 (N, H, W, 3), and arr_1, int64 (N), the labels
    grid.png            the first 64, by label, with their prompts
    prompts.txt         of a model of captions: line k is what label k stands for
    settings.json       the settings, and where each start of the command ran
    samples/CHUNK.npy   64 images each; may be deleted once the npz is there

Shapes: B batch, N all images, C channels of what SiT sees, S its size, H = W pixels.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from eval.sample_folder import Settings, claim, finish, folder_name, record, undone
from eval.samplers import draw
from models.autoencoder import load_autoencoder
from models.registry import takes_text
from runtime import Ranks, Use, derive_seed, fingerprint, plain_errors
from runtime import read_json, tf32, write_array, write_json
from weights import load_trained

CHUNK = 64  # images in a file, whatever the batch and the processes; the grid shows the first file
PRESETS = {
    "repa-sde-250": {"sampler": "sde", "steps": 250, "cfg_scale": (1.0,)},
    "sit-ode-250": {"sampler": "heun", "steps": 125, "cfg_scale": (1.0,)},
    "paper-cfg-1.5": {"sampler": "sde", "steps": 250, "cfg_scale": (1.5,)},
    "fast-ode-50": {"sampler": "euler", "steps": 50, "cfg_scale": (1.0,)},
}


@dataclass(frozen=True)
class Options:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Ours (last.pt), what eval.export made of it (the folder, or its name on the hub), or weights that SiT or REPA has
    released."""
    out: str = ""
    """Folder to write. Empty: samples/{run}-{step}-{sampler}-{hash of the settings}."""
    preset: Literal["repa-sde-250", "paper-cfg-1.5", "sit-ode-250", "fast-ode-50"] = "repa-sde-250"
    """Sampler, steps and guidance scale, of which any given by hand wins: Euler-Maruyama with 250 steps, without and
    with guidance 1.5; Heun with 125 steps, hence 249 evaluations; Euler with 50, for a quick look. A distilled model
    brings its own few steps instead."""
    sampler: Literal["euler", "heun", "sde"] | None = None
    """ODE by Euler or Heun, or SDE by Euler-Maruyama."""
    steps: int | None = None
    """Sampler steps; heun costs two network evaluations in each but the last."""
    cfg_scale: tuple[float, ...] = ()
    """Guidance scale; 1: none. Each of several makes a set."""
    guide: str = ""
    """A weaker checkpoint of ours for autoguidance, which takes the place of the model without label."""
    guidance_interval: tuple[float, float] | None = None
    """Times between which guidance is applied; all if not given. 1 is noise."""
    time_shift: float = 1.0
    """Moves the sampler's times towards noise, t to s t / (1 + (s - 1) t), as in SD3; 1: none."""
    num_samples: int = 50_000
    """Images to draw."""
    seed: int = 0
    """Decides noise and labels."""
    labels: Literal["balanced", "random"] = "balanced"
    """Each class as often as the others, or every label on its own, as SiT and REPA draw them."""
    classes: tuple[int, ...] = ()
    """Draw these labels only, in random order. Empty: all that had training images."""
    prompts: tuple[str, ...] = ()
    """Captions to draw, of a model of captions, or a file with one in each line. Their numbers are the labels."""
    batch_size: int = CHUNK
    """Images that a process takes at a time, at most the 64 of a file."""
    precision: Literal["auto", "bf16", "tf32", "fp32"] = "auto"
    """Of the network; auto is bf16 on a GPU and fp32 on a CPU. The sampler's state is float64."""
    average: tuple[str, ...] = ()
    """Which moving average of ours, by its decay, or `none` for the weights themselves; the first if not given. Each of
    several makes a set."""
    model: str = ""
    """Name of a released model, such as SiT-XL/2."""
    autoencoder: str = ""
    """Decodes the samples; must be given for released weights (`pixels` for none). Empty: the one of the run."""
    path: Literal["linear", "cosine"] | None = None
    """Interpolant that the model was trained with; if not given the run's, or linear for released weights."""


def main(argv: list | None = None):
    options = tyro.cli(Options, args=argv, prog="python -m eval.sample", description=__doc__)
    with plain_errors(ValueError, OSError, KeyboardInterrupt), Ranks() as ranks:
        several = sets(options)
        for each, before in zip(several[1:], several):
            if each.average != before.average:  # so that a wrong one is not told only after hours of drawing
                load(each, ranks)
        folders = [sample(each, ranks) for each in several]
        if ranks.main and len(folders) > 1:
            files = " ".join(str(folder / f"{folder.name}.npz") for folder in folders)
            print(f"to compare them: python -m eval.metrics {files} --reference IMAGES")


def sets(options: Options) -> list[Options]:
    """The same with one average and one guidance scale at most, for each pair of those given."""
    averages, scales = [(average,) for average in options.average], [(scale,) for scale in options.cfg_scale]
    pairs = [*itertools.product(averages or [()], scales or [()])]
    if len(pairs) == 1:
        return [options]
    if options.out:
        raise ValueError(f"out = {options.out!r}: is for one set of images, and these are {len(pairs)}; leave it out")
    some = any(scale != 1 for scale in options.cfg_scale)
    unguided = {"guide": "", "guidance_interval": None} if some else {}  # where the scale is 1 they have no effect
    return [
        dataclasses.replace(options, average=average, cfg_scale=scale, **(unguided if scale == (1,) else {}))
        for average, scale in pairs
    ]


def sample(options: Options, ranks: Ranks) -> Path:
    """Write the folder, or what is missing of it, and return it. Raises ValueError on what cannot be used."""
    if options.batch_size < 1:
        raise ValueError(f"batch_size = {options.batch_size}: must be at least 1")
    model, guide, autoencoder, settings, origin = load(options, ranks)
    folder = Path(options.out) if options.out else Path("samples") / folder_name(options, settings, origin)
    shape = (settings.num_samples, *2 * (model.input_size * autoencoder.downsampling,), 3)
    npz = folder / f"{folder.resolve().name}.npz"
    starts = range(0, shape[0], CHUNK)
    chunks = {f"{first // CHUNK:05}.npy": range(first, min(first + CHUNK, shape[0])) for first in starts}
    with claim(folder, settings) if ranks.main else contextlib.nullcontext():
        if ranks.main and not npz.is_file():
            left = sum(map(len, undone(npz, chunks).values()))
            record(options, settings, origin, folder, shape, left, ranks)
        ranks.barrier()  # nobody looks before the folder is known to be ours, and is there
        made, missing = folder / "settings.json", undone(npz, chunks)
        content = hashlib.sha256(made.read_bytes()).hexdigest()[:12] if made.is_file() else "none"
        facts = {f"the content of {made}": content, "the hash of the settings": settings.digits()}
        ranks.agree(facts, "give all machines the same checkpoint, and an --out that is on a disk they share")
        mine = {name: missing[name] for name in list(chunks)[ranks.rank :: ranks.world] if name in missing}
        began = time.perf_counter()
        write_chunks(folder / "samples", mine, model, autoencoder, settings, options.batch_size, ranks, guide)
        ranks.barrier()
        if ranks.main:
            if drawn := sum(map(len, missing.values())):
                seconds = (time.perf_counter() - began) * 1000 / drawn
                write_json(made, read_json(made) | {"seconds_per_1000_images": round(seconds, 3)})
            files = {folder / "samples" / name: len(indices) for name, indices in chunks.items()}
            finish(files, npz, shape, labels_of(settings, range(shape[0]), model.num_classes))
    return folder


# ---- what is drawn ----


def load(options: Options, ranks: Ranks):
    """Model, guide (or None) and autoencoder on this process's device, the resolved Settings, where the model is from.

    Raises ValueError where the options fit neither each other nor the checkpoint.
    """
    with ranks.one_first():  # the hub may be asked
        model, trained = load_trained(options.checkpoint, "".join(options.average), options.model)
        guide, known = load_trained(options.guide) if options.guide else (None, {})
    for network in filter(None, (model, guide)):
        network.align_depth = ()  # nobody reads the projections here
    if guide and known.get("content of text", "") != trained.get("content of text", ""):
        raise ValueError(f"guide = {options.guide!r}: the text encoder is another one, or only one of both has any")
    prompts = read_prompts(options)
    if bool(prompts) != takes_text(trained.get("model", options.model)):
        what = "needs some: captions, or a file of them" if not prompts else "has no effect on a model of labels"
        name = trained.get("model", options.model)
        raise ValueError(f"prompts = {options.prompts}: {what}; {options.checkpoint} is of {name}")
    if prompts:
        if not trained:
            raise ValueError(f"{options.checkpoint} is not of this trainer; draw from it by diffusers' pipeline")
        from models.mmdit import Prompted  # takes seconds

        tokens = encoded(prompts, trained, ranks)
        model, guide = (network and Prompted(network, tokens) for network in (model, guide))
        trained = {**trained, "classes with images": ()}
    name = options.autoencoder or trained.get("autoencoder", "")
    if not name:
        raise ValueError(
            f"autoencoder = '': say what decodes the samples of {options.checkpoint}, such as "
            "--autoencoder sd-vae-ft-ema, or pixels for a model of images"
        )
    with ranks.one_first():
        autoencoder = load_autoencoder(name).to(ranks.device)
    expected = trained.get("content of autoencoder", autoencoder.fingerprint)
    if not options.autoencoder and autoencoder.fingerprint != expected:
        raise ValueError(
            f"{options.checkpoint} was trained with another autoencoder than the present {name!r}; give "
            "the right one with --autoencoder, or this one to use it all the same"
        )
    if autoencoder.channels != model.in_channels:
        raise ValueError(
            f"autoencoder = {name!r} has {autoencoder.channels} channels and {options.checkpoint} has "
            f"{model.in_channels}; give the --autoencoder that it was trained with"
        )
    settings = resolve(options, trained, model, autoencoder, ranks.device)
    if guide:
        check_guide(options.guide, guide, known, model, settings)
        settings = dataclasses.replace(settings, guide=content_of(guide, known))
        guide = guide.to(ranks.device)
    settings = dataclasses.replace(settings, prompts=tuple(prompts))
    origin = {"checkpoint": str(options.checkpoint), "model": options.model or trained["model"], "autoencoder": name}
    origin |= {"guide": options.guide, **{key: trained.get(key) for key in ("step", "average")}}
    drawn = f"{len(settings.classes) or model.num_classes} of {model.num_classes} classes"
    origin["classes"] = drawn + ", those with training images" * (settings.classes != tuple(options.classes))
    return model.to(ranks.device), guide, autoencoder, settings, origin


def read_prompts(options: Options) -> list[str]:
    """The prompts, from a file where the only one is the name of a file."""
    prompts = list(options.prompts)
    if len(prompts) == 1 and os.path.isfile(prompts[0]):  # Path's would not have names that are too long
        prompts = Path(prompts[0]).read_text(encoding="utf-8").splitlines()
    if several := [prompt for prompt in prompts if len(prompt.splitlines()) > 1]:
        raise ValueError(f"prompts: {several[0]!r} has several lines; give it as one")
    return prompts


def encoded(prompts: list[str], trained: dict, ranks: Ranks) -> torch.Tensor:
    """(P, L, W + 1), as a run has read its captions. Raises ValueError where its text encoder cannot be had."""
    from models.text import load_text_encoder

    name = trained["text encoder"]
    with ranks.one_first():
        encoder = load_text_encoder(name, trained["arguments"]["text_tokens"]).to(ranks.device)
    if encoder.fingerprint != trained["content of text"]:
        raise ValueError(f"text encoder {name!r} is not what it was when {trained['data']} was prepared; put that back")
    parts = [encoder(prompts[first : first + CHUNK]) for first in range(0, len(prompts), CHUNK)]
    return torch.cat(parts).half().float().cpu()  # as they are stored for training


def check_guide(name: str, guide, known: dict, model, settings: Settings):
    """Raises ValueError where a guide and what is known of its run do not fit the model, as it is sampled."""
    facts = [(key, getattr(guide, key), getattr(model, key)) for key in ("in_channels", "input_size", "num_classes")]
    facts += [("path", known.get("path"), settings.path), ("few steps", bool(guide.step_times), False)]
    facts.append(("autoencoder", known.get("content of autoencoder"), settings.autoencoder))
    for key, has, needed in facts:
        if has != needed:
            raise ValueError(
                f"guide = {name!r} has {key} = {has!r}, and {needed!r} is needed; give one that was trained alike"
            )


def resolve(options: Options, trained: dict, model, autoencoder, device: torch.device) -> Settings:
    """The Settings that the options mean for a model of `load_trained` on a device. Without guide and prompts.

    Raises ValueError on the first value that cannot be used.
    """
    given = {key: value for key in PRESETS[options.preset] if (value := getattr(options, key)) not in (None, ())}
    chosen = {**PRESETS[options.preset], **given}
    if model.step_times:
        given |= {"guide": options.guide} if options.guide else {}
        given |= {"time_shift": options.time_shift} if options.time_shift != 1 else {}
        if given:
            raise ValueError(
                f"{', '.join(given)} cannot be chosen: {options.checkpoint} is a distilled model, drawn in the "
                f"{len(model.step_times)} steps that it was trained for"
            )
        chosen = {"sampler": "few-step", "steps": len(model.step_times), "cfg_scale": (1.0,)}
    (scale,), steps, fewest = map(float, chosen["cfg_scale"]), chosen["steps"], 1 + (chosen["sampler"] == "sde")
    interval, classes = options.guidance_interval or (0.0, 1.0), options.classes
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    for fine, problem in (
        (steps >= fewest, f"steps = {steps}: must be at least {fewest} for {chosen['sampler']}"),
        (0 <= scale < float("inf"), f"cfg_scale = {scale}: must be at least 0, and finite; 1 is none"),
        (0 <= interval[0] < interval[1] <= 1, f"guidance_interval = {interval}: must be 0 <= low < high <= 1"),
        (
            scale != 1 or options.guidance_interval is None,
            f"guidance_interval = {interval}: has no effect without guidance; give --cfg-scale, or leave it out",
        ),
        (
            scale == 1 or options.guide or trained.get("class_dropout_prob", 1) > 0,
            f"cfg_scale = {scale}: {options.checkpoint} was trained without a null class (class_dropout_prob = 0); "
            "give --cfg-scale 1, or a --guide",
        ),
        (
            scale != 1 or not options.guide,
            f"guide = {options.guide!r}: has no effect with guidance scale 1; give --cfg-scale, or leave it out",
        ),
        (
            0 < options.time_shift < float("inf"),
            f"time_shift = {options.time_shift}: must be above 0, and finite; 1 is none",
        ),
        (options.num_samples >= 1, f"num_samples = {options.num_samples}: must be at least 1"),
        (options.seed >= 0, f"seed = {options.seed}: must be at least 0"),
        (
            all(0 <= label < model.num_classes for label in classes),
            f"classes = {classes}: the model's are 0 to {model.num_classes - 1}",
        ),
        (len(set(classes)) == len(classes), f"classes = {classes}: repeats a label"),
        (precision != "tf32" or device.type == "cuda", f"precision = {precision!r}: needs a GPU; give fp32"),
    ):
        if not fine:
            raise ValueError(problem)
    trained_on = trained.get("classes with images", ())
    if not classes and 0 < len(trained_on) < model.num_classes:  # of the others the model has seen nothing
        classes = trained_on
    return Settings(
        weights=content_of(model, {"model": options.model, **trained}),
        autoencoder=autoencoder.fingerprint,
        sampler=chosen["sampler"],
        steps=steps,
        cfg_scale=scale,
        guide="",
        guidance_interval=tuple(map(float, interval)),
        time_shift=float(options.time_shift),
        path=options.path or trained.get("path", "linear"),
        precision=precision,
        num_samples=options.num_samples,
        seed=options.seed,
        labels=options.labels,
        classes=tuple(classes),
        prompts=(),
    )


def content_of(model, trained: dict) -> str:
    """A fingerprint of the weights, and of what these do not say: name, arguments, times of a distilled model."""
    identity = json.dumps([trained["model"], trained.get("arguments"), *model.step_times], sort_keys=True)
    return fingerprint(getattr(model, "model", model), identity)  # without the prompts of `Prompted`


def labels_of(settings: Settings, indices, num_classes: int) -> torch.Tensor:
    """Labels (B) int64 of these indices.

    random: each by its own (seed, index). balanced: K of them in a row are the K classes, shuffled by (seed, row); any
    prefix is thus as balanced as can be, and no part of it is of a few classes only.
    """
    classes = np.array(settings.classes or range(num_classes))
    if settings.labels == "random":
        draws = (np.random.default_rng(derive_seed(settings.seed, Use.LABELS, i)) for i in indices)
        return torch.tensor([int(draw.choice(classes)) for draw in draws])
    seeds = {row: derive_seed(settings.seed, Use.LABELS, row) for row in {i // len(classes) for i in indices}}
    rows = {row: np.random.default_rng(seed).permutation(classes) for row, seed in seeds.items()}
    return torch.tensor([int(rows[i // len(classes)][i % len(classes)]) for i in indices])


def sample_images(model, autoencoder, settings: Settings, indices, device: torch.device, guide=None) -> torch.Tensor:
    """The images with these indices, uint8 (B, 3, H, W) on the device; what `load` returns goes in.

    Raises ValueError where a sample is not finite.
    """
    shape = (model.in_channels, model.input_size, model.input_size)  # (C, S, S)
    seeds = [derive_seed(settings.seed, Use.SAMPLE, i) for i in indices]
    y = labels_of(settings, indices, model.num_classes).to(device)
    options = {name: getattr(settings, name) for name in ("cfg_scale", "guidance_interval", "time_shift", "path")}
    options |= {"num_steps": settings.steps, "guide": guide}
    if model.step_times:
        options = {"times": model.step_times}
    with tf32(settings.precision == "tf32"):
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            x = draw(model, seeds, shape, y, settings.sampler, **options)
        if not x.isfinite().all():  # as uint8 they would be noise that looks like a bad model
            raise ValueError(
                f"samples {indices[0]} to {indices[-1]} are not finite with precision = "
                f"{settings.precision!r}; try --precision fp32, or an earlier checkpoint"
            )
        return autoencoder.decode(x)


def write_chunks(
    folder: Path, chunks: dict, model, autoencoder, settings: Settings, batch_size: int, ranks: Ranks, guide
):
    """Draw and write this process's part of the missing chunks, {file name: indices}."""
    total, silent = sum(map(len, chunks.values())), not ranks.main or not chunks
    with tqdm(total=total, desc=f"process 1 of {ranks.world}", unit="img", disable=silent) as bar:
        for name, indices in chunks.items():
            parts = []
            for first in range(0, len(indices), batch_size):
                part = indices[first : first + batch_size]
                images = sample_images(model, autoencoder, settings, part, ranks.device, guide)
                parts.append(images.permute(0, 2, 3, 1).cpu().numpy())  # (B, H, W, 3)
                bar.update(len(part))
            write_array(folder / name, np.concatenate(parts))


if __name__ == "__main__":
    main()

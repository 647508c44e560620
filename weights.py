"""Weights in files: our checkpoints and exports, those of SiT, REPA and diffusers, and the models that they make."""

import argparse
import json
import math
import re
from pathlib import Path

import huggingface_hub
import safetensors.torch
import torch
from torch import nn

import config as configuration
from models.dar import head_aggregator
from models.registry import constructor, takes_text
from models.sit import FREQUENCIES, MAX_PERIOD
from runtime import fingerprint, one_line, read_json

SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors")
EXPORTED = ("config.json", "model.safetensors")  # what eval.export writes for us to read
JOINS = ("router.", "text_router.", "skips.")  # prefixes of the names of what joins sublayers
FORMAT = 2  # of last.pt; format 1 drew other random numbers, so its runs cannot go on


def load_file(path: str | Path, device="cpu", mmap: bool = False):
    """The content of a checkpoint, read without executing any code that it may hold.

    mmap: read tensors only when they are looked at.
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
    except (OSError, MemoryError):
        raise
    except Exception as error:  # bytes of other kinds of files raise many kinds
        raise ValueError(
            f"{str(path)!r} is not a weights file, or holds code, which is never executed ({type(error).__name__})"
        ) from None


def load_checkpoint(source: str | Path):
    """The same for a checkpoint, or for what `python -m eval.export` writes: a folder, or OWNER/NAME on the hub."""
    path = Path(source)
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix not in SUFFIXES
    if named and not path.parent.exists():  # otherwise it is a mistyped path
        try:
            path = Path(huggingface_hub.snapshot_download(str(source), allow_patterns=EXPORTED))
        except Exception as error:  # the hub's client raises many kinds
            raise ValueError(
                f"{str(source)!r} is neither a file nor a model on the hub that can be had ({one_line(error)})"
            ) from None
    if not path.is_dir():
        return load_file(path)
    if not all((path / name).is_file() for name in EXPORTED):
        raise ValueError(
            f"{str(path)!r} is a folder without {' and '.join(EXPORTED)}; give the checkpoint in it, such as "
            f"{path / 'last.pt'}, or a folder made by `python -m eval.export`"
        )
    config, weights = (path / name for name in EXPORTED)
    content = read_json(config)
    if not is_ours(content):
        raise ValueError(f"{str(config)!r} was not written by `python -m eval.export` of this version")
    weights = load_file(weights)
    return content | {"ema": weights, "emas": {content["average"]: weights}}


def is_ours(checkpoint) -> bool:
    """Whether a file's content is a checkpoint of `RunFolder.save`, or of eval.export, in its present format."""
    return isinstance(checkpoint, dict) and checkpoint.get("format") == FORMAT and "arguments" in checkpoint


def load_weights(path: str | Path, name: str = "", average: str = "") -> tuple[dict, dict]:
    """Weights from our checkpoints, SiT's or REPA's (`ema` where there is one), or a bare state dict.

    name: the model's. One of captions may also be a folder of diffusers, or a hub name.
    average: which moving average of ours, by its decay as text; empty is the first one, "none" the weights themselves.
    Returns also the options of our run, with its `step`, the resolved `average` and the model's `arguments`; {} for
    released weights. Raises ValueError where there is no such checkpoint or average.
    """
    weights = diffusers_weights(path, name)
    checkpoint = weights or load_checkpoint(path)
    if is_ours(checkpoint):
        options = {**checkpoint["config"], "step": checkpoint["step"], "arguments": checkpoint["arguments"]}
        averages = {"none": checkpoint["model"]} if "model" in checkpoint else {}
        averages |= checkpoint["emas"]
        options["average"] = average or next(iter(checkpoint["emas"]))
        if options["average"] not in averages:
            raise ValueError(f"{path} has no average {average!r}; choose one of {', '.join(averages)}")
        return whole_weights(path, options, averages[options["average"]]), options
    if average:
        raise ValueError(f"average = {average!r}: {path} is not of this trainer, and has no choice of averages")
    content = checkpoint if isinstance(checkpoint, dict) else {}
    known = [content[key] for key in ("ema", "model", "state_dict") if isinstance(content.get(key), dict)]
    content = known[0] if known else content
    weights = {str(name).removeprefix("module."): value for name, value in content.items()}
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{str(path)!r} holds no state dict, neither bare nor under 'ema', 'model' or 'state_dict'")
    return weights, {}


def diffusers_weights(source: str | Path, name: str) -> dict:
    """Those of a folder of diffusers, or its hub name, for a model of captions; {} where it is none."""
    if not takes_text(name) or Path(source).is_file():
        return {}
    from models.mmdit import weights_of_diffusers  # takes seconds

    return weights_of_diffusers(source)


def load_trained(path: str | Path, average: str = "", name: str = "", route_backend: str = "auto"):
    """The model of a checkpoint, in eval mode on the CPU, and what is known of its run, as `load_weights` says.

    name: the model's name (SiT-XL/2) for released weights, which do not say it.
    Raises ValueError where there is no such checkpoint, average or model.
    """
    weights, options = load_weights(path, name, average)
    if options and name not in ("", options["model"]):  # the number of heads would be another
        raise ValueError(f"model = {name!r}: {path} is of {options['model']}; leave it out")
    name = name or options.get("model", "")
    if not name:
        raise ValueError(f"model = '': say which model {path} is of, such as SiT-XL/2")
    make = constructor(name)
    try:
        arguments = options["arguments"] if options else released_arguments(weights, name)
        model = make(**arguments, route_backend=route_backend)
        load_into(model, weights)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} does not fit {name}: {error}") from None
    model.gamma = configuration.retrofit_gamma(options, options["step"]) if options else 1.0
    model.step_times = tuple(options.get("step_times", ()))
    return model.eval().requires_grad_(False), options


def load_teacher(path: str | Path, name: str = "", route_backend: str = "auto"):
    """`load_trained` for distillation. Adds the model's arguments without projectors, and its fingerprint."""
    teacher, trained = load_trained(path, name=name, route_backend=route_backend)
    arguments = trained.get("arguments") or released_arguments(teacher.state_dict(), name)
    final = arguments.get("final_aggregator", "auto")
    if arguments.get("routing") == "dar":  # what it was, whatever projectors come and go
        final = head_aggregator(final, arguments["align_dims"])
    arguments = arguments | {"final_aggregator": final, "align_dims": ()}
    return teacher, trained, arguments, fingerprint(teacher, json.dumps(arguments, sort_keys=True))


def whole_weights(path: str | Path, options: dict, weights: dict) -> dict:
    """A model's weights from its checkpoint; where these are a LoRA (distill.py), W + B A with its teacher's W.

    Raises ValueError where the teacher is not at hand, or not what it was.
    """
    if not any(".lora_A." in name for name in weights):
        return weights
    found = options["teacher"]
    try:
        if Path(found).resolve() == Path(path).resolve():
            raise ValueError("this path leads to the student itself")
        teacher, _, _, content = load_teacher(found, options["model"])
        if content != options["content of teacher"]:
            raise ValueError("it is not the same model any more")
    except ValueError as error:
        raise ValueError(
            f"{path} is a LoRA on teacher = {found!r}: {error}. Put the teacher back there, as seen from the working "
            "folder; `python -m eval.export` then makes a student that needs none"
        ) from None
    whole = {name: value for name, value in teacher.state_dict().items() if not name.startswith("projectors.")}
    whole |= {name: value for name, value in weights.items() if ".lora_" not in name}
    for name, down in weights.items():
        layer, is_lora, adapter = name.partition(".lora_A.")
        if is_lora:  # scaled by alpha / rank = 1
            whole[f"{layer}.weight"] += weights[f"{layer}.lora_B.{adapter}"] @ down
    return whole


def released_arguments(weights: dict, name: str) -> dict:
    """What the shapes of released weights say about the named model. Their projectors' depth is not told."""
    patch = int(name.rpartition("/")[2])
    if takes_text(name):
        width, channels = weights["img_in.weight"].shape
        return {
            "in_channels": channels // patch**2,
            "hidden_size": width,
            "num_heads": width // len(weights["transformer_blocks.0.attn.norm_q.weight"]),
            "depth": 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("transformer_blocks.")),
            "text_width": weights["txt_in.weight"].shape[1],
            "align_dims": (),
        }
    return {
        "input_size": math.isqrt(weights["pos_embed"].shape[1]) * patch,
        "in_channels": weights["x_embedder.proj.weight"].shape[1],
        "num_classes": len(weights["y_embedder.embedding_table.weight"]) - 1,
        "qk_norm": any(".q_norm." in key for key in weights),
        "align_dims": (),
    }


def load_into(model: nn.Module, state_dict: dict, new_labels: bool = False) -> tuple[list, list]:
    """Load weights that SiT, REPA or Qwen-Image has released, or our own, into a model of the same size.

    Three things may differ and are converted. Released SiT models predict a variance beside the velocity, of which the
    velocity half is kept, which identifies them: their time runs from noise to data and is reversed.
    Projectors that only one side has are left out: the model's keep their initial values.
    Weights without routers and skips, of residual routing, leave those of the model as they are. A timestep query
    w + e(t) then starts with the e(t) of those weights instead of zero, so that aggregation is no plain mean at first.
    new_labels: the label table keeps its initial values, except for the null class.
    Returns the names of parameters that were not loaded and of weights that were not used.
    Raises ValueError that names the missing, unknown (such as routers, if the model has none) or differently shaped.
    """
    own, state_dict, table = model.state_dict(), dict(state_dict), "y_embedder.embedding_table.weight"
    both, head = own.keys() & state_dict.keys(), ("final_layer.linear.weight", "final_layer.linear.bias")
    reverse = head[1] in both and len(state_dict[head[1]]) == 2 * len(own[head[1]])
    for name in head:
        if name in both and len(state_dict[name]) == 2 * len(own[name]):
            halves = state_dict[name].unflatten(0, (model.patch_size**2, 2, model.in_channels))
            state_dict[name] = halves[:, 0].flatten(0, 1)  # (p * p * C, ...)
    same_width = table in both and state_dict[table].shape[1:] == own[table].shape[1:]
    if new_labels and same_width:
        state_dict[table] = torch.cat([own[table][:-1], state_dict[table][-1:].to(own[table])])
    missing = sorted(own.keys() - state_dict.keys())
    unused = sorted(state_dict.keys() - own.keys())
    optional = ("projectors.", "null_text", *(() if any(name.startswith(JOINS) for name in state_dict) else JOINS))
    problems = [f"missing {name}" for name in missing if not name.startswith(optional)]
    problems += [f"unknown {name}" for name in unused if not name.startswith("projectors.")]
    problems += [
        f"{name} is {tuple(state_dict[name].shape)}, the model's is {tuple(own[name].shape)}"
        for name in sorted(both)
        if own[name].shape != state_dict[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        other_classes = same_width and state_dict[table].shape != own[table].shape
        labels = "; --new-labels starts the label table anew" if other_classes else ""
        raise ValueError(f"these weights do not fit the model: {'; '.join(problems[:8])}{more}{labels}")
    model.load_state_dict(state_dict, strict=False)
    if reverse:
        _reverse_time(model)
    return missing, unused


@torch.no_grad()
def _reverse_time(model):
    """v(x, t) becomes -v(x, 1 - t).

    cos f(1 - t) = cos f cos ft + sin f sin ft, and sin f(1 - t) = sin f cos ft - cos f sin ft.
    """
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(0, 1, 2 / FREQUENCIES, dtype=torch.float64))
    embedding, head = model.t_embedder.mlp[0].weight, model.final_layer.linear
    of_cos, of_sin = embedding.double().chunk(2, dim=1)  # (D, 128) each
    cos, sin = frequencies.cos(), frequencies.sin()
    embedding.copy_(torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1))
    head.weight.neg_()
    head.bias.neg_()

"""Rebuilds a trained SiT from a checkpoint: ours, or one that SiT or REPA has released."""

import math
from pathlib import Path

from models.sit import SIT_MODELS, load_published
from runtime import load_file, load_weights


def load_trained(path, average="", name="", route_backend="auto"):
    """The model of a checkpoint, in eval mode on the CPU, and the options it was trained with ({} for released ones).

    average: which moving average of ours, by its decay as text; empty is the first one, "none" the weights themselves.
    name:    the model's name (SiT-XL/2) for released weights, which do not say it.
    The weights of a run tell all other sizes; released ones must have those of the named model.
    To the options of ours are added `step` and the resolved `average`.
    Raises ValueError where there is no such checkpoint, average or model.
    """
    if Path(path).is_dir():
        raise ValueError(f"{str(path)!r} is a folder; give the checkpoint in it, such as {Path(path) / 'last.pt'}")
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {str(path)!r}")
    checkpoint = load_file(path)
    ours = isinstance(checkpoint, dict) and "log_lines" in checkpoint
    options = checkpoint["config"] if ours else {}
    if ours:
        averages = {"none": checkpoint["model"], **checkpoint["emas"]}
        average = average or next(iter(checkpoint["emas"]))
        if average not in averages:
            raise ValueError(f"{path} has no average {average!r}; choose one of {', '.join(averages)}")
        weights, options = averages[average], {**options, "step": checkpoint["step"], "average": average}
    elif average:
        raise ValueError(f"average = {average!r}: {path} is not of this trainer, and has no choice of averages")
    else:
        weights = load_weights(path)
    if ours and name not in ("", options["model"]):  # the number of heads would be another
        raise ValueError(f"model = {name!r}: {path} is of {options['model']}; leave it out")
    name = name or options.get("model", "")
    if name not in SIT_MODELS:
        raise ValueError(f"model = {name!r}: say which model {path} is of, one of {', '.join(SIT_MODELS)}")
    try:
        model = SIT_MODELS[name](**_sizes(weights, name, options), route_backend=route_backend)
        load_published(model, weights)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} does not fit {name}: {error}") from None
    return model.eval().requires_grad_(False), options


def _sizes(weights, name, options):
    """Arguments of SiT that follow from the shapes of its weights; the rest from the options of the run."""
    _, tokens, width = weights["pos_embed"].shape
    chosen = {
        key: options[key]
        for key in (
            "num_heads",
            "routing",
            "query",
            "chunk_size",
            "final_aggregator",
            "projector",
            "class_dropout_prob",
        )
        if options.get(key) is not None
    }
    sizes = {
        "input_size": math.isqrt(tokens) * int(name.rpartition("/")[2]),
        "hidden_size": width,
        "depth": sum(key.endswith(".attn.qkv.weight") for key in weights),
        "in_channels": weights["x_embedder.proj.weight"].shape[1],
        "num_classes": len(weights["y_embedder.embedding_table.weight"]) - 1,
        "qk_norm": any(".q_norm." in key for key in weights),
        "align_dims": (),
    }
    last = "weight" if options.get("projector") == "conv" else "4.weight"
    outputs = [key for key in weights if key.startswith("projectors.") and key.endswith(f".{last}")]
    if options and outputs:  # those of a released model read a depth that it does not tell
        sizes |= {
            "align_depth": options["align_depth"],
            "projector_dim": weights[outputs[0]].shape[1],
            "align_dims": [
                len(weights[f"projectors.{i}.{last}"]) for i in range(len(outputs) // len(options["align_depth"]))
            ],
        }
    if not options:  # nor do they tell the heads, so the name has to be right
        del sizes["hidden_size"], sizes["depth"]
    return {**chosen, **sizes}

"""What a model takes: parameters, floating-point operations, and what a GPU could do at most."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.registry import constructor

# Dense bf16 operations per second with float32 accumulation, from the data sheets, by CUDA's exact name.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


# Of SiT and of MMDiT; other modules have the name of the part.
PARTS = dict.fromkeys(("x_embedder", "t_embedder", "y_embedder", "img_in", "txt_in", "txt_norm"), "embedders")
PARTS |= {"time_text_embed": "embedders", "transformer_blocks": "blocks", "text_router": "router"}
PARTS |= dict.fromkeys(("final_layer", "norm_out", "proj_out"), "head")


def parameters_by_part(model: torch.nn.Module) -> dict:
    """Trainable parameters by part, of those that a model has: embedders, blocks, head, router, projectors, skips."""
    counts = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = PARTS.get(name.partition(".")[0], name.partition(".")[0])
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def trainable(model: torch.nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameters_by_part(model).values())


def held(kept: int, more: int, shared: int = 0, processes: int = 1) -> str:
    """Lines on memory and disk. kept: float32 numbers in a checkpoint; more: those in memory beside them.

    shared: numbers that networks share while they are whole, times the further copies that shards make of them.
    """
    gib = 2**30 / 4
    shards = f"; {(kept + more + shared) / processes / gib:.3g} GiB each, if sharded over {processes} processes"
    return (
        f"memory     {(kept + more) / gib:.3g} GiB for weights, gradients, moments and averages, activations excluded"
        f"{shards * (processes > 1)}\n"
        f"disk       {kept / gib:.3g} GiB for a checkpoint"
    )


def flops_per_image(name: str, arguments: dict) -> int:
    """Floating-point operations of one forward pass for one image, two per multiply-add, as PyTorch counts them.

    name: of the model; arguments: its own. No memory is taken and nothing is computed.
    Matrix products, convolutions and attention; elementwise work, and with it the softmax over depth, is left out. A
    training step takes about three times as many, or four with `checkpoint_activations`.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = constructor(name)(**arguments).to("meta")
        x = torch.zeros(1, model.in_channels, model.input_size, model.input_size)
        model(x, torch.zeros(1), model.null(1))
    return counter.get_total_flops()


def peak_flops(device: torch.device) -> float:
    """Of a GPU, by PEAK_FLOPS; 0 where that does not know it."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device), 0.0) if device.type == "cuda" else 0.0

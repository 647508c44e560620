"""Autoencoders in the format of latent diffusion's code (CompVis), as LightningDiT's VA-VAE and REPA-E's are released.

Their weights are given the names of diffusers' AutoencoderKL, which is the same network.
"""

import re

import safetensors.torch
import torch
from diffusers import AutoencoderKL

NAMES = (  # applied in this order; blocks of a decoder are counted from the other end
    (r"coder\.mid\.block_1\.", "coder.mid_block.resnets.0."),
    (r"coder\.mid\.block_2\.", "coder.mid_block.resnets.1."),
    (r"coder\.mid\.attn_1\.", "coder.mid_block.attentions.0."),
    (r"encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
    (r"decoder\.up\.(\d+)\.", r"decoder.up_blocks.\1."),
    (r"(down|up)sample\.conv", r"\1samplers.0.conv"),
    (r"_blocks\.(\d+)\.block\.", r"_blocks.\1.resnets."),
    (r"_blocks\.(\d+)\.attn\.", r"_blocks.\1.attentions."),
    (r"nin_shortcut", "conv_shortcut"),
    (r"coder\.norm_out", "coder.conv_norm_out"),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
KEPT = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # losses and projections of the training are not


def load_ldm(path: str) -> tuple[AutoencoderKL, dict]:
    """The network of a .pt, .ckpt or .safetensors file, and an empty config, as the files say nothing of a scale.

    Raises exceptions of several kinds on any other content.
    """
    weights = {name: value for name, value in read(path).items() if name.startswith(KEPT)}

    def count(pattern):
        return len({found[0] for name in weights if (found := re.match(pattern, name))})

    levels = count(r"encoder\.down\.\d+\.")
    if not levels:
        raise LookupError("it has no weights encoder.down.*")
    attention = ["Attn" if count(rf"encoder\.down\.{level}\.attn\.") else "" for level in range(levels)]
    model = AutoencoderKL(
        block_out_channels=[len(weights[f"encoder.down.{level}.block.0.conv1.bias"]) for level in range(levels)],
        down_block_types=[f"{kind}DownEncoderBlock2D" for kind in attention],
        up_block_types=[f"{kind}UpDecoderBlock2D" for kind in reversed(attention)],
        layers_per_block=count(r"encoder\.down\.0\.block\.\d+\."),
        latent_channels=len(weights["post_quant_conv.bias"]),
        scaling_factor=None,
    )
    renamed, own = {}, model.state_dict()
    for name, value in weights.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up_blocks.{levels - 1 - int(found[1])}", name)
        if name in own:  # convolutions of 1 x 1 have become linear maps
            value = value.reshape(own[name].shape)
        renamed[name] = value
    model.load_state_dict(renamed)
    return model, {}


def read(path):
    if path.endswith(".safetensors"):
        return safetensors.torch.load_file(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    return content.get("state_dict", content)

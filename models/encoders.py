"""Frozen vision encoders, through timm or transformers: what REPA aligns to, and the space in which samples are judged.

Shapes: B batch, T = grid * grid patch tokens.
"""

import contextlib
import inspect
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn import functional as F

from runtime import fingerprint, one_line

# REPA's names (github.com/sihyun-yu/REPA) and their relatives, as timm calls them. In any case of letters.
SHORT_NAMES = {
    "dinov2-vit-s": "vit_small_patch14_dinov2.lvd142m",
    "dinov2-vit-b": "vit_base_patch14_dinov2.lvd142m",
    "dinov2-vit-l": "vit_large_patch14_dinov2.lvd142m",
    "dinov2-vit-g": "vit_giant_patch14_dinov2.lvd142m",
    "dinov2-vit-s-reg": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2-vit-b-reg": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2-vit-l-reg": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov2-vit-g-reg": "vit_giant_patch14_reg4_dinov2.lvd142m",
    "dinov1-vit-s": "vit_small_patch16_224.dino",
    "dinov1-vit-b": "vit_base_patch16_224.dino",
    "dinov3-vit-s": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3-vit-b": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3-vit-l": "vit_large_patch16_dinov3.lvd1689m",
    "mae-vit-b": "vit_base_patch16_224.mae",
    "mae-vit-l": "vit_large_patch16_224.mae",
    "mae-vit-h": "vit_huge_patch14_224.mae",
    "ijepa-vit-h": "vit_huge_patch14_gap_224.in1k_ijepa",
    "jepa-vit-h": "vit_huge_patch14_gap_224.in1k_ijepa",
    "ijepa-vit-g": "vit_giant_patch16_gap_224.in22k_ijepa",
    "clip-vit-b": "vit_base_patch16_clip_quickgelu_224.openai",  # OpenAI trained with the quick form of GELU
    "clip-vit-l": "vit_large_patch14_clip_quickgelu_224.openai",
    "siglip-vit-b": "vit_base_patch16_siglip_256.webli",
    "siglip-vit-l": "vit_large_patch16_siglip_256.webli",
    "siglip-vit-so400m": "vit_so400m_patch14_siglip_224.webli",
}
FINAL_NORMS = ("layernorm", "norm", "post_layernorm")  # their names in transformers
NEVER_RUN = {  # instead of libraries' advice to run it nevertheless
    "trust_remote_code": "it needs code that comes with it (auto_map), which is never run",
    "weights_only": "it holds no weights, or a pickle that would run code",
}


class FrozenEncoder(nn.Module):
    """Patch tokens of a frozen vision transformer, which owns its preprocessing.

    name:    one of SHORT_NAMES; a timm name, with or without "timm:" before it; a folder written by timm's
             `save_for_hf`; or "hf:" and a repository or folder that transformers' AutoModel can read.
    grid:    patches along one side. Images are resized to grid * patch size and the position embedding is resampled,
             so that the encoder has one token for each of SiT's.
    weights: local weights file for a timm name; empty lets timm download them.
    The fingerprint changes with any weight, the colours' mean and deviation, the grid, and the kind of GELU.
    Raises ValueError where there is no such encoder, its weights cannot be had, or it cannot give that grid.
    """

    def __init__(self, name: str, grid: int, weights: str = ""):
        super().__init__()
        load = _load_transformers if name.startswith("hf:") else _load_timm
        self.model, patch, mean, std = load(name, grid, weights)
        self.name, self.grid, self.size, self.dim = name, (grid, grid), grid * patch, self.model.num_features
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        kinds = {type(module).__name__ for module in self.modules()} - {"GELU"}  # CLIP's weights are published for two
        self.fingerprint = fingerprint(self, f"({grid}, {grid})" + "".join(sorted(k for k in kinds if "GELU" in k)))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> patch tokens (B, T, dim) after the final norm, without class or register tokens."""
        x = (images / 255 - self.mean) / self.std
        x = F.interpolate(x, (self.size, self.size), mode="bicubic")
        return self.model.forward_features(x)[:, self.model.num_prefix_tokens :]


def reason_of(error: Exception) -> str:
    """What a user can make of an error of timm, transformers or the hub, in one line."""
    told = (told for word, told in NEVER_RUN.items() if word in str(error))
    return next(told, one_line(error))


@contextlib.contextmanager
def _loading(name, source):
    """Turns what timm, transformers and the hub raise, errors of many kinds, into a ValueError of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"encoder {name!r} could not be loaded from {source!r} ({reason_of(error)}); without network, give a "
            "timm name with --encoder-weights FILE, a folder of timm's save_for_hf, or hf:FOLDER for one of "
            "transformers' save_pretrained with model and image processor; HF_HUB_OFFLINE=1 looks in the hub's cache "
            "alone"
        ) from error


def _load_timm(name, grid, weights):
    """A timm model without classifier, its patch size, and the mean and standard deviation of its colours."""
    target = SHORT_NAMES.get(name.lower(), name.removeprefix("timm:"))
    folder = (Path(target) / "config.json").is_file()
    if not folder and not timm.is_model(target):
        raise ValueError(
            f"encoder {name!r} is neither a short name ({', '.join(SHORT_NAMES)}), nor a timm model, "
            "nor a folder with timm's config.json, nor hf: and a repository or folder of transformers; "
            "`python -m dataset.standin_encoder DATA --out FOLDER` trains a small one into a folder"
        )
    if weights and (folder or not Path(weights).is_file()):
        reason = f"encoder {name!r} is a folder that has its own weights" if folder else "there is no such file"
        raise ValueError(f"encoder_weights = {weights!r}: {reason}")
    timm_name = f"local-dir:{target}" if folder else target
    with _loading(name, target), torch.device("meta"):  # its structure, without memory or download
        plain = timm.create_model(timm_name, num_classes=0)
    patch = getattr(getattr(plain, "patch_embed", None), "patch_size", None)
    if not patch or patch[0] != patch[1] or not hasattr(plain, "num_prefix_tokens"):
        raise ValueError(f"encoder {name!r} has no square patches; a plain vision transformer is needed")
    published = plain.pretrained_cfg
    source = weights or (target if folder else published.get("hf_hub_id") or published.get("url", ""))
    with _loading(name, source):
        file = {"file": weights} if weights else {}
        model = timm.create_model(timm_name, pretrained=True, img_size=grid * patch[0], pretrained_cfg_overlay=file)
        model.reset_classifier(0)  # only now: timm compares all names if the head is its own
    tokens = model.patch_embed.grid_size
    if tokens != (grid, grid):
        raise ValueError(f"the model has {grid} x {grid} tokens, encoder {name!r} {tokens[0]} x {tokens[1]}")
    data = resolve_model_data_config(model)
    return model, patch[0], data["mean"], data["std"]


def _load_transformers(name, grid, weights):
    """The vision model in VisionTower, its patch size, and the mean and standard deviation of its colours."""
    from transformers import AutoImageProcessor, AutoModel  # takes seconds, and nothing else needs it

    if weights:
        raise ValueError(f"encoder_weights = {weights!r}: encoder {name!r} has its own; give another hf:FOLDER instead")
    source = name.removeprefix("hf:")
    with _loading(name, source):
        # Unless told not to, transformers asks on the terminal whether to run code that comes with the weights.
        model, found = AutoModel.from_pretrained(
            source, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
        colours = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        tower = getattr(model, "vision_model", model)  # of an image-text pair
        # transformers leaves at random what it does not find. That may happen only to what is not used here.
        used = "" if tower is model else "vision_model."
        missing = sorted(key for key in found["missing_keys"] if "pooler" not in key and key.startswith(used))
        if missing:
            raise LookupError(f"{len(missing)} tensors are not in it, such as {missing[0]}")
    patch = getattr(tower.config, "patch_size", None)
    if not isinstance(patch, int):
        raise ValueError(f"encoder {name!r} has the patch size {patch}; a plain vision transformer is needed")
    try:
        tower = VisionTower(tower, grid * patch, grid * grid)
    except Exception as error:  # whatever such a model does with the image
        raise ValueError(f"encoder {name!r} gives no {grid} x {grid} tokens ({one_line(error)})") from error
    normalised = colours.do_normalize
    return tower, patch, colours.image_mean if normalised else [0.0] * 3, colours.image_std if normalised else [1.0] * 3


class VisionTower(nn.Module):
    """A transformers vision model with timm's interface: forward_features, num_prefix_tokens and num_features.

    tower: takes (B, 3, size, size) to (B, prefix + tokens, width). Raises an exception where it does not.
    """

    def __init__(self, tower: nn.Module, size: int, tokens: int):
        super().__init__()
        self.tower = tower
        resizable = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if resizable else {}
        final = [m for name, m in tower.named_children() if name in FINAL_NORMS and hasattr(m, "weight")]
        if not final:
            raise ValueError("it has no final norm")
        # CLIP's own forward pass puts its final norm on the class token alone, other models' on all tokens.
        self.norm, shapes = nn.Identity(), []
        hook = final[0].register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
        with torch.no_grad():
            hidden = self.forward_features(torch.zeros(1, 3, size, size))
        hook.remove()
        if hidden.ndim != 3 or hidden.shape[1] < tokens:
            raise ValueError(f"its output has the shape {tuple(hidden.shape)}")
        if hidden.shape not in shapes:
            self.norm = final[0]
        self.num_prefix_tokens, self.num_features = hidden.shape[1] - tokens, hidden.shape[2]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """float (B, 3, size, size) -> (B, prefix + tokens, width) after the final norm."""
        return self.norm(self.tower(pixel_values=x, **self.options).last_hidden_state)

"""Frozen vision encoders, through timm or transformers: what REPA aligns to, and the space in which samples are judged.

Shapes: B batch, T = grid * grid patch tokens.
"""

import hashlib
import inspect
from pathlib import Path

import timm
import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn import functional as F

from models.hub import go_offline_if_unreachable, unreachable

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


class FrozenEncoder(nn.Module):
    """Patch tokens of a frozen vision transformer, which owns its preprocessing.

    name:    one of SHORT_NAMES; a timm name, with or without "timm:" before it; a folder written by timm's
             `save_for_hf`; or "hf:" and a repository or folder that transformers' AutoModel can read.
    grid:    patches along one side. Images are resized to grid * patch size and the position embedding is resampled,
             so that the encoder has one token for each of SiT's.
    weights: local weights file for a timm name; empty lets timm download them.
    Raises ValueError where there is no such encoder, its weights cannot be had, or it cannot give that grid.
    """

    def __init__(self, name, grid, weights=""):
        super().__init__()
        load = _load_transformers if name.startswith("hf:") else _load_timm
        self.model, patch, mean, std = load(name, grid, weights)
        self.name, self.grid, self.size, self.dim = name, (grid, grid), grid * patch, self.model.num_features
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.fingerprint = self._fingerprint()
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images):
        """uint8 (B, 3, H, W) -> patch tokens (B, T, dim) after the final norm, without class or register tokens."""
        x = (images / 255 - self.mean) / self.std
        x = F.interpolate(x, (self.size, self.size), mode="bicubic")
        return self.model.forward_features(x)[:, self.model.num_prefix_tokens :]

    def _fingerprint(self):
        """Twelve hexadecimal digits that change with any weight, the kind of GELU, the normalisation or the grid."""
        digest = hashlib.sha256(f"({self.grid[0]}, {self.grid[1]})".encode())
        # CLIP's weights are published for two of them. The common one leaves no trace, as it always did.
        for kind in sorted({type(module).__name__ for module in self.modules()} - {"GELU"}):
            if "GELU" in kind:
                digest.update(kind.encode())
        for name, tensor in self.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:12]


def _load_timm(name, grid, weights):
    """A timm model without classifier, its patch size, and the mean and standard deviation of its colours."""
    target = SHORT_NAMES.get(name.lower(), name.removeprefix("timm:"))
    local_folder = (Path(target) / "config.json").is_file()
    if weights and (local_folder or not Path(weights).is_file()):
        raise ValueError(
            f"encoder_weights = {weights!r}: "
            + ("the encoder is a folder that has its own weights" if local_folder else "there is no such file")
        )
    if not local_folder and target.split(".")[0] not in timm.list_models():
        raise ValueError(
            f"encoder {name!r} is neither a short name ({', '.join(SHORT_NAMES)}), nor a timm model, "
            "nor a folder with timm's config.json, nor hf: and a repository or folder of transformers; "
            "`python -m dataset.standin_encoder DATA --out FOLDER` trains a small one into a folder"
        )
    timm_name = f"local-dir:{target}" if local_folder else target
    try:
        with torch.device("meta"):  # no memory, no download: only its structure
            plain = timm.create_model(timm_name, num_classes=0)
    except Exception as error:  # a tag or a config.json unknown to timm
        raise ValueError(
            f"encoder {name!r} is none that timm can build ({type(error).__name__}: {error}); "
            "a folder that transformers wrote is given as hf:FOLDER"
        ) from None
    patch = getattr(getattr(plain, "patch_embed", None), "patch_size", None)
    if not patch or patch[0] != patch[1] or not hasattr(plain, "num_prefix_tokens"):
        raise ValueError(f"encoder {name!r} has no square patches; a plain vision transformer is needed")

    published, source, reason = plain.pretrained_cfg, weights or target, ""
    try:
        if not weights and not local_folder:
            # What is neither stored nor reachable fails here: timm would first fill all weights with random numbers.
            if published.get("hf_hub_id"):
                source, reason = published["hf_hub_id"], go_offline_if_unreachable()
                stored = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model")
            elif published.get("url"):
                source, reason = published["url"], unreachable(published["url"])
                stored = Path(torch.hub.get_dir()) / "checkpoints" / Path(source).name
            else:
                raise LookupError("none are published")
            if reason and not stored.exists():
                raise FileNotFoundError(f"{stored} is not there")
        overlay = {"pretrained_cfg_overlay": {"file": weights}} if weights else {}
        model = timm.create_model(timm_name, pretrained=True, img_size=grid * patch[0], **overlay)
        model.reset_classifier(0)  # only now: timm compares all names if the head is its own
    except Exception as error:  # timm and the hub raise many kinds
        raise ValueError(
            f"the weights of encoder {name!r} could not be loaded from {source} ({_why(reason, error)}); "
            f"without network, give {published['architecture']}'s file with --encoder-weights FILE, or "
            "another --encoder: a folder of timm's save_for_hf, or hf:FOLDER for one of transformers' "
            "save_pretrained"
        ) from error
    tokens = model.patch_embed.grid_size
    if tokens != (grid, grid):
        raise ValueError(f"the model has {grid} x {grid} tokens, encoder {name!r} {tokens[0]} x {tokens[1]}")
    data = resolve_model_data_config(model)
    return model, patch[0], data["mean"], data["std"]


def _load_transformers(name, grid, weights):
    """The vision model in VisionTower, its patch size, and the mean and standard deviation of its colours."""
    from transformers import AutoImageProcessor, AutoModel  # takes seconds, and nothing else needs it

    if weights:
        raise ValueError(
            f"encoder_weights = {weights!r}: encoder {name!r} has its own; for other weights, give "
            "hf:FOLDER, a folder of transformers' save_pretrained"
        )
    source = name.removeprefix("hf:")
    reason = "" if Path(source).is_dir() else go_offline_if_unreachable()
    try:
        model, found = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        colours = AutoImageProcessor.from_pretrained(source)
        tower = getattr(model, "vision_model", model)  # of an image-text pair
        # transformers leaves at random what it does not find. That may happen only to what is not used here.
        missing = [
            key
            for key in sorted(found["missing_keys"])
            if "pooler" not in key and (tower is model or key.startswith("vision_model."))
        ]
        if missing:
            raise LookupError(f"{len(missing)} tensors are not in it, such as {missing[0]}")
    except Exception as error:  # transformers and the hub raise many kinds
        raise ValueError(
            f"the weights of encoder {name!r} could not be loaded ({_why(reason, error)}); without "
            "network, give --encoder hf:FOLDER, a folder of transformers' save_pretrained that holds the "
            "model and its image processor"
        ) from error
    patch = getattr(tower.config, "patch_size", None)
    if not isinstance(patch, int):
        raise ValueError(f"encoder {name!r} has the patch size {patch}; a plain vision transformer is needed")
    try:
        tower = VisionTower(tower, grid * patch, grid * grid)
    except Exception as error:  # whatever such a model does with the image
        raise ValueError(f"encoder {name!r} gives no {grid} x {grid} tokens ({_why('', error)})") from error
    normalised = colours.do_normalize
    return tower, patch, colours.image_mean if normalised else [0.0] * 3, colours.image_std if normalised else [1.0] * 3


def _why(reason, error):
    return ", ".join(filter(None, [reason, f"{type(error).__name__}: {error}"]))


class VisionTower(nn.Module):
    """A transformers vision model with timm's interface: forward_features, num_prefix_tokens and num_features.

    tower: takes (B, 3, size, size) to (B, prefix + tokens, width). Raises an exception where it does not.
    """

    def __init__(self, tower, size, tokens):
        super().__init__()
        self.tower = tower
        resizable = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if resizable else {}
        final_norm = next(
            (
                module
                for name, module in tower.named_children()
                if name in ("layernorm", "norm", "post_layernorm") and hasattr(module, "weight")
            ),
            None,
        )
        if final_norm is None:
            raise ValueError("it has no final norm")
        # CLIP's own forward pass puts its final norm on the class token alone, other models' on all tokens.
        self.norm, shapes = nn.Identity(), []
        hook = final_norm.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
        with torch.no_grad():
            hidden = self.forward_features(torch.zeros(1, 3, size, size))
        hook.remove()
        if hidden.ndim != 3 or hidden.shape[1] < tokens:
            raise ValueError(f"its output has the shape {tuple(hidden.shape)}")
        if hidden.shape not in shapes:
            self.norm = final_norm
        self.num_prefix_tokens, self.num_features = hidden.shape[1] - tokens, hidden.shape[2]

    def forward_features(self, x):
        """float (B, 3, size, size) -> (B, prefix + tokens, width) after the final norm."""
        return self.norm(self.tower(pixel_values=x, **self.options).last_hidden_state)

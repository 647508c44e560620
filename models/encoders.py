"""Frozen vision encoders, through timm: what REPA aligns to, and the space in which samples are judged.

Shapes: B batch, T = grid * grid patch tokens.
"""

import hashlib
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn import functional as F


class FrozenEncoder(nn.Module):
    """Patch tokens of a frozen timm vision transformer, which owns its preprocessing.

    name:    a timm name (such as vit_base_patch14_dinov2.lvd142m), or a folder written by timm's `save_for_hf`.
    grid:    patches along one side. Images are resized to grid * patch size and timm resamples the position
             embedding, so that the encoder has one token for each of SiT's.
    weights: local weights file for a timm name; empty lets timm download them.
    Raises ValueError where there is no such encoder, its weights cannot be had, or it cannot give that grid.
    """

    def __init__(self, name, grid, weights=""):
        super().__init__()
        local_folder = (Path(name) / "config.json").is_file()
        if weights and (local_folder or not Path(weights).is_file()):
            raise ValueError(f"encoder_weights = {weights!r}: " + ("the encoder is a folder that has its own weights"
                             if local_folder else "there is no such file"))
        if not local_folder and name.split(".")[0] not in timm.list_models():
            raise ValueError(f"encoder {name!r} is neither a timm model nor a folder with timm's config.json; "
                             "`python -m dataset.standin_encoder DATA --out FOLDER` trains a small one into a folder")
        timm_name = f"local-dir:{name}" if local_folder else name
        try:
            with torch.device("meta"):                                     # no memory, no download: only its structure
                plain = timm.create_model(timm_name, num_classes=0)
        except Exception as error:                                         # a tag or a config.json unknown to timm
            raise ValueError(f"encoder {name!r} is none that timm can build "
                             f"({type(error).__name__}: {error})") from None
        patch = getattr(getattr(plain, "patch_embed", None), "patch_size", None)
        if not patch or patch[0] != patch[1] or not hasattr(plain, "num_prefix_tokens"):
            raise ValueError(f"encoder {name!r} has no square patches; a plain vision transformer is needed")

        self.name, self.size = name, grid * patch[0]
        overlay = {"pretrained_cfg_overlay": {"file": weights}} if weights else {}
        try:
            self.model = timm.create_model(timm_name, pretrained=True, img_size=self.size, **overlay)
            self.model.reset_classifier(0)         # only now: timm compares all names if the head is its own
        except Exception as error:                                         # timm and the hub raise many kinds
            raise ValueError(f"the weights of encoder {name!r} could not be loaded ({type(error).__name__}: {error}); "
                             "without network, give a local file with --encoder-weights, or a folder as --encoder"
                             ) from error
        self.dim, self.grid = self.model.num_features, self.model.patch_embed.grid_size
        if tuple(self.grid) != (grid, grid):
            raise ValueError(f"the model has {grid} x {grid} tokens, encoder {name!r} {self.grid[0]} x {self.grid[1]}")
        data = resolve_model_data_config(self.model)
        self.register_buffer("mean", torch.tensor(data["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(data["std"]).view(3, 1, 1))
        self.fingerprint = self._fingerprint()
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images):
        """uint8 (B, 3, H, W) -> patch tokens (B, T, dim) after the final norm, without class or register tokens."""
        x = (images / 255 - self.mean) / self.std
        x = F.interpolate(x, (self.size, self.size), mode="bicubic")
        return self.model.forward_features(x)[:, self.model.num_prefix_tokens:]

    def _fingerprint(self):
        """Twelve hexadecimal digits that change with any weight, the normalisation or the grid."""
        digest = hashlib.sha256(repr(tuple(self.grid)).encode())
        for name, tensor in self.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:12]

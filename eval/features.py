"""The networks that judge images: Inception v3 as ADM's evaluator runs it, DINOv2, and any classifier of timm's.

All take uint8 images of any size, own their preprocessing, and compute in float32 without TF32 or autocast, whatever
the caller has set.

Shapes: B batch, H, W pixels.
"""

import hashlib
import http.client
import io
import urllib.request
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import models  # noqa: F401 - before timm and torch_fidelity, which import torchvision: see its docstring
import timm
from timm.data import resolve_model_data_config
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from models.encoders import SHORT_NAMES, FrozenEncoder, reason_of
from runtime import fingerprint, replaced, tf32
from weights import load_file

PUBLISHED = URL_INCEPTION_V3.rpartition("-")[2].removesuffix(".pth")  # how the file's SHA-256 begins
SPATIAL_CHANNELS = 7
DINOV2_SIZE = 224


class InceptionFeatures(nn.Module):
    """torch-fidelity's port of the TensorFlow Inception v3: its resize, its weights, its numbers.

    weights: local weights file; empty takes the published one, downloaded once.
    Raises ValueError where there is no such file, it cannot be downloaded, or does not hold this network.
    """

    dims = {"pool3": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS, "logits": 1008}
    dim = dims["pool3"]

    def __init__(self, weights: str | Path = ""):
        super().__init__()
        self.file, safe = Path(weights) if weights else _published_weights(), io.BytesIO()
        torch.save(load_file(self.file), safe)  # torch-fidelity would execute code that the file itself may hold
        safe.seek(0)
        with open(self.file, "rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.fingerprint, self.is_published = self.sha256[:12], self.sha256.startswith(PUBLISHED)
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=safe
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{str(self.file)!r} does not hold torch-fidelity's Inception v3 "
                f"({str(error).strip().splitlines()[0]}); use {Path(URL_INCEPTION_V3).name}"
            ) from None
        # TensorFlow's mixed_6/conv, after its batch norm and ReLU.
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._take_spatial)

    def _take_spatial(self, module, inputs, output):
        self._spatial = output[:, :SPATIAL_CHANNELS]

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict:
        """uint8 (B, 3, H, W) -> pool3 (B, 2048); spatial (B, 2023), sFID's; logits (B, 1008), without bias."""
        with tf32(False), torch.autocast(images.device.type, enabled=False):
            pool3, logits = self.network(images)
        spatial = self._spatial.permute(0, 2, 3, 1).flatten(1)  # (B, 7, 17, 17) -> NHWC -> (B, 17 * 17 * 7)
        del self._spatial
        return {"pool3": pool3, "spatial": spatial, "logits": logits}


class DinoV2Features(nn.Module):
    """Class token of DINOv2 after the protocol of dgm-eval (Stein et al. 2023): each image is resized by PIL, bicubic.

    The weights come through timm, which resamples the position embedding from 37 x 37 to 16 x 16 with antialiasing;
    DINOv2's own code does it without, so the distances differ slightly from those of dgm-eval.
    name, weights: as for FrozenEncoder. Raises ValueError where that fails, or the patches do not divide 224.
    """

    position_embedding = "timm's resampling (bicubic, antialiased)"

    def __init__(self, name: str = "dinov2-vit-l", weights: str = "", patch: int = 14):
        super().__init__()
        try:
            self.encoder = FrozenEncoder(name, DINOV2_SIZE // patch, weights)
        except ValueError as error:
            raise ValueError(f"FD-DINOv2 ({error}); here the options are --dinov2 and --dinov2-weights") from error
        if self.encoder.size != DINOV2_SIZE or not self.encoder.model.num_prefix_tokens:
            raise ValueError(f"dinov2 = {name!r}: not a ViT with a class token and patches of {patch} pixels")
        self.name, self.dims = name, {"dinov2": self.encoder.dim}
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict:
        """uint8 (B, 3, H, W) -> dinov2 (B, dim): the class token after the final norm."""
        pixels, size = images.permute(0, 2, 3, 1).cpu().numpy(), (DINOV2_SIZE, DINOV2_SIZE)
        resized = np.stack([np.asarray(Image.fromarray(each).resize(size, Image.BICUBIC)) for each in pixels])
        x = torch.from_numpy(resized).to(images.device).permute(0, 3, 1, 2) / 255
        with tf32(False), torch.autocast(images.device.type, enabled=False):
            return {"dinov2": self.encoder.model.forward_features((x - self.mean) / self.std)[:, 0]}


class PooledFeatures(nn.Module):
    """What a timm classifier pools in front of its last layer, such as a stand-in of dataset.standin_encoder.

    name: a folder of timm's save_for_hf, a timm name, or one of models.encoders.SHORT_NAMES.
    Images are resized to the network's own input size, bicubic and antialiased, and normalised as it was trained.
    Attributes: dim and dims, and fingerprint of weights and preprocessing.
    Raises ValueError where there is no such network, its weights cannot be had, or it does not pool.
    """

    def __init__(self, name: str):
        super().__init__()
        try:
            # With its own head, as timm then compares all names of the weights, and leaves none at random.
            self.network = timm.create_model(timm_source(name), pretrained=True)
            self.network.reset_classifier(0)
            data = resolve_model_data_config(self.network)
            self.register_buffer("mean", torch.tensor(data["mean"]).view(3, 1, 1))
            self.register_buffer("std", torch.tensor(data["std"]).view(3, 1, 1))
            self.size = tuple(data["input_size"][1:])
            self.eval().requires_grad_(False)
            found = self(torch.zeros(1, 3, *self.size, dtype=torch.uint8))["pooled"].shape
            if len(found) != 2:
                raise ValueError(f"it gives {tuple(found)} instead of one vector per image")
        except Exception as error:  # timm, the hub and the networks raise many kinds
            raise ValueError(
                f"{name!r} cannot judge ({reason_of(error)}); give inception, a timm name whose weights are in the "
                "cache or can be downloaded, or a folder of timm's save_for_hf, which "
                "`python -m dataset.standin_encoder DATA --kind convnet --out FOLDER` makes"
            ) from None
        # The text of a module names its layers, among them the kinds of GELU and pooling, which have no weights.
        self.dim, pooling = found[1], getattr(self.network, "global_pool", "")
        self.dims = {"pooled": self.dim}
        self.fingerprint = fingerprint(self, f"{self.network} {pooling} {self.size}")

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict:
        """uint8 (B, 3, H, W) -> pooled (B, dim) in float32."""
        with tf32(False), torch.autocast(images.device.type, enabled=False):
            x = F.interpolate(images.float(), self.size, mode="bicubic", antialias=True)
            return {"pooled": self.network((x / 255 - self.mean) / self.std)}


def timm_source(name: str) -> str:
    """A judge's or encoder's name as timm.create_model takes it; folders by their resolved path."""
    if (Path(name) / "config.json").is_file():
        return f"local-dir:{Path(name).resolve()}"
    return SHORT_NAMES.get(name.lower(), name.removeprefix("timm:"))


def _published_weights() -> Path:
    """The published file in torch's cache, downloaded and compared with its checksum if it is not there yet."""
    stored = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if stored.is_file():
        return stored
    try:
        stored.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(URL_INCEPTION_V3, timeout=10) as answer, replaced(stored) as file:
            content = answer.read()
            if not hashlib.sha256(content).hexdigest().startswith(PUBLISHED):
                raise OSError("what was downloaded has another checksum")
            file.write(content)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"Inception's weights {stored.name} are not in {str(stored.parent)!r}, and cannot be downloaded ({error}); "
            f"fetch {URL_INCEPTION_V3} where there is a network, and give --inception FILE"
        ) from None
    return stored

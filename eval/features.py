"""The networks whose features `eval.metrics` compares: Inception v3 as ADM's evaluator runs it, and DINOv2.

Both take uint8 images of any size, own their preprocessing, and compute in float32 without TF32 or autocast whatever
the caller has set. They return a dict of float32 features; `dims` has the widths.

Shapes: B batch, H, W pixels.
"""

import contextlib
import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import models  # noqa: F401  (before torch_fidelity, which imports torchvision: see its docstring)
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from models.encoders import FrozenEncoder
from models.hub import unreachable
from runtime import load_file

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

    def __init__(self, weights=""):
        super().__init__()
        self.file = Path(weights) if weights else _published_weights()
        load_file(self.file)  # refuses code, which the library's own reading would execute
        with open(self.file, "rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.fingerprint, self.is_published = self.sha256[:12], self.sha256.startswith(PUBLISHED)
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(self.file)
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
    def forward(self, images):
        """uint8 (B, 3, H, W) -> pool3 (B, 2048); spatial (B, 2023), sFID's; logits (B, 1008), without bias."""
        with full_precision(images.device):
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

    def __init__(self, name="dinov2-vit-l", weights="", patch=14):
        super().__init__()
        try:
            self.encoder = FrozenEncoder(name, DINOV2_SIZE // patch, weights)
        except ValueError as error:
            raise ValueError(
                f"FD-DINOv2 ({error}); of this command, the options are --dinov2 and --dinov2-weights"
            ) from error
        if self.encoder.size != DINOV2_SIZE or not self.encoder.model.num_prefix_tokens:
            raise ValueError(
                f"dinov2 = {name!r}: no vision transformer with a class token and patches of {patch} pixels"
            )
        self.name, self.dims = name, {"dinov2": self.encoder.dim}
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    @torch.no_grad()
    def forward(self, images):
        """uint8 (B, 3, H, W) -> dinov2 (B, dim): the class token after the final norm."""
        resized = np.stack(
            [
                np.asarray(Image.fromarray(image).resize((DINOV2_SIZE, DINOV2_SIZE), Image.BICUBIC))
                for image in images.permute(0, 2, 3, 1).cpu().numpy()
            ]
        )
        x = torch.from_numpy(resized).to(images.device).permute(0, 3, 1, 2) / 255
        with full_precision(images.device):
            return {"dinov2": self.encoder.model.forward_features((x - self.mean) / self.std)[:, 0]}


@contextlib.contextmanager
def full_precision(device):
    """float32 products in float32: no TF32 and no autocast in this block, which training may have switched on."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


def _published_weights():
    """The published file in torch's cache, downloaded and compared with its checksum if it is not there yet."""
    stored = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if stored.is_file():
        return stored
    reason = unreachable(URL_INCEPTION_V3)
    try:
        if not reason:
            stored.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(stored), hash_prefix=PUBLISHED, progress=False)
    except (OSError, RuntimeError) as error:
        reason = f"{URL_INCEPTION_V3}: {error}"
    if reason:
        raise ValueError(
            f"Inception's weights {stored.name} are not in {str(stored.parent)!r} ({reason}); fetch "
            f"{URL_INCEPTION_V3} where there is a network, and give --inception FILE"
        )
    return stored

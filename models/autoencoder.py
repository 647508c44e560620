"""Between images and what SiT is trained on: pixels, or latents of diffusers' autoencoders.

The only place that knows the scale and the shift of the latter.

Shapes: B batch, C channels of what SiT sees, H, W pixels, h, w latent pixels (H, W over the downsampling).
"""

import os
import textwrap

import torch
from torch import nn

from runtime import fingerprint

DECODED_AT_ONCE = 8  # images; so the memory of the decoder does not grow with the batch
HUB_NAMES = {
    "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse",
    "sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema",
    "taesd": "madebyollin/taesd",
}
UNDERSTOOD = dict(in_channels=3, out_channels=3, latents_mean=None, latents_std=None, upsampling_scaling_factor=2)


class Pixels:
    """No latent space: images scaled to [-1, 1]."""

    name = fingerprint = "pixels"
    channels = 3
    downsampling = 1

    def to(self, device: torch.device) -> "Pixels":
        """Itself: there is nothing to move."""
        return self

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3, H, W) in [-1, 1]."""
        return images.float() / 127.5 - 1

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """float (B, 3, H, W) -> uint8 (B, 3, H, W), rounded to the nearest level: the inverse of `encode`."""
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Latents(nn.Module):
    """What a frozen autoencoder makes of images, shifted and scaled as in latent diffusion (arXiv 2112.10752, D.1).

    name:  as given by the user.
    model: diffusers' AutoencoderKL, or AutoencoderTiny. The latter is trained on latents that are scaled already, so
           its own config has scale 1 and shift 0, and it has no posterior: a deviation of 0.
    Attributes: name, channels, downsampling, fingerprint (of the weights, the scale, the shift and the class).
    Raises ValueError on a config that asks for what is not done here.
    """

    def __init__(self, name: str, model: nn.Module):
        super().__init__()
        config = model.config
        for key, value in UNDERSTOOD.items():
            if config.get(key, value) != value:
                raise ValueError(f"autoencoder {name!r} has {key} = {config[key]}; only {value} is understood")
        if not config.scaling_factor:
            raise ValueError(
                f"autoencoder {name!r} has scaling_factor = {config.scaling_factor}; "
                "write into its config.json by what its latents are to be multiplied"
            )
        self.name, self.model = name, model
        self.channels, self.downsampling = config.latent_channels, 2 ** (len(config.block_out_channels) - 1)
        self.scale, self.shift = float(config.scaling_factor), float(config.shift_factor or 0)
        self.fingerprint = fingerprint(model, repr((type(model).__name__, self.scale, self.shift)))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 2C, h, w): mean and standard deviation of the posterior, not scaled.

        Raises ValueError where H or W is not a multiple of the downsampling.
        """
        height, width = images.shape[-2:]
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"autoencoder {self.name!r} cannot encode images of {height} x {width} pixels: "
                f"both must be multiples of {self.downsampling}"
            )
        encoded = self.model.encode(Pixels().encode(images))
        if "latents" in encoded:
            mean, std = encoded.latents, torch.zeros_like(encoded.latents)
        else:
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        return torch.cat([mean.float(), std.float()], dim=1)

    def sample(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """One draw from the posterior, as SiT sees it.

        moments: (B, 2C, h, w) of any float type, as `moments` gives them; noise: (B, C, h, w), standard normal.
        Returns float32 (B, C, h, w).
        """
        mean, std = moments.float().chunk(2, dim=1)
        return (mean + std * noise.float() - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """float (B, C, h, w) as SiT sees it -> uint8 (B, 3, H, W), rounded to the nearest level."""
        x = x.float() / self.scale + self.shift
        return torch.cat([Pixels().decode(self.model.decode(part).sample.float()) for part in x.split(DECODED_AT_ONCE)])


def load_autoencoder(name: str) -> Pixels | Latents:
    """The autoencoder that the user or a prepared folder names: Pixels, or frozen Latents on the CPU.

    name: "pixels", one of HUB_NAMES, a folder written by diffusers' `save_pretrained`, or OWNER/NAME on the model hub.
    Raises ValueError where there is none, it is of another class, or its weights cannot be had or do not fit.
    """
    if name == "pixels":
        return Pixels()
    from diffusers import AutoencoderKL, AutoencoderTiny  # only here: pixels do without

    source = HUB_NAMES.get(name, name)
    classes = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    try:
        kind = AutoencoderKL.load_config(source).get("_class_name")
        if kind not in classes:
            raise LookupError(f"it is of class {kind} by its config.json; only {' and '.join(classes)} are understood")
        # Not by way of accelerate, so that whether that is installed makes no difference.
        model, loaded = classes[kind].from_pretrained(source, low_cpu_mem_usage=False, output_loading_info=True)
        unfit = sorted([*loaded["missing_keys"], *loaded["unexpected_keys"]])
        if unfit:  # diffusers would go on with random weights
            raise LookupError(f"{len(unfit)} weights are missing or unknown to config.json, such as {unfit[0]}")
    except Exception as error:  # diffusers and the hub raise many kinds
        remedy = "write it again with diffusers' save_pretrained; of a pipeline, give the folder `vae`"
        if not os.path.isdir(source):
            remedy = (
                f"choose one of {', '.join(['pixels', *HUB_NAMES])}, OWNER/NAME on the hub, or a folder of diffusers' "
                f"save_pretrained; without network, run `hf download {source} --local-dir FOLDER` elsewhere and give "
                "FOLDER; HF_HUB_OFFLINE=1 looks in the hub's cache alone"
            )
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise ValueError(f"autoencoder {name!r} could not be loaded ({reason}); {remedy}") from error
    return Latents(name, model)

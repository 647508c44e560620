"""Between images and what SiT is trained on: pixels, or latents of diffusers' autoencoders.

The only place that knows the scale and the shift of the latter.

Shapes: B batch, C channels of what SiT sees, H, W pixels, h, w latent pixels (H, W over the downsampling).
"""

import os

import torch
from torch import nn
from torch.nn import functional as F

from runtime import fingerprint, one_line

DECODED_AT_ONCE = 8  # images; so the memory of the decoder does not grow with the batch
HUB_NAMES = {
    "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse",
    "sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema",
    "taesd": "madebyollin/taesd",
}
UNDERSTOOD = dict(in_channels=3, out_channels=3, upsampling_scaling_factor=2)
PROBED = (32, 128)  # pixels of the image that tells the shape of latents; the second is for compression beyond 32
# How some classes of diffusers differ from the others: they take videos, here of one frame; latents are normalised in
# squares of 2 x 2, which become channels; they take images in [0, 1], and normalise latents by themselves.
QUIRKS = {
    "AutoencoderKLQwenImage": "video",
    "AutoencoderKLFlux2": "squares",
    "AutoencoderRAE": "unit",
}


class Pixels:
    """No latent space: images scaled to [-1, 1]."""

    name = fingerprint = "pixels"
    content = ""
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

    name:   as given by the user.
    model:  one of diffusers' autoencoders. Those without a posterior have a deviation of 0.
    config: its config.json, where that knows more than the model, such as `latents_mean` and `latents_std`; None for
            latents that are not normalised.
    Attributes: name, channels, downsampling; content, a fingerprint of what stored moments depend on (weights and
    class; "" for pixels, which have none), and fingerprint, of the normalisation too.
    Raises ValueError on a config that asks for what is not done here, and on a model that cannot encode images.
    """

    def __init__(self, name: str, model: nn.Module, config: dict | None):
        super().__init__()
        for key, value in UNDERSTOOD.items():
            if model.config.get(key, value) != value:
                raise ValueError(f"autoencoder {name!r} has {key} = {model.config[key]}; only {value} is understood")
        self.name, self.model, self.quirk = name, model, QUIRKS.get(type(model).__name__)
        self.eval().requires_grad_(False)
        kind, own = type(model).__name__, model.config.get("scaling_factor") if self.quirk == "unit" else ""
        self.content = fingerprint(model, f"{kind} {own}")
        shift, scale = (0.0, 1.0)
        if config is not None:
            shift, scale = normalisation(name, model, {**model.config, **config}, self.quirk)
        self.fingerprint = fingerprint(model, repr((kind, scale, shift)) + str(own))
        for key, value in (("shift", shift), ("scale", scale)):
            self.register_buffer(key, torch.tensor(value).view(-1, 1, 1), persistent=False)  # (C, 1, 1), or one for all
        for size in (model.decoder_image_size,) if self.quirk == "unit" else PROBED:
            problem = self._probe(size)
            if not problem:
                break
        else:
            raise ValueError(
                f"autoencoder {name!r}, of class {kind}, cannot encode and decode an image of {size} pixels: {problem}"
            )
        if self.scale.numel() not in (1, self.channels):
            raise ValueError(f"autoencoder {name!r} has {self.scale.numel()} latents_std for {self.channels} channels")

    def _probe(self, size):
        """Sets channels and downsampling by an image of that size. Returns why it could not, "" if it could."""
        blank = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        try:
            _, channels, _, width = (moments := self._moments(blank)).shape
            self.channels, self.downsampling = channels // 2, size // width
            decoded = self.decode(moments[:, : self.channels]).shape
        except Exception as error:  # whatever such a class may raise
            return one_line(error)
        return "" if decoded == blank.shape else f"it becomes {tuple(decoded)}"

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 2C, h, w): mean and standard deviation of the posterior, not scaled.

        Raises ValueError where H or W is not a multiple of the downsampling, or the model knows one size alone.
        """
        height, width = images.shape[-2:]
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"autoencoder {self.name!r} cannot encode images of {height} x {width} pixels: "
                f"both must be multiples of {self.downsampling}"
            )
        moments = self._moments(images)
        if moments.shape[-2:] != (height // self.downsampling, width // self.downsampling):
            size = moments.shape[-1] * self.downsampling
            raise ValueError(f"autoencoder {self.name!r} takes images of {size} pixels alone, not {height} x {width}")
        return moments

    @torch.no_grad()
    def _moments(self, images):
        x = Pixels().encode(images)
        if self.quirk == "unit":
            x = (x + 1) / 2
        encoded = self.model.encode(x.unsqueeze(2) if self.quirk == "video" else x)
        if "latent_dist" in encoded:
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:
            mean = encoded["latents" if "latents" in encoded else "latent"]
            std = torch.zeros_like(mean)
        if self.quirk == "video":
            mean, std = mean.squeeze(2), std.squeeze(2)
        if self.quirk == "squares":
            mean, std = F.pixel_unshuffle(mean, 2), F.pixel_unshuffle(std, 2)
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
        return torch.cat([Pixels().decode(self._decode(part).float()) for part in x.split(DECODED_AT_ONCE)])

    def _decode(self, x):
        if self.quirk == "squares":
            x = F.pixel_shuffle(x, 2)
        if self.quirk == "video":
            return self.model.decode(x.unsqueeze(2)).sample.squeeze(2)
        images = self.model.decode(x).sample
        return images * 2 - 1 if self.quirk == "unit" else images


def normalisation(name: str, model: nn.Module, config: dict, quirk: str | None) -> tuple:
    """shift and scale: SiT sees (z - shift) scale. Numbers, or lists of one per channel, as in diffusers' pipelines.

    AutoencoderTiny is trained on latents that are scaled already; its own config has scale 1.
    """
    if quirk == "unit":
        return 0.0, 1.0
    if quirk == "squares":
        return model.bn.running_mean.tolist(), (model.bn.running_var + model.config.batch_norm_eps).rsqrt().tolist()
    factor, shift = config.get("scaling_factor", 1.0), config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if not factor:
        raise ValueError(
            f"autoencoder {name!r} has scaling_factor = {factor}; say in its config.json by what its latents are "
            "to be multiplied, or let `dataset.prepare --statistics` measure it"
        )
    if mean is None and std is None:
        return float(shift), float(factor)
    if mean is None or std is None or shift or len(mean) != len(std):
        raise ValueError(
            f"autoencoder {name!r} has latents_mean = {mean}, latents_std = {std} and shift_factor = {shift}; needed "
            "are both of the former, of one length, and no shift; correct its config.json"
        )
    return list(mean), [factor / value for value in std]


def load_of_diffusers(source: str) -> tuple[nn.Module, dict]:
    """An autoencoder of diffusers and its config.json, from a folder or the hub. Raises exceptions of many kinds."""
    import diffusers

    config = diffusers.AutoencoderKL.load_config(source)
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin) and hasattr(kind, "encode")):
        raise LookupError(f"its class by config.json, {config.get('_class_name')}, is no autoencoder of diffusers")
    # Not by way of accelerate, so that whether that is installed makes no difference.
    model, loaded = kind.from_pretrained(source, low_cpu_mem_usage=False, output_loading_info=True)
    unfit = sorted([*loaded["missing_keys"], *loaded["unexpected_keys"]])
    if unfit:  # diffusers would go on with random weights
        raise LookupError(f"{len(unfit)} weights are missing or unknown to config.json, such as {unfit[0]}")
    return model, config


def load_autoencoder(name: str, normalised: bool = True) -> Pixels | Latents:
    """The autoencoder that the user or a prepared folder names: Pixels, or frozen Latents on the CPU.

    name: "pixels", one of HUB_NAMES, OWNER/NAME on the model hub, a folder written by diffusers' `save_pretrained`, or
        a file of latent diffusion's format (models/ldm.py).
    normalised: shift and scale its latents, as its config says.
    Raises ValueError where there is none, it is of another class, or its weights cannot be had or do not fit.
    """
    if name == "pixels":
        return Pixels()
    from models.ldm import load_ldm  # only here: pixels do without diffusers

    source = HUB_NAMES.get(name, name)
    try:
        model, config = load_ldm(source) if os.path.isfile(source) else load_of_diffusers(source)
    except Exception as error:  # diffusers and the hub raise many kinds
        remedy = "write it again with diffusers' save_pretrained; of a pipeline, give the folder `vae`"
        if source.endswith((".ckpt", ".pt", ".safetensors")):
            remedy = (
                "give a file with latent diffusion's weights encoder.*, decoder.*, quant_conv.* and post_quant_conv.*"
            )
        elif not os.path.isdir(source):
            remedy = (
                f"choose one of {', '.join(['pixels', *HUB_NAMES])}, OWNER/NAME on the hub, or a folder of diffusers' "
                f"save_pretrained; without network, run `hf download {source} --local-dir FOLDER` elsewhere and give "
                "FOLDER; HF_HUB_OFFLINE=1 looks in the hub's cache alone"
            )
        raise ValueError(f"autoencoder {name!r} could not be loaded ({one_line(error)}); {remedy}") from error
    return Latents(name, model, config if normalised else None)

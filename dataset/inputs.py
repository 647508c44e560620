"""What a training step reads: prepared images, and the frozen networks that turn them into latents and target tokens.

Shapes: B batch, C channels, H = W size, T tokens.
"""

import functools

import torch

from dataset.prepared import PreparedImages, ShuffledBatches, load_batches, text_encoders
from models.autoencoder import load_autoencoder
from models.encoders import FrozenEncoder
from models.registry import constructor, takes_text
from runtime import Ranks, Use, derive_seed


class Inputs:
    """Images, autoencoder and encoders of a run. Raises ValueError where they do not fit together.

    Attributes: shape (C, H, W) of x; encoders to align with; data, and plain_data for steps without alignment; held_out
    images, or None; text, the ID of the stored captions, or "" for labels.
    """

    def __init__(self, config, ranks: Ranks):
        self.config, self.device, align = config, ranks.device, config.alignment == "repa"
        images = PreparedImages(config.data, images=config.diagnose_every > 0)
        if config.diagnose_every and len(images) < config.diagnose_images:
            raise ValueError(f"diagnose_images = {config.diagnose_images}: {config.data} has {len(images)} images")
        with ranks.one_first():
            self.autoencoder = load_autoencoder(config.autoencoder).to(self.device)
            self.decoder = load_autoencoder(config.decoder).to(self.device) if config.decoder else self.autoencoder
        size, patch = self.latent_size(images.resolution), patch_size(config.model)
        if size % patch:
            raise ValueError(f"model = {config.model!r}: {size} x {size} inputs do not divide into patches of {patch}")
        self.shape = (self.autoencoder.channels, size, size)
        weights = config.encoder_weights or ("",) * len(config.encoder)
        with ranks.one_first():
            self.encoders = [
                FrozenEncoder(name, size // patch, file).to(self.device)
                for name, file in zip(config.encoder if align else (), weights)
            ]
        # Only what is read is opened: pixels, or moments of latents, and the tokens of encoders if they are stored.
        latents, self.text = self.autoencoder.content, stored_text(config)
        read = functools.partial(PreparedImages, config.data, latents=latents, text=self.text, held_out=config.held_out)
        self.held_out = read(images=not latents, training=False) if config.held_out else None
        read = functools.partial(read, mirror=config.mirror)
        stored = [encoder.fingerprint for encoder in self.encoders if config.encoder_features == "prepared"]
        self.data = read(images=not latents or align and not stored, features=stored)
        self.plain_data = read(images=not latents)

    def latent_size(self, resolution: int) -> int:
        """Side of what the model sees. Raises ValueError where images, autoencoder and decoder do not fit together."""
        config, encoder, decoder = self.config, self.autoencoder, self.decoder
        if resolution % encoder.downsampling:
            raise ValueError(
                f"data = {config.data!r}: images of {resolution} pixels are not a multiple of the "
                f"{encoder.downsampling} that one latent of {config.autoencoder!r} stands for"
            )
        if (decoder.channels, decoder.downsampling) != (encoder.channels, encoder.downsampling):
            raise ValueError(
                f"decoder = {config.decoder!r} takes {decoder.channels} channels and enlarges {decoder.downsampling} "
                f"times, autoencoder = {config.autoencoder!r} gives {encoder.channels} and {encoder.downsampling}"
            )
        return resolution // encoder.downsampling

    def batches(self, data: PreparedImages, start: int, stop: int, ranks: Ranks):
        """This process's share of the steps from `start` to `stop`, as dicts of host tensors."""
        seed = derive_seed(self.config.seed, Use.ORDER)
        sampler = ShuffledBatches(len(data), self.config.batch_size, seed, start, stop, ranks.rank, ranks.world)
        return load_batches(data, sampler, self.config.num_workers, pin_memory=self.device.type == "cuda")

    def clean(self, batch: dict, posterior: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W): scaled pixels, or a sample of the latents' posterior by noise of that shape."""
        if "moments" in batch:
            return self.autoencoder.sample(batch["moments"], posterior)
        return self.autoencoder.encode(batch["images"])

    def conditions(self, batch: dict) -> torch.Tensor:
        """What the model is told of each image: its caption (B, L, W + 1), or its label (B)."""
        return batch["text" if self.text else "labels"]

    def model_arguments(self) -> dict:
        """The arguments of the model that follow from the data."""
        known = {"input_size": self.shape[1], "in_channels": self.shape[0]}
        if not self.text:
            return known | {"num_classes": self.data.num_classes}
        tokens, width = self.data.null_text.shape
        return known | {"text_tokens": tokens, "text_width": width - 1}

    def tokens(self, batch: dict) -> list:
        """(B, T, dim) of each encoder: as they are stored, or computed."""
        stored = "tokens_0" in batch
        return [batch[f"tokens_{i}"] if stored else encode(batch["images"]) for i, encode in enumerate(self.encoders)]


def patch_size(model: str) -> int:
    """Patch size of a named model. Raises ValueError on an unknown name."""
    constructor(model)
    return int(model.rpartition("/")[2])


def stored_text(config) -> str:
    """The ID of the captions that a model of captions reads, "" for one of labels.

    Raises ValueError where the data folder has none, or several and the option text_encoder does not say which.
    """
    if not takes_text(config.model):
        return ""
    names = {key: facts["name"] for key, facts in text_encoders(config.data).items()}
    fitting = [key for key, name in names.items() if config.text_encoder in ("", name, key)]
    if len(fitting) != 1:
        raise ValueError(
            f"text_encoder = {config.text_encoder!r}: {config.data} has captions by "
            f"{', '.join(f'{name} ({key})' for key, name in names.items()) or 'no encoder'}; name one of them, or run "
            "`python -m dataset.prepare` with --text-encoder"
        )
    return fitting[0]

"""Between images and what SiT is trained on. The only place that knows the scale of the latter.

Shapes: B batch, C channels, H = W size.
"""

import torch


class Pixels:
    """No latent space: images scaled to [-1, 1]."""

    channels = 3
    downsampling = 1

    def encode(self, images):
        """uint8 (B, 3, H, W) -> float32 (B, 3, H, W) in [-1, 1]."""
        return images.float() / 127.5 - 1

    def decode(self, x):
        """float (B, 3, H, W) -> uint8 (B, 3, H, W), rounded to the nearest level: the inverse of `encode`."""
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


AUTOENCODERS = {"pixels": Pixels}


def load_autoencoder(name):
    """The autoencoder that a prepared folder names. Raises ValueError on an unknown one."""
    if name not in AUTOENCODERS:
        raise ValueError(f"autoencoder {name!r} is unknown; choose one of {', '.join(AUTOENCODERS)}")
    return AUTOENCODERS[name]()

"""The networks: SiT with its streams and routers, projectors, frozen encoders and autoencoders."""

from models import torchvision_cure  # noqa: F401 - before any module here imports timm

"""The models by name: SiT-XL/2 and the like, which take labels, MMDiT-B/2 and Qwen-Image/2, which take captions."""

from collections.abc import Callable

from models.sit import SIT_MODELS


def constructor(name: str) -> Callable:
    """Makes the named model from its other arguments. Raises ValueError on an unknown name."""
    models = SIT_MODELS
    if takes_text(name):
        from models.mmdit import MMDIT_MODELS as models  # diffusers takes seconds
    if name not in models:
        kinds = [*SIT_MODELS, "MMDiT-B/{1,2,4}", "Qwen-Image/2"]
        raise ValueError(f"model = {name!r} is unknown; choose one of {', '.join(kinds)}")
    return models[name]


def takes_text(name: str) -> bool:
    """Whether the named model is conditioned on captions, rather than on labels."""
    return name.startswith(("MMDiT", "Qwen-Image"))

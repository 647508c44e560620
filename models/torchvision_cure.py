"""Makes timm importable where torchvision's compiled operators cannot be loaded. Import it before timm or torchvision.

The torchvision wheel is built against CUDA. Beside a CPU-only torch its library does not load, and
`import torchvision` (hence `import timm`) then stops with "operator torchvision::nms does not exist", although
nothing here uses that operator. Declaring it, and its quantised twin, first is enough.
"""

import importlib.util
from pathlib import Path

import torch


def _torchvision_library_loads():
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return True  # nothing to mend; the import will say what is missing
    try:
        torch.ops.load_library(next(Path(spec.origin).parent.glob("_C*.so")))
        return True
    except (OSError, StopIteration):
        return False


if not _torchvision_library_loads():
    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

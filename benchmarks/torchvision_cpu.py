"""Let the PyPI build of torchvision load next to the CPU build of torch.

That build's compiled operators link against CUDA. Without CUDA they do not load, and ``import
torchvision`` then stops where it registers fake kernels for two operators (``nms`` and ``qnms``)
that nobody has declared. Declaring them is enough for every model that detects no boxes. Import
this module before torchvision or timm; where the compiled operators do load it changes nothing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_NEEDED = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _compiled_operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # not installed: the import itself says so
    for library in sorted(Path(spec.origin).parent.glob("_C*")):
        try:
            torch.ops.load_library(str(library))
        except (ImportError, OSError):
            continue
        return True
    return False


def declare_missing_operators() -> torch.library.Library | None:
    """Declare what torchvision's import needs; return the library that owns it, or None where
    nothing was missing.
    """
    if _compiled_operators_load():
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _NEEDED:
        library.define(name + _SCHEMA)
    return library


_owner = declare_missing_operators()  # the declarations live as long as this object

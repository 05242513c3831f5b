"""Let the PyPI build of torchaudio load next to the CPU build of torch.

That build's compiled operators link against CUDA. No model of the package needs them, so where they
do not load the package is told that it was built without. Import this module before torchaudio.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch


def _compiled_operators_load() -> bool:
    spec = importlib.util.find_spec("torchaudio")
    if spec is None or spec.origin is None:
        return True  # not installed: the import itself says so
    for library in sorted((Path(spec.origin).parent / "lib").glob("_torchaudio*")):
        try:
            torch.ops.load_library(str(library))
        except (ImportError, OSError):
            return False
    return True


def _no_alignment(_function: object) -> object:
    def fail(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise RuntimeError("torchaudio's compiled operators do not load here")

    return fail


def declare_extension_missing() -> None:
    """Put a module in the place of the one that loads the operators, where they do not load."""
    if "torchaudio" in sys.modules or _compiled_operators_load():
        return
    extension = ModuleType("torchaudio._extension")
    extension.__dict__.update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        fail_if_no_align=_no_alignment,
    )
    sys.modules[extension.__name__] = extension


declare_extension_missing()

"""Whose code, classes and Python modules are: torch's, Python's, ours, a package's, the user's."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import torch

from ...errors import owner_of
from ...graphs.pictures import picture

TORCH, OURS = str(torch.__path__[0]), str(Path(picture.__code__.co_filename).parents[1])
LIBRARY = (TORCH, OURS)  # code that is not what the user writes
_LIBRARIES = (sys.stdlib_module_names - {"__main__"}) | {"torch", "numpy", "dni_fx"}


def is_library(function: types.FunctionType) -> bool:
    """Whether the code is torch's or Python's."""
    return function.__code__.co_filename.startswith(LIBRARY) or is_library_name(
        function.__globals__.get("__name__", "")
    )


def is_library_name(module: Any) -> bool:
    """Whether a Python module is torch's, NumPy's, Python's or ours."""
    return isinstance(module, str) and module.partition(".")[0] in _LIBRARIES


def is_users(owner: Any) -> bool:
    """Whether a class or Python module is the user's own. What packages keep in theirs (bars of
    progress, loggers) changes all the time.
    """
    name = owner.__module__ if isinstance(owner, type) else owner.__name__
    file = getattr(sys.modules.get(name), "__file__", None)
    return not is_library_name(name) and (file is None or owner_of(file) == "user")


def file_of(function: types.FunctionType) -> str:
    """Where its code stands; generated code (of dataclasses) belongs to its Python module."""
    name = function.__code__.co_filename
    module = sys.modules.get(function.__module__) if name[:1] == "<" else None
    return getattr(module, "__file__", None) or name

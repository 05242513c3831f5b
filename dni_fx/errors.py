"""Errors of dni_fx: what went wrong, where, what was expected and found, and the next step."""

from __future__ import annotations

import contextlib
import difflib
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from . import passes

_OURS = [Path(str(file)).resolve().parent for file in (__file__, passes.__file__, torch.__file__)]
_INSTALLED = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")]
_PYTHON = Path(sysconfig.get_path("stdlib")).resolve()
_GENERATED = ("<frozen", "<eval_with_key")  # by the import system, by torch.fx


class DecouplingError(ValueError):
    """A model, plan or input cannot be decoupled as asked. Base of every error that dni_fx raises
    on purpose.
    """


class TracingError(DecouplingError):
    """No rung of the tracing ladder gave a graph that equals the model.

    Causes: control flow on tensor values, numbers changed by ``forward`` or Python's random numbers
    at the top level of the model. Fixes are named in the message.
    """


class DataDependentError(TracingError):
    """The model's control flow reads a tensor's values, which a graph cannot hold."""


class BakedInError(TracingError):
    """Something that changes from call to call, which any tracer would bake in without noticing."""


class CutError(DecouplingError):
    """One or more cuts are unknown, illegal, or crossed by nothing that trains. Lists every problem
    at once.
    """


class PlanMismatchError(DecouplingError):
    """A plan was made for another graph, or inputs no longer fit the graph that the plan was made
    for.
    """


class NonFiniteError(DecouplingError):
    """A value or gradient became NaN or infinite. Names the place and the step; nothing was
    updated.
    """


@contextlib.contextmanager
def placed(place: str) -> Iterator[None]:
    """What is refused within, with its place before it."""
    try:
        yield
    except DecouplingError as error:
        raise type(error)(f"{place}: {error}") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'layer2'?`` or an empty string."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    close += [
        k for k in known if k not in close and (k.startswith(name + ".") or k.endswith("." + name))
    ][:3]
    if not close:
        return ""
    return "; did you mean " + " or ".join(repr(c) for c in close[:3]) + "?"


def user_line(error: BaseException) -> str | None:
    """The line to look at: the last that an error passed outside the library and torch.

    Whose a line is follows from where packages lie, not from what folders are called. A line of
    another installed package counts where the error passed none of the user's own.

    Args:
        error: with its traceback.

    Returns:
        ``file:line``, or None if all lines are the library's, torch's or Python's.
    """
    frames = traceback.extract_tb(error.__traceback__)
    for owner in ("user", "package"):
        for frame in reversed(frames):
            if owner_of(frame.filename) == owner:
                return f"{frame.filename}:{frame.lineno}"
    return None


def owner_of(filename: str) -> str:
    """Whose a file is: ``"ours"`` (torch's and Python's, too), another ``"package"``'s or the
    ``"user"``'s.
    """
    folders = Path(filename).resolve().parents
    if filename.startswith(_GENERATED) or any(folder in folders for folder in _OURS):
        return "ours"
    if any(folder in folders for folder in _INSTALLED):
        return "package"
    return "ours" if _PYTHON in folders else "user"

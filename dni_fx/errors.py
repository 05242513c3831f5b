"""Errors of dni_fx: what went wrong, where, what was expected and found, and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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

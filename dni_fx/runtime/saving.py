"""What a trainer of a whole model saves, and how it is put back."""

from __future__ import annotations

from typing import Any

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..passes.trace.state import rng_state, set_rng_state
from .optimizing import StageOptimizers

PARTS = ("decoupled", "optimizers", "synthesizer_optimizers", "gradients", "steps", "rng")


def trained_state(
    decoupled: Decoupled, optimizers: StageOptimizers, steps: int, accumulate: int
) -> dict[str, Any]:
    """Model, sources, optimisers, unfinished gradients, random states and the number of steps.

    Args:
        decoupled: the model.
        optimizers: of its stages and sources.
        steps: number of steps made.
        accumulate: how many of them make one update.
    """
    named = decoupled.named_parameters()
    gradients = {n: p.grad for n, p in named if p.grad is not None and steps % accumulate}
    return {
        "decoupled": decoupled.state_dict(),
        **optimizers.state_dict(),
        "gradients": gradients,
        "steps": steps,
        "rng": rng_state(),
    }


def load_trained(state: dict[str, Any], decoupled: Decoupled, optimizers: StageOptimizers) -> None:
    """Put back what :func:`trained_state` returned; the caller takes the number of steps.

    Raises:
        DecouplingError: the state belongs to other stages or sources; nothing is loaded then.
    """
    if not isinstance(state, dict) or any(part not in state for part in PARTS):
        raise DecouplingError(
            f"a trainer's state is a dict with {', '.join(PARTS)}, as state_dict() returns it"
        )
    optimizers.check_state(state)
    have = {k: getattr(v, "shape", None) for k, v in decoupled.state_dict().items()}
    given = {k: getattr(v, "shape", None) for k, v in state["decoupled"].items()}
    for name in {**have, **given}:
        missing = name not in have or name not in given
        if missing or (have[name] != given[name] and not name.endswith("_extra_state")):
            raise DecouplingError(
                f"this state does not fit: {name!r} is {_shape(given, name)} in it, but "
                f"{_shape(have, name)} here; decouple with the plan and sources that the state was "
                "saved with"
            )
    decoupled.load_state_dict(state["decoupled"])
    optimizers.load_state_dict(state)
    for name, parameter in decoupled.named_parameters():
        parameter.grad = state["gradients"].get(name)
    set_rng_state(state["rng"])


def _shape(shapes: dict[str, Any], name: str) -> str:
    return "missing" if name not in shapes else str(tuple(shapes[name] or ()))

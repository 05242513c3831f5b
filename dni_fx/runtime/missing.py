"""Gradients that do not arrive where the traced graph says that one must: never taken for zero."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import DecouplingError
from ..passes.cut.expecting import Expected


def check_arrived(
    stage: int,
    expected: Expected,
    inputs: Mapping[str, Tensor | None],
    parameters: Mapping[str, Tensor | None] | None = None,
) -> None:
    """Refuse a stage where something went missing, though all that it sends has a gradient.

    Args:
        stage: its index.
        expected: where gradients must arrive.
        inputs: what arrived for its inputs, by name; those that nobody asks for are left out.
        parameters: what arrived for its parameters by name; by default what is in ``.grad``.

    Raises:
        DecouplingError: which interface or parameter has none.
    """
    for name in expected.inputs:
        if name in inputs and inputs[name] is None:
            raise _missing(stage, f"interface {name!r}")
    if parameters is None:
        for name, parameter in expected.parameters.items():
            if parameter.grad is None:
                raise _missing(stage, f"parameter {name!r}")
        return
    for name in expected.parameters:
        if name in parameters and parameters[name] is None:
            raise _missing(stage, f"parameter {name!r}")


def _missing(stage: int, place: str) -> DecouplingError:
    return DecouplingError(
        f"stage_{stage}: no gradient arrived at {place}, though the model's graph leads there from "
        "what the stage sends. Something that was not there when the model was traced stands in "
        "the way: a hook, a wrapper (FSDP), an exchanged parameter, code that detaches. Put it "
        "there before the model is decoupled, or decouple again"
    )

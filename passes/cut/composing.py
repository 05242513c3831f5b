"""The stages of a split model one after the other, with ordinary autograd."""

from __future__ import annotations

from typing import Any

from ...graphs.nested import flatten
from ..trace.ports import ANOTHER
from ..trace.tracing import Trace
from .splitting import OUTPUT, Split


def run_stages(split: Split, values: dict[str, Any]) -> Any:
    """Run the composed stages.

    Args:
        split: all stages.
        values: the model's inputs by name; everything that crosses or leaves is added.

    Returns:
        The model's output.
    """
    output = None
    for stage in split.stages:
        results = stage.module(*(values[n] for n in stage.inputs))
        found = dict(
            zip(stage.outputs, (results,) if stage.outputs == (OUTPUT,) else results, strict=True)
        )
        output = found.pop(OUTPUT, None)
        values.update(found)
    return output


def call_stages(trace: Trace, split: Split, *args: Any, **kwargs: Any) -> Any:
    """Run the composed stages, called as what was traced: a window returns its state, too."""
    values = dict(zip(split.model_inputs, flatten((args, kwargs))[0], strict=True))
    output = run_stages(split, values)
    if not trace.ports:
        return output
    state = [values[p.name] for p in trace.ports if p.feeds != ANOTHER]
    return output, state  # messages are in the output already

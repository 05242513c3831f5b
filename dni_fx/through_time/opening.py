"""A window's graph: cut at its end, where the state leaves, and where asked within it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..compiler.refusals import check_cuts
from ..decoupled import Decoupled
from ..graphs.graphs import Graphs
from ..graphs.recipe import Recipe
from ..passes.cut.insertion import Gradients, Leaving
from ..passes.trace.ports import open_ports
from ..passes.trace.tracing import Trace
from .window import Window


@dataclass(frozen=True)
class WindowOpening:
    """What comes into a window's graph and leaves it besides the model's input and output.

    Attributes:
        module: the model over one window; its ``states`` are known by the first call.
        leaving: how state and messages are served.
        messages: keys of the model's output, a dict, that leave for another network.
        input_gradients: whether gradients leave for what the window takes.
    """

    module: Window
    leaving: Leaving
    messages: tuple[str, ...] = ()
    input_gradients: bool = False

    def open(self, trace: Trace) -> Trace:
        """The trace of the user's model, whose state comes in and leaves by itself."""
        states = self.module.states
        assert states is not None
        dims = dict(zip(states.names, states.batch_dims, strict=True))
        prefixes = ("model.", "apart.")
        return open_ports(
            trace, self.module.model, prefixes, dims, self.messages, self.input_gradients
        )


def decouple_window(
    opening: WindowOpening, cuts: Sequence[str], gradients: Gradients, check: bool
) -> Decoupled:
    """Cut the graph of a window, at its end and where asked within it.

    Args:
        opening: the window, and what leaves its graph.
        cuts: names to cut after within the window.
        gradients: as in :func:`dni_fx.decouple`.
        check: compare the stages with the window.

    Returns:
        The decoupled model, called as the window is.
    """
    names = check_cuts(list(cuts), None)
    assert isinstance(names, tuple)
    recipe = Recipe(names, gradients, check=check, opening=opening)
    return Decoupled(Graphs(opening.module.model, recipe))

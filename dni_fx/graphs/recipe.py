"""What a model is cut by: one frozen value, made once and read by every pass."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from ..passes.cut.insertion import Context, Gradients, Inputs, Leaving
from ..passes.search.choosing import Search
from ..passes.trace.tracing import Trace
from ..plan import CutPlan


class Opening(Leaving, Protocol):
    """A model seen as a function with further inputs and outputs, such as one over a window.

    Attributes:
        module: what is called, traced and checked in the model's place.
    """

    @property
    def module(self) -> nn.Module: ...

    def open(self, trace: Trace) -> Trace:
        """The trace of the model itself, whose further values come in and leave by themselves."""


@dataclass(frozen=True)
class Recipe:
    """What was asked for; the arguments of :func:`dni_fx.decouple`, checked.

    Attributes:
        cuts: names to cut after, a plan to follow, or a search.
        gradients: gradient sources, by one name or factory or by interface.
        inputs: synthetic inputs likewise; None for none.
        context: turns a training target into what the sources see.
        check: whether every graph is compared with the model.
        weigh: how cuts that were not searched for are weighed; None where nobody asks.
        opening: how the graph is opened; None for a model as it is.
    """

    cuts: tuple[str, ...] | CutPlan | Search
    gradients: Gradients = "auto"
    inputs: Inputs | None = None
    context: Context | None = None
    check: bool = True
    weigh: Search | None = None
    opening: Opening | None = None

    @property
    def wanted(self) -> int | None:
        """How many stages a search was asked for; None where cuts were named."""
        return self.cuts.count if isinstance(self.cuts, Search) else None

    def for_copy(self, memo: dict[int, Any]) -> Recipe:
        """For a deep copy of the model: what belongs to the model is copied with it."""
        return dataclasses.replace(
            self,
            context=copy.deepcopy(self.context, memo),
            opening=copy.deepcopy(self.opening, memo),
        )

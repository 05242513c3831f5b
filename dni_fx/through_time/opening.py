"""A window's graph is opened at its end, where the state and messages leave it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from ..passes.trace.ports import ANOTHER, open_ports
from ..passes.trace.traces import Trace
from ..plan import Interface, TensorSpec
from ..sources import EACH, EXACT, AcrossTime, Joint, is_each
from .window import Window


@dataclass
class WindowOpening:
    """What comes into a window's graph and leaves it besides the model's input and output, and the
    sources of what leaves: one for all tensors of the state that ask for the same.

    Attributes:
        module: the model over one window, which knows its state by the first call.
        context: what the sources see, from the first step on.
        messages and others: as for :func:`dni_fx.recurrent.decouple_through_time`.
    """

    module: Window
    messages: tuple[str, ...]
    input_gradients: bool
    factor: float
    auxiliary: float
    message_factor: float
    context: TensorSpec | None = None
    _known: list[tuple[Any, Joint]] = field(default_factory=list)

    def open(self, trace: Trace) -> Trace:
        """The trace of the user's model, whose state comes in and leaves by itself."""
        states = self.module.states
        assert states is not None
        dims = dict(zip(states.names, states.batch_dims, strict=True))
        prefixes = ("model.", "apart.")
        return open_ports(
            trace, self.module.model, prefixes, dims, self.messages, self.input_gradients
        )

    def see_context(self, context: Tensor) -> None:
        """What the sources will see, at the first step."""
        if self.context is None:
            self.context = TensorSpec(tuple(context.shape), context.dtype)

    def serve(self, interface: Interface, option: Any) -> Any:
        """What makes the source of something that leaves the window."""
        if option in EXACT:
            return EXACT[-1]
        if is_each(option):  # the next window is one consumer
            option = option.removeprefix(EACH)
        if interface.feeds == ANOTHER:
            return partial(AcrossTime, source=option, factor=self.message_factor)
        for asked, joint in self._known:
            if asked is option or asked == option:
                return joint
        made = Joint(
            partial(AcrossTime, source=option, factor=self.factor, auxiliary=self.auxiliary)
        )
        self._known.append((option, made))
        return made

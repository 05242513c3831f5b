"""One window on its way: what leaves it waits for the next window, or for another network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..passes.trace.ports import ANOTHER
from ..plan import Interface
from ..runtime.batch_state import Setting
from ..runtime.finite import refuse
from ..runtime.in_turn import Batch
from ..runtime.objective import Objective
from ..runtime.tape import Tape
from ..sources import Served, side_by_side


class WindowBatch(Batch):
    """One window: what leaves it waits for the next one, or for another network.

    Sources that predict are asked at once. Where the gradient of something that leaves is to be
    exact, the whole window waits for it.

    Args:
        decoupled: the window's model, its graph active.
        objective: the loss.
        ended: whose sequence ends with the window, ``(batch,)``; None for nobody's.
        step: number of the window, from 1.

    Attributes:
        previous: the window before, which hears what this one sends back.
        leaving: what leaves, by name.
        waits_for: names of what the window waits for.
        torn: whether its graphs have been pulled back, and are gone.
        sent_back: gradients of what the window took, once it has been pulled back.
    """

    def __init__(
        self, decoupled: Decoupled, objective: Objective, ended: Tensor | None, step: int
    ) -> None:
        self.ended, self.step = ended, step
        split = decoupled.graphs.variant.split
        self.leaving: dict[str, Interface] = {i.name: i for i in split.interfaces if i.leaves}
        everyone = decoupled.graphs.served()
        exact = [s for s in everyone if s.source.asks.exact]
        predicting = tuple(s for s in everyone if not s.source.asks.exact)
        super().__init__(Setting.of(decoupled.graphs, objective, served=predicting))
        self.previous: WindowBatch | None = None
        self.torn = False
        self.sent_back: dict[str, Tensor | None] = {}
        self.waits_for = {n for s in exact for n in s.names if n in self.leaving}
        leaves = [s for s in everyone if s.leaves]
        self._tracing = [s for s in leaves if s.source.asks.jacobian]
        for group in (s for s in leaves if s.source.asks.ends):
            to_itself = self.leaving[group.name].feeds != ANOTHER
            group.source.ended = ended if to_itself else None
        self._holds = bool(exact or self._tracing)

    @property
    def is_held(self) -> bool:
        """Whether graphs wait to be pulled back."""
        return bool(self.state.progress.tapes)

    @property
    def heard(self) -> set[str]:
        """Names of what has left and was answered."""
        return self.state.progress.heard

    # ---- run -------------------------------------------------------------------------------------

    def begin(self, values: dict[str, Any], context: Any, target: Any, now: int = 0) -> None:
        """Run the window; where some gradient is exact forward only.

        Args:
            values: the window's inputs and states by name.
            context: what sources see besides values.
            target: what the loss takes.
            now: the step of time that it is.

        Raises:
            NonFiniteError: a held window's loss or values are not finite.
        """
        if not self._holds:
            super().begin(values, context, target, now)
            return
        # The caller may write into its tensors before the window is pulled back.
        for name in self.setting.split.model_inputs:
            value = values[name]
            values[name] = value.detach().clone().requires_grad_(value.requires_grad)
        state = self.state
        state.values, state.context, state.target = values, context, target
        state.now = state.started = now
        for stage in self.stages:
            tape = stage.forward(stage.receive())
            if stage.is_last:
                stage.evaluate(tape)
            state.progress.tapes[stage.index] = tape
            for group in self._tracing:
                group.source.jacobian = self._jacobian(group, tape)
            for group in stage.sources.groups:
                stage.sources.ask(group, state.values)
        state.note_sent(self.setting)
        assert state.loss is not None
        # Before windows are pulled back that could not be again.
        refuse(
            [("the loss", state.loss), *state.sent.items()],
            f"step {self.step}",
            "nothing was updated",
        )

    def _jacobian(self, group: Served, tape: Tape) -> Tensor | None:
        """Of the state after the window for that before it, ``(batch, features, features)``; None
        at a start.
        """
        if len(self.stages) > 1:
            raise DecouplingError(
                "Traces needs a window in one stage: leave out cuts=, or use another source"
            )
        if self.previous is None:
            return None
        specs = group.source.specs
        after = side_by_side([tape.outputs[n] for n in group.names], specs)
        leaves = [tape.leaves[str(self.leaving[n].feeds)].tensor for n in group.names]
        rows = []
        for i in range(after.shape[1]):
            found = torch.autograd.grad(
                after[:, i].sum(), leaves, retain_graph=True, allow_unused=True
            )
            pairs = zip(found, leaves, strict=True)
            row = [torch.zeros_like(v) if g is None else g for g, v in pairs]
            rows.append(side_by_side(row, specs))
        return torch.stack(rows, 1)

    # ---- what has left is answered ---------------------------------------------------------------

    def hear(self, name: str, gradient: Tensor | None) -> None:
        """The gradient of something that left."""
        interface = self.leaving[name]
        if gradient is not None and self.ended is not None and interface.feeds != ANOTHER:
            dim = interface.spec.batch_dim
            gradient = gradient.masked_fill(along(self.ended, gradient, dim), 0.0)
        self.state.progress.gradients[name] = gradient
        self.heard.add(name)

    def end(self) -> None:
        """No window follows, so nothing flows back to the state."""
        for name, interface in self.leaving.items():
            if name not in self.heard and interface.feeds != ANOTHER:
                self.hear(name, None)

    @property
    def has_ended(self) -> bool:
        """Whether the window after this one is known, or that there is none."""
        return all(n in self.heard for n, i in self.leaving.items() if i.feeds != ANOTHER)

    def advance(self, now: int) -> None:
        """Pull back what was held, once what it waits for is there, and tell the window before."""
        progress, split = self.state.progress, self.setting.split
        self.state.now = now
        if not self.waits_for <= self.heard:
            return
        self.torn = self.is_held
        for index in sorted(progress.tapes, reverse=True):
            stage, tape = self.stages[index], progress.tapes.pop(index)
            assert isinstance(tape, Tape)
            predicted = stage.sources.predicted()
            arrived = progress.gradients
            given = {n: predicted.get(n, arrived.get(n)) for n in split.sent_by(index)}
            stage.pull_back(tape, given)
        if self.sent_back:
            return
        self.sent_back = {n: progress.gradients.get(n) for n in split.incoming}
        if self.previous is not None:
            for name, interface in self.previous.leaving.items():
                if interface.feeds in self.sent_back:
                    self.previous.hear(name, self.sent_back[interface.feeds])
            self.previous = None

    def forget(self) -> None:
        """Drop what nothing that is still under way needs: what has left may be answered, and wait
        with the answer.
        """
        state, leaving = self.state, self.leaving
        waiting = {n: v for n, v in state.sent.items() if n in leaving and n not in self.heard}
        gradients = state.progress.gradients
        answers = {n: g for n, g in gradients.items() if n in leaving and self.is_held}
        super().forget()
        state.sent |= waiting
        state.progress.gradients |= answers


def along(mask: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """A mask over the batch in a shape that lines up with a tensor's batch dimension."""
    return mask.view([-1 if d == dim else 1 for d in range(tensor.dim())])

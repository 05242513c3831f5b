"""One window on its way: what leaves it waits for the next window, or for another network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..decoupled import Decoupled
from ..errors import DecouplingError, NonFiniteError
from ..passes.trace.ports import ANOTHER
from ..runtime.emitted import detached
from ..runtime.in_turn import Run
from ..runtime.tape import Tape
from ..sources import AcrossTime, Served


class WindowRun(Run):
    """One window: what leaves it waits for the next one, or for another network.

    Sources that predict are asked at once. Where the gradient of something that leaves is to be
    exact, the whole window waits for it.
    """

    _progress = (*Run._progress, "heard")

    def __init__(
        self, decoupled: Decoupled, loss: Any, plain_loss: Any, ended: Tensor | None, step: int
    ) -> None:
        super().__init__(decoupled, loss, None, plain_loss)
        self.ended, self.step = ended, step
        self.previous: WindowRun | None = None
        self.torn = False  # whether its graphs have been pulled back, and are gone
        self.heard: set[str] = set()  # what leaves and was answered
        self.sent_back: dict[str, Tensor | None] = {}
        self.leaving = {i.name: i for i in self.split.interfaces if i.leaves}
        exact = [s for s in self.served if s.source.exact]
        self.waits_for = {n for s in exact for n in s.names if n in self.leaving}
        across = [(s, s.source) for s in self.served if isinstance(s.source, AcrossTime)]
        self.tracing = [(s, source) for s, source in across if source.wants_jacobian]
        self.holds = bool(exact or self.tracing)
        self.served = tuple(s for s in self.served if not s.source.exact)
        self.by_producer = {
            k: [s for s in self.served if s.producer == k] for k in self.by_producer
        }
        for group, source in across:
            source.ended = ended if self.leaving[group.name].feeds != ANOTHER else None

    def begin(self, values: dict[str, Any], context: Any, target: Any, now: int = 0) -> None:
        """Run the window; where some gradient is exact forward only."""
        if not self.holds:
            super().begin(values, context, target, now)
            return
        # The caller may write into its tensors before the window is pulled back.
        for name in self.split.model_inputs:
            value = values[name]
            values[name] = value.detach().clone().requires_grad_(value.requires_grad)
        self.values, self.context, self.target, self.now = values, context, target, now
        for stage in self.stages:
            tape = Tape(*self.functions[stage.index].forward(self._inputs_of(stage)))
            if stage is self.stages[-1]:
                self._evaluate(tape)
            self.values.update(
                {n: detached(v) for n, v in tape.outputs.items() if n not in ("output", "loss")}
            )
            self.tapes[stage.index] = tape
            for group, source in self.tracing:
                source.jacobian = self._jacobian(group, source, tape)
            for group in self.by_producer[stage.index]:
                self.predictions[group.name] = self._ask(group, self.values)
        self.sent = {n: self.values[n] for n in self.carried}
        assert self.loss is not None
        for name, tensor in [("the loss", self.loss), *self.sent.items()]:
            if not bool(
                tensor.isfinite().all()
            ):  # before windows are pulled back that could not be again
                raise NonFiniteError(
                    f"step {self.step}: {name} is not finite; nothing was updated. Look at the "
                    "window, lower the learning rates or set clip_norm="
                )

    def _jacobian(self, group: Served, source: AcrossTime, tape: Tape) -> Tensor | None:
        """Of the state after the window for that before it, ``(batch, features, features)``; None
        at a start.
        """
        if len(self.stages) > 1:
            raise DecouplingError(
                "Traces needs a window in one stage: leave out cuts=, or use another source"
            )
        if self.previous is None:
            return None
        after = source.join([tape.outputs[n] for n in group.names])
        leaves = [tape.leaves[str(self.leaving[n].feeds)].tensor for n in group.names]
        rows = []
        for i in range(after.shape[1]):
            found = torch.autograd.grad(
                after[:, i].sum(), leaves, retain_graph=True, allow_unused=True
            )
            rows.append(
                source.join(
                    [
                        torch.zeros_like(v) if g is None else g
                        for g, v in zip(found, leaves, strict=True)
                    ]
                )
            )
        return torch.stack(rows, 1)

    def hear(self, name: str, gradient: Tensor | None) -> None:
        """The gradient of something that left."""
        if gradient is not None and self.ended is not None and self.leaving[name].feeds != ANOTHER:
            dim = self.leaving[name].spec.batch_dim
            gradient = gradient.masked_fill(along(self.ended, gradient, dim), 0.0)
        self.gradients[name] = gradient
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
        self.now = now
        if not self.waits_for <= self.heard:
            return
        self.torn = bool(self.tapes)
        for index in sorted(self.tapes, reverse=True):
            tape = self.tapes.pop(index)
            assert isinstance(tape, Tape)
            groups = self.by_producer[index]
            predicted = {
                n: g for s in groups for n, g in zip(s.names, self._predicted(s), strict=True)
            }
            given = {n: predicted.get(n, self.gradients.get(n)) for n in self.split.sent_by(index)}
            if "loss" in tape.outputs:
                given["loss"] = torch.ones_like(tape.outputs["loss"])
            self._pull_back(index, tape, given)
        if not self.sent_back:
            self.sent_back = {n: self.gradients.get(n) for n in self.split.incoming}
            if self.previous is not None:
                for name, interface in self.previous.leaving.items():
                    if interface.feeds in self.sent_back:
                        self.previous.hear(name, self.sent_back[interface.feeds])
                self.previous = None

    def forget(self) -> None:
        """Drop what nothing that is still under way needs: what has left may be answered, and wait
        with the answer.
        """
        open_ = {n: v for n, v in self.sent.items() if n in self.leaving and n not in self.heard}
        answers = {n: g for n, g in self.gradients.items() if n in self.leaving and self.tapes}
        super().forget()
        self.sent, self.gradients = {**self.sent, **open_}, {**self.gradients, **answers}

    def has_heard(self, group: Served) -> bool:
        """What leaves the window is heard of from elsewhere."""
        return (
            all(n in self.heard for n in group.names) if group.leaves else super().has_heard(group)
        )

    def cannot_hear(self, group: Served) -> bool:
        """An answer to what has left may always come."""
        return False if group.leaves else super().cannot_hear(group)


def along(mask: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """A mask over the batch in a shape that lines up with a tensor's batch dimension."""
    return mask.view([-1 if d == dim else 1 for d in range(tensor.dim())])

"""A member of a collection between its updates: ticks gathered, messages sent and answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import DecouplingError, placed
from ..graphs.nested import flatten
from ..runtime.answers import added
from .trainer import ThroughTime
from .window import stacked
from .window_batch import WindowBatch

# What comes from outside, in the input of a member that receives messages, too.
INPUT = "input"


@dataclass(frozen=True)
class Link:
    """A message from one member to another, which takes the latest one at each of its ticks.

    Attributes:
        sender: name of a member.
        message: which of its messages.
        receiver: name of a member, whose trainer has ``input_gradients=True``.
        into: what the receiver calls it, where it is not all of its input; the message's own name
            by default.
        initial: what it receives before the first message, ``(batch, ...)``; by default that is an
            error.
    """

    sender: str
    message: str
    receiver: str
    into: str | None = None
    initial: Tensor | None = None

    @property
    def key(self) -> str:
        """What the receiver calls it."""
        return self.into or self.message

    def __str__(self) -> str:
        return f"{self.sender!r} -> {self.receiver!r} ({self.message!r})"


@dataclass(frozen=True)
class Member:
    """A network of a collection and its clock.

    Attributes:
        trainer: of the network; it updates at every ``trainer.window``-th tick of the member.
        every: how many ticks of the collection make one of the member, which comes with the last of
            them.
        combine: ``combine(x, messages)`` makes the input of one tick of what comes from outside
            (None where nothing does) and a dict of messages; gradients flow through it. By default
            what is alone is taken as it is, and several are a dict, in which x is called
            ``"input"``.
        target_each_tick: targets come with each tick and are stacked like the inputs; by default
            one comes with the last tick of a window, and belongs to all of it.
    """

    trainer: ThroughTime
    every: int = 1
    combine: Callable[[Any, dict[str, Tensor]], Any] | None = None
    target_each_tick: bool = False


@dataclass(eq=False)
class Sent:
    """A message under way."""

    message: str
    step: int  # of the sender's report
    value: Tensor
    gradient: Tensor | None = None  # sent back so far
    open: int = 0  # how often it is part of a window that has not sent anything back yet


@dataclass(eq=False)
class Tick:
    """The input of one tick, with its graph, and the messages that went into it."""

    x: Any
    received: list[tuple[Sent, Tensor]]
    target: Any = None


@dataclass(eq=False)
class Seat:
    """A member, and what is between its updates."""

    name: str
    place: int  # in a tick, members take their turns in order
    member: Member
    incoming: list[Link] = field(default_factory=list)
    outgoing: list[Link] = field(default_factory=list)
    ticks: list[Tick] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)  # not answered yet, oldest first
    latest: dict[str, Sent] = field(default_factory=dict)
    held: list[tuple[WindowBatch, list[Tick]]] = field(default_factory=list)

    @property
    def trainer(self) -> ThroughTime:
        """The member's."""
        return self.member.trainer

    def forget(self) -> None:
        """A new sequence begins."""
        self.ticks, self.held, self.sent, self.latest = [], [], [], {}

    def next_tick(self, now: int) -> tuple[int, int]:
        """When it ticks next; tuples compare as the turns come."""
        return (now // self.member.every + 1) * self.member.every, self.place

    def next_update(self, now: int) -> tuple[int, int]:
        """When it sends next, unless the sequence ends before."""
        left = self.trainer.window - len(self.ticks)
        return (now // self.member.every + left) * self.member.every, self.place

    def stack(self, values: list[Any], what: str) -> Any:
        """The ticks of a window in one; a network without state takes its only tick as it is."""
        framed = self.trainer.opening.module
        if framed.stateless:
            return values[0]
        found = [flatten(value) for value in values]
        kinds = [(structure, [t.shape for t in leaves]) for leaves, structure in found]
        for kind in kinds[1:]:
            if kind != kinds[0]:
                first, other = (
                    [tuple(shape) for shape in shapes] for _, shapes in (kinds[0], kind)
                )
                raise DecouplingError(
                    f"the {what} of one window must be alike, but tensors of shapes {first} are "
                    f"followed by {other}; give the same at every tick"
                )
        return stacked(values, framed.time_dim)

    def send_back(self, ticks: list[Tick], gradients: Iterable[Tensor | None]) -> None:
        """What a window sends back, tick by tick through the making of its input."""
        framed, scale = self.trainer.opening.module, self.trainer.accumulate
        arrived = list(gradients)
        for k, tick in enumerate(ticks):
            values = [t for t in flatten(tick.x)[0] if t.is_floating_point()]
            found = [
                (v, g if framed.stateless else g.select(framed.time_dim, k))
                for v, g in zip(values, arrived, strict=True)
                if g is not None and v.requires_grad
            ]
            leaves = [leaf for _, leaf in tick.received]
            parts: Sequence[Tensor | None] = [None] * len(leaves)
            if found:
                parts = torch.autograd.grad(
                    [v for v, _ in found], leaves, [g for _, g in found], allow_unused=True
                )
            for (sent, _), part in zip(tick.received, parts, strict=True):
                sent.open -= 1
                if part is not None:
                    part = part * scale if scale > 1 else part
                    sent.gradient = added(sent.gradient, part)

    def named(self) -> AbstractContextManager[None]:
        """Errors say which member they are about."""
        return placed(f"member {self.name!r}")


def take(
    seat: Seat, seats: Mapping[str, Seat], now: int, inputs: Mapping[str, Any], target: Any
) -> Tick:
    """The input of one tick."""
    received, messages = [], {}
    for link in seat.incoming:
        sent = seats[link.sender].latest.get(link.message)
        if sent is None and link.initial is None:
            raise DecouplingError(
                f"tick {now}: nothing has come by {link} yet. Give the link an initial= "
                "message, (batch, ...), or let the receiver tick later (every=, and members "
                "take their turns in order)"
            )
        sent = sent or Sent(link.message, 0, link.initial)  # type: ignore[arg-type]
        sent.open += 1
        messages[link.key] = sent.value.detach().requires_grad_()
        received.append((sent, messages[link.key]))
    if seat.name not in inputs and not messages:
        raise DecouplingError(f"tick {now}: it ticks, but inputs= has nothing for it")
    with torch.enable_grad():
        if seat.member.combine is not None:
            x = seat.member.combine(inputs.get(seat.name), messages)
        elif seat.name in inputs:
            x = {INPUT: inputs[seat.name], **messages} if messages else inputs[seat.name]
        else:
            x = messages if len(messages) > 1 else next(iter(messages.values()))
    return Tick(x, received, target)


def check_member(member: Member) -> None:
    """Refuse what cannot tick: no trainer of windows, or a clock that does not fit it."""
    trainer, every = member.trainer, member.every
    if not isinstance(trainer, ThroughTime):
        raise DecouplingError(
            "expected what decouple_through_time returns, or a Member of it, not "
            f"{type(trainer).__name__}"
        )
    if type(every) is not int or every < 1:
        raise DecouplingError(f"every={every!r}: expected a number of ticks, at least 1")
    if trainer.opening.module.stateless and trainer.window > 1:
        raise DecouplingError(
            "its model has no state, so a window is one batch, but "
            f"window={trainer.window}: use window=1, and accumulate= to update less often"
        )

"""Collections of networks with clocks of their own, which send each other messages and learn from
each other.

Every member is trained window by window (:mod:`dni_fx.recurrent`) and updates when its own window
is full, without waiting for the others. A message is an interface: its receiver sends a gradient
back when it updates, which is the target of the source that the sender has asked meanwhile; or,
with ``"exact"``, what the sender has waited for (Jaderberg et al. 2016, arXiv:1608.05343, section
3.3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from ..errors import DecouplingError, did_you_mean
from ..graphs.nested import flatten, map_tensors
from ..passes.trace.ports import STATE
from .trainer import ThroughTime, WindowReport
from .window_batch import WindowBatch

INPUT = "input"  # what comes from outside, in the input of a member that receives messages, too


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
class _Sent:
    """A message under way."""

    step: int  # of the sender's report
    value: Tensor
    gradient: Tensor | None = None  # sent back so far
    open: int = 0  # how often it is part of a window that has not sent anything back yet


@dataclass(eq=False)
class _Tick:
    """The input of one tick, with its graph, and the messages that went into it."""

    x: Any
    received: list[tuple[_Sent, Tensor]]
    target: Any = None


@dataclass(eq=False)
class _Seat:
    """A member, and what is between its updates."""

    name: str
    place: int  # in a tick, members take their turns in order
    member: Member
    incoming: list[Link] = field(default_factory=list)
    outgoing: list[Link] = field(default_factory=list)
    ticks: list[_Tick] = field(default_factory=list)
    sent: dict[str, list[_Sent]] = field(default_factory=dict)  # not answered yet, oldest first
    latest: dict[str, _Sent] = field(default_factory=dict)
    held: list[tuple[WindowBatch, list[_Tick]]] = field(default_factory=list)

    def forget(self) -> None:
        """A new sequence begins."""
        self.ticks, self.held, self.sent, self.latest = [], [], {}, {}

    def next_tick(self, now: int) -> tuple[int, int]:
        """When it ticks next; tuples compare as the turns come."""
        return (now // self.member.every + 1) * self.member.every, self.place

    def next_update(self, now: int) -> tuple[int, int]:
        """When it sends next, unless the sequence ends before."""
        left = self.member.trainer.window - len(self.ticks)
        return (now // self.member.every + left) * self.member.every, self.place

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Errors say which member they are about."""
        try:
            yield
        except DecouplingError as error:
            raise type(error)(f"member {self.name!r}: {error}") from error


class Collection:
    """Networks that run side by side and exchange messages.

    In a tick members take their turns in the order given: what one sends reaches those after it in
    the same tick, and those before it, or itself, at their next one. A member that ticks before the
    next message comes takes the last one again; a message that is replaced before a receiver ticks
    is never seen by it, and gets no gradient from there. Gradients of all receivers are added. They
    are sent back at the end of the tick in which the last of them is known; with ``"exact"``
    messages all windows of the sender that wait are pulled back together, when all have their
    answers.

    Args:
        members: by name; a trainer alone ticks with the collection.
        links: the messages that are received. Others have a gradient of zero.

    Attributes:
        members: by name.
        now: ticks since the sequence began.

    Raises:
        DecouplingError: names that there are not, or members that do not fit their links.

    Example:
        ``camera`` looks at every tick and sends a message every 4; ``judge`` ticks when that comes,
        and updates after 4 of them, every 16 ticks::

            camera = decouple_through_time(Camera(), 4, messages=("message",), ...)
            judge = decouple_through_time(Judge(), 4, input_gradients=True, ...)
            collection = Collection(
                {"camera": camera, "judge": Member(judge, every=4)},
                [Link("camera", "message", "judge")],
            )
            for t, image in enumerate(stream, start=1):
                reports = collection.tick({"camera": image}, targets, done=t % 16 == 0)
    """

    def __init__(
        self, members: Mapping[str, Member | ThroughTime], links: Sequence[Link] = ()
    ) -> None:
        made = {n: m if isinstance(m, Member) else Member(m) for n, m in members.items()}
        self._seats = {n: _Seat(n, k, member) for k, (n, member) in enumerate(made.items())}
        self.members: dict[str, Member] = made
        self.links = tuple(links)
        self.now = 0
        self._circles_checked = False
        for seat in self._seats.values():
            with seat.named():
                _check_member(seat.member)
        for link in self.links:
            for name in (link.sender, link.receiver):
                self._check_known(name, f"link {link}")
            receiver = self._seats[link.receiver]
            if not receiver.member.trainer.sends_input_gradients:
                raise DecouplingError(
                    f"link {link}: the receiver sends no gradients back; make its trainer with "
                    "input_gradients=True"
                )
            if link.message not in (sent := self.members[link.sender].trainer.messages):
                known = ", ".join(map(repr, sent)) or "none"
                raise DecouplingError(
                    f"link {link}: the sender sends no such "
                    f"message{did_you_mean(link.message, sent)}; its trainer was made with "
                    f"messages: {known}"
                )
            if link.key == INPUT or any(link.key == other.key for other in receiver.incoming):
                raise DecouplingError(
                    f"link {link}: the receiver has another input {link.key!r}; name this one by "
                    "into="
                )
            receiver.incoming.append(link)
            self._seats[link.sender].outgoing.append(link)

    def tick(
        self,
        inputs: Mapping[str, Any] | None = None,
        targets: Mapping[str, Any] | None = None,
        done: bool = False,
    ) -> dict[str, WindowReport]:
        """Let every member tick whose turn it is, and update those whose window is full.

        Args:
            inputs: what comes from outside in this tick, by member: tensors ``(batch, ...)``, or a
                nesting of them. What is for members that do not tick now is passed over.
            targets: what the losses take, by member; see :class:`Member`.
            done: whether the sequence ends with this tick, for all samples. Members update with
                what they have, and begin anew.

        Returns:
            Reports of the members that updated.

        Raises:
            DecouplingError: a member without input or message, or what its trainer finds wrong.
                Members that had their turns before are updated; go on after :meth:`reset`.
        """
        inputs, targets = inputs or {}, targets or {}
        for name in (*inputs, *targets):
            self._check_known(name, "tick")
        if type(done) is not bool:
            raise DecouplingError(
                f"done={done!r}: expected True or False. Members tick together, so their sequences "
                "end together; pad shorter ones"
            )
        self.now += 1
        reports: dict[str, WindowReport] = {}
        for name, seat in self._seats.items():
            with seat.named():
                if self.now % seat.member.every == 0:
                    seat.ticks.append(self._take(seat, inputs, targets.get(name)))
                if len(seat.ticks) == seat.member.trainer.window or (done and seat.ticks):
                    reports[name] = self._update(seat, targets.get(name), done)
        self._settle(done)
        if done:
            for seat in (s for n, s in self._seats.items() if n not in reports):
                seat.member.trainer.reset()  # its last window was full before
            self._settle(done)
            self._begin_sequence()
        return reports

    def reset(self) -> None:
        """Begin a new sequence with the next tick: windows that are not full are dropped, and no
        answers come any more.

        What was held for exact gradients is pulled back without them.
        """
        for seat in self._seats.values():
            seat.member.trainer.reset()
        self._begin_sequence()

    def state_dict(self) -> dict[str, Any]:
        """The members' states, by name.

        Raises:
            DecouplingError: in the middle of a sequence, where windows and messages are under way.
        """
        if self.now:
            raise DecouplingError(
                f"tick {self.now} of a sequence: windows and messages under way cannot be saved. "
                "Do so after a tick with done=True, or call reset() first"
            )
        return {n: member.trainer.state_dict() for n, member in self.members.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; as with a trainer's, every model must have been
        traced by a step.

        Raises:
            DecouplingError: the state is of other members, or does not fit one of them.
        """
        if set(state) != set(self.members):
            raise DecouplingError(
                f"this state is of members {sorted(state)}, but there are {sorted(self.members)}"
            )
        for name, seat in self._seats.items():
            with seat.named():
                seat.member.trainer.load_state_dict(state[name])
        self._begin_sequence()

    # ---- a member's turn -------------------------------------------------------------------------

    def _take(self, seat: _Seat, inputs: Mapping[str, Any], target: Any) -> _Tick:
        """The input of one tick."""
        received, messages = [], {}
        for link in seat.incoming:
            sent = self._seats[link.sender].latest.get(link.message)
            if sent is None and link.initial is None:
                raise DecouplingError(
                    f"tick {self.now}: nothing has come by {link} yet. Give the link an initial= "
                    "message, (batch, ...), or let the receiver tick later (every=, and members "
                    "take their turns in order)"
                )
            sent = sent or _Sent(0, link.initial)  # type: ignore[arg-type]
            sent.open += 1
            messages[link.key] = sent.value.detach().requires_grad_()
            received.append((sent, messages[link.key]))
        if seat.name not in inputs and not messages:
            raise DecouplingError(f"tick {self.now}: it ticks, but inputs= has nothing for it")
        with torch.enable_grad():
            if seat.member.combine is not None:
                x = seat.member.combine(inputs.get(seat.name), messages)
            elif seat.name in inputs:
                x = {INPUT: inputs[seat.name], **messages} if messages else inputs[seat.name]
            else:
                x = messages if len(messages) > 1 else next(iter(messages.values()))
        return _Tick(x, received, target)

    def _update(self, seat: _Seat, target: Any, done: bool) -> WindowReport:
        trainer, ticks, seat.ticks = seat.member.trainer, seat.ticks, []
        x = _stack(trainer, [map_tensors(torch.detach, tick.x) for tick in ticks], "inputs")
        if seat.member.target_each_tick:
            target = _stack(trainer, [tick.target for tick in ticks], "targets")
        report = trainer.step(x, done=done, target=target)
        for message, value in report.messages.items():
            seat.latest[message] = _Sent(report.step, value)
            seat.sent.setdefault(message, []).append(seat.latest[message])
        if seat.incoming:
            held = [w for w in trainer.windows if w.step == report.step and w.is_held]
            if held:
                seat.held.append((held[0], ticks))
            else:
                self._send_back(seat, ticks, list(report.input_gradients.values()))
        return report

    # ---- gradients on their way back -------------------------------------------------------------

    def _send_back(self, seat: _Seat, ticks: list[_Tick], gradients: list[Tensor | None]) -> None:
        """What a window sends back, tick by tick through the making of its input."""
        stacked = not seat.member.trainer.framed.stateless
        dim = seat.member.trainer.framed.time_dim
        for k, tick in enumerate(ticks):
            values = [t for t in flatten(tick.x)[0] if t.is_floating_point()]
            found = [
                (v, g.select(dim, k) if stacked else g)
                for v, g in zip(values, gradients, strict=True)
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
                    part = (
                        part * seat.member.trainer.accumulate
                        if seat.member.trainer.accumulate > 1
                        else part
                    )
                    sent.gradient = part if sent.gradient is None else sent.gradient + part

    def _settle(self, done: bool) -> None:
        """Answer senders until nothing more is known: an answer may release what another one waits
        for.
        """
        self._check_circles()
        again = True
        while again:
            again = False
            for seat in reversed(self._seats.values()):
                with seat.named():
                    again |= self._answer(seat, done)
                    for run, ticks in [pair for pair in seat.held if not pair[0].is_held]:
                        seat.held.remove((run, ticks))
                        self._send_back(
                            seat,
                            ticks,
                            [g for n, g in run.sent_back.items() if not n.startswith(STATE)],
                        )
                        again = True

    def _answer(self, seat: _Seat, done: bool) -> bool:
        """Hand in the gradients that are complete; whether there were any."""
        trainer = seat.member.trainer
        known = [
            (m, s)
            for m, every in seat.sent.items()
            for s in every
            if self._is_complete(seat, m, s, done)
        ]
        waits = any(trainer.sources[m].asks.exact for m in seat.sent)
        if not known or (waits and len(known) < sum(map(len, seat.sent.values()))):
            return False
        answers: dict[int, dict[str, Tensor]] = {}
        for message, sent in known:
            seat.sent[message].remove(sent)
            gradient = torch.zeros_like(sent.value) if sent.gradient is None else sent.gradient
            gradient = gradient / trainer.accumulate if trainer.accumulate > 1 else gradient
            answers.setdefault(sent.step, {})[message] = gradient
        trainer.answer(answers)
        return True

    def _is_complete(self, seat: _Seat, message: str, sent: _Sent, done: bool) -> bool:
        """Whether no gradient for it can come any more."""
        if sent.open:
            return False
        if done or sent is not seat.latest[message]:
            return True
        receivers = [
            self._seats[link.receiver] for link in seat.outgoing if link.message == message
        ]
        return all(seat.next_update(self.now) < r.next_tick(self.now) for r in receivers)

    # ---- parts -----------------------------------------------------------------------------------

    def _begin_sequence(self) -> None:
        for seat in self._seats.values():
            seat.forget()
        self.now = 0

    def _check_known(self, name: str, where: str) -> None:
        if name not in self.members:
            hint = did_you_mean(name, self.members)
            raise DecouplingError(
                f"{where}: there is no member {name!r}, only "
                f"{', '.join(map(repr, self.members))}{hint}"
            )

    def _check_circles(self) -> None:
        """Once all sources are known: members that wait for each other would wait forever."""
        if self._circles_checked or not all(s.latest for s in self._seats.values() if s.outgoing):
            return
        self._circles_checked = True
        exact = [
            k for k in self.links if self.members[k.sender].trainer.sources[k.message].asks.exact
        ]
        graph = nx.MultiDiGraph([(k.sender, k.receiver) for k in exact])
        with contextlib.suppress(nx.NetworkXNoCycle):
            circle = " -> ".join(repr(edge[0]) for edge in nx.find_cycle(graph))
            raise DecouplingError(
                f"{circle} -> ... wait for each other's exact gradients in a circle: give one of "
                "these messages a source that predicts, such as 'linear'"
            )


def _check_member(member: Member) -> None:
    if not isinstance(member.trainer, ThroughTime):
        raise DecouplingError(
            "expected what decouple_through_time returns, or a Member of it, not "
            f"{type(member.trainer).__name__}"
        )
    if type(member.every) is not int or member.every < 1:
        raise DecouplingError(f"every={member.every!r}: expected a number of ticks, at least 1")
    if member.trainer.framed.stateless and member.trainer.window > 1:
        raise DecouplingError(
            "its model has no state, so a window is one batch, but "
            f"window={member.trainer.window}: use window=1, and accumulate= to update less often"
        )


def _stack(trainer: ThroughTime, values: list[Any], what: str) -> Any:
    """The ticks of a window in one; a network without state takes its only tick as it is."""
    if trainer.framed.stateless:
        return values[0]
    taken = [flatten(value) for value in values]
    (first, structure), rest = taken[0], taken[1:]
    shapes = [t.shape for t in first]
    for leaves, other in rest:
        if other != structure or [t.shape for t in leaves] != shapes:
            raise DecouplingError(
                f"the {what} of one window must be alike, but tensors of shapes "
                f"{[tuple(s) for s in shapes]} are followed by {[tuple(t.shape) for t in leaves]}; "
                "give the same at every tick"
            )
    dim = trainer.framed.time_dim
    return structure.build(
        iter(
            [
                torch.stack(every, dim)
                for every in zip(*(leaves for leaves, _ in taken), strict=True)
            ]
        )
    )

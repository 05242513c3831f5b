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
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from .errors import DecouplingError, did_you_mean
from .graphs.nested import map_tensors
from .runtime.answers import or_zeros
from .through_time.seats import INPUT, Link, Member, Seat, Sent, check_member, take
from .through_time.trainer import ThroughTime, WindowReport

__all__ = ["Collection", "Link", "Member"]


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
        self.members = {n: m if isinstance(m, Member) else Member(m) for n, m in members.items()}
        self._seats = {n: Seat(n, k, m) for k, (n, m) in enumerate(self.members.items())}
        self.links = tuple(links)
        self.now = 0
        self._circles_checked = False
        for seat in self._seats.values():
            with seat.named():
                check_member(seat.member)
        for link in self.links:
            self._connect(link)

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
                    tick = take(seat, self._seats, self.now, inputs, targets.get(name))
                    seat.ticks.append(tick)
                if len(seat.ticks) == seat.trainer.window or (done and seat.ticks):
                    reports[name] = self._update(seat, targets.get(name), done)
        self._settle(done)
        if done:
            for seat in (s for n, s in self._seats.items() if n not in reports):
                seat.trainer.reset()  # its last window was full before
            self._settle(done)
            self._begin_sequence()
        return reports

    def reset(self) -> None:
        """Begin a new sequence with the next tick: windows that are not full are dropped, and no
        answers come any more.

        What was held for exact gradients is pulled back without them.
        """
        for seat in self._seats.values():
            seat.trainer.reset()
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
                seat.trainer.load_state_dict(state[name])
        self._begin_sequence()

    # ---- a member's turn -------------------------------------------------------------------------

    def _update(self, seat: Seat, target: Any, done: bool) -> WindowReport:
        trainer, ticks, seat.ticks = seat.trainer, seat.ticks, []
        x = seat.stack([map_tensors(torch.detach, tick.x) for tick in ticks], "inputs")
        if seat.member.target_each_tick:
            target = seat.stack([tick.target for tick in ticks], "targets")
        report = trainer.step(x, done=done, target=target)
        for message, value in report.messages.items():
            seat.latest[message] = Sent(message, report.step, value)
            seat.sent.append(seat.latest[message])
        held = [w for w in trainer.windows if w.step == report.step and w.is_held]
        if seat.incoming and held:
            seat.held.append((held[0], ticks))
        elif seat.incoming:
            seat.send_back(ticks, report.input_gradients.values())
        return report

    # ---- gradients on their way back -------------------------------------------------------------

    def _settle(self, done: bool) -> None:
        """Answer senders until nothing more is known: an answer may release what another one waits
        for.
        """
        if not self._circles_checked and all(s.latest for s in self._seats.values() if s.outgoing):
            _check_circles(self.links, self.members)
            self._circles_checked = True
        again = True
        while again:
            again = False
            for seat in reversed(self._seats.values()):
                with seat.named():
                    again |= self._answer(seat, done)
                    free = [pair for pair in seat.held if not pair[0].is_held]
                    for window, ticks in free:
                        seat.held.remove((window, ticks))
                        seat.send_back(ticks, window.input_gradients.values())
                    again |= bool(free)

    def _answer(self, seat: Seat, done: bool) -> bool:
        """Hand in the gradients that are complete; whether there were any."""
        trainer = seat.trainer
        known = [sent for sent in seat.sent if self._is_complete(seat, sent, done)]
        waits = any(trainer.sources[sent.message].asks.exact for sent in seat.sent)
        if not known or (waits and len(known) < len(seat.sent)):
            return False
        answers: dict[int, dict[str, Tensor]] = {}
        for sent in known:
            seat.sent.remove(sent)
            gradient = or_zeros(sent.gradient, sent.value)
            gradient = gradient / trainer.accumulate if trainer.accumulate > 1 else gradient
            answers.setdefault(sent.step, {})[sent.message] = gradient
        trainer.answer(answers)
        return True

    def _is_complete(self, seat: Seat, sent: Sent, done: bool) -> bool:
        """Whether no gradient for it can come any more."""
        if sent.open:
            return False
        if done or sent is not seat.latest[sent.message]:
            return True
        links = [link for link in seat.outgoing if link.message == sent.message]
        ticks = [self._seats[link.receiver].next_tick(self.now) for link in links]
        return all(seat.next_update(self.now) < tick for tick in ticks)

    # ---- parts -----------------------------------------------------------------------------------

    def _begin_sequence(self) -> None:
        for seat in self._seats.values():
            seat.forget()
        self.now = 0

    def _connect(self, link: Link) -> None:
        """Seat both ends of a link."""
        for name in (link.sender, link.receiver):
            self._check_known(name, f"link {link}")
        receiver = self._seats[link.receiver]
        if not receiver.trainer.opening.input_gradients:
            raise DecouplingError(
                f"link {link}: the receiver sends no gradients back; make its trainer with "
                "input_gradients=True"
            )
        if link.message not in (sent := self.members[link.sender].trainer.messages):
            hint, known = did_you_mean(link.message, sent), ", ".join(map(repr, sent)) or "none"
            raise DecouplingError(
                f"link {link}: the sender sends no such message{hint}; its trainer was made with "
                f"messages: {known}"
            )
        if link.key == INPUT or any(link.key == other.key for other in receiver.incoming):
            raise DecouplingError(
                f"link {link}: the receiver has another input {link.key!r}; name this one by into="
            )
        receiver.incoming.append(link)
        self._seats[link.sender].outgoing.append(link)

    def _check_known(self, name: str, where: str) -> None:
        if name not in self.members:
            hint = did_you_mean(name, self.members)
            raise DecouplingError(
                f"{where}: there is no member {name!r}, only "
                f"{', '.join(map(repr, self.members))}{hint}"
            )


def _check_circles(links: Sequence[Link], members: Mapping[str, Member]) -> None:
    """Members that wait for each other would wait forever; once all sources are known."""
    exact = [k for k in links if members[k.sender].trainer.sources[k.message].asks.exact]
    graph = nx.MultiDiGraph([(k.sender, k.receiver) for k in exact])
    with contextlib.suppress(nx.NetworkXNoCycle):
        circle = " -> ".join(repr(edge[0]) for edge in nx.find_cycle(graph))
        raise DecouplingError(
            f"{circle} -> ... wait for each other's exact gradients in a circle: give one of "
            "these messages a source that predicts, such as 'linear'"
        )

"""What a source asks for and when it answers, said in one frozen value; and the flags of before."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DecouplingError, did_you_mean

MESSAGES = ("gradient", "loss", "logits", "error")  # kinds, in the order in which they come
SEEN = ("stage", "model")  # whose inputs a source may see


def _check_kinds(place: str, kinds: Any) -> None:
    known = ", ".join(map(repr, MESSAGES))
    if not isinstance(kinds, tuple):
        raise DecouplingError(
            f"{place} takes a tuple of kinds of message, such as ('gradient',), not {kinds!r}"
        )
    if unknown := [k for k in kinds if k not in MESSAGES]:
        hint = did_you_mean(str(unknown[0]), MESSAGES) or "."
        raise DecouplingError(f"{place}: no message is called {unknown[0]!r}{hint} Known: {known}")
    if kinds != tuple(k for k in MESSAGES if k in kinds):
        raise DecouplingError(
            f"{place} is {kinds}: messages come once each and in the order {known}, so name them so"
        )


@dataclass(frozen=True)
class Wait:
    """A stage waits for a message before it pulls back, and pulls back what ``complete`` returns.

    Attributes:
        lag: steps after the message is there; with 0 in the same step, so locked.
        for_: the kinds of message that ``complete`` needs, as in :attr:`Asks.learns_from`.
        recompute: for a lag of 1 or more: run the stage's forward again when the message is there,
            with the weights of that moment and the randomness of the first time (Features Replay);
            else its graph and the weights that it used are kept (DDG).
        corrects: the prediction is pulled back at once all the same, and what ``complete`` returns
            later comes on top of it.
        weight: what the part that comes later counts in the stage's own gradients, where one is
            pulled back before: a share of 1, or ``"delay"`` for 1 / (1 + updates since then).
            Stages before hear of it as if it had counted whole.
        predict_weights: for a lag of 1 or more: the stage's forward uses weights as they will be
            when the message is there, as far as its optimiser's direction tells.

    Raises:
        DecouplingError: a lag that is no count of steps, kinds that do not exist.
    """

    lag: int
    for_: tuple[str, ...] = ("gradient",)
    recompute: bool = True
    corrects: bool = False
    weight: float | str = 1.0
    predict_weights: bool = False

    def __post_init__(self) -> None:
        if type(self.lag) is not int or self.lag < 0:
            raise DecouplingError(
                f"a lag is a whole number of steps, 0 or more, not {self.lag!r}; a source that "
                "answers at once has no Wait (and the flag lag is None)"
            )
        _check_kinds("Wait(for_=...)", self.for_)
        is_share = isinstance(self.weight, int | float) and 0 < self.weight <= 1
        if self.weight != "delay" and not is_share:
            raise DecouplingError(
                "a correction's weight is 'delay', or a number above 0 and up to 1, not "
                f"{self.weight!r}"
            )
        if self.weight != 1 and not self.corrects:
            raise DecouplingError(
                "Wait(weight=...) weights what comes on top of an earlier part: it needs corrects="
            )
        if self.predict_weights and self.lag == 0:
            raise DecouplingError(
                "predict_weights= is for gradients that come in a later step, but a lag of 0 is "
                "the same step: leave it out, or pass steps=1 or more"
            )


@dataclass(frozen=True)
class Asks:
    """What a source wants to hear, and when it answers. The default is a regression's.

    Attributes:
        learns_from: the kinds of message that must come back before ``fit``, which gets them as one
            flat tuple. None or several of these, in this order:

            * ``"gradient"``: one tensor per value, the sum of the consumers' gradients for it;
            * ``"loss"``: one tensor ``(batch,)``, each sample's loss as the next stages' sources
              estimate it, the true one where the last stage is next;
            * ``"logits"``: one tensor, the model's output as the next stages' sources estimate it,
              the true one where the last stage is next (of outputs that are no tensor, the tensor
              that they call ``logits``);
            * ``"error"``: one tensor, the loss's gradient for these true logits.
        wait: None for a source whose prediction is all that is pulled back, at once.
        per_consumer: each consumer's gradient teaches a part of its own, by ``fit_part``, instead
            of their sum the whole source by ``fit``.
        exact: the marker of exact mode, which the trainer runs itself.
        ends: between windows of a sequence: ``predict`` wants to know whose sequence ends, which
            the trainer writes to the source's ``ended``.
        jacobian: between windows: it wants to know how the state depends on that of the window
            before, which the trainer writes to the source's ``jacobian``.
        inputs: whose inputs ``predict`` gets as its third argument, a tuple of detached tensors:
            ``"stage"`` for what its own stage has received from others (where that is nothing: the
            model's inputs that the stage takes), ``"model"`` for the model's. None for none.
        shares: it reads weights of the model that another stage trains, so stages must run in turn
            in one process.

    Raises:
        DecouplingError: kinds that do not exist or in another order; what cannot go together.
    """

    learns_from: tuple[str, ...] = ("gradient",)
    wait: Wait | None = None
    per_consumer: bool = False
    exact: bool = False
    ends: bool = False
    jacobian: bool = False
    inputs: str | None = None
    shares: bool = False

    def __post_init__(self) -> None:
        _check_kinds("Asks(learns_from=...)", self.learns_from)
        if self.inputs not in (None, *SEEN):
            known = ", ".join(map(repr, SEEN))
            raise DecouplingError(f"Asks(inputs=...) takes None or {known}, not {self.inputs!r}")
        if self.wait is not None and not isinstance(self.wait, Wait):
            raise DecouplingError(
                f"Asks(wait=...) takes None or a Wait, such as Wait(lag=1), not {self.wait!r}"
            )
        if self.per_consumer and (self.learns_from != ("gradient",) or self.wait is not None):
            raise DecouplingError(
                "a source with a part for each consumer must learn from gradients alone and "
                f"answer at once, but it asks for {self.learns_from} and {self.wait}"
            )

    @property
    def at_once(self) -> bool:
        """Whether the prediction is all that is pulled back."""
        return self.wait is None

    @property
    def early(self) -> bool:
        """Whether the prediction is pulled back at once, whatever may come on top of it later."""
        return self.wait is None or self.wait.corrects

    @property
    def lag(self) -> int | None:
        """Steps to wait after the awaited message is there; None for one that does not wait."""
        return None if self.wait is None else self.wait.lag

    @property
    def awaited(self) -> tuple[str, ...]:
        """The kinds of message that ``complete`` needs."""
        return () if self.wait is None else self.wait.for_

    @property
    def hears(self) -> tuple[str, ...]:
        """Every kind of message that must be sent to it, in order."""
        return tuple(k for k in MESSAGES if k in self.learns_from or k in self.awaited)


class _Flag:
    """A flag of before: a field of ``asks``, or of its ``wait``, of a class or of one source."""

    name = ""

    def __init__(self, field: str) -> None:
        self.field = field

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, source: Any, owner: type) -> Any:
        holder: Any = owner if source is None else source
        asks = holder.asks
        value = getattr(
            asks if hasattr(asks, self.field) else asks.wait or holder._later, self.field
        )
        return ("+".join(value) or "none") if isinstance(value, tuple) else value

    def __set__(self, source: Any, value: Any) -> None:
        self.write(source, value)

    def write(self, holder: Any, value: Any) -> None:
        """Say the same in ``asks``; what a wait is like may be written before its lag."""
        asks, lag = holder.asks, self.field == "lag"
        if self.field in ("learns_from", "for_"):
            kinds = () if value == "none" else tuple(str(value).split("+"))
            if kinds != tuple(k for k in MESSAGES if k in kinds):
                owner = holder if isinstance(holder, type) else type(holder)
                raise DecouplingError(
                    f"{owner.__name__}.{self.name} is {value!r}; it must be 'none', or of "
                    "'gradient', 'loss', 'logits' and 'error' those it asks for, in this order, "
                    "joined by '+'"
                )
            value = kinds
        if self.field in ("learns_from", "exact"):
            holder.asks = replace(asks, **{self.field: value})
        elif lag and value is None:
            holder.asks = replace(asks, wait=None)
        else:
            holder._later = replace(asks.wait or holder._later, **{self.field: value})
            holder.asks = replace(asks, wait=holder._later if lag or asks.wait else None)


class Declares:
    """Base of sources: holds ``asks``, and takes the flags that sources were written with before.

    Written in a class or to one source, the flags change ``asks``; they can be read as well.

    Raises:
        DecouplingError: a class declares both, or a flag that is computed.
    """

    asks: Asks = Asks()
    _later: Wait = Wait(0)  # what a wait is like, should a lag be written

    message: str = _Flag("learns_from")  # type: ignore[assignment]
    lag: int | None = _Flag("lag")  # type: ignore[assignment]
    awaits: str = _Flag("for_")  # type: ignore[assignment]
    recompute: bool = _Flag("recompute")  # type: ignore[assignment]
    corrects: bool = _Flag("corrects")  # type: ignore[assignment]
    exact: bool = _Flag("exact")  # type: ignore[assignment]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        declared = "asks" in vars(cls)
        for name, flag in vars(Declares).items():
            written = inspect.getattr_static(cls, name)  # of a class beside this one as well
            if not isinstance(flag, _Flag) or written is flag:
                continue
            if declared:
                raise DecouplingError(
                    f"{cls.__name__} declares asks and the flag {name}; say it in asks alone"
                )
            if hasattr(written, "__get__"):
                raise DecouplingError(
                    f"{cls.__name__}.{name} is computed by a {type(written).__name__}; what a "
                    "source asks for is fixed: set self.asks = Asks(...) in __init__"
                )
            setattr(cls, name, flag)
            flag.write(cls, written)

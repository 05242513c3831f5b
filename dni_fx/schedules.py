"""Schedules: which stages a step updates, and how much of the true gradient they get.

The order in which stages are visited is no part of a schedule, since it changes no number: updates
happen at the end of a step, and no stage reads another's parameters. What the paper's random order
changes is *which* stages update.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

from .errors import DecouplingError, did_you_mean

__all__ = [
    "SCHEDULES",
    "Calibration",
    "Mode",
    "RandomUpdates",
    "Schedule",
    "Sequential",
    "Threads",
    "WarmUp",
    "make_schedule",
]


_POLICIES = ("wait", "drop_oldest")


@dataclass(frozen=True)
class Mode:
    """What one step does.

    Attributes:
        true_share: λ of BP(λ), how much of the gradient at every interface is the true one: 0 is
            the decoupled step, 1 the exact one, whose sources are trained but not used; between
            them ``λ g + (1 - λ) g^`` is pulled back.
        active: indices of the stages that are updated; None for all.

    Raises:
        DecouplingError: a share outside 0 to 1, or indices that are no whole numbers from 0.

    Source:
        Jaderberg et al. 2016, arXiv:1608.05343, BP(λ) in the appendix.
    """

    true_share: float = 0.0
    active: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_share("true_share", self.true_share)
        if self.active is not None and not all(_is_whole(index, 0) for index in self.active):
            raise DecouplingError(
                "active holds indices of stages, 0 or more, or is None for all; got "
                f"{self.active!r}"
            )


class Schedule:
    """Base of the schedules.

    A schedule of one's own implements :meth:`mode`. It must be a function of its arguments alone,
    so that a run that is resumed at some step goes on as it would have.
    """

    def mode(self, step: int, stages: int) -> Mode:
        """What to do in a step.

        Args:
            step: number of the step, from 0.
            stages: number of stages.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement mode(step, stages)")


@dataclass(frozen=True)
class Sequential(Schedule):
    """Every stage in every step, decoupled."""

    def mode(self, step: int, stages: int) -> Mode:
        """Always the same."""
        return _DECOUPLED


@dataclass(frozen=True)
class RandomUpdates(Schedule):
    """Sparse updates: in each step every stage is updated with some probability, independently of
    the others.

    Attributes:
        probability: for all stages, or a mapping from a stage's index or name (``"stage_1"``) to
            its own; stages that are missing there are always updated.
        seed: another seed is another sequence of draws. Global random states play no part.

    Raises:
        DecouplingError: a probability outside 0 to 1, a key that is no stage, a seed that is no
            whole number; when asked for a mode: a key beyond the last stage.

    Source:
        Jaderberg et al. 2016, arXiv:1608.05343, sparse updates with ``p_update``. The default is
        that of a public reproduction.
    """

    probability: float | Mapping[int | str, float] = field(default=0.2, hash=False)
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise DecouplingError(f"a seed must be a whole number, but got {self.seed!r}")
        if not isinstance(self.probability, Mapping):
            _check_share("probability", self.probability)
            return
        by_index: dict[int | str, float] = {}
        for key, share in self.probability.items():
            named = re.fullmatch(r"stage_(\d+)", key) if isinstance(key, str) else None
            index = int(named[1]) if named else key
            if not _is_whole(index, 0):
                raise DecouplingError(
                    f"RandomUpdates needs stages as keys, such as 0 or 'stage_0', but got {key!r}"
                )
            if index in by_index:
                raise DecouplingError(
                    f"RandomUpdates got stage {index} twice: {self.probability!r}"
                )
            _check_share(f"the probability of stage {index}", share)
            by_index[index] = share
        object.__setattr__(self, "probability", by_index)  # a copy: the caller's mapping may change

    def mode(self, step: int, stages: int) -> Mode:
        """Draw the active stages; there may be none."""
        shares = self.probability
        if not isinstance(shares, Mapping):
            shares = dict.fromkeys(range(stages), shares)
        elif beyond := sorted(str(key) for key in shares if key not in range(stages)):
            raise DecouplingError(
                f"{self!r} names stage {', '.join(beyond)}, but there are {stages} stages, 0 to "
                f"{stages - 1}"
            )
        return Mode(
            active=tuple(k for k in range(stages) if self._draw(step, k) < shares.get(k, 1.0))
        )

    def _draw(self, step: int, stage: int) -> float:
        """Uniform in [0, 1)."""
        # A hash needs no state, and unlike generators seeded with consecutive numbers it owes no
        # independence to luck.
        digest = blake2b(b"%d %d %d" % (self.seed, step, stage), digest_size=6).digest()
        return int.from_bytes(digest, "big") / 2**48


@dataclass(frozen=True)
class Calibration(Schedule):
    """Exact steps among the decoupled ones, in which sources learn from true gradients, and an
    exact tail.

    Attributes:
        every: every so many steps the last is exact: with 10 steps 9, 19, ...; None for the tail
            alone.
        exact_from: from this step on all are exact; None for no tail.
        then: the schedule of all other steps, or its name.

    Raises:
        DecouplingError: numbers out of range, neither ``every`` nor ``exact_from``, an unknown
            schedule.
    """

    every: int | None = 10
    exact_from: int | None = None
    then: str | Schedule = "sequential"

    def __post_init__(self) -> None:
        if self.every is not None:
            _check_whole("every", self.every, 1)
        if self.exact_from is not None:
            _check_whole("exact_from", self.exact_from, 0)
        if self.every is None and self.exact_from is None:
            raise DecouplingError(
                "Calibration without every and exact_from has no exact steps: give one of them"
            )
        object.__setattr__(self, "then", _inner(self.then))

    def mode(self, step: int, stages: int) -> Mode:
        """Exact for all stages, or what ``then`` says."""
        periodic = self.every is not None and step % self.every == self.every - 1
        tail = self.exact_from is not None and step >= self.exact_from
        return _EXACT if periodic or tail else make_schedule(self.then).mode(step, stages)


@dataclass(frozen=True)
class WarmUp(Schedule):
    """Exact steps first, in which sources are trained but not used; then the true gradient's share
    falls.

    Attributes:
        steps: so many exact steps.
        fade: so many steps in which the share falls by ``1 / (fade + 1)`` each, for all stages.
        then: the schedule of all later steps, or its name; it goes by the number of the step,
            warm-up included.

    Raises:
        DecouplingError: numbers out of range, an unknown schedule.
    """

    steps: int
    fade: int = 0
    then: str | Schedule = "sequential"

    def __post_init__(self) -> None:
        _check_whole("steps", self.steps, 0)
        _check_whole("fade", self.fade, 0)
        object.__setattr__(self, "then", _inner(self.then))

    def mode(self, step: int, stages: int) -> Mode:
        """Exact, mixed, or what ``then`` says."""
        if step < self.steps:
            return _EXACT
        if step < self.steps + self.fade:
            return Mode(true_share=1 - (step - self.steps + 1) / (self.fade + 1))
        return make_schedule(self.then).mode(step, stages)


@dataclass(frozen=True)
class Flow:
    """How far stages may drift apart.

    Attributes:
        queue: how many values of a stage may be under way to each stage that takes them, not
            answered yet.
        policy: what a stage does where so many are: ``"wait"``, or go on with ``"drop_oldest"``:
            the newest ``queue`` values are kept until there is room, older ones are never sent, and
            their batches are left out by the stage that they were for.
        staleness: how many steps after a batch its answers are learnt from, neither before nor
            later, which makes a run repeatable bit for bit; None: as soon as they are there.
        discount: what comes d steps late counts ``discount ** d`` in a source's regression.

    Raises:
        DecouplingError: a number out of range, an unknown policy, or one that contradicts a fixed
            staleness.
    """

    queue: int = 4
    policy: str = "wait"
    staleness: int | None = None
    discount: float = 1.0

    def __post_init__(self) -> None:
        if type(self.queue) is not int or self.queue < 1:
            raise DecouplingError(
                f"queue must be a whole number of batches, at least 1, not {self.queue!r}"
            )
        if self.policy not in _POLICIES:
            raise DecouplingError(f"policy must be 'wait' or 'drop_oldest', not {self.policy!r}")
        if self.staleness is not None:
            if type(self.staleness) is not int or self.staleness < 0:
                raise DecouplingError(
                    f"staleness must be a whole number of steps, 0 or more, not {self.staleness!r}"
                )
            if self.policy != "wait":
                raise DecouplingError(
                    "a fixed staleness waits for its answers: it needs policy='wait'"
                )
        if not isinstance(self.discount, int | float) or not 0 < self.discount <= 1:
            raise DecouplingError(f"discount must be above 0 and at most 1, not {self.discount!r}")


@dataclass(frozen=True)
class Threads(Schedule):
    """Each stage on a thread of its own, with bounded queues between them: stages work on several
    batches at once.

    A step hands its batch over and returns; what it reports is the newest batch that the last stage
    has finished. Call ``trainer.drain()`` before using the model otherwise, and ``trainer.close()``
    at the end. After a failure in a stage all threads end, the error names the stage, and each
    stage stands at the last of its own updates. Torch gives up Python's lock while it computes, so
    stages overlap where their operators are large. Random numbers of the model (dropout) are drawn
    from one generator by all threads, so that only a model without them is repeatable.

    Attributes:
        queue: how many batches may wait for a stage, and how many of its values may be under way to
            another one.
        policy: ``"wait"`` for room, or ``"drop_oldest"``.
        staleness: fixed delay of the answers in steps, for runs that are repeatable bit for bit;
            None: as they come.
        discount: weight of an answer that is d steps late in the sources' regression: ``discount **
            d``.
        then: what each step does, a schedule or its name.

    Raises:
        DecouplingError: numbers out of range, an unknown policy or schedule.
    """

    queue: int = 4
    policy: str = "wait"
    staleness: int | None = None
    discount: float = 1.0
    then: str | Schedule = "sequential"

    def __post_init__(self) -> None:
        object.__setattr__(self, "then", _inner(self.then))
        self.flow  # noqa: B018  raises

    @property
    def flow(self) -> Flow:
        """How far stages may drift apart."""
        return Flow(self.queue, self.policy, self.staleness, self.discount)

    def mode(self, step: int, stages: int) -> Mode:
        """What ``then`` says."""
        return make_schedule(self.then).mode(step, stages)


SCHEDULES: dict[str, type[Schedule]] = {
    "sequential": Sequential,
    "random": RandomUpdates,
    "threads": Threads,
}


def mode_of(schedule: Schedule, step: int, stages: int) -> Mode:
    """What a schedule says of a step.

    Args:
        schedule: the schedule.
        step: number of the step, from 0.
        stages: how many there are.

    Raises:
        DecouplingError: it names a stage that there is not.
    """
    mode = schedule.mode(step, stages)
    if mode.active and max(mode.active) >= stages:
        raise DecouplingError(
            f"the schedule {schedule!r} names stage {max(mode.active)}, but there are {stages}, "
            "counted from 0"
        )
    return mode


def make_schedule(option: str | Schedule) -> Schedule:
    """A schedule by its name, with its defaults; schedules are passed on as they are.

    Args:
        option: ``"sequential"``, ``"random"``, ``"threads"``, or a Schedule.

    Raises:
        DecouplingError: an unknown name, or something else.
    """
    if isinstance(option, Schedule):
        return option
    if isinstance(option, str) and option in SCHEDULES:
        return SCHEDULES[option]()
    names = ", ".join(map(repr, SCHEDULES))
    known = f"Known: {names}, or a Schedule object, such as Calibration(every=10)"
    got: object = option
    if isinstance(got, str):
        hint = did_you_mean(got, SCHEDULES) or "."
        raise DecouplingError(f"unknown schedule {got!r}{hint} {known}")
    if isinstance(got, type) and issubclass(got, Schedule):
        raise DecouplingError(
            f"got the class {got.__name__} as schedule; pass an object, {got.__name__}(...)"
        )
    raise DecouplingError(f"a schedule is a name or a Schedule, but got {got!r}. {known}.")


def _inner(option: str | Schedule) -> Schedule:
    """What a schedule does in its other steps."""
    schedule = make_schedule(option)
    if isinstance(schedule, Threads):
        raise DecouplingError("Threads says where stages run, so it comes first: Threads(then=...)")
    return schedule


def _check_share(name: str, share: object) -> None:
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share <= 1:
        raise DecouplingError(f"{name} must be a number from 0 to 1, but got {share!r}")


def _check_whole(name: str, number: object, least: int) -> None:
    if not _is_whole(number, least):
        raise DecouplingError(f"{name} must be a whole number, {least} or more, but got {number!r}")


def _is_whole(number: object, least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least


_DECOUPLED = Mode()
_EXACT = Mode(true_share=1.0)

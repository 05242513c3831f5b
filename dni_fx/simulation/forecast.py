"""What a step of a plan would take on one device, in each of the ways to train that there are.

Nothing is run: all follows from the bytes and seconds in ``plan.report``. Memory is that of
tensors: weights, gradients, what optimisers keep, activations, values at the cuts, sources. What an
operator needs while it runs, buffers, and torch itself come on top.

Activations of a stage are taken to go as its gradients come, so that its backward needs at most the
larger of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DecouplingError
from ..plan import CutPlan
from ..sources import SOURCES
from ..sources.naming import base_name
from .costs import checked_costs
from .ways import Forecast, Way

COPIES = 4  # a parameter, its gradient and Adam's two moments: what a plan's bytes count
SWEEPS = (1, 2, 4, 8, 16, 32)
GROUPS = (2, 4, 8)  # stages of the drop-in that are told
# What waits of a batch for its answers, in values at the cuts: where sources learn from these, a
# value, what was said of it with its graph, and what came back. The latter is rough: found with
# "linear" on layers of equal width, and more than it was between blocks of a transformer.
WAITING, WAITING_TO_LEARN = 1.0, 5.3


@dataclass(frozen=True)
class _Part:
    """Neighbouring stages taken as one.

    Attributes:
        rests: bytes of weights and of what optimisers keep for them, both of its sources, too.
        gradients: of weights, its sources' included.
        trained: of its own weights alone.
        activations: what its forward keeps, what it takes from others included, and its sources.
        works: seconds of forward, backward, update.
        forward: of these.
        asks: seconds of its sources.
    """

    rests: float
    gradients: float
    trained: float
    activations: float
    works: float
    forward: float
    asks: float

    @property
    def at_work(self) -> float:
        """Bytes that it needs besides, while it works."""
        return max(self.activations, self.gradients)


class _Facts:
    """What is known of a plan's stages.

    Args:
        plan: with costs.
        moments: as for :func:`forecast`.
    """

    def __init__(self, plan: CutPlan, moments: float) -> None:
        self.costs, self.moments, self.count = checked_costs(plan), moments, len(plan.stages)
        assert plan.report is not None
        self.inputs = plan.report.input_bytes
        known = plan.report.sources
        self.values = [
            (i.spec.nbytes, i.producer, i.consumers) for i in plan.interfaces if not i.leaves
        ]
        self.sources = [0.0] * self.count  # weights of each stage's sources
        for i in plan.interfaces:
            self.sources[i.producer] += 4 * known[i.name].parameters if i.name in known else 0
        most = [c.source_bytes / COPIES for c in self.costs]
        self.sources = [min(pair) for pair in zip(self.sources, most, strict=True)]
        self.learns = any(_learns(kind) for _, kind in plan.gradients)

    def parts(self, count: int, asks: bool = True) -> list[_Part]:
        """So many parts; a value within one is kept once, and has no source."""
        group_of = [k * count // self.count for k in range(self.count)]
        members: list[list[int]] = [[] for _ in range(count)]
        for k, group in enumerate(group_of):
            members[group].append(k)
        twice, asking = [0] * count, set[int]()
        for nbytes, producer, consumers in self.values:
            group = group_of[producer]
            twice[group] += nbytes * sum(group_of[c] == group for c in consumers)
            if asks and any(group_of[c] != group for c in consumers):
                asking.add(producer)
        return [self._part(m, t, asking) for m, t in zip(members, twice, strict=True)]

    def _part(self, members: list[int], twice: int, asking: set[int]) -> _Part:
        costs, asked = [self.costs[k] for k in members], [k for k in members if k in asking]
        frozen = sum(c.frozen_bytes for c in costs)
        trained = (sum(c.parameter_bytes for c in costs) - frozen) / COPIES
        sources = sum(self.sources[k] for k in asked)
        kept = sum(self.costs[k].source_bytes for k in asked) - COPIES * sources
        return _Part(
            rests=(1 + self.moments) * trained + frozen + (COPIES - 1) * sources,
            gradients=trained + sources,
            trained=trained,
            activations=sum(c.activation_bytes for c in costs) - twice + kept,
            works=sum(c.forward + c.backward + c.update for c in costs),
            forward=sum(c.forward for c in costs),
            asks=sum(self.costs[k].sources for k in asked),
        )

    def sent(self, stage: int) -> int:
        """Bytes of all that the stages before one have sent."""
        return sum(n for n, p, _ in self.values if p < stage)

    @property
    def waiting(self) -> float:
        """Bytes of one batch of a visit, until its stages are visited again."""
        entering = [
            sum(n for n, p, c in self.values if p < k <= max(c)) for k in range(self.count + 1)
        ]
        times = WAITING_TO_LEARN if self.learns else WAITING
        return times * self.sent(self.count) + max(entering) + 2 * self.inputs


def forecast(
    plan: CutPlan,
    *,
    memory_cap: float | None = None,
    moments: float = 2,
    store_bandwidth: float = 1e9,
    visits: Sequence[tuple[int, int]] = (),
) -> Forecast:
    """Predict memory and time of a step on one device, in each way to train.

    ===========  ==================================================  ===========================
    way          bytes, beside weights and what optimisers keep      seconds
    ===========  ==================================================  ===========================
    backprop     activations, then gradients                         forward + backward + update
    checkpoints  values at the cuts, activations of one stage, and   the same, forward twice
                 gradients of those behind it
    drop-in      values at the cuts, activations of one stage, and   the same, and sources
                 gradients of those before it
    at once      activations or gradients of one stage               the same
    resident     the same, and weights of so many stages only;       the same, or reading and
                 values at a cut of all batches of a sweep           writing, once a sweep
    ===========  ==================================================  ===========================

    Args:
        plan: a plan whose stages have costs; checkpoints begin where its stages do, and a coarser
            drop-in puts neighbouring stages together.
        memory_cap: bytes that tensors may take.
        moments: numbers that the optimiser keeps for each parameter: 0 for SGD, 1 with momentum, 2
            for Adam.
        store_bandwidth: bytes a second that the store reads and writes.
        visits: pairs of ``resident`` and ``sweep`` to tell besides.

    Raises:
        DecouplingError: a plan without costs, or numbers out of range.
    """
    facts = _Facts(plan, moments)
    _check(memory_cap, moments, store_bandwidth)
    count = facts.count
    ways = [_backprop(facts), _checkpoints(facts)]
    ways += [_drop_in(facts, n) for n in sorted({*GROUPS, count}) if 1 < n <= count]
    if count > 1:
        pairs = {(n, sweep) for n in (1, 2) for sweep in SWEEPS} | {*visits}
        whole = {1, *(sweep for n, sweep in visits if n >= count)}
        ways += [_at_once(facts, sweep) for sweep in sorted(whole)]
        ways += [_resident(facts, *p, store_bandwidth) for p in sorted(pairs) if p[0] < count]
    return Forecast(tuple(ways), memory_cap, moments, store_bandwidth)


def _learns(kind: str) -> bool:
    """Whether a source, by its name in a plan, learns from what comes back; unknown ones may."""
    made = SOURCES.get(base_name(kind))
    asks = getattr(made, "asks", None)
    return asks is None or bool(asks.learns_from)


def _backprop(facts: _Facts) -> Way:
    """At the worst moment of the backward."""
    (whole,), costs = facts.parts(1, asks=False), facts.costs
    kept = [c.activation_bytes for c in costs]
    for nbytes, _, consumers in facts.values:
        for consumer in consumers:
            kept[consumer] -= nbytes  # the producer's, too
    trained = [p.trained for p in facts.parts(facts.count)]
    most = max(sum(kept[:k]) + sum(trained[k:]) for k in range(facts.count + 1))
    return Way("backprop", round(whole.rests + most + facts.inputs), whole.works, exact=True)


def _checkpoints(facts: _Facts) -> Way:
    """A checkpoint at every cut; a stage is run again when its backward comes."""
    (whole,), parts = facts.parts(1, asks=False), facts.parts(facts.count, asks=False)
    most = max(
        facts.sent(k) + max(p.activations, p.trained) + sum(q.trained for q in parts[k + 1 :])
        for k, p in enumerate(parts)
    )
    memory = round(whole.rests + most + facts.inputs)
    return Way("checkpoints", memory, whole.works + whole.forward, exact=True, stages=facts.count)


def _drop_in(facts: _Facts, count: int) -> Way:
    """Gradients of the parts so far, activations of one; sources see all values once more."""
    parts = facts.parts(count)
    firsts = [
        next(k for k in range(facts.count) if k * count // facts.count == g) for g in range(count)
    ]
    times = 2 if facts.learns else 0  # a value, and what its source said
    most = max(
        times * facts.sent(firsts[g]) + sum(p.gradients for p in parts[:g]) + part.at_work
        for g, part in enumerate(parts)
    )
    memory = round(sum(p.rests for p in parts) + most + facts.inputs)
    return Way(
        f"drop-in, {count} stages", memory, sum(p.works + p.asks for p in parts), stages=count
    )


def _at_once(facts: _Facts, sweep: int) -> Way:
    """All weights, and gradients or activations of one stage."""
    parts = facts.parts(facts.count)
    most = sweep * facts.waiting + max(p.at_work for p in parts)
    memory, seconds = sum(p.rests for p in parts) + most, sum(p.works + p.asks for p in parts)
    name = 'update="at_once"' + (f", sweep={sweep}" if sweep > 1 else "")
    count = facts.count
    return Way(name, round(memory), seconds, sweep=sweep, stages=count, visits=True)


def _resident(facts: _Facts, resident: int, sweep: int, bandwidth: float) -> Way:
    """The first stages stay; of the others one works, and one that comes or goes may be there."""
    parts = facts.parts(facts.count)
    stay = max(resident - 2, 0)
    moving = [*range(stay, facts.count)]
    most = seconds = 0.0
    for k, part in enumerate(parts):
        there, moved, work = sum(p.rests for p in parts[:stay]), 0.0, part.works + part.asks
        if k >= stay:
            after, before = moving[(k - stay + 1) % len(moving)], moving[k - stay - 1]
            there += part.rests + (parts[after].rests if resident > 1 else 0)
            moved = parts[before].rests + parts[k if resident == 1 else after].rests
        elif resident > 1:
            there += 2 * max(parts[m].rests for m in moving)
        most = max(most, there + part.at_work + sweep * facts.waiting)
        waits = moved / bandwidth
        seconds += sweep * work + waits if resident == 1 else max(sweep * work, waits)
    return Way(
        f"resident={resident}, sweep={sweep}",
        round(most),
        seconds / sweep,
        moved=round(2 * sum(parts[m].rests for m in moving) / sweep),
        resident=resident,
        sweep=sweep,
        stages=facts.count,
        visits=True,
    )


def _check(memory_cap: float | None, moments: float, bandwidth: float) -> None:
    for name, value, least in (
        ("memory_cap", 1 if memory_cap is None else memory_cap, 0.0),
        ("store_bandwidth", bandwidth, 0.0),
        ("moments", moments + 1, 1 - 1e-9),
    ):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > least:
            raise DecouplingError(f"{name}={value!r}: expected a number above 0")

"""What a plan's stages would take on a device each, in five ways to train.

Nothing is run: all follows from the seconds and bytes in ``plan.report``. Assumptions, common to
all: a micro-batch takes its share of the batch's time, without a fixed cost; computing and sending
overlap; two stages that talk have a link of their own, both ways at once, on which messages queue;
a message takes ``latency + bytes / bandwidth`` and occupies its link for the second part. Messages
that wait are not counted as memory, nor is what an allocator wastes.

Index letters: k a stage, d its depth, p the number of depths, j a micro-batch, m their number.
Seconds: f, b a micro-batch's forward and backward, w the part of b that makes weight gradients, u
the update, once a batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from ..errors import DecouplingError
from ..plan import CutPlan
from ..reports.tables import table
from ..sources.naming import base_name
from .costs import checked_costs, number
from .forecast import forecast as forecast
from .pipelines import LinkTimes, Seconds, depths, pipelines
from .ways import Forecast as Forecast
from .ways import Way as Way

LOCKED = ("exact", "feedback", "mix")  # sources that wait for later stages within the step
RECOMPUTING = ("corrected", "delayed")  # by default; their stages run forward a second time


@dataclass(frozen=True)
class ScheduleReport:
    """One way to train.

    Attributes:
        name: ``"one process"``, ``"GPipe"``, ``"1F1B"``, ``"zero-bubble"`` or ``"decoupled"``.
        seconds: of one batch, optimisers included; decoupled: once every stage is busy.
        speedup: over one process.
        utilisation: busy share of each device's time.
        memory: peak bytes of each device.
        note: what the numbers rest on.
    """

    name: str
    seconds: float
    speedup: float
    utilisation: tuple[float, ...]
    memory: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True)
class Simulation:
    """Five ways to train a plan's stages; prints as a table and a verdict.

    Attributes:
        schedules: a row for each.
        micro_batches: into how many the pipeline schedules cut a batch.
        speeds: relative speed of each stage's device.
        slowest: the stage that takes longest in a decoupled step.
        work: its seconds in that step.
        limit: what bounds a decoupled step: ``slowest``, or the link between two stages.
        fill: seconds until every stage has met its first batch, in decoupled training; paid once in
            a run.
        plan: what was simulated.
    """

    schedules: tuple[ScheduleReport, ...]
    micro_batches: int
    speeds: tuple[float, ...]
    slowest: str
    work: float
    limit: str
    fill: float
    plan: CutPlan | None = field(default=None, compare=False, repr=False)

    def on_one_device(self, **options: Any) -> Forecast:
        """Memory and time of a step of the same plan on one device: backpropagation, checkpoints,
        the drop-in, stages that are visited. Options as for :func:`forecast`: ``memory_cap``,
        ``moments``, ``store_bandwidth``.
        """
        assert self.plan is not None
        return forecast(self.plan, **options)

    def __getitem__(self, name: str) -> ScheduleReport:
        rows = {r.name: r for r in self.schedules}
        if name not in rows:
            raise KeyError(f"no schedule {name!r}; there are {', '.join(rows)}")
        return rows[name]

    @property
    def sentence(self) -> str:
        """Whether cutting pays, which stage holds it back, and what the numbers do not say."""
        one, decoupled, alternating = self["one process"], self["decoupled"], self["1F1B"]
        exact = max((self[n] for n in ("GPipe", "1F1B", "zero-bubble")), key=lambda r: r.speedup)
        equal = "equal " if len(set(self.speeds)) == 1 else ""
        devices = "1 device" if len(self.speeds) == 1 else f"{len(self.speeds)} {equal}devices"
        head = f"{devices}:"
        if decoupled.speedup <= 1:
            what = "cutting" if exact.speedup <= 1 else "decoupling"
            head = f"{what} does not pay here: on {devices},"
        micro = f"{self.micro_batches} micro-batch" + ("es" if self.micro_batches > 1 else "")
        text = f"{head} decoupled {_x(decoupled)} one device; 1F1B with {micro} {_x(alternating)}. "
        if decoupled.speedup <= exact.speedup and exact.speedup > 1:
            text += f"{exact.name} is as fast or faster ({_x(exact)}) and its gradients are true. "
        text += f"The slowest stage is {self.slowest}: {_ms(self.work)} ms of work"
        text += "" if self.limit == self.slowest else f", and {self.limit} takes longer still"
        return (
            f"{text}; the whole model on one device takes {_ms(one.seconds)} ms. A decoupled step "
            "learns from predicted gradients and is not worth a step of backpropagation: compare "
            "time to loss, not steps."
        )

    def __str__(self) -> str:
        busy = ("busy, mean", "busy, least")
        rows = [("schedule", "ms per batch", "x one device", *busy, "MB, most on a device", "")]
        for row in self.schedules:
            mean = sum(row.utilisation) / len(row.utilisation)
            busy = (f"{mean:.0%}", f"{min(row.utilisation):.0%}")
            most = f"{max(row.memory) / 1e6:,.2f}"
            cells = (row.name, _ms(row.seconds), f"{row.speedup:.2f}", *busy, most, row.note)
            rows.append(cells)
        return "\n".join([*table(rows), "", self.sentence])


def simulate(
    plan: CutPlan,
    *,
    micro_batches: int = 8,
    latency: float = 0.0,
    bandwidth: float = math.inf,
    speeds: Sequence[float] | None = None,
) -> Simulation:
    """Predict what training a plan's stages on a device each would take, and whether cutting pays.

    ===========  ================================================  ===========================
    schedule     seconds of one batch                              activations held by a stage
    ===========  ================================================  ===========================
    one process  sum(f + b + u), on the fastest device             all
    GPipe        sum(f + b) + (m - 1)(max f + max b) + u           all m micro-batches
    1F1B         (m + p - 1)(f + b) + u if balanced                min(p - d, m) of m
    zero-bubble  (m + p - 1)(f + b) - 2 (p - 1) w + u if balanced  min(p, m) of m
    decoupled    max(f + b + u + sources, link)                    one batch
    ===========  ================================================  ===========================

    GPipe's form, a flow shop with equal jobs each way, is exact for unequal stages too. 1F1B and
    zero-bubble have no such form where stages are unequal or messages take time: their recursion is
    solved instead, exactly, all stages at once in one pass for each micro-batch. 1F1B is strict, as
    ``torch.distributed.pipelining`` runs it: p - d forwards, then a backward and a forward in turn.
    Zero-bubble is ZB-H1 in a fixed order: weight gradients d micro-batches late. Pipelines are
    flushed after each batch. Where stages are no chain (skips, towers), those of equal depth run
    side by side, each depth as slow as its slowest stage and message: never too fast, and exact
    where these are equal.

    Decoupled stages wait neither for gradients nor for a flush, so the slowest stage, or the
    busiest link, is the step; latency is hidden, but makes targets late. The first batch's way down
    is ``fill``.

    Args:
        plan: a plan whose stages have costs.
        micro_batches: m, for the pipeline schedules.
        latency: seconds that each message takes, however short; 0 or more.
        bandwidth: bytes a second of each link; ``math.inf`` for free.
        speeds: relative speed of each stage's device; costs are for speed 1.

    Raises:
        DecouplingError: a plan without costs, numbers out of range, or speeds that are not one for
            each stage.

    Source:
        GPipe: Huang et al. 2018, arXiv:1811.06965. 1F1B: Narayanan et al. 2021, arXiv:2006.09503
        (PipeDream-Flush). Zero-bubble: Qi et al. 2023, arXiv:2401.10241, section 2.1. Decoupled:
        Jaderberg et al. 2016, arXiv:1608.05343.
    """
    costs, stages, m = checked_costs(plan), plan.stages, micro_batches
    rates = [1.0] * len(stages) if speeds is None else speeds
    _check_numbers(m, latency, bandwidth, rates, len(stages))
    times = [
        (c.forward / r, c.backward / r, c.update / r, c.sources / r)
        for c, r in zip(costs, rates, strict=True)
    ]
    links: LinkTimes = defaultdict(float)
    for interface in plan.interfaces:
        for consumer in interface.consumers:
            links[interface.producer, consumer] += interface.spec.nbytes / bandwidth
    depth = depths(links, len(stages))
    whole = sum(c.forward + c.backward + c.update for c in costs) / max(rates)

    def row(
        name: str, step: float, busy: Sequence[float], memory: Sequence[int], note: str
    ) -> ScheduleReport:
        shares = tuple(seconds / step for seconds in busy)
        return ScheduleReport(name, step, whole / step, shares, tuple(memory), note)

    memory = sum(c.parameter_bytes + c.activation_bytes for c in costs)
    note = "plain backpropagation on the fastest device"
    rows = [row("one process", whole, [whole], [memory], note)]
    busy = [f + b + u for f, b, u, _ in times]
    deep = max(depth) + 1
    note = f"{m} micro-batches" + ("" if deep == len(stages) else f", {deep} deep")
    for name, step, held in pipelines(stages, times, depth, links, latency, m):
        most = [
            c.parameter_bytes - -c.activation_bytes * n // m
            for c, n in zip(costs, held, strict=True)
        ]
        rows.append(row(name, step, busy, most, note))
    work, step, limit, fill, note = _decoupled(plan, times, links, latency)
    rows.append(row("decoupled", step, work, [c.nbytes for c in costs], note))
    longest = max(work)
    slowest = stages[work.index(longest)].name
    speed = tuple(map(float, rates))
    return Simulation(tuple(rows), int(m), speed, slowest, longest, limit, fill, plan)


def _decoupled(
    plan: CutPlan, times: Sequence[Seconds], links: LinkTimes, latency: float
) -> tuple[list[float], float, str, float, str]:
    """Decoupled stages once all are busy: the work of each, a step's seconds and what bounds it,
    when every stage has met its first batch, and a note.
    """
    forward, backward, _, _ = zip(*times, strict=True)
    kinds = {name: base_name(kind) for name, kind in plan.gradients}
    again = {i.producer for i in plan.interfaces if kinds.get(i.name) in RECOMPUTING}
    work = [sum(t) + (forward[k] if k in again else 0.0) for k, t in enumerate(times)]
    step, notes = max(work), []
    limit = plan.stages[work.index(step)].name
    first = [0.0] * len(times)  # when each stage gets its first batch
    for (k, consumer), taken in sorted(links.items()):
        first[consumer] = max(first[consumer], first[k] + forward[k] + latency + taken)
    if locked := sorted(set(kinds.values()) & set(LOCKED)):
        notes.append(f"if its sources did not wait, as {', '.join(locked)} do")
    if links:
        k, consumer = widest = max(links, key=links.__getitem__)
        if links[widest] > step:
            step = links[widest]
            limit = f"the link from {plan.stages[k].name} to {plan.stages[consumer].name}"
        back = max(forward[c] + backward[c] + 2 * (latency + t) for (_, c), t in links.items())
        late = max(1, math.ceil(back / step))
        notes.append(f"first batch {_ms(max(first))} ms more, once")
        notes.append(f"targets about {late} step{'s' * (late > 1)} late")
    return work, step, limit, max(first), "; ".join(notes)


def _x(row: ScheduleReport) -> str:
    return f"{row.speedup:,.1f} x" if row.speedup > 1 else f"{row.speedup:.2f} x"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}" if seconds >= 1e-4 else f"{seconds * 1e3:.2g}"


def _check_numbers(m: Any, latency: Any, bandwidth: Any, rates: Any, stages: int) -> None:
    wrong = ""
    if not isinstance(m, Integral) or not number(m) >= 1:
        wrong = f"micro_batches={m!r}: expected a whole number, at least 1"
    if not 0 <= number(latency) < math.inf:
        wrong = f"latency={latency!r}: expected seconds for each message, 0 or more, such as 1e-4"
    if not number(bandwidth) > 0:
        wrong = f"bandwidth={bandwidth!r}: expected bytes a second, more than 0, such as 1e10"
    if not isinstance(rates, list | tuple) or not all(0 < number(r) < math.inf for r in rates):
        wrong = f"speeds={rates!r}: expected a list of numbers above 0, one for each stage"
    elif len(rates) != stages:
        wrong = (
            f"speeds= has {len(rates)} numbers, but the plan has {stages} stages; give one for each"
        )
    if wrong:
        raise DecouplingError(wrong)

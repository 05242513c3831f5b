"""What a plan's stages would take on a device each: time, utilisation and memory of five ways to
train.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .errors import DecouplingError
from .plan import CutPlan, StageCost, StageReport, _table

Links = dict[
    tuple[int, int], float
]  # seconds that one batch's messages occupy a link, by (producer, consumer)
LOCKED = ("exact", "feedback", "mix")  # sources that wait for later stages within the step
RECOMPUTING = ("corrected", "delayed")  # by default; their stages run forward a second time
# of a backward goes to weight gradients where there are parameters: a linear map's two products
WEIGHT_SHARE = 0.5


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
    """

    schedules: tuple[ScheduleReport, ...]
    micro_batches: int
    speeds: tuple[float, ...]
    slowest: str
    work: float
    limit: str
    fill: float

    def __getitem__(self, name: str) -> ScheduleReport:
        """The row of that name."""
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
            head = f"{'cutting' if exact.speedup <= 1 else 'decoupling'} does not pay here: on {devices},"
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
        rows = [
            (
                "schedule",
                "ms per batch",
                "x one device",
                "busy, mean",
                "busy, least",
                "MB, most on a device",
                "",
            )
        ]
        for r in self.schedules:
            busy = f"{sum(r.utilisation) / len(r.utilisation):.0%}", f"{min(r.utilisation):.0%}"
            rows.append(
                (
                    r.name,
                    _ms(r.seconds),
                    f"{r.speedup:.2f}",
                    *busy,
                    f"{max(r.memory) / 1e6:,.2f}",
                    r.note,
                )
            )
        return "\n".join([*_table(rows), "", self.sentence])


def simulate(
    plan: CutPlan,
    *,
    micro_batches: int = 8,
    latency: float = 0.0,
    bandwidth: float = math.inf,
    speeds: Sequence[float] | None = None,
) -> Simulation:
    """Predict what training a plan's stages on a device each would take, and whether cutting pays.

    ============= ====================================================
    ====================================== schedule      seconds of one batch
    activations that a stage holds =============
    ==================================================== ====================================== one
    process   sum(f + b + u), on the fastest device                all GPipe         sum(f + b) + (m
    - 1)(max f + max b) + u              all m micro-batches 1F1B          (m + p - 1)(f + b) + u if
    balanced                   min(p - d, m) of m zero-bubble   (m + p - 1)(f + b) - 2 (p - 1) w + u
    if balanced     min(p, m) of m decoupled     max(f + b + u + sources, link)
    one batch ============= ====================================================
    ======================================

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
            (PipeDream-Flush).
        Zero-bubble: Qi et al. 2023, arXiv:2401.10241, section 2.1. Decoupled: Jaderberg et al.
            2016, arXiv:1608.05343.
    """
    stages, costs = _check_plan(plan)
    m, rates = _check_numbers(micro_batches, latency, bandwidth, speeds, len(stages))
    times = [
        [t / r for t in (c.forward, c.backward, c.update, c.sources)]
        for c, r in zip(costs, rates, strict=True)
    ]
    forward, backward, _, _ = zip(*times, strict=True)
    kinds = {
        name: kind.removeprefix("joint:").removeprefix("each:") for name, kind in plan.gradients
    }
    again = {i.producer for i in plan.interfaces if kinds.get(i.name) in RECOMPUTING}
    work, busy = [sum(t) for t in times], [sum(t[:3]) for t in times]
    work = [t + forward[k] if k in again else t for k, t in enumerate(work)]
    links: Links = {}
    for i in plan.interfaces:
        for consumer in i.consumers:
            links[i.producer, consumer] = (
                links.get((i.producer, consumer), 0.0) + i.spec.nbytes / bandwidth
            )
    depth, start = (
        [0] * len(stages),
        [0.0] * len(stages),
    )  # start: when each stage gets its first batch, decoupled
    for (k, consumer), taken in sorted(links.items()):
        depth[consumer] = max(depth[consumer], depth[k] + 1)
        start[consumer] = max(start[consumer], start[k] + forward[k] + latency + taken)

    whole = sum(c.forward + c.backward + c.update for c in costs) / max(rates)
    memory = sum(c.parameter_bytes + c.activation_bytes for c in costs)
    rows: list[ScheduleReport] = []

    def add(
        name: str, step: float, busy: Sequence[float], memory: Sequence[int], note: str
    ) -> None:
        rows.append(
            ScheduleReport(
                name, step, whole / step, tuple(t / step for t in busy), tuple(memory), note
            )
        )

    add("one process", whole, [whole], [memory], "plain backpropagation on the fastest device")
    deep = max(depth) + 1
    note = f"{m} micro-batches" + ("" if deep == len(stages) else f", {deep} deep")
    for name, step, held in _pipelines(stages, times, depth, links, latency, m):
        most = [
            c.parameter_bytes - -c.activation_bytes * n // m
            for c, n in zip(costs, held, strict=True)
        ]
        add(name, step, busy, most, note)

    slowest = max(range(len(stages)), key=work.__getitem__)
    step, limit, note = work[slowest], stages[slowest].name, ""
    if links:
        k, consumer = widest = max(links, key=links.__getitem__)
        if links[widest] > step:
            step, limit = (
                links[widest],
                f"the link from {stages[k].name} to {stages[consumer].name}",
            )
        back = max(
            forward[c] + backward[c] + 2 * (latency + taken) for (_, c), taken in links.items()
        )
        late = max(1, math.ceil(back / step))
        note = f"first batch {_ms(max(start))} ms more, once; targets about {late} step{'s' * (late > 1)} late"
    if locked := sorted(set(kinds.values()) & set(LOCKED)):
        note = f"if its sources did not wait, as {', '.join(locked)} do" + (
            f"; {note}" if note else ""
        )
    add("decoupled", step, work, [c.nbytes for c in costs], note)
    return Simulation(tuple(rows), m, rates, stages[slowest].name, work[slowest], limit, max(start))


def _pipelines(
    stages: tuple[StageReport, ...],
    times: list[list[float]],
    depth: list[int],
    links: Links,
    latency: float,
    m: int,
) -> Iterator[tuple[str, float, list[int]]]:
    """Name, seconds of a batch, and micro-batches whose activations each stage holds; every depth
    is one stage.
    """
    p, at = max(depth) + 1, torch.tensor(depth, device="cpu")
    forward, backward, update, _ = torch.tensor(times, dtype=torch.float64, device="cpu").T
    weights = backward * torch.tensor(
        [WEIGHT_SHARE * (s.parameters > 0) for s in stages], device="cpu"
    )
    parts = torch.stack([forward / m, backward / m, (backward - weights) / m, weights / m, update])
    f, b, i, w, u = parts.new_zeros(5, p).scatter_reduce(1, at.expand(5, -1), parts, "amax")
    hops = parts.new_zeros(p - 1)  # longest message from each depth to the next
    for (k, consumer), taken in sorted(
        links.items(), key=lambda link: depth[link[0][1]] - depth[link[0][0]]
    ):
        passed = hops[depth[k] : depth[consumer]]
        passed[int(passed.argmax())].clamp_(
            min=taken / m
        )  # a skip goes directly: one delay bounds it
    first, pace = _flow(f, hops, latency)
    back, back_pace = (v.flip(0) for v in _flow(b.flip(0), hops.flip(0), latency))
    gpipe = first[-1] + (m - 1) * pace[-1] + back + (m - 1) * back_pace + u
    yield "GPipe", float(gpipe.max()), [m] * len(depth)
    yield "1F1B", _alternate(f, b, 0 * w, u, hops, latency, m), [min(p - d, m) for d in depth]
    yield "zero-bubble", _alternate(f, i, w, u, hops, latency, m), [min(p, m)] * len(depth)


def _flow(times: Tensor, hops: Tensor, latency: float) -> tuple[Tensor, Tensor]:
    """When the first of equal jobs leaves each stage of a flow shop, whose links are machines too;
    what each adds.
    """
    none = times.new_zeros(1)
    first = times.cumsum(0) + torch.cat([none, (hops + latency).cumsum(0)])
    return first, torch.maximum(times, torch.cat([none, hops])).cummax(0).values


def _alternate(
    f: Tensor, i: Tensor, w: Tensor, u: Tensor, hops: Tensor, latency: float, m: int
) -> float:
    """1F1B, or ZB-H1 where weight gradients take time w apart from input gradients i; seconds until
    all is updated.

    At turn a, stage k makes the forward of micro-batch a - k. Up to turn p - 1 that is a flow shop;
    each later turn is a micro-batch's backward through all stages, a running maximum, and then all
    stages' next forwards.
    """
    p = len(f)
    stage = torch.arange(p, device="cpu")
    first, pace = _flow(f, hops, latency)
    last = first + (p - 1 - stage).clamp(max=m - 1) * pace  # end of each stage's latest forward
    sent = (
        first[:-1] + hops + (p - 2 - stage[:-1]).clamp(max=m - 1) * torch.maximum(pace[:-1], hops)
    )  # link free again
    free, returned = last, torch.zeros_like(hops)
    delay = hops + latency
    below = (i + torch.cat([delay, delay.new_zeros(1)])).flip(0).cumsum(0).flip(0)
    for j in range(m):
        ready = torch.cat([torch.maximum(free[:-1], returned + delay), free[-1:]])
        back = (ready - below + i).flip(0).cummax(0).values.flip(0) + below
        returned = torch.maximum(back[1:], returned) + hops
        free = torch.where(stage <= j, back + w, back)
        sent = torch.maximum(last[:-1], sent) + hops
        last = torch.maximum(free, torch.cat([free[:1], sent + latency])) + f
        free = torch.where(stage > j + p - m, last, free)  # the others have made all their forwards
    return float((free + stage.clamp(max=m) * w + u).max())


def _x(row: ScheduleReport) -> str:
    return f"{row.speedup:,.1f} x" if row.speedup > 1 else f"{row.speedup:.2f} x"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}" if seconds >= 1e-4 else f"{seconds * 1e3:.2g}"


def _check_plan(plan: Any) -> tuple[tuple[StageReport, ...], list[StageCost]]:
    if not isinstance(plan, CutPlan):
        raise DecouplingError(
            "simulate takes a plan of dni_fx.plan_cuts, or decoupled.plan, not a "
            f"{type(plan).__name__}"
        )
    names = ", ".join(repr(c) for c in plan.cuts[:3]) + (", ..." if len(plan.cuts) > 3 else "")
    where = f"stages={len(plan.cuts) + 1}" if plan.assignment else f"cuts=[{names}]"
    again = f'make it again with dni_fx.plan_cuts(model, example_inputs, {where}, costs="measured")'
    if plan.report is None:
        raise DecouplingError(f"this plan holds names only, since it was read from JSON: {again}")
    stages = plan.report.stages
    costs = [s.cost for s in stages if s.cost is not None]
    if len(costs) < len(stages):
        without = (
            ", ".join([s.name for s in stages if s.cost is None][:5]) if costs else "all of them"
        )
        raise DecouplingError(f"stages of this plan have no costs ({without}): {again}")
    values = [
        (s.name, n, v) for s, c in zip(stages, costs, strict=True) for n, v in vars(c).items()
    ]
    wrong = [
        f"{stage}.cost.{n} is {v!r}"
        for stage, n, v in values
        if not (_is_number(v) and 0 <= v < math.inf)
    ]
    if not wrong and not sum(c.forward + c.backward for c in costs) > 0:
        wrong = ["all are 0 seconds"]
    if wrong:
        raise DecouplingError(
            f"costs must be finite numbers, 0 or more, not all 0: {'; '.join(wrong[:5])}; {again}"
        )
    return stages, costs


def _check_numbers(
    m: Any, latency: Any, bandwidth: Any, speeds: Any, stages: int
) -> tuple[int, tuple[float, ...]]:
    if type(m) is bool or not isinstance(m, Integral) or m < 1:
        raise DecouplingError(f"micro_batches={m!r}: expected a whole number, at least 1")
    if not _is_number(latency) or not 0 <= latency < math.inf:
        raise DecouplingError(
            f"latency={latency!r}: expected seconds for each message, 0 or more, such as 1e-4"
        )
    if not _is_number(bandwidth) or not bandwidth > 0:
        raise DecouplingError(
            f"bandwidth={bandwidth!r}: expected bytes a second, more than 0, such as 1e10"
        )
    rates = [1.0] * stages if speeds is None else speeds
    if not isinstance(rates, list | tuple) or not all(
        _is_number(v) and 0 < v < math.inf for v in rates
    ):
        raise DecouplingError(
            f"speeds={speeds!r}: expected a list of numbers above 0, one for each stage"
        )
    if len(rates) != stages:
        raise DecouplingError(
            f"speeds= has {len(rates)} numbers, but the plan has {stages} stages; give one for each"
        )
    return int(m), tuple(float(v) for v in rates)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)

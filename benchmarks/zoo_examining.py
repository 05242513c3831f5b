"""What is asked of one model of the zoo, in two processes that start without having called it.

The first only trains it, with plain torch. The second begins with the transform; afterwards the
model must still train as in the first process, and its stages as it does.
"""

from __future__ import annotations

import resource
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zoo_comparing import (
    BATCH,
    SEED,
    STEPS,
    Snapshot,
    Subject,
    difference,
    fingerprint,
    first_difference,
    loss,
)
from zoo_harm import Untouched
from zoo_models import Entry, parameter_count

LARGEST = 150_000_000  # parameters
EQUAL = "equal"
PARTS = ("split", "unharmed", "after", "train", "eval", "exact", "module", "zero")  # compared
NOT_ASKED = ("build", "eager", "left out")  # where the model's own failure ends it

Row = dict[str, Any]
Report = Callable[[Row], None]


def equal_cuts(points: Any, stages: int) -> list[str]:
    """Names of legal cuts nearest to equal numbers of nodes."""
    places = [p for i, p in enumerate(points) if i == 0 or p.crossing != points[i - 1].crossing]
    legal = [i for i, p in enumerate(places) if p.legal]
    chosen: list[int] = []
    for k in range(1, stages):
        left = [i for i in legal if not chosen or i > chosen[-1]]
        left = left[: len(left) - (stages - 1 - k)] or left
        if left:
            chosen.append(min(left, key=lambda i: abs(i + 1 - k * len(places) / stages)))
    return [places[i].name for i in chosen]


class Examination:
    """A row on its way: ``report`` is given it again after every part, so that a crash loses
    little.
    """

    def __init__(self, row: Row, report: Report) -> None:
        self.row, self.report = row, report

    def passes(self, part: str, action: Callable[[], None]) -> bool:
        """Whether a part raises nothing; else the row says what."""
        self.row["status"] = part
        self.report(self.row)
        try:
            action()
        except Exception as error:
            self.row["reason"] = f"{type(error).__name__}: {str(error).strip()}"[:2000]
            frames = traceback.extract_tb(error.__traceback__)[-8:]
            self.row["where"] = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]
        self.report(self.row)
        return "reason" not in self.row

    def compare(self, part: str, action: Callable[[], str]) -> None:
        """Note a part's verdict: the first difference, or what it raised."""
        if not self.passes(part, lambda: self.row.__setitem__(part, action() or EQUAL)):
            self.row[part] = self.row.pop("reason")
            self.row.setdefault("wheres", {})[part] = self.row.pop("where")


def train_plainly(entry: Entry, dtype: torch.dtype, report: Report) -> None:
    """Train a model with plain torch, twice; the row then holds the first run's fingerprints."""
    row: Row = {"name": entry.name, "group": entry.group, "image": entry.image}
    row["dtype"] = str(dtype).rpartition(".")[2]
    examination = Examination(row, report)
    found: list[Subject] = []

    def build() -> None:
        row["parameters"] = parameter_count(entry)
        if row["parameters"] <= LARGEST:
            found.append(Subject(entry, dtype))

    def eager() -> None:
        (subject,) = found
        reference = list(subject.backprop())
        row["eager_seconds"] = min(subject.seconds)
        first = [value for key, value in reference[0].items() if key.startswith("gradient")]
        live = sum(value is not None and bool(value.any()) for value in first)
        row["live"] = live / max(1, len(first))
        row["finite"] = all(v is None or bool(v.isfinite().all()) for v in reference[-1].values())
        row["repeatable"] = first_difference(reference, subject.backprop()) or EQUAL
        row["fingerprints"] = [fingerprint(snapshot) for snapshot in reference]

    if not examination.passes("build", build):
        return
    if not found:
        row.update(status="left out", reason=f"{row['parameters'] / 1e6:.0f} M parameters")
        report(row)
    elif examination.passes("eager", eager):
        row["status"] = "transform"
        report(row)


def examine(entry: Entry, dtype: torch.dtype, check: bool, row: Row, report: Report) -> None:
    """Transform a model that nobody has called in this process, and compare.

    Args:
        entry: the model.
        dtype: of parameters and inputs.
        check: run the transform's own self-check too.
        row: that :func:`train_plainly` made.
        report: is given the row after every part.
    """
    fingerprints = row.pop("fingerprints")
    examination = Examination(row, report)
    subject = Subject(entry, dtype)
    transformed: list[Any] = []
    reference: list[Snapshot] = []
    before = Untouched(subject.model, subject.batches[0])

    def transform() -> None:
        transformed.append(decouple(subject, check, row))

    def after() -> str:
        reference.extend(subject.backprop())
        if row["repeatable"] != EQUAL:
            return ""
        pairs = zip(fingerprints, map(fingerprint, reference), strict=True)
        for number, (want, have) in enumerate(pairs, start=1):
            for key in want | have:
                if want.get(key) != have.get(key):
                    return f"step {number}, {key} is not as in a process without the transform"
        return ""

    def evaluation() -> str:
        text = subject.compare_call(transformed[0], training=False, batch=BATCH + 1)
        if text and not subject.compare_call(transformed[0], training=False, batch=BATCH):
            return f"only with another batch size than the example's: {text}"
        return text

    done = examination.passes("transform", transform)
    failed = {} if done else {"reason": row.pop("reason"), "where": row.pop("where")}
    examination.compare("unharmed", before.difference)
    examination.compare("after", after)
    if failed:
        row.update(failed, status="transform")
        report(row)
        return
    if len(reference) == STEPS:
        training = {"training": True, "batch": BATCH}
        examination.compare("train", lambda: subject.compare_call(transformed[0], **training))
        examination.compare("eval", evaluation)
        exact = lambda: first_difference(reference, subject.exact(transformed[0]))  # noqa: E731
        examination.compare("exact", exact)
        row["exact_seconds"] = min(subject.seconds, default=None)
        module = lambda: subject.compare_call(transformed[0].as_module(), **training)  # noqa: E731
        examination.compare("module", module)
        examination.compare("zero", lambda: zero_step(subject, transformed[0], reference[0]))
        if not entry.typical and not examination.passes("search", lambda: search(subject, row)):
            row["search"] = row.pop("reason")
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    row["status"] = "done"
    report(row)


def decouple(subject: Subject, check: bool, row: Row) -> Any:
    """The model in stages of equal node counts, in exact mode; the row gets facts of the plan."""
    import dni_fx

    begin = time.perf_counter()
    args, kwargs = subject.batches[0]
    options: dict[str, Any] = {"example_inputs": args, "example_kwargs": kwargs}
    if subject.entry.typical:
        options["stages"] = subject.entry.stages
    else:
        points = dni_fx.list_cut_points(subject.model, args, kwargs)
        options |= {"cuts": equal_cuts(points, subject.entry.stages), "check": check}
    decoupled = dni_fx.decouple(subject.model, gradients="exact", **options)
    row["transform_seconds"] = time.perf_counter() - begin
    facts = decoupled.plan.report
    assert facts is not None
    row["rung"], row["nodes"] = facts.rung, sum(stage.nodes for stage in facts.stages)
    row["notes"] = [str(note) for note in facts.notes]
    row["stages"], row["interfaces"] = len(decoupled.stages), len(decoupled.interfaces)
    few = subject.entry.typical and row["stages"] < subject.entry.stages
    row["split"] = f"{row['stages']} of {subject.entry.stages} stages" if few else EQUAL
    row["implied"] = sum(interface.implied for interface in decoupled.interfaces)
    return decoupled


def zero_step(subject: Subject, decoupled: Any, expected: Snapshot) -> str:
    """One step with the same stages and no gradients across the cuts: the outputs are the model's,
    and another batch size is taken too.
    """
    import dni_fx

    subject.restore()
    args, kwargs = subject.batches[0]
    examples: dict[str, Any] = {"example_inputs": args, "example_kwargs": kwargs}
    options: dict[str, Any] = {"gradients": "zero", "check": False}
    stages = dni_fx.decouple(subject.model, decoupled.plan, **examples, **options)
    trainer = dni_fx.Trainer(stages, loss=loss, optimizer=subject.sgd)
    taken = next(iter(subject.run(lambda x: trainer.step(*x[0], **x[1]).outputs)))
    outputs = {key: value for key, value in expected.items() if key.startswith("output")}
    args, kwargs = subject.entry.example(BATCH + 1, SEED, subject.dtype)
    trainer.step(*args, **kwargs)
    return difference(outputs, {key: taken[key] for key in outputs if key in taken})


def search(subject: Subject, row: Row) -> None:
    """The best cuts for the same number of stages, beside the bound."""
    import dni_fx

    subject.restore()
    begin = time.perf_counter()
    args, kwargs = subject.batches[0]
    stages = subject.entry.stages
    plan = dni_fx.plan_cuts(subject.model, args, example_kwargs=kwargs, stages=stages)
    row["plan_seconds"] = time.perf_counter() - begin
    assert plan.report is not None
    found = plan.report.search
    assert found is not None
    row["slowest"], row["bound"], row["gap"] = found.slowest, found.bound, found.gap
    row["sure"], row["free"] = found.exact, bool(plan.assignment)
    costs = [stage.cost for stage in plan.stages if stage.cost is not None]
    row["share"] = found.slowest / sum(cost.seconds for cost in costs)
    row["net"] = found.slowest / sum(cost.seconds - cost.sources for cost in costs)


def is_miss(row: Row) -> bool:
    """Whether the library, not the model or the size limit, has something to answer for."""
    if row["status"] in NOT_ASKED:
        return False
    return any(row.get(part) != EQUAL for part in PARTS) or "search" in row

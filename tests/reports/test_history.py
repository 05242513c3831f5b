"""Histories: kept, merged, written and read again."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dni_fx.diagnostics import History, summarize
from dni_fx.errors import DecouplingError
from dni_fx.reports import InterfaceReport, StepReport

from ..helpers.training import batch, trainer_of
from ..models.small import SKIPS
from .kit import inf, nan, step_report


def test_history_keeps_every_measurement_once() -> None:
    trainer, history, seen = trainer_of("linear", SKIPS, metrics_every=3), History(), []

    def note(report: StepReport) -> None:
        seen.append(report)
        history.add(report)

    trainer.fit(map(batch, range(8)), progress=False, on_step=note)
    assert history.losses == {i: pytest.approx(float(r.loss)) for i, r in enumerate(seen)}
    assert list(history.interfaces) == ["a", "b", "c"]
    for name, series in history.interfaces.items():
        assert [r.step for r in series] == [0, 3, 6]
        assert series == [seen[i].interfaces[name] for i in (0, 3, 6)] or math.isnan(
            series[0].cosine
        )
        assert history.last[name] is series[-1]
    text = history.table()
    assert text.startswith(f"loss {float(seen[-1].loss):.4g} after 8 steps\n")
    assert summarize(history.last) in text
    assert seen[-1].interfaces["a"].verdict in text


def test_an_empty_history() -> None:
    history = History()
    assert (history.losses, history.interfaces, history.last) == ({}, {}, {})
    assert history.table() == "no steps yet\n\nnothing measured: no source predicted a gradient"
    assert History.from_json(history.to_json()).table() == history.table()


def test_history_keeps_no_outputs_and_reads_losses_late() -> None:
    class Counting(Tensor):
        read = 0

        def item(self) -> Any:
            type(self).read += 1
            return super().item()

    history, report = History(), step_report(1, torch.tensor(2.0).as_subclass(Counting))
    history.add(report)
    assert Counting.read == 0
    assert not any(isinstance(v, Tensor) and v.numel() > 1 for v in vars(history).values())
    assert history.losses == {0: 2.0}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        history.add(step_report(2 + len(history.losses), torch.ones((), dtype=dtype)))
    history.add(step_report(9, torch.ones(1, requires_grad=True)))
    history.add(step_report(10, nan))  # a step without the last stage
    assert list(history.losses.values()) == [2.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("most", [2, 3, 4, 10, 11])
def test_a_bounded_history_still_covers_the_run(most: int) -> None:
    history, whole = History(most), History(None)
    for step in range(1, 1000):
        for each in (history, whole):
            each.add(step_report(step, float(step), cosine=step / 1000))
        if step % 97 == 0:
            assert len(history.losses) <= most
    steps = list(history.losses)
    assert len(steps) <= most
    assert (steps[0], steps[-1]) == (0, 998)
    gaps = {b - a for a, b in itertools.pairwise(steps[:-1])}
    assert len(gaps) <= 1  # evenly spaced, but for the last
    assert all(history.losses[s] == s + 1 for s in steps)
    assert [r.step for r in history.interfaces["cut"]] == steps
    assert history.last == whole.last
    assert list(whole.losses) == list(range(999))


@pytest.mark.parametrize("most", [1, 0, -3, 2.5, True, "10"])
def test_history_refuses_other_bounds(most: Any) -> None:
    with pytest.raises(DecouplingError, match="most="):
        History(most)


@pytest.mark.parametrize("most", [None, 4])
def test_a_run_that_goes_on_from_an_earlier_state(most: int | None) -> None:
    history, straight = History(most), History(most)
    for step in range(1, 12):
        history.add(step_report(step, 100.0))
    for step in range(1, 21):
        straight.add(step_report(step, 100.0 if step < 7 else 1.0))
    for step in range(7, 21):
        history.add(step_report(step, 1.0))
    assert history.losses == (straight.losses if most is None else history.losses)
    steps = list(history.losses)
    assert steps == sorted(set(steps))
    assert steps[-1] == 19
    assert all(loss == (100.0 if step < 6 else 1.0) for step, loss in history.losses.items())
    assert [r.step for r in history.interfaces["cut"]] == steps


def test_history_as_json() -> None:
    history = History(5)
    history.add(
        StepReport(
            torch.tensor(1.5), None, {"a.b": InterfaceReport(nan, inf, 0.0, "bootstrapped", 0)}, 1
        )
    )
    for step in range(2, 10):
        history.add(step_report(step, 1 / step, cosine=1 / step))
    text = history.to_json()
    assert all(word not in text for word in ("NaN", "Infinity"))
    json.loads(text, parse_constant=pytest.fail)
    again = History.from_json(text)
    assert again.to_json() == text
    assert again.table() == history.table()
    assert again.losses == history.losses
    assert again.last["cut"] == history.last["cut"]
    assert math.isnan(again.last["a.b"].cosine)
    assert again.last["a.b"].relative_error == inf
    for step in range(10, 30):  # goes on as if it had not been away
        again.add(step_report(step))
        history.add(step_report(step))
    assert again.to_json() == history.to_json()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(format="dni_fx cut plan"), "no dni_fx history"),
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.pop("losses"), "damaged"),
        (lambda c: c["losses"].pop("stride"), "damaged"),
        (lambda c: c["losses"]["loss"].append(1.0), "damaged"),
        (lambda c: c["losses"].update(seen=0), "damaged"),
        (lambda c: c.update(interfaces=[]), "damaged"),
        (lambda c: c["interfaces"]["cut"].pop("reference"), "damaged"),
        (lambda c: c["interfaces"]["cut"].update(cosine=["far"]), "damaged"),
        (lambda c: c.update(most=0), "most="),
    ],
)
def test_json_of_something_else(change: Any, says: str) -> None:
    history = History()
    history.add(step_report(1))
    content = json.loads(history.to_json())
    change(content)
    with pytest.raises(DecouplingError, match=says):
        History.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", None])
def test_text_that_is_no_history(text: Any) -> None:
    with pytest.raises(DecouplingError, match="history"):
        History.from_json(text)

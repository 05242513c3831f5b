"""Fixtures of the folder."""

from __future__ import annotations

import pytest

from dni_fx.diagnostics import History
from dni_fx.reports import InterfaceReport, StepReport

from .kit import inf, nan, step_report


@pytest.fixture
def history() -> History:
    history = History()
    odd = InterfaceReport(nan, inf, 0.0, "bootstrapped", 0)
    for step in range(1, 30):
        report = step_report(step, 1 / step, cosine=1 - 1 / step)
        history.add(StepReport(report.loss, None, {"_first": odd, **report.interfaces}, step))
    return history

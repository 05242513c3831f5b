"""What no guard can notice a change of is listed in the plan with its place, and in the docs by
its kind; what is guarded is not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dni_fx.graphs import pictures
from dni_fx.passes.trace import outside
from dni_fx.passes.trace.exporting import trace_export

from .test_guards import Net, X, cut

PAGE = Path(__file__).parents[2] / "docs" / "baked-in.md"
TOLD = threading.Event()


class Rate:
    value = 1.0


def baked(model: torch.nn.Module) -> list[str]:
    """What the printed plan lists, in the order in which it was found."""
    lines = str(cut(model, X).plan).splitlines()
    return [line.removeprefix("baked in: ") for line in lines if line.startswith("baked in: ")]


def clocked(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return h * (1 + time.time() % 1)


def from_file(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    with open(PAGE) as file:
        return h * len(file.readline())


def by_lock(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return h * 2 if net.kept.locked() else h


def by_event(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return h * 2 if TOLD.is_set() else h


KINDS: dict[str, tuple[Callable[..., torch.Tensor], Any, str, str]] = {
    "closed": (by_lock, threading.Lock(), "what the lock in 'kept' holds", "cannot be opened"),
    "outside": (
        by_event,
        None,
        f"what the Event 'TOLD' in by_event ({__file__}:",
        "of a library's class",
    ),
    "large": (
        lambda net, h, x: h * net.kept[0],
        [1.0] * 20_001,
        "what the list in 'kept' holds",
        "more than 20,000 parts",
    ),
    "large array": (
        lambda net, h, x: h * float(net.kept[0]),
        np.ones(8_193),
        "what the ndarray in 'kept' holds",
        "larger than 65,536 bytes",
    ),
    "element": (
        lambda net, h, x: h * next(iter(net.kept)).value,
        {Rate()},
        "what the Rate in 'kept' holds",
        "an element of a set",
    ),
    "clock": (clocked, None, "what 'time.time' gives in clocked", "another each time"),
    "file": (from_file, None, "what 'open' gives in from_file", "another each time"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_guarded_is_printed(kind: str) -> None:
    between, kept, place, why = KINDS[kind]
    lines = [line for line in baked(Net(between, kept=kept)) if line.startswith(place)]
    assert len(lines) == 1
    assert why in lines[0]
    assert why in PAGE.read_text()


CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "closed": (lambda lock: lock.acquire(), lambda lock: lock.release()),
    "outside": (lambda _: TOLD.set(), lambda _: TOLD.clear()),
    "large": (lambda kept: kept.__setitem__(0, 2.0), lambda kept: kept.__setitem__(0, 1.0)),
    "large array": (lambda kept: kept.fill(2.0), lambda kept: kept.fill(1.0)),
    "element": (
        lambda kept: setattr(next(iter(kept)), "value", 2.0),
        lambda kept: setattr(next(iter(kept)), "value", 1.0),
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_it_is_true_of_what_is_printed(kind: str) -> None:
    """A change is not noticed: the list does not cry wolf."""
    between, kept, _, _ = KINDS[kind]
    change, put_back = CHANGES[kind]
    model = Net(between, kept=kept)
    decoupled = cut(model, X)
    change(kept)
    try:
        assert not torch.equal(decoupled(X), model(X))
    finally:
        put_back(kept)


GUARDED: dict[str, tuple[Callable[..., torch.Tensor], Any]] = {
    "list": (lambda net, h, x: h * net.kept[0], [1.0] * 100),
    "array": (lambda net, h, x: h * float(net.kept[0]), np.ones(8)),
    "object": (lambda net, h, x: h * net.kept.value, Rate()),
    "set of texts": (lambda net, h, x: h * len(net.kept), {"a", "b"}),
    "clock that is not asked": (lambda net, h, x: h * len(time.__name__), None),
}


@pytest.mark.parametrize("kind", GUARDED)
def test_what_is_guarded_is_not_printed(kind: str) -> None:
    """Negative control."""
    between, kept = GUARDED[kind]
    assert baked(Net(between, kept=kept)) == []


def test_code_that_is_not_read_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(lambda net, h, x: h * net.kept.value, kept=Rate())
    assert baked(model) == []
    monkeypatch.setattr(outside, "_MOST", 1)
    assert baked(model) == ["what code refers to beyond the first 1 functions"]
    assert "beyond the first 2,000 functions" in PAGE.read_text()


def test_installed_packages_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert baked(Net(clocked)) != []
    monkeypatch.setattr(outside, "owner_of", lambda _: "package")
    assert baked(Net(clocked)) == []


def test_the_page_names_the_limits() -> None:
    text = PAGE.read_text()
    for limit in (pictures._MOST_PARTS, pictures._LARGEST_ARRAY, outside._MOST):
        assert f"{limit:,}" in text


def test_export_lists_it_too() -> None:
    trace = trace_export(Net(by_lock, kept=threading.Lock()), (X,), {})
    assert trace.notes == ("baked in: what the lock in 'kept' holds: it cannot be opened",)

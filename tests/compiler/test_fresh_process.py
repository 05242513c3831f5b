"""Models traced in a process that has not called them: no traced integer is left in a cache, the
user's own next call is as if nothing had been traced, and the stages are right for other sizes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.passes.trace import symbols, tracing

from . import shape_caches
from .kit import notes

NAMES = [case.__name__ for case in shape_caches.CASES]
NO_KEY_KEPT = {"by_name_of_module"}  # nothing is cached; the name of a module is looked up


def fresh(*options: str) -> dict[str, Any]:
    """What became of each case in a new process."""
    command = [sys.executable, "-m", shape_caches.__name__, *options]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows: dict[str, Any] = json.loads(done.stdout)
    assert list(rows) == NAMES
    return rows


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    """As the library is."""
    return fresh()


@pytest.mark.parametrize("name", NAMES)
def test_caches_keyed_by_shapes(rows: dict[str, Any], name: str) -> None:
    row = rows[name]
    assert "refused" not in row
    assert (row["rung"], row["notes"]) == ("calls", [])  # recorded, and no submodule is opaque
    assert "TracedInt" not in row["kinds"] + row["kinds after"]
    assert ("int" in row["kinds after"]) == (name not in NO_KEY_KEPT)
    assert all(row["model"])  # the user's own next calls, other sizes too
    assert all(row["stages"])


def test_the_cases_see_integers_that_hash() -> None:
    """Negative control: hash and ``int`` of a traced integer are those of its value."""
    old = fresh("--hashable")
    spoilt = {name for name in NAMES if "TracedInt" in old[name]["kinds"]}
    broken = {name for name in NAMES if not all(old[name]["model"])}
    assert spoilt >= {"by_tuple", "by_width", "by_text", "by_number", "seen_before", "with_einops"}
    assert broken >= {"by_tuple", "by_width", "by_text", "by_number", "by_shape_in_a_submodule"}
    assert "itself fails" in old["with_einops"]["refused"]


class Asks(nn.Module):
    """Does something with sizes of its input between two layers."""

    def __init__(self, ask: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.ask = ask

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h * self.ask(h))


@pytest.mark.parametrize("ask", [hash, int, str, repr, "{}".format, lambda n: {n: 1}[n]])
def test_what_may_become_a_key_is_a_plain_integer(ask: Any) -> None:
    kinds = notes()

    def factor(h: Tensor) -> float:
        ask(h.shape[0])
        kinds.get().append(type(h.shape[0]))
        return 2.0

    trace = tracing.trace_calls(Asks(factor), (torch.randn(3, 4),), {})
    assert kinds.get() == [int]
    assert [value for _, value in trace.guards] == [3]


def test_a_size_keeps_its_place_where_nobody_asks() -> None:
    """The batch is not baked in because the width is asked for."""

    def factor(h: Tensor) -> float:
        return {4: 2.0}[h.shape[-1]] * h.new_ones(h.shape[0], 1).view(-1, 1)

    x = torch.randn(3, 4)
    decoupled = dni_fx.decouple(
        Asks(factor), ["a"], example_inputs=(x,), gradients="exact", check=False
    )
    (made,) = decoupled.graphs.variants
    assert [value for _, value in made.trace.guards] == [4]
    x = torch.randn(5, 4)
    assert torch.equal(decoupled(x), decoupled.model(x))
    assert len(decoupled.graphs.variants) == 1


def test_many_sizes_are_asked_for_a_bounded_number_of_times() -> None:
    calls = notes()

    def factor(h: Tensor) -> float:
        calls.get().append(None)
        return sum({h[:n].shape[0]: 1.0}[n] for n in range(1, 61))

    trace = tracing.trace_calls(Asks(factor), (torch.randn(64, 4),), {})
    assert trace.opaque == {}
    assert len(calls.get()) == symbols._MOST_PLAIN + 2


def test_an_error_of_the_model_is_its_own() -> None:
    """What is said of a size in an error does not hide that error."""

    def factor(h: Tensor) -> float:
        raise ValueError(f"{h.shape[0]} rows are too many")

    with pytest.raises(DecouplingError, match="ValueError: 3 rows are too many"):
        dni_fx.decouple(Asks(factor), ["a"], example_inputs=(torch.randn(3, 4),))


def test_after_the_recording_a_traced_integer_is_its_value() -> None:
    kept = notes()

    def factor(h: Tensor) -> float:
        kept.get().append(h.shape[0])
        return 2.0

    trace = tracing.trace_calls(Asks(factor), (torch.randn(3, 4),), {})
    count = len(trace.graph.nodes)
    (n,) = kept.get()
    assert (n == 3, n > 3, int(n), str(n), f"{n}", list(range(n))) == (
        True, False, 3, "3", "3", [0, 1, 2],
    )  # fmt: skip
    assert len(trace.graph.nodes) == count
    assert trace.guards == ()


KEPT = """
import gc
import torch
from torch import nn
import dni_fx
from dni_fx.passes.trace import routing

OFF
class Model(nn.Sequential):
    def forward(self, x):
        return torch.nn.functional.gelu(super().forward(x)) * 2

model = Model(*(nn.Linear(77, 77) for _ in range(3)))
x = torch.rand(5, 77)
decoupled = dni_fx.decouple(model, cuts=["0"], example_inputs=(x,), gradients="zero")
del x
gc.collect()
tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.device.type == "cpu"]
print(sum(t.shape == (5, 77) for t in tensors))
"""


@pytest.mark.parametrize(("off", "kept"), [("", False), ("routing._OVERRIDES = ()", True)])
def test_nothing_that_was_computed_while_tracing_is_kept(off: str, kept: bool) -> None:
    """Torch remembers the functions that it finds in its place; the control shows that it would."""
    command = [sys.executable, "-c", KEPT.replace("OFF", off)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 0) == kept

"""Random programs that try to fool the tracer, called in random ways, beside plain PyTorch: each
call equals it bit for bit, or raises one error of ours that names the place.

``DNI_FX_HOSTILE_PROGRAMS`` sets how many (500 by default); `make zoo-hostile` runs 20,000. A
failure prints the program and its seed: ``check(make_program(seed))`` runs it again.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from dni_fx.graphs import pipeline, variants
from dni_fx.passes.trace import held, modules, outside, traces
from dni_fx.passes.trace.exporting import trace_export

from ..models.hostile import FEATURES, make_program
from .hostile_runs import Wrong, check

COUNT = int(os.environ.get("DNI_FX_HOSTILE_PROGRAMS", "500"))
SHARD = 125
# the self-check costs as much as all the rest, and must not be the only guard
CHECKED = 4


@pytest.mark.matrix
@pytest.mark.parametrize("shard", range(-(-COUNT // SHARD)))
def test_hostile_programs(shard: int, record_property: Callable[[str, Any], None]) -> None:
    seen: Counter[str] = Counter()
    for seed in range(shard * SHARD, min(COUNT, (shard + 1) * SHARD)):
        seen[check(make_program(seed), seed % CHECKED == 0)] += 1
    for name, number in seen.items():
        record_property(name, number)
    assert seen["equal"] >= 0.6 * seen.total()


# ---- negative controls ---------------------------------------------------------------------------

SEEDS = 24


def named(*names: str) -> Any:
    return tuple(f for name in names for f in FEATURES if f.name == name)


def is_found(*names: str) -> bool:
    """Whether some program with these features goes wrong."""
    for seed in range(SEEDS):
        try:
            check(make_program(seed, named(*names)), self_check=False)
        except Wrong:
            return True
    return False


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _without_guards(*args: Any, **kwargs: Any) -> Any:
    return dataclasses.replace(trace_export(*args, **kwargs), held=())


def _for_all_shapes(*args: Any, **kwargs: Any) -> Any:
    return dataclasses.replace(trace_export(*args, **kwargs), rung="calls")


def _kinds_alone(leaves: Any) -> Any:
    return tuple((t.dtype, t.dim(), t.layout, t.requires_grad) for t in leaves)


CONTROLS: dict[str, tuple[Any, str, Any, tuple[str, ...]]] = {
    "attributes": (held.Reads, "attribute", _nothing, ("number",)),
    "contents of objects": (held, "picture", lambda value, *_: (type(value),), ("object",)),
    "globals": (outside.Outside, "function", _nothing, ("global",)),
    "closures": (outside.Outside, "held", _nothing, ("closure",)),
    "hooks": (held, "_character", _nothing, ("hook",)),
    "modes of torch": (held.Reads, "mode", _nothing, ("grad mode",)),
    "modes of modules": (held.Reads, "training", _nothing, ("mode of a child",)),
    "strides": (variants, "layouts_of", lambda leaves: [t.shape for t in leaves], ("stride",)),
    "values": (variants, "values_hold", lambda trace, leaves: True, ("all",)),
    "sizes": (variants, "guards_hold", lambda trace, leaves: True, ("size",)),
    "shapes that export saw": (
        pipeline,
        "trace_export",
        _for_all_shapes,
        ("size", "old constructor"),
    ),
    "what export reads": (pipeline, "trace_export", _without_guards, ("number", "old constructor")),
    "which inputs are one": (variants, "kinds_of", _kinds_alone, ("one tensor twice",)),
    "identities": (traces.Trace, "is_same_graph", lambda *_: True, ("two functions of one name",)),
    "what a forward keeps": (modules.Visits, "_check_changes", _nothing, ("counter",)),
}


@pytest.mark.matrix
@pytest.mark.parametrize("kind", CONTROLS)
def test_a_guard_that_is_switched_off_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, stand_in, features = CONTROLS[kind]
    assert not is_found(*features)
    monkeypatch.setattr(owner, name, stand_in)
    assert is_found(*features)


def test_programs_and_calls_repeat() -> None:
    assert make_program(7).source == make_program(7).source

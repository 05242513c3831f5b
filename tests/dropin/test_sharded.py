"""FSDP inside and around a drop-in: every stage trains, or one error before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..helpers.processes import once
from .scripts.sharded import WAYS


@pytest.fixture
def found(tmp_path_factory: Any) -> dict[str, Any]:
    """How each way of sharding ended."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared if shared.name.startswith("pytest") else shared.parent
    folder = once(Path(shared) / "sharded", ["-m", "tests.dropin.scripts.sharded"])
    lines = (folder / "output.txt").read_text().splitlines()
    line = next((text for text in lines if text.startswith("{")), None)
    assert line is not None, "\n".join(lines)
    result: dict[str, Any] = json.loads(line)
    return result


@pytest.mark.parametrize("way", WAYS)
def test_a_predicting_drop_in_is_refused_before_its_first_step(
    way: str, found: dict[str, Any]
) -> None:
    assert "sharded by FSDP" in found[f"linear: {way}"]
    assert "dni_fx.distributed" in found[f"linear: {way}"]


@pytest.mark.parametrize("way", [w for w in WAYS if not w.startswith("FSDP")])
def test_an_exact_drop_in_is_sharded_like_its_model(way: str, found: dict[str, Any]) -> None:
    moved = found[f"exact: {way}"]
    assert moved == pytest.approx(found["exact: none"])
    assert all(moved)


def test_a_sharded_model_is_not_decoupled(found: dict[str, Any]) -> None:
    assert "submodule '2' is sharded by FSDP" in found["decouple"]

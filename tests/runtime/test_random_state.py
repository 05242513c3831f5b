"""Random states: one pair of functions reads and sets them, devices' too, and all savers use it."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dni_fx
from dni_fx import distributed
from dni_fx.passes.trace.state import preserved_rng, restored, rng_state, set_rng_state


class Device:
    """An accelerator of two devices, of which only the random states are there."""

    def __init__(self, started: bool = True) -> None:
        self.states = [torch.tensor([7], dtype=torch.uint8), torch.tensor([8], dtype=torch.uint8)]
        self.started = started

    def is_initialized(self) -> bool:
        return self.started

    def device_count(self) -> int:
        return len(self.states)

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        assert self.started, "asked before it was used"
        return self.states[device.index].clone()

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        self.states[device.index] = state.clone()

    def draw(self) -> None:
        self.states = [s + 10 for s in self.states]

    @property
    def numbers(self) -> list[int]:
        return [int(s) for s in self.states]


def plug_in(device: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: plugged)
    plugged = device
    return device


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return plug_in(Device(), monkeypatch)


def draws() -> list[float]:
    return [float(torch.rand(())), random.random(), float(np.random.rand())]  # noqa: NPY002


def trainer(make: Any = dni_fx.Trainer) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    decoupled = dni_fx.decouple(model, ["0"], example_inputs=(x,), context=dni_fx.one_hot(3))
    made = make(decoupled, F.cross_entropy, optimizer=lambda p: torch.optim.Adam(p, 0.01))
    made.step(x, target=y)
    return made


def test_every_generator_is_put_back() -> None:
    state = rng_state()
    first = draws()
    assert all(a != b for a, b in zip(draws(), first, strict=True))  # the control
    set_rng_state(state)
    assert draws() == first
    set_rng_state(state)  # a state may be used again
    assert draws() == first


def test_a_state_is_saved_as_plain_values() -> None:
    file = io.BytesIO()
    torch.save(rng_state(), file)
    first = draws()
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    loaded["python"] = list(loaded["python"])
    set_rng_state(loaded)
    assert draws() == first


def test_devices_are_put_back(device: Device) -> None:
    state = rng_state()
    put_back = preserved_rng()
    device.draw()
    assert device.numbers == [17, 18]
    set_rng_state(state)
    assert device.numbers == [7, 8]
    with restored(nn.Linear(1, 1)):
        device.draw()
    assert device.numbers == [7, 8]
    device.draw()
    put_back()
    assert device.numbers == [7, 8]


def test_what_a_state_lacks_is_left_alone(device: Device) -> None:
    state = rng_state()
    device.draw()
    set_rng_state({n: state[n] for n in ("torch", "python")})
    assert device.numbers == [17, 18]
    set_rng_state(state | {"devices": {"xpu": state["devices"]["cuda"]}})
    assert device.numbers == [17, 18]
    set_rng_state(state | {"devices": {"cuda": state["devices"]["cuda"][:1]}})
    assert device.numbers == [7, 18]


def test_a_device_that_nobody_used_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    device = plug_in(Device(started=False), monkeypatch)
    assert rng_state()["devices"] == {}
    device.started = True
    saved = rng_state()
    device.draw()
    device.started = False  # as in a fresh process, before the model is moved there
    set_rng_state(saved)
    assert device.numbers == [7, 8]


def test_a_trainer_carries_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    first, device = trainer(), plug_in(Device(), monkeypatch)
    state = first.state_dict()
    device.draw()
    first.load_state_dict(state)
    assert device.numbers == [7, 8]


def test_states_of_before_still_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of trainers that saved ``cuda``, or nothing of it."""
    first, device = trainer(), plug_in(Device(), monkeypatch)
    state = first.state_dict()
    old = {n: state["rng"][n] for n in ("torch", "python")}
    wanted = draws()
    device.draw()
    first.load_state_dict(state | {"rng": old | {"cuda": []}})
    assert draws()[:2] == wanted[:2]
    assert device.numbers == [17, 18]
    first.load_state_dict(state | {"rng": old | {"cuda": state["rng"]["devices"]["cuda"]}})
    assert device.numbers == [7, 8]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_carries_the_devices(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = trainer(distributed.Trainer), trainer(distributed.Trainer)
    device = plug_in(Device(), monkeypatch)
    with first:
        first.save(tmp_path, extra="mine", asynchronous=asynchronous)
        wanted = draws()
        device.draw()
    with second:
        assert device.numbers == [17, 18]
        assert second.resume(tmp_path) == "mine"
        assert device.numbers == [7, 8]
        assert draws() == wanted


def test_a_checkpoint_of_before_still_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It held torch's and Python's states alone."""

    def old() -> dict[str, Any]:
        state = rng_state()
        return {"torch": state["torch"], "python": state["python"], "devices": {}}

    with trainer(distributed.Trainer) as first:
        device = plug_in(Device(), monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr("dni_fx.parallel.checkpoints.rng_state", old)
            first.save(tmp_path)
        wanted = draws()
        device.draw()
        first.resume(tmp_path)
        assert draws()[:2] == wanted[:2]
        assert device.numbers == [17, 18]

"""What modules that are called as one node keep, where the code around them writes or reads it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.passes.trace.keepers import Keepers

from ..helpers.comparing import assert_bits_equal


class Helper:
    """Holds a number for a cell."""

    def __init__(self) -> None:
        self.gain = 1.0


class Cell(nn.Module):
    """Keeps a membrane and more from call to call, and so is called as one node."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("membrane", torch.zeros(0), persistent=False)
        self.trace = torch.zeros(1, 8)
        self.memories: dict[str, Any] = {"v": 0.0}
        self.losses: list[Tensor] = []
        self.slots: list[Any] = [0.0, 0.0]
        self.helper, self.rate, self.starts, self.calls = Helper(), 1.0, False, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.membrane.shape != x.shape:
            self.membrane = torch.zeros_like(x)
        if self.starts:
            self.membrane, self.starts = self.membrane * 0.25, False
        h = torch.tanh(self.layer(x) + 0.5 * self.membrane) * self.helper.gain * self.rate
        h = h + 0.1 * self.trace + self.memories["v"] + self.slots[0] + len(self.losses)
        if hasattr(self, "extra"):
            h = h + self.extra
            del self.extra
        self.membrane, self.memories["v"], self.slots[0] = h, h * 0.5, h * 0.25
        self.trace = self.trace + h.mean(0)
        self.losses.append(h.square().mean())
        self.calls += 1
        return h

    def reset(self) -> None:
        self.membrane, self.trace = torch.zeros_like(self.membrane), torch.zeros(1, 8)
        self.memories["v"], self.slots[0] = 0.0, 0.0
        self.losses.clear()


Act = Callable[[Cell, Tensor], Any]


def gain(cell: Cell, h: Tensor) -> None:
    cell.reset()
    cell.helper.gain = 0.5


def rate(cell: Cell, h: Tensor) -> None:
    cell.reset()
    cell.rate = 0.5


def flag(cell: Cell, h: Tensor) -> None:
    """What the call takes back, so that nothing has changed in the end."""
    cell.reset()
    cell.membrane, cell.starts = torch.ones_like(h), True


def computed(cell: Cell, h: Tensor) -> None:
    cell.reset()
    cell.membrane = h * 2


def entry(cell: Cell, h: Tensor) -> None:
    cell.reset()
    cell.memories["v"] = h.mean(0)


def containers(cell: Cell, h: Tensor) -> None:
    cell.reset()
    cell.memories, cell.slots = {"v": h.mean(0)}, [h, 1.0]


def in_place(cell: Cell, h: Tensor) -> None:
    cell.reset()
    cell.membrane = torch.ones_like(h)
    cell.membrane.mul_(0.5)


def extra(cell: Cell, h: Tensor) -> None:
    cell.reset()
    cell.extra = h.mean()


BEFORE: dict[str, Act] = {
    "reset": lambda cell, h: cell.reset(),
    **{act.__name__: act for act in (gain, rate, flag, computed, entry, containers, in_place)},
    "extra": extra,
}


def lost_losses(cell: Cell, h: Tensor) -> Any:
    found = sum(cell.losses)
    cell.reset()
    return found


AFTER: dict[str, Act] = {
    "buffer": lambda cell, h: (cell.membrane * 0.5, cell.reset())[0],
    "attribute": lambda cell, h: (cell.trace * 0.5, cell.reset())[0],
    "entry": lambda cell, h: (cell.memories["v"] + 1, cell.reset())[0],
    "losses": lost_losses,
}


class Around(nn.Module):
    """Does something to what a cell keeps, before it is called or after."""

    def __init__(self, before: Act | None = None, after: Act | None = None) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.cell, self.before, self.after = Cell(), before, after

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.before is not None:
            self.before(self.cell, h)
        h = self.cell(self.cell(h))
        if self.after is not None:
            h = h + self.after(self.cell, h)
        return self.last(torch.tanh(self.second(h)))


def made(**acts: Act) -> Around:
    torch.manual_seed(0)
    return Around(**acts)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = (4, 4, 3, 4, 3)  # another batch size, too
    return [
        (torch.randn(n, 6, generator=generator), torch.randn(n, 3, generator=generator))
        for n in sizes
    ]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1)


def plainly(model: nn.Module) -> list[Tensor]:
    optimizer, found = sgd(model.parameters()), []
    for x, y in batches():
        optimizer.zero_grad()
        out = model(x)
        F.mse_loss(out, y).backward()
        optimizer.step()
        found += [out.detach(), *(p.detach().clone() for p in model.parameters())]
    return found


def in_stages(model: nn.Module, gradients: str = "exact") -> list[Tensor]:
    cuts, example = ["first", "second"], batches()[0][:1]
    stages = dni_fx.decouple(model, cuts, example_inputs=example, gradients=gradients)
    trainer, found = dni_fx.Trainer(stages, F.mse_loss, optimizer=sgd), []
    for x, y in batches():
        out = trainer.step(x, target=y).outputs
        found += [out.detach(), *(p.detach().clone() for p in model.parameters())]
    return found


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for number, (one, right) in enumerate(zip(got, expected, strict=True)):
        assert_bits_equal(one, right, f"value {number}")


@pytest.mark.parametrize("act", BEFORE)
def test_what_is_written_before_the_call_is_written_in_every_call(act: str) -> None:
    model = made(before=BEFORE[act])
    expected = plainly(copy.deepcopy(model))
    assert_same(in_stages(model), expected)


@pytest.mark.parametrize("act", AFTER)
def test_what_is_read_after_the_call_is_read_in_every_call(act: str) -> None:
    model = made(before=BEFORE["reset"], after=AFTER[act])
    expected = plainly(copy.deepcopy(model))
    assert_same(in_stages(model), expected)


@pytest.mark.parametrize("act", ["reset", "rate", "flag", "entry", "extra"])
def test_control_not_written_it_is_missed(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keepers, "changes", lambda *_: iter(()))
    model = made(before=BEFORE[act])
    expected = plainly(copy.deepcopy(model))
    with pytest.raises((AssertionError, dni_fx.DecouplingError)):
        assert_same(in_stages(model), expected)


def test_an_inner_module_does_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), made(before=BEFORE["entry"]), nn.Linear(3, 3))
    expected = plainly(copy.deepcopy(model))
    x = batches()[0][0]
    stages = dni_fx.decouple(model, ["1.first", "1.second"], example_inputs=(x,), gradients="zero")
    assert "1.cell" in str(stages.plan)
    assert_bits_equal(stages(x), expected[0], "output")


class Listed(Around):
    """Has its cells in a list, which nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        del self.cell
        self.cells = nn.ModuleList([Cell(), Cell()])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for cell in self.cells:
            cell.reset()
        for cell in self.cells:
            h = cell(h) + cell.membrane
        return self.last(torch.tanh(self.second(h)))


def test_modules_of_a_list_are_told_apart() -> None:
    torch.manual_seed(0)
    model = Listed()
    expected = plainly(copy.deepcopy(model))
    points = dni_fx.list_cut_points(model, batches()[0][:1])
    assert next(point for point in points if point.name == "cells.0").legal
    assert_same(in_stages(model), expected)


class Rates(nn.Module):
    """Sets what a layer of torch's keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.norm.momentum = 0.5
        return self.last(torch.tanh(self.norm(h)))


def test_a_layer_of_torchs_is_told_in_every_call() -> None:
    torch.manual_seed(0)
    model = Rates()
    plain = copy.deepcopy(model)
    expected = plainly(plain)
    stages = dni_fx.decouple(model, ["first"], example_inputs=batches()[0][:1], gradients="exact")
    trainer = dni_fx.Trainer(stages, F.mse_loss, optimizer=sgd)
    for number, (x, y) in enumerate(batches()):
        model.norm.momentum = 0.1 * number
        assert_bits_equal(trainer.step(x, target=y).outputs, expected[7 * number], f"{number}")
    assert_bits_equal(model.norm.running_var, plain.norm.running_var, "statistics")


def test_calls_that_share_a_state_stay_in_one_stage() -> None:
    model = made(before=BEFORE["reset"])
    points = dni_fx.list_cut_points(model, batches()[0][:1])
    assert next(p for p in points if p.name == "first").legal
    point = next(p for p in points if p.name == "cell@0")
    assert not point.legal
    assert "'cell' keeps something" in point.reason


def test_the_plan_is_the_same_whatever_the_cells_keep() -> None:
    model, example = made(before=BEFORE["reset"]), batches()[0][:1]
    fresh = dni_fx.decouple(model, ["first"], example_inputs=example, gradients="zero")
    model(*example)
    again = dni_fx.decouple(model, fresh.plan, example_inputs=example, gradients="zero")
    assert again.plan.digest == fresh.plan.digest


def number(cell: Cell, h: Tensor) -> Tensor:
    return h * cell.calls


def test_a_list_that_grows_in_every_call_is_an_error_and_no_wrong_number() -> None:
    model = made(after=lambda cell, h: h * len(cell.losses))
    x = batches()[0][0]
    expected = copy.deepcopy(model)(x)
    stages = dni_fx.decouple(model, ["first"], example_inputs=(x,), gradients="zero")
    assert_bits_equal(stages(x), expected, "output")
    with pytest.raises(dni_fx.DecouplingError, match=r"losses' returns 4 values here, but 2"):
        stages(x)


def put_object(cell: Cell, h: Tensor) -> None:
    cell.helper = Helper()


def old(cell: Cell, h: Tensor) -> Tensor:
    return KEPT.pop() + h


KEPT: list[Tensor] = []


@pytest.mark.parametrize(
    ("acts", "reason"),
    [
        ({"after": number}, "reads 'calls' of 'cell'.*after it was called"),
        ({"before": put_object}, "puts a Helper into 'helper' of 'cell'"),
        ({"before": lambda cell, h: KEPT.append(cell.trace), "after": old}, "replaced since"),
    ],
)
def test_what_no_graph_can_do_is_refused(acts: Any, reason: str) -> None:
    model = made(**acts)
    names = itertools.chain(*(vars(m) for m in model.modules()))
    before = set(names)
    with pytest.raises(dni_fx.DecouplingError, match=f"(?s){reason}"):
        dni_fx.decouple(model, ["first"], example_inputs=batches()[0][:1])
    assert set(itertools.chain(*(vars(m) for m in model.modules()))) == before
    assert model.cell.losses == []

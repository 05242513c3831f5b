"""Losses that read more than the output: exact in turn, refused where stages train at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.schedules import Threads

from ..helpers.comparing import assert_bits_equal
from ..helpers.training import batch
from ..models.small import SKIPS
from .kit import stage_threads, train, trainer_of

Loss = Callable[[Tensor, Tensor], Tensor]


def weight_penalty(model: nn.Module) -> Loss:
    return lambda o, y: F.cross_entropy(o, y) + sum(p.pow(2).sum() for p in model.parameters())


def one_weight(model: nn.Module) -> Loss:
    return lambda o, y: F.cross_entropy(o, y) + model.get_parameter("b.weight").abs().sum()


def second_pass(model: nn.Module) -> Loss:
    return lambda o, y: F.cross_entropy(o, y) + F.mse_loss(model(batch(9)[0][: len(o)]), o)


def teacher(model: nn.Module) -> Loss:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            other = model(batch(9)[0][: len(output)])
        return F.cross_entropy(output, target) + F.mse_loss(output, other)

    return loss


def data_of_weights(model: nn.Module) -> Loss:
    weight = model.get_parameter("b.weight")
    return lambda o, y: F.cross_entropy(o, y) + (weight.data.norm() * o).mean()


def late_penalty(model: nn.Module) -> Loss:
    """From the fifth batch on."""
    calls: list[int] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        value = F.cross_entropy(output, target)
        return value if len(calls) < 5 else value + model.get_parameter("b.weight").pow(2).sum()

    return loss


def late_teacher(model: nn.Module) -> Loss:
    """The same without a gradient."""
    calls: list[int] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        value = F.cross_entropy(output, target)
        if len(calls) < 5:
            return value
        with torch.no_grad():
            other = model(batch(9)[0][: len(output)])
        return value + F.mse_loss(output, other)

    return loss


def late_norm(model: nn.Module) -> Loss:
    """By way of another tensor, in a list, in the last of all functions."""
    weight, calls = model.get_parameter("b.weight"), list[int]()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        value = F.cross_entropy(output, target)
        with torch.no_grad():
            norms = torch._foreach_norm([weight.data]) if len(calls) > 4 else [value]
        return value * (1 + norms[0].detach() * 0)

    return loss


def own_stage(model: nn.Module) -> Loss:
    """The control: parameters of the last stage, sizes and devices of all."""
    weight, rows = model.get_parameter("d.weight"), len(model.get_parameter("b.weight"))
    return lambda o, y: F.cross_entropy(o, y.to(weight.device)) + weight.pow(2).sum() / rows


READING = [
    weight_penalty, one_weight, second_pass, teacher, data_of_weights, late_penalty, late_teacher,
    late_norm,
]  # fmt: skip


@pytest.mark.parametrize("kind", READING)
def test_on_threads_it_is_refused_by_the_parameters_name(kind: Callable[[nn.Module], Loss]) -> None:
    model = SKIPS.build()
    trainer = trainer_of(Threads(), model=model)
    trainer.loss = kind(model)
    with pytest.raises(DecouplingError, match=r"stage_3, step \d.* parameter '[\w.]+' of stage_\d"):
        train(trainer, 24)
    assert stage_threads() == []
    trainer.loss = F.cross_entropy
    train(trainer, 4)


def test_on_threads_it_may_read_its_own_stage() -> None:
    found = []
    for schedule in (Threads(staleness=0), "sequential"):
        model = SKIPS.build()
        trainer = trainer_of(schedule, model=model)
        trainer.loss = own_stage(model)
        train(trainer, 6)
        found.append(model.state_dict())
    assert_bits_equal(found[0], found[1], "a penalty on the last stage")


@pytest.mark.parametrize(
    "kind",
    [
        weight_penalty, one_weight, second_pass, teacher, late_penalty, late_teacher, late_norm,
    ],
)  # fmt: skip
def test_in_turn_it_is_exact(kind: Callable[[nn.Module], Loss]) -> None:
    model, plain = SKIPS.build(), SKIPS.build()
    trainer = dni_fx.Trainer(
        dni_fx.decouple(model, ["a", "b"], example_inputs=(batch(0)[0],), gradients="exact"),
        kind(model),
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
    )
    optimizer, loss = torch.optim.SGD(plain.parameters(), 0.1), kind(plain)
    for step in range(7):
        x, y = batch(step)
        trainer.step(x, target=y)
        optimizer.zero_grad()
        loss(plain(x), y).backward()
        optimizer.step()
    wrong = [
        n
        for n, p in model.named_parameters()
        if not torch.allclose(p, plain.get_parameter(n), rtol=1e-6, atol=1e-7)
    ]
    assert wrong == []


class Balanced(nn.Module):
    """Keeps a term of the loss."""

    def __init__(self, keep: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.g, self.keep, self.aux = nn.Linear(6, 6), keep, None

    def forward(self, x: Tensor) -> Tensor:
        h = self.g(x)
        self.keep(self, h.pow(2).mean())
        return h


def in_an_attribute(module: Any, value: Tensor) -> None:
    module.aux = value


def in_a_list(module: Any, value: Tensor) -> None:
    module.aux = [value]


def in_a_dict(module: Any, value: Tensor) -> None:
    module.aux = {"balance": value}


def kept_loss(model: Any) -> Callable[[Tensor, Any], Tensor]:
    def loss(output: Tensor, _: Any) -> Tensor:
        (kept,) = tree_leaves(model[1].aux)
        return output.pow(2).mean() + kept

    return loss


@pytest.mark.parametrize("keep", [in_an_attribute, in_a_list, in_a_dict])
@pytest.mark.parametrize("gradients", ["exact", "linear", "zero", "delayed", "corrected", "mix"])
@pytest.mark.parametrize("cut", ["0", "1"])
def test_a_term_that_a_module_keeps(cut: str, gradients: str, keep: Any) -> None:
    """In the stage of the loss it is exact; behind a cut it is refused by module and attribute."""
    x = torch.randn(4, 6)
    model = nn.Sequential(nn.Linear(6, 6), Balanced(keep), nn.Tanh(), nn.Linear(6, 3))
    plain = nn.Sequential(nn.Linear(6, 6), Balanced(keep), nn.Tanh(), nn.Linear(6, 3))
    plain.load_state_dict(model.state_dict())
    model(x)
    trainer = dni_fx.Trainer(
        dni_fx.decouple(model, [cut], example_inputs=(x,), gradients=gradients),
        kept_loss(model),
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
    )
    before = {n: p.clone() for n, p in model.named_parameters()}
    if cut == "0":
        trainer.step(x)
        kept_loss(plain)(plain(x), None).backward()
        assert plain[1].g.weight.grad is not None
        stepped = plain[1].g.weight - 0.1 * plain[1].g.weight.grad
        assert torch.allclose(model[1].g.weight, stepped, atol=1e-7)
        return
    with pytest.raises(DecouplingError, match="attribute 'aux' of module '1'"):
        trainer.step(x)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_term_that_a_hook_keeps() -> None:
    """No attribute to name, but no error of torch's either."""
    x, kept = torch.randn(4, 6), []
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].register_forward_hook(lambda *a: kept.append(a[2]))
    trainer = dni_fx.Trainer(
        dni_fx.decouple(model, ["1"], example_inputs=(x,), gradients="exact"),
        lambda o, _: o.pow(2).mean() + kept[-1].pow(2).mean(),
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
    )
    with pytest.raises(DecouplingError, match="another backward has used up"):
        trainer.step(x)

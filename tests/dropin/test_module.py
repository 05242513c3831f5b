"""The drop-in is the model: its class, names, calls, modes, types and devices."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx

from ..helpers.comparing import graph_of
from ..helpers.optimisers import sgd
from ..helpers.training import batch, decoupled_of
from ..models.small import Chain
from .kit import decoupled_chain, loop, made, state


def test_class_signature_keys_and_parameters() -> None:
    decoupled = decoupled_chain()
    model, m = decoupled.model, decoupled.as_module()
    assert isinstance(m, Chain)
    assert type(m).__name__ == "Chain"  # libraries go by the name of the class
    assert "DecoupledChain" in str(type(m))
    assert inspect.signature(m.forward) == inspect.signature(model.forward)
    assert list(m.state_dict()) == list(model.state_dict())
    assert all(p is q for p, q in zip(m.parameters(), model.parameters(), strict=True))
    assert [n for n, _ in m.named_modules()] == [n for n, _ in model.named_modules()]
    assert "linear.weight" in dict(m[0].named_parameters())
    assert len(m) == 4
    other = Chain()
    m.load_state_dict(other.state_dict())
    assert torch.equal(model[3].weight, other[3].weight)


def test_a_forward_put_in_its_place_is_not_the_models() -> None:
    decoupled, (x, y) = decoupled_chain("local"), batch(0)
    m, plain = decoupled.as_module(), decoupled.model
    calls: list[Any] = []

    def wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return function(module, *args, **kwargs)

        return forward

    assert not hasattr(
        m.forward, "__wrapped__"
    )  # libraries take off what they put on down to the first without it
    m.before = m.forward  # as accelerate keeps it
    m.forward = MethodType(wrapper(m.forward.__func__), m)
    loop(m, 1)
    assert calls == [m]
    plain(x)
    assert calls == [m]
    c = copy.deepcopy(m)
    assert c.before.__self__ is c
    loop(c, 1)
    assert calls == [m, c]
    del m.forward
    loop(m, 1, 1)
    assert calls == [m, c]
    with m.context(y):
        assert "StageFunction" in graph_of(m(x))


def test_a_piece_is_of_the_plain_class() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    m: Any = decoupled_of("zero", model=model, cuts=["0"]).as_module()
    assert type(m[:2]) is nn.Sequential
    assert m[:2](batch(0)[0]).shape == (8, 6)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        by: float = 1.0,
    ) -> Any:
        h = F.relu(self.first(x))
        if scale is not None:
            h = h * scale
        logits = self.last(F.relu(self.second(h)) * by)
        return {
            "logits": logits,
            "loss": None if labels is None else F.cross_entropy(logits, labels),
        }


def test_keyword_inputs_dict_outputs_and_a_context_from_the_arguments() -> None:
    def decoupled() -> dni_fx.Decoupled:
        torch.manual_seed(0)
        x, y = batch(0)
        known = {"labels": y, "by": 2.0}
        cuts = ["first", "second"]
        return decoupled_of(
            "local", model=Keywords(), cuts=cuts, example_inputs=(x,), example_kwargs=known
        )

    m: Any = decoupled().as_module(context=lambda *_, labels, **__: labels)
    optimizer, other = sgd(m.parameters()), decoupled()
    trainer = dni_fx.Trainer(other, lambda out, _: out["loss"], optimizer=sgd)
    for step in range(3):
        x, y = batch(step)
        output = m(x, labels=y, by=2.0)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        report = trainer.step(x, labels=y, by=2.0, target=y)
        assert torch.equal(output["logits"], report.outputs["logits"])
    x, y = batch(9)
    assert m(x, torch.ones(8, 6), labels=y, by=2.0)["logits"].shape == (
        8,
        3,
    )  # another kind of call
    with m.context(1 - y.clamp(max=1)):  # goes before the argument
        m(x, labels=y, by=2.0)["loss"].backward()


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class Answers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> Answer:
        h = F.relu(self.first(x + y))
        return Answer(self.last(F.relu(self.second(h))), h)


def test_a_dataclass_and_an_output_of_an_early_stage() -> None:
    torch.manual_seed(0)
    x, y = batch(0)
    m: Any = decoupled_of(
        "zero", model=Answers(), cuts=["first", "second"], example_inputs=(x, x)
    ).as_module()
    answer = m(x, x)
    assert isinstance(answer, Answer)
    F.cross_entropy(answer.logits, y).backward()
    assert not m.first.weight.grad.any()
    m.zero_grad()
    answer = m(x, x)
    answer.hidden.sum().backward()  # the early value's gradient is what the source is for
    assert m.last.weight.grad is None


def test_evaluation_and_no_grad_are_the_plain_model() -> None:
    m, x = made(dropout=0.5), batch(0)[0]
    plain = Chain(0.5)
    plain.load_state_dict(m.state_dict())
    m.eval()
    plain.eval()
    output = m(x)
    assert torch.equal(output, plain(x))
    assert "StageFunction" not in graph_of(output)
    output.sum().backward()
    assert m[0].linear.weight.grad is not None
    m.train()
    plain.train()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.manual_seed(3)
            a = m(x)
            torch.manual_seed(3)
            assert torch.equal(a, plain(x))
    assert torch.equal(m[0].norm.running_mean, plain[0].norm.running_mean)


def test_modes_of_nested_modules() -> None:
    decoupled = decoupled_chain(dropout=0.5)
    m: Any = decoupled.as_module()
    m[0].eval()  # frozen statistics and no dropout, in training
    before = m[0].norm.running_mean.clone()
    loop(m, 2)
    assert torch.equal(m[0].norm.running_mean, before)
    assert m[1].norm.running_mean.any()
    m.eval()
    assert not any(s.training for s in decoupled.synthesizers.modules())
    assert not decoupled.model.training
    m.train()
    assert m[0].training
    assert all(s.training for s in decoupled.synthesizers.modules())


@pytest.mark.parametrize("frozen", [[0], [1], [0, 1, 2], [3]])
def test_freezing(frozen: list[int]) -> None:
    m = made("local")
    for index in frozen:
        m[index].requires_grad_(False)
    before = state(m)
    loop(m, 2, optimizer=sgd(m.parameters()))
    after = m.state_dict()
    for name, parameter in m.named_parameters():
        if "linear.bias" not in name:  # batch norm takes it away
            assert torch.equal(after[name], before[name]) == (int(name[0]) in frozen), name
        assert (parameter.grad is None) == (int(name[0]) in frozen)


def test_all_frozen_and_thawed() -> None:
    m = made("local")
    m.requires_grad_(False)
    assert not m(batch(0)[0]).requires_grad
    m.requires_grad_(True)
    before = state(m)
    loop(m, 2)
    assert not torch.equal(m[0].linear.weight, before["0.linear.weight"])


@pytest.mark.parametrize("gradients", ["linear", "local", "stale"])
def test_to_another_type(gradients: str) -> None:
    decoupled = decoupled_chain(gradients)
    m: Any = decoupled.as_module()
    loop(m, 2)
    m.double()
    x, y = batch(5, dtype=torch.float64)
    with m.context(y):
        F.cross_entropy(m(x), y).backward()
    assert m[0].linear.weight.grad.dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in decoupled.synthesizers.parameters())
    m.zero_grad()
    m.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in decoupled.synthesizers.parameters())
    with m.context(y):
        F.cross_entropy(m(x.bfloat16()), y).backward()
    assert m[0].linear.weight.grad.dtype == torch.bfloat16
    assert m[0].linear.weight.grad.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("gradients", ["linear", "local"])
def test_on_a_gpu(gradients: str) -> None:
    decoupled, units = decoupled_chain(gradients), [1.0]
    m: Any = decoupled.as_module(unit=lambda: units[-1])
    loop(m, 2)
    m.to("cuda")
    assert all(p.is_cuda for p in decoupled.synthesizers.parameters())
    optimizer, scaler = sgd(m.parameters()), torch.amp.GradScaler("cuda")
    before = state(m)
    for step in range(3):
        units.append(scaler.get_scale())
        x, y = (t.cuda() for t in batch(step))
        with torch.autocast("cuda", torch.float16), m.context(y):
            loss = F.cross_entropy(m(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    now = state(m)
    assert all(not torch.equal(now[n], before[n]) for n in now if n.endswith("linear.weight"))

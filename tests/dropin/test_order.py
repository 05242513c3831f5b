"""What users do in another order: zero_grad anywhere, two forwards, a backward too many, hooks."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dni_fx.errors import DecouplingError

from ..helpers.optimisers import sgd
from ..helpers.training import batch
from ..models.small import Chain
from .kit import decoupled_chain, gradients_of, loop, made, same, state


def test_zero_grad_anywhere() -> None:
    found = []
    for place in range(3):
        m = made()
        optimizer = sgd(m.parameters())
        for step in range(3):
            x, y = batch(step)
            if place == 0:
                optimizer.zero_grad()
            with m.context(y):
                output = m(x)
            if place == 1:
                m.zero_grad()
            F.cross_entropy(output, y).backward()
            optimizer.step()
            if place == 2:
                optimizer.zero_grad(set_to_none=False)
        found.append(state(m))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize("gradients", ["linear", "local"])
def test_two_forwards_before_a_backward(gradients: str) -> None:
    m, (x, y), (v, w) = made(gradients, 0.3), batch(0), batch(1)
    for step in range(2, 5):
        loop(m, 1, step)
    other = copy.deepcopy(m)
    torch.manual_seed(0)
    with m.context(y):
        first = m(x)
    with m.context(w):
        second = m(v)
    m.zero_grad()
    (F.cross_entropy(first, y) + F.cross_entropy(second, w)).backward()
    torch.manual_seed(0)
    start, saved = state(other), copy.deepcopy(other.synthesizer_state_dict())
    other.zero_grad()
    for inputs, labels in ((x, y), (v, w)):  # each from the same sources
        other.load_synthesizer_state_dict(saved)
        with other.context(labels):
            F.cross_entropy(other(inputs), labels).backward()
    total = {n: g for n, g in gradients_of(other).items() if g is not None}
    for name, parameter in m.named_parameters():
        torch.testing.assert_close(parameter.grad, total[name])
    assert not same({n: t for n, t in state(m).items() if "sources" in n}, start)


@pytest.mark.parametrize("gradients", ["linear", "local", "stale", "mlp"])
def test_a_forward_without_a_backward_changes_buffers_only(gradients: str) -> None:
    decoupled = decoupled_chain(gradients)
    m: Any = decoupled.as_module()
    loop(m, 2)
    before = {n: t for n, t in state(m).items() if "running" not in n and "tracked" not in n}
    x, y = batch(7)
    m.zero_grad()
    with m.context(y):
        m(x)
    after = state(m)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert all(p.grad is None for p in decoupled.parameters())
    loop(m, 1, 3)


class Held:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_nothing_but_the_last_stage_is_kept() -> None:
    refs: list[weakref.ref[Held]] = []

    def pack(tensor: Tensor) -> Held:
        held = Held(tensor.detach())
        refs.append(weakref.ref(held))
        return held

    def kept(m: Any, x: Tensor) -> tuple[int, Any]:
        refs.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            output = m(x)
        return sum(r() is not None for r in refs), output

    x, y = batch(0)
    gc.disable()
    try:
        for gradients in ("linear", "mlp", "local", "zero"):
            m = made(gradients)
            last, _ = kept(nn.Linear(6, 3), x.clone().requires_grad_())
            with m.context(y):
                count, output = kept(m, x)
            assert count == last
            assert len(refs) > 10
            del output  # never differentiated
            assert not any(r() is not None for r in refs)
        assert kept(Chain(), x)[0] > 10
    finally:
        gc.enable()


def test_backward_twice() -> None:
    m, (x, y) = made(), batch(0)
    with m.context(y):
        loss = F.cross_entropy(m(x), y)
    loss.backward(retain_graph=True)
    before = state(m)
    with pytest.raises(DecouplingError, match="handed over once"):
        loss.backward()
    assert same(state(m), before)
    with m.context(y):
        loss = F.cross_entropy(m(x), y)
    (gradient,) = torch.autograd.grad(loss, [m[0].linear.weight])  # the other way to ask
    assert gradient.shape == (6, 6)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
def test_no_second_derivatives() -> None:
    m, (x, y) = made(), batch(0)
    with m.context(y):
        loss = F.cross_entropy(m(x), y)
    (gradient,) = torch.autograd.grad(loss, [m[3].weight], create_graph=True, retain_graph=True)
    gradient.sum().backward(inputs=[m[3].weight])  # the last stage is autograd's own
    with m.context(y):
        loss = F.cross_entropy(m(x), y)
    before = state(m)
    with pytest.raises(DecouplingError, match=r"decoupled\.model"):
        torch.autograd.grad(loss, [m[0].linear.weight], create_graph=True)
    assert same(state(m), before)  # no source has learnt


def test_hooks_of_parameters_run_once() -> None:
    m, (x, y) = made("local"), batch(0)
    other = copy.deepcopy(m)
    calls: list[str] = []
    m[0].linear.weight.register_hook(lambda g: calls.append("hook") or g * 2)
    m[0].linear.weight.register_post_accumulate_grad_hook(lambda p: calls.append("after"))
    for each in (m, other):
        with each.context(y):
            F.cross_entropy(each(x), y).backward()
    assert calls == ["hook", "after"]
    assert torch.equal(m[0].linear.weight.grad, 2 * other[0].linear.weight.grad)
    assert m[0].linear.weight._backward_hooks


def test_hooks_of_the_module_run_once() -> None:
    decoupled, calls = decoupled_chain(), []
    decoupled.model.register_forward_hook(lambda *_: calls.append(1))
    m: Any = decoupled.as_module()
    with m.context(batch(0)[1]):
        m(batch(0)[0])
    m.eval()(batch(0)[0])
    assert calls == [1, 1]

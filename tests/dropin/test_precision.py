"""Units of the loss: accumulation, scalers, autocast, clipping."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx

from ..helpers.optimisers import sgd
from ..helpers.training import batch, decoupled_of
from .kit import decoupled_chain, made, same, state


def test_accumulation_with_a_unit() -> None:
    def run(parts: int, unit: float) -> dict[str, Tensor]:
        """One update of a chain without batch norm, from a batch in so many parts."""
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
        ).double()
        fixed = partial(torch.optim.SGD, lr=0.0)
        decoupled = decoupled_of(NoNorm, model=model, cuts=["1", "3"])
        m: Any = decoupled.as_module(unit=unit, synthesizer_optimizer=fixed)
        x, y = batch(0, dtype=torch.float64)
        for part, label in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with m.context(label):
                (F.cross_entropy(m(part), label) / parts).backward()
        return {n: p.grad.clone() for n, p in m.named_parameters()}

    whole = run(1, 1.0)
    for parts in (2, 4):
        for name, gradient in run(parts, 1 / parts).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-10, atol=1e-14)
    assert not torch.allclose(run(4, 1.0)["0.weight"], whole["0.weight"])  # what the unit is for


NoNorm = partial(dni_fx.sources.Local, norm="none")


def test_a_power_of_two_as_unit_changes_no_bits() -> None:
    found = []
    for unit in (1.0, 1024.0, 1 / 8):
        m = made("mlp", unit=unit)
        optimizer = sgd(m.parameters())
        for step in range(4):
            x, y = batch(step)
            with m.context(y):
                loss = F.cross_entropy(m(x), y) * unit
            optimizer.zero_grad()
            loss.backward()
            for parameter in m.parameters():
                parameter.grad /= unit
            optimizer.step()
        found.append(state(m))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize("gradients", ["linear", "local"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grad_scaler(gradients: str, dtype: torch.dtype) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    m, plain = made(gradients, unit=scaler.get_scale), made(gradients)
    optimizer, other = sgd(m.parameters()), sgd(plain.parameters())
    for step in range(6):
        x, y = batch(step)
        for each, opt in ((m, optimizer), (plain, other)):
            with torch.autocast("cpu", dtype, dtype is torch.float16), each.context(y):
                output = each(x)
            loss = F.cross_entropy(output.float(), y)
            opt.zero_grad()
            if each is m:
                scaler.scale(loss).backward()
                scaler.unscale_(opt)
                scaler.step(opt)
                scaler.update()
            else:
                loss.backward()
                opt.step()
    assert scaler.get_scale() > 2.0**12
    if dtype is torch.float32:
        assert same(state(m), state(plain))
    else:
        for (n, a), (_, b) in zip(m.named_parameters(), plain.named_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2, msg=lambda s, n=n: f"{n}: {s}")


def test_small_gradients_in_half_precision() -> None:
    """Loss scaling reaches the first stages: without it, gradients of 1e-8 are zero in float16."""
    found = {}
    for unit in (1.0, 2.0**16):
        decoupled, (x, y) = decoupled_chain("local"), batch(0)
        m: Any = decoupled.as_module(unit=unit)
        for group in decoupled.synthesizers.values():
            group.factor = 1e-6
        with torch.autocast("cpu", torch.float16), m.context(y):
            loss = F.cross_entropy(m(x).float(), y) * unit
        loss.backward()
        found[unit] = (m[0].linear.weight.grad / unit).abs().sum().item()
    assert found[2.0**16] > 0
    assert abs(found[1.0] - found[2.0**16]) > 0.1 * found[2.0**16]  # the control


def test_a_scaler_that_skips() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    m = made("linear", unit=scaler.get_scale)
    optimizer = sgd(m.parameters())
    loop_state = state(m)
    x, y = batch(0)
    with m.context(y):
        loss = F.cross_entropy(m(x), y) * torch.tensor(float("inf"))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**3
    now = state(m)
    assert all(
        torch.equal(now[n], t)
        for n, t in loop_state.items()
        if "running" not in n and "tracked" not in n
    )


@pytest.mark.parametrize("gradients", ["linear", "mlp", "local", "stale"])
def test_autocast(gradients: str) -> None:
    decoupled = decoupled_chain(gradients)
    trainer = dni_fx.Trainer(
        decoupled, lambda out, y: F.cross_entropy(out.float(), y), optimizer=sgd
    )
    m = made(gradients)
    optimizer = sgd(m.parameters())
    for step in range(4):
        x, y = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            trainer.step(x, target=y)
            with m.context(y):
                output = m(x)
        assert output.dtype == torch.bfloat16
        optimizer.zero_grad()
        F.cross_entropy(output.float(), y).backward()  # outside, as it should be
        assert not torch.is_autocast_enabled("cpu")
        optimizer.step()
    wanted = {
        **decoupled.model.state_dict(),
        **{f"sources.{n}": t for n, t in decoupled.synthesizers.state_dict().items()},
    }
    assert same(state(m), {n: t for n, t in wanted.items() if isinstance(t, Tensor)})


def test_backward_inside_autocast() -> None:
    found = []
    for inside in (False, True):
        m = made("mlp")
        optimizer = sgd(m.parameters())
        for step in range(3):
            x, y = batch(step)
            with torch.autocast("cpu", torch.bfloat16):
                with m.context(y):
                    loss = F.cross_entropy(m(x).float(), y)
                optimizer.zero_grad()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            optimizer.step()
        found.append(state(m))
    for name, value in found[0].items():
        torch.testing.assert_close(
            found[1][name], value, rtol=2e-2, atol=2e-2, msg=lambda s, n=name: f"{n}: {s}"
        )


def test_clipping_and_a_scheduler() -> None:
    m = made()
    optimizer = sgd(m.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(3):
        x, y = batch(step)
        with m.context(y):
            loss = F.cross_entropy(m(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(m.parameters(), 1e-3)
        total = torch.stack([p.grad.norm() for p in m.parameters()]).norm()
        assert total <= 1e-3 * 1.001
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 8)

"""Copies and files: deep copies, averages, checkpoints, sources saved apart."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import nn

from dni_fx.errors import DecouplingError

from ..helpers.comparing import assert_bits_equal
from ..helpers.optimisers import sgd
from ..helpers.oracles import draw
from ..helpers.training import batch, decoupled_of
from ..models.cases import Case, seed_generator
from ..models.small import CONVOLUTIONS, DROPOUT, Chain
from .kit import decoupled_chain, loop, made, same, state


def steps_of(
    case: Case, m: Any, optimizer: torch.optim.Optimizer, first: int, last: int
) -> list[float]:
    """Updates from two batches each, cast and clipped: everything that a loop does at once."""
    losses = []
    for step in range(first, last):
        optimizer.zero_grad()
        for part in range(2):
            args, kwargs, target = draw(case, 4, torch.float32, 2 * step + part)
            seed_generator(2 * step + part)
            with torch.autocast("cpu", torch.bfloat16), m.context(target):
                loss = case.loss(m(*args, **kwargs), target) / 2
            loss.backward()
            losses.append(2 * loss.item())
        norm = nn.utils.clip_grad_norm_(m.parameters(), 0.05)
        assert norm > 0.05
        total = torch.stack([p.grad.norm() for p in m.parameters() if p.grad is not None]).norm()
        assert total <= 0.05 * 1.001
        optimizer.step()
    return losses


def module_of(case: Case) -> tuple[Any, torch.optim.Optimizer]:
    m: Any = decoupled_of("linear", case).as_module(unit=1 / 2)
    return m, sgd(m.parameters())


@pytest.mark.parametrize("case", [CONVOLUTIONS, DROPOUT], ids=lambda case: case.name)
def test_a_convolutional_network_and_a_transformer_are_copied_saved_and_resumed(case: Case) -> None:
    m, optimizer = module_of(case)
    assert all(map(math.isfinite, steps_of(case, m, optimizer, 0, 3)))
    copied = copy.deepcopy(m)
    copied_optimizer = sgd(copied.parameters())
    copied_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    file = io.BytesIO()
    torch.save([m.state_dict(), m.synthesizer_state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    loaded, loaded_optimizer = module_of(case)
    before = state(m)
    assert not same(state(loaded), before)
    loaded.load_state_dict(saved[0])
    loaded.load_synthesizer_state_dict(saved[1])
    loaded_optimizer.load_state_dict(saved[2])
    assert same(state(loaded), before)
    wanted = steps_of(case, m, optimizer, 3, 5)
    assert same(state(copied), before)
    for other, its_optimizer in ((copied, copied_optimizer), (loaded, loaded_optimizer)):
        assert steps_of(case, other, its_optimizer, 3, 5) == wanted
        assert same(state(other), state(m))
    plain = case.build()
    plain.load_state_dict(saved[0])


@pytest.mark.parametrize("gradients", ["linear", "local", "stale"])
def test_a_deep_copy_is_independent(gradients: str) -> None:
    m = made(gradients, 0.2)
    optimizer = loop(m, 3)
    c = copy.deepcopy(m)
    assert isinstance(c, Chain)
    # refused under another plan
    c.load_synthesizer_state_dict(copy.deepcopy(m.synthesizer_state_dict()))
    assert same(state(m), state(c))
    before, other = state(c), sgd(c.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loop(m, 2, 3, optimizer)
    assert same(state(c), before)
    loop(c, 2, 3, other)
    assert same(state(m), state(c))
    assert not same(state(m), before)
    c.eval()
    assert m.training
    assert not copy.deepcopy(c).training


def test_an_average_of_models() -> None:
    m = made()
    average = torch.optim.swa_utils.AveragedModel(m)
    loop(m, 2)
    average.update_parameters(m)
    average.eval()
    assert average(batch(0)[0]).shape == (8, 3)


@pytest.mark.parametrize("gradients", ["linear", "local", "stale", "zero"])
def test_files(gradients: str) -> None:
    m = made(gradients, 0.2)
    optimizer = loop(m, 3)
    file = io.BytesIO()
    torch.save([m.state_dict(), m.synthesizer_state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = made(gradients, 0.2)
    other.load_state_dict(saved[0])
    other.load_synthesizer_state_dict(saved[1])
    resumed = sgd(other.parameters())
    resumed.load_state_dict(saved[2])
    loop(m, 2, 3, optimizer)
    loop(other, 2, 3, resumed)
    assert same(state(m), state(other))
    Chain(0.2).load_state_dict(saved[0])  # the plain model reads it, too


def test_loading_does_not_share_memory_with_what_was_saved() -> None:
    m = made("linear", synthesizer_optimizer=torch.optim.Adam)
    loop(m, 2)
    saved = copy.deepcopy(m.synthesizer_state_dict())
    kept, other = copy.deepcopy(saved), made("linear", synthesizer_optimizer=torch.optim.Adam)
    other.load_synthesizer_state_dict(saved)
    loop(other, 2)
    assert_bits_equal(saved, kept, "saved sources, after training on")


def test_sources_of_another_plan_are_refused() -> None:
    m = made("linear")
    loop(m, 1)
    before = state(m)
    torch.manual_seed(0)
    fewer: Any = decoupled_of("linear", cuts=["1"]).as_module()
    parted: Any = made("linear", synthesizer_optimizer=in_two_groups)
    for other in (fewer, made("mlp"), parted):
        with pytest.raises(DecouplingError, match="this state"):
            m.load_synthesizer_state_dict(other.synthesizer_state_dict())
        assert same(state(m), before)
    with pytest.raises(DecouplingError, match="is a dict with 'optimizers' and 'synthesizers'"):
        m.load_synthesizer_state_dict(m.state_dict())


def in_two_groups(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": [p]} for _, p in named])


def test_a_module_is_not_pickled() -> None:
    with pytest.raises(TypeError, match="synthesizer_state_dict"):
        torch.save(made(), io.BytesIO())
    torch.save(decoupled_chain().model, io.BytesIO())  # the plain model is

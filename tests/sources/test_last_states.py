"""Values whose batch is not their first dimension, such as the last state of a recurrent layer:
found by where they come from or by their sizes, and served or refused, never taken for another.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError

from ..helpers.optimisers import sgd


class _Last(nn.Module):
    """Classifies by the last state; ``turned``: with the batch put first before the cut."""

    def __init__(self, kind: type[nn.RNNBase], layers: int, turned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(5, 7, layers, batch_first=True)  # type: ignore[call-arg]
        self.cut, self.head, self.turned = nn.Tanh(), nn.Linear(7, 3), turned

    def forward(self, x: Tensor) -> Tensor:
        state = self.rnn(x)[1]
        state = state[0] if isinstance(state, tuple) else state
        state = self.cut(state.transpose(0, 1) if self.turned else state)
        last = state[:, -1] if self.turned else state[-1]
        return self.head(last)  # type: ignore[no-any-return]


class _Second(nn.Module):
    """Puts time first, as models of sequences may; ``flat``: joins batch and time."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.first, self.head, self.flat = nn.Linear(5, 7), nn.Linear(7, 3), flat

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.reshape(-1, 6, 5) if self.flat else x.transpose(0, 1)
        hidden = self.first(hidden)
        return self.head(hidden).mean(1 if self.flat else 0)  # type: ignore[no-any-return]


def _decoupled(
    model: nn.Module, cut: str, batch: int, gradients: Any, context: Any
) -> dni_fx.Decoupled:
    x = torch.randn(batch, 4, 5)
    return dni_fx.decouple(model, [cut], example_inputs=(x,), gradients=gradients, context=context)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(("layers", "batch"), [(1, 12), (2, 12), (2, 2), (1, 1)])
def test_the_batch_of_a_last_state_is_found(
    kind: type[nn.RNNBase], layers: int, batch: int
) -> None:
    for turned in (False, True):
        made = _decoupled(_Last(kind, layers, turned), "cut", batch, "zero", None)
        (interface,) = made.plan.interfaces
        assert interface.spec.batch_dim == (0 if turned else 1)


@pytest.mark.parametrize("gradients", ["linear", "mlp", "local", "critic", "feedback"])
@pytest.mark.parametrize(("layers", "batch"), [(1, 12), (2, 12), (2, 2)])
def test_a_context_of_another_batch_is_refused(gradients: str, layers: int, batch: int) -> None:
    context = dni_fx.one_hot(3)
    with pytest.raises(DecouplingError, match=r"'cut'.*dimension 1.*transpose\(0, 1\)"):
        _decoupled(_Last(nn.LSTM, layers), "cut", batch, gradients, context)
    made = _decoupled(_Last(nn.LSTM, layers, turned=True), "cut", batch, gradients, context)
    trainer = dni_fx.Trainer(made, F.cross_entropy, optimizer=sgd)
    trainer.step(torch.randn(batch, 4, 5), target=torch.arange(batch) % 3)


@pytest.mark.parametrize("gradients", ["linear", "mlp", "zero", "delayed"])
def test_without_a_context_last_states_are_served(gradients: str) -> None:
    made = _decoupled(_Last(nn.GRU, 2), "cut", 12, gradients, None)
    trainer = dni_fx.Trainer(made, F.cross_entropy, optimizer=sgd)
    trainer.step(torch.randn(12, 4, 5), target=torch.arange(12) % 3)


def test_sizes_tell_where_they_are_unambiguous() -> None:
    for batch, flat, dim in ((12, False, 1), (4, False, 0), (2, False, 0), (12, True, 0)):
        made = _decoupled(_Second(flat), "first", batch, "zero", None)
        assert made.plan.interfaces[0].spec.batch_dim == dim

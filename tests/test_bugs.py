"""One test for every bug that was found and mended: what broke, and why."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import dni_fx

from . import oracles
from .models import BY_NAME


def test_an_interface_named_like_a_module_method() -> None:
    """A cast makes a node ``to``, which a module table refuses as a key."""
    case = BY_NAME["autocast_inside"]
    model = case.build(torch.float32)
    args, kwargs, _ = oracles.draw(case, 4, torch.float32, 0)
    decoupled = dni_fx.decouple(model, ["to"], example_inputs=args, example_kwargs=kwargs)
    assert "to" in decoupled.sources
    assert decoupled.stages[0].step is not None


def test_masked_logits_may_cross_a_cut() -> None:
    """Minus infinity is a value like any other in front of a softmax; it was taken for a failure."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.a(x).masked_fill(torch.eye(4, dtype=torch.bool), float("-inf"))
            return self.b(logits.softmax(-1))

    decoupled = dni_fx.decouple(Masked(), ["masked_fill"], example_inputs=(torch.randn(4, 4),), gradients="exact")
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, 0.1))
    assert trainer.step(torch.randn(4, 4), target=torch.tensor([0, 1, 1, 0])).loss.isfinite()


def test_cuts_that_coincide_in_evaluation_mode() -> None:
    """A drop that is the identity in evaluation mode left two cuts at one place."""
    case = BY_NAME["row_drop"]
    model = case.build(torch.float32)
    args, kwargs, _ = oracles.draw(case, 4, torch.float32, 0)
    decoupled = dni_fx.decouple(model, ["relu", "drop@0"], example_inputs=args, example_kwargs=kwargs)
    decoupled.eval()
    torch.testing.assert_close(decoupled(*args, **kwargs), model(*args, **kwargs))


def test_a_source_that_cannot_run_without_data() -> None:
    """The plan asks for a source's cost on the meta device; a source of the user's own may not run there."""

    class Stubborn(dni_fx.GradientSource):
        def predict(self, values, context=None):  # type: ignore[no-untyped-def]
            from dni_fx.sources import Prediction

            return Prediction((torch.full_like(values[0], float(values[0].sum()) * 0.0),))

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    decoupled = dni_fx.decouple(model, ["1"], example_inputs=(torch.randn(3, 4),), gradients=Stubborn)
    assert "?" in str(decoupled.plan)


def test_gradients_keep_their_layout() -> None:
    """``.grad`` takes its tensor's strides; later sums then run in another order than backpropagation's."""
    leaf = dni_fx.stepping.Leaf(torch.randn(3, 4).t())
    gradient = torch.randn(4, 3)
    leaf.view().backward(gradient)
    found = leaf.gradient()
    assert found is not None
    assert found.stride() == gradient.stride()


def test_size_one_buffers_survive_tracing() -> None:
    """Fake tensors pass writes to one-element tensors on to the real ones."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    dni_fx.decouple(model, ["1"], example_inputs=(torch.randn(3, 4),))
    assert int(model[1].num_batches_tracked) == 0


def test_parameters_of_every_mode_are_trained() -> None:
    """A trainer made after a call in evaluation mode left the auxiliary head without an optimiser."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.aux, self.head = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x).relu()
            return self.head(h) + self.aux(h) if self.training else self.head(h)

    model = Auxiliary()
    x = torch.randn(3, 4)
    decoupled = dni_fx.decouple(model, ["a"], example_inputs=(x,))
    decoupled.eval()(x)
    decoupled.train()
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, 0.1))
    owned = {p for o in trainer.optimizers.values() for g in o.param_groups for p in g["params"]}
    assert owned == set(model.parameters())

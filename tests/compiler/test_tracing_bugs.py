"""One test for every bug of tracing that was found and mended: what broke, and why."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dni_fx
from dni_fx.errors import CutError

from ..helpers.comparing import assert_bits_equal


def test_size_one_buffers_survive_tracing() -> None:
    """Fake tensors pass writes to one-element tensors on to the real ones."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    dni_fx.decouple(model, ["1"], example_inputs=(torch.randn(3, 4),))
    assert int(model[1].num_batches_tracked) == 0


def test_modes_that_differ_in_a_constant_only() -> None:
    """Graphs were taken for equal whose plain tensor attributes were not."""

    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
            self.scales = (torch.ones(4), torch.full((4,), 3.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x) * (self.scales[0] if self.training else self.scales[1]))

    model, x = Switched(), torch.randn(3, 4)
    decoupled = dni_fx.decouple(model, ["a"], example_inputs=(x,))
    decoupled.eval()
    assert_bits_equal(decoupled(x), model(x), "evaluation")


def test_a_function_named_like_a_module() -> None:
    """``F.relu`` next to a module ``relu`` left a value without a name."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(4, 4), nn.Linear(4, 2), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(self.b(F.relu(self.a(x))))

    model, x = Both(), torch.randn(3, 4)
    names = [p.name for p in dni_fx.list_cut_points(model, (x,)) if p.legal]
    for name in names[:-1]:
        dni_fx.decouple(model, [name], example_inputs=(x,))
    assert len(names) == len(set(names))


def test_autocast_is_as_before_after_a_failure_inside_a_region() -> None:
    """A stage that failed within its own autocast region left it open, and stale casts in the
    cache.
    """

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fail = nn.Linear(4, 4), nn.Linear(4, 2), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu"):
                return self.b(self.a(x).view(-1, 2, 2).flatten(1)).float()

    model = Failing()
    decoupled = dni_fx.decouple(model, ["a"], example_inputs=(torch.randn(3, 4),))
    model.b.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with contextlib.suppress(RuntimeError):
        decoupled(torch.randn(3, 4))
    assert torch.autocast_increment_nesting() == 1
    torch.autocast_decrement_nesting()
    assert not torch.is_autocast_enabled("cpu")


def test_caches_are_emptied_after_tracing() -> None:
    """A dictionary that forward fills kept traced sizes as keys."""

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache: dict[int, torch.Tensor] = {}
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n = x.shape[0]
            if n not in self.cache:
                self.cache[n] = torch.ones(n, 1)
            return self.b(self.a(x) * self.cache[n])

    model = Caching()
    dni_fx.decouple(model, ["a"], example_inputs=(torch.randn(3, 4),))
    assert model.cache == {}


def test_a_small_model_that_spares_fake_tensors_its_questions_is_looked_into() -> None:
    """Attention masks are skipped if nothing is padded, which only real tensors are asked; those
    came first and last.

    Small models are run on real tensors, and the whole encoder became one opaque node.
    """

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            unpadded = not isinstance(mask, torch._subclasses.FakeTensor) and bool(mask.all())
            for layer in self.layers:
                x = torch.tanh(layer(x if unpadded else x * mask))
            return x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = Encoder(), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.head(self.encoder(x, mask))

    model, x = Model(), torch.randn(3, 4)
    cuts = [f"encoder.layers.{i}" for i in range(3)]
    decoupled = dni_fx.decouple(model, cuts, example_inputs=(x, torch.tensor([1.0, 1.0, 1.0, 0.0])))
    assert len(decoupled.stages) == 4
    for mask in (torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.ones(4)):
        torch.testing.assert_close(decoupled(x, mask), model(x, mask), rtol=0, atol=0)


def test_hooks_that_a_first_call_installs_are_taken_off_again() -> None:
    """A module that hooks itself up at its first call did so in every trial of the tracer, for
    good.
    """

    class Collector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.hooked = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: list[torch.Tensor] = []
            if not self.hooked:
                for layer in self.layers:
                    layer.register_forward_hook(
                        lambda module, _, output: module.found.append(output)
                    )
                self.hooked = True
            for layer in self.layers:
                object.__setattr__(layer, "found", found)
                x = layer(x)
            return torch.stack(found).sum(0)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Collector(), nn.Linear(4, 2))

    x, cut, plain = torch.randn(3, 4), model(), model()
    dni_fx.decouple(cut, ["0"], example_inputs=(x,))
    assert not any(m._forward_hooks for m in cut.modules())
    assert torch.equal(cut(x), plain(x))
    with pytest.raises(
        CutError,
        match=r"'0\.layers\.1': lies in '0', which is one opaque node: .*call the model once",
    ):
        dni_fx.decouple(model(), ["0.layers.1"], example_inputs=(x,))


def test_weights_cast_while_tracing_are_not_kept() -> None:
    """Autocast keeps cast weights: a run after a trace on fake tensors was given fake ones."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            unpadded = not isinstance(mask, torch._subclasses.FakeTensor) and bool(mask.all())
            return x if unpadded else x * mask

    model, x, mask = Model(), torch.randn(3, 4), torch.tensor([1.0, 1.0, 1.0, 0.0])
    with torch.autocast("cpu", torch.bfloat16):
        model(x, mask)
        decoupled = dni_fx.decouple(model, ["layers.0", "layers.1"], example_inputs=(x, mask))
        assert torch.is_autocast_cache_enabled()
        found, wanted = (
            torch.autograd.grad(f(x, mask).sum(), list(model.parameters()))
            for f in (decoupled, model)
        )
    assert len(decoupled.stages) == 3
    assert all(map(torch.equal, found, wanted))


def test_a_value_in_a_formatted_string_is_read() -> None:
    """An expert chosen by ``f"expert_{index}"`` was the example's for every input."""

    class Experts(nn.ModuleDict):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[f"expert_{x.sum().gt(0).long()}"](x)

    torch.manual_seed(0)
    experts = Experts({f"expert_{i}": nn.Linear(4, 4) for i in range(2)})
    model, x = nn.Sequential(nn.Identity(), experts, nn.Linear(4, 2)), torch.ones(3, 4)
    decoupled = dni_fx.decouple(model, ["1"], example_inputs=(x,))
    for inputs in (x, -x):
        assert torch.equal(decoupled(inputs), model(inputs))

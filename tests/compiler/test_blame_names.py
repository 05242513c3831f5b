"""Names that Python's syntax does not take: of modules, parameters, inputs and arguments."""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import dni_fx
from dni_fx.passes.trace.nodes import safe_targets

from ..helpers.comparing import assert_bits_equal

ODD = [
    ("class", "import"),
    ("lambda", "_lambda"),
    ('say "hi"', "say 'hi'"),
    ("C:\\new", "C:\new"),
    ("a b", "a_b"),
    ("größe", unicodedata.normalize("NFD", "größe")),
    ("ﬁ", "fi"),
    ("x²", "½"),
    ("torch", "self"),
    ("inputs", "outputs"),
    ("a", "a_sent"),
    ("code", "graph"),
]


class Named(nn.Module):
    """Two modules and two parameters under odd names, the latter used in both stages."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({n: nn.Linear(6, 6) for n in names})
        for name in names:
            self.register_parameter(f"{name}!", nn.Parameter(torch.ones(6)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            for name in self.layers:
                x = x * getattr(self, f"{name}!")
            x = torch.tanh(layer(x))
        result: Tensor = self.head(x)
        return result


@pytest.mark.parametrize("names", ODD, ids=lambda names: ascii(names[0]))
@pytest.mark.parametrize("gradients", ["exact", "linear"])
def test_odd_names_of_modules_and_parameters(names: tuple[str, ...], gradients: str) -> None:
    torch.manual_seed(0)
    model, x, y = Named(names), torch.randn(4, 6), torch.randint(3, (4,))
    cuts = [f"layers.{name}" for name in names]
    decoupled = dni_fx.decouple(model, cuts, example_inputs=(x,), gradients=gradients)
    assert list(decoupled.plan.cuts) == cuts
    assert [i.name for i in decoupled.plan.interfaces] == cuts
    assert dni_fx.CutPlan.from_json(decoupled.plan.to_json()) == decoupled.plan
    assert all(compile(stage.code, "stage", "exec") for stage in decoupled.stages)
    assert_bits_equal(decoupled(x), model(x), "output")
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    F.cross_entropy(other(x), y).backward()
    optimizer.step()
    make = lambda p: torch.optim.SGD(p, 0.1)  # noqa: E731
    dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=make).step(x, target=y)
    if gradients == "exact":
        assert_bits_equal(model.state_dict(), other.state_dict(), "parameters")


class Keywords(nn.Module):
    """Takes what it is given by name, as code for batches of data sets does."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, **named: Tensor) -> Tensor:
        values = [self.a(named[name]) for name in sorted(named)]
        return values[0] if values[0].sum().item() > 0 else values[1]


def test_odd_names_of_arguments() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pre, self.inner, self.head = nn.Linear(6, 6), Keywords(), nn.Linear(6, 3)

        def forward(self, **named: Tensor) -> Tensor:
            given = {name: self.pre(value) for name, value in named.items()}
            result: Tensor = self.head(self.inner(**given))
            return result

    model = Model()
    batch = {"class": torch.randn(4, 6), "pixel values": torch.randn(4, 6)}
    decoupled = dni_fx.decouple(model, ["inner"], example_kwargs=batch, gradients="exact")
    assert_bits_equal(decoupled(**batch), model(**batch), "output")


def test_safe_targets_are_names_and_differ() -> None:
    paths = [f"m.{n}.{k}" for pair in ODD for n in pair for k in ("0", "weight")]
    targets = safe_targets(paths)
    assert len(set(targets.values())) == len(paths)
    assert targets["m.a.weight"] == "m.a.weight"
    module = fx.GraphModule(nn.Module(), fx.Graph())
    assert safe_targets(["code.weight"]) == {"code.weight": "model_code.weight"}
    assert hasattr(module, "code")


def test_names_as_they_are_make_invalid_code() -> None:
    """Negative control: what the names were before they were made safe."""
    graph = fx.Graph()
    graph.output(graph.get_attr("class.weight"))
    with pytest.raises(SyntaxError):
        fx.GraphModule({"class.weight": torch.ones(1)}, graph)

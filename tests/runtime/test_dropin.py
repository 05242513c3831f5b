"""A decoupled model in an ordinary loop: the trainer's bits, and everything that users do with a
module.
"""

from __future__ import annotations

import copy
import gc
import inspect
import io
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dni_fx
from dni_fx.errors import DecouplingError, PlanMismatchError
from dni_fx.plan import TensorSpec
from dni_fx.sources import Corrected, GradientSource, Mix, Prediction

from ..helpers import oracles
from ..models import zoo as models
from ..models.zoo import Case

SOURCES = (
    "linear",
    "mlp",
    "conv",
    "auto",
    "local",
    "zero",
    "stale",
    "each:linear",
    "joint:local",
    "joint:linear",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with oracles.one_thread():
        yield


class Block(nn.Module):
    """A residual block with batch norm and dropout."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = (
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(F.relu(self.norm(self.linear(x))))


class Chain(nn.Sequential):
    """Three blocks and a head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(*(Block(6, dropout) for _ in range(3)), nn.Linear(6, 3))


def batch(step: int, size: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(size, 6, generator=generator, dtype=dtype)
    return x, torch.randint(3, (size,), generator=generator)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def decoupled_chain(
    gradients: Any = "linear", dropout: float = 0.0, **options: Any
) -> dni_fx.Decoupled:
    torch.manual_seed(0)
    options = {
        "example_inputs": (batch(0)[0],),
        "context": dni_fx.one_hot(3),
        "check": False,
    } | options
    return dni_fx.decouple(
        options.pop("model", None) or Chain(dropout),
        ["0", "1", "2"],
        gradients=gradients,
        **options,
    )


def made(gradients: Any = "linear", dropout: float = 0.0, **options: Any) -> Any:
    return decoupled_chain(gradients, dropout).as_module(**options)


def loop(
    m: Any, steps: int, first: int = 0, optimizer: Any = None, size: int = 8
) -> torch.optim.Optimizer:
    optimizer = optimizer or sgd(m.parameters())
    for step in range(first, first + steps):
        torch.manual_seed(step)
        x, y = batch(step, size)
        with m.context(y):
            loss = F.cross_entropy(m(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer


def state(m: Any) -> dict[str, Tensor]:
    """Of the model and its sources."""
    return {
        **{n: t.clone() for n, t in m.state_dict().items()},
        **{
            f"sources.{n}": t.clone()
            for n, t in sources(m).state_dict().items()
            if isinstance(t, Tensor)
        },
    }


def sources(m: Any) -> nn.ModuleDict:
    found: nn.ModuleDict = m._dni_fx.graphs.synthesizers
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(oracles.same_bits(a[n], b[n]) for n in a)


def gradients_of(m: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in m.named_parameters()}


# ------------------------------------------------------------------------------------------- bit fo


class Skips(nn.Module):
    """A value that two later stages use, and one weight in the first and the last stage."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        g = F.relu(self.b(F.relu(h)))
        k = F.relu(self.c(g + h))
        return F.linear(F.relu(self.out(torch.cat([k, g], 1))), self.a.weight)


class Encoder(nn.Module):
    """A transformer encoder with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True) for _ in range(3)
        )
        self.head = nn.Linear(8, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(1))


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        blocks = [
            nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            for c in (3, 4, 4)
        ]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))


CASES = (
    Case(
        "convolutions",
        Convolutions,
        models.rows(3, 6, 6),
        ("0", "1", "2"),
        models.labels(6),
        F.cross_entropy,
    ),
    Case(
        "encoder",
        Encoder,
        models.tokens(5, 11),
        ("layers.0", "layers.1"),
        models.labels(6),
        F.cross_entropy,
    ),
    Case("skips", Skips, models.rows(6), ("a", "b", "c"), models.labels(6), F.cross_entropy),
)


def compared(
    case: Case,
    gradients: Any,
    drop_in: bool,
    steps: int = 3,
    classes: int = 6,
    wrong: bool = False,
    cast: bool = False,
) -> Any:
    """Outputs, losses, weights, buffers and sources of a few steps, the last one with a short
    batch.
    """
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=cast)
    args, kwargs, target = oracles.draw(case, 4, torch.float32, 0)
    decoupled = dni_fx.decouple(
        case.build(), list(case.cuts), example_inputs=args, example_kwargs=kwargs, gradients=gradients, check=False,
        context=dni_fx.one_hot(classes) if classes else None,
    )  # fmt: skip
    record: dict[str, Any] = {}
    if drop_in:
        m: Any = decoupled.as_module(unit=2.0 if wrong else 1.0)
        optimizer = oracles.sgd(list(m.named_parameters()))
    else:
        trainer = dni_fx.Trainer(decoupled, case.loss, optimizer=oracles.sgd)
    for step in range(steps):
        args, kwargs, target = oracles.draw(case, 4 if step < steps - 1 else 3, torch.float32, step)
        models.seed_generator(step)
        if drop_in:
            with autocast, m.context(target if classes else None):
                output = m(*args, **kwargs)
                loss = case.loss(output, target)
            optimizer.zero_grad()
            with autocast:  # as in a step of the trainer inside a region
                loss.backward()
            optimizer.step()
        else:
            with autocast:
                report = trainer.step(*args, target=target, **kwargs)
            output, loss = report.outputs, report.loss
        record[f"{step}"] = {
            "output": oracles.frozen(output),
            "loss": loss.detach(),
            "model": oracles.state_of(decoupled.model),
            "sources": oracles.state_of(decoupled.synthesizers),
        }
    return record


PAIRS = [
    (case, gradients)
    for case in CASES
    for gradients in SOURCES
    if (gradients, case.name)
    not in {("each:linear", "skips"), ("conv", "skips"), ("conv", "encoder")}
]


@pytest.mark.parametrize(("case", "gradients"), PAIRS, ids=[f"{c.name}-{g}" for c, g in PAIRS])
def test_bits_of_the_trainer(case: Case, gradients: str) -> None:
    got, want = compared(case, gradients, True), compared(case, gradients, False)
    oracles.assert_bits_equal(got, want, f"{case.name}, {gradients}")


@pytest.mark.parametrize("gradients", ["linear", "local", "stale"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bits_of_the_trainer_under_autocast(case: Case, gradients: str) -> None:
    got, want = (
        compared(case, gradients, True, cast=True),
        compared(case, gradients, False, cast=True),
    )
    oracles.assert_bits_equal(got, want, f"{case.name}, {gradients}")
    assert got["0"]["output"].dtype == torch.bfloat16
    with pytest.raises(AssertionError, match="differ"):
        oracles.assert_bits_equal(
            got["1"]["model"], compared(case, gradients, True)["1"]["model"], "not cast"
        )


def test_a_wrong_unit_is_noticed() -> None:
    got, want = compared(CASES[0], "local", True, wrong=True), compared(CASES[0], "local", False)
    with pytest.raises(AssertionError, match="differ"):
        oracles.assert_bits_equal(got["1"]["model"], want["1"]["model"], "negative control")


REFUSED = "checkpoint_reentrant"
LAST_BITS = {
    "dense",
    "fan_out",
    "reused_in_three",
}  # values with three consumers: autograd adds up last stage first


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "case", [c for c in models.ZOO if c.name != REFUSED], ids=lambda case: case.name
)
def test_bits_of_the_trainer_for_every_kind_of_model(case: Case) -> None:
    got, want = (
        compared(case, "linear", True, classes=0),
        compared(case, "linear", False, classes=0),
    )
    if case.name in LAST_BITS:
        for (name, a), (_, b) in zip(
            models.named_leaves(got), models.named_leaves(want), strict=True
        ):
            torch.testing.assert_close(
                a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
        got, want = ({k: {**v, "sources": None} for k, v in r.items()} for r in (got, want))
    oracles.assert_bits_equal(got, want, case.name)


@pytest.mark.parametrize("gradients", ["zero", "linear"])
def test_a_reentrant_checkpoint_is_refused(gradients: str) -> None:
    with pytest.raises((DecouplingError, RuntimeError), match="use_reentrant"):
        compared(models.BY_NAME[REFUSED], gradients, True, classes=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_is_backpropagation(case: Case) -> None:
    got = compared(case, "exact", True)
    model = case.build()
    optimizer = oracles.sgd(list(model.named_parameters()))
    for step in range(3):
        args, kwargs, target = oracles.draw(case, 4 if step < 2 else 3, torch.float32, step)
        models.seed_generator(step)
        optimizer.zero_grad()
        case.loss(model(*args, **kwargs), target).backward()
        optimizer.step()
        oracles.assert_bits_equal(got[f"{step}"]["model"], oracles.state_of(model), f"step {step}")


class Mean(GradientSource):
    """A source of the user's own."""

    def __init__(self, specs: Any, context: Any = None) -> None:
        super().__init__(specs, context)
        self.mean = nn.Parameter(torch.zeros(self.specs[0].shape[1:]))

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        guess = torch.zeros_like(values[0]) + self.mean
        return Prediction((guess.detach(),), guess)

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor:
        return F.mse_loss(prediction.state, message[0])


def test_a_source_of_ones_own() -> None:
    case = Case("chain", Chain, models.rows(6), ("0", "1"), models.labels(3), F.cross_entropy)
    oracles.assert_bits_equal(compared(case, Mean, True), compared(case, Mean, False), "own source")


# -------------------------------------------------------------------------------------------------


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
    m, (x, y) = made("local"), batch(0)
    plain = m._dni_fx.graphs.model
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
        assert "StageFunction" in oracles.graph_of(m(x))


def test_a_piece_is_of_the_plain_class() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    m: Any = dni_fx.decouple(
        model, ["0"], example_inputs=(batch(0)[0],), gradients="zero"
    ).as_module()
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
        return dni_fx.decouple(
            Keywords(), ["first", "second"], example_inputs=(x,), example_kwargs={"labels": y, "by": 2.0},
            gradients="local", context=dni_fx.one_hot(3), check=False,
        )  # fmt: skip

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
    m: Any = dni_fx.decouple(
        Answers(), ["first", "second"], example_inputs=(x, x), gradients="zero", check=False
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
    assert "StageFunction" not in oracles.graph_of(output)
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
    m = made(dropout=0.5)
    m[0].eval()  # frozen statistics and no dropout, in training
    before = m[0].norm.running_mean.clone()
    loop(m, 2)
    assert torch.equal(m[0].norm.running_mean, before)
    assert m[1].norm.running_mean.any()
    m.eval()
    assert not any(s.training for s in sources(m).modules())
    assert not m._dni_fx.graphs.model.training
    m.train()
    assert m[0].training
    assert all(s.training for s in sources(m).modules())


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
    m = made(gradients)
    loop(m, 2)
    m.double()
    x, y = batch(5, dtype=torch.float64)
    with m.context(y):
        F.cross_entropy(m(x), y).backward()
    assert m[0].linear.weight.grad.dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in sources(m).parameters())
    m.zero_grad()
    m.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in sources(m).parameters())
    with m.context(y):
        F.cross_entropy(m(x.bfloat16()), y).backward()
    assert m[0].linear.weight.grad.dtype == torch.bfloat16
    assert m[0].linear.weight.grad.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("gradients", ["linear", "local"])
def test_on_a_gpu(gradients: str) -> None:
    m = made(gradients)
    loop(m, 2)
    m.to("cuda")
    assert all(p.is_cuda for p in sources(m).parameters())
    optimizer, scaler = sgd(m.parameters()), torch.amp.GradScaler("cuda")
    m._dni_fx.unit_of = scaler.get_scale
    before = state(m)
    for step in range(3):
        x, y = (t.cuda() for t in batch(step))
        with torch.autocast("cuda", torch.float16), m.context(y):
            loss = F.cross_entropy(m(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    now = state(m)
    assert all(not torch.equal(now[n], before[n]) for n in now if n.endswith("linear.weight"))


# ---------------------------------------------------------------------------------------- the order


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
    start = state(other)
    other.zero_grad()
    for inputs, labels in ((x, y), (v, w)):  # each from the same sources
        sources(other).load_state_dict(
            {n[8:]: t for n, t in start.items() if n.startswith("sources.")}
        )
        with other.context(labels):
            F.cross_entropy(other(inputs), labels).backward()
    total = {n: g for n, g in gradients_of(other).items() if g is not None}
    for name, parameter in m.named_parameters():
        torch.testing.assert_close(parameter.grad, total[name])
    assert not same({n: t for n, t in state(m).items() if "sources" in n}, start)


@pytest.mark.parametrize("gradients", ["linear", "local", "stale", "mlp"])
def test_a_forward_without_a_backward_changes_buffers_only(gradients: str) -> None:
    m = made(gradients)
    loop(m, 2)
    before = {n: t for n, t in state(m).items() if "running" not in n and "tracked" not in n}
    x, y = batch(7)
    m.zero_grad()
    with m.context(y):
        m(x)
    after = state(m)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert all(p.grad is None for p in [*m.parameters(), *sources(m).parameters()])
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
    (gradient,) = torch.autograd.grad(loss, [m[0].linear.weight], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


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


# ---------------------------------------------------------------------------------------------- uni


def test_accumulation_with_a_unit() -> None:
    def run(parts: int, unit: float) -> dict[str, Tensor]:
        """One update of a chain without batch norm, from a batch in so many parts."""
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
        ).double()
        m: Any = dni_fx.decouple(
            model, ["1", "3"], example_inputs=(batch(0, dtype=torch.float64)[0],), gradients=NoNorm, check=False,
            context=dni_fx.one_hot(3),
        ).as_module(unit=unit, synthesizer_optimizer=partial(torch.optim.SGD, lr=0.0))  # fmt: skip
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
        m = made("local", unit=unit)
        x, y = batch(0)
        for group in sources(m).values():
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
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0125)


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", ["linear", "local", "stale", "mlp", "zero"])
def test_batches_of_other_sizes(gradients: str) -> None:
    m = made(gradients)
    for step, size in enumerate((8, 5, 16, 2, 8)):
        loop(m, 1, step, size=size)
    assert all(p.isfinite().all() for p in m.parameters())
    with pytest.raises(PlanMismatchError, match="empty batch"):
        m(torch.zeros(0, 6))


@pytest.mark.parametrize("gradients", ["linear", "local"])
def test_a_batch_of_one(gradients: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    m: Any = dni_fx.decouple(
        model,
        ["1", "3"],
        example_inputs=(batch(0)[0],),
        gradients=gradients,
        check=False,
        context=dni_fx.one_hot(3),
    ).as_module()
    loop(m, 2)
    loop(m, 1, size=1)
    assert m[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("gradients", ["linear", "mlp", "local", "stale", "zero"])
def test_a_batch_of_nan_spoils_no_source(gradients: str) -> None:
    m = made(gradients)
    loop(m, 2)
    before = {n: t for n, t in state(m).items() if n.startswith("sources.")}
    stale = copy.deepcopy(m.synthesizer_state_dict())
    x, y = batch(3)
    m.zero_grad()
    with m.context(y):
        F.cross_entropy(m(x * torch.nan), y).backward()
    assert m[3].weight.grad.isnan().any()  # as without cuts: the loop decides
    after = state(m)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    for name, value in stale["synthesizers"].items():
        if not isinstance(value, Tensor):
            now = m.synthesizer_state_dict()["synthesizers"][name]
            assert all(map(torch.equal, now["messages"], value["messages"]))


def test_dropout_is_reproducible() -> None:
    a, b = made(dropout=0.4), made(dropout=0.4)
    loop(a, 3)
    loop(b, 3)
    assert same(state(a), state(b))
    torch.manual_seed(5)
    plain = copy.deepcopy(a._dni_fx.graphs.model)
    first = plain(batch(0)[0])
    torch.manual_seed(5)
    with a.context(batch(0)[1]):
        assert torch.equal(a(batch(0)[0]), first)  # sources draw no random numbers


def test_learning_is_worth_it() -> None:
    m = made("local")
    x, y = batch(0, 64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    optimizer = torch.optim.Adam(m.parameters(), 0.02)
    losses = []
    for _ in range(60):
        with m.context(y):
            loss = F.cross_entropy(m(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# -------------------------------------------------------------------------------------------- part


def test_inputs_that_need_gradients() -> None:
    """What the module sends back before itself is what the first source says, and what the last
    stage knows.
    """
    torch.manual_seed(0)
    first = nn.Linear(6, 6)
    m, (x, y) = made("local"), batch(0)
    with m.context(y):
        F.cross_entropy(m(first(x)), y).backward()
    assert first.weight.grad is not None
    assert first.weight.grad.any()
    leaf = x.clone().requires_grad_()
    reference = copy.deepcopy(m)
    with m.context(y):
        F.cross_entropy(m(leaf), y).backward()
    decoupled = dni_fx.Decoupled(reference._dni_fx.graphs)
    trainer_leaf = x.clone().requires_grad_()
    stepped = decoupled.bind(trainer_leaf)
    decoupled.stages[0].step(stepped, dni_fx.one_hot(3)(y))
    assert torch.equal(leaf.grad, trainer_leaf.grad)


def test_exact_sends_back_true_gradients() -> None:
    m, (x, y) = made("exact"), batch(0)
    plain = copy.deepcopy(m._dni_fx.graphs.model)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    F.cross_entropy(m(a), y).backward()
    F.cross_entropy(plain(b), y).backward()
    assert torch.equal(a.grad, b.grad)


class Wrapped(nn.Module):
    """A module behind an activation checkpoint, or not."""

    def __init__(self, inner: nn.Module, memory: bool) -> None:
        super().__init__()
        self.inner, self.memory = inner, memory

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False) if self.memory else self.inner(x)  # type: ignore[return-value]


def test_activation_checkpointing_inside_a_stage() -> None:
    found = []
    for memory in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(
                Wrapped(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2)), memory)
                for _ in range(3)
            ),
            nn.Linear(6, 3),
        )
        m: Any = decoupled_chain("local", model=model).as_module()
        loop(m, 3)
        found.append(list(m.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --------------------------------------------------------------------------------------------------


def steps_of(
    case: Case, m: Any, optimizer: torch.optim.Optimizer, first: int, last: int
) -> list[float]:
    """Updates from two batches each, cast and clipped: everything that a loop does at once."""
    losses = []
    for step in range(first, last):
        optimizer.zero_grad()
        for part in range(2):
            args, kwargs, target = oracles.draw(case, 4, torch.float32, 2 * step + part)
            models.seed_generator(2 * step + part)
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
    args, kwargs, _ = oracles.draw(case, 4, torch.float32, 0)
    decoupled = dni_fx.decouple(
        case.build(), list(case.cuts), example_inputs=args, example_kwargs=kwargs, gradients="linear", check=False,
        context=dni_fx.one_hot(6),
    )  # fmt: skip
    m = decoupled.as_module(unit=1 / 2)
    return m, sgd(m.parameters())


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
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
    assert c._dni_fx.graphs.plan == m._dni_fx.graphs.plan
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


def test_sources_of_another_plan_are_refused() -> None:
    m = made("linear")
    loop(m, 1)
    before = state(m)
    torch.manual_seed(0)
    fewer: Any = dni_fx.decouple(
        Chain(),
        ["1"],
        example_inputs=(batch(0)[0],),
        gradients="linear",
        context=dni_fx.one_hot(3),
        check=False,
    ).as_module()
    with pytest.raises(DecouplingError, match="decouple with the same plan"):
        m.load_synthesizer_state_dict(fewer.synthesizer_state_dict())
    with pytest.raises(DecouplingError, match="decouple with the same plan"):
        m.load_synthesizer_state_dict(made("mlp").synthesizer_state_dict())
    assert same(state(m), before)


def test_a_module_is_not_pickled() -> None:
    with pytest.raises(TypeError, match="synthesizer_state_dict"):
        torch.save(made(), io.BytesIO())
    torch.save(made()._dni_fx.graphs.model, io.BytesIO())  # the plain model is


# --------------------------------------------------------------------------------------------------


class Listens(Mean):
    message = "gradient+loss"


@pytest.mark.parametrize(
    ("gradients", "words"),
    [
        ("delayed", "Delayed.*waits"),
        ("critic", "Critic.*loss"),
        ("sobolev", "Sobolev.*loss"),
        ("distill", "Distill.*logits"),
        ("feedback", "Feedback.*error"),
        ("corrected", "Corrected.*waits"),
        (partial(Mix, source="linear"), "Mix.*waits"),
        (partial(Corrected, source="linear"), "Corrected.*waits"),
        (Listens, "Listens.*loss"),
    ],
)
def test_sources_that_are_refused(gradients: Any, words: str) -> None:
    with pytest.raises(DecouplingError, match=words):
        made(gradients)
    late = decoupled_chain(gradients, example_inputs=None).as_module()  # traced at the first call
    with pytest.raises(DecouplingError, match=words):
        late(batch(0)[0])


def test_other_refusals() -> None:
    with pytest.raises(DecouplingError, match="leave out inputs="):
        decoupled_chain("linear", inputs="linear").as_module()
    torch.manual_seed(0)
    shared = dni_fx.decouple(
        Skips(), ["a", "b", "c"], example_inputs=(batch(0)[0],), gradients="each:linear"
    )
    with pytest.raises(DecouplingError, match="for each of 2 consumers"):
        shared.as_module()
    for unit in (0, -1.0, float("nan"), "1", lambda: None):
        m = made(unit=unit)
        with pytest.raises(DecouplingError, match="unit="), m.context(batch(0)[1]):
            m(batch(0)[0])
    m = made(synthesizer_optimizer=lambda _: None)
    with pytest.raises(DecouplingError, match="synthesizer_optimizer="):
        m(batch(0)[0])
    model = Chain()
    model.forward = partial(Chain.forward, model)  # type: ignore[method-assign]
    with pytest.raises(DecouplingError, match="forward was replaced"):
        decoupled_chain(model=model).as_module()


@pytest.mark.parametrize("gradients", ["linear", "local"])
def test_a_context_that_is_missing(gradients: str) -> None:
    m = made(gradients)
    before = state(m)
    with pytest.raises(DecouplingError, match=r"with m\.context"):
        m(batch(0)[0])
    assert torch.is_grad_enabled()
    assert same(
        {n: t for n, t in state(m).items() if "norm" not in n},
        {n: t for n, t in before.items() if "norm" not in n},
    )
    loop(m, 1)
    with pytest.raises(ValueError, match="inside"), m.context(batch(0)[1]):
        raise ValueError("inside")
    with pytest.raises(DecouplingError, match=r"with m\.context"):
        m(batch(0)[0])


def test_traced_at_the_first_call() -> None:
    m: Any = decoupled_chain("linear", example_inputs=None).as_module()
    assert m.eval()(batch(0)[0]).shape == (8, 3)
    m.train()
    loop(m, 2)
    other = made("linear")
    loop(other, 2)
    assert all(torch.equal(a, b) for a, b in zip(m.parameters(), other.parameters(), strict=True))


def test_a_trainer_before_leaves_no_unit() -> None:
    decoupled = decoupled_chain("local")
    dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd, accumulate=4)
    m: Any = decoupled.as_module()
    loop(m, 2)
    other = made("local")
    loop(other, 2)
    assert same(state(m), state(other))


# --------------------------------------------------------------------------------------------------


class Probe(GradientSource):
    """Counts how often it is asked, and what is alive then."""

    message = "gradient"

    def __init__(self, specs: tuple[TensorSpec, ...], context: TensorSpec | None = None) -> None:
        super().__init__(specs, context)
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[Callable[[], Any]] = []

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        guess = values[0] * self.weight
        self.seen.append(weakref.ref(guess))
        return Prediction((guess.detach().clone(),), guess)

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor:
        return F.mse_loss(prediction.state, message[0])


def test_what_sources_computed_is_not_kept() -> None:
    m, (x, y) = made(Probe), batch(0)
    gc.disable()
    try:
        with m.context(y):
            output = m(x)
        assert all(len(s.seen) == 1 and s.seen[0]() is None for s in sources(m).values())
        F.cross_entropy(output, y).backward()
        assert all(len(s.seen) == 2 for s in sources(m).values())
        assert all(s.weight.grad is None for s in sources(m).values())
        assert list(sources(m).values())[-1].weight.any()
    finally:
        gc.enable()


def test_no_warnings_in_a_step() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(made("mlp", 0.1), 1)

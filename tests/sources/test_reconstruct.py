"""Sources that see their stage's input: the published recipe by hand, shapes, sums, refusals."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.plan import TensorSpec
from dni_fx.sources import Asks, GradientSource, Local, Prediction, Reconstruct, Sum, make_source

from ..helpers.comparing import assert_bits_equal
from ..helpers.executors import Task, as_drop_in, in_turn, in_windows, on_threads
from ..helpers.optimisers import adam, sgd
from ..helpers.training import batch, decoupled_of, largest_difference, state, train, trainer_of
from ..models.small import CROSSING, SKIPS


class Language(nn.Module):
    """An embedding, two residual blocks and a head, over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.lower, self.upper = (nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        h = h + self.lower(h)
        return self.head(h + self.upper(h))


DOUBLE = torch.float64
CUTS = {"embed": "zero", "add": "reconstruct"}


def tokens(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 11, (4, 6), generator=generator)


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def language(**options: Any) -> Any:
    torch.manual_seed(0)
    options = {"gradients": CUTS} | options
    return dni_fx.decouple(
        Language(), list(CUTS), example_inputs=(tokens(0),), check=False, **options
    )


def by_hand(start: dni_fx.Decoupled, weight: float, steps: int = 4) -> dict[str, Tensor]:
    """LoPT as published, one boundary: MSE of a decoder, the boundary detached."""
    model = Language()
    model.load_state_dict(start.model.state_dict())
    decoder = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2), nn.GELU(), nn.Linear(2, 8))
    given = list(start.sources["add"].decoders.state_dict().values())
    decoder.load_state_dict(dict(zip(decoder.state_dict(), given, strict=True)))
    parameters = [p for n, p in model.named_parameters() if not n.startswith("embed")]
    optimizer = torch.optim.SGD([*parameters, *decoder.parameters()], 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        e = model.embed(tokens(step)).detach()
        h = e + model.lower(e)
        upper = h.detach() + model.upper(h.detach())
        loss = mean_loss(model.head(upper), tokens(step + 1))
        (loss + weight * F.mse_loss(decoder(h).float(), e.float())).backward()
        optimizer.step()
    return model.state_dict()


def test_it_is_lopt_as_published() -> None:
    start, decoupled = language(), language()
    optimizer = partial(torch.optim.SGD, lr=0.1)
    trainer = dni_fx.Trainer(
        decoupled, mean_loss, optimizer=optimizer, synthesizer_optimizer=optimizer
    )
    for step in range(4):
        trainer.step(tokens(step), target=tokens(step + 1))
    got = decoupled.model.state_dict()
    assert largest_difference(got, by_hand(start, 10.0)) < 1e-6
    assert largest_difference(got, by_hand(start, 9.0)) > 1e-5
    decoder = start.sources["add"].decoders[0]
    assert float(decoder.narrow.weight.detach().abs().max()) < 0.1 * (6 / 10) ** 0.5 + 1e-6
    assert not decoder.narrow.bias.any()


def test_it_needs_no_labels_and_hears_nothing() -> None:
    decoupled = language(context=None)
    assert decoupled.sources["add"].asks == Asks(learns_from=(), inputs="stage")
    trainer = trainer_of("reconstruct", context=None)
    before = state(trainer)
    train(trainer, 3)
    now = state(trainer)
    moved = [
        n for n in before if n.endswith("linear.weight") and not torch.equal(before[n], now[n])
    ]
    assert moved == ["0.linear.weight", "1.linear.weight", "2.linear.weight"]


def test_a_stage_that_forgets_its_input_learns_to_keep_it() -> None:
    """Against the control, a decoder of a stage that stays as it is."""
    errors = []
    for rate in (1e-2, 0.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
        with torch.no_grad():
            model[0].weight[1:] = 0.0
        x = torch.randn(64, 8)
        gradients = partial(Reconstruct, width=8)
        decoupled = dni_fx.decouple(model, ["0"], gradients=gradients, example_inputs=(x,))
        trainer = dni_fx.Trainer(
            decoupled,
            F.cross_entropy,
            optimizer=partial(torch.optim.Adam, lr=rate),
            synthesizer_optimizer=partial(torch.optim.Adam, lr=1e-2),
        )
        for _ in range(400):
            trainer.step(x, target=torch.zeros(64, dtype=torch.long))
        source = decoupled.sources["0"]
        errors.append(float(source((model[0](x),), None, (x,)).state.detach()) / 10)
    assert errors[0] < 0.8 * errors[1], errors


@pytest.mark.parametrize(
    ("value", "target"),
    [
        (TensorSpec((4, 5), torch.float32), TensorSpec((4, 7), torch.float32)),
        (TensorSpec((4, 5), torch.float32), TensorSpec((4, 3, 6, 6), torch.float32, 1)),
        (TensorSpec((4, 8, 4, 4), torch.float32, 1), TensorSpec((4, 3, 9, 8), torch.float32, 1)),
        (TensorSpec((4, 8, 4, 4), torch.float32, 1), TensorSpec((4, 3, 2, 2), torch.float32, 1)),
        (TensorSpec((4, 6, 5), torch.float32), TensorSpec((4, 6), torch.int64)),
        (TensorSpec((4, 6, 5), torch.float32), TensorSpec((4, 3, 200, 200), torch.float32, 1)),
        (TensorSpec((4, 3, 6, 5), torch.float32), TensorSpec((4, 7), torch.float32)),
        (TensorSpec((6, 4, 5), torch.float32, batch_dim=1), TensorSpec((4, 7), torch.float32)),
        (TensorSpec((4,), torch.float32), TensorSpec((4,), torch.float64)),
        (TensorSpec((4, 2, 3, 3, 3), torch.float32, 1), TensorSpec((4, 2, 2, 2, 2, 2, 5), DOUBLE)),
    ],
)  # fmt: skip
def test_every_kind_of_value_and_input(value: TensorSpec, target: TensorSpec) -> None:
    source: Any = make_source("reconstruct", [value], None, lambda _: [target])
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(value.shape, generator=generator)
    drawn = torch.randint(0, 50, target.shape, generator=generator)
    e = drawn.to(target.dtype) / (1 if target.dtype is torch.int64 else 25)
    optimizer = torch.optim.Adam(source.parameters(), 1e-2)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        made = source((h,), None, (e,))
        made.state.backward()
        optimizer.step()
        errors.append(float(made.state.detach()))
    assert errors[-1] < errors[0]
    assert made.gradients[0].shape == h.shape
    assert bool(made.gradients[0].any())
    assert source.flops() > 0
    assert sum(p.numel() for p in source.decoders[0].widen.parameters()) <= 4096 * 6


def test_blocks_hold_the_target_itself() -> None:
    """A map at half the size has four pixels to make at each of its own."""
    value = TensorSpec((1, 8, 2, 2), torch.float32, 1)
    target = TensorSpec((1, 1, 4, 4), torch.float32, 1)
    source: Any = make_source("reconstruct", [value], None, lambda _: [target])
    image = torch.arange(16.0).view(1, 1, 4, 4)
    made, wanted = source.decoders[0](torch.zeros(1, 8, 2, 2), image)
    assert made.shape == wanted.shape == (1, 2, 2, 4)
    assert wanted[0, 0, 1].tolist() == [2, 3, 6, 7]


def test_integers_are_told_apart() -> None:
    value, target = TensorSpec((4, 6), torch.float32), TensorSpec((4,), torch.int64)
    source: Any = make_source("reconstruct", [value], None, lambda _: [target])
    ids = torch.tensor([3, 3, 7, 40000])
    source((torch.zeros(4, 6),), None, (ids,))
    codes = source._encoded([torch.zeros(4, 6)], [ids])[0]
    assert torch.equal(codes[0], codes[1])
    assert float((codes[0] - codes[2]).square().mean()) > 1
    assert float((codes[0] - codes[3]).square().mean()) > 1


@pytest.mark.parametrize("target", ["stage", "model"])
def test_what_is_made_again_is_what_was_asked_for(target: str) -> None:
    seen: dict[str, list[Any]] = {}

    class Watching(Reconstruct):
        def predict(self, values: Any, context: Any = None, inputs: Any = ()) -> Prediction:
            seen.setdefault(str(tuple(values[0].shape)), []).append(inputs)
            return super().predict(values, context, inputs)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 3))
    x = torch.randn(8, 6)
    decoupled = dni_fx.decouple(
        model, ["1", "2"], gradients=partial(Watching, target=target), example_inputs=(x,)
    )
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    first = model[1](model[0](x)).detach()
    seen.clear()
    trainer.step(x, target=torch.zeros(8, dtype=torch.long))
    ((of_first,),), ((of_second,),) = seen["(8, 5)"], seen["(8, 4)"]
    assert torch.equal(of_first, x)
    assert torch.equal(of_second, x if target == "model" else first)


@pytest.mark.parametrize("gradients", ["model", "sum"])
@pytest.mark.parametrize("executor", [on_threads, as_drop_in, in_windows])
def test_inputs_of_the_model_come_to_every_executor(executor: Any, gradients: str) -> None:
    option: Any = partial(Reconstruct, target="model")
    if gradients == "sum":
        option = Sum(option, "zero")
    task = Task(SKIPS, option, optimizer=adam, labels=False)
    got, want = executor(task), in_turn(task)
    other = in_turn(Task(SKIPS, "reconstruct", optimizer=adam, labels=False))
    a, b, c = (
        {n: t for n, t in record["decoupled"].items() if n.startswith("model.")}
        for record in (got, want, other)
    )
    assert_bits_equal(a, b, "model")
    assert largest_difference(c, b) > 1e-3


def test_a_sum_adds_what_its_parts_predict_and_each_learns_as_alone() -> None:
    options = ("linear", "reconstruct", "critic", "distill")
    specs, context = [TensorSpec((4, 6), torch.float32)], TensorSpec((4, 3), torch.float32)
    summed: Any = make_source(Sum(*options), specs, context)
    alone = [make_source(option, specs, context) for option in options]
    for part, own in zip(summed.parts, alone, strict=True):
        part.load_state_dict(own.state_dict())
    assert summed.asks.learns_from == ("gradient", "loss", "logits")
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(4, 6, generator=generator),)
    seen = (torch.randn(4, 6, generator=generator),)
    labels = dni_fx.one_hot(3)(torch.tensor([0, 1, 2, 1]))
    messages = {
        "gradient": torch.randn(4, 6, generator=generator),
        "loss": torch.rand(4, generator=generator),
        "logits": torch.randn(4, 3, generator=generator),
    }
    made = summed(values, labels, seen)
    single = [s(values, labels, seen) for s in alone]
    total = sum(p.gradients[0] for p in single)  # type: ignore[index]
    assert torch.equal(made.gradients[0], total)
    assert torch.equal(made.loss, single[2].loss)  # type: ignore[arg-type]
    assert torch.equal(made.logits, single[2].logits)  # type: ignore[arg-type]
    summed.fit(made, tuple(messages.values())).backward()
    for part, own, prediction in zip(summed.parts, alone, single, strict=True):
        loss = own.fit(prediction, tuple(messages[k] for k in own.asks.learns_from))
        assert loss is not None
        loss.backward()
        pairs = list(zip(part.parameters(), own.parameters(), strict=True))
        assert pairs
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)  # type: ignore[arg-type]


def test_a_sum_of_one_part_and_nothing_is_that_part() -> None:
    for name in ("local", "linear", "reconstruct"):
        twins = [trainer_of(option, CROSSING) for option in (Sum(name, "zero"), name)]
        for trainer in twins:
            train(trainer, 5, case=CROSSING)
        assert_bits_equal(state(twins[0]), state(twins[1]), name)
    plan = twins[0].decoupled.plan
    assert dict(plan.gradients).popitem()[1] == "reconstruct+zero"


def test_a_source_of_ones_own_sees_inputs() -> None:
    class Echo(GradientSource):
        asks = Asks(learns_from=(), inputs="stage")

        def predict(self, values: Any, context: Any = None, inputs: Any = ()) -> Prediction:
            assert [tuple(t.shape) for t in inputs] == [s.shape for s in self.input_specs]
            return Prediction(tuple(inputs[0].mean() + torch.zeros_like(v) for v in values))

    class Deaf(Echo):
        def predict(self, values: Any, context: Any = None) -> Prediction:  # type: ignore[override]
            return Prediction(())

    trainer = trainer_of(Echo)
    before = state(trainer)
    train(trainer, 2)
    assert not torch.equal(before["0.linear.weight"], state(trainer)["0.linear.weight"])
    with pytest.raises(DecouplingError, match=r"predict must take \(values, context, inputs\)"):
        decoupled_of(Deaf)


SPEC = TensorSpec((4, 6), torch.float32)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Asks(inputs="mine"), "'stage', 'model', not 'mine'"),
        (lambda: Reconstruct([SPEC], weight=0), "weight above 0"),
        (lambda: Reconstruct([SPEC], weight="much"), "weight above 0"),
        (lambda: Reconstruct([SPEC], target="mine"), "known: 'stage', 'model'"),
        (lambda: Reconstruct([TensorSpec((), torch.float32)]), "not a scalar"),
        (lambda: Sum("local"), "two sources or more"),
        (lambda: make_source(Sum("zero", "delayed"), [SPEC]), "answer at once"),
        (lambda: make_source(Sum("zero", "nothing"), [SPEC]), "unknown gradient source 'nothing'"),
        (
            lambda: make_source(Sum("reconstruct", partial(Reconstruct, target="model")), [SPEC]),
            "same inputs",
        ),
        (
            lambda: Reconstruct([SPEC]).see_inputs([TensorSpec((4, 2), torch.bool)]),
            r"nothing to make again: the stage's inputs are \(4, 2\) torch.bool",
        ),
        (
            lambda: Reconstruct([SPEC])((torch.zeros(4, 6),), None, (torch.zeros(4, 6),) * 2),
            "made for 1 inputs, but got 2",
        ),
        (
            lambda: Reconstruct([SPEC])((torch.zeros(4, 6),), None, (torch.zeros(3, 6),)),
            r"got one of shape \(3, 6\) with values of a batch of 4",
        ),
    ],
)
def test_refusals(make: Any, words: str) -> None:
    with pytest.raises(DecouplingError, match=words):
        make()


def test_batches_of_other_sizes() -> None:
    trainer = trainer_of(Sum("reconstruct", Local))
    for size in (8, 3, 2, 8):
        x, y = batch(size, size)
        trainer.step(x, target=y)


def test_its_predictions_leave_random_numbers_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for _ in itertools.repeat(None, 2):
        make_source("reconstruct", [SPEC], None, lambda _: [SPEC])
    assert torch.equal(torch.get_rng_state(), before)

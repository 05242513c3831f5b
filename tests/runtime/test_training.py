"""Training that people can rely on: the loop, its state, dtypes, modes, and models that change
under way.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dni_fx
from dni_fx.errors import DecouplingError, PlanMismatchError

from ..helpers.oracles import (
    adam,
    assert_bits_equal,
    composed_check,
    decoupled_run,
    exact_run,
    frozen,
    sgd,
    state_of,
)
from ..models.zoo import BY_NAME, Inception, mlp_chain, norm_dropout_chain

CUTS = ["3", "6"]
SOURCES = ("linear", "mlp", "stale", "zero", "exact")


def fresh() -> nn.Module:
    """BatchNorm and dropout, the same bits each time; the global generator goes on from where it
    was.
    """
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return norm_dropout_chain()


def batches(
    count: int, size: int = 4, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(size, 6, generator=generator).to(dtype),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def decouple(
    gradients: Any = "linear",
    *,
    cuts: list[str] = CUTS,
    model: nn.Module | None = None,
    **options: Any,
) -> dni_fx.Decoupled:
    model = fresh() if model is None else model
    options.setdefault("example_inputs", (batches(1)[0][0].to(next(model.parameters()).dtype),))
    options.setdefault("context", dni_fx.one_hot(3))
    return dni_fx.decouple(model, cuts, gradients=gradients, **options)


def make_trainer(
    gradients: Any = "linear", optimizer: Any = adam, loss: Any = F.cross_entropy, **options: Any
) -> dni_fx.Trainer:
    names = ("accumulate", "clip_norm", "metrics_every", "synthesizer_optimizer")
    mine = {k: options.pop(k) for k in names if k in options}
    return dni_fx.Trainer(decouple(gradients, **options), loss, optimizer=optimizer, **mine)


def whole(trainer: dni_fx.Trainer) -> dict[str, Any]:
    """All that the next step depends on, copied."""
    return {"state": copy.deepcopy(trainer.state_dict()), "buffers": state_of(trainer.decoupled)}


# The loop.
# ---------------------------------------------------------------------------------------------------------


def train_by_hand(
    decoupled: dni_fx.Decoupled, optimizers: list[Any], x: Tensor, target: Tensor
) -> Tensor:
    """The lower-level loop of the documentation: what ``Trainer.step`` does, without its checks."""
    values, targets, predictions = decoupled.bind(x), {}, []
    for optimizer in optimizers:
        optimizer.zero_grad()
    for stage in decoupled.stages:
        result = stage.step(values, decoupled.context(target), F.cross_entropy, target)
        values.update(result.outputs)
        predictions.append(result.predictions)
        for name, gradient in result.input_gradients.items():
            targets[name] = targets[name] + gradient if name in targets else gradient
    for stage, predicted in zip(decoupled.stages, predictions, strict=True):
        stage.fit(predicted, targets)
    for optimizer in optimizers:
        optimizer.step()
    return result.loss


@pytest.mark.parametrize("gradients", ["linear", "mlp", "stale", "zero"])
def test_the_loop_by_hand_equals_the_trainer(gradients: str) -> None:
    trainer, by_hand = make_trainer(gradients), decouple(gradients)
    by_hand.load_state_dict(trainer.decoupled.state_dict())
    optimizers = [adam(s.named_parameters()) for s in by_hand.stages]
    optimizers += [
        torch.optim.Adam(s.named_parameters())
        for s in by_hand.sources.values()
        if list(s.parameters())
    ]
    for step, (x, target) in enumerate(batches(5)):
        torch.manual_seed(step)
        expected = train_by_hand(by_hand, optimizers, x, target)
        torch.manual_seed(step)
        assert_bits_equal(
            trainer.step(x, target=target).loss, expected, f"{gradients}: loss of step {step}"
        )
    assert_bits_equal(trainer.decoupled.state_dict(), by_hand.state_dict(), f"{gradients}: state")


def test_fit_over_a_loader_equals_steps() -> None:
    torch.manual_seed(3)
    x, target = torch.randn(22, 6), torch.randint(0, 3, (22,))
    loader = DataLoader(TensorDataset(x, target), batch_size=4)
    fitted, stepped, seen = make_trainer("mlp"), make_trainer("mlp"), []
    torch.manual_seed(0)
    report = fitted.fit(loader, epochs=2, progress=False, on_step=seen.append)
    torch.manual_seed(0)
    for _ in range(2):
        for batch in DataLoader(TensorDataset(x, target), batch_size=4):
            last = stepped.step(batch[0], target=batch[1])
    assert [r.step for r in seen] == list(range(1, 13))
    assert seen[-1] is report
    assert report.outputs.shape == (2, 3)  # the last short batch
    assert_bits_equal(report.loss, last.loss, "last loss")
    assert_bits_equal(
        fitted.decoupled.state_dict(), stepped.decoupled.state_dict(), "state after fit"
    )
    assert fitted.fit([], progress=False) is None


def test_fit_asks_a_loader_for_one_iterator_an_epoch() -> None:
    class Counting(list):
        iterators = 0

        def __iter__(self) -> Any:
            type(self).iterators += 1  # a DataLoader would draw a seed and start its workers
            return super().__iter__()

    make_trainer().fit(Counting(batches(3)), epochs=2, progress=False)
    assert Counting.iterators == 2


def test_fit_takes_dicts_and_other_forms() -> None:
    a, b, c = make_trainer(), make_trainer(), make_trainer()
    x, target = batches(1)[0]
    torch.manual_seed(0)
    a.fit([(x, target)], progress=False)
    torch.manual_seed(0)
    b.fit([{"input": x, "labels": target}], progress=False)
    torch.manual_seed(0)
    c.fit([(target, x)], progress=False, unpack=lambda batch: ((batch[1],), {}, batch[0]))
    assert_bits_equal(state_of(a.decoupled), state_of(b.decoupled), "dict batch")
    assert_bits_equal(state_of(a.decoupled), state_of(c.decoupled), "unpacked batch")


def test_fit_shows_progress(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer()
    trainer.fit(batches(12), epochs=1)
    assert "epoch 1/1" in capsys.readouterr().err
    trainer.fit(batches(2), progress=False)
    assert capsys.readouterr().err == ""


# State.
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("gradients", SOURCES)
def test_resuming_is_bit_equal(gradients: str, accumulate: int, optimizer: Any) -> None:
    first, data = make_trainer(gradients, optimizer, accumulate=accumulate), batches(10)
    for x, target in data[:5]:  # with accumulate=3 this stops within an update
        first.step(x, target=target)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    for x, target in data[5:]:
        first.step(x, target=target)
    torch.manual_seed(123)
    second = make_trainer(gradients, optimizer, accumulate=accumulate)
    for x, target in batches(2):  # what it did before does not matter
        second.step(-x, target=target)
    second.load_state_dict(torch.load(file, weights_only=True))
    for x, target in data[5:]:
        second.step(x, target=target)
    assert_bits_equal(whole(second), whole(first), f"{gradients}: resumed")


def test_loading_does_not_share_memory_with_the_state() -> None:
    trainer, (x, target) = make_trainer("mlp", accumulate=2), batches(1)[0]
    trainer.step(x, target=target)
    state = trainer.state_dict()
    kept = copy.deepcopy(state)
    other = make_trainer("mlp", accumulate=2)
    other.load_state_dict(state)
    for _ in range(3):
        other.step(x, target=target)
    assert_bits_equal(state, kept, "a loaded state, after training on")


def test_state_keys() -> None:
    model = fresh()
    keys = list(model.state_dict())
    decoupled = decouple("mlp", model=model)
    prefixes = {key.split(".")[0] for key in decoupled.state_dict()}
    assert prefixes == {"model", "synthesizers"}
    assert [
        k.removeprefix("model.") for k in decoupled.state_dict() if k.startswith("model.")
    ] == keys
    assert {
        k.split(".")[1] for k in decoupled.state_dict() if k.startswith("synthesizers.")
    } == set(CUTS)
    assert {n.split(".")[0] for n, _ in decoupled.named_parameters()} == {"model", "synthesizers"}
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=adam)
    before = set(decoupled.state_dict())
    trainer.fit(batches(3), progress=False)
    assert set(decoupled.state_dict()) == before  # complete as soon as it is traced
    fresh().load_state_dict(model.state_dict())


def test_the_users_model_is_untouched() -> None:
    model = fresh()
    model[0].register_forward_hook(lambda *_: None)
    model[4].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    mark = model.forward
    tensors = {id(t) for t in [*model.parameters(), *model.buffers()]}
    state, gradient, generator = state_of(model), model[0].weight.grad, torch.get_rng_state()
    modes, hooks = (
        [m.training for m in model.modules()],
        [dict(m._forward_hooks) for m in model.modules()],
    )
    tables = [sorted(vars(m)) for m in model.modules()]
    for gradients in SOURCES:
        dni_fx.decouple(model, CUTS, example_inputs=(batches(1)[0][0],), gradients=gradients)
    assert type(model) is nn.Sequential
    assert model.forward == mark
    assert "forward" not in vars(model)
    assert tensors == {id(t) for t in [*model.parameters(), *model.buffers()]}
    assert_bits_equal(state_of(model), state, "model after decouple")
    assert_bits_equal(torch.get_rng_state(), generator, "generator after decouple")
    assert model[0].weight.grad is gradient
    assert bool((gradient == 1).all())
    assert modes == [m.training for m in model.modules()]
    assert hooks == [dict(m._forward_hooks) for m in model.modules()]
    assert tables == [sorted(vars(m)) for m in model.modules()]
    copy.deepcopy(model)


# Optimisers.
# -------------------------------------------------------------------------------------------------------


def test_clipping_is_per_stage() -> None:
    norms: dict[str, list[Tensor]] = {"clipped": [], "free": []}

    def noting(kind: str) -> Callable[[Any], torch.optim.Optimizer]:
        def make(params: Any) -> torch.optim.Optimizer:
            pairs = list(params)
            optimizer = torch.optim.SGD(pairs, lr=0.0)
            optimizer.register_step_pre_hook(
                lambda *_: norms[kind].append(
                    nn.utils.get_total_norm([p.grad for _, p in pairs if p.grad is not None])
                )
            )
            return optimizer

        return make

    x, target = batches(1)[0]
    for kind, clip in (("clipped", 0.1), ("free", None)):
        torch.manual_seed(0)
        make_trainer("exact", noting(kind), clip_norm=clip).step(x, target=target)
    assert len(norms["free"]) == 3
    for clipped, free in zip(norms["clipped"], norms["free"], strict=True):
        assert float(free) > 0.1
        assert float(clipped) == pytest.approx(0.1, rel=1e-4)


def test_learning_rate_schedulers() -> None:
    trainer = make_trainer("exact", lambda params: torch.optim.SGD(params, lr=0.1))
    model, (x, target) = fresh(), batches(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    schedulers = [
        torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in trainer.optimizers.values()
    ]
    assert list(trainer.optimizers) == ["stage_0", "stage_1", "stage_2"]
    for step in range(3):
        torch.manual_seed(step)
        trainer.step(x, target=target)
        for scheduler in schedulers:
            scheduler.step()
        torch.manual_seed(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        plain.step()
    assert_bits_equal(
        state_of(trainer.decoupled.model), state_of(model), "with a scheduler per stage"
    )


def test_optimizers_get_the_models_own_names() -> None:
    given: list[list[str]] = []

    def make(params: Any) -> torch.optim.Optimizer:
        pairs = list(params)
        given.append([n for n, _ in pairs])
        return torch.optim.SGD(pairs, lr=0.1)

    trainer = make_trainer("exact", make)
    assert given == [["0.weight", "0.bias", "1.weight", "1.bias"], ["4.weight", "4.bias", "5.weight", "5.bias"],
                     ["8.weight", "8.bias"]]  # fmt: skip
    assert trainer.synthesizer_optimizers == {}


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_accumulation_in_exact_mode_equals_a_plain_loop(optimizer: Any) -> None:
    trainer, model, data = make_trainer("exact", optimizer, accumulate=3), fresh(), batches(9)
    plain = optimizer(model.named_parameters())
    torch.manual_seed(1)
    losses = [trainer.step(x, target=target).loss for x, target in data]
    torch.manual_seed(1)
    for step, (x, target) in enumerate(data):
        loss = F.cross_entropy(model(x), target)
        (loss / 3).backward()
        assert float(losses[step]) == pytest.approx(loss.item(), rel=1e-6)
        if step % 3 == 2:
            plain.step()
            plain.zero_grad()
    assert_bits_equal(state_of(trainer.decoupled.model), state_of(model), "accumulated")


def test_gradients_left_by_the_user_do_not_count() -> None:
    clean, dirty, (x, target) = make_trainer("mlp"), make_trainer("mlp"), batches(1)[0]
    for parameter in dirty.decoupled.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    for trainer in (clean, dirty):
        torch.manual_seed(0)
        trainer.step(x, target=target)
    assert_bits_equal(
        state_of(dirty.decoupled), state_of(clean.decoupled), "with old gradients about"
    )


# Dtypes, layouts, batch sizes.
# -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward_inside", [True, False])
def test_bf16_autocast_around_an_exact_step_equals_eager(backward_inside: bool) -> None:
    trainer, model = make_trainer("exact", sgd), fresh()
    optimizer = sgd(model.named_parameters())
    for step, (x, target) in enumerate(batches(4)):
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            report = trainer.step(x, target=target)
        torch.manual_seed(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
            loss = F.cross_entropy(output, target)
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        optimizer.step()
        assert_bits_equal(
            [report.loss, report.outputs], [loss, output], f"step {step} under autocast"
        )
        assert_bits_equal(
            state_of(trainer.decoupled.model), state_of(model), f"step {step} under autocast"
        )


@pytest.mark.parametrize("gradients", ["linear", "mlp", "stale", "zero"])
def test_bf16_autocast_around_a_decoupled_step(gradients: str) -> None:
    trainer = make_trainer(gradients, metrics_every=1)
    for x, target in batches(3):
        with torch.autocast("cpu", torch.bfloat16):
            report = trainer.step(x, target=target)
    assert report.outputs.dtype == torch.bfloat16
    assert all(
        p.dtype == p.grad.dtype == torch.float32 for p in trainer.decoupled.model.parameters()
    )
    assert report.loss.isfinite()
    assert trainer.step(*batches(1)[0][:1], target=batches(1)[0][1]).outputs.dtype == torch.float32


@pytest.mark.parametrize("gradients", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(gradients: str, dtype: torch.dtype) -> None:
    trainer = make_trainer(gradients, sgd, model=fresh().to(dtype))
    for x, target in batches(3, dtype=dtype):
        report = trainer.step(x, target=target)
    assert report.outputs.dtype == dtype
    assert {p.dtype for p in trainer.decoupled.model.parameters()} == {dtype}
    if dtype == torch.float64:
        assert {p.dtype for p in trainer.decoupled.synthesizers.parameters()} <= {dtype}


def test_channels_last_is_kept() -> None:
    case = BY_NAME["channels_last"]
    record = exact_run(case, torch.float32, sgd)
    assert_bits_equal(record, decoupled_run(case, torch.float32, sgd, gradients="exact"), "itself")
    model = case.build()
    (x,), _ = case.inputs(4, torch.float32)
    decoupled = dni_fx.decouple(model, list(case.cuts), example_inputs=(x,), gradients="conv")
    stage = decoupled.stages[0]
    result = stage.step(decoupled.bind(x))
    (value,) = [result.outputs[n] for n in result.predictions]
    assert value.is_contiguous(memory_format=torch.channels_last)
    (prediction,) = result.predictions.values()
    assert prediction.gradients[0].stride() == value.stride()


@pytest.mark.parametrize("gradients", SOURCES)
def test_batches_of_any_size(gradients: str) -> None:
    model = mlp_chain()
    decoupled = dni_fx.decouple(
        model, ["1", "3"], example_inputs=(torch.randn(4, 6),), gradients=gradients
    )
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    for size in (4, 1, 7, 2, 1):
        report = trainer.step(torch.randn(size, 6), target=torch.randint(0, 3, (size,)))
        assert report.outputs.shape == (size, 3)
    assert len(decoupled.graphs.variants) == 1


def test_an_example_batch_of_one_serves_others() -> None:
    for kind in ("auto", "linear", "mlp"):
        for context in (None, dni_fx.one_hot(3)):
            decoupled = dni_fx.decouple(
                mlp_chain(),
                ["1"],
                example_inputs=(torch.randn(1, 6),),
                gradients=kind,
                context=context,
            )
            trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
            for size in (1, 5):
                trainer.step(torch.randn(size, 6), target=torch.randint(0, 3, (size,)))


class NormalisedWeight(nn.Module):
    """A value computed from parameters alone, without a batch dimension, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(8, 6)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.tanh(self.weight)
        size = weight.square().mean()
        return self.out(F.linear(x, weight / size))


@pytest.mark.parametrize("cut", ["tanh", "mean"])
@pytest.mark.parametrize("context", [None, dni_fx.one_hot(3)], ids=["DNI", "cDNI"])
def test_values_without_a_batch_dimension(cut: str, context: Any) -> None:
    x, target = batches(1)[0]
    decoupled = dni_fx.decouple(NormalisedWeight(), [cut], example_inputs=(x,), context=context)
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    assert [trainer.step(x, target=target).loss.isfinite() for _ in range(3)] == [True] * 3


def test_integer_inputs() -> None:
    trainer = dni_fx.Trainer(
        dni_fx.decouple(nn.Sequential(nn.Embedding(11, 8), nn.Flatten(), nn.Linear(40, 3)), ["0"],
                        example_inputs=(torch.zeros(4, 5, dtype=torch.long),)),
        F.cross_entropy, optimizer=sgd,
    )  # fmt: skip
    for dtype in (
        torch.long,
        torch.int32,
    ):  # another dtype that the model takes: a graph of its own
        trainer.step(torch.randint(0, 11, (4, 5)).to(dtype), target=torch.randint(0, 3, (4,)))


# Modes, guards, and models that change.
# ----------------------------------------------------------------------------


def eager_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor
) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), target).backward()
    optimizer.step()


def test_frozen_norms_stay_in_eval_mode() -> None:
    model, plain = fresh(), fresh()
    for m in (model, plain):
        m[1].eval()
        m[5].eval()
    trainer, optimizer = make_trainer("exact", sgd, model=model), sgd(plain.named_parameters())
    means = model[1].running_mean.clone()
    for step, (x, target) in enumerate(batches(3)):
        torch.manual_seed(step)
        trainer.step(x, target=target)
        torch.manual_seed(step)
        eager_step(plain, optimizer, x, target)
    assert torch.equal(model[1].running_mean, means)
    assert_bits_equal(state_of(model), state_of(plain), "frozen norms")
    assert [model[i].training for i in (0, 1, 3, 5)] == [True, False, True, False]


def test_mode_switched_after_decoupling() -> None:
    """Through the model, one module, or the decoupled model; dropout and norms follow."""
    trainer, plain = make_trainer("exact", sgd), fresh()
    optimizer, model = sgd(plain.named_parameters()), trainer.decoupled.model
    switches: list[Callable[[nn.Module], Any]] = [
        lambda m: m.eval(), lambda m: m.train(), lambda m: m[1].eval(), lambda m: m[3].eval(), lambda m: m.train(),
    ]  # fmt: skip
    for step, switch in enumerate(switches):
        switch(model)
        switch(plain)
        x, target = batches(5)[step]
        torch.manual_seed(step)
        trainer.step(x, target=target)
        torch.manual_seed(step)
        eager_step(plain, optimizer, x, target)
        assert_bits_equal(state_of(model), state_of(plain), f"switch {step}")


def test_control_flow_on_training() -> None:
    case = BY_NAME["inception"]
    decoupled = dni_fx.decouple(
        case.build(),
        list(case.cuts),
        example_inputs=case.inputs(4, torch.float32)[0],
        gradients="exact",
    )
    assert (
        composed_check(case, torch.float32, decoupled=decoupled, modes=("train", "eval", "train"))
        >= 6
    )
    decoupled = dni_fx.decouple(
        Inception().eval(), ["stem"], example_inputs=case.inputs(4, torch.float32)[0]
    )
    assert composed_check(case, torch.float32, decoupled=decoupled, modes=("eval",)) >= 1


class Guarded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for t in range(x.shape[1]):  # unrolled: another length is another graph
            h = h + self.mix(h[:, t : t + 1]) / (t + 1)
        h = h.tanh()
        if x.shape[0] > 1:
            h = h - h.mean(0)
        return self.head(h.sum(1))


@pytest.mark.parametrize("lazily", [True, False])
@pytest.mark.parametrize("gradients", ["exact", "linear"])
def test_guards_retrace_under_the_same_plan(gradients: str, lazily: bool) -> None:
    torch.manual_seed(0)
    model = Guarded()
    plain = copy.deepcopy(model)
    example = None if lazily else (torch.randn(4, 3, 5),)
    decoupled = dni_fx.decouple(
        model, ["embed", "tanh"], example_inputs=example, gradients=gradients
    )
    trainer, optimizer = (
        dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd),
        sgd(plain.named_parameters()),
    )
    for shape in ((4, 3, 5), (2, 4, 5), (1, 3, 5), (4, 3, 5), (3, 3, 5), (1, 4, 5)):
        x, target = torch.randn(shape), torch.randint(0, 3, shape[:1])
        if gradients == "linear":
            plain.load_state_dict(model.state_dict())
        assert_bits_equal(decoupled(x), plain(x), f"composed {shape}")
        trainer.step(x, target=target)
        if gradients == "exact":
            eager_step(plain, optimizer, x, target)
            assert_bits_equal(state_of(model), state_of(plain), f"trained on {shape}")
    count = len(decoupled.graphs.variants)
    assert count <= 4 + (not lazily)  # with examples the self-check adds one for evaluation
    trainer.step(torch.randn(4, 3, 5), target=torch.randint(0, 3, (4,)))
    assert len(decoupled.graphs.variants) == count  # cached


def test_lazy_tracing_trains_as_eager_tracing() -> None:
    lazy = dni_fx.Trainer(
        dni_fx.decouple(fresh(), CUTS, gradients="mlp"), F.cross_entropy, optimizer=adam
    )
    ready = make_trainer("mlp", context=None)
    assert lazy.optimizers == {}
    ready.decoupled.load_state_dict(ready.decoupled.state_dict())
    x, target = batches(1)[0]
    lazy.decoupled.bind(x)
    lazy.decoupled.load_state_dict(ready.decoupled.state_dict())
    for step in range(2):
        for trainer in (lazy, ready):
            torch.manual_seed(step)
            trainer.step(x, target=target)
    assert_bits_equal(state_of(lazy.decoupled), state_of(ready.decoupled), "lazily traced")
    assert lazy.decoupled.plan == ready.decoupled.plan


@pytest.mark.parametrize("gradients", ["exact", "linear"])
def test_parameters_loaded_after_decoupling_are_used(gradients: str) -> None:
    trainer, other, (x, _) = make_trainer(gradients), norm_dropout_chain().eval(), batches(1)[0]
    trainer.decoupled.model.load_state_dict(other.state_dict())
    assert_bits_equal(trainer.decoupled.eval()(x), other(x), "loaded")
    third = norm_dropout_chain().eval()
    trainer.decoupled.model.load_state_dict(
        third.state_dict(), assign=True
    )  # other objects under the same names
    trainer.decoupled.model.eval()
    assert_bits_equal(trainer.decoupled(x), third(x), "assigned")


def test_a_replaced_parameter_or_module_is_noticed() -> None:
    decoupled = decouple("exact")
    model, (x, target) = decoupled.model, batches(1)[0]
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    trainer.step(x, target=target)
    model[4].weight = nn.Parameter(torch.randn(8, 8))
    assert_bits_equal(decoupled.eval()(x), model(x), "another parameter")
    model[8] = nn.Linear(8, 3)
    assert_bits_equal(decoupled(x), model(x), "another module")
    decoupled.train()
    before = [model[4].weight.detach().clone(), model[8].weight.detach().clone()]
    # the new parameter is trained, or an error says that the optimiser does not have it: never
    # silently neither
    try:
        trainer.step(x, target=target)
    except DecouplingError as error:
        assert "Trainer" in str(error) or "optimi" in str(error)  # noqa: PT017
    else:
        assert not torch.equal(before[0], model[4].weight)
        assert not torch.equal(before[1], model[8].weight)


def test_another_dtype_after_decoupling() -> None:
    decoupled = decouple("linear")
    model, (x, target) = decoupled.model, batches(1)[0]
    model.double().eval()
    assert_bits_equal(decoupled(x.double()), model(x.double()), "double after decoupling")
    trainer = dni_fx.Trainer(decouple("exact", model=fresh()), F.cross_entropy, optimizer=sgd)
    trainer.decoupled.double()
    plain = fresh().double()
    optimizer = sgd(plain.named_parameters())
    torch.manual_seed(0)
    trainer.step(x.double(), target=target)
    torch.manual_seed(0)
    eager_step(plain, optimizer, x.double(), target)
    assert_bits_equal(state_of(trainer.decoupled.model), state_of(plain), "trained in double")


@pytest.mark.parametrize("index", [0, 4, 8])
def test_freezing_after_decoupling(index: int) -> None:
    trainer, plain = make_trainer("exact", sgd), fresh()
    optimizer, model = sgd(plain.named_parameters()), trainer.decoupled.model
    for step, (x, target) in enumerate(batches(4)):
        for m in (model, plain):
            m[index].requires_grad_(step in (0, 3))
        torch.manual_seed(step)
        trainer.step(x, target=target)
        torch.manual_seed(step)
        eager_step(plain, optimizer, x, target)
        assert_bits_equal(
            state_of(model), state_of(plain), f"step {step}: layer {index} frozen, then unfrozen"
        )


def test_unfreezing_what_was_frozen_when_decoupled() -> None:
    model = fresh()
    model[4].requires_grad_(False)
    trainer = make_trainer("exact", sgd, model=model)
    model[4].requires_grad_(True)
    before, (x, target) = model[4].weight.detach().clone(), batches(1)[0]
    try:
        trainer.step(x, target=target)
    except DecouplingError as error:
        assert "4.weight" in str(error) or "unfrozen" in str(error)  # noqa: PT017
    else:
        assert not torch.equal(model[4].weight, before)


def test_unfreezing_a_whole_stage_needs_a_new_plan() -> None:
    model = mlp_chain()
    model[0].requires_grad_(False)
    decoupled = dni_fx.decouple(model, ["3"], example_inputs=(batches(1)[0][0],))
    model[0].requires_grad_(True)
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    before, (x, target) = model[0].weight.detach().clone(), batches(1)[0]
    trainer.step(x, target=target)  # the value at '3' carried a gradient before and still does
    assert "0.weight" in dict(decoupled.stages[0].named_parameters())
    assert trainer.decoupled.interfaces[0].name == "3"
    assert torch.equal(before, model[0].weight)  # a fresh synthesizer predicts zero
    trainer.step(x, target=target)
    assert not torch.equal(before, model[0].weight)


def test_decoupling_twice_is_independent() -> None:
    model, (x, target) = fresh(), batches(1)[0]
    one, two = decouple("mlp", model=model), decouple("linear", model=model, cuts=["1"])
    assert one.model is two.model
    assert len(one.stages) == 3
    assert len(two.stages) == 2
    first = dni_fx.Trainer(one, F.cross_entropy, optimizer=sgd)
    second = dni_fx.Trainer(two, F.cross_entropy, optimizer=sgd)
    code = one.stages[0].code, two.stages[0].code
    for trainer in (first, second, first):
        trainer.step(x, target=target)
    assert (one.stages[0].code, two.stages[0].code) == code
    one.eval()
    assert_bits_equal(one(x), two(x), "two cuts of one model")
    assert_bits_equal(one(x), model(x), "cut and uncut")


def test_a_stage_decoupled_again() -> None:
    decoupled = decouple("exact", cuts=["6"])
    stage, (x, _) = decoupled.stages[0], batches(1)[0]
    inner = dni_fx.decouple(stage.module, ["1", "4"], example_inputs=(x,), gradients="exact")
    assert len(inner.stages) == 3
    outer = {id(p) for p in stage.parameters()}
    assert {id(p) for p in inner.model.parameters()} == outer
    decoupled.eval()
    stage.module.eval()
    assert_bits_equal(inner(x), stage.module(x), "a stage, cut again")
    trainer = dni_fx.Trainer(inner, lambda output, _: output[0].square().mean(), optimizer=sgd)
    before = decoupled.model[0].weight.detach().clone()
    trainer.step(x)
    assert not torch.equal(before, decoupled.model[0].weight)  # the user's own parameters


# Reports and references.
# -------------------------------------------------------------------------------------------


def test_metrics() -> None:
    trainer = make_trainer("mlp", metrics_every=3)
    data = batches(8)
    reports = [trainer.step(x, target=target) for x, target in data]
    assert [r.step for r in reports] == list(range(1, 9))
    assert [r.interfaces["6"].step for r in reports] == [0, 0, 0, 3, 3, 3, 6, 6]
    assert math.isnan(reports[0].interfaces["6"].cosine)  # a fresh synthesizer predicts zero
    assert reports[0].interfaces["6"].relative_error == pytest.approx(1.0)
    assert -1 <= reports[-1].interfaces["6"].cosine <= 1
    assert reports[-1].interfaces["6"].reference == "true"
    assert reports[-1].interfaces["3"].reference == "bootstrapped"
    trainer.request_metrics()
    assert trainer.step(*data[0][:1], target=data[0][1]).interfaces["6"].step == 8
    assert not reports[-1].loss.requires_grad
    assert not reports[-1].outputs.requires_grad


def test_metrics_do_not_change_training() -> None:
    often, rarely = make_trainer("mlp", metrics_every=1), make_trainer("mlp", metrics_every=1000)
    for trainer in (often, rarely):
        torch.manual_seed(0)
        trainer.fit(batches(5), progress=False)
    assert_bits_equal(
        state_of(often.decoupled), state_of(rarely.decoupled), "with and without metrics"
    )


@pytest.mark.parametrize("gradients", SOURCES)
def test_true_gradients_equal_autograd_and_change_nothing(gradients: str) -> None:
    trainer, data = make_trainer(gradients, accumulate=2), batches(3)
    for x, target in data:  # stops within an update, so gradients are held
        trainer.step(x, target=target)
    x, target = data[0]
    held = {n: None if p.grad is None else p.grad for n, p in trainer.decoupled.named_parameters()}
    before = frozen(held), state_of(trainer.decoupled), torch.get_rng_state(), trainer.steps
    true = trainer.true_gradients(x, target=target)
    after = frozen(held), state_of(trainer.decoupled), torch.get_rng_state(), trainer.steps
    assert_bits_equal(after, before, "after true_gradients")
    assert all(p.grad is held[n] for n, p in trainer.decoupled.named_parameters())

    model = copy.deepcopy(trainer.decoupled.model)
    values: dict[str, Tensor] = {}
    for name in CUTS:

        def keep(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            output.retain_grad()
            values[name] = output

        model[int(name)].register_forward_hook(keep)
    F.cross_entropy(model(x), target).backward()
    assert_bits_equal(true, {n: v.grad for n, v in values.items()}, "true gradients")


def test_zero_lets_nothing_through() -> None:
    trainer, (x, target) = make_trainer("zero", sgd), batches(1)[0]
    before = state_of(trainer.decoupled.model)
    for _ in range(3):
        trainer.step(x, target=target)
    after = dict(trainer.decoupled.model.named_parameters())
    for name, parameter in after.items():
        if name[0] in "045":
            assert torch.count_nonzero(parameter.grad) == 0
            assert torch.equal(parameter, before[name])
    assert not torch.equal(after["8.weight"], before["8.weight"])


def test_stale_is_the_gradient_of_the_step_before() -> None:
    trainer = dni_fx.Trainer(
        dni_fx.decouple(mlp_chain(), ["3"], example_inputs=(torch.randn(4, 6),), gradients="stale"),
        F.cross_entropy, optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
    )  # fmt: skip
    data, model = batches(3), trainer.decoupled.model
    late: Tensor | None = None
    for x, target in data:
        true = trainer.true_gradients(x, target=target)["3"]
        trainer.step(x, target=target)
        got = model[2].weight.grad
        h = model[3](model[2](model[1](model[0](x))))
        expected = (
            torch.zeros_like(got)
            if late is None
            else torch.autograd.grad(h, model[2].weight, late)[0]
        )
        assert_bits_equal(got, expected, "gradient before the cut")
        late = true


def test_a_new_mode_that_cannot_be_cut_says_so() -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.c(self.b(h).relu() if self.training else h)

    model, (x, target) = Shortcut(), batches(1)[0]
    decoupled = dni_fx.decouple(model, ["b"], example_inputs=(x,))
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    model.eval()
    assert_bits_equal(decoupled(x), model(x), "evaluation without the cut")
    with pytest.raises(PlanMismatchError, match="'b'"):
        trainer.step(x, target=target)
    model.train()
    trainer.step(x, target=target)

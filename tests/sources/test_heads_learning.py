"""Loss heads: what each learns, the contract, and refusals."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dni_fx.errors import DecouplingError
from dni_fx.plan import TensorSpec
from dni_fx.sources import GradientSource, make_source, one_hot
from dni_fx.sources.heads import Critic, Distill, Local, LossHead, Sobolev

from ..helpers.training import teach
from .heads import HEADS, KINDS, LABELS, Y, cosine, message_for, random_tensor, spec_of


def problem(kind: str = "vector", batch: int = 32) -> tuple[TensorSpec, Tensor, Tensor]:
    shape = (batch, *KINDS[kind][0][1:])
    value = random_tensor(*shape, seed=3)
    return (
        TensorSpec(shape, torch.float64, KINDS[kind][1]),
        value,
        one_hot(3)(torch.arange(batch) % 3),
    )


@pytest.mark.parametrize("kind", ["vector", "map2d", "tokens"])
def test_local_learns_the_labels(kind: str) -> None:
    spec, value, labels = problem(kind)
    head = Local([spec], TensorSpec(labels.shape, labels.dtype))
    assert head.message == "none"
    losses = teach(head, ((value,), labels), (), 60)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_critic_learns_losses_that_are_a_heads(distance: str) -> None:
    spec, value, labels = problem()
    context = TensorSpec(labels.shape, labels.dtype)
    torch.manual_seed(7)
    teacher = Local([spec], context, hidden=0)
    teacher.output.weight.data *= 3
    known = teacher((value,), labels)
    critic = Critic([spec], context, distance=distance)
    before = critic((value,), labels)
    losses = teach(critic, ((value,), labels), (known.loss,), 300)
    assert losses[-1] < 0.1 * losses[0]
    after = critic((value,), labels)
    measure = F.l1_loss if distance == "l1" else F.mse_loss
    assert measure(before.loss, known.loss).item() == pytest.approx(losses[0])
    assert cosine(after.gradients[0], known.gradients[0]) > max(
        0.8, cosine(before.gradients[0], known.gradients[0])
    )

    wrong = Critic([spec], context, distance=distance)  # control: the losses of other samples
    teach(wrong, ((value,), labels), (known.loss.roll(1),), 300)
    assert cosine(wrong((value,), labels).gradients[0], known.gradients[0]) < 0.8
    with pytest.raises(DecouplingError, match=r"unknown distance 'l3' .* known: 'l1', 'l2'"):
        Critic([spec], context, distance="l3")


def test_sobolev_also_learns_gradients() -> None:
    spec, value, labels = problem()
    context = TensorSpec(labels.shape, labels.dtype)
    torch.manual_seed(7)
    known = Local([spec], context, hidden=0)((value,), labels)
    message = (
        known.gradients[0] / 8,
        known.loss.roll(1),
    )  # losses that say nothing; gradients of accumulated steps
    found = {}
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        head = Sobolev([spec], context, weight=weight)
        head.unit = 1 / 8
        start = cosine(head((value,), labels).gradients[0], known.gradients[0])
        teach(head, ((value,), labels), message, 200)
        found[weight] = cosine(head((value,), labels).gradients[0], known.gradients[0])
        assert head.running.scale.item() == pytest.approx(message[0].square().mean().sqrt().item())
    assert found[10.0] > 0.9 > start
    assert found[0.0] < 0.5  # control: the critic's term alone

    fresh = Sobolev([spec], context)  # zeros, from a stage that has not learnt yet, have no scale
    prediction = fresh((value,), labels)
    loss = fresh.fit(prediction, (torch.zeros_like(value), known.loss))
    torch.testing.assert_close(loss.detach(), (prediction.loss - known.loss).abs().mean())
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in fresh.parameters())


@pytest.mark.parametrize("kinds", [("vector",), ("map2d",), ("map2d", "tokens")])
def test_sobolev_differentiates_twice(kinds: tuple[str, ...]) -> None:
    values = tuple(random_tensor(*spec_of(k).shape, seed=i) for i, k in enumerate(kinds))
    head = Sobolev([spec_of(k) for k in kinds], LABELS, weight=0.7, factor=3.0)
    head.unit = 0.5
    message = message_for(head, values)
    labels = one_hot(3)(Y)
    head.fit(
        head(values, labels), message
    )  # makes the scale known: it stays then, as the target does

    def loss() -> Tensor:
        return head.fit(head(values, labels), message)

    def by_hand() -> float:
        prediction = head(values, labels)
        scales = [target.square().mean() for target in message[:-1]]
        terms = [
            ((g / 3.0 - target).square().mean() / scale).item()  # without the factor, with the unit
            for g, target, scale in zip(prediction.gradients, message[:-1], scales, strict=True)
        ]
        return (prediction.loss - message[-1]).abs().mean().item() + 0.7 * sum(terms)

    assert loss().item() == pytest.approx(by_hand(), rel=1e-9)
    loss().backward()
    for name, parameter in head.named_parameters():
        direction = random_tensor(*parameter.shape, seed=11)
        analytic = (parameter.grad * direction).sum().item()
        sides = []
        for sign in (1, -1):
            parameter.data += sign * 1e-6 * direction
            sides.append(loss().item())
            parameter.data -= sign * 1e-6 * direction
        assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(analytic, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("labels", [0.0, 1.0])
def test_distill_learns_logits(labels: float, loss: str) -> None:
    spec, value, context = problem()
    shape = TensorSpec(context.shape, context.dtype)
    torch.manual_seed(7)
    teacher = Local([spec], shape, hidden=0)
    teacher.output.weight.data *= 3
    known = teacher((value,), context)
    head = Distill([spec], shape, loss=loss, labels=labels, temperature=2.0)
    first = head((value,), context)
    teach(head, ((value,), context), (known.logits,), 400)
    last = head((value,), context)
    gaps = [(p.logits - known.logits).log_softmax(1).std().item() for p in (first, last)]
    if loss == "mse":
        gaps = [F.mse_loss(p.logits, known.logits).item() for p in (first, last)]
    assert (
        gaps[1] < 0.1 * gaps[0] if labels == 0 else gaps[1] > 0.1 * gaps[0]
    )  # control: labels pull elsewhere

    expected = F.mse_loss(last.logits, known.logits)
    if loss == "cross_entropy":
        p, q = (F.log_softmax(logits / 2, 1) for logits in (last.logits, known.logits))
        expected = 4 * (q.exp() * (q - p)).sum(1).mean()
    expected = expected + labels * last.loss.mean()
    torch.testing.assert_close(head.fit(last, (known.logits,)).detach(), expected)


def test_distill_takes_features_last_or_second() -> None:
    spec, context = spec_of("tokens"), one_hot(3)(torch.arange(20).reshape(4, 5) % 3)
    head = Distill([spec], TensorSpec(context.shape, context.dtype))
    prediction = head((random_tensor(4, 5, 6),), context)
    logits = random_tensor(4, 5, 3, seed=2)
    torch.testing.assert_close(
        head.fit(prediction, (logits,)), head.fit(prediction, (logits.movedim(-1, 1),))
    )
    assert head.fit(prediction, (logits,)) != head.fit(prediction, (logits.roll(1, 1),))


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", HEADS)
def test_contract(make: type[LossHead], kind: str) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    head = make_source(make, [spec_of(kind)], LABELS)
    assert isinstance(head, LossHead)
    names = {n: (t.shape, t.dtype) for n, t in head.state_dict().items()}
    calls = []
    head.output.register_forward_hook(lambda *_: calls.append(1))
    value = random_tensor(*spec_of(kind).shape)
    message = message_for(head, (value,))
    for size in (4, 1):
        part = tuple(t[:size] for t in message)
        prediction = head((value[:size],), one_hot(3)(Y[:size]))
        assert prediction.gradients[0].shape == value[:size].shape
        loss = head.fit(prediction, part)
        loss.backward()
        assert loss.isfinite()
        assert loss.dim() == 0
    assert len(calls) == 2  # one forward a step
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert not value.requires_grad
    assert value.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: (t.shape, t.dtype) for n, t in head.state_dict().items()} == names
    again = make_source(make, [spec_of(kind)], LABELS)
    again.load_state_dict(head.state_dict())
    for model in (head.train(), again.eval()):  # no mode
        assert torch.equal(
            model((value,), one_hot(3)(Y)).gradients[0], head((value,), one_hot(3)(Y)).gradients[0]
        )


@pytest.mark.parametrize("kind", ["vector", "tokens", "map2d"])
@pytest.mark.parametrize("make", HEADS)
def test_counts_itself_without_storage(make: type[LossHead], kind: str) -> None:
    head = make([spec_of(kind)], LABELS)
    before = {n: t.clone() for n, t in head.state_dict().items()}
    forward = 2 * 4 * 3 * head.encoders[0].outputs
    assert GradientSource.flops(head) == head.flops() > 2 * forward
    assert all(torch.equal(t, before[n]) for n, t in head.state_dict().items())
    with torch.no_grad():
        prediction = head((random_tensor(*spec_of(kind).shape),), one_hot(3)(Y))
    assert prediction.gradients[0].abs().sum() > 0


@pytest.mark.matrix
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["vector", "tokens", "map2d"])
@pytest.mark.parametrize("make", HEADS)
def test_dtypes(make: type[LossHead], kind: str, dtype: torch.dtype, autocast: bool) -> None:
    spec = spec_of(kind, dtype)
    head = make([spec], LABELS)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(parameter.dtype == wanted for parameter in head.parameters())
    value = random_tensor(*spec.shape, dtype=dtype)
    message = message_for(head, (value,))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = head((value,), one_hot(3)(Y))
        loss = head.fit(prediction, message)
    loss.backward()
    assert prediction.gradients[0].dtype == dtype
    assert prediction.loss.dtype == prediction.logits.dtype == loss.dtype == wanted
    precise = head.double()((value.double(),), one_hot(3)(Y))
    coarse = 0.99 if autocast or dtype.itemsize == 2 else 1 - 1e-6
    assert cosine(prediction.gradients[0].double(), precise.gradients[0]) > coarse


def test_memory_format_follows_the_value() -> None:
    value = random_tensor(4, 6, 5, 3).to(memory_format=torch.channels_last)
    prediction = Local([spec_of("map2d")], LABELS)((value,), one_hot(3)(Y))
    assert prediction.gradients[0].stride() == value.stride()


@pytest.mark.parametrize("make", HEADS)
def test_heads_need_labels_and_a_batch(make: type[LossHead]) -> None:
    with pytest.raises(
        DecouplingError,
        match=r"has no context\. Pass context=dni_fx\.one_hot.*'linear' or 'delayed'",
    ):
        make_source(make, [spec_of("vector")])
    with pytest.raises(DecouplingError, match=r"serves a scalar.*'linear' or 'delayed'"):
        make([spec_of("vector"), TensorSpec((), torch.float32)], LABELS)
    with pytest.raises(DecouplingError, match=r"unknown loss 'nll'"):
        make([spec_of("vector")], LABELS, loss="nll")
    with pytest.raises(
        DecouplingError, match=r"\(4, 3\) does not line up with a value of shape \(8, 5, 6\)"
    ):
        make([TensorSpec((8, 5, 6), torch.float32)], LABELS)
    with pytest.raises(DecouplingError, match="more than 3 spatial dimensions"):
        make([TensorSpec((4, 6, 1, 1, 1, 1), torch.float32, 1)], LABELS)


def test_other_values_and_contexts_than_the_head_was_made_for() -> None:
    head = Local([spec_of("map2d")], LABELS)
    value = random_tensor(4, 6, 5, 3)
    for context in (None, torch.ones(4, 2), torch.ones(4, 5, 3)):
        with pytest.raises(
            DecouplingError, match=r"made for a context like \(4, 3\), but got .*target="
        ):
            head((value,), context)
    for wrong in (value[:, :2], value[0]):
        with pytest.raises(
            DecouplingError, match=r"made for values like \(4, 6, 5, 3\) .*Decouple again"
        ):
            head((wrong,), one_hot(3)(Y))
    with pytest.raises(
        DecouplingError, match=r"\(2, 3\) does not line up with a value of shape \(4, 6, 5, 3\)"
    ):
        head((value,), one_hot(3)(Y[:2]))
    odd = Local(
        [spec_of("tokens")],
        TensorSpec((4, 5, 3), torch.float32),
        loss=lambda logits, c: logits.sum((0, 2)),
    )
    with pytest.raises(
        DecouplingError, match=r"shape \(5,\) for .* \(4, 5, 3\).* \(4, 5\), or per sample, \(4,\)"
    ):
        odd((random_tensor(4, 5, 6),), torch.ones(4, 5, 3))


def test_messages_that_do_not_fit() -> None:
    value = (random_tensor(4, 6),)

    def refused(make: object, message: tuple[Tensor, ...], match: str) -> None:
        head = make_source(make, [spec_of("vector")], LABELS)  # type: ignore[arg-type]
        with pytest.raises(DecouplingError, match=match):
            head.fit(head(value, one_hot(3)(Y)), message)

    refused(Critic, (torch.ones(()),), r"shape \(\) .* own have shape \(4,\)")
    refused(Sobolev, (torch.ones(4, 6), torch.ones(3)), r"shape \(3,\) .* own have shape \(4,\)")
    refused(Sobolev, (torch.ones(4, 5), torch.ones(4)), r"\[\(4, 5\)\] came back .* \[\(4, 6\)\]")
    refused(
        partial(Distill, labels=0.0),
        (torch.ones(4, 5),),
        r"\(4, 5\) .* \(4, 3\).*as many features as the context",
    )

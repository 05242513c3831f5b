"""Loss heads: their gradients against autograd of the same mathematics written out, what each
learns, and refusals.
"""

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

HEADS = [Local, Critic, Sobolev, Distill]
KINDS = {
    "vector": ((4, 6), -1),
    "flat map": ((4, 6), 1),
    "one feature": ((4,), -1),
    "tokens": ((4, 5, 6), -1),
    "channels last": ((4, 5, 3, 6), -1),
    "map1d": ((4, 6, 5), 1),
    "map2d": ((4, 6, 5, 3), 1),
    "map3d": ((4, 6, 3, 2, 3), 1),
    "map of one pixel": ((4, 6, 1, 1), 1),
}
LABELS = TensorSpec((4, 3), torch.float32)
Y = torch.tensor([0, 2, 1, 2])


def spec_of(kind: str, dtype: torch.dtype = torch.float64) -> TensorSpec:
    shape, feature_dim = KINDS[kind]
    return TensorSpec(shape, dtype, feature_dim)


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def message_for(head: LossHead, values: tuple[Tensor, ...], seed: int = 5) -> tuple[Tensor, ...]:
    """A message of the right shapes, with labels per sample."""
    batch = values[0].shape[0]
    parts = {
        "gradient": tuple(random_tensor(*v.shape, seed=seed).to(v) for v in values),
        "loss": (random_tensor(batch, seed=seed).abs(),),
        "logits": (random_tensor(batch, 3, seed=seed),),
    }
    kinds = [] if head.message == "none" else head.message.split("+")
    return tuple(tensor for kind in kinds for tensor in parts[kind])


def train(head: LossHead, values, context, message, steps: int, lr: float = 0.01) -> list[float]:
    """Adam on a message, or on what ``message`` makes of a prediction; the losses."""
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        prediction = head(values, context)
        loss = head.fit(prediction, message)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ------------------------------------------------------------------------------------------ gradien


def written_out(head: LossHead, value: Tensor) -> Tensor:
    """The logits of a head of the default size for labels per sample, from its parameters alone."""
    p = {
        name.removeprefix("encoders.0.blocks."): parameter.detach()
        for name, parameter in head.named_parameters()
    }
    h = value if value.dim() > 1 else value.unsqueeze(1)
    if "1.weight" in p:  # a map
        space = h.dim() - 2
        for i in (0, 3):
            h = (F.conv1d, F.conv2d, F.conv3d)[space - 1](h, p[f"{i}.weight"], stride=2, padding=1)
            axes = (0, *range(2, h.dim()))
            if h.numel() > h.shape[1]:
                h = (h - h.mean(axes, keepdim=True)) / (
                    h.var(axes, keepdim=True, correction=0) + 1e-5
                ).sqrt()
            shape = (1, -1) + (1,) * space
            h = (h * p[f"{i + 1}.weight"].view(shape) + p[f"{i + 1}.bias"].view(shape)).relu()
        h = h.mean(tuple(range(2, h.dim())))
    else:
        h = (h @ p["0.weight"].T + p["0.bias"]).relu()
        h = h.mean(tuple(range(1, h.dim() - 1))) if h.dim() > 2 else h
    return h @ p["output.weight"].T + p["output.bias"]


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "callable"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_the_loss_written_out(kind: str, loss: str) -> None:
    torch.manual_seed(1)
    option = loss if loss != "callable" else lambda logits, c: (logits - c).abs().sum(-1)
    head = Local([spec_of(kind)], LABELS, loss=option, factor=0.5)
    head.unit = 0.25
    for parameter in head.parameters():  # batch normalisation must not be the identity
        parameter.data += 0.1 * random_tensor(*parameter.shape, seed=9)
    value = random_tensor(*spec_of(kind).shape).requires_grad_()
    logits = written_out(head, value)
    context = one_hot(3)(Y).double()
    expected = {
        "cross_entropy": lambda: F.cross_entropy(logits, Y, reduction="none"),
        "mse": lambda: F.mse_loss(logits, context, reduction="none").mean(1),
        "callable": lambda: (logits - context).abs().sum(1),
    }[loss]()
    (gradient,) = torch.autograd.grad(expected.mean(), value)

    prediction = head((value.detach(),), one_hot(3)(Y))
    torch.testing.assert_close(prediction.gradients[0], 0.125 * gradient, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(prediction.loss, expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(prediction.logits, logits.detach(), rtol=1e-9, atol=1e-12)
    assert not any(
        t.requires_grad for t in (*prediction.gradients, prediction.loss, prediction.logits)
    )

    other = head((value.detach(),), one_hot(3)((Y + 1) % 3)).gradients[0]  # the label decides
    assert cosine(other, gradient) < 0.9


def test_heads_of_any_depth_and_width() -> None:
    value = random_tensor(4, 6, 8, 8)
    spec = TensorSpec(value.shape, value.dtype, 1)
    shapes = {
        (("hidden", 0),): [],
        (): [(12, 6, 3, 3), (24, 12, 3, 3)],
        (("stride", 1),): [(6, 6, 3, 3), (6, 6, 3, 3)],
        (("hidden", 3), ("stride", 2), ("width", 100)): [
            (100, 6, 3, 3),
            (200, 100, 3, 3),
            (256, 200, 3, 3),
        ],
        (("hidden", 1), ("width", 5), ("norm", "none")): [(5, 6, 3, 3)],
    }
    for options, expected in shapes.items():
        head = Local([spec], LABELS, **dict(options))
        assert [tuple(p.shape) for p in head.parameters() if p.dim() == 4] == expected
        assert head((value,), one_hot(3)(Y)).gradients[0].abs().sum() > 0
    assert not any(
        "bias" in n and "blocks.0" in n for n, _ in Local([spec], LABELS).named_parameters()
    )  # before norm
    with pytest.raises(DecouplingError, match=r"unknown norm 'layer'; known: 'batch', 'none'"):
        Local([spec], LABELS, norm="layer")


def test_two_values_are_one_head() -> None:
    kinds = ("map2d", "vector", "tokens")
    values = tuple(random_tensor(*spec_of(k).shape, seed=i) for i, k in enumerate(kinds))
    head = Local([spec_of(k) for k in kinds], LABELS)
    gradients = head(values, one_hot(3)(Y)).gradients
    assert [g.shape for g in gradients] == [v.shape for v in values]
    assert all(g.abs().sum() > 0 for g in gradients)
    changed = head((values[0] + 1, values[1] * 3, values[2]), one_hot(3)(Y)).gradients
    assert not torch.allclose(
        changed[2], gradients[2]
    )  # jointly: the third one's gradient depends on the others

    alone = Local([spec_of("tokens")], LABELS)
    alone.encoders[0].load_state_dict(head.encoders[2].state_dict())
    alone.output.weight.data = head.output.weight.data[:, -head.encoders[2].outputs :]
    alone.output.bias.data = head.output.bias.data
    assert not torch.allclose(alone((values[2],), one_hot(3)(Y)).gradients[0], gradients[2])
    for value in values[:2]:  # without the others, by weight, it is the same
        value.zero_()
    head.output.weight.data[:, : -head.encoders[2].outputs] = 0
    torch.testing.assert_close(
        alone((values[2],), one_hot(3)(Y)).gradients[0], head(values, one_hot(3)(Y)).gradients[2]
    )


# ---------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(
    ("kind", "lead"), [("tokens", (4, 5)), ("map1d", (4, 5)), ("map2d", (4, 5, 3))]
)
def test_context_per_position(kind: str, lead: tuple[int, ...], ignored: bool) -> None:
    labels = torch.arange(torch.Size(lead).numel()).reshape(lead) % 3
    if ignored:
        labels[1] = -1
        labels[2, 1:] = -1
    head = Local([spec_of(kind)], TensorSpec((*lead, 3), torch.float32))  # the stride gives way
    value = random_tensor(*spec_of(kind).shape)
    prediction = head((value,), one_hot(3)(labels))
    assert prediction.logits.shape == (*lead, 3)

    evaluation = prediction.state
    reference = F.cross_entropy(evaluation.logits.movedim(-1, 1), labels, ignore_index=-1)
    torch.testing.assert_close(evaluation.mean, reference)
    each = F.cross_entropy(
        prediction.logits.movedim(-1, 1), labels, ignore_index=-1, reduction="none"
    ).flatten(1)
    counts = (labels >= 0).flatten(1).sum(1)
    torch.testing.assert_close(prediction.loss, each.sum(1) / counts.clamp(min=1))
    if ignored:  # not the mean of the samples' means: a sample with fewer labels counts less
        assert prediction.loss[1] == 0
        assert not torch.allclose(evaluation.mean, prediction.loss.mean())
    if kind == "tokens":
        assert bool((prediction.gradients[0].abs().sum(-1) > 0).eq(labels >= 0).all())


def test_ignored_labels_per_sample() -> None:
    head, value = Local([spec_of("vector")], LABELS), random_tensor(4, 6)
    some = head((value,), one_hot(3)(torch.tensor([0, -1, 1, -1])))
    kept = head((value[::2],), one_hot(3)(torch.tensor([0, 1])))
    torch.testing.assert_close(some.gradients[0][::2], kept.gradients[0])
    assert torch.count_nonzero(some.gradients[0][1::2]) == 0
    assert torch.count_nonzero(some.loss[1::2]) == 0
    none = head((value,), one_hot(3)(torch.full((4,), -1)))
    assert none.state.mean == 0
    assert torch.count_nonzero(none.gradients[0]) == 0
    squares = Local([spec_of("vector")], LABELS, loss="mse")((value,), torch.zeros(4, 3))
    assert torch.count_nonzero(squares.loss) == 4  # where zeros are numbers like others


def test_values_without_the_contexts_positions_or_batch() -> None:
    specs = [spec_of("tokens"), spec_of("vector"), TensorSpec((1, 5, 6), torch.float64)]
    values = tuple(random_tensor(*spec.shape, seed=i) for i, spec in enumerate(specs))
    head = Local(specs, TensorSpec((4, 5, 3), torch.float32))
    prediction = head(values, one_hot(3)(torch.arange(20).reshape(4, 5) % 3))
    assert prediction.logits.shape == (4, 5, 3)
    assert [g.shape for g in prediction.gradients] == [v.shape for v in values]
    rows = Local([spec_of("map2d")], TensorSpec((4, 5, 1, 3), torch.float32))
    prediction = rows(
        (values[0].movedim(1, 2)[..., None].expand(4, 6, 5, 3),), torch.ones(4, 5, 1, 3) / 3
    )
    assert prediction.logits.shape == (4, 5, 1, 3)
    table = Local(specs[2:], LABELS)  # one for the whole batch
    assert table(values[2:], one_hot(3)(Y)).loss.shape == (4,)


# --------------------------------------------------------------------------------------------- what


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
    losses = train(head, (value,), labels, (), 60)
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
    losses = train(critic, (value,), labels, (known.loss,), 300)
    assert losses[-1] < 0.1 * losses[0]
    after = critic((value,), labels)
    measure = F.l1_loss if distance == "l1" else F.mse_loss
    assert measure(before.loss, known.loss).item() == pytest.approx(losses[0])
    assert cosine(after.gradients[0], known.gradients[0]) > max(
        0.8, cosine(before.gradients[0], known.gradients[0])
    )

    wrong = Critic([spec], context, distance=distance)  # control: the losses of other samples
    train(wrong, (value,), labels, (known.loss.roll(1),), 300)
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
        train(head, (value,), labels, message, 200)
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
    train(head, (value,), context, (known.logits,), 400)
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


# -------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------


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

"""Loss heads: their gradients against autograd of the same mathematics written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dni_fx.errors import DecouplingError
from dni_fx.plan import TensorSpec
from dni_fx.sources import one_hot
from dni_fx.sources.heads import Local, LossHead

from .heads import KINDS, LABELS, Y, cosine, random_tensor, spec_of


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

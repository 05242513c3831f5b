"""Causal language models: shifted labels, and heads of the model's own last layers."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dni_fx
from dni_fx import distributed
from dni_fx.errors import DecouplingError
from dni_fx.plan import TensorSpec
from dni_fx.schedules import Threads
from dni_fx.sources import Corrected, Local, Sum, Tied, make_source

from ..helpers.comparing import assert_bits_equal
from ..helpers.optimisers import adam

VOCABULARY, WIDTH = 13, 8
SPARSE = dni_fx.one_hot(VOCABULARY, positions=1, shift=1, sparse=True)


class Causal(nn.Module):
    """Embedding, two recurrent layers, a norm and an unembedding; position t sees none after it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.lower, self.upper = (nn.GRU(WIDTH, WIDTH, batch_first=True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.lower(self.embed(tokens))[0]
        return self.head(self.norm(self.upper(h)[0]))


def next_token(output: Tensor, tokens: Tensor) -> Tensor:
    """As models of transformers shift their labels themselves."""
    return F.cross_entropy(output[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def counting(step: int = 0, size: int = 16) -> Tensor:
    """Sequences in which each token follows from the one before."""
    first = torch.randint(0, VOCABULARY, (size, 1), generator=torch.Generator().manual_seed(step))
    return (first + 5 * torch.arange(10)) % VOCABULARY


def trainer_of(make: Any, context: Any = SPARSE, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Causal()
    decoupled = dni_fx.decouple(
        model, ["lower"], example_inputs=(counting(),), gradients=make(model), context=context
    )
    kind = options.pop("kind", dni_fx.Trainer)
    options = {"synthesizer_optimizer": adam} | options
    return kind(decoupled, next_token, optimizer=partial(torch.optim.Adam, lr=1e-2), **options)


def tied(model: Causal, **options: Any) -> Any:
    return partial(Tied, norm=model.norm, output=model.head, **options)


def source_of(tokens: int | None = None, **options: Any) -> tuple[Any, nn.LayerNorm, nn.Linear]:
    torch.manual_seed(0)
    norm, head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
    spec, labels = TensorSpec((3, 5, WIDTH), torch.float32), TensorSpec((3, 5, 1), torch.long)
    option = partial(Tied, norm=norm, output=head, tokens=tokens, **options)
    return make_source(option, [spec], labels), norm, head


@pytest.mark.parametrize("shift", [0, 1, 2, 7])
@pytest.mark.parametrize("sparse", [False, True])
def test_shifted_labels(shift: int, sparse: bool) -> None:
    labels = torch.tensor([[0, 2, -100, 1], [3, 3, 0, 2]])
    context = dni_fx.one_hot(4, positions=1, shift=shift, sparse=sparse)
    want = torch.full_like(labels, -1)
    if shift < 4:
        want[:, : 4 - shift] = labels[:, shift:].clamp(min=-1)
    got = context(labels)
    if sparse:
        assert torch.equal(got, want[..., None])
        assert (context.features, context.dtype) == (1, torch.long)
    else:
        assert torch.equal(got.sum(-1), (want >= 0).float())
        assert torch.equal(got.argmax(-1)[want >= 0], want[want >= 0])
    extra = [f"shift={shift}"] * (shift > 0) + ["sparse=True"] * sparse
    assert repr(context) == f"one_hot({', '.join(['4', 'positions=1', *extra])})"


@pytest.mark.parametrize("tokens", [1, 4, 15, 100, None])
def test_in_parts_is_the_whole(tokens: int | None) -> None:
    source, norm, head = source_of(tokens)
    with torch.no_grad():
        source.translate.weight.normal_()
    value = torch.randn(3, 5, WIDTH)
    labels = torch.randint(-1, VOCABULARY, (3, 5, 1), generator=torch.Generator().manual_seed(3))
    made = source((value,), labels)
    leaf = value.clone().requires_grad_()
    logits = head(norm(leaf + source.translate(leaf)))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)
    want = torch.autograd.grad(loss, (leaf, *source.translate.parameters()))
    torch.testing.assert_close(made.gradients[0], want[0])
    source.fit(made, ()).backward()
    for parameter, gradient in zip(source.translate.parameters(), want[1:], strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(p.grad is None for layer in (norm, head) for p in layer.parameters())
    each = F.cross_entropy(
        logits[1].detach(), labels[1].flatten(), ignore_index=-1, reduction="mean"
    )
    torch.testing.assert_close(made.loss[1], each)


class Largest(TorchDispatchMode):
    """The most elements that a tensor has that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_logits_of_a_large_vocabulary_never_exist_at_once() -> None:
    words, width = 50_000, 4
    norm, head = nn.LayerNorm(width), nn.Linear(width, words)
    targets, value = torch.randint(0, words, (2, 101)), torch.randn(2, 101, width)
    spec = TensorSpec((2, 101, width), torch.float32)
    found = []
    for sparse in (True, False):
        encode = dni_fx.one_hot(words, positions=1, shift=1, sparse=sparse)
        option: Any = partial(Tied, norm=norm, output=head) if sparse else partial(Local, hidden=0)
        features = TensorSpec((2, 101, encode.features), encode.dtype)
        source = make_source(option, [spec], features)
        with Largest() as largest:
            source.fit(source((value,), encode(targets)), ())
        found.append(largest.elements)
    assert found[0] <= 2**22 < 202 * words <= found[1], found


def test_it_follows_the_models_own_layers_and_leaves_them_alone() -> None:
    source, _, head = source_of()
    value, labels = torch.randn(3, 5, WIDTH), torch.zeros(3, 5, 1, dtype=torch.long)
    before = source((value,), labels)
    assert [n for n, _ in source.named_parameters()] == ["translate.weight", "translate.bias"]
    with torch.no_grad():
        head.weight.mul_(2)
    assert not torch.equal(source((value,), labels).gradients[0], before.gradients[0])
    own, _, theirs = source_of(share=False)
    mine = own((value,), labels)
    with torch.no_grad():
        theirs.weight.mul_(2)
    assert torch.equal(own((value,), labels).gradients[0], mine.gradients[0])
    assert {"own.1.weight", "own.0.bias"} <= {n for n, _ in own.named_parameters()}


@pytest.mark.parametrize("share", [True, False])
def test_a_language_model_learns_with_it(share: bool) -> None:
    losses = []
    for make in (partial(tied, share=share), lambda _: "zero"):
        trainer = trainer_of(make)
        for step in range(150):
            tokens = counting(step)
            report = trainer.step(tokens, target=tokens)
        losses.append(float(report.loss))
        lower = trainer.decoupled.model.lower
        torch.manual_seed(0)
        assert torch.equal(lower.weight_hh_l0, Causal().lower.weight_hh_l0) == (len(losses) == 2)
    assert losses[0] < 0.8 * losses[1], losses


def test_unshifted_labels_teach_a_head_to_copy() -> None:
    """The control of ``shift=1``: the head's loss falls, and says nothing of what comes next."""
    right = {}
    for shift in (0, 1):
        context = dni_fx.one_hot(VOCABULARY, positions=1, shift=shift)
        trainer = trainer_of(lambda _: "local", context)
        for step in range(200):
            tokens = counting(step)
            trainer.step(tokens, target=tokens)
        tokens = counting(1000)
        source, model = trainer.decoupled.sources["lower"], trainer.decoupled.model
        made = source((model.lower(model.embed(tokens))[0].detach(),), context(tokens))
        said = made.logits.argmax(-1)
        right[shift] = [
            float((said[:, :-1] == t).float().mean()) for t in (tokens[:, :-1], tokens[:, 1:])
        ]
    assert right[0][0] > 0.9 > 0.3 > right[0][1], right
    assert right[1][1] > 0.9 > 0.3 > right[1][0], right


def test_copies_of_a_model_share_their_own_layers() -> None:
    trainer = trainer_of(tied)
    other = copy.deepcopy(trainer.decoupled)
    source = other.sources["lower"]
    with torch.no_grad():
        trainer.decoupled.model.head.weight.zero_()
    labels = SPARSE(counting())
    value = torch.randn(16, 10, WIDTH)
    assert float(source((value,), labels).gradients[0].abs().max()) > 0
    with torch.no_grad():
        other.model.head.weight.zero_()
    assert float(source((value,), labels).gradients[0].abs().max()) == 0


def test_it_runs_as_a_drop_in_and_beside_others() -> None:
    for make in (tied, lambda model: Sum(tied(model), "reconstruct")):
        trainer, twin = (trainer_of(make, synthesizer_optimizer=torch.optim.Adam) for _ in range(2))
        module: Any = twin.decoupled.as_module()
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        for step in range(3):
            tokens = counting(step)
            trainer.step(tokens, target=tokens)
            optimizer.zero_grad()
            with module.context(tokens):
                next_token(module(tokens), tokens).backward()
            optimizer.step()
        assert_bits_equal(
            trainer.decoupled.model.state_dict(), twin.decoupled.model.state_dict(), "drop-in"
        )
    trainer_of(lambda model: partial(Corrected, source=tied(model))).step(
        counting(), target=counting()
    )


def test_stages_at_once_need_copies() -> None:
    with pytest.raises(DecouplingError, match=r"'lower' \(Tied\) reads weights.*share=False"):
        trainer_of(tied, schedule=Threads()).step(counting(), target=counting())
    found = []
    for schedule in ("sequential", Threads(staleness=0)):
        trainer = trainer_of(partial(tied, share=False), schedule=schedule)
        for step in range(3):
            trainer.step(counting(step), target=counting(step))
        trainer.drain()
        found.append(trainer.decoupled.model.state_dict())
        trainer.close()
    assert_bits_equal(*found, "threads")
    alone = trainer_of(tied, kind=distributed.Trainer)
    alone.step(counting(), target=counting())
    alone.close()


SPEC, LABELS = TensorSpec((3, 5, 4), torch.float32), TensorSpec((3, 5, 1), torch.long)
MAPS = TensorSpec((3, 4, 5, 5), torch.float32, 1)
LAYER = nn.Linear(4, 7)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Tied([SPEC], LABELS, output=None), "takes modules"),  # type: ignore[arg-type]
        (lambda: Tied([SPEC], LABELS, output=LAYER, norm=3), "takes modules"),  # type: ignore[arg-type]
        (lambda: Tied([SPEC], None, output=LAYER), "needs the labels themselves"),
        (lambda: Tied([SPEC], SPEC, output=LAYER), "needs the labels themselves"),
        (lambda: Tied([SPEC, SPEC], LABELS, output=LAYER), "serves one value"),
        (lambda: Tied([MAPS], LABELS, output=LAYER), "serves one value"),
        (lambda: Tied([SPEC], LABELS, output=LAYER, tokens=0), "logits at once, not 0"),
        (
            lambda: Tied([SPEC], LABELS, output=LAYER)(
                (torch.zeros(3, 5, 4),), torch.zeros(3, 4, 1, dtype=torch.long)
            ),
            r"labels of shape \(3, 5, 1\), but got one of shape \(3, 4, 1\)",
        ),
        (lambda: make_source("local", [SPEC], LABELS), "leave out sparse=True"),
        (lambda: make_source("linear", [SPEC], LABELS), "leave out sparse=True"),
        (lambda: make_source(Sum("zero", "local"), [SPEC], LABELS), "leave out sparse=True"),
        (lambda: dni_fx.one_hot(3, shift=1), "needs positions=1"),
        (lambda: dni_fx.one_hot(3, positions=1, shift=-1), "at least 0, but got -1"),
        (
            lambda: dni_fx.one_hot(3, positions=1, sparse=True)(torch.tensor([[3]])),
            "labels run from 0 to 2",
        ),
    ],
)
def test_refusals(make: Any, words: str) -> None:
    with pytest.raises(DecouplingError, match=words):
        make()

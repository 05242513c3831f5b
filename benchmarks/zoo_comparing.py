"""A model of the zoo, its batches, and backprop's results to compare with, bit for bit."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_structure

from zoo_models import Entry, Inputs

STEPS, SEED, LEARNING_RATE, BATCH = 3, 0, 0.01, 2

Snapshot = dict[str, Tensor | None]


def wake(model: nn.Module) -> None:
    """Add noise to every parameter that starts constant.

    A branch or head that starts at zero would multiply all gradients behind it by zero, and
    comparing zeros with zeros shows nothing.
    """
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(
                    0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                )


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a nested output, in order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def loss(output: Any, _target: object = None) -> Tensor:
    """Weighted mean squares of every float tensor of the output; the weights differ per element,
    nothing is drawn.
    """
    total = torch.zeros(())
    for index, value in enumerate(value for value in tensors(output) if value.is_floating_point()):
        weight = torch.linspace(0.5, 1.5, max(1, value.numel()), dtype=value.dtype).view(
            value.shape
        )
        total = total + (value * weight).square().mean() / (index + 1)
    return total


def seed_everything(seed: int) -> None:
    """The generators that models draw from."""
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 (what models draw from)
    torch.manual_seed(seed)


def snapshot(
    model: nn.Module, outputs: Any, gradients: dict[int, Tensor | None], parameters: bool
) -> Snapshot:
    """Copies of everything that must be equal after a step."""
    found: Snapshot = {f"output {index}": value for index, value in enumerate(tensors(outputs))}
    found |= {
        f"gradient of {name}": gradients.get(id(value)) for name, value in model.named_parameters()
    }
    found |= {f"buffer {name}": value for name, value in model.named_buffers()}
    if parameters:
        found |= {f"parameter {name}": value for name, value in model.named_parameters()}
    return {key: None if value is None else value.detach().clone() for key, value in found.items()}


def difference(expected: Snapshot, got: Snapshot) -> str:
    """The first thing that differs in any bit, and by how much; empty where nothing does."""
    if expected.keys() != got.keys():
        return f"{sorted(expected.keys() ^ got.keys())[0]} is in only one of them"
    for key, want in expected.items():
        have = got[key]
        if want is None or have is None:
            if want is not have:
                return f"{key}: " + (
                    "none in eager, one here" if want is None else "one in eager, none here"
                )
        elif want.shape != have.shape or want.dtype != have.dtype:
            return f"{key}: {_kind(want)} in eager, {_kind(have)} here"
        elif not torch.equal(_bits(want), _bits(have)):
            if torch.equal(want, have):
                return f"{key}: zeros of another sign"
            gap, size = (want.double() - have.double()).abs().max(), want.double().abs().max()
            return f"{key} differs by up to {gap:.1e}, its largest value is {size:.1e}"
    return ""


def _bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def _kind(value: Tensor) -> str:
    return f"{value.dtype} {tuple(value.shape)}"


def fingerprint(found: Snapshot) -> dict[str, str]:
    """A hash of every tensor's type, shape and bits, to compare runs of two processes with."""
    return {
        key: "none" if value is None else _kind(value) + _hash(value)
        for key, value in found.items()
    }


def _hash(value: Tensor) -> str:
    return hashlib.blake2b(_bits(value).numpy(), digest_size=16).hexdigest()


def first_difference(expected: Iterable[Snapshot], got: Iterable[Snapshot]) -> str:
    """`difference` over the steps of two runs."""
    for number, (one, other) in enumerate(zip(expected, got, strict=True), start=1):
        text = difference(one, other)
        if text:
            return f"step {number}, {text}"
    return ""


def _noted(module: nn.Module) -> list[str]:
    """Attributes of the kinds that a call may leave other than they were; not the mode."""
    kinds = bool, int, float, str, Tensor, type(None)
    noted = [key for key, value in vars(module).items() if isinstance(value, kinds)]
    return [key for key in noted if key != "training"]


class Subject:
    """A model, its start state, its batches, and backprop's results to compare with."""

    def __init__(self, entry: Entry, dtype: torch.dtype) -> None:
        self.entry, self.dtype = entry, dtype
        seed_everything(SEED)
        model = entry.build()
        self.model = (model if dtype == torch.float32 else model.to(dtype)).train()
        wake(self.model)
        self.batches = [entry.example(BATCH, SEED + number, dtype) for number in range(STEPS)]
        self.start = {name: value.detach().clone() for name, value in self._state()}
        self.attributes = {
            module: {key: vars(module)[key] for key in _noted(module)}
            for module in self.model.modules()
        }
        self.gradients: dict[int, Tensor | None] = {}
        self.seconds: list[float] = []

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    def restore(self) -> None:
        """Back to the start, without gradients; a buffer that the model has made, or replaced by
        another size, is as it was, and so are numbers, texts and tensors that a module notes.
        """
        for module, noted in self.attributes.items():
            for key in set(_noted(module)) - noted.keys():
                delattr(module, key)
            vars(module).update(noted)
        with torch.no_grad():
            for name, value in list(self._state()):
                start = self.start.get(name)
                if start is not None and value.shape == start.shape:
                    value.copy_(start)
                else:
                    owner, _, key = name.rpartition(".")
                    fresh = None if start is None else start.clone()
                    setattr(self.model.get_submodule(owner), key, fresh)
        self.model.zero_grad(set_to_none=True)
        self.gradients.clear()

    def sgd(self, parameters: Any) -> torch.optim.Optimizer:
        """An optimiser that notes the gradients it is about to use."""
        optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9)

        def note(optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self.gradients[id(parameter)] = (
                        None if parameter.grad is None else parameter.grad.clone()
                    )

        optimizer.register_step_pre_hook(note)
        return optimizer

    def run(self, step: Callable[[Inputs], Any]) -> Iterator[Snapshot]:
        """Take `STEPS` steps from the start, each under its own seed."""
        self.seconds = []
        for number, x in enumerate(self.batches):
            seed_everything(SEED + 100 + number)
            begin = time.perf_counter()
            outputs = step(x)
            self.seconds.append(time.perf_counter() - begin)
            yield snapshot(self.model, outputs, self.gradients, parameters=number == STEPS - 1)

    def backprop(self) -> Iterator[Snapshot]:
        """Ordinary training."""
        self.restore()
        optimizer = self.sgd(self.model.parameters())

        def step(x: Inputs) -> Any:
            optimizer.zero_grad()
            outputs = self.model(*x[0], **x[1])
            loss(outputs).backward()
            optimizer.step()
            return outputs

        return self.run(step)

    def exact(self, decoupled: Any) -> Iterator[Snapshot]:
        """Training in exact mode."""
        import dni_fx

        self.restore()
        trainer = dni_fx.Trainer(decoupled, loss=loss, optimizer=self.sgd)
        return self.run(lambda x: trainer.step(*x[0], **x[1]).outputs)

    def call(self, module: nn.Module, x: Inputs, backward: bool) -> tuple[Snapshot, Any]:
        """Forward, and backward where asked, of ``module`` from the start state; the structure of
        its outputs comes along.
        """
        self.restore()
        seed_everything(SEED + 100)
        outputs = module(*x[0], **x[1])
        if backward:
            loss(outputs).backward()
        gradients = {id(parameter): parameter.grad for parameter in self.model.parameters()}
        return snapshot(self.model, outputs, gradients, parameters=False), tree_structure(outputs)

    def has_backward(self, x: Inputs) -> bool:
        """Whether the model has gradients in the mode that it is in: some have them in training
        mode alone.
        """
        try:
            self.call(self.model, x, backward=True)
        except Exception:
            return False
        return True

    def compare_call(self, decoupled: nn.Module, training: bool, batch: int) -> str:
        """The composed stages against the model in one mode: outputs, gradients, buffers."""
        x = self.entry.example(batch, SEED, self.dtype)
        try:
            self.model.train(training)
            backward = training or self.has_backward(x)
            expected, structure = self.call(self.model, x, backward)
            decoupled.train(training)
            got, got_structure = self.call(decoupled, x, backward)
        finally:
            decoupled.train()
        if structure != got_structure:
            return f"the outputs are nested as {got_structure}, not as {structure}"[:300]
        return difference(expected, got)

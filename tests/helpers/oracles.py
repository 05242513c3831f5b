"""The oracles: what must hold of any decoupled model (docs/design.md, correctness).

A run is recorded as nested dictionaries of tensors, so that comparing two runs is comparing two
structures bit by bit. Both sides build their own model from the same seed, since some models
(old-style weight norm) cannot be deep-copied. Everything assumes one thread: with several, eager
PyTorch differs from itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import dni_fx
from dni_fx.sources import GradientSource, Prediction

from ..models.cases import Case, named_leaves, seed_generator
from .comparing import assert_bits_equal, containers, frozen, state_of
from .optimisers import sgd

Optimizers = Callable[[Any], torch.optim.Optimizer]
Record = dict[str, Any]


def draw(
    case: Case, batch: int, dtype: torch.dtype, seed: int
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional inputs, keyword inputs and the target of one step."""
    seed_generator(10_000 + seed)
    args, kwargs = case.inputs(batch, dtype)
    return args, kwargs, None if case.target is None else case.target(batch, dtype)


def recording(factory: Optimizers, grads: Record) -> Optimizers:
    """The optimizer factory, made to note each parameter's gradient by name as it steps.

    A parameter that steps twice in one step of training is an error; one that has no gradient is
    noted as None.
    """

    def make(params: Any) -> torch.optim.Optimizer:
        pairs = list(params)
        optimizer = factory(pairs)

        def note(*_: Any) -> None:
            for name, parameter in pairs:
                if parameter.grad is not None:
                    assert name not in grads, f"{name} was stepped twice"
                    grads[name] = parameter.grad.detach().clone()

        optimizer.register_step_pre_hook(note)
        return optimizer

    return make


def backprop_run(
    case: Case,
    dtype: torch.dtype,
    optimizer: Optimizers,
    *,
    steps: int = 3,
    batch: int = 4,
    seed: int = 0,
) -> Record:
    """Train the case's model with a plain eager loop.

    Returns:
        For each step its outputs, loss, named gradients, and parameters and buffers after it.
    """
    model = case.build(dtype, seed)
    grads: Record = {}
    record: Record = {}
    optim = recording(optimizer, grads)(model.named_parameters())
    for step in range(steps):
        args, kwargs, target = draw(case, batch, dtype, seed + step)
        seed_generator(seed + step)
        optim.zero_grad()
        output = model(*args, **kwargs)
        loss = case.loss(output, target)
        outputs = frozen(output)
        loss.backward()
        optim.step()
        record[f"step {step}"] = _noted(outputs, loss, grads, model)
        grads.clear()
    return record


def _noted(outputs: Any, loss: Tensor, grads: Record, model: nn.Module) -> Record:
    return {
        "outputs": outputs,
        "containers": repr(containers(outputs)),
        "loss": loss.detach().clone(),
        "gradients": dict(sorted(grads.items())),
        "state": state_of(model),
        "random": torch.get_rng_state(),
    }


class Replay(GradientSource):
    """A source that gives what it was handed: with true gradients, the decoupled step must equal
    backprop.
    """

    message: ClassVar[Literal["gradient", "loss", "none"]] = "none"

    def __init__(self, specs: Sequence[Any], context: Any = None) -> None:
        super().__init__(specs, context)
        self.gradients: tuple[Tensor, ...] | None = None

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        assert self.gradients is not None, "no gradient was handed over for this step"
        gradients, self.gradients = self.gradients, None
        return Prediction(gradients)

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> None:
        return None

    def flops(self) -> int:
        return 0


def source_of(decoupled: dni_fx.Decoupled, interface: str) -> Any:
    """The source that serves an interface."""
    return decoupled.sources[interface]


def decoupled_run(
    case: Case,
    dtype: torch.dtype,
    optimizer: Optimizers,
    *,
    gradients: Any,
    steps: int = 3,
    batch: int = 4,
    seed: int = 0,
    decoupled: dni_fx.Decoupled | None = None,
    before_step: Callable[[dni_fx.Decoupled, dni_fx.Trainer, Any, Any, Any], None] | None = None,
    prepare: Callable[[dni_fx.Decoupled], None] | None = None,
    schedule: Any = "sequential",
) -> Record:
    """Train the case's model decoupled and record what :func:`backprop_run` records.

    Args:
        before_step: called before each step with the decoupled model, the trainer, the step's
            arguments and target.
        prepare: called once with the decoupled model; negative controls break it there.
        schedule: the trainer's.
    """
    if decoupled is None:
        decoupled = transform(case, dtype, gradients, batch=batch, seed=seed)
    if prepare is not None:
        prepare(decoupled)
    grads: Record = {}
    trainer = dni_fx.Trainer(
        decoupled, case.loss, optimizer=recording(optimizer, grads), schedule=schedule
    )
    record: Record = {}
    for step in range(steps):
        args, kwargs, target = draw(case, batch, dtype, seed + step)
        if before_step is not None:
            seed_generator(seed + step)
            before_step(decoupled, trainer, args, kwargs, target)
        assert not grads, "an optimizer stepped outside trainer.step"
        seed_generator(seed + step)
        report = trainer.step(*args, target=target, **kwargs)
        record[f"step {step}"] = _noted(report.outputs, report.loss, grads, decoupled.model)
        grads.clear()
    return record


def transform(
    case: Case,
    dtype: torch.dtype,
    gradients: Any,
    *,
    batch: int = 4,
    seed: int = 0,
    check: bool = False,
) -> dni_fx.Decoupled:
    """Decouple a fresh model of the case at its cuts."""
    model = case.build(dtype, seed)
    args, kwargs, _ = draw(case, batch, dtype, seed)
    return dni_fx.decouple(
        model,
        cuts=list(case.cuts),
        example_inputs=args,
        example_kwargs=kwargs,
        gradients=gradients,
        check=check,
    )


def exact_run(case: Case, dtype: torch.dtype, optimizer: Optimizers, **options: Any) -> Record:
    """Train in exact mode, with :meth:`Trainer.step`. Must equal :func:`backprop_run`."""
    return decoupled_run(case, dtype, optimizer, gradients="exact", **options)


def hand_over_true_gradients(
    decoupled: dni_fx.Decoupled, trainer: dni_fx.Trainer, args: Any, kwargs: Any, target: Any
) -> None:
    """Record backprop's gradient at every interface and hand it to the replay sources. Nothing else
    may change.
    """
    random, state = torch.get_rng_state(), state_of(decoupled.model)
    true = trainer.true_gradients(*args, target=target, **kwargs)
    assert_bits_equal(torch.get_rng_state(), random, "random state after true_gradients")
    assert_bits_equal(state_of(decoupled.model), state, "state after true_gradients")
    names = [interface.name for interface in decoupled.interfaces]
    assert sorted(true) == sorted(names), (
        f"true gradients of {sorted(true)}, interfaces {sorted(names)}"
    )
    for name in names:
        source_of(decoupled, name).gradients = (true[name].detach(),)


def replay_run(case: Case, dtype: torch.dtype, optimizer: Optimizers, **options: Any) -> Record:
    """Train by the decoupled step with recorded true gradients as sources. Must equal
    :func:`backprop_run`.
    """
    options.setdefault("before_step", hand_over_true_gradients)
    return decoupled_run(case, dtype, optimizer, gradients=Replay, **options)


def derivatives(
    model: nn.Module,
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    seed: int,
    *,
    of_inputs: bool,
) -> Record:
    """Outputs, and gradients of every parameter (and float input) under random cotangents, and the
    state afterwards.

    ``backward`` and not ``autograd.grad``, which reentrant checkpoints refuse.
    """
    args, kwargs = frozen(args), frozen(kwargs)
    inputs = [
        leaf
        for _, leaf in named_leaves((args, kwargs))
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    for tensor in inputs:
        tensor.requires_grad_(of_inputs)
    for parameter in model.parameters():
        parameter.grad = None
    seed_generator(seed)
    outputs = call(*args, **kwargs)
    noted = frozen(outputs)
    roots = [
        leaf for _, leaf in named_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [
        torch.randn(root.shape, generator=generator, dtype=torch.float64).to(root.dtype)
        for root in roots
    ]
    torch.autograd.backward(roots, cotangents)
    grads = {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }
    for parameter in model.parameters():
        parameter.grad = None
    requires = [leaf.requires_grad for _, leaf in named_leaves(outputs) if isinstance(leaf, Tensor)]
    return {
        "outputs": noted,
        "containers": repr(containers(outputs)),
        "requires_grad": requires,
        "gradients": grads,
        "input gradients": [tensor.grad for tensor in inputs],
        "state": state_of(model),
    }


def composed_check(
    case: Case,
    dtype: torch.dtype,
    *,
    decoupled: dni_fx.Decoupled | None = None,
    batches: Sequence[int] = (4, 6, 1),
    modes: Sequence[str] = ("train", "eval"),
    seed: int = 0,
) -> int:
    """Assert that the composed stages equal the model: outputs, gradients, buffers; train and eval;
    several batches.

    A batch size that the model itself refuses (BatchNorm with one sample) is left out. Inputs
    require a gradient, too, in all batches but the first.

    Args:
        decoupled: a decoupled model of the case, trained or not; a new one by default.

    Returns:
        How many comparisons were made.
    """
    if decoupled is None:
        decoupled = transform(case, dtype, "zero", seed=seed)
    model, compared = case.build(dtype, seed), 0
    model.load_state_dict(decoupled.model.state_dict())
    for mode in modes:
        if mode == "eval":
            model.eval()
            decoupled.eval()
        for batch in batches:
            args, kwargs, _ = draw(case, batch, dtype, seed + batch)
            before = copy.deepcopy(dict(model.named_buffers()))
            try:
                want = derivatives(model, model, args, kwargs, seed, of_inputs=batch != batches[0])
            except ValueError:  # BatchNorm counts its batches before it refuses one
                for name, buffer in model.named_buffers():
                    buffer.copy_(before[name])
                continue
            got = derivatives(
                decoupled.model, decoupled, args, kwargs, seed, of_inputs=batch != batches[0]
            )
            assert_bits_equal(
                got, want, f"{case.name}: composed stages, {mode} mode, batch {batch}"
            )
            compared += 1
    return compared


def nothing_crosses(
    case: Case, dtype: torch.dtype, *, gradients: Any = "auto", seed: int = 0
) -> int:
    """Assert that before any ``fit`` no stage's gradient depends on a parameter of a later stage.

    Sources start at zero, so one step after perturbing the parameters that only stages from k on
    hold must give the stages before k the same gradients, bit for bit. Tied weights belong to
    several stages and are left out.

    Returns:
        How many gradients were compared.
    """
    decoupled = transform(case, dtype, gradients, seed=seed)
    names = {id(parameter): name for name, parameter in decoupled.model.named_parameters()}
    stages: dict[str, set[int]] = {}
    for stage in decoupled.stages:
        for _, parameter in stage.named_parameters():
            stages.setdefault(names[id(parameter)], set()).add(stage.index)
    start = copy.deepcopy(decoupled.state_dict())
    clean, compared = _first_gradients(case, dtype, decoupled, seed), 0
    for boundary in range(1, len(decoupled.stages)):
        decoupled.load_state_dict(start)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in decoupled.model.named_parameters():
                if min(stages.get(name, {-1})) >= boundary:
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype))
        moved = _first_gradients(case, dtype, decoupled, seed)
        upstream = {name for name, owners in stages.items() if max(owners) < boundary}
        left, right = ({name: g[name] for name in upstream if name in g} for g in (clean, moved))
        assert_bits_equal(
            right, left, f"{case.name}: gradients before stage {boundary}, perturbed from it on"
        )
        compared += len(left)
    return compared


def _first_gradients(
    case: Case, dtype: torch.dtype, decoupled: dni_fx.Decoupled, seed: int
) -> Record:
    grads: Record = {}
    trainer = dni_fx.Trainer(decoupled, case.loss, optimizer=recording(sgd, grads))
    args, kwargs, target = draw(case, 4, dtype, seed)
    seed_generator(seed)
    trainer.step(*args, target=target, **kwargs)
    return grads

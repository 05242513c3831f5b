"""The files that train: ``program.py`` makes the stages, ``train.py`` runs them one after the
other, ``train_threads.py`` at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..plan import TensorSpec
from .options import Text, TrainingOptions
from .stages import Asked, StageFile
from .text import docstring, literal


@dataclass(frozen=True)
class Training:
    """What the files that train are made of.

    Attributes:
        stages: in order.
        inputs: names of the model's inputs, in order.
        examples: shape and dtype of each of these.
        target: of an example of the target, where it can be told; whole numbers are below its
            ``most``.
        ties: tensors that are one: stage, key, and the same of what it is, too.
        optimizers: of each stage, None where there is nothing to train, and of its sources by name.
        context: what sources see of the target.
        settings: how it trains.
        suffix: of the files with weights.
        checks: conditions on the inputs.
    """

    stages: Sequence[StageFile]
    inputs: Sequence[str]
    examples: Sequence[TensorSpec]
    target: tuple[TensorSpec, int] | None
    ties: Sequence[tuple[int, str, int, str]]
    optimizers: Sequence[tuple[Text | None, Sequence[tuple[str, Text]]]]
    context: Text | None
    settings: TrainingOptions
    suffix: str
    checks: Sequence[str]

    @property
    def labels(self) -> Any:
        """What each value is called."""
        return self.stages[0].labels

    @property
    def given(self) -> str:
        """The model's inputs as arguments of a function."""
        return ", ".join(f"{self.labels[n]}: Tensor" for n in self.inputs)


# ---- program.py ---------------------------------------------------------------------------------


def program_lines(training: Training) -> list[list[str]]:
    """The class that holds all that is trained."""
    lines = ["class Program:", *docstring("All stages with their sources and optimisers."), ""]
    lines += ['    def __init__(self, weights: Path = HERE / "weights") -> None:']
    held = []
    for stage in training.stages:
        held.append(("stage", "Stage", stage.index))
        held += [("sources", "Sources", stage.index)] * stage.holds_sources
    for name, kind, k in held:
        lines.append(f"        self.{name}_{k} = {kind}{k}()")
        lines.append(f'        load(self.{name}_{k}, weights / "{name}_{k}.{training.suffix}")')
    for owner, key, other, name in training.ties:
        told = f'self.stage_{owner}, "{key}", self.stage_{other}, "{name}"'
        lines.append(f"        share({told})")
    lines += _optimizer_lines(training)
    saves = [
        f'        save(self.{name}_{k}, weights / "{name}_{k}.{training.suffix}")'
        for name, _, k in held
    ]
    lines += ["", "    def save(self, weights: Path) -> None:"]
    lines += docstring("Write all weights to a folder.", "        ")
    lines += ["        weights.mkdir(parents=True, exist_ok=True)", *saves]
    return [lines, *([_check_lines(training)] if training.checks else [])]


def _optimizer_lines(training: Training) -> list[str]:
    tied = sorted({(owner, other) for owner, _, other, _ in training.ties if owner != other})
    lines, clipped = ["        self.optimizers: list[list[torch.optim.Optimizer]] = ["], []
    for stage, (own, of_sources) in zip(training.stages, training.optimizers, strict=True):
        k, made = stage.index, []
        if own is not None:
            owners = [f"self.stage_{a}" for a, b in tied if b == k]
            given = f"self.stage_{k}.parameters()"
            if owners:
                given = f"unshared({', '.join([f'self.stage_{k}', *owners])})"
            clipped.append(given)
            made.append(own.expression.format(given))
        made += [
            text.expression.format(f"self.sources_{k}.{name}.parameters()")
            for name, text in of_sources
        ]
        lines.append(f"            [{', '.join(made)}],")
    lines.append("        ]")
    if training.settings.clip_norm is not None:
        lines += ["        self.clipped = ["]
        lines += [f"            list({given})," for given in clipped]
        lines += ["        ]"]
    return lines


def _check_lines(training: Training) -> list[str]:
    lines = [f"def check({training.given}) -> None:"]
    lines += docstring("Refuse inputs that the model would have treated in another way.")
    for condition in training.checks:
        lines.append(f"    if not ({condition}):")
        lines.append(f"        raise ValueError({literal('the program holds where ' + condition)})")
    return lines


# ---- train.py -----------------------------------------------------------------------------------


def step_lines(training: Training) -> list[str]:
    """The function that trains on one batch."""
    more = ", is_due: bool = True" if training.settings.accumulate > 1 else ""
    taken = f"program: Program, {training.given}, target: Any{more}"
    lines = [f"def train_step({taken}) -> Tensor:"]
    lines += docstring("Train all stages on one batch, one after the other: the loss.")
    names = ", ".join(training.labels[n] for n in training.inputs)
    lines += [f"    check({names})"] if training.checks else []
    if training.context is not None and any(s.takes_context for s in training.stages):
        lines.append(f"    context = {training.context.expression}")
    makers = {n: s.index for s in training.stages for n in s.outputs}
    for stage in training.stages:
        lines.append(f"    result_{stage.index} = {call_text(stage, makers)}")
    lessons = [text for s in training.stages for text in inner_lessons(training, s)]
    if lessons:
        lines += ["    # each source learns from the gradient that came back for its value"]
        lines += ["    lessons = [", *(f"        {text}," for text in lessons), "    ]"]
        lines.append("    torch.autograd.backward(lessons)")
    lines += update_lines(training)
    last = training.stages[-1].index
    many = training.settings.accumulate
    return [*lines, f"    return result_{last}.loss" + (f" * {many}" if many > 1 else "")]


def call_text(stage: StageFile, makers: dict[str, int]) -> str:
    """The call of a stage's step in the sequential loop."""
    given = [f"program.stage_{stage.index}"]
    given += [f"program.sources_{stage.index}"] if stage.holds_sources else []
    for name in stage.inputs:
        label = stage.labels[name]
        given.append(f"result_{makers[name]}.{label}" if name in makers else label)
    return f"stage_{stage.index}.step({', '.join([*given, *stage.wanted])})"


def inner_lessons(training: Training, stage: StageFile) -> list[str]:
    """What the sources of a stage learn from stages behind it, each an expression."""
    return [
        f"program.sources_{stage.index}.{a.name}.fit(result_{stage.index}.{a.name}_said, {text})"
        for a in stage.sources
        if a.learns and a.written.kind != "window"
        for text in [target_text(training, a)]
    ]


def target_text(training: Training, asked: Asked) -> str:
    """What came back for a source's values: the consumers' gradients, added up."""
    texts = []
    for name in asked.group.names:
        users = [s.index for s in training.stages if name in s.received]
        label = training.labels[name]
        texts.append(" + ".join(f"result_{k}.{label}_gradient" for k in users))
    return texts[0] if asked.written.kind == "regression" else f"[{', '.join(texts)}]"


def update_lines(training: Training) -> list[str]:
    """The updates at the end of a step."""
    lines = ["    if is_due:"] if training.settings.accumulate > 1 else []
    indent = "    " * (1 + bool(lines))
    if training.settings.clip_norm is not None:
        lines.append(f"{indent}for parameters in program.clipped:")
        norm = literal(training.settings.clip_norm)
        lines.append(f"{indent}    nn.utils.clip_grad_norm_(parameters, {norm})")
    lines.append(f"{indent}for optimizers in program.optimizers:")
    return [*lines, f"{indent}    update(optimizers)"]


def batch_lines(training: Training) -> list[str]:
    """The function that gives batches: what its user changes first."""
    kinds = ["Tensor"] * len(training.inputs) + ["Any"]
    lines = [f"def batches(steps: int) -> Iterator[tuple[{', '.join(kinds)}]]:"]
    lines += docstring("Batches of the example's shapes: put your own data here.")
    lines.append("    generator = torch.Generator().manual_seed(0)")
    lines.append("    for _ in range(steps):")
    names = [training.labels[n] for n in training.inputs]
    for name, spec in zip(names, training.examples, strict=True):
        lines.append(f"        {name} = {random_text(spec, 2)}")
    if training.target is None:
        lines.append("        target = None  # what the loss takes")
    else:
        lines.append(f"        target = {random_text(*training.target)}")
    return [*lines, f"        yield {', '.join([*names, 'target'])}"]


def random_text(spec: TensorSpec, most: int) -> str:
    """A random tensor; whole numbers are below ``most``."""
    sizes = "(" + ", ".join(map(str, spec.shape)) + ("," if len(spec.shape) == 1 else "") + ")"
    dtype = "" if spec.dtype in (torch.float32, torch.int64) else f", dtype={literal(spec.dtype)}"
    if spec.dtype.is_floating_point:
        return f"torch.randn({sizes}, generator=generator{dtype})"
    return f"torch.randint({most}, {sizes}, generator=generator{dtype})"


def main_lines(training: Training) -> list[str]:
    """What the script does."""
    names = [training.labels[n] for n in training.inputs]
    lines = ["def main(steps: int = 100) -> None:"]
    lines += docstring("Train, and write the weights.")
    many = training.settings.accumulate
    lines.append("    program = Program()")
    given = ", ".join([*names, "target"])
    lines.append(f"    for step, ({given}) in enumerate(batches(steps), start=1):")
    more = f", step % {many} == 0" if many > 1 else ""
    lines.append(f"        loss = train_step(program, {given}{more})")
    lines.append('        print(f"step {step}: loss {loss.item():.4f}")')
    return [*lines, '    program.save(HERE / "trained")']


def example_target(output: Any, settings: TrainingOptions) -> tuple[TensorSpec, int] | None:
    """Shape and dtype of a target, where a loss of torch tells it from the output."""
    if not isinstance(output, Tensor):
        return None
    loss = settings.loss
    name = getattr(getattr(loss, "func", loss), "__name__", type(loss).__name__)
    if name in ("cross_entropy", "CrossEntropyLoss", "nll_loss", "NLLLoss") and output.dim() > 1:
        shape = (output.shape[0], *output.shape[2:])
        return TensorSpec(tuple(shape), torch.int64), int(output.shape[1])
    if name in ("mse_loss", "MSELoss", "l1_loss", "L1Loss", "smooth_l1_loss"):
        return TensorSpec(tuple(output.shape), output.dtype), 2
    return None

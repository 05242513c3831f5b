"""``train.py`` of a model that is trained through time: window after window."""

from __future__ import annotations

from dataclasses import dataclass

from ..passes.cut.splitting import Split
from ..plan import TensorSpec
from .stages import Asked, StageFile
from .text import docstring, literal
from .training import Training, call_text, inner_lessons, random_text, update_lines


@dataclass(frozen=True)
class StateTensor:
    """One tensor of the state.

    Attributes:
        comes: name of the input that takes it.
        leaves: name of the value that leaves for the next window.
        spec: of it.
    """

    comes: str
    leaves: str
    spec: TensorSpec


def state_of(split: Split) -> list[StateTensor]:
    """The state of a window, in order."""
    leaving = [i for i in split.interfaces if i.feeds in split.model_inputs]
    return [StateTensor(str(i.feeds), i.name, i.spec) for i in leaving]


def window_lines(training: Training, state: list[StateTensor]) -> list[list[str]]:
    """The definitions of the file, in order."""
    return [
        _carried_lines(training, state),
        _start_lines(state),
        _step_lines(training, state),
        _batch_lines(training),
        _main_lines(training, state),
    ]


def _asked(training: Training) -> list[tuple[StageFile, Asked]]:
    """The sources that learn from the next window."""
    return [(s, a) for s in training.stages for a in s.sources if a.written.kind == "window"]


def _carried_lines(training: Training, state: list[StateTensor]) -> list[str]:
    lines = ["@dataclass", "class Carried:"]
    text = "What goes from one window to the next: the state, and what its source said of it."
    lines += [*docstring(text), "", f"    state: tuple[{', '.join('Tensor' for _ in state)}]"]
    return lines + [f"    {a.name}_said: Tensor | None = None" for _, a in _asked(training)]


def _start_lines(state: list[StateTensor]) -> list[str]:
    lines = ["def start(batch: int) -> Carried:", *docstring("The start of a sequence.")]
    made = []
    for each in state:
        spec = each.spec
        sizes = [str(n) for n in spec.shape]
        sizes[spec.batch_dim] = "batch"
        dtype = "" if str(spec.dtype) == "torch.float32" else f", dtype={literal(spec.dtype)}"
        made.append(f"torch.zeros({', '.join(sizes)}{dtype})")
    one = "," if len(made) == 1 else ""
    return [*lines, f"    return Carried(({', '.join(made)}{one}))"]


def _step_lines(training: Training, state: list[StateTensor]) -> list[str]:
    labels = training.labels
    taken = f"program: Program, carried: Carried, {training.given}, target: Any"
    lines = [f"def train_step({taken}, done: bool = False) -> tuple[Tensor, Carried]:"]
    lines[0] = lines[0].replace("done: bool = False)", f"done: bool = False{_due(training)})")
    text = "Train on one window: the loss, and what goes on; ``done`` where sequences end with it."
    lines += docstring(text)
    coming = ", ".join(labels[each.comes] for each in state)
    lines.append(f"    {coming}{',' if len(state) == 1 else ''} = carried.state")
    if training.context is not None and any(s.takes_context for s in training.stages):
        lines.append(f"    context = {training.context.expression}")
    makers = {n: s.index for s in training.stages for n in s.outputs}
    for stage in training.stages:
        lines.append(f"    result_{stage.index} = {call_text(stage, makers)}")
    lines += _lesson_lines(training, state, makers)
    lines += update_lines(training)
    last = training.stages[-1].index
    after = [f"result_{makers[e.leaves]}.{labels[e.leaves]}" for e in state]
    first = state[0].spec.batch_dim
    lines += ["    if done:"]
    lines += [f"        return result_{last}.loss, start({after[0]}.shape[{first}])"]
    said = [f", result_{s.index}.{a.name}_said" for s, a in _asked(training)]
    one = "," if len(after) == 1 else ""
    carried = f"Carried(({', '.join(after)}{one}){''.join(said)})"
    return [*lines, f"    return result_{last}.loss, {carried}"]


def _due(training: Training) -> str:
    return ", is_due: bool = True" if training.settings.accumulate > 1 else ""


def _lesson_lines(
    training: Training, state: list[StateTensor], makers: dict[str, int]
) -> list[str]:
    """What the sources learn, those of the last window first."""
    inner = [text for s in training.stages for text in inner_lessons(training, s)]
    asked = _asked(training)
    if not inner and not asked:
        return []
    labels = training.labels
    lines = ["    # each source learns from the gradient that came back for its values"]
    lines.append("    lessons: list[Tensor] = []")
    comes = {each.leaves: each.comes for each in state}
    for stage, a in asked:
        source = f"program.sources_{stage.index}.{a.name}"
        arrived = [_sum(training, comes[n]) for n in a.group.names]
        lines.append(f"    if carried.{a.name}_said is not None:")
        lines.append(f"        arrived = [{', '.join(arrived)}]")
        lines.append(f"        lessons.append({source}.fit(carried.{a.name}_said, arrived))")
    lines += [f"    lessons.append({text})" for text in inner]
    for stage, a in asked:
        source = f"program.sources_{stage.index}.{a.name}"
        values = [f"result_{makers[n]}.{labels[n]}" for n in a.group.names]
        lines.append("    if done:  # nothing comes back any more")
        lines.append(f"        nothing = [{', '.join(f'torch.zeros_like({v})' for v in values)}]")
        said = f"result_{stage.index}.{a.name}_said"
        lines.append(f"        lessons.append({source}.fit({said}, nothing))")
    return [*lines, "    if lessons:", "        torch.autograd.backward(lessons)"]


def _sum(training: Training, name: str) -> str:
    users = [s.index for s in training.stages if name in s.received]
    return " + ".join(f"result_{k}.{training.labels[name]}_gradient" for k in users)


def _batch_lines(training: Training) -> list[str]:
    kinds = ["Tensor"] * len(training.inputs) + ["Any", "bool"]
    lines = [f"def batches(steps: int) -> Iterator[tuple[{', '.join(kinds)}]]:"]
    lines += docstring("Windows of the example's shapes, four a sequence: put your own data here.")
    lines += ["    generator = torch.Generator().manual_seed(0)", "    for step in range(steps):"]
    names = [training.labels[n] for n in training.inputs]
    for name, spec in zip(names, training.examples, strict=True):
        lines.append(f"        {name} = {random_text(spec, 2)}")
    target = "None  # what the loss takes"
    target = target if training.target is None else random_text(*training.target)
    lines.append(f"        target = {target}")
    return [*lines, f"        yield {', '.join([*names, 'target', 'step % 4 == 3'])}"]


def _main_lines(training: Training, state: list[StateTensor]) -> list[str]:
    spec = state[0].spec
    given = ", ".join([*(training.labels[n] for n in training.inputs), "target", "done"])
    many = training.settings.accumulate
    due = f", step % {many} == 0" if many > 1 else ""
    return [
        "def main(steps: int = 100) -> None:",
        *docstring("Train, and write the weights."),
        "    program = Program()",
        f"    carried = start({spec.shape[spec.batch_dim]})",
        f"    for step, ({given}) in enumerate(batches(steps), start=1):",
        f"        loss, carried = train_step(program, carried, {given}{due})",
        '        print(f"step {step}: loss {loss.item():.4f}")',
        '    program.save(HERE / "trained")',
    ]

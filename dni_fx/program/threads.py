"""``train_threads.py``: a thread for each stage, queues between them."""

from __future__ import annotations

from .stages import Asked, StageFile
from .text import docstring, literal
from .training import Training


def thread_lines(training: Training) -> list[list[str]] | None:
    """The definitions of the file, in order; None where stages share what they train."""
    if any(owner != other for owner, _, other, _ in training.ties):
        return None
    staleness = [
        "# how many batches a stage goes on before its sources learn from one; 0 waits for each,",
        "# and gives the weights of train.py",
        "STALENESS = 1",
    ]
    runs = [_run_lines(training, stage) for stage in training.stages]
    return [staleness, _links_lines(training), *runs, _train_lines(training), _main_lines()]


def _heard(training: Training, stage: StageFile) -> list[str]:
    """What a stage received and some source learns from: nobody takes other gradients."""
    learners = [a for s in training.stages for a in s.sources if a.learns]
    wanted = {n for a in learners for n in a.group.names}
    return [n for n in stage.received if n in wanted]


def _users(training: Training, name: str) -> list[StageFile]:
    return [s for s in training.stages if name in s.inputs]


def _links_lines(training: Training) -> list[str]:
    """All queues, by what goes through them."""
    lines = ["class Links:", *docstring("What goes from thread to thread.")]
    lines += ["", "    def __init__(self) -> None:"]
    lines += ["        self.stop = Event()", "        self.errors: list[BaseException] = []"]
    lines.append("        self.losses: list[Tensor] = []")
    for stage in training.stages:
        names = [*(stage.labels[n] for n in stage.inputs), *stage.wanted]
        lines += [
            f"        self.{n}_to_{stage.index} = Link(self.stop, STALENESS + 2)" for n in names
        ]
    for stage in training.stages:
        names = [stage.labels[n] for n in _heard(training, stage)]
        lines += [
            f"        self.{n}_from_{stage.index} = Link(self.stop, STALENESS + 2)" for n in names
        ]
    return lines


def _run_lines(training: Training, stage: StageFile) -> list[str]:
    """One stage's thread."""
    k, label = stage.index, stage.labels
    lines = [f"def run_{k}(program: Program, links: Links, steps: int) -> None:"]
    lines += docstring(f"Stage {k}: all its batches, one after the other.")
    learners = [a for a in stage.sources if a.learns]
    kind = f"tuple[stage_{k}.Result{k}, tuple[Tensor, ...]]"
    lines += [f"    waiting: deque[{kind}] = deque()"] if learners else []
    many = training.settings.accumulate
    lines.append(f"    for {'step' if many > 1 else '_'} in range(steps):")
    names = [*(label[n] for n in stage.inputs), *stage.wanted]
    lines += [f"        {n} = links.{n}_to_{k}.get()" for n in names]
    given = [f"program.stage_{k}", *([f"program.sources_{k}"] if stage.holds_sources else [])]
    lines.append(f"        result = stage_{k}.step({', '.join([*given, *names])})")
    lines += [
        f"        links.{label[n]}_to_{user.index}.put(result.{label[n]})"
        for n in stage.outputs
        for user in _users(training, n)
    ]
    lines += [
        f"        links.{label[n]}_from_{k}.put(result.{label[n]}_gradient)"
        for n in _heard(training, stage)
    ]
    if stage.is_last:
        lines.append("        links.losses.append(result.loss)")
    if learners:
        context = "(context,)" if stage.takes_context else "()"
        lines.append(f"        waiting.append((result, {context}))")
        lines.append("        if len(waiting) > STALENESS:")
        lines.append(f"            learn_{k}(program, links, *waiting.popleft())")
    lines += _update_lines(training, stage)
    if learners:
        lines += ["    while waiting:", f"        learn_{k}(program, links, *waiting.popleft())"]
        lines.append(f"        update(program.optimizers[{k}])")
        return [*_learn_lines(training, stage, learners), "", "", *lines]
    return lines


def _learn_lines(training: Training, stage: StageFile, learners: list[Asked]) -> list[str]:
    """What its sources learn from one batch."""
    k = stage.index
    taken = f"result: stage_{k}.Result{k}, context: tuple[Tensor, ...]"
    lines = [f"def learn_{k}(program: Program, links: Links, {taken}) -> None:"]
    lines += docstring(f"The sources of stage {k} learn from what came back for one batch.")
    lines.append("    lessons = []")
    for asked in learners:
        source = f"program.sources_{k}.{asked.name}"
        values = [f"result.{stage.labels[n]}" for n in asked.group.names]
        arrived = [_arrived(training, n) for n in asked.group.names]
        target = arrived[0] if asked.written.kind == "regression" else f"[{', '.join(arrived)}]"
        said = f"result.{asked.name}_said"
        more = ", *context" if asked.written.takes_context else ""
        lines.append(f"    {asked.name}_said = {said}")
        lines.append("    if STALENESS:  # what it says now: its weights have moved since")
        lines.append(f"        {asked.name}_said = {source}({', '.join(values)}{more})")
        lines.append(f"    arrived = {target}")
        lines.append(f"    lessons.append({source}.fit({asked.name}_said, arrived))")
    return [*lines, "    torch.autograd.backward(lessons)"]


def _arrived(training: Training, name: str) -> str:
    users = [s.index for s in training.stages if name in s.received]
    return " + ".join(f"links.{training.labels[name]}_from_{k}.get()" for k in users)


def _update_lines(training: Training, stage: StageFile) -> list[str]:
    k, many = stage.index, training.settings.accumulate
    lines = [f"        if (step + 1) % {many} == 0:"] if many > 1 else []
    indent = "        " + "    " * bool(lines)
    norm = training.settings.clip_norm
    if norm is not None and training.optimizers[k][0] is not None:
        place = sum(own is not None for own, _ in training.optimizers[:k])
        told = f"program.clipped[{place}], {literal(norm)}"
        lines.append(f"{indent}nn.utils.clip_grad_norm_({told})")
    return [*lines, f"{indent}update(program.optimizers[{k}])"]


def _train_lines(training: Training) -> list[str]:
    """Starts the threads and hands them the batches."""
    lines = ["def train(program: Program, data: Iterable[tuple[Any, ...]], steps: int) -> Links:"]
    lines += docstring("Train on so many batches; all stages at once.")
    runs = ", ".join(f"run_{s.index}" for s in training.stages)
    one = "," if len(training.stages) == 1 else ""
    names = ", ".join(training.labels[n] for n in training.inputs)
    lines += [
        "    links = Links()",
        f"    threads = [start_thread(run, program, links, steps) for run in ({runs}{one})]",
        "    with Guard(links):",
        f"        for {names}, target in data:",
    ]
    lines += [f"            check({names})"] if training.checks else []
    if training.context is not None and any(s.takes_context for s in training.stages):
        lines.append(f"            context = {training.context.expression}")
    for stage in training.stages:
        given = [stage.labels[n] for n in stage.inputs if n in training.inputs]
        given += stage.wanted
        lines += [f"            links.{n}_to_{stage.index}.put({n})" for n in given]
    lines += [
        "    for thread in threads:",
        "        thread.join()",
        "    if links.errors:",
        "        raise links.errors[0]",
        "    return links",
    ]
    return lines


def _main_lines() -> list[str]:
    return [
        "def main(steps: int = 100) -> None:",
        *docstring("Train, and write the weights."),
        "    program = Program()",
        "    links = train(program, batches(steps), steps)",
        "    for step, loss in enumerate(links.losses, start=1):",
        '        print(f"step {step}: loss {loss.item():.4f}")',
        '    program.save(HERE / "trained")',
    ]

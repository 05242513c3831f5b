"""The README of a program folder."""

from __future__ import annotations

from collections.abc import Mapping

from ..passes.trace.traces import Trace
from ..plan import CutPlan
from .training import Training

_FILES = {
    "stage_{}.py": "one for each stage: its module, its sources, and `step`, which trains both on "
    "a batch",
    "blocks.py": "modules that several stages hold",
    "decoupling.py": "what the sources are made of",
    "program.py": "all of them with weights and optimisers",
    "train.py": "the loop, one stage after the other: change `batches` and what else you like",
    "train_threads.py": "the same with a thread for each stage",
    "weights/": "as they were when this was written",
    "plan.json": "the plan, for `dni_fx.CutPlan.from_json` and `decouple(cuts=plan)`",
}


def text(plan: CutPlan, training: Training, files: Mapping[str, str], trace: Trace) -> str:
    """The page."""
    lines = [
        f"# {plan.model} in {len(training.stages)} stages",
        "",
        "A decoupled program: each stage trains on gradients that its own sources predict, without "
        "waiting for the stages behind it.",
        "It needs torch and nothing else" + _more(training) + ":",
        "",
        "```",
        "python train.py",
        "```",
        "",
        "| file | what it holds |",
        "| --- | --- |",
    ]
    known = {*files, "weights/", "stage_{}.py"}
    lines += [
        f"| `{name.format('N')}` | {about} |" for name, about in _FILES.items() if name in known
    ]
    lines += ["", "## Plan", "", "```", *str(plan).splitlines(), "```"]
    notes = _notes(training, trace, "train_threads.py" in files)
    if notes:
        lines += ["", "## To know", "", *(f"- {note}" for note in notes)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _more(training: Training) -> str:
    needed = {i.split()[1].split(".")[0] for s in training.stages for i in s.imports}
    needed -= {"types", "operator"}
    needed |= {"safetensors"} if training.suffix == "safetensors" else set()
    return f" but {', '.join(f'`{n}`' for n in sorted(needed))}" if needed else ""


def _notes(training: Training, trace: Trace, threads: bool) -> list[str]:
    notes = [
        "This is the program of the mode that the model was in (training or evaluation): "
        "`F.dropout` and the like are as they were recorded.",
        "The optimisers begin anew.",
    ]
    notes += [
        f"It holds where `{condition}`; else `check` raises." for condition in training.checks
    ]
    renamed = [
        (s.index, k) for s in training.stages for k in s.tensors if k.startswith("layer_")
    ]  # fmt: skip
    if renamed:
        notes.append(
            "Names that are no names in Python begin with `layer_`: `layer_0.weight` is the "
            "model's `0.weight`."
        )
    if training.target is None:
        notes.append("What the loss takes could not be told: `batches` gives no targets yet.")
    if not threads:
        notes.append("Stages share parameters, so there is no loop with threads.")
    if any(node.meta.get("random") for node in trace.graph.nodes):
        notes.append("It draws random numbers, which come in the order in which stages run.")
    return notes

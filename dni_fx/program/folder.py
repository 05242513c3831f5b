"""A program folder: all its files, put in their place together."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DecouplingError
from ..graphs.graphs import Graphs
from ..graphs.variants import Variant
from ..passes.trace.nodes import Node
from ..passes.trace.traces import Trace
from ..plan import CutPlan, TensorSpec
from ..reports.files import write_atomically
from ..runtime.optimizing import MakeOptimizer
from ..sources import Exampled, default_optimizer
from . import readme
from .bodies import BodyWriter
from .classes import Classes
from .copying import copied
from .headers import KIT, file_text, home_of, needed_classes
from .options import Text, TrainingOptions, context_text, loss_text, optimizer_text
from .scopes import Inline, Scope, value_of
from .stages import Asked, StageFile, label_values, write_stage
from .threads import thread_lines
from .training import (
    Training,
    batch_lines,
    example_target,
    main_lines,
    program_lines,
    step_lines,
)
from .windows import StateTensor, state_of, window_lines

_CALLED = {"AcrossTime", "gradient_of", "no_gradients"}  # of the kit, by a stage itself
_TORCH = [
    ["def load(module: nn.Module, path: Path) -> None:", '    """Read a module\'s weights."""',
     "    module.load_state_dict(torch.load(path, weights_only=True))"],
    ["def save(module: nn.Module, path: Path) -> None:", '    """Write a module\'s weights."""',
     "    torch.save(module.state_dict(), path)"],
]  # fmt: skip
_SAFETENSORS = [
    ["def load(module: nn.Module, path: Path) -> None:", '    """Read a module\'s weights."""',
     "    module.load_state_dict(load_file(path))"],
    ["def save(module: nn.Module, path: Path) -> None:", '    """Write a module\'s weights."""',
     "    save_file({n: t.contiguous() for n, t in module.state_dict().items()}, path)"],
]  # fmt: skip


def write_folder(graphs: Graphs, settings: TrainingOptions, path: str | Path) -> Path:
    """Write a decoupled model's program as files that import torch alone.

    Args:
        graphs: of the model, for the mode that it is in.
        settings: how it trains.
        path: of the folder, which is made; it must not be there, or be empty.

    Returns:
        The path.

    Raises:
        DecouplingError: the folder holds something, or a part of the program cannot be written.
        PlanMismatchError: the graph of this mode cannot be trained.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DecouplingError(f"{str(path)!r} is there already: name a new or empty folder")
    if not path.parent.is_dir():
        raise DecouplingError(
            f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}"
        )
    files, weights = write_files(graphs, settings)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        (part / "weights").mkdir(parents=True)
        for name, text in files.items():
            write_atomically(part / name, text)
        for name, tensors in weights.items():
            _save(part / "weights" / name, tensors)
        if path.exists():
            path.rmdir()
        part.rename(path)
    except OSError as error:
        raise DecouplingError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return path


def write_files(
    graphs: Graphs, settings: TrainingOptions
) -> tuple[dict[str, str], dict[str, dict[str, Tensor]]]:
    """Texts by file name, and tensors by key and file name."""
    variant = graphs.current()
    served = graphs.served()
    _check(graphs)
    graphs.functions()  # raises where the graph has not all cuts
    classes, labels = Classes(), label_values(variant)
    loss = loss_text(settings.loss)
    many = settings.accumulate
    told = loss.expression + (f" / {many}" if many > 1 else "")
    stages = [
        write_stage(variant, stage, served, labels, told, classes) for stage in variant.split.stages
    ]
    stages[-1].imports |= loss.imports
    training = _training(graphs, variant, stages, settings)
    files = _stage_texts(stages, classes)
    uses = {n for stage in stages for n in stage.uses}
    uses |= {"one_hot"} if training.context and "one_hot(" in training.context.expression else set()
    threads = None if state_of(variant.split) else thread_lines(training)
    uses |= {"update", *(("Guard", "Link", "start_thread") if threads else ())}
    uses |= {"share"} if training.ties else set()
    uses |= {"unshared"} if any(o != k for o, _, k, _ in training.ties) else set()
    files |= _training_texts(training, sorted(uses), state_of(variant.split), threads)
    text = "What decoupled training needs besides torch."
    lines = [d.splitlines() for d in copied(sorted(uses))]
    files[f"{KIT}.py"] = file_text(text, lines, {}, set())
    files["pyproject.toml"] = "[tool.ruff]\nline-length = 100\n"
    files["plan.json"] = graphs.plan.to_json()
    files["README.md"] = readme.text(graphs.plan, training, files, variant.trace)
    weights = {f"stage_{s.index}.{training.suffix}": s.tensors for s in stages}
    weights |= {
        f"sources_{s.index}.{training.suffix}": s.source_tensors for s in stages if s.holds_sources
    }
    return files, weights


def read_plan(path: str | Path) -> CutPlan:
    """The plan of a program folder.

    Raises:
        DecouplingError: there is none, or it cannot be read.
    """
    place = Path(path) / "plan.json"
    try:
        return CutPlan.from_json(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise DecouplingError(f"no plan in {str(path)!r}: {error.strerror or error}") from error


def _check(graphs: Graphs) -> None:
    """Refuse what no files are written for."""
    if graphs.is_exact:
        raise DecouplingError(
            "with gradients='exact' the program is backpropagation: train the model itself; "
            "decouple with a source that answers at once to write a program"
        )
    opening: Any = graphs.recipe.opening
    if opening is not None and (opening.module.initial_state or opening.input_gradients):
        raise DecouplingError(
            "a program with initial_state= or input_gradients= cannot be written as files"
        )
    leaving = [i for i in graphs.interfaces if i.leaves]
    if any(i.feeds not in graphs.variant.split.model_inputs for i in leaving):
        raise DecouplingError("a network that sends messages to others cannot be written as files")
    context, specs = graphs.recipe.context, [s.context_spec for s in graphs.sources.values()]
    guessed = context is not None and not isinstance(context, Exampled)
    if guessed and any(spec is not None and len(spec.shape) > 2 for spec in specs):
        raise DecouplingError(
            "a program is written for a context of known shape, and one with positions has its "
            "shape from the target: pass example_target= to decouple, the target of one batch"
        )
    if graphs.inputs:
        raise DecouplingError(
            "a program with synthetic inputs (inputs=) cannot be written as files"
        )


def _training(
    graphs: Graphs, variant: Variant, stages: list[StageFile], settings: TrainingOptions
) -> Training:
    trace, labels = variant.trace, stages[0].labels
    places = [n for n in trace.graph.nodes if n.op == "placeholder"]
    first = next(iter(variant.layouts))[1:]
    shapes = [tuple(layout[0]) for layout in first]
    carried = {each.comes for each in state_of(variant.split)}
    examples = [
        TensorSpec(shape, value_of(n).dtype)
        for n, shape in zip(places, shapes, strict=True)
        if n.name not in carried
    ]
    leaves = trace.output_leaves
    output = value_of(leaves[0]) if len(leaves) == 1 and isinstance(leaves[0], Node) else None
    suffix = "safetensors" if importlib.util.find_spec("safetensors") else "pt"
    return Training(
        stages=stages,
        inputs=[n for n in variant.split.model_inputs if n not in carried],
        examples=examples,
        target=example_target(output, settings),
        ties=_ties(stages),
        optimizers=_optimizers(graphs, stages, settings),
        context=context_text(settings.context or graphs.recipe.context),
        settings=settings,
        suffix=suffix,
        checks=conditions(trace, {n: labels[n.name] for n in places}, shapes),
    )


def _ties(stages: list[StageFile]) -> list[tuple[int, str, int, str]]:
    """Tensors that have several names: those of the first, and each other one."""
    owners: dict[int, tuple[int, str]] = {}
    ties = []
    for stage in stages:
        for key, tensor in stage.tensors.items():
            owner = owners.setdefault(id(tensor), (stage.index, key))
            if owner != (stage.index, key):
                ties.append((*owner, stage.index, key))
    return ties


def _optimizers(
    graphs: Graphs, stages: list[StageFile], options: TrainingOptions
) -> list[tuple[Text | None, list[tuple[str, Text]]]]:
    known = dict(graphs.model.named_parameters())
    owned: set[int] = set()
    found: list[tuple[Text | None, list[tuple[str, Text]]]] = []
    for stage in stages:
        names = graphs.parameter_names(stage.index)
        own = [(n, p) for n, p in known.items() if n in names and id(p) not in owned]
        owned.update(id(p) for _, p in own)
        of_sources = [
            (a.name, optimizer_text(_maker(options, a), learnt, "synthesizer_optimizer"))
            for a in stage.sources
            if (learnt := list(a.group.source.named_parameters()))
        ]
        of_stage = optimizer_text(options.optimizer, own, "optimizer") if own else None
        found.append((of_stage, of_sources))
    return found


def _maker(options: TrainingOptions, asked: Asked) -> MakeOptimizer:
    """What makes the optimiser of a source."""
    source = asked.group.source
    return options.synthesizer_optimizer or (lambda learnt: default_optimizer(source, learnt))


def conditions(trace: Trace, names: Mapping[Node, str], shapes: list[tuple[int, ...]]) -> list[str]:
    """What the program looks at in its inputs, as conditions in Python."""
    if trace.rung == "export":
        pairs = zip(names.values(), shapes, strict=True)
        return [f"tuple({name}.shape) == {shape}" for name, shape in pairs]
    nodes = [n for n in trace.graph.nodes if n.op.startswith("call_")]
    inline = Inline(nodes)
    found: dict[str, None] = {}
    for node, value in trace.guards:
        if node not in inline.nodes or not inline.leaves(node) <= set(names):
            continue
        writer = BodyWriter(Scope(""), inline, {}, lambda _: "", lambda _: ("", (), ()), set())
        text = writer.expression(node, names)
        if value is True:
            found[text] = None
        elif value is False:
            found[f"not ({text})"] = None
        elif isinstance(value, int):
            found[f"{text} == {value}"] = None
    return list(found)


# ---- texts --------------------------------------------------------------------------------------


def _stage_texts(stages: list[StageFile], classes: Classes) -> dict[str, str]:
    homes = home_of(stages, classes)
    files: dict[str, str] = {}
    common = [n for n in classes.lines if homes.get(n) == "blocks"]
    if common:
        lines = [classes.named(n) for n in common]
        extra = {i for n in common for i in classes.imports[n]}
        about = "Modules that several stages hold."
        files["blocks.py"] = file_text(about, lines, {KIT: _bases(lines)}, extra)
    for stage in stages:
        home = f"stage_{stage.index}"
        own = [n for n in classes.lines if homes.get(n) == home]
        lines = [*(classes.named(n) for n in own), *stage.lines]
        text = "\n".join(part for each in lines for part in each)
        extra = stage.imports | {i for n in own for i in classes.imports[n]}
        local = {
            "blocks": [n for n in needed_classes(text, classes) if homes.get(n) == "blocks"],
            KIT: sorted({*_bases(lines)} | stage.uses & _CALLED),
        }
        about = f"Stage {stage.index} of {len(stages)}."
        files[f"{home}.py"] = file_text(about, lines, local, extra)
    return files


def _bases(lines: list[list[str]]) -> list[str]:
    """The classes of the kit that others derive from."""
    heads = (part for each in lines for part in each if part.startswith("class "))
    found = {match[1] for head in heads if (match := re.search(r"\((\w+)\):", head))}
    return sorted(found)


def _training_texts(
    training: Training,
    uses: list[str],
    state: list[StateTensor],
    threads: list[list[str]] | None,
) -> dict[str, str]:
    stages = training.stages
    io = _SAFETENSORS if training.suffix == "safetensors" else _TORCH
    local: dict[str, list[str]] = {KIT: [n for n in ("share", "unshared") if n in uses]}
    for s in stages:
        names = [*([f"Sources{s.index}"] if s.holds_sources else []), f"Stage{s.index}"]
        local[f"stage_{s.index}"] = names
    every = [t for own, more in training.optimizers for t in (own, *(text for _, text in more))]
    made = {i for t in every if t is not None for i in t.imports}
    here = [["HERE = Path(__file__).parent"]]
    extra = {"from safetensors.torch import load_file, save_file"} if io is _SAFETENSORS else set()
    files = {
        "program.py": file_text(
            "The stages with their weights, sources and optimisers.",
            [*here, *program_lines(training), *io],
            local,
            made | extra,
        )
    }
    modules = [f"stage_{s.index}" for s in stages]
    names = ["Program", *(["check"] if training.checks else [])]
    sees = training.context is not None and any(s.takes_context for s in stages)
    encode = ["one_hot"] if sees and "one_hot" in uses else []
    told = training.context.imports if training.context and sees else set()
    main = [['if __name__ == "__main__":', "    main()"]]
    loop = [step_lines, batch_lines, main_lines]
    lines = window_lines(training, state) if state else [part(training) for part in loop]
    files["train.py"] = file_text(
        "Trains the stages one after the other; change what you like.",
        [*here, *lines, *main],
        {KIT: [*encode, "update"], "program": sorted(names)},
        told,
        modules,
    )
    if threads is not None:
        files["train_threads.py"] = file_text(
            "Trains the stages at once, each on a thread of its own.",
            [*here, *threads, *main],
            {
                KIT: ["Guard", "Link", *encode, "start_thread", "update"],
                "program": sorted(names),
                "train": ["batches"],
            },
            told,
            modules,
        )
    return files


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    plain: dict[str, Any] = {n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}
    if path.suffix == ".safetensors":
        import safetensors.torch

        safetensors.torch.save_file(plain, path)
    else:
        torch.save(plain, path)

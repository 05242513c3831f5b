"""What one process puts into a checkpoint, as a plain dict, and how it takes it up again.

Each stage's state stands for itself, under names that do not tell the rank, so that a run can go on
with its stages on other ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..graphs.nested import flatten
from ..passes.trace.state import rng_state, set_rng_state
from .process import Process
from .sharing import owned_tensors

FORMAT = 1


def collect(process: Process, steps: int, extra: Any) -> dict[str, Any]:
    """Everything that this process saves, by name: tensors, and objects that are pickled.

    Args:
        process: whose stages are saved; nothing may be under way.
        steps: number of steps made.
        extra: the user's own, of rank 0.
    """
    state: dict[str, Any] = {n: t.detach() for n, t in _model_tensors(process).items()}
    generators = rng_state()
    for index, worker in process.workers.items():
        leaves, structure = flatten(_stage_state(process, index, steps))
        state |= {f"stage_{index}/{i}": leaf.detach() for i, leaf in enumerate(leaves)}
        state[f"stage_{index}"] = structure
        own = worker.learner.random
        state[_at("random", process, index)] = None if own is None else own.state
        state[_at("devices", process, index)] = generators["devices"]
    if process.peers.rank == 0:
        state["run"] = generators | {
            "format": FORMAT,
            "plan": process.decoupled.plan.to_json(),
            "steps": steps,
            "extra": extra,
        }
    return state


def wanted(process: Process, saved: set[str]) -> set[str]:
    """Which of the saved names this process takes up."""
    prefixes = tuple(f"stage_{k}/" for k in process.workers)
    names = {"run", *_model_tensors(process), *(f"stage_{k}" for k in process.workers)}
    names |= {_at(kind, process, k) for k in process.workers for kind in ("random", "devices")}
    return {n for n in saved if n in names or n.startswith(prefixes)}


def apply(process: Process, state: dict[str, Any], path: Path) -> tuple[int, Any]:
    """Take up what :func:`collect` returned.

    Args:
        process: whose stages are loaded.
        state: what :func:`wanted` names.
        path: where it was read, for messages.

    Returns:
        Number of steps made, and the user's own.

    Raises:
        DecouplingError: the state belongs to another model or plan; nothing is loaded then.
    """
    run, mine = state["run"], _model_tensors(process)
    _check(process, state, mine, path)
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(state[name])
    for index, worker in process.workers.items():
        count = sum(name.startswith(f"stage_{index}/") for name in state)
        leaves = [state[f"stage_{index}/{i}"] for i in range(count)]
        _load_stage_state(process, index, state[f"stage_{index}"].build(iter(leaves)))
        if (own := worker.learner.random) is not None:
            own.state = state.get(_at("random", process, index), own.state)
    first = next(iter(process.workers))  # all stages of a process draw from the same devices
    devices = state.get(_at("devices", process, first), {})
    set_rng_state(run | {"devices": devices})  # what is not the devices' is the same in all
    return run["steps"], run["extra"]


def _check(
    process: Process, state: dict[str, Any], mine: dict[str, torch.Tensor], path: Path
) -> None:
    """The state is of this plan and this model."""
    if state["run"]["plan"] != process.decoupled.plan.to_json():
        raise DecouplingError(
            f"{path} was saved with another plan: build the same model and cut it the same way "
            "(a plan is written by plan.to_json() and passed as cuts=)"
        )
    missing = [n for n in (*mine, *(f"stage_{k}" for k in process.workers)) if n not in state]
    if missing:
        raise DecouplingError(
            f"{path} lacks {missing[0]!r}, which this model has: it belongs to another one"
        )
    wrong = [n for n, t in mine.items() if state[n].shape != t.shape]
    if wrong:
        raise DecouplingError(
            f"{path} does not fit: {wrong[0]!r} has shape {tuple(state[wrong[0]].shape)} in it"
        )


def _model_tensors(process: Process) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the stages here, by their names in a checkpoint."""
    model = process.decoupled.model
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    owned = owned_tensors(process.decoupled)
    return {f"model/{names[id(t)]}": t for k, t in owned if k in process.workers}


def _at(kind: str, process: Process, index: int) -> str:
    """The name of what a stage has on this one of the ranks that run it."""
    place = process.places.ranks[index].index(process.peers.rank)
    return f"{kind}/{index}/{place}"


def _stage_state(process: Process, index: int, steps: int) -> dict[str, Any]:
    """Optimiser, sources and unfinished gradients of a stage that is here."""
    name, learners = f"stage_{index}", _learners_of(process.decoupled, index)
    optimizer, others = process.optimizers.stages.get(name), process.optimizers.sources
    owned = process.optimizers.parameters.get(name, [])
    gradients = {n: p.grad for n, p in owned if p.grad is not None}
    return {
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "sources": {n: s.state_dict() for n, s in learners.items()},
        "source_optimizers": {n: others[n].state_dict() for n in learners if n in others},
        "gradients": gradients if steps % process.objective.accumulate else {},
        "steps": steps,
    }


def _load_stage_state(process: Process, index: int, state: dict[str, Any]) -> None:
    """Put back what :func:`_stage_state` returned."""
    name, optimizers = f"stage_{index}", process.optimizers
    if name in optimizers.stages:
        optimizers.stages[name].load_state_dict(state["optimizer"])
    for learner_name, learner in _learners_of(process.decoupled, index).items():
        learner.load_state_dict(state["sources"][learner_name])
    for learner_name, saved in state["source_optimizers"].items():
        optimizers.sources[learner_name].load_state_dict(saved)
    for parameter_name, parameter in optimizers.parameters.get(name, []):
        parameter.grad = state["gradients"].get(parameter_name)
    process.workers[index].desk.steps = state["steps"]


def _learners_of(decoupled: Decoupled, index: int) -> dict[str, nn.Module]:
    """Sources that a stage asks, and synthetic inputs that it is the first to use."""
    first = {f"{i.name}@input": i.consumers[0] for i in decoupled.interfaces}
    learners = decoupled.named_learners([index])
    return {n: s for n, s in learners if first.get(n, index) == index}

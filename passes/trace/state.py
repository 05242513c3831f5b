"""Leaving a model and the random generators as they were."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

MODULE_INTERNALS = frozenset(vars(nn.Module()))
TABLES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))


@contextlib.contextmanager
def no_kept_casts() -> Iterator[None]:
    """Autocast keeps cast weights until its outermost region ends: fake ones must not get out, nor
    real ones in.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
        torch.clear_autocast_cache()  # regions inside may have switched it on


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back attributes, tables (buffers, hooks, ...), modes and random states; buffers are
    clones meanwhile.
    """
    modules = list(model.modules())
    saved = remembered(modules)
    containers = own_containers(modules)
    parameters = [(p, p._version, p.detach().clone()) for p in model.parameters()]
    rng = preserved_rng()
    clones: dict[int, torch.Tensor] = {}
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = clones.setdefault(id(buffer), buffer.clone())
    try:
        with no_kept_casts():
            yield
    finally:
        put_back(saved)
        refill(containers)
        put_back_parameters(parameters)
        rng()


def own_containers(modules: list[nn.Module]) -> list[tuple[Any, Any]]:
    """Lists, dicts and sets among the modules' own attributes (caches), with copies of their
    contents.
    """
    values = [v for m in modules for k, v in vars(m).items() if k not in MODULE_INTERNALS]
    return [(v, copy.copy(v)) for v in values if type(v) in (list, dict, set)]


def refill(containers: list[tuple[Any, Any]]) -> None:
    """Put contents back in place."""
    for container, content in containers:
        container.clear()
        (container.extend if isinstance(container, list) else container.update)(content)


def put_back_parameters(saved: list[tuple[nn.Parameter, int, torch.Tensor]]) -> None:
    """Undo what a forward wrote into parameters (``nn.Embedding(max_norm=...)`` does)."""
    with torch.no_grad():
        for parameter, version, content in saved:
            if parameter._version != version:
                parameter.copy_(content)


def remembered(
    modules: list[nn.Module],
) -> list[tuple[nn.Module, dict[str, Any], dict[str, dict[str, Any]]]]:
    """Modules with their attributes and the contents of their tables."""
    return [
        (m, dict(vars(m)), {t: dict(vars(m)[t]) for t in TABLES if t in vars(m)}) for m in modules
    ]


def put_back(saved: list[tuple[nn.Module, dict[str, Any], dict[str, dict[str, Any]]]]) -> None:
    """Restore what :func:`remembered` returned."""
    for module, attributes, contents in saved:
        for name in [k for k in vars(module) if k not in attributes]:
            del vars(module)[name]
        vars(module).update(attributes)
        for table, content in contents.items():
            vars(module)[table].clear()
            vars(module)[table].update(content)


def preserved_rng() -> Callable[[], None]:
    """Remember torch's, Python's and NumPy's random states; the result puts them back."""
    cpu, python = torch.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numpy = sys.modules.get("numpy.random")
    numpy_state = numpy.get_state() if numpy else None

    def restore() -> None:
        torch.set_rng_state(cpu)
        random.setstate(python)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if numpy is not None:
            numpy.set_state(copy.deepcopy(numpy_state))

    return restore


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put back buffers' contents, attributes and random states after a run."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    parameters = [(p, p._version, p.detach().clone()) for p in model.parameters()]
    modules = list(model.modules())
    saved, containers = remembered(modules), own_containers(modules)
    rng = preserved_rng()
    try:
        with no_kept_casts():
            yield
    finally:
        put_back(saved)
        refill(containers)
        put_back_parameters(parameters)
        with torch.no_grad():
            for buffer, content in buffers:
                if not torch.equal(
                    buffer, content
                ):  # else graphs that hold it must find it untouched
                    buffer.copy_(content)
        rng()


def python_draws() -> Any:
    """State of Python's and NumPy's generators, to notice that a model drew from them."""
    numpy = sys.modules.get("numpy.random")
    state = numpy.get_state() if numpy else None
    return random.getstate(), state and (state[1][0], state[2])

"""Leaving a model and the random generators as they were."""

from __future__ import annotations

import contextlib
import copy
import importlib
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from .values import dense

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


def rng_state() -> dict[str, Any]:
    """The random states of torch, of every device of the accelerator in use, of Python and NumPy.

    Returns:
        ``torch``, ``python``, ``devices`` (a list by the accelerator's type, empty where none was
        used), and ``numpy`` where that is imported: values that ``torch.load`` takes as they are.
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    kind, module, devices = _accelerator()
    used = devices and getattr(module, "is_initialized", lambda: True)()  # to ask would start it up
    state["devices"] = {kind: [module.get_rng_state(d) for d in devices]} if used else {}
    numpy = sys.modules.get("numpy.random")
    if numpy:
        found = numpy.get_state(legacy=False)
        inner = {
            k: v if isinstance(v, int) else torch.from_numpy(v) for k, v in found["state"].items()
        }
        state["numpy"] = found | {"state": inner}
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` returned, wherever its tensors are now.

    Args:
        state: parts that are missing leave their generators alone, as do devices that are not here;
            ``cuda`` is what trainers saved before there was ``devices``.
    """
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, module, devices = _accelerator()
    saved = state.get("devices", {"cuda": state.get("cuda", [])}).get(kind, [])
    for content, device in zip(saved, devices, strict=False):
        module.set_rng_state(content.cpu(), device)
    if "numpy" in state:
        numpy, found = importlib.import_module("numpy.random"), state["numpy"]
        inner = {k: v if isinstance(v, int) else v.cpu().numpy() for k, v in found["state"].items()}
        numpy.set_state(found | {"state": inner})


def _accelerator() -> tuple[str, Any, list[torch.device]]:
    """The accelerator's type, its module of torch, and its devices; none where there is none."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return "", None, []
    module: Any = torch.get_device_module(device)
    return device.type, module, [torch.device(device.type, k) for k in range(module.device_count())]


def preserved_rng() -> Callable[[], None]:
    """Remember the random states; the result puts them back."""
    return partial(set_rng_state, rng_state())


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
                if not torch.equal(dense(buffer), dense(content)):
                    buffer.copy_(content)  # else graphs that hold it must find it untouched
        rng()


def python_draws() -> Any:
    """State of Python's and NumPy's generators, to notice that a model drew from them."""
    numpy = sys.modules.get("numpy.random")
    state = numpy.get_state() if numpy else None
    return random.getstate(), state and (state[1][0], state[2])

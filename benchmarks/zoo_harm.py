"""What must be as before once a model has been listed, planned or decoupled."""

from __future__ import annotations

import functools
import gc
import random
import sys
from collections.abc import Iterable, Iterator
from types import FrameType, FunctionType, ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

PLAIN = (bool, int, float, complex, str, bytes, type(None))
LARGEST_WALK = 400_000  # objects
_OURS = ("torch", "dni_fx", "zoo", "numpy", "builtins", "networkx", "multiprocessing")
_TRACED = ("torch._subclasses", "torch.fx", "torch._functorch", "dni_fx")

Facts = dict[str, Any]


class Untouched:
    """A model with its inputs and the process around it, as they are when this is made."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs = model, inputs
        self.facts, self.values = self._facts(), self._values()

    def difference(self) -> str:
        """The first thing that is not as it was; empty where everything is."""
        facts = self._facts()
        for key in self.facts | facts:
            if key not in facts or key not in self.facts:
                return f"{key} {'came' if key in facts else 'went'}"
            if self.facts[key] != facts[key]:
                return f"{key} was {self.facts[key]}, is {facts[key]}"[:300]
        values = self._values()
        for key, before in self.values.items():
            if not torch.equal(_bits(before), _bits(values[key])):
                return f"{key} has other values"
        return leftover(self.model)

    def _facts(self) -> Facts:
        found: Facts = {}
        for name, module in self.model.named_modules():
            found.update(_module_facts(name or "the model", module))
        for index, leaf in enumerate(tree_leaves(self.inputs)):
            known = isinstance(leaf, Tensor)
            found[f"input {index}"] = (_place(leaf), leaf.requires_grad) if known else type(leaf)
        found["default dtype"] = torch.get_default_dtype()
        found["grad mode"] = torch.is_grad_enabled()
        found["deterministic"] = torch.are_deterministic_algorithms_enabled()
        found["random state of Python"] = hash(random.getstate())
        state = numpy.random.get_state()  # noqa: NPY002
        found["random state of numpy"] = hash((state[1].tobytes(), *state[2:]))
        return found

    def _values(self) -> dict[str, Tensor]:
        found = {"random state of torch": torch.get_rng_state()}
        for name, module in self.model.named_modules():
            for key, value in _tensors_of(module):
                found[f"{name}.{key}"] = value
        for index, leaf in enumerate(tree_leaves(self.inputs)):
            if isinstance(leaf, Tensor):
                found[f"input {index}"] = leaf
        return {key: value.detach().clone() for key, value in found.items()}


def _module_facts(name: str, module: nn.Module) -> Facts:
    found: Facts = {f"attributes of {name}": sorted(map(str, vars(module)))}
    for key, value in vars(module).items():
        if isinstance(value, PLAIN):
            found[f"{name}.{key}"] = value
        elif isinstance(value, dict) and key.endswith("_hooks"):
            found[f"{name}.{key}"] = len(value)
        elif isinstance(value, torch.Generator):
            found[f"{name}.{key}"] = hash(value.get_state().numpy().tobytes())
        elif isinstance(value, (dict, list, set)):
            found[f"length of {name}.{key}"] = len(value)
    for key, value in _tensors_of(module):
        found[f"storage of {name}.{key}"] = _place(value)
        found[f"requires_grad of {name}.{key}"] = value.requires_grad
        found[f"gradient of {name}.{key}"] = "none" if value.grad is None else "a tensor"
    return found


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)
    for key, value in vars(module).items():
        if isinstance(value, Tensor):
            yield key, value


def _place(value: Tensor) -> tuple[Any, ...]:
    kind = type(value).__name__, str(value.dtype), tuple(value.shape)
    if value.layout != torch.strided:
        return (id(value), *kind)
    return (id(value), value.data_ptr(), value.stride(), *kind)


def _bits(value: Tensor) -> Tensor:
    dense = value.to_dense() if value.layout != torch.strided else value
    return dense.contiguous().reshape(-1).view(torch.uint8)


def leftover(model: nn.Module) -> str:
    """A traced or fake value that the model, a cache or a module of its package still holds."""
    kind = type(functools.lru_cache(int))
    caches = [x for x in gc.get_objects() if type(x) is kind]
    caches = [x for x in caches if not str(getattr(x, "__module__", "")).startswith(_OURS)]
    roots: list[tuple[str, Any]] = [("the model", vars(model))]
    roots += [(f"the cache of {getattr(x, '__wrapped__', x)}", x) for x in caches]
    for name, module in list(sys.modules.items()):
        names = dict(getattr(module, "__dict__", {}))  # by no other road: some import what is asked
        if "site-packages" in str(names.get("__file__")) and not name.startswith(_OURS):
            values = [value for value in names.values() if _is_container(value)]
            roots.append((f"module {name}", values))
    for place, root in roots:
        for value in _reachable([root]):
            if _is_traced(value):
                return f"{place} holds a {type(value).__module__}.{type(value).__qualname__}"
    return ""


def _is_container(value: Any) -> bool:
    if isinstance(value, FunctionType):
        return value.__closure__ is not None or bool(value.__dict__)
    return isinstance(value, (dict, list, set, Tensor)) and not isinstance(value, ModuleType)


def _reachable(roots: Iterable[Any]) -> Iterator[Any]:
    seen: set[int] = set()
    queue = list(roots)
    while queue and len(seen) < LARGEST_WALK:
        value = queue.pop()
        if id(value) in seen or isinstance(value, (type, ModuleType, FrameType, *PLAIN)):
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, FunctionType):
            parts = [value.__closure__, value.__dict__, value.__defaults__]
            queue += [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
            queue += [part for part in parts[1:] if part]
        else:
            queue += gc.get_referents(value)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_traced(value: Any) -> bool:
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return True
    module = type(value).__module__
    proxies = "FakeTensor", "Proxy", "FunctionalTensor", "SymNode"
    return module.startswith(_TRACED) and type(value).__name__.endswith(proxies)

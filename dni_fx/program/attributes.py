"""What a written module holds: its ``__init__``, how ``forward`` reaches it, and its tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DecouplingError
from .constructors import constructed
from .text import docstring, free_name, literal

_KEYED = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class Made:
    """A module as it is written.

    Attributes:
        expression: the call that makes it.
        tensors: its parameters and buffers, by their keys in its ``state_dict``.
    """

    expression: str
    tensors: dict[str, Tensor]


class Attributes:
    """What one written module holds of a module of the model.

    Args:
        module: the model's.
        path: of it.
        used: paths below it of what is called and read there.
        called: those of modules that are called as a whole.
        scopes: those of them that are written as classes of their own, by path.
        others: what the graph refers to, by path; some of it no module has.
        add_class: registers a class by the name that is wanted, and its lines.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str,
        used: Iterable[str],
        called: Collection[str],
        scopes: Mapping[str, Made],
        others: Mapping[str, Any],
        add_class: Callable[[str, list[str]], str],
    ) -> None:
        self.module, self.path = module, path
        self._scopes, self._others, self._add_class = scopes, others, add_class
        self._called = called
        self._tree: dict[str, Any] = {}
        for name in sorted(used, key=self._place):
            branch = self._tree
            for part in name.split("."):
                branch = branch.setdefault(part, {})
        self._names: dict[str, str] = {}
        for part in self._tree:
            wanted = part if part.isidentifier() else f"layer_{part}"
            self._names[part] = wanted if part == wanted else free_name(wanted, self._tree)
        self.tensors: dict[str, Tensor] = {}
        self.types: list[str] = []
        self.lines = [line for part in self._tree for line in self._line(part)]

    def expression(self, name: str) -> str:
        """How ``forward`` reaches what stands at a path."""
        first, *rest = name.split(".")
        text, branch, at = f"self.{self._names[first]}", self._tree[first], first
        for part in rest:
            text += self._step(at, branch, part)
            branch, at = branch.get(part, {}), f"{at}.{part}"
        return text

    def _step(self, at: str, branch: dict[str, Any], part: str) -> str:
        holder = self._at(at)
        if not isinstance(holder, _KEYED):
            return f".{part}"
        return f"[{part}]" if self._is_whole_list(holder, branch) else f'["{part}"]'

    def _place(self, name: str) -> list[int]:
        """Where the model has it, among its own."""
        found: list[int] = []
        module: nn.Module | None = self.module
        for part in name.split("."):
            own = [] if module is None else _own_names(module)
            found.append(own.index(part) if part in own else len(own))
            module = module._modules.get(part) if module is not None else None
        return found

    def _line(self, part: str) -> list[str]:
        """The statements of ``__init__`` for one attribute."""
        name = self._names[part]
        found = self._at(part)
        if isinstance(found, Tensor) and not isinstance(found, nn.Parameter):
            self.tensors[name] = found
            self.types.append(f"{name}: Tensor")
            return [f'self.register_buffer("{name}", {_zeros(found)})']
        made = self._made(part, self._tree[part])
        self.tensors |= {f"{name}.{k}" if k else name: t for k, t in made.tensors.items()}
        lines = [f"self.{name} = {made.expression}"]
        if not isinstance(found, nn.Module) or part in self._scopes:
            return lines
        trained = [(n, p.requires_grad) for n, p in found.named_parameters()]
        mixed = len({is_trained for _, is_trained in trained}) > 1 and not self._tree[part]
        frozen = [n for n, is_trained in trained if not is_trained and mixed]
        return lines + [f"self.{name}.{n}.requires_grad_(False)" for n in frozen]

    def _made(self, at: str, branch: dict[str, Any]) -> Made:
        """What stands at a path, as an expression."""
        if at in self._scopes:
            return self._scopes[at]
        found = self._at(at)
        if isinstance(found, nn.Parameter):
            trained = "" if found.requires_grad else ", requires_grad=False"
            return Made(f"nn.Parameter({_zeros(found)}{trained})", {"": found})
        if not isinstance(found, nn.Module) or not (branch or at in self._called):
            raise DecouplingError(
                f"{self._full(at)!r} of the model, a {type(found).__name__}, is an argument of a "
                "call (as in a reentrant checkpoint), which cannot be written as Python"
            )
        if at in self._called:
            state = found.state_dict(keep_vars=True).items()
            tensors = {n: t for n, t in state if isinstance(t, Tensor)}
            return Made(constructed(found, self._full(at)), tensors)
        return self._container(at, branch, found)

    def _container(self, at: str, branch: dict[str, Any], found: nn.Module) -> Made:
        if not isinstance(found, (*_KEYED, nn.ParameterList)):
            return self._part(at, branch, found)
        parts = {p: self._made(f"{at}.{p}", branch[p]) for p in branch}
        if all(p.isdigit() for p in parts):
            parts = dict(sorted(parts.items(), key=lambda pair: int(pair[0])))
        tensors = {
            (f"{p}.{k}" if k else p): t
            for p, made in parts.items()
            for k, t in made.tensors.items()
        }
        texts = [made.expression for made in parts.values()]
        if isinstance(found, nn.ParameterList):
            return Made(f"nn.ParameterList([{', '.join(texts)}])", tensors)
        if self._is_whole_list(found, branch):
            if len(texts) > 1 and len(set(texts)) == 1:
                return Made(f"nn.ModuleList({texts[0]} for _ in range({len(texts)}))", tensors)
            return Made(f"nn.ModuleList([{', '.join(texts)}])", tensors)
        pairs = ", ".join(f'"{p}": {made.expression}' for p, made in parts.items())
        return Made(f"nn.ModuleDict({{{pairs}}})", tensors)

    def _part(self, at: str, branch: dict[str, Any], found: nn.Module) -> Made:
        """A module of which only some parts are used, one by one."""
        scopes = {
            p.removeprefix(f"{at}."): m for p, m in self._scopes.items() if p.startswith(f"{at}.")
        }
        called = {p.removeprefix(f"{at}.") for p in self._called if p.startswith(f"{at}.")}
        full, paths = self._full(at), _paths(branch)
        held = Attributes(found, full, paths, called, scopes, self._others, self._add_class)
        kind = type(found).__name__
        name = self._add_class(f"{kind}Part", class_lines(f"A part of a ``{kind}``.", held, []))
        return Made(f"{name}()", held.tensors)

    def _is_whole_list(self, found: nn.Module, branch: dict[str, Any]) -> bool:
        names = [str(k) for k in range(len(branch))]
        whole = isinstance(found, nn.ModuleList) and len(found) == len(branch)
        return whole and sorted(branch, key=int) == names

    def _at(self, name: str) -> Any:
        """What the model has at a path below the module."""
        if self._full(name) in self._others:
            return self._others[self._full(name)]
        found: Any = self.module
        for part in name.split("."):
            found = found[int(part)] if isinstance(found, nn.ParameterList) else _child(found, part)
        return found

    def _full(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def _own_names(module: nn.Module) -> list[str]:
    return [*module._parameters, *module._buffers, *module._modules]


def _child(module: Any, name: str) -> Any:
    return module._modules[name] if name in module._modules else getattr(module, name)


def _paths(branch: dict[str, Any]) -> list[str]:
    return [
        f"{name}.{path}" if path else name
        for name, below in branch.items()
        for path in (_paths(below) if below else [""])
    ]


def _zeros(tensor: Tensor) -> str:
    """A tensor like it, whose values are loaded later."""
    sizes = ", ".join(map(str, tensor.shape)) or "()"
    dtype = "" if tensor.dtype == torch.float32 else f", dtype={literal(tensor.dtype)}"
    return f"torch.zeros({sizes}{dtype})"


def class_lines(
    text: str, held: Attributes | None, methods: list[str], base: str = ""
) -> list[str]:
    """A class, its name left open.

    Args:
        text: its docstring.
        held: what it holds.
        methods: lines of its methods, indented as they stand.
        base: what it derives from, a module by default.
    """
    lines = [f"class {OPEN}({base or 'nn.Module'}):", *docstring(text), ""]
    types = held.types if held else []
    lines += [*(f"    {line}" for line in types), ""] if types else []
    lines += ["    def __init__(self) -> None:", "        super().__init__()"]
    lines += [f"        {line}" for line in (held.lines if held else [])]
    return [*lines, *(["", *methods] if methods else [])]


OPEN = "\0"  # where a class's name is to stand

"""Programs of random numbers, and the lines of Python that each becomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 4


LARGEST = 8  # values per sample


@dataclass(frozen=True)
class Program:
    """What hypothesis draws and shrinks."""

    inputs: int
    steps: tuple[tuple[str, int, int, int], ...]
    outputs: tuple[int, ...]
    structure: str
    cuts: tuple[int, ...]


@dataclass
class Value:
    """What the builder knows of a variable: its shape per sample, its memory (shared by aliases),
    what may be done.
    """

    name: str
    shape: tuple[int, ...]
    memory: int
    grad: bool
    writable: bool = True
    contiguous: bool = True

    @property
    def size(self) -> int:
        return int(torch.Size(self.shape).numel())


@dataclass
class Builder:
    """Turns raw instructions into source lines and the modules that they call."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    masks: list[Value] = field(default_factory=list)
    needed: set[int] = field(
        default_factory=set
    )  # memories whose content a backward needs, or that are the user's
    memories: int = 0

    def new(self, code: str, shape: tuple[int, ...], grad: bool = True, **options: Any) -> Value:
        """A value in memory of its own, computed by ``code``."""
        self.memories += 1
        return self.alias(code, Value("", shape, self.memories, grad), **options)

    def alias(
        self, code: str, of: Value, shape: tuple[int, ...] | None = None, **options: Any
    ) -> Value:
        """A value in the memory of another, computed by ``code``."""
        name = f"v{len(self.values)}"
        facts = {"grad": of.grad, "writable": of.writable, "contiguous": of.contiguous, **options}
        value = Value(name, of.shape if shape is None else shape, of.memory, **facts)
        self.lines.append(f"{name} = {code}")
        self.values.append(value)
        return value

    def pick(self, number: int, like: Value | None = None) -> Value:
        """An earlier value, counted from the newest one; of ``like``'s shape, if that is given."""
        fitting = [v for v in reversed(self.values) if like is None or v.shape == like.shape]
        return fitting[number % len(fitting)]

    def needs(self, *values: Value) -> None:
        """A backward needs what these hold."""
        self.needed.update(value.memory for value in values)

    def may_write(self, value: Value) -> bool:
        return value.writable and value.memory not in self.needed

    def module(self, module: nn.Module) -> str:
        name = f"m{len(self.modules)}"
        self.modules[name] = module
        return name

    def like_linear(self, width: int) -> list[tuple[str, nn.Linear]]:
        """Earlier linear modules of this width, with their names."""
        return [
            (k, m)
            for k, m in self.modules.items()
            if isinstance(m, nn.Linear) and m.in_features == width
        ]

    # One method for each instruction; ``a`` is its first operand, ``i`` and ``j`` choose the rest.

    def linear(self, a: Value, i: int, j: int) -> None:
        name = self.module(nn.Linear(a.shape[-1], a.shape[-1], bias=j % 3 > 0))
        if j == 7:
            self.modules[name].requires_grad_(False)
        else:
            self.needs(a)
        self.new(f"self.{name}({a.name})", a.shape, a.grad or j != 7)

    def shared(self, a: Value, i: int, j: int) -> None:
        known = self.like_linear(a.shape[-1])
        if not known:
            self.linear(a, i, 1)
            return
        name, module = known[i % len(known)]
        self.needs(a)
        self.new(f"self.{name}({a.name})", a.shape, a.grad or module.weight.requires_grad)

    def tied(self, a: Value, i: int, j: int) -> None:
        known = self.like_linear(a.shape[-1])
        if not known:
            self.linear(a, i, 1)
            return
        name, owner = known[i % len(known)]
        code = "F.linear({}, self.{}.weight.t())"
        if j % 2:
            module = nn.Linear(a.shape[-1], a.shape[-1])
            module.weight = owner.weight
            name, code = self.module(module), "self.{1}({0})"
        self.needs(a)
        self.new(code.format(a.name, name), a.shape, a.grad or owner.weight.requires_grad)

    def activation(self, a: Value, i: int, j: int) -> None:
        kind = (
            "torch.relu({})",
            "{}.tanh()",
            "F.gelu({})",
            "torch.sigmoid({})",
            "{}.softmax(-1)",
            "F.relu({}, {})",
        )[i % 6]
        if "{}, {}" in kind and self.may_write(a):
            self.alias(f"F.relu({a.name}, inplace=True)", a)
            self.needs(a)
            return
        value = self.new(kind.format(a.name, False), a.shape, a.grad)
        self.needs(a if "gelu" in kind else value)

    def relu_module(self, a: Value, i: int, j: int) -> None:
        write = self.may_write(a) and i % 2 == 0
        name = self.module(nn.ReLU(inplace=write))
        code = f"self.{name}({a.name})"
        self.needs(self.alias(code, a) if write else self.new(code, a.shape, a.grad))

    def add(self, a: Value, i: int, j: int) -> None:
        b = self.pick(i, a)
        sign = "+-"[j % 2]
        self.new(f"{a.name} {sign} {b.name}", a.shape, a.grad or b.grad)

    def multiply(self, a: Value, i: int, j: int) -> None:
        b = self.pick(i, a)
        if b.grad:
            self.needs(a)
        if a.grad:
            self.needs(b)
        self.new(f"{a.name} * {b.name}", a.shape, a.grad or b.grad)

    def concatenate(self, a: Value, i: int, j: int) -> None:
        b = self.pick(i, a)
        if a.size + b.size > LARGEST:
            self.add(a, i, j)
            return
        shape = (*a.shape[:-1], 2 * a.shape[-1])
        self.new(f"torch.cat([{a.name}, {b.name}], -1)", shape, a.grad or b.grad)

    def chunk(self, a: Value, i: int, j: int) -> None:
        width = a.shape[-1]
        if width < 2:
            self.slice(a, i, j)
            return
        parts = (1, width - 1) if i % 2 else (width // 2, width - width // 2)
        name = f"p{len(self.values)}"
        code = (
            f"{a.name}.split([{parts[0]}, {parts[1]}], dim=-1)"
            if parts[0] != parts[1]
            else f"{a.name}.chunk(2, -1)"
        )
        self.lines.append(f"{name} = {code}")
        for index, part in enumerate(parts):
            self.alias(
                f"{name}[{index}]", a, (*a.shape[:-1], part), writable=False, contiguous=False
            )
        self.needs(
            a
        )  # one of several views made at once: neither they nor their base may be written to

    def slice(self, a: Value, i: int, j: int) -> None:
        width = a.shape[-1]
        half = max(1, width // 2)
        code = (
            f"[..., :{half}]",
            f"[..., {width - half}:]",
            f".narrow(-1, {width - half}, {half})",
        )[i % 3]
        self.alias(a.name + code, a, (*a.shape[:-1], half), contiguous=False)

    def reshape(self, a: Value, i: int, j: int) -> None:
        if len(a.shape) > 1:
            shape: tuple[int, ...] = (a.size,)
        else:
            shape = (2, a.size // 2) if a.size % 2 == 0 else (1, a.size)
        sizes = ", ".join(map(str, shape))
        if not a.contiguous:
            self.new(f"{a.name}.reshape(-1, {sizes}).clone()", shape, a.grad)
        else:
            batch = f"{a.name}.shape[0]" if j % 2 else "-1"
            self.alias(f"{a.name}.{('view', 'reshape')[i % 2]}({batch}, {sizes})", a, shape)

    def cached(self, a: Value, i: int, j: int) -> None:
        if i % 2:
            self.new(f"{a.name} * factor({a.name}.shape[-1])", a.shape, a.grad)
        else:
            self.new(f"{a.name}.reshape(flat({a.name}.shape)).clone()", (a.size,), a.grad)

    def transpose(self, a: Value, i: int, j: int) -> None:
        if len(a.shape) < 2:
            self.reshape(a, i, j)
            return
        self.alias(f"{a.name}.transpose(1, 2)", a, a.shape[::-1], contiguous=False)

    def write(self, a: Value, i: int, j: int) -> None:
        writable = [v for v in reversed(self.values) if self.may_write(v)]
        if not writable:
            self.add(a, i, j)
            return
        a = writable[i % len(writable)]
        b = self.pick(j, a)
        if b.memory == a.memory:
            b = a  # partly overlapping operands are an error
        kind = j % 6
        if kind == 0:
            self.alias(f"{a.name}.add_({b.name})", a)
        elif kind == 1:
            self.alias(f"{a.name}.mul_(0.5)", a)
        elif kind == 2:
            self.lines.append(f"{a.name}[:, 0] = {b.name}[:, -1]")
        elif kind == 3:
            self.lines.append(f"{a.name} += {b.name}")
        elif kind == 4:
            self.lines.append(f"{a.name}[:, -1] = 0.25")
        elif b is a:
            self.alias(f"{a.name}.sub_(1)", a)
        else:
            self.needs(b)
            self.alias(f"{a.name}.mul_({b.name})", a)
        if kind not in (1, 4) and b.grad:
            self._gains_gradient(a.memory)

    def _gains_gradient(self, memory: int) -> None:
        for value in self.values:
            if value.memory == memory:
                value.grad = True

    def dropout(self, a: Value, i: int, j: int) -> None:
        code = f"F.dropout({a.name}, 0.4, self.training)"
        if i % 2:
            code = f"self.{self.module(nn.Dropout(0.4))}({a.name})"
        self.alias(code, a, writable=a.writable and a.contiguous)  # in eval mode, an alias

    def norm(self, a: Value, i: int, j: int) -> None:
        if i % 2:
            module: nn.Module = nn.BatchNorm1d(a.shape[0])
        else:
            module = nn.LayerNorm(a.shape[-1])
        self.needs(a)
        self.new(f"self.{self.module(module)}({a.name})", a.shape)

    def detach(self, a: Value, i: int, j: int) -> None:
        self.alias(f"{a.name}.detach()", a, grad=False, writable=False)

    def no_grad(self, a: Value, i: int, j: int) -> None:
        self.lines.append("with torch.no_grad():")
        self.lines.append("    pass")
        at = len(self.lines) - 1
        if j % 3 == 0 and self.may_write(a):
            self.lines[at] = f"    {a.name}.mul_(0.9)"
        elif j % 3 == 1:
            b = self.pick(i, a)
            self.new(f"{a.name}.tanh() * {b.name} + 1", a.shape, False)
            self.lines[at] = "    " + self.lines.pop()
        else:
            self.new(
                f"self.{self.module(nn.Linear(a.shape[-1], a.shape[-1]))}({a.name})", a.shape, False
            )
            self.lines[at] = "    " + self.lines.pop()

    def buffer(self, a: Value, i: int, j: int) -> None:
        name = f"b{len(self.buffers)}"
        self.buffers[name] = torch.zeros(a.shape)
        self.lines.append("if self.training:")
        self.lines.append(f"    self.{name}.mul_(0.5).add_({a.name}.detach().mean(0))")
        self.new(f"{a.name} - self.{name}", a.shape, a.grad)

    def factory(self, a: Value, i: int, j: int) -> None:
        width, options = f"{a.name}.shape[-1]", f"dtype={a.name}.dtype"
        code = (
            f"torch.arange({width}, {options})",
            f"torch.zeros({a.name}.shape, {options})",
            "self.constant",
        )[i % 3]
        if code == "self.constant":
            self.buffers.setdefault("constant", torch.full((1,), 0.5))
        self.new(f"{a.name} + {code}", a.shape, a.grad)

    def mask(self, a: Value, i: int, j: int) -> None:
        name = f"k{len(self.masks)}"
        self.lines.append(f"{name} = {a.name} > 0")
        self.masks.append(Value(name, a.shape, 0, False))

    def where(self, a: Value, i: int, j: int) -> None:
        fitting = [m for m in self.masks if m.shape == a.shape]
        if not fitting:
            self.mask(a, i, j)
            fitting = self.masks[-1:]
        b = self.pick(i, a)
        code = f"torch.where({fitting[j % len(fitting)].name}, {a.name}, {b.name})"
        self.new(code, a.shape, a.grad or b.grad)


INSTRUCTIONS = (
    *(
        "linear",
        "linear",
        "shared",
        "tied",
        "activation",
        "relu_module",
        "add",
        "multiply",
        "concatenate",
        "chunk",
    ),
    *(
        "slice",
        "reshape",
        "transpose",
        "write",
        "write",
        "write",
        "dropout",
        "norm",
        "detach",
        "no_grad",
        "buffer",
    ),
    *("factory", "mask", "where", "cached"),
)

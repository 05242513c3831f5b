"""Random models that are hard to trace, and random calls of them, from one integer.

A program is the text of a file: random instructions as in ``random_models``, and between them
features of ``hostile_features`` and ``hostile_calls``, at the top or in blocks of their own. It is
executed twice, so that the model and what is made of it share no helper, global or cache.
"""

from __future__ import annotations

import collections
import contextvars
import copy
import functools
import linecache
import math
import os
import random
import textwrap
import threading
import types
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from . import hostile_calls, hostile_features
from .hostile_features import Feature
from .programs import INSTRUCTIONS, WIDTH, Builder, Value
from .random_models import shape_caches

FEATURES: tuple[Feature, ...] = (*hostile_features.ALL, *hostile_calls.ALL)
NUMBERS = ("0.5", "1.0", "2.0", "3.0")
LIBRARIES = {
    "torch": torch, "nn": nn, "F": F, "math": math, "functools": functools, "types": types,
    "numpy": numpy, "random": random, "collections": collections, "contextvars": contextvars,
    "os": os, "threading": threading,
}  # fmt: skip


@dataclass(frozen=True)
class Used:
    """A feature in a program, with its number and where it stands."""

    feature: Feature
    number: int
    block: bool

    def text(self, text: str, number: str = "1.0") -> str:
        """Some of the feature's text, as it stands in this program."""
        return text.replace("$", str(self.number)).replace("?", number)

    @property
    def owner(self) -> str:
        """The module that it stands in, as an expression."""
        return f"model.f{self.number}" if self.block else "model"


@dataclass(frozen=True)
class Program:
    """A program and what happens to it; equal for equal seeds.

    Attributes:
        seed: that it was made from.
        source: of the file.
        used: its features.
        parts: the modules that it is made of.
        buffers: likewise.
        random: of the calls.
    """

    seed: int
    source: str
    used: tuple[Used, ...]
    parts: dict[str, nn.Module]
    buffers: dict[str, Tensor]

    @property
    def file(self) -> str:
        """The name that errors show."""
        return f"/hostile/program_{self.seed}.py"

    def make(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model, and all that its file holds."""
        linecache.cache[self.file] = (len(self.source), None, self.source.splitlines(True), "")
        scope: dict[str, Any] = {**LIBRARIES, **shape_caches(), "__name__": f"program_{self.seed}"}
        exec(compile(self.source, self.file, "exec"), scope)
        parts, buffers = copy.deepcopy((self.parts, self.buffers))
        model = scope["Model"](parts, buffers)
        scope["model"] = model
        return model, scope


def make_program(seed: int, only: tuple[Feature, ...] = ()) -> Program:
    """The program of a number.

    Args:
        seed: the number.
        only: features to take up, each once; else some of all.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    pool = FEATURES if draw.random() < 0.15 else [f for f in FEATURES if not f.rare]
    chosen = only or draw.sample(pool, draw.choice((1, 2, 2, 3)))
    used = [
        Used(f, k, f.place == "block" or (f.place == "any" and draw.random() < 0.4))
        for k, f in enumerate(chosen)
    ]
    build = Builder()
    build.alias("x.to(self.m0.weight.dtype)", Value("", (WIDTH,), -1, True), writable=False)
    build.needs(*build.values)
    build.linear(build.values[0], 0, 1)
    steps: list[Any] = [*used, *draw.choices(INSTRUCTIONS, k=draw.randint(1, 4))]
    draw.shuffle(steps)
    for step in steps:
        if isinstance(step, Used):
            _take_up(build, step)
        else:
            getattr(build, step)(build.pick(draw.randint(0, 2)), draw.randint(0, 11),
                                 draw.randint(0, 11))  # fmt: skip
    last = build.values[-1]
    head = build.module(nn.Linear(last.shape[-1], 2))
    extra = [v.name for v in build.values[1:-1] if draw.random() < 0.2]
    result = ", ".join([f"self.{head}({last.name})", *extra])
    source = _file(build, used, f"return {result}")
    return Program(seed, source, tuple(used), build.modules, build.buffers)


def _take_up(build: Builder, used: Used) -> None:
    value = build.values[-1]
    build.needs(value)
    lines = used.text(used.feature.lines)
    if used.block:
        given = f", arg{used.number}" if used.feature.argument else ""
        result = f"self.f{used.number}({value.name}, x{given})"
    else:
        build.lines += [f"h = {value.name}", *lines.split("\n")]
        result = "h"
    build.needs(build.new(result, value.shape, True, contiguous=False))


def _file(build: Builder, used: list[Used], result: str) -> str:
    text = [u.text(u.feature.helpers) for u in used if u.feature.helpers]
    inits, bodies = [], []
    arguments = ["self", "x", *(f"arg{u.number}=None" for u in used if u.feature.argument)]
    for each in used:
        init, body = each.text(each.feature.init), each.text(each.feature.body)
        if each.block:
            inits.append(f"self.f{each.number} = Block{each.number}()")
            given = f", arg{each.number}" if each.feature.argument else ""
            lines = each.text(each.feature.lines) + "\nreturn h"
            text.append(_class(f"Block{each.number}", "", init, body, f"h, x{given}", lines))
        else:
            inits.append(init)
            bodies.append(body)
    known = (
        "for name, part in parts.items():\n    self.add_module(name, part)\n"
        "for name, part in buffers.items():\n    self.register_buffer(name, part)"
    )
    lines = "\n".join([*build.lines, result])
    given = ", ".join(arguments[1:])
    text.append(
        _class("Model", ", parts, buffers", "\n".join([known, *inits]), "\n".join(bodies), given,
               lines)
    )  # fmt: skip
    return "\n\n".join(text) + "\n"


def _class(name: str, more: str, init: str, body: str, given: str, lines: str) -> str:
    indent = functools.partial(textwrap.indent, prefix="    ")
    init = f"def __init__(self{more}):\n" + indent("super().__init__()\n" + init)
    forward = f"def forward(self, {given}):\n" + indent(lines)
    return f"class {name}(nn.Module):\n" + indent(
        "\n\n".join([init, *filter(None, [body]), forward])
    )


LAYOUTS = (
    "torch.randn(n, 4)",
    "torch.randn(n, 4)",
    "torch.randn(4, n).t()",
    "torch.randn(2 * n, 4)[::2]",
    "torch.randn(1, 4).expand(n, 4)",
    "torch.randn(n + 1, 4)[1:]",
    "torch.randn(n, 4).double()",
    "torch.randn(n, 4).bfloat16()",
    "torch.randint(-2, 3, (n, 4))",
    "torch.randn(n, 4).requires_grad_()",
)


@dataclass(frozen=True)
class Call:
    """One call, and what happens before it.

    Attributes:
        changes: statements.
        arguments: expressions, by name.
        kind: ``"step"`` of training, ``"backward"``, ``"call"`` or ``"no_grad"``.
        autocast: whether under autocast.
        seed: of the random numbers.
    """

    changes: tuple[str, ...]
    arguments: dict[str, str]
    kind: str
    autocast: bool
    seed: int

    def inputs(self, scope: dict[str, Any]) -> dict[str, Any]:
        """The arguments, made anew."""
        torch.manual_seed(self.seed)
        given: dict[str, Any] = {}
        for name, text in self.arguments.items():
            given[name] = eval(text, {**scope, **given})
        return given


def make_calls(program: Program, count: int) -> list[Call]:
    """Some calls of a program."""
    draw = random.Random(program.seed + 1_000_003)
    usual = draw.choice(LAYOUTS), draw.choice((2, 3, 4, 4, 5))
    return [_call(program, draw, usual, first=k == 0) for k in range(count)]


def _call(program: Program, draw: random.Random, usual: tuple[str, int], first: bool) -> Call:
    changes: list[str] = []
    for used in program.used:
        if used.feature.changes and not first and draw.random() < 0.8:
            change = used.text(draw.choice(used.feature.changes), draw.choice(NUMBERS))
            changes.append(f"m = {used.owner}\n{change}")
    if not first and draw.random() < 0.25:
        names = ["model", *(u.owner for u in program.used)]
        changes.append(f"{draw.choice(names)}.train({draw.random() < 0.5})")
    if not first and draw.random() < 0.05:
        changes.append("model.m0.weight.requires_grad_(not model.m0.weight.requires_grad)")
    if not first and draw.random() < 0.03:
        changes.append(draw.choice(("model.double()", "model.float()")))
    if not first and draw.random() < 0.05:
        changes.append("model.m0.weight = nn.Parameter(model.m0.weight.detach() * 2)")
    layout = draw.choice(LAYOUTS) if draw.random() < 0.25 else usual[0]
    n = draw.choice((2, 3, 4, 5)) if draw.random() < 0.35 else usual[1]
    arguments = {"x": f"(lambda n: {layout})({n})"}
    for used in program.used:
        if used.feature.argument:
            text = used.text(used.feature.argument, draw.choice(NUMBERS))
            arguments[f"arg{used.number}"] = f"(lambda n: {text})({n})"
    kind = draw.choice(("step", "step", "step", "backward", "call", "no_grad"))
    cast = draw.random() < 0.1
    return Call(tuple(changes), arguments, kind, cast, draw.randint(0, 1 << 30))

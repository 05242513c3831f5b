"""Random models for hypothesis: a program of a few raw instructions becomes a module with a
readable ``forward``.

An instruction is a name and three small integers, which pick operands among the values that fit, so
that nearly every program is valid. The builder keeps track of what autograd would refuse (writing
to memory that a backward needs, to one of several views made at once, ...) and turns such a write
into its out-of-place form. It knows aliases in eval mode too, where dropout returns its own input.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from .programs import INSTRUCTIONS, WIDTH, Builder, Program, Value


def shape_caches() -> dict[str, Any]:
    """Functions that keep what they compute from shapes, in caches that nothing is in yet."""
    factors: dict[int, int] = {}

    @functools.lru_cache
    def flat(shape: torch.Size) -> tuple[int, int]:
        return shape[0], math.prod(shape[1:])

    def factor(width: int) -> int:
        return factors.setdefault(width, width + 1)

    return {"flat": flat, "factor": factor}


class RandomModel(nn.Module):
    """The module that a program describes; ``code`` is its ``forward``."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        build = Builder()
        names = [f"x{number}" for number in range(program.inputs)]
        for name in names:
            build.alias(name, Value(name, (WIDTH,), -1, True), writable=False)
        build.needs(*build.values)
        build.linear(build.values[0], 0, 1)
        for instruction, first, i, j in program.steps:
            getattr(build, instruction)(build.pick(first), i, j)
        last = build.values[-1]
        head = build.module(nn.Linear(last.shape[-1], 2))
        text = "\n".join(build.lines) + last.name
        loose = [v for v in build.values if v.grad and len(re.findall(rf"\b{v.name}\b", text)) == 1]
        chosen = [
            (loose[number % len(loose)] if loose else build.pick(number)).name
            for number in program.outputs
        ]
        result = f"self.{head}({last.name})"
        if chosen and program.structure == "dict":
            extra = ", ".join(f"'e{number}': {name}" for number, name in enumerate(chosen))
            result = f"{{'out': {result}, {extra}}}"
        elif chosen:
            result = f"{result}, " + ", ".join(chosen)
        lines = [f"def forward(self, {', '.join(names)}):", *build.lines, f"return {result}"]
        self.code = "\n    ".join(lines)
        for name, module in build.modules.items():
            self.add_module(name, module)
        for name, buffer in build.buffers.items():
            self.register_buffer(name, buffer)
        scope: dict[str, Any] = {}
        exec(self.code, {"torch": torch, "F": F, **shape_caches()}, scope)
        self.run = scope["forward"]

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


_small = st.integers(0, 11)


_step = st.tuples(st.sampled_from(INSTRUCTIONS), _small, _small, _small)


programs: st.SearchStrategy[Program] = st.builds(
    Program,
    inputs=st.integers(1, 2),
    steps=st.lists(_step, min_size=4, max_size=10).map(tuple),
    outputs=st.lists(_small, min_size=1, max_size=4).map(tuple),
    structure=st.sampled_from(("tuple", "dict")),
    cuts=st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple),
)

"""Models with caches keyed by shapes, as other people write them, each traced in a process in which
nobody has called it: ``python -m tests.compiler.shape_caches`` prints what became of each as JSON.

``--hashable`` is the negative control: traced integers hash, and become ints and strings, as their
values do, and caches are not put back.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import einops
import einops.layers.torch as layers
import torch
from torch import Tensor, nn

import dni_fx
from dni_fx.passes.trace.reach import Reach
from dni_fx.passes.trace.symbols import TracedInt

WIDTH, ROWS = 8, 4


class Between(nn.Module):
    """Two linear layers with a look at the shape between them."""

    def __init__(self, look: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.look(self.a(x)).relu())


class Inner(nn.Module):
    """The same in a submodule, where what cannot be recorded would become one opaque node."""

    def __init__(self, look: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.inner = nn.Linear(WIDTH, WIDTH), Between(look)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.a(x).tanh())


class Heads(nn.Module):
    """A head by the number of columns, under a string, as ``nn.ModuleDict`` wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.heads = nn.ModuleDict({str(n): nn.Linear(WIDTH, 3) for n in (2, 3)})

    def forward(self, x: Tensor) -> Tensor:
        head = self.heads[f"{x.shape[1]}"]
        return head(self.a(x).relu())


class Patches(nn.Module):
    """Layers and functions of einops."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = layers.Rearrange("b (n p) -> b n p", p=2)
        self.a, self.b = nn.Linear(2, 6), nn.Linear(6, 3)
        self.start = nn.Parameter(torch.randn(6))
        self.pool = layers.Reduce("b n d -> b d", "mean")

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(self.cut(x))
        start = einops.repeat(self.start, "d -> b 1 d", b=len(x))
        h = torch.cat([start, h], 1)
        h = einops.rearrange(h, "b n (h d) -> b h n d", h=3).relu()
        return self.b(self.pool(einops.rearrange(h, "b h n d -> b n (h d)")))


Made = tuple[Any, nn.Module]  # a cache, and the model that uses it


def by_tuple() -> Made:
    @functools.lru_cache
    def halves(shape: tuple[int, int]) -> tuple[int, int, int]:
        return shape[0], shape[1] // 2, 2

    return halves, Between(lambda h: h.reshape(halves(tuple(h.shape))).flatten(1))


def by_shape_in_a_submodule() -> Made:
    cache: dict[Any, Any] = {}

    def look(h: Tensor) -> Tensor:
        if h.shape not in cache:
            cache[h.shape] = (h.shape[0], h.shape[1] // 2, 2)
        return h.view(cache[h.shape]).flatten(1)

    return cache, Inner(look)


def by_width() -> Made:
    cache: dict[int, Any] = {}

    def look(h: Tensor) -> Tensor:
        n = h.shape[-1]
        return h.view(-1, cache.setdefault(n, n // 2), 2).flatten(1)

    return cache, Between(look)


def by_text() -> Made:
    cache: dict[str, Any] = {}

    def look(h: Tensor) -> Tensor:
        n, k = h.shape
        key = f"{n}x{k}"
        if key not in cache:
            cache[key] = [n, k // 2, 2]
        return h.view(cache[key]).flatten(1)

    return cache, Between(look)


def by_number() -> Made:
    cache: dict[int, Any] = {}

    def look(h: Tensor) -> Tensor:
        n = h.size(0)
        if int(n) not in cache:
            cache[int(n)] = n, n * 2
        return h.repeat(2, 1).view(cache[int(n)][1], -1)[:n]

    return cache, Between(look)


def by_count() -> Made:
    cache: dict[str, Any] = {}

    def look(h: Tensor) -> Tensor:
        n = h.numel()
        cache.setdefault(str(n), {"whole": n, "half": n // 2})
        return h.view(cache[str(n)]["whole"]).view(-1, WIDTH)

    return cache, Between(look)


def seen_before() -> Made:
    seen: set[Any] = set()

    def look(h: Tensor) -> Tensor:
        seen.add(h.shape[0])
        seen.add((h.shape[1], "columns"))
        return h * len(seen)

    return seen, Between(look)


def wrapped_in_another_error() -> Made:
    cache = {(ROWS, WIDTH): 2.0, (6, WIDTH): 3.0}

    def look(h: Tensor) -> Tensor:
        try:
            return h * cache[h.shape]
        except Exception as error:
            raise RuntimeError("no factor for this shape") from error

    return cache, Between(look)


def by_draw() -> Made:
    @functools.lru_cache
    def fewer(shape: tuple[int, int]) -> int:
        return shape[0] - 1

    def look(h: Tensor) -> Tensor:
        return h[torch.randn(len(h)).topk(fewer(tuple(h.shape))).indices]

    return fewer, Between(look)


def knows_symbols() -> Made:
    def sizes(n: int) -> tuple[int, int]:
        return n, n * 2

    cached = functools.lru_cache(sizes)

    def look(h: Tensor) -> Tensor:
        try:
            n, twice = cached(h.shape[0])
        except TypeError:
            n, twice = sizes(h.shape[0])
        return h.repeat(2, 1).view(twice, -1)[:n]

    return cached, Between(look)


def by_name_of_module() -> Made:
    return {}, Heads()


def with_einops() -> Made:
    return einops.einops._reconstruct_from_shape, Patches()


CASES = (
    by_tuple, by_shape_in_a_submodule, by_width, by_text, by_number, by_count, seen_before, by_draw,
    wrapped_in_another_error, knows_symbols, by_name_of_module, with_einops,
)  # fmt: skip


def inside(cache: Any) -> set[str]:
    """Types of what a cache holds, keys and values, down to what is no container."""
    found: list[Any] = []
    containers: list[Any] = [cache]
    while containers:
        for item in gc.get_referents(containers.pop()):
            is_container = isinstance(item, dict | list | tuple | set)
            (containers if is_container else found).append(item)
    return {type(v).__name__ for v in found if not callable(v) and v is not None} - {"str"}


def become_of(make: Callable[[], Made]) -> dict[str, Any]:
    """Trace a model that nobody has called, look at its cache, then call it as its user would."""
    torch.manual_seed(0)
    cache, model = make()
    torch.manual_seed(0)
    _, twin = make()  # the same model with a cache of its own, never traced
    rows = (2,) if make is by_name_of_module else ()
    x = torch.randn(ROWS, *rows, WIDTH)
    decoupled: dni_fx.Decoupled | None = None
    row: dict[str, Any] = {}
    try:
        decoupled = dni_fx.decouple(model, ["a"], example_inputs=(x,), gradients="exact")
    except dni_fx.DecouplingError as error:
        row["refused"] = str(error)
    row["kinds"] = sorted(inside(cache))
    if decoupled is not None and decoupled.plan.report is not None:
        row |= {"rung": decoupled.plan.report.rung, "notes": decoupled.plan.report.notes}
    others = [torch.randn(6, *rows, WIDTH)] + ([torch.randn(ROWS, 3, WIDTH)] if rows else [])
    for y in (x, *others):
        calls: dict[str, Any] = {"model": model, "stages": decoupled}
        for name, call in calls.items():
            row.setdefault(name, []).append(call is None or called(call, y) == called(twin, y))
    row["kinds after"] = sorted(inside(cache))
    return row


def called(model: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    """The output under one seed, as numbers, or why there is none."""
    torch.manual_seed(1)
    try:
        return model(x).tolist()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--hashable" in sys.argv:
        TracedInt.__hash__ = lambda self: hash(self.look())  # type: ignore[method-assign]
        TracedInt.__int__ = TracedInt.look  # type: ignore[method-assign, assignment]
        # and nobody takes out of caches what a trace has put there
        Reach.send_stand_ins = lambda _: None  # type: ignore[method-assign]
        Reach.restore = lambda _: []  # type: ignore[method-assign]
    print(json.dumps({case.__name__: become_of(case) for case in CASES}))

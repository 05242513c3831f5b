"""Held-out batches, judged while few stages are in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..decoupled import Decoupled
from ..graphs.nested import map_tensors
from ..passes.cut.splitting import OUTPUT, Split
from ..residency.absent import AbsentError
from .evaluating import Means


class Tour:
    """Takes batches through the stages one after the other, several at each stage.

    Args:
        decoupled: the model, in the mode to judge it in.
        means: of the metrics.
        sweep: batches that go together.
        in_memory: a region in which a stage is in memory.
        gather: brings everything there, for a trace.
    """

    def __init__(
        self,
        decoupled: Decoupled,
        means: Means,
        sweep: int,
        in_memory: Callable[[int], AbstractContextManager[None]],
        gather: Callable[[], None],
    ) -> None:
        self._decoupled, self._means, self._sweep = decoupled, means, sweep
        self._in_memory, self._gather = in_memory, gather
        self._waiting: list[tuple[Split, dict[str, Any], Any]] = []
        self._written: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> None:
        """One batch, which waits until there are enough.

        Raises:
            PlanMismatchError: stages for this kind of call cannot be cut by the plan.
        """
        if self._sweep > 1:  # the caller may write into its tensors meanwhile
            args, kwargs, target = map_tensors(torch.clone, (args, kwargs, target))
        try:
            known = self._decoupled.has_graph_for(*args, **kwargs)
        except AbsentError:  # a guard is asked for the first time about such a batch
            known = False
        if not known:
            self._gather()
        values = self._decoupled.bind(*args, **kwargs)
        self._waiting.append((self._decoupled.graphs.variant.split, values, target))
        if len(self._waiting) >= self._sweep:
            self.flush()

    def flush(self) -> None:
        """Judge the batches that wait."""
        batches, self._waiting = self._waiting, []
        for index in range(max((len(split.stages) for split, _, _ in batches), default=0)):
            there = [pair[:2] for pair in batches if index < len(pair[0].stages)]
            with self._in_memory(index):
                self._run(index, there)
        for _, values, target in batches:
            self._means.add(values.pop(OUTPUT), target)

    def _run(self, index: int, batches: list[tuple[Split, dict[str, Any]]]) -> None:
        buffers = {b for split, _ in batches for b in split.stages[index].module.buffers()}
        before = [(b, b.clone()) for b in buffers]
        for split, values in batches:
            stage = split.stages[index]
            results = stage.module(*(values[n] for n in stage.inputs))
            whole = stage.outputs == (OUTPUT,)
            values.update(zip(stage.outputs, (results,) if whole else results, strict=True))
            later = {OUTPUT, *(n for s in split.stages[index + 1 :] for n in s.inputs)}
            for name in values.keys() - later:
                del values[name]
        written = [(b, content) for b, content in before if not torch.equal(b, content)]
        known = self._written.setdefault(index, [])
        known += [pair for pair in written if all(pair[0] is not b for b, _ in known)]

    def put_back(self) -> None:
        """Give buffers that were written to what they held before."""
        for index, pairs in self._written.items():
            if pairs:
                with self._in_memory(index):
                    for buffer, content in pairs:
                        buffer.copy_(content)

"""How stages are visited so that their tensors keep within a number of bytes."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..graphs.nested import flatten
from ..graphs.weighing import weighed_plan
from ..reports.sizes import parse_size, show_size
from ..residency.store import Store
from ..runtime.optimizing import StageOptimizers
from ..simulation.forecast import forecast
from ..simulation.ways import Forecast, choose
from .visits import Visiting

_PROBE, _LONGEST = 1 << 24, 0.5  # bytes that are moved at once; seconds


def read_cap(value: int | float | str | None) -> float | None:
    """A number of bytes, from one or from words such as ``"2GB"``.

    Raises:
        DecouplingError: it is none.
    """
    try:
        found = parse_size(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DecouplingError(f"memory_cap={error}") from error
    if found is not None and (isinstance(found, bool) or not found > 0):
        raise DecouplingError(f"memory_cap={value!r}: expected bytes, or words such as '2GB'")
    return found


class MemoryCap:
    """Chooses once how stages are visited.

    Args:
        limit: bytes.
        wish: what the user wants of it: ``resident`` and ``sweep`` that are given stay.

    Attributes:
        forecast: what was chosen and what it is expected to take; None before.
    """

    def __init__(self, limit: float, wish: Visiting) -> None:
        self.limit, self.wish = limit, wish
        self.forecast: Forecast | None = None
        self._inputs = 0

    def choose(self, decoupled: Decoupled, optimizers: StageOptimizers) -> Visiting:
        """What keeps to the limit, for batches like the newest that was traced.

        Raises:
            DecouplingError: nothing does; the error says what would.
        """
        plan = weighed_plan(decoupled.graphs)
        moments = max(map(moments_of, optimizers.stages.values()), default=0.0)
        store = self.wish.make_store()
        on_host = all(p.device.type == "cpu" for p in decoupled.parameters())
        resident, sweep = self.wish.most, self.wish.sweep
        if on_host and self.wish.store == "host":
            resident = len(plan.stages)  # the store would be the same memory
        else:
            self._check_there(decoupled)
        pairs = [(resident or 1, sweep), (resident or 2, sweep)]
        found = forecast(
            plan,
            memory_cap=self.limit,
            moments=moments,
            store_bandwidth=measure_store(store),
            visits=pairs,
        )
        try:
            self.forecast = choose(found, resident, sweep)
        except DecouplingError as error:
            hint = "; with store=, a folder, stages could leave memory" * (
                resident != self.wish.most
            )
            raise DecouplingError(f"{error}{hint}") from error
        chosen, report = self.forecast.chosen, plan.report
        assert chosen is not None
        assert report is not None
        self._inputs = report.input_bytes
        return dataclasses.replace(self.wish, most=chosen.resident, sweep=chosen.sweep)

    def check(self, call: Any) -> None:
        """Whether a batch is no larger than what was reckoned with.

        Raises:
            DecouplingError: it is.
        """
        taken = sum(leaf.nbytes for leaf in flatten(call)[0])
        if self.forecast is not None and taken > self._inputs:
            raise DecouplingError(
                f"memory_cap= was reckoned for inputs of {show_size(self._inputs)}, but those of "
                f"this batch are {show_size(taken)}: pass the largest batch as example_inputs= to "
                "decouple"
            )

    def _check_there(self, decoupled: Decoupled) -> None:
        """Refuse weights that take more before anything has left memory."""
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in decoupled.parameters()}
        there = sum(s.nbytes() for s in kept.values() if s.resizable())
        if there > self.limit:
            raise DecouplingError(
                f"memory_cap= of {show_size(self.limit)} cannot be kept: the weights alone, which "
                f"are in memory now, are {show_size(there)}; make the model on 'meta' and fill it "
                "from mapped files (load_state_dict(torch.load(path, mmap=True), assign=True))"
            )


def moments_of(optimizer: torch.optim.Optimizer) -> float:
    """Numbers that an optimiser keeps for each parameter, seen on a step of a small one.

    The optimiser and its hooks are left alone. Where it cannot step such a one, 2, as Adam keeps.
    """
    parameter = nn.Parameter(torch.zeros(8, 8))
    parameter.grad = torch.ones(8, 8)
    probe: Any = copy.copy(optimizer)
    probe.state = defaultdict(dict)
    probe.param_groups = [{**optimizer.param_groups[0], "params": [parameter]}]
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(probe, name, OrderedDict())
    try:
        type(optimizer).step(probe)
    except Exception:
        return 2.0
    kept = [v for v in probe.state[parameter].values() if isinstance(v, Tensor) and v.dim()]
    return sum(v.numel() for v in kept) / parameter.numel()


def measure_store(store: Store) -> float:
    """Bytes a second that a store writes and reads, told by half a second at most."""
    storage, moved, index = torch.zeros(_PROBE, dtype=torch.uint8).untyped_storage(), 0, 0
    start = time.perf_counter()
    while not moved or (time.perf_counter() - start < _LONGEST and index < 8):
        store.write(index, [storage])
        store.read(index, [storage])
        moved, index = moved + 2 * _PROBE, index + 1
    seconds = time.perf_counter() - start
    store.clear()
    return moved / max(seconds, 1e-9)

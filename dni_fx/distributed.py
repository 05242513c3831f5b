"""Stages on several processes: the public name of :mod:`dni_fx.parallel`, and how a script starts:
joining the processes of torchrun, and one plan for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from . import compiler
from .decoupled import Decoupled
from .errors import DecouplingError
from .parallel.mailbox import ParallelError as ParallelError
from .parallel.meeting import meet
from .parallel.monitoring import Status as Status
from .parallel.sharing import Peers
from .parallel.trainer import Trainer as Trainer
from .plan import CutPlan

__all__ = ["ParallelError", "Status", "Trainer", "decouple", "start"]


def start(timeout: float = 300.0) -> int:
    """Join the processes that torchrun has started; without torchrun do nothing.

    As ``init_process_group("gloo")``, but fit for restarts: torchrun's store outlives a failure,
    and a process might look for the others where they were before it.

    Args:
        timeout: seconds to wait for the others, here and in collective operations.

    Returns:
        The rank; 0 in a process of its own.

    Raises:
        ParallelError: a process did not come in time; which.
    """
    if "RANK" not in os.environ:
        return 0
    store, rank, world = next(rendezvous("env://"))
    store = PrefixStore(meet(store, rank, world, timeout), store)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    return int(rank)


def decouple(
    model: nn.Module, cuts: str | list[str] | CutPlan = "auto", *, group: Any = None, **options: Any
) -> Decoupled:
    """:func:`dni_fx.decouple` with one plan for all processes: that of rank 0, whose costs were
    measured there.

    Args:
        model: the same in every process.
        cuts, options: as for :func:`dni_fx.decouple`.
        group: the process group; the default one.

    Raises:
        DecouplingError: as :func:`dni_fx.decouple` does; without example inputs ``cuts`` must be
            names or a plan.
    """
    if not dist.is_initialized() or not isinstance(cuts, str):
        return compiler.decouple(model, cuts, **options)
    if options.get("example_inputs") is None and options.get("example_kwargs") is None:
        raise DecouplingError(
            "a plan for several processes is made before the first step: pass example_inputs="
        )
    peers, made, plan = Peers(group), None, None
    if peers.rank == 0:
        made, error = _attempt(lambda: compiler.decouple(model, cuts, **options))
        plan = error or (made and made.plan.to_json())
    plan = peers.gather(plan, "decouple()")[0]
    if isinstance(plan, DecouplingError):
        raise plan
    options.pop("stages", None)
    error = None
    if made is None:
        made, error = _attempt(lambda: compiler.decouple(model, CutPlan.from_json(plan), **options))
    every = peers.gather(error, "decouple()")
    for rank, found in enumerate(every):
        if found is not None:
            raise ParallelError(f"rank {rank} cannot cut its model as rank 0 does: {found}")
    assert made is not None
    return made


def _attempt(make: Callable[[], Decoupled]) -> tuple[Decoupled | None, DecouplingError | None]:
    """What is made, or why it cannot be, which the others are to hear."""
    try:
        return make(), None
    except DecouplingError as error:
        return None, error

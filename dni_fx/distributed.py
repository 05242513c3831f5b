"""Stages on several processes: the public name of :mod:`dni_fx.parallel`, and how a script starts:
joining the processes of torchrun, and one plan for all of them.
"""

from __future__ import annotations

import os
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
from .parallel.monitoring import Status as Status
from .parallel.trainer import Trainer as Trainer
from .plan import CutPlan

__all__ = ["ParallelError", "Status", "Trainer", "decouple", "start"]


def start(timeout: float = 300.0) -> int:
    """Join the processes that torchrun has started; without torchrun do nothing.

    As ``init_process_group("gloo")``, but fit for restarts: with ``--max-restarts`` the store
    outlives a failure, and a process might look for the others where they were before it.

    Args:
        timeout: seconds to wait for the others, here and in collective operations.

    Returns:
        The rank; 0 in a process of its own.
    """
    if "RANK" not in os.environ:
        return 0
    store, rank, world = next(rendezvous("env://"))
    store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
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
    told: list[Any] = [None]
    first = None
    if dist.get_rank(group) == 0:
        try:
            first = compiler.decouple(model, cuts, **options)
            told = [first.plan.to_json()]
        except DecouplingError as error:
            told = [error]
    dist.broadcast_object_list(told, group=group, group_src=0)
    if isinstance(told[0], DecouplingError):
        raise told[0]
    options.pop("stages", None)
    return first or compiler.decouple(model, CutPlan.from_json(told[0]), **options)

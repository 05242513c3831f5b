"""All tasks, trained by the ranks of a torchrun; the first one writes what became of them.

python -m torch.distributed.run --nproc-per-node 2 -m tests.matrix.tasks_on_ranks FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dni_fx import distributed
from dni_fx.errors import DecouplingError

from ..helpers.executors import EXECUTORS, TASKS, Task
from ..helpers.training import trainer_of


def trained(task: Task) -> Any:
    """The weights of the whole model; or the text of a refusal."""
    try:
        with trainer_of(
            task.gradients,
            task.case,
            inputs=task.inputs,
            optimizer=task.optimizer,
            kind=distributed.Trainer,
            staleness=0,
            timeout=15.0,
        ) as trainer:
            for x, y in task.batches():
                trainer.step(x, target=y)
            trainer.drain()
            return {name: tensor.clone() for name, tensor in trainer.gather().items()}
    except DecouplingError as error:
        return str(error)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    executor = next(e for e in EXECUTORS if e.name == f"ranks-{dist.get_world_size()}")
    found = {str(task): trained(task) for task in TASKS if executor.takes(task)}
    if dist.get_rank() == 0:
        torch.save(found, folder / "records.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Stages on several processes of ``torch.distributed``: the public name of :mod:`dni_fx.parallel`.
"""

from .parallel.mailbox import ParallelError as ParallelError
from .parallel.trainer import Status as Status
from .parallel.trainer import Trainer as Trainer
from .parallel.trainer import decouple as decouple
from .parallel.trainer import start as start

__all__ = ["ParallelError", "Status", "Trainer", "decouple", "start"]

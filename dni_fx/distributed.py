"""Stages on several processes: the public name of :mod:`dni_fx.parallel`."""

from .parallel.mailbox import ParallelError as ParallelError
from .parallel.monitoring import Status as Status
from .parallel.start import decouple as decouple
from .parallel.start import start as start
from .parallel.trainer import Trainer as Trainer

__all__ = ["ParallelError", "Status", "Trainer", "decouple", "start"]

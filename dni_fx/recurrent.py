"""Training through time: the public name of :mod:`dni_fx.through_time`."""

from .through_time.making import decouple_through_time as decouple_through_time
from .through_time.trainer import ThroughTime as ThroughTime
from .through_time.trainer import WindowReport as WindowReport

__all__ = ["ThroughTime", "WindowReport", "decouple_through_time"]

"""dni_fx: Decoupled Neural Interfaces for any PyTorch model, as a graph transform."""

from .compiler import decouple as decouple
from .compiler import list_cut_points as list_cut_points
from .compiler import plan_cuts as plan_cuts
from .decoupled import Decoupled as Decoupled
from .errors import DecouplingError as DecouplingError
from .plan import CutPlan as CutPlan
from .simulation import simulate as simulate
from .sources import GradientSource as GradientSource
from .sources import one_hot as one_hot
from .trainer import Trainer as Trainer

__all__ = [
    "CutPlan",
    "Decoupled",
    "DecouplingError",
    "GradientSource",
    "Trainer",
    "decouple",
    "list_cut_points",
    "one_hot",
    "plan_cuts",
    "simulate",
]
__version__ = "0.1.0"

"""What a step reports, and how predictions compare with gradients, in numbers and words."""

from .steps import InterfaceReport as InterfaceReport
from .steps import StepReport as StepReport
from .steps import compare as compare

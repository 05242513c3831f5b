"""Where a stage's outgoing gradients come from: synthesizers and controls, by name or factory."""

from __future__ import annotations

from .asks import Asks, Wait
from .auto import Auto, auto_forms, auto_name
from .base import GradientSource, Prediction, SourceFactory
from .checking import try_predict
from .context import Exampled, OneHot, align_context, check_features, one_hot
from .controls import Exact, Stale, Zero
from .convolutional import Conv
from .each import Each, for_consumers, is_each
from .heads import Critic, Distill, Local, LossHead, Sobolev
from .inputs import INPUTS, InputFactory, InputSource, make_input
from .late import Corrected, Delayed, Feedback, Mix, mix
from .making import EXACT, SOURCES, Joint, Served, is_joint, make_source, serve
from .naming import EACH, JOINT, base_name, with_options
from .rates import default_optimizer
from .reconstruct import Reconstruct
from .regression import MLP, Linear, Network, Regression
from .sums import Sum
from .through_time import AcrossTime, Traces, side_by_side
from .tied import Tied

__all__ = [
    "EACH",
    "EXACT",
    "INPUTS",
    "JOINT",
    "MLP",
    "SOURCES",
    "AcrossTime",
    "Asks",
    "Auto",
    "Conv",
    "Corrected",
    "Critic",
    "Delayed",
    "Distill",
    "Each",
    "Exact",
    "Exampled",
    "Feedback",
    "GradientSource",
    "InputFactory",
    "InputSource",
    "Joint",
    "Linear",
    "Local",
    "LossHead",
    "Mix",
    "Network",
    "OneHot",
    "Prediction",
    "Reconstruct",
    "Regression",
    "Served",
    "Sobolev",
    "SourceFactory",
    "Stale",
    "Sum",
    "Tied",
    "Traces",
    "Wait",
    "Zero",
    "align_context",
    "auto_forms",
    "auto_name",
    "base_name",
    "check_features",
    "default_optimizer",
    "for_consumers",
    "is_each",
    "is_joint",
    "make_input",
    "make_source",
    "mix",
    "one_hot",
    "serve",
    "side_by_side",
    "try_predict",
    "with_options",
]

SOURCES.update(
    auto=Auto,
    linear=Linear,
    mlp=MLP,
    conv=Conv,
    local=Local,
    critic=Critic,
    sobolev=Sobolev,
    distill=Distill,
    reconstruct=Reconstruct,
    delayed=Delayed,
    corrected=Corrected,
    mix=Mix,
    feedback=Feedback,
    zero=Zero,
    stale=Stale,
    exact=Exact,
)

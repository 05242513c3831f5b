"""What the stages of a traced model cost, for the newest kind of batch."""

from __future__ import annotations

import torch

from ..passes.cut.cutting import find_flow
from ..passes.cut.specs import infer_specs
from ..passes.search.choosing import Search, weigh_model
from ..plan import CutPlan
from .describing import weighed
from .graphs import Graphs


def weighed_plan(graphs: Graphs) -> CutPlan:
    """The plan with what its stages cost by operations and bytes; nothing is run.

    Raises:
        DecouplingError: the model is not traced yet.
    """
    variant, recipe = graphs.variant, graphs.recipe
    flow, specs = find_flow(variant.trace), infer_specs(variant.trace)
    inputs = [specs[name] for name in variant.split.model_inputs]
    example = tuple(torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in inputs)
    search = Search(stages=len(variant.split.stages))
    costs = weigh_model(flow, example, {}, recipe.gradients, recipe.context, search)
    return weighed(graphs.plan, variant, costs)

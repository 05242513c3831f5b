"""What a model is cut by, and from it and a call to stages with training functions: the passes, in
order.

==========  =====================================================  =========================
trace       the calls of the model, or ``torch.export``'s           passes/trace/tracing
open        the state of a window leaves its graph                  passes/trace/ports
find_flow   what crosses every position of the program              passes/cut/cutting
choose      cuts that were named, planned or searched for           passes/search/choosing
split       one graph module for each stage                         passes/cut/splitting
check       do the stages compute what the model computes?          passes/cut/checking
size        what "auto" stands for there, by its stage's cost       passes/search/sizing
insert      a source of gradients at every interface                passes/cut/insertion
describe    the plan                                                graphs/describing
emit        the training functions of every stage                   passes/cut/emission
==========  =====================================================  =========================
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import BakedInError, CutError, PlanMismatchError, TracingError
from ..passes.cut.checking import Yardstick, call_stages, check_stages
from ..passes.cut.cutting import Flow, find_flow
from ..passes.cut.insertion import (
    Context,
    Gradients,
    Inputs,
    Inserted,
    Leaving,
    infer_context,
    insert_sources,
    resolve_gradients,
)
from ..passes.cut.specs import infer_specs
from ..passes.cut.splitting import split_stages
from ..passes.search.choosing import Search, choose_best, follow, weigh_model
from ..passes.search.costing import estimate_costs
from ..passes.search.searching import Choice
from ..passes.search.sizing import AUTO, Enough, Sized, remarks, size_sources, stage_times
from ..passes.search.source_costs import estimate_sources, measure_sources
from ..passes.trace.exporting import trace_export
from ..passes.trace.held import GRAD_MODE
from ..passes.trace.naming import check_inputs, where_is
from ..passes.trace.traces import Trace
from ..passes.trace.tracing import trace_calls
from ..plan import CutPlan, TensorSpec
from ..sources import auto_forms, auto_name
from .blame import find_culprits
from .describing import describe_plan
from .nested import flatten
from .variants import Variant

_RUNG = ("trace_calls", "trace_export")


class Opening(Leaving, Protocol):
    """A model seen as a function with further inputs and outputs, such as one over a window.

    Attributes:
        module: what is called, traced and checked in the model's place.
    """

    @property
    def module(self) -> nn.Module: ...

    def open(self, trace: Trace) -> Trace:
        """The trace of the model itself, whose further values come in and leave by themselves."""


@dataclass(frozen=True)
class Recipe:
    """What was asked for; the arguments of :func:`dni_fx.decouple`, checked.

    Attributes:
        cuts: names to cut after, a plan to follow, or a search.
        gradients: gradient sources, by one name or factory or by interface.
        inputs: synthetic inputs likewise; None for none.
        context: turns a training target into what the sources see.
        check: whether every graph is compared with the model.
        weigh: how cuts that were not searched for are weighed; None where nobody asks.
        opening: how the graph is opened; None for a model as it is.
    """

    cuts: tuple[str, ...] | CutPlan | Search
    gradients: Gradients = "auto"
    inputs: Inputs | None = None
    context: Context | None = None
    check: bool = True
    weigh: Search | None = None
    opening: Opening | None = None

    @property
    def wanted(self) -> int | None:
        """How many stages a search was asked for; None where cuts were named."""
        return self.cuts.count if isinstance(self.cuts, Search) else None


def build_variant(
    recipe: Recipe, model: nn.Module, args: Any, kwargs: Any, plan: CutPlan | None = None
) -> Variant:
    """Trace a model for one kind of call, cut it, and compare the stages with it.

    The tracers are tried one after the other, until the split model equals the model. Where it was
    cut by a ``plan`` before, a graph of another kind of call may lack a cut, say one inside ``if
    self.training``: it then has fewer stages, which do to evaluate with.

    Raises:
        TracingError: no tracer gave a graph that equals the model.
        CutError: unknown or illegal cuts; a model without trainable parameters.
        PlanMismatchError: the recipe's plan was made for another graph.
        DecouplingError: the model itself fails.
    """
    called = model if recipe.opening is None else recipe.opening.module
    check_inputs(called, args, kwargs)
    yardstick = Yardstick(called, args, kwargs, lenient=plan is not None)
    refusals: list[str] = []
    digests: list[str] = []  # of graphs that the recipe's plan was not made for
    rungs: list[dict[str, str] | None] = [{}, None]  # modules to keep as one node; None: export
    for opaque in rungs:
        try:
            trace = _trace(recipe, yardstick, opaque)
        except TracingError as error:
            refusals.append(f"{_RUNG[opaque is None]}: {error}")
            yardstick.seen = str(error)
            _ = yardstick.first  # raises where the model itself fails
            if isinstance(error, BakedInError):  # export would bake it in without a word
                break
            continue
        if plan is None and _is_other_graph(recipe.cuts, trace, bool(opaque)):
            digests.append(trace.digest)
            if opaque == {} and recipe.check:  # the plan's may have modules that are one node
                found = _blame(recipe, yardstick, trace)
                rungs[1:1] = [found] if isinstance(found, dict) else []
            continue
        flow = find_flow(trace)
        choice = _choose(recipe, flow, args, kwargs, plan)
        split = split_stages(flow, choice.stage_of, choice.cuts)
        variant = Variant(trace, choice, split, flatten((args, kwargs))[0])
        if not recipe.check:
            return variant
        composed = functools.partial(call_stages, trace, split)
        result = check_stages(yardstick, composed)
        if result.mismatch is None:
            variant.exact, trace.changes = result.exact, result.changes
            trace.notes += (yardstick.note,) if yardstick.note else ()
            return variant
        refusal = f"{_RUNG[opaque is None]}: the traced model is not the model: {result.mismatch}"
        if opaque == {}:
            found = _blame(recipe, yardstick, trace)
            if isinstance(found, str):
                refusal += f"; {found}"
            else:
                rungs.insert(1, found)
        refusals.append(refusal)
    if isinstance(recipe.cuts, CutPlan) and digests and not refusals:
        planned = recipe.cuts
        raise PlanMismatchError(
            f"the plan was made for a {planned.model} with graph {planned.digest}, but this "
            f"{type(called).__name__} has graph {digests[0]}; make a new plan with "
            "dni_fx.plan_cuts, or pass its cuts: cuts=list(plan.cuts)"
        )
    reasons = "\n".join(f"  - {r}" for r in refusals)
    raise TracingError(
        f"{type(called).__name__} cannot be traced faithfully:\n{reasons}\n"
        "Move the code that is named into a submodule of its own (it then stays one opaque node), "
        "or pass that part of the model to decouple"
    )


def _trace(recipe: Recipe, yardstick: Yardstick, opaque: dict[str, str] | None) -> Trace:
    """The graph that one rung gives, opened where its state is to leave it; what it is compared
    with is measured with gradients where it was recorded with them.
    """
    tracer = trace_export if opaque is None else trace_calls
    if opaque:
        tracer = functools.partial(trace_calls, opaque=opaque)
    call = yardstick.model, yardstick.args, yardstick.kwargs
    trace, grad = tracer(*call), True
    if any(h.place == GRAD_MODE for h in trace.held) and not torch.is_grad_enabled():
        trace, grad = tracer(*call, grad=False), False
    yardstick.ask(grad)
    return trace if recipe.opening is None else recipe.opening.open(trace)


def _blame(recipe: Recipe, yardstick: Yardstick, trace: Trace) -> dict[str, str] | str:
    """Why a graph is not its model: modules to keep as one node each, or a reason why none help."""
    model, mismatch = yardstick.model, ""

    def is_right(opaque: frozenset[str]) -> bool:
        nonlocal mismatch
        try:
            trial = _trace(recipe, yardstick, dict.fromkeys(opaque, ""))
        except TracingError:
            return False
        flow = find_flow(trial)
        whole = split_stages(flow, {n: 0 for n in flow.nodes if flow.is_computed(n)})
        run = functools.partial(call_stages, trial, whole)
        found = check_stages(yardstick, run).mismatch
        mismatch = mismatch or found or ""
        return found is None

    culprits = find_culprits(trace, is_right)
    if culprits is None:
        return f"what differs is done by {where_is(model, '')} itself, not by a submodule"
    if not culprits:
        return "it is without cuts: they divide what must stay together; cut elsewhere"
    return {
        path: f"looked into, it is not what it computes as a whole: {mismatch}; it is "
        f"{where_is(model, path)}"
        for path in sorted(culprits)
    }


def plan_variant(
    recipe: Recipe, variant: Variant, args: Any, kwargs: Any
) -> tuple[CutPlan, Inserted]:
    """Make the sources of a split model's interfaces, and its plan.

    Raises:
        DecouplingError: names of no interface, unknown sources, or some that cannot serve a value.
    """
    asked = recipe.gradients, recipe.inputs, recipe.context
    sized = _size(recipe, variant, args, kwargs)
    cheaper = {name: s.option for name, s in sized.items() if s.option != AUTO}
    inserted = insert_sources(variant.trace, variant.split, *asked, recipe.opening, cheaper)
    specs = {i.name: i.spec for i in variant.split.interfaces}
    kinds = {name: auto_name(specs[name], _context(recipe, variant)) for name in sized}
    return describe_plan(variant, inserted, recipe.wanted, remarks(sized, kinds)), inserted


def _size(recipe: Recipe, variant: Variant, args: Any, kwargs: Any) -> dict[str, Sized]:
    """What ``"auto"`` stands for, by interface, where it has several forms; costs of the plan are
    set right by it.
    """
    split, choice = variant.split, variant.choice
    options, context = (
        resolve_gradients(split.interfaces, recipe.gradients),
        _context(recipe, variant),
    )
    asked = {
        node: i
        for node, i in zip(split.crossing, split.interfaces, strict=True)
        if options[i.name] == AUTO and not i.leaves and auto_forms(i.spec, context)
    }
    if not asked:
        return {}
    flow, costs = find_flow(variant.trace), choice.costs
    sent = {
        i.producer: [j for j in asked.values() if j.producer == i.producer] for i in asked.values()
    }
    specs = {stage: [i.spec for i in mine] for stage, mine in sent.items()}
    estimated = costs
    if costs is None or costs.kind != "analytic":
        enough = Enough(choice.stage_of, specs, context)
        estimated = estimate_costs(flow, args, kwargs, {}, wanted=enough)
    assert estimated is not None
    times = stage_times(estimated, choice.stage_of)
    found: dict[str, Sized] = {}
    for stage, mine in sent.items():
        made = size_sources(specs[stage], context, times[stage])
        found.update({i.name: s for i, s in zip(mine, made, strict=True)})
    if costs is not None:
        option = {node: found[i.name].option for node, i in asked.items()}
        weigh = measure_sources if costs.kind == "measured" else estimate_sources
        sources = weigh(flow, lambda node: option[node.name], context, option)
        costs = dataclasses.replace(costs, sources={**costs.sources, **sources})
        variant.choice = dataclasses.replace(choice, costs=costs)
    return found


def _context(recipe: Recipe, variant: Variant) -> TensorSpec | None:
    """What sources within a graph see besides their values."""
    if recipe.opening is not None:
        return None
    specs = infer_specs(variant.trace)
    return infer_context(recipe.context, tuple(specs[n] for n in variant.split.model_inputs))


def trace_model(model: nn.Module, args: Any, kwargs: Any) -> Trace:
    """Trace a model without cutting it, by the first tracer that can.

    Raises:
        TracingError: neither can.
    """
    try:
        return trace_calls(model, args, kwargs)
    except BakedInError:  # export would bake it in without a word
        raise
    except TracingError as first:
        try:
            return trace_export(model, args, kwargs)
        except TracingError as second:
            raise TracingError(
                f"{type(model).__name__} cannot be traced:\n  - {first}\n  - {second}"
            ) from first


def _choose(recipe: Recipe, flow: Flow, args: Any, kwargs: Any, plan: CutPlan | None) -> Choice:
    """Which node belongs to which stage."""
    if plan is not None:
        return follow(flow, plan, lenient=True)
    if max(flow.trainable) == 0:
        raise CutError(
            f"no parameter of this {type(flow.trace.model).__name__} is trainable; unfreeze some "
            "(requires_grad_())"
        )
    cuts, gradients, context = recipe.cuts, recipe.gradients, recipe.context
    if isinstance(cuts, Search):
        return choose_best(flow, args, kwargs, gradients, context, cuts)
    choice = follow(flow, cuts)
    if recipe.weigh is None:
        return choice
    costs = weigh_model(flow, args, kwargs, gradients, context, recipe.weigh)
    return dataclasses.replace(choice, costs=costs)


def _is_other_graph(cuts: Any, trace: Trace, blamed: bool) -> bool:
    """Whether a plan was made for another graph. Where modules turned out to be single nodes, the
    names of its cuts are followed.
    """
    followed = isinstance(cuts, CutPlan) and not (blamed and not cuts.assignment)
    return followed and trace.digest != cuts.digest

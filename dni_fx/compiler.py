"""The entry points: what a user asks for is checked (one error, and what to do), made a recipe, and
handed down.

:class:`dni_fx.graphs.graphs.Graphs` follows the recipe, by the passes of
:mod:`dni_fx.graphs.pipeline`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .decoupled import Decoupled
from .errors import DecouplingError
from .graphs.graphs import Graphs
from .graphs.nested import flatten
from .graphs.pipeline import Recipe, trace_model
from .graphs.sharding import check_unsharded
from .passes.cut.cutting import find_flow
from .passes.cut.cutting import list_cut_points as list_points
from .passes.cut.insertion import Context, Gradients, Inputs
from .passes.search.choosing import Search, check_within
from .passes.search.costing import Seconds
from .passes.trace.state import preserved_rng
from .plan import CutPlan, CutPointList
from .runtime.module import DropIn
from .sources import EXACT, INPUTS, SOURCES, Exampled, base_name

Cuts = str | Sequence[str] | CutPlan


def decouple(
    model: nn.Module,
    cuts: Cuts = "auto",
    *,
    stages: int | None = None,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    gradients: Gradients = "auto",
    inputs: Inputs | None = None,
    context: Callable[[Any], torch.Tensor] | None = None,
    example_target: Any = None,
    check: bool = True,
) -> Decoupled:
    """Cut a model into stages that train without waiting for each other.

    The model is traced, cut, and given a source of synthetic gradients wherever a gradient would
    have crossed a cut (Decoupled Neural Interfaces, Jaderberg et al. 2016, arXiv:1608.05343). It is
    trained in place and keeps its class, its parameters and its ``state_dict``.

    Args:
        model: any module, in the mode in which it is to be trained.
        cuts: names of modules or nodes to cut after (n cuts make n + 1 stages), a ``CutPlan``, or
            ``"auto"``: the search of :func:`plan_cuts` for throughput.
        stages: how many stages for ``"auto"``; 4 by default, fewer with a note where the graph has
            fewer legal cuts.
        example_inputs: positional inputs of one batch. Without examples everything happens at the
            first call.
        example_kwargs: keyword inputs.
        gradients: a source's name (``dni_fx.sources.SOURCES`` lists them; with ``"joint:"`` before
            it one source serves the whole boundary of a stage; options may follow,
            ``"linear(rank=16)"``), a factory ``(specs, context) -> GradientSource``, or a mapping
            from interface name to either.
        inputs: synthetic inputs: every stage runs on what is predicted from the model's inputs, so
            that it need not wait for the forward of the stages before it. A name (``"auto"``,
            ``"linear"``, ``"mlp"``, ``"conv"``), a factory ``(spec, inputs) -> InputSource``, or a
            mapping from interface name to either; None for none.
        context: turns the training target into a float tensor ``(batch, features)``, or ``(batch,
            *positions, features)``, that the sources see besides their value, such as
            ``dni_fx.one_hot(10)``. What shape that has is seen on ``example_target``; without one
            it is read from two attributes of the callable, the integers ``features`` and
            ``positions`` (how many dimensions lie between batch and features; 0 if missing); and
            without those the callable is tried on integer labels ``(batch,)``.
        example_target: the target of one batch, as the loss takes it: a tensor, or a dict, tuple or
            whatever ``context`` takes. Contexts and heads are made to fit it.
        check: compare the split model with the model on the example batch: outputs, gradients,
            buffers, in training and evaluation mode.

    Returns:
        The decoupled model.

    Raises:
        DecouplingError: arguments that do not fit together.
        TracingError: no tracer gave a graph that equals the model.
        CutError: unknown or illegal cuts, all of them listed; a model without trainable parameters.
        PlanMismatchError: the plan was made for another graph.
    """
    wish = check_cuts(cuts, Search(stages))
    check_whole(model)
    seen = _with_example(context, example_target)
    recipe = Recipe(wish, gradients, inputs, seen, check)
    decoupled = Decoupled(Graphs(model, _with_planned_sources(recipe)))
    if example_inputs is not None or example_kwargs is not None:
        args, kwargs = check_examples(example_inputs, example_kwargs)
        decoupled.bind(*args, **kwargs)
        if check:
            decoupled.graphs.bind_other_mode(*args, **kwargs)
    return decoupled


def plan_cuts(
    model: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    *,
    stages: int | None = None,
    cuts: Sequence[str] | None = None,
    objective: str = "throughput",
    gradients: Gradients = "auto",
    costs: str | Mapping[str, Seconds] = "analytic",
    bandwidth: float = 1e10,
    speeds: Sequence[float] | None = None,
    memory_cap: float | None = None,
    keep_together: Sequence[str | Sequence[str]] = (),
    never_cut: Sequence[str] = (),
    must_cut: Sequence[str] = (),
    within: str | None = None,
    max_values: int | None = None,
    batches: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    context: Context | None = None,
    example_target: Any = None,
    example_kwargs: dict[str, Any] | None = None,
    progress: bool = False,
) -> CutPlan:
    """Choose the best cuts without transforming anything for training.

    Exact over all positions in program order, and over all acyclic partitions where the graph is
    narrow enough to list its frontiers (``plan.report.search.exact`` says which). Ties go to the
    plan that sends the fewest bytes.

    Args:
        model: any module, in the mode in which it is to be trained.
        example_inputs: positional inputs of one batch.
        stages: how many; 4 by default, fewer with a note where the graph has fewer legal cuts, and
            the fewest that keep within the cap for ``objective="memory"`` with a ``memory_cap`` and
            no number.
        cuts: names to cut after, instead of a search; what they cost is still reported.
        objective: ``"throughput"``: the slowest stage as fast as can be, sources and communication
            included; ``"memory"``: the largest stage as small as can be; ``"traffic"``: fewest
            bytes between stages within 5 % of the best throughput; ``"learnability"``: within 5 %
            too, where a quickly fitted source explains most of the true gradient.
        gradients: as in :func:`decouple`; what a source costs counts. With ``"exact"`` stages keep
            program order, so that training equals backpropagation bit for bit.
        costs: ``"analytic"`` (operations and bytes, nothing is run: the same plan in every process
            and on every machine), ``"measured"`` on the example batch, or seconds by node or module
            name: a number for forward and backward together, or a pair.
        bandwidth: bytes per second between stages.
        speeds: relative speed of each stage's device, in order; equal by default.
        memory_cap: bytes that no stage may need, parameters with Adam's moments, activations and
            sources together.
        keep_together: modules, nodes or parameters whose every use must share a stage: names, or
            groups of names.
        never_cut: names of places that must not be cut.
        must_cut: names of places that must be cut.
        within: ``"modules"``: cut only where a module's call ends; ``"anything"``: wherever it is
            best; by default where a module ends, unless that costs more than 5 %.
        max_values: most values with a gradient that may cross at a cut.
        batches: at least two batches ``(input, ..., target)``, or dicts, for ``"learnability"``.
        loss: ``loss(output, target)`` for ``"learnability"``.
        context, example_target: as in :func:`decouple`; what sources cost depends on them.
        example_kwargs: keyword inputs.
        progress: show a bar while nodes are weighed.

    Returns:
        The plan: printable, comparable, stored by ``to_json``, drawn by ``draw``; costs are in
            ``report``.

    Raises:
        DecouplingError: arguments that do not fit together.
        CutError: unknown names, wishes that contradict each other, or a memory cap that cannot be
            kept (by how much, and where).
        TracingError: the model cannot be traced.

    Source:
        Bisection over frontiers with boundary costs and dynamic programming over pairs of them; the
        objective is that of Tarnawski et al. 2020 (arXiv:2006.16423), with the cost of the sources
        added.
    """
    search = Search(
        stages=stages,
        objective=objective,
        costs=costs,
        bandwidth=bandwidth,
        speeds=speeds,
        memory_cap=memory_cap,
        keep_together=keep_together,
        never_cut=never_cut,
        must_cut=must_cut,
        within=within,
        max_values=max_values,
        batches=batches,
        loss=loss,
        progress=progress,
    )
    wish = check_cuts("auto" if cuts is None else cuts, search)
    if example_inputs is None and example_kwargs is None:
        raise DecouplingError(
            "plan_cuts needs example_inputs=, a tuple of one batch's inputs: costs depend on them"
        )
    check_whole(model)
    seen = _with_example(context, example_target)
    recipe = Recipe(wish, gradients, context=seen, check=False, weigh=search)
    args, kwargs = check_examples(example_inputs, example_kwargs)
    graphs = Graphs(model, _with_planned_sources(recipe))
    graphs.bind(*args, **kwargs)
    return graphs.plan


def list_cut_points(
    model: nn.Module,
    example_inputs: Sequence[Any],
    example_kwargs: dict[str, Any] | None = None,
    *,
    within: str = "anything",
) -> CutPointList:
    """List where a model can be cut.

    Args:
        model: any module.
        example_inputs: positional inputs of one batch.
        example_kwargs: keyword inputs.
        within: ``"modules"`` for places where a module's call ends alone.

    Returns:
        Cut points in program order: name, shape, bytes and names of what would cross, whether it is
        legal, else why not. Prints as a table.

    Raises:
        DecouplingError: a ``within`` that does not exist.
        TracingError: the model cannot be traced.
    """
    if problem := next(check_within(within), None):
        raise DecouplingError(problem)
    check_whole(model)
    args, kwargs = check_examples(example_inputs, example_kwargs)
    found = list_points(find_flow(trace_model(model, args, kwargs)))
    return CutPointList(p for p in found if p.ends_module or within != "modules")


def _with_example(context: Context | None, target: Any) -> Context | None:
    """A context callable that was tried on an example of its targets, if there is one."""
    if context is None or target is None or not callable(context):
        return context
    put_back_rng = preserved_rng()
    try:
        return Exampled.of(context, target)
    finally:
        put_back_rng()


def _with_planned_sources(recipe: Recipe) -> Recipe:
    """The sources that a plan was made with, where no others are asked for."""
    plan = recipe.cuts
    asked: dict[str, Any] = {"gradients": recipe.gradients, "inputs": recipe.inputs}
    if not isinstance(plan, CutPlan):
        return recipe
    for argument, pairs, known in (
        ("gradients", plan.gradients if asked["gradients"] == "auto" else (), SOURCES),
        ("inputs", plan.inputs if asked["inputs"] is None else (), INPUTS),
    ):
        for interface, name in pairs:
            if base_name(name) not in known:
                raise DecouplingError(
                    f"the plan was made with a source of your own at {interface!r} ({name}), which "
                    f"JSON cannot hold; pass {argument}="
                )
        if pairs:
            names = dict(pairs)
            exact = [option for option in EXACT if option in names.values()]
            asked[argument] = exact[0] if exact else names
    return dataclasses.replace(recipe, **asked)


def check_whole(model: Any) -> None:
    """Refuse what cannot be decoupled as a whole: compiled, scripted, wrapped, lazy or hooked
    models, those of inference mode, and anything within it.
    """
    if torch.is_inference_mode_enabled():
        raise DecouplingError(
            "inside torch.inference_mode() nothing can be traced for training: leave it for this "
            "(torch.no_grad() is fine)"
        )
    if why := next(_obstacles(model), None):
        raise DecouplingError(why)
    check_unsharded(model)


def _obstacles(model: Any) -> Iterator[str]:
    name, scripted = type(model).__name__, torch.jit.ScriptModule
    if not isinstance(model, nn.Module):
        yield f"decouple takes an nn.Module, not {name}"
    for path, module in model.named_modules():
        # a Decoupled inside of another model is looked into like any module
        if isinstance(module, DropIn) or (isinstance(module, Decoupled) and not path):
            what = f"submodule {path!r}" if path else "this model"
            yield f"{what} is decoupled already; pass decoupled.model to cut it in another way"
    if hasattr(model, "_orig_mod"):
        yield f"{name} is a compiled module; decouple the original one: model._orig_mod"
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        yield f"{name} wraps another module; decouple that one: model.module"
    if isinstance(model, scripted):
        yield f"{name} is a scripted module, which cannot be traced; decouple the Python module"
    for path, module in model.named_modules():
        if any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False)):
            yield f"lazy module {path!r} has no parameters yet: run the model once on a batch first"
        if isinstance(module, scripted):
            yield (
                f"submodule {path!r} is scripted, which cannot be traced; put the Python module "
                "there"
            )
        if path and hasattr(module, "_orig_mod"):
            yield f"submodule {path!r} is compiled; decouple the model before compiling parts of it"
    for path, parameter in model.named_parameters():
        if parameter.is_inference():
            yield (
                f"parameter {path!r} was made in inference mode, so it cannot be trained: make the "
                "model outside of torch.inference_mode()"
            )
    for hooks in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"):
        if getattr(model, f"_{hooks}"):
            yield (
                f"{name} itself has {hooks.replace('_', ' ')}, which would not run: stages replace "
                "its forward. Remove them, or put them on submodules"
            )


def check_examples(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of an example batch, or an error that says what to pass."""
    if not isinstance(args, tuple | list | None) or not isinstance(kwargs, dict | None):
        is_one = isinstance(args, torch.Tensor)
        rest = "; for one tensor pass (x,)" if is_one else ", and example_kwargs= a dict"
        raise DecouplingError(f"example_inputs= must be a tuple of positional inputs{rest}")
    args, kwargs = tuple(args or ()), dict(kwargs or {})
    for i, leaf in enumerate(flatten((args, kwargs))[0]):
        if leaf.is_inference():
            raise DecouplingError(
                f"example tensor {i} was made in inference mode; make it outside, or pass a clone"
            )
        if leaf.dim() and leaf.shape[0] == 0:
            raise DecouplingError(
                f"example tensor {i} has an empty batch, shape {tuple(leaf.shape)}; pass a real "
                "batch"
            )
    return args, kwargs


def check_cuts(cuts: Any, search: Search) -> tuple[str, ...] | CutPlan | Search:
    """What to cut by: names, a plan, or the search for ``"auto"``; or an error that says what to
    pass.
    """
    stages = search.stages
    if isinstance(cuts, bool | int):
        raise DecouplingError(
            f"cuts={cuts!r}: for a number of stages pass stages={cuts!r}; cuts= takes names"
        )
    if stages is not None and (type(stages) is not int or stages < 1):
        raise DecouplingError(f"stages={stages!r}: expected a whole number, at least 1")
    if isinstance(cuts, str):
        if cuts != "auto":
            raise DecouplingError(
                f"cuts={cuts!r}: pass a list of names, cuts=[{cuts!r}], or 'auto'"
            )
        return search
    if stages is not None:
        raise DecouplingError("stages= goes with cuts='auto'; n named cuts make n + 1 stages")
    if isinstance(cuts, CutPlan):
        return cuts
    if not isinstance(cuts, list | tuple):
        raise DecouplingError(f"cuts={cuts!r}: expected a list of names, a CutPlan, or 'auto'")
    for name in cuts:
        if not isinstance(name, str):
            raise DecouplingError(f"cuts= must hold names (text), but holds {name!r}")
    return tuple(cuts)

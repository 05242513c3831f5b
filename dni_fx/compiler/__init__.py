"""``decouple``: the passes, called in order."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..decoupled import Decoupled
from ..errors import BakedInError, CutError, DecouplingError, PlanMismatchError, TracingError
from ..graphs.nested import flatten
from ..graphs.variants import Passes, Variant, kinds_of
from ..passes.cut.checking import check_model, check_stages, guards_hold
from ..passes.cut.cutting import Flow, find_flow
from ..passes.cut.cutting import list_cut_points as list_points
from ..passes.cut.describing import Leaving, describe_plan
from ..passes.cut.emission import emit_functions, readable_code, source_key
from ..passes.cut.insertion import Gradients, Inputs
from ..passes.cut.splitting import Split, bound_attributes, run_stages, split_stages
from ..passes.search.choosing import (
    Choice,
    Context,
    Search,
    choose_assigned,
    choose_best,
    choose_named,
    weigh_model,
)
from ..passes.search.costing import Seconds
from ..passes.trace.exporting import trace_export
from ..passes.trace.ports import ANOTHER, open_ports
from ..passes.trace.tracing import Trace, trace_calls
from ..plan import CutPlan, CutPointList
from ..sources import EACH, INPUTS, JOINT, SOURCES, GradientSource, InputSource
from ..through_time.window import Window

Cuts = str | Sequence[str] | CutPlan
Choose = Callable[[Flow, Any, Any], Choice]


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
    check: bool = True,
) -> Decoupled:
    """Cut a model into stages that train without waiting for each other.

    The model is traced, cut, and given a source of synthetic gradients wherever a gradient would
    have crossed a cut (Decoupled Neural Interfaces, Jaderberg et al. 2016, arXiv:1608.05343). It is
    trained in place and keeps its class, its parameters and its ``state_dict``.

    Args:
        model: any module, in the mode in which it is to be trained.
        cuts: names of modules or nodes to cut after (n cuts make n + 1 stages), a ``CutPlan``, or
            ``"auto"``: the search of :func:`plan_cuts` for throughput, with costs measured on the
            example batch.
        stages: how many stages for ``"auto"``; 4 by default, fewer with a note where the graph has
            fewer legal cuts.
        example_inputs: positional inputs of one batch. Without examples everything happens at the
            first call.
        example_kwargs: keyword inputs.
        gradients: a source's name (``dni_fx.sources.SOURCES`` lists them; with ``"joint:"`` before
            it one source serves the whole boundary of a stage), a factory ``(specs, context) ->
            GradientSource``, or a mapping from interface name to either.
        inputs: synthetic inputs: every stage runs on what is predicted from the model's inputs, so
            that it need not wait for the forward of the stages before it. A name (``"auto"``,
            ``"linear"``, ``"mlp"``, ``"conv"``), a factory ``(spec, inputs) -> InputSource``, or a
            mapping from interface name to either; None for none.
        context: turns the training target into a float tensor ``(batch, features)`` that the
            sources see besides their value, such as ``dni_fx.one_hot(10)``.
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
    names = _check_cuts(cuts, stages)
    search = Search(stages) if names is None else None
    return _decouple(
        model,
        cuts,
        names,
        search,
        example_inputs,
        example_kwargs,
        gradients,
        inputs,
        context,
        check,
    )


def plan_cuts(
    model: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    *,
    stages: int | None = None,
    cuts: Sequence[str] | None = None,
    objective: str = "throughput",
    gradients: Gradients = "auto",
    costs: str | Mapping[str, Seconds] = "measured",
    bandwidth: float = 1e10,
    speeds: Sequence[float] | None = None,
    memory_cap: float | None = None,
    keep_together: Sequence[str | Sequence[str]] = (),
    never_cut: Sequence[str] = (),
    must_cut: Sequence[str] = (),
    batches: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    context: Context | None = None,
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
        cuts: names to cut after, instead of a search; their costs are still measured.
        objective: ``"throughput"``: the slowest stage as fast as can be, sources and communication
            included; ``"memory"``: the largest stage as small as can be; ``"traffic"``: fewest
            bytes between stages within 5 % of the best throughput; ``"learnability"``: within 5 %
            too, where a quickly fitted source explains most of the true gradient.
        gradients: as in :func:`decouple`; what a source costs counts.
        costs: ``"measured"`` on the example batch, ``"analytic"`` (operations and bytes, nothing is
            run), or seconds by node or module name: a number for forward and backward together, or
            a pair.
        bandwidth: bytes per second between stages.
        speeds: relative speed of each stage's device, in order; equal by default.
        memory_cap: bytes that no stage may need, parameters with Adam's moments, activations and
            sources together.
        keep_together: modules, nodes or parameters whose every use must share a stage: names, or
            groups of names.
        never_cut: names of places that must not be cut.
        must_cut: names of places that must be cut.
        batches: at least two batches ``(input, ..., target)``, or dicts, for ``"learnability"``.
        loss: ``loss(output, target)`` for ``"learnability"``.
        context: as in :func:`decouple`.
        example_kwargs: keyword inputs.
        progress: show a bar while measuring.

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
    names = _check_cuts("auto" if cuts is None else cuts, stages)
    search = Search(
        stages, objective, costs, bandwidth, speeds, memory_cap, keep_together, never_cut, must_cut, batches, loss,
        progress,
    )  # fmt: skip
    if example_inputs is None and example_kwargs is None:
        raise DecouplingError(
            "plan_cuts needs example_inputs=, a tuple of one batch's inputs: costs depend on them"
        )
    return _decouple(
        model,
        cuts,
        names,
        search,
        example_inputs,
        example_kwargs,
        gradients,
        None,
        context,
        check=False,
    ).plan


def _decouple(
    model: nn.Module,
    cuts: Cuts | None,
    names: tuple[str, ...] | None,
    search: Search | None,
    example_inputs: Sequence[Any] | None,
    example_kwargs: dict[str, Any] | None,
    gradients: Gradients,
    inputs: Inputs | None,
    context: Context | None,
    check: bool,
) -> Decoupled:
    check_whole(model)
    planned = cuts if isinstance(cuts, CutPlan) else None
    if planned is not None and gradients == "auto" and planned.gradients:
        gradients = _planned_gradients(planned)
    if planned is not None and inputs is None and planned.inputs:
        inputs = _planned(planned.inputs, INPUTS, "inputs")

    def choose(flow: Flow, args: Any, kwargs: Any) -> Choice:
        if planned is not None and planned.assignment:
            return choose_assigned(flow, planned)
        if names is None:
            assert search is not None
            return choose_best(flow, args, kwargs, gradients, context, search)
        choice = choose_named(flow, names)
        if search is not None:
            costs = weigh_model(flow, args, kwargs, gradients, context, search)
            choice = dataclasses.replace(choice, costs=costs)
        return choice

    def build(model: nn.Module, args: Any, kwargs: Any, plan: CutPlan | None) -> Variant:
        if plan is None:
            return _build_variant(model, args, kwargs, choose, check, planned=planned)
        again: Choose = lambda flow, *_: (  # noqa: E731
            choose_assigned(flow, plan)
            if plan.assignment
            else choose_named(flow, plan.cuts, lenient=True)
        )
        return _build_variant(model, args, kwargs, again, check, again=True)

    def plan_of(
        variant: Variant,
    ) -> tuple[CutPlan, dict[str, GradientSource], dict[str, InputSource]]:
        return describe_plan(
            variant, gradients, inputs, context, search.count if search and names is None else None
        )

    passes = Passes(build, plan_of, _emit, run_stages, guards_hold, readable_code, source_key)
    decoupled = Decoupled(model, passes, context)
    if example_inputs is not None or example_kwargs is not None:
        args, kwargs = _examples(model, example_inputs, example_kwargs)
        decoupled.bind(*args, **kwargs)
        if check:
            _check_other_mode(decoupled, args, kwargs)
    return decoupled


def decouple_window(
    window: Window,
    cuts: Sequence[str],
    gradients: Gradients,
    leaving: Callable[[], Leaving],
    check: bool,
    messages: Sequence[str] = (),
    input_gradients: bool = False,
) -> Decoupled:
    """Cut the graph of a window, at its end and where asked within it.

    Args:
        window: the model over one window; its ``states`` are known by the first call.
        cuts: names to cut after within the window.
        gradients: as in :func:`decouple`.
        leaving: asked at the first call how the state is served.
        check: compare the stages with the window.
        messages: keys of the model's output, a dict, that leave for another network.
        input_gradients: whether gradients leave for what the window takes.

    Returns:
        The decoupled model, called as the window is.
    """
    names = _check_cuts(list(cuts), None)
    assert names is not None

    def opened(trace: Trace) -> Trace:
        assert window.states is not None
        dims = dict(zip(window.states.names, window.states.batch_dims, strict=True))
        return open_ports(
            trace, window.model, ("model.", "apart."), dims, messages, input_gradients
        )

    def build(model: nn.Module, args: Any, kwargs: Any, plan: CutPlan | None) -> Variant:
        choose: Choose = lambda flow, *_: choose_named(flow, names, lenient=plan is not None)  # noqa: E731
        return _build_variant(
            window, args, kwargs, choose, check, again=plan is not None, open_trace=opened
        )

    def plan_of(
        variant: Variant,
    ) -> tuple[CutPlan, dict[str, GradientSource], dict[str, InputSource]]:
        return describe_plan(variant, gradients, None, None, None, leaving())

    return Decoupled(
        window.model,
        Passes(build, plan_of, _emit, run_stages, guards_hold, readable_code, source_key),
        None,
    )


def list_cut_points(
    model: nn.Module, example_inputs: Sequence[Any], example_kwargs: dict[str, Any] | None = None
) -> CutPointList:
    """List where a model can be cut.

    Args:
        model: any module.
        example_inputs: positional inputs of one batch.
        example_kwargs: keyword inputs.

    Returns:
        Cut points in program order: name, shape, bytes and names of what would cross, whether it is
            legal, else why
        not. Prints as a table.

    Raises:
        TracingError: the model cannot be traced.
    """
    check_whole(model)
    args, kwargs = _examples(model, example_inputs, example_kwargs)
    return CutPointList(list_points(find_flow(_trace(model, args, kwargs))))


def _build_variant(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    choose: Choose,
    check: bool,
    again: bool = False,
    planned: CutPlan | None = None,
    open_trace: Callable[[Trace], Trace] | None = None,
) -> Variant:
    """Climb the tracing ladder until the split model equals the model.

    A graph made again under an existing plan may lack a cut, say one inside ``if self.training``:
    it then has fewer stages, which do to evaluate with.
    """
    refusals: list[str] = []
    others: list[str] = []
    for tracer in (trace_calls, trace_export):
        try:
            trace = tracer(model, args, kwargs)
        except TracingError as error:
            refusals.append(f"{tracer.__name__}: {error}")
            if len(refusals) == 1:
                check_model(model, args, kwargs, str(error))
            if isinstance(error, BakedInError):  # export would bake it in without a word
                break
            continue
        if open_trace is not None:
            trace = open_trace(trace)
        if planned is not None and trace.digest != planned.digest:
            others.append(trace.digest)
            continue
        flow = find_flow(trace)
        if max(flow.trainable) == 0 and not again:
            raise CutError(
                f"no parameter of this {type(model).__name__} is trainable; unfreeze some "
                "(requires_grad_())"
            )
        choice = choose(flow, args, kwargs)
        split = split_stages(flow, choice.stage_of, choice.cuts)
        leaves = flatten((args, kwargs))[0]
        variant = Variant(
            trace=trace,
            choice=choice,
            split=split,
            kinds=kinds_of(leaves),
            modes={tuple(m.training for m in trace.modes)},
            parameters=tuple(trace.model.parameters()),
            frozen=tuple(p.requires_grad for p in trace.model.parameters()),
            bound=bound_attributes(split, trace.model),
            shapes={tuple(t.shape for t in leaves)},
        )
        if not check:
            return variant
        result = check_stages(model, functools.partial(_composed, trace, split), args, kwargs)
        if result.mismatch is None:
            variant.exact = result.exact
            return variant
        refusals.append(f"{tracer.__name__}: the traced model is not the model: {result.mismatch}")
    if planned is not None and others and not refusals:
        raise PlanMismatchError(
            f"the plan was made for a {planned.model} with graph {planned.digest}, but this "
            f"{type(model).__name__} has graph {others[0]}; make a new plan with dni_fx.plan_cuts, "
            "or pass its cuts: cuts=list(plan.cuts)"
        )
    reasons = "\n".join(f"  - {r}" for r in refusals)
    raise TracingError(
        f"{type(model).__name__} cannot be traced faithfully:\n{reasons}\n"
        "Move the code that is named into a submodule of its own (it then stays one opaque node), "
        "or pass that part of the model to decouple"
    )


def _trace(model: nn.Module, args: Any, kwargs: Any) -> Trace:
    try:
        return trace_calls(model, args, kwargs)
    except TracingError as first:
        try:
            return trace_export(model, args, kwargs)
        except TracingError as second:
            raise TracingError(
                f"{type(model).__name__} cannot be traced:\n  - {first}\n  - {second}"
            ) from first


def _composed(trace: Trace, split: Split, *args: Any, **kwargs: Any) -> Any:
    values = dict(zip(split.model_inputs, flatten((args, kwargs))[0], strict=True))
    output = run_stages(split, values)
    state = [
        values[p.name] for p in trace.ports if p.feeds != ANOTHER
    ]  # messages are in the output already
    return (output, state) if trace.ports else output


def _planned_gradients(plan: CutPlan) -> Gradients:
    names = _planned(plan.gradients, SOURCES, "gradients")
    return "exact" if "exact" in names.values() else names


def _planned(
    pairs: Iterable[tuple[str, str]], known: Iterable[str], argument: str
) -> dict[str, str]:
    """A plan's names of sources, or an error for one that only a factory could make."""
    own = [(i, n) for i, n in pairs if n.removeprefix(JOINT).removeprefix(EACH) not in known]
    if own:
        interface, name = own[0]
        raise DecouplingError(
            f"the plan was made with a source of your own at {interface!r} ({name}), which JSON "
            f"cannot hold; pass {argument}="
        )
    return dict(pairs)


def _emit(split: Split, sources: dict[str, GradientSource]) -> tuple[Any, ...]:
    return tuple(emit_functions(split, s.index, sources) for s in split.stages)


def _check_other_mode(decoupled: Decoupled, args: Any, kwargs: Any) -> None:
    """Trace and check the mode that the model is not in, since tracers bake ``self.training`` in."""
    model = decoupled.model
    modes = [(m, m.training) for m in model.modules()]
    active = decoupled._active
    model.train(not model.training)
    try:
        decoupled.bind(*args, **kwargs)
    finally:
        for module, mode in modes:
            module.training = mode
        object.__setattr__(decoupled, "_active", active)


def _examples(model: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(args, torch.Tensor):
        raise DecouplingError(
            "example_inputs= must be a tuple of positional inputs; for one tensor pass (x,)"
        )
    if not isinstance(args, tuple | list | None) or not isinstance(kwargs, dict | None):
        raise DecouplingError(
            "example_inputs= must be a tuple of positional inputs, and example_kwargs= a dict"
        )
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


def _check_cuts(cuts: Any, stages: Any) -> tuple[str, ...] | None:
    if isinstance(cuts, bool | int):
        raise DecouplingError(
            f"cuts={cuts!r}: for a number of stages pass stages={cuts!r}; cuts= takes names"
        )
    if stages is not None and (
        isinstance(stages, bool) or not isinstance(stages, int) or stages < 1
    ):
        raise DecouplingError(f"stages={stages!r}: expected a whole number, at least 1")
    if isinstance(cuts, str):
        if cuts != "auto":
            raise DecouplingError(
                f"cuts={cuts!r}: pass a list of names, cuts=[{cuts!r}], or 'auto'"
            )
        return None
    if stages is not None:
        raise DecouplingError("stages= goes with cuts='auto'; n named cuts make n + 1 stages")
    if isinstance(cuts, CutPlan):
        return cuts.cuts
    if not isinstance(cuts, list | tuple):
        raise DecouplingError(f"cuts={cuts!r}: expected a list of names, a CutPlan, or 'auto'")
    names = tuple(cuts)
    wrong = [n for n in names if not isinstance(n, str)]
    if wrong:
        raise DecouplingError(f"cuts= must hold names (text), but holds {wrong[0]!r}")
    return names


def check_whole(model: Any) -> None:
    """Refuse what cannot be decoupled as a whole: compiled, scripted, wrapped, lazy or hooked
    models.
    """
    if not isinstance(model, nn.Module):
        raise DecouplingError(f"decouple takes an nn.Module, not {type(model).__name__}")
    if isinstance(model, Decoupled):
        raise DecouplingError(
            "this model is decoupled already; pass decoupled.model to cut it in another way"
        )
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise DecouplingError(
            f"{name} is a compiled module; decouple the original one: model._orig_mod"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise DecouplingError(f"{name} wraps another module; decouple that one: model.module")
    if isinstance(model, torch.jit.ScriptModule):
        raise DecouplingError(
            f"{name} is a scripted module, which cannot be traced; decouple the Python module"
        )
    for path, module in model.named_modules():
        if any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False)):
            raise DecouplingError(
                f"lazy module {path!r} has no parameters yet: run the model once on a batch first"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise DecouplingError(
                f"submodule {path!r} is scripted, which cannot be traced; put the Python module "
                "there"
            )
        if path and hasattr(module, "_orig_mod"):
            raise DecouplingError(
                f"submodule {path!r} is compiled; decouple the model before compiling parts of it"
            )
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = [h.strip("_") for h in hooks if getattr(model, h)]
    if found:
        raise DecouplingError(
            f"{name} itself has {found[0].replace('_', ' ')}, which would not run: stages replace "
            "its forward. Remove them, or put them on submodules"
        )

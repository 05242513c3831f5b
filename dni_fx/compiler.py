"""``decouple``: the passes, called in order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .decoupled import Decoupled
from .errors import BakedInError, CutError, DecouplingError, PlanMismatchError, TracingError
from .passes.checking import check_model, check_stages, guards_hold
from .passes.cutting import assign_stages, choose_positions, find_flow, find_positions, name_position, possible_cuts
from .passes.cutting import list_cut_points as list_points
from .passes.emission import emit_functions, readable_code, source_key
from .passes.exporting import trace_export
from .passes.insertion import Gradients, infer_context, make_sources, resolve_gradients
from .passes.splitting import Split, bound_attributes, split_stages
from .passes.tracing import Trace, trace_calls
from .plan import CutPlan, CutPointList, PlanReport, SourceReport, StageReport
from .sources import SOURCES, GradientSource, auto_name
from .structures import flatten
from .variants import Passes, Variant, kinds_of

Cuts = str | Sequence[str] | CutPlan
DEFAULT_STAGES = 4


def decouple(
    model: nn.Module,
    cuts: Cuts = "auto",
    *,
    stages: int | None = None,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    gradients: Gradients = "auto",
    inputs: Any = None,
    context: Callable[[Any], torch.Tensor] | None = None,
    check: bool = True,
) -> Decoupled:
    """Cut a model into stages that train without waiting for each other.

    The model is traced, cut, and given a source of synthetic gradients wherever a gradient would have crossed a cut
    (Decoupled Neural Interfaces, Jaderberg et al. 2016, arXiv:1608.05343). It is trained in place and keeps its class,
    its parameters and its ``state_dict``.

    Args:
        model: any module, in the mode in which it is to be trained.
        cuts: names of modules or nodes to cut after (n cuts make n + 1 stages), a ``CutPlan``, or ``"auto"``: legal
            positions nearest to equal node counts.
        stages: how many stages for ``"auto"``; 4 by default, fewer with a note where the graph has fewer legal cuts.
        example_inputs: positional inputs of one batch. Without examples everything happens at the first call.
        example_kwargs: keyword inputs.
        gradients: a source's name (``"auto"``, ``"linear"``, ``"mlp"``, ``"conv"``, ``"zero"``, ``"stale"``,
            ``"exact"``), a factory ``(specs, context) -> GradientSource``, or a mapping from interface name to either.
        inputs: synthetic inputs; not available yet, None only.
        context: turns the training target into a float tensor ``(batch, features)`` that the sources see besides their
            value, such as ``dni_fx.one_hot(10)``.
        check: compare the split model with the model on the example batch: outputs, gradients, buffers, in training
            and evaluation mode.

    Returns:
        The decoupled model.

    Raises:
        DecouplingError: arguments that do not fit together.
        TracingError: no tracer gave a graph that equals the model.
        CutError: unknown or illegal cuts, all of them listed; a model without trainable parameters.
        PlanMismatchError: the plan was made for another graph.
    """
    _check_model(model)
    wanted = _check_cuts(cuts, stages)
    if inputs is not None:
        raise DecouplingError("inputs= (synthetic inputs) is not available in this version; leave it None")
    if isinstance(cuts, CutPlan) and gradients == "auto" and cuts.gradients:
        gradients = _planned_gradients(cuts)

    def build(model: nn.Module, args: Any, kwargs: Any, plan: CutPlan | None) -> Variant:
        if plan is None:
            planned = cuts if isinstance(cuts, CutPlan) else None
            return _build_variant(model, args, kwargs, wanted, stages or DEFAULT_STAGES, check, planned=planned)
        return _build_variant(model, args, kwargs, plan.cuts, 0, check, again=True)

    def make_plan(variant: Variant) -> tuple[CutPlan, dict[str, GradientSource]]:
        return _make_plan(variant, gradients, context, wanted, stages or DEFAULT_STAGES)

    passes = Passes(build, make_plan, _emit, guards_hold, readable_code, source_key)
    decoupled = Decoupled(model, passes, context)
    if example_inputs is not None or example_kwargs is not None:
        args, kwargs = _examples(model, example_inputs, example_kwargs)
        decoupled.bind(*args, **kwargs)
        if check:
            _check_other_mode(decoupled, args, kwargs)
    return decoupled


def plan_cuts(
    model: nn.Module,
    example_inputs: Sequence[Any],
    *,
    stages: int | None = None,
    cuts: Sequence[str] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    gradients: Gradients = "auto",
    context: Callable[[Any], torch.Tensor] | None = None,
) -> CutPlan:
    """Make a plan without transforming anything for training.

    Args:
        model: any module.
        example_inputs: positional inputs of one batch.
        stages: how many stages, for positions nearest to equal node counts.
        cuts: names to cut after, instead.
        example_kwargs: keyword inputs.
        gradients: as in :func:`decouple`.
        context: as in :func:`decouple`.

    Returns:
        The plan: printable, comparable, and stored by ``to_json``.

    Raises:
        DecouplingError: as :func:`decouple`.
    """
    return decouple(
        model,
        "auto" if cuts is None else cuts,
        stages=stages,
        example_inputs=example_inputs,
        example_kwargs=example_kwargs,
        gradients=gradients,
        context=context,
        check=False,
    ).plan


def list_cut_points(
    model: nn.Module, example_inputs: Sequence[Any], example_kwargs: dict[str, Any] | None = None
) -> CutPointList:
    """List where a model can be cut.

    Args:
        model: any module.
        example_inputs: positional inputs of one batch.
        example_kwargs: keyword inputs.

    Returns:
        Cut points in program order: name, shape, bytes and names of what would cross, whether it is legal, else why
        not. Prints as a table.

    Raises:
        TracingError: the model cannot be traced.
    """
    _check_model(model)
    args, kwargs = _examples(model, example_inputs, example_kwargs)
    return CutPointList(list_points(find_flow(_trace(model, args, kwargs))))


def _build_variant(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    cuts: tuple[str, ...] | None,
    stages: int,
    check: bool,
    again: bool = False,
    planned: CutPlan | None = None,
) -> Variant:
    """Climb the tracing ladder until the split model equals the model.

    A graph made again under an existing plan may lack a cut, say one inside ``if self.training``: it then has fewer
    stages, which do to evaluate with.
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
        if planned is not None and trace.digest != planned.digest:
            others.append(trace.digest)
            continue
        flow = find_flow(trace)
        if max(flow.trainable) == 0 and not again:
            raise CutError(
                f"no parameter of this {type(model).__name__} is trainable; unfreeze some (requires_grad_())"
            )
        here = possible_cuts(flow, cuts) if again and cuts is not None else cuts
        positions = choose_positions(flow, stages) if here is None else find_positions(flow, here)
        names = here or tuple(name_position(flow, p) for p in positions)
        split = split_stages(flow, assign_stages(flow, positions), names)
        leaves = flatten((args, kwargs))[0]
        variant = Variant(
            trace=trace,
            split=split,
            kinds=kinds_of(leaves),
            modes={tuple(m.training for m in trace.modes)},
            parameters=tuple(model.parameters()),
            frozen=tuple(p.requires_grad for p in model.parameters()),
            bound=bound_attributes(split, model),
            shapes={tuple(t.shape for t in leaves)},
        )
        variant.cuts = tuple(name_position(flow, p) if here is None else _cut_at(flow, here, p) for p in positions)
        if not check:
            return variant
        result = check_stages(model, functools.partial(_composed, split), args, kwargs)
        if result.mismatch is None:
            variant.exact = result.exact
            return variant
        refusals.append(f"{tracer.__name__}: the traced model is not the model: {result.mismatch}")
    if planned is not None and others and not refusals:
        raise PlanMismatchError(
            f"the plan was made for a {planned.model} with graph {planned.digest}, but this {type(model).__name__} has "
            f"graph {others[0]}; make a new plan with dni_fx.plan_cuts, or pass its cuts: cuts=list(plan.cuts)"
        )
    reasons = "\n".join(f"  - {r}" for r in refusals)
    raise TracingError(
        f"{type(model).__name__} cannot be traced faithfully:\n{reasons}\n"
        "Move the code that is named into a submodule of its own (it then stays one opaque node), or pass that part "
        "of the model to decouple"
    )


def _trace(model: nn.Module, args: Any, kwargs: Any) -> Trace:
    try:
        return trace_calls(model, args, kwargs)
    except TracingError as first:
        try:
            return trace_export(model, args, kwargs)
        except TracingError as second:
            raise TracingError(f"{type(model).__name__} cannot be traced:\n  - {first}\n  - {second}") from first


def _composed(split: Split, *args: Any, **kwargs: Any) -> Any:
    values = dict(zip(split.model_inputs, flatten((args, kwargs))[0], strict=True))
    for stage in split.stages:
        results = stage.module(*(values[n] for n in stage.inputs))
        if stage is split.stages[-1]:
            return results
        values.update(zip(stage.outputs, results, strict=True))
    return None


def _make_plan(
    variant: Variant,
    gradients: Gradients,
    context: Callable[[Any], torch.Tensor] | None,
    cuts: tuple[str, ...] | None,
    stages: int,
) -> tuple[CutPlan, dict[str, GradientSource]]:
    split, trace = variant.split, variant.trace
    interfaces = split.interfaces
    chosen = resolve_gradients(interfaces, gradients)
    batch = variant_batch(variant)
    devices = {i.name: _device(variant) for i in interfaces}
    seen = infer_context(context, batch)
    sources = make_sources(interfaces, chosen, seen, devices)
    kinds = {n: c if isinstance(c, str) else _own_name(c) for n, c in chosen.items()}
    kinds.update({i.name: auto_name(i.spec, seen) for i in interfaces if kinds[i.name] == "auto"})
    counts = {n: p.numel() for n, p in trace.model.named_parameters()}
    notes = [f"{path!r} is one opaque node: {why}" for path, why in trace.opaque.items()]
    notes += trace.notes
    notes += [f"parameter {n!r} is shared by stages {', '.join(map(str, w))}" for n, _, w in split.shared]
    if cuts is None and len(split.stages) < stages:
        notes.append(f"{len(split.stages)} stages instead of {stages}: the graph has no more legal cuts")
    report = PlanReport(
        rung=trace.rung,
        stages=tuple(
            StageReport(
                name=f"stage_{s.index}",
                nodes=s.nodes,
                parameters=sum(counts[p] for p in s.parameters),
                cut=variant.cuts[s.index] if s.index < len(variant.cuts) else None,
                inputs=s.inputs,
            )
            for s in split.stages
        ),
        interfaces=interfaces,
        plain=split.plain,
        sources={
            n: SourceReport(kinds[n], sum(p.numel() for p in s.parameters()), _flops(s)) for n, s in sources.items()
        },
        notes=tuple(notes),
        exact=variant.exact,
    )
    plan = CutPlan(type(trace.model).__name__, trace.digest, variant.cuts, tuple(kinds.items()), report)
    return plan, sources


def _flops(source: GradientSource) -> int | None:
    """Unknown for a source of the user's own that cannot run without data."""
    try:
        return source.flops()
    except Exception:
        return None


def _planned_gradients(plan: CutPlan) -> Gradients:
    names = dict(plan.gradients)
    own = {i: n for i, n in names.items() if n not in SOURCES}
    if own:
        interface, name = next(iter(own.items()))
        raise DecouplingError(
            f"the plan was made with a source of your own at {interface!r} ({name}), which JSON cannot hold; pass "
            "gradients="
        )
    return "exact" if "exact" in names.values() else dict(names)


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
        raise DecouplingError("example_inputs= must be a tuple of positional inputs; for one tensor pass (x,)")
    if not isinstance(args, tuple | list | None) or not isinstance(kwargs, dict | None):
        raise DecouplingError("example_inputs= must be a tuple of positional inputs, and example_kwargs= a dict")
    args, kwargs = tuple(args or ()), dict(kwargs or {})
    for i, leaf in enumerate(flatten((args, kwargs))[0]):
        if leaf.dim() and leaf.shape[0] == 0:
            raise DecouplingError(
                f"example tensor {i} has an empty batch, shape {tuple(leaf.shape)}; pass a real batch"
            )
    return args, kwargs


def _check_cuts(cuts: Any, stages: Any) -> tuple[str, ...] | None:
    if isinstance(cuts, bool | int):
        raise DecouplingError(f"cuts={cuts!r}: for a number of stages pass stages={cuts!r}; cuts= takes names")
    if stages is not None and (isinstance(stages, bool) or not isinstance(stages, int) or stages < 1):
        raise DecouplingError(f"stages={stages!r}: expected a whole number, at least 1")
    if isinstance(cuts, str):
        if cuts != "auto":
            raise DecouplingError(f"cuts={cuts!r}: pass a list of names, cuts=[{cuts!r}], or 'auto'")
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


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise DecouplingError(f"decouple takes an nn.Module, not {type(model).__name__}")
    if isinstance(model, Decoupled):
        raise DecouplingError("this model is decoupled already; pass decoupled.model to cut it in another way")
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise DecouplingError(f"{name} is a compiled module; decouple the original one: model._orig_mod")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise DecouplingError(f"{name} wraps another module; decouple that one: model.module")
    if isinstance(model, torch.jit.ScriptModule):
        raise DecouplingError(f"{name} is a scripted module, which cannot be traced; decouple the Python module")
    for path, module in model.named_modules():
        if any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False)):
            raise DecouplingError(f"lazy module {path!r} has no parameters yet: run the model once on a batch first")
        if isinstance(module, torch.jit.ScriptModule):
            raise DecouplingError(
                f"submodule {path!r} is scripted, which cannot be traced; put the Python module there"
            )
        if path and hasattr(module, "_orig_mod"):
            raise DecouplingError(f"submodule {path!r} is compiled; decouple the model before compiling parts of it")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = [h.strip("_") for h in hooks if getattr(model, h)]
    if found:
        raise DecouplingError(
            f"{name} itself has {found[0].replace('_', ' ')}, which would not run: stages replace its forward. "
            "Remove them, or put them on submodules"
        )


def _cut_at(flow: Any, cuts: tuple[str, ...], position: int) -> str:
    return next(c for c in cuts if find_positions(flow, (c,)) == (position,))


def variant_batch(variant: Variant) -> int:
    """Size of the example batch: the first dimension of the first tensor input."""
    shapes = next(iter(variant.shapes))
    return shapes[0][0] if shapes and len(shapes[0]) else 1


def _device(variant: Variant) -> torch.device:
    return variant.parameters[0].device


def _own_name(factory: Any) -> str:
    """Name of a factory of the user's, which is never that of a built-in source."""
    name = getattr(factory, "__name__", type(factory).__name__)
    return f"{factory.__module__}.{name}" if name in SOURCES else name

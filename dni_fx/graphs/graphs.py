"""All graphs of one model: the one that fits a call is found or made, under one plan."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn

from ..errors import DecouplingError, PlanMismatchError
from ..passes.cut.emission import StageFunctions, emit_functions, source_key
from ..plan import CutPlan, Interface
from ..sources import GradientSource, InputSource, Served, serve
from .nested import flatten, map_tensors
from .pipeline import Recipe, build_variant, plan_variant
from .retraces import Retraces
from .sharding import check_unsharded
from .variants import Variant

_MOST_VARIANTS = 16


class Graphs:
    """The graphs of one model, their plan, and the sources of its interfaces.

    Attributes:
        model, synthesizers: as of :class:`dni_fx.Decoupled`.
        recipe: what it is cut by.
        variants: the graphs; the first is what the plan was made for.
        active: the graph of the last call; None before the first.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.synthesizers = nn.ModuleDict()
        self.variants: list[Variant] = []
        self.active: Variant | None = None
        self._plan: CutPlan | None = None
        self._retraces = Retraces(type(model).__name__)
        self._leads: dict[str, str] = {}  # under whose name an interface's source stands

    @property
    def is_traced(self) -> bool:
        """Whether there is a plan; without example inputs it is made at the first call."""
        return self._plan is not None

    @property
    def plan(self) -> CutPlan:
        """The cuts, stages and interfaces."""
        if self._plan is None:
            raise _untraced(self.recipe)
        return self._plan

    @property
    def interfaces(self) -> tuple[Interface, ...]:
        """The values that carry a gradient across cuts."""
        return self.plan.interfaces

    @property
    def sources(self) -> dict[str, GradientSource]:
        """As :attr:`dni_fx.Decoupled.sources`."""
        table: Any = self.synthesizers
        return {i.name: table[source_key(self._leads[i.name])] for i in self.interfaces}

    @property
    def inputs(self) -> dict[str, InputSource]:
        """As :attr:`dni_fx.Decoupled.inputs`."""
        table: Any = self.synthesizers
        keys = {i.name: _input_key(i.name) for i in self.interfaces}
        return {name: table[key] for name, key in keys.items() if key in table}

    @property
    def is_exact(self) -> bool:
        """Whether the stages are trained with the true gradients."""
        return any(s.asks.exact for s in self.sources.values())

    def named_learners(self, stages: Collection[int] | None = None) -> list[tuple[str, nn.Module]]:
        """As :meth:`dni_fx.Decoupled.named_learners`."""
        asked = range(len(self.plan.stages)) if stages is None else stages
        users = {i.name: i.consumers for i in self.interfaces}
        groups: list[tuple[str, nn.Module]] = [
            (g.name, g.source) for g in serve(self.interfaces, self.sources) if g.producer in asked
        ]
        return groups + [
            (f"{n}@input", s) for n, s in self.inputs.items() if any(c in asked for c in users[n])
        ]

    @property
    def variant(self) -> Variant:
        """The graph of the last call."""
        if self.active is None:
            raise _untraced(self.recipe)
        return self.active

    def current(self) -> Variant:
        """The graph for the mode that the model is in now, where one was made already."""
        if not self.variant.is_current():
            fitting = (v for v in reversed(self.variants) if v.is_current())
            self.active = next(fitting, self.active)
        return self.variant

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As :meth:`dni_fx.Decoupled.bind`."""
        leaves, structure = flatten((args, kwargs))
        for index, leaf in enumerate(leaves):
            if leaf.dim() and leaf.shape[0] == 0:
                raise PlanMismatchError(
                    f"tensor input {index} has an empty batch: its shape is {tuple(leaf.shape)}"
                )
        if self.active is None or not self.active.accepts(structure, leaves):
            fitting = (v for v in self.variants if v.accepts(structure, leaves))
            found = next(fitting, None)
            if found is None:
                self._retraces.count(self.active, structure, leaves)
                found = _outside_inference(self._add, args, kwargs)
            self.active = found
        return dict(zip(self.active.split.model_inputs, leaves, strict=True))

    def has_graph_for(self, *args: Any, **kwargs: Any) -> bool:
        """Whether stages for this kind of call exist, so that ``bind`` need not trace."""
        leaves, structure = flatten((args, kwargs))
        return any(v.accepts(structure, leaves) for v in self.variants)

    def bind_other_mode(self, *args: Any, **kwargs: Any) -> None:
        """Trace and check the mode that the model is not in: tracers bake in ``self.training``."""
        modes = [(m, m.training) for m in self.model.modules()]
        active = self.active
        self.model.train(not self.model.training)
        try:
            self.bind(*args, **kwargs)
        finally:
            for module, mode in modes:
                module.training = mode
            self.active = active

    def _add(self, args: Any, kwargs: Any) -> Variant:
        """The graph for a new kind of call, made under the plan if there is one."""
        check_unsharded(self.model)
        variant = build_variant(self.recipe, self.model, args, kwargs, self._plan)
        if self._plan is None:
            plan, inserted = plan_variant(self.recipe, variant, args, kwargs)
            for group in serve(plan.interfaces, inserted.gradients):
                self.synthesizers[source_key(group.name)] = group.source
                self._leads.update(dict.fromkeys(group.names, group.name))
            for name, source in inserted.inputs.items():
                self.synthesizers[_input_key(name)] = source
            self._plan = plan
        self._remark(variant.trace.notes)
        for other in self.variants:
            if other.absorb(variant):
                return other
        kept = [v for v in self.variants if not v.is_outdated()]
        self.variants = [*kept[:1], *kept[1:][-_MOST_VARIANTS:], variant]
        return variant

    def _remark(self, notes: tuple[str, ...]) -> None:
        """What a graph that was made later has to say belongs into the plan, too."""
        report = self.plan.report
        fresh = tuple(n for n in notes if report is None or n not in report.notes)
        if report is not None and fresh:
            report = dataclasses.replace(report, notes=report.notes + fresh)
            self._plan = dataclasses.replace(self.plan, report=report)

    def functions(self, all_cuts: bool = True) -> tuple[StageFunctions, ...]:
        """The emitted functions of the active graph, written when first trained with.

        Args:
            all_cuts: whether all cuts of the plan must be in it.

        Raises:
            PlanMismatchError: some are not.
        """
        variant = self.variant
        if all_cuts and len(variant.cuts) < len(self.plan.cuts):
            missing = [c for c in self.plan.cuts if c not in variant.cuts]
            raise PlanMismatchError(
                "in this mode or for these inputs the model cannot be cut after "
                f"{', '.join(map(repr, missing))}: it can be evaluated but not trained; "
                f"{_advice(self.model, missing)}"
            )
        if not variant.functions:
            variant.functions = emit_functions(variant.split, self.sources_by_name())
        return variant.functions

    def sources_by_name(self) -> dict[str, GradientSource]:
        """The source of every interface of the active graph.

        Raises:
            PlanMismatchError: this graph, made for other inputs or another mode, needs a source
                that the plan lacks.
        """
        variant = self.variant
        if variant.sources is None:
            interfaces, known = variant.split.interfaces, self.sources
            names = self._planned_names(interfaces)
            missing = [i.name for i in interfaces if i.name not in names]
            if missing:
                raise PlanMismatchError(
                    f"gradients now cross at {', '.join(map(repr, missing))}, where the plan has "
                    "no source (a parameter was unfrozen, or the model takes another path for "
                    "these inputs or in this mode); decouple again, or "
                    f"{_advice(self.model, self.plan.cuts)}"
                )
            sources = {n: known[planned] for n, planned in names.items()}
            variant.served = serve(interfaces, sources)
            variant.sources = sources
        return variant.sources

    def served(self) -> tuple[Served, ...]:
        """The sources of the active graph, each with the interfaces that it serves.

        Raises:
            PlanMismatchError: as for :meth:`sources_by_name`, or a boundary lacks a value that its
                source serves.
        """
        self.sources_by_name()
        for group in self.variant.served:
            if len(group.names) != len(group.source.specs):
                raise PlanMismatchError(
                    f"the source of {', '.join(map(repr, group.names))} serves "
                    f"{len(group.source.specs)} values, not all of which cross in this mode or for "
                    "these inputs; use one source for each interface"
                )
        return self.variant.served

    def find_inputs(self) -> dict[str, InputSource]:
        """The synthetic inputs of the active graph, by its own interface names."""
        known = self.inputs
        names = self._planned_names(self.variant.split.interfaces) if known else {}
        return {n: known[planned] for n, planned in names.items() if planned in known}

    def learner_names(self) -> dict[str, str]:
        """What :meth:`named_learners` calls the sources of the active graph, which may have other
        names for their interfaces than the plan.
        """
        planned = self._planned_names(self.variant.split.interfaces)
        return {n: self._leads[p] for n, p in planned.items()} | {
            f"{n}@input": f"{p}@input" for n, p in planned.items()
        }

    def parameter_names(self, stage: int) -> set[str]:
        """Names of the parameters that a stage uses in any mode and for any inputs so far."""
        whole = [v.split.stages for v in self.variants if len(v.cuts) == len(self.plan.cuts)]
        return {name for stages in whole for name in stages[stage].parameters}

    def _planned_names(self, interfaces: tuple[Interface, ...]) -> dict[str, str]:
        """What the plan calls the interfaces of another graph, where it has them."""
        planned = {n: i.name for i in self.interfaces for n in (*i.aliases, i.name)}
        # An interface's own name goes before others of its value.
        pairs = [(i.name, n) for i in interfaces for n in reversed((i.name, *i.aliases))]
        return {name: planned[n] for name, n in pairs if n in planned}

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        """A copy of model and sources under the same plan, traced anew at its first call."""
        model, mine = copy.deepcopy(self.model, memo), self.recipe
        context, opening = copy.deepcopy((mine.context, mine.opening), memo)
        other = Graphs(model, dataclasses.replace(mine, context=context, opening=opening))
        if self._plan is not None:
            other.synthesizers = copy.deepcopy(self.synthesizers, memo)
            other._plan, other._leads = self._plan, dict(self._leads)
        return other


def _outside_inference(add: Callable[[Any, Any], Variant], args: Any, kwargs: Any) -> Variant:
    """A new graph, made outside of inference mode, whose tensors no gradient may ever be asked of.

    Raises:
        DecouplingError: the model does something else in inference mode.
    """
    if not torch.is_inference_mode_enabled():
        return add(args, kwargs)
    with torch.inference_mode(False), torch.no_grad():
        args, kwargs = map_tensors(torch.clone, (args, kwargs))
        made = add(args, kwargs)
    if not made.is_current():
        raise DecouplingError(
            f"{type(made.trace.model).__name__} does something else in inference mode, where it "
            "cannot be traced: call it under torch.no_grad() instead"
        )
    return made


def _advice(model: nn.Module, cuts: Iterable[str]) -> str:
    """What to do about cuts that another graph of the model does not have."""
    modules = dict(model.named_modules())
    named = {c: modules.get(c.partition("@")[0]) for c in cuts}
    loose = [c for c, module in named.items() if module is None]
    if loose:
        return (
            "name cuts by modules that every mode runs, not by operations "
            f"({', '.join(map(repr, loose))}), which other graphs number anew"
        )
    frozen = [c for c, module in named.items() if module is not None and _is_frozen(module)]
    if frozen:
        return (
            "decouple again: no gradient needs to cross behind what is frozen "
            f"({', '.join(map(repr, frozen))})"
        )
    return "name cuts by modules that every mode runs"


def _is_frozen(module: nn.Module) -> bool:
    flags = [p.requires_grad for p in module.parameters()]
    return bool(flags) and not any(flags)


def _input_key(interface: str) -> str:
    """The name of an interface's synthetic input in the table of sources."""
    return f"{source_key(interface)}@input"


def _untraced(recipe: Recipe) -> DecouplingError:
    how = "pass example_inputs= to decouple, or call it once"
    if recipe.opening is not None:
        how = "call the trainer's .prepare(window) with one window"
    return DecouplingError(f"the model is not traced yet: {how}, before asking for this")

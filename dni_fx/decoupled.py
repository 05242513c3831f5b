"""A decoupled model: the user's model, its stages, and the sources of their gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import DecouplingError, PlanMismatchError
from .graphs.nested import Structure, flatten
from .graphs.variants import Passes, Variant
from .plan import CutPlan, Interface
from .runtime.emitted import keep_modes
from .sources import GradientSource, InputSource, Served, message_kinds, serve

if TYPE_CHECKING:
    from torch import fx

    from .passes.cut.emission import StageFunctions
    from .passes.cut.splitting import StageGraph
    from .sources import Prediction


_MOST_VARIANTS = 16


class Stage:
    """The nodes between two cuts, as a module and as an emitted training function.

    Attributes:
        index: position in program order.
        name: ``stage_0``, ``stage_1``, ...
    """

    def __init__(self, decoupled: Decoupled, index: int) -> None:
        self._decoupled = decoupled
        self.index = index
        self.name = f"stage_{index}"

    @property
    def module(self) -> fx.GraphModule:
        """The subgraph: positional inputs as in ``inputs``, a tuple of values as in ``outputs``."""
        return self._graph.module

    @property
    def step(self) -> fx.GraphModule:
        """The training function ``step(inputs, context=None, loss=None, target=None) ->
        StepResult``.

        ``inputs`` maps names to model inputs and to values that earlier stages sent; ``loss`` and
        ``target`` are for the last stage. Gradients accumulate in the parameters' ``.grad``.

        Raises:
            DecouplingError: a source of the stage waits for a message; its halves are what to call
                then.
        """
        self._decoupled.served()  # raises where a source lacks one of its values
        waiting = [n for n, s in self.sources.items() if s.lag is not None]
        if waiting:
            raise DecouplingError(
                f"the source at {waiting[0]!r} waits for a message from later stages, so "
                f"{self.name} has no step in one piece: train with dni_fx.Trainer, or call "
                "stage.forward and stage.backward apart"
            )
        return self._functions.step

    @property
    def forward(self) -> fx.GraphModule:
        """First half of ``step``: ``inputs -> (outputs, leaves, entries)``, keeping the autograd
        graph.
        """
        return self._functions.forward

    @property
    def backward(self) -> fx.GraphModule:
        """Second half: ``(outputs, leaves, entries, gradients, partials, retain_graph) -> input
        gradients``.
        """
        return self._functions.backward

    @property
    def code(self) -> str:
        """Python source of ``step``; of both halves where a source waits for a message."""
        waits = any(s.lag is not None for s in self.sources.values())
        parts = [self.forward, self.backward] if waits else [self.step]
        return "\n".join(self._decoupled._passes.readable_code(part) for part in parts)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the model inputs and of the earlier stages' values that the stage takes."""
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the values that the stage sends; ``("output",)`` for the last one."""
        return self._graph.outputs

    @property
    def sources(self) -> dict[str, GradientSource]:
        """The gradient source of every interface that the stage sends."""
        every = self._decoupled.sources_by_name()
        return {name: every[name] for name in self.outputs if name in every}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The stage's parameters under the model's names; those shared with other stages appear in
        each.
        """
        used = self._decoupled.parameter_names(self.index)
        for name, parameter in self._decoupled.model.named_parameters():
            if name in used:
                yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The stage's parameters."""
        return (p for _, p in self.named_parameters())

    def fit(
        self,
        predictions: Mapping[str, Prediction],
        targets: Mapping[str, torch.Tensor],
        **messages: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Train the stage's sources on what came back; gradients accumulate in the sources'
        parameters.

        Args:
            predictions: ``StepResult.predictions`` of this stage's step.
            targets: per interface the sum of its consumers' input gradients.
            **messages: ``loss=``, ``logits=`` or ``error=`` for sources that ask for these; see
                :attr:`GradientSource.message`.

        Returns:
            The loss of every source that learned, detached.

        Raises:
            DecouplingError: a source asks for a message that is not given.
        """
        losses: dict[str, torch.Tensor] = {}
        for group in self._decoupled.served():
            if group.name not in predictions:
                continue
            kinds = message_kinds(group.source)
            missing = [k for k in kinds if k != "gradient" and k not in messages]
            if missing:
                raise DecouplingError(
                    f"the source at {group.name!r} asks for its message: pass {missing[0]}= to fit"
                )
            message: list[torch.Tensor] = []
            for kind in kinds:
                message += (
                    [targets[n] for n in group.names if n in targets]
                    if kind == "gradient"
                    else [messages[kind]]
                )
            if "gradient" in kinds and any(n not in targets for n in group.names):
                continue
            with torch.enable_grad():
                loss = group.source.fit(predictions[group.name], tuple(message))
            if loss is not None:
                losses[group.name] = loss
        if losses:
            torch.autograd.backward(list(losses.values()))
        return {name: loss.detach() for name, loss in losses.items()}

    def __repr__(self) -> str:
        return f"<{self.name}: {', '.join(self.inputs)} -> {', '.join(self.outputs)}>"

    @property
    def _graph(self) -> StageGraph:
        return self._decoupled._variant_now().split.stages[self.index]

    @property
    def _functions(self) -> StageFunctions:
        self._decoupled._variant_now()
        return self._decoupled.functions()[self.index]


class Decoupled(nn.Module):
    """A model cut into stages; made by :func:`dni_fx.decouple`.

    Calling it runs the stages one after the other with ordinary autograd: outputs and gradients
    equal the model's. Decoupled training is :class:`dni_fx.Trainer` or ``stage.step``.

    Attributes:
        model: the user's module, trained in place.
        synthesizers: the gradient sources by interface name (dots as slashes), synthetic inputs as
            ``name@input``.
        context: turns a training target into what the sources see, or None.
    """

    def __init__(
        self, model: nn.Module, passes: Passes, context: Callable[[Any], torch.Tensor] | None
    ) -> None:
        super().__init__()
        self.model = model
        self.synthesizers = nn.ModuleDict()
        self.context = context
        self.training = model.training
        object.__setattr__(self, "_passes", passes)
        object.__setattr__(self, "_variants", [])
        object.__setattr__(self, "_active", None)
        object.__setattr__(self, "_plan", None)
        object.__setattr__(self, "_stages", ())
        object.__setattr__(self, "_leads", {})

    _passes: Passes
    _variants: list[Variant]
    _active: Variant | None
    _plan: CutPlan | None
    _stages: tuple[Stage, ...]
    _leads: dict[str, str]

    @property
    def is_traced(self) -> bool:
        """Whether stages exist; without example inputs they are made at the first call."""
        return self._plan is not None

    @property
    def plan(self) -> CutPlan:
        """The cuts, stages and interfaces."""
        if self._plan is None:
            raise DecouplingError(
                "the model is not traced yet: pass example_inputs= to decouple, or call it once, "
                "before asking for this"
            )
        return self._plan

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in program order."""
        self.plan  # noqa: B018  raises where there are none yet
        return self._stages

    @property
    def interfaces(self) -> tuple[Interface, ...]:
        """The values that carry a gradient across cuts."""
        return self.plan.interfaces

    @property
    def sources(self) -> dict[str, GradientSource]:
        """Gradient sources by interface name; one that serves a whole boundary stands at each of
        its interfaces.
        """
        key = self._passes.key
        return {i.name: self.synthesizers[key(self._leads[i.name])] for i in self.plan.interfaces}  # type: ignore[misc]

    @property
    def inputs(self) -> dict[str, InputSource]:
        """Synthetic inputs by interface name; empty without a forward unlock."""
        keys = {i.name: f"{self._passes.key(i.name)}@input" for i in self.plan.interfaces}
        return {n: self.synthesizers[k] for n, k in keys.items() if k in self.synthesizers}  # type: ignore[misc]

    def named_learners(self, stages: Collection[int] | None = None) -> list[tuple[str, nn.Module]]:
        """Gradient sources, once each, by the first interface that they serve; synthetic inputs as
        ``name@input``.

        Args:
            stages: only the sources that these stages ask, and the synthetic inputs that they use;
                None: all.
        """
        asked = range(len(self.stages)) if stages is None else stages
        users = {i.name: i.consumers for i in self.interfaces}
        groups: list[tuple[str, nn.Module]] = [
            (g.name, g.source) for g in serve(self.interfaces, self.sources) if g.producer in asked
        ]
        return groups + [
            (f"{n}@input", s) for n, s in self.inputs.items() if any(c in asked for c in users[n])
        ]

    @property
    def is_exact(self) -> bool:
        """Whether the stages are trained with the true gradients."""
        return any(s.exact for s in self.sources.values())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the composed stages, called as the model is; outputs and gradients equal the model's."""
        values = self.bind(*args, **kwargs)
        with keep_modes():
            return self._passes.run(self._variant.split, values)

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Model inputs by name, as ``stage.step`` takes them; makes or finds the stages that fit
        the call.

        Raises:
            PlanMismatchError: an empty batch, or stages for this kind of call cannot be cut by the
                plan.
        """
        leaves, structure = flatten((args, kwargs))
        for name, leaf in enumerate(leaves):
            if leaf.dim() and leaf.shape[0] == 0:
                raise PlanMismatchError(
                    f"tensor input {name} has an empty batch: its shape is {tuple(leaf.shape)}"
                )
        self._select(args, kwargs, structure, leaves)
        return dict(zip(self._variant.split.model_inputs, leaves, strict=True))

    def has_graph_for(self, *args: Any, **kwargs: Any) -> bool:
        """Whether stages for this kind of call exist, so that ``bind`` need not trace."""
        leaves, structure = flatten((args, kwargs))
        return any(v.accepts(structure, leaves, self._passes.guards_hold) for v in self._variants)

    @property
    def _variant(self) -> Variant:
        self.plan  # noqa: B018  raises before tracing
        assert self._active is not None
        return self._active

    def _variant_now(self) -> Variant:
        """The graph for the mode that the model is in now, where one was made already."""
        if not self._variant.is_current():
            for variant in self._variants:
                if variant.is_current():
                    object.__setattr__(self, "_active", variant)
        return self._variant

    def _select(
        self, args: Any, kwargs: Any, structure: Structure, leaves: list[torch.Tensor]
    ) -> None:
        guards_hold = self._passes.guards_hold
        if self._active is not None and self._active.accepts(structure, leaves, guards_hold):
            return
        for variant in self._variants:
            if variant.accepts(structure, leaves, guards_hold):
                object.__setattr__(self, "_active", variant)
                return
        self._add_variant(args, kwargs)

    def _add_variant(self, args: Any, kwargs: Any) -> None:
        """Trace for a new kind of call, under the plan if there is one."""
        variant = self._passes.build(self.model, args, kwargs, self._plan)
        if self._plan is None:
            plan, sources, inputs = self._passes.make_plan(variant)
            for group in serve(plan.interfaces, sources):
                self.synthesizers[self._passes.key(group.name)] = group.source
                self._leads.update(dict.fromkeys(group.names, group.name))
            for name, predicted in inputs.items():
                self.synthesizers[f"{self._passes.key(name)}@input"] = predicted
            object.__setattr__(self, "_plan", plan)
            object.__setattr__(
                self, "_stages", tuple(Stage(self, k) for k in range(len(variant.split.stages)))
            )
        for other in self._variants:
            if other.absorb(variant):
                object.__setattr__(self, "_active", other)
                return
        kept = [v for v in self._variants if not v.is_outdated()]
        self._variants[:] = [
            *kept[:1],
            *kept[1:][-_MOST_VARIANTS:],
            variant,
        ]  # the first is what the plan was made for
        object.__setattr__(self, "_active", variant)

    def parameter_names(self, stage: int) -> set[str]:
        """Names of the parameters that a stage uses in any mode and for any inputs traced so far."""
        whole = [v.split.stages for v in self._variants if len(v.cuts) == len(self.plan.cuts)]
        return {name for stages in whole for name in stages[stage].parameters}

    def functions(self) -> tuple[StageFunctions, ...]:
        """The emitted functions of the active graph, written when first trained with."""
        variant = self._variant
        if len(variant.cuts) < len(self.plan.cuts):
            missing = [c for c in self.plan.cuts if c not in variant.cuts]
            raise PlanMismatchError(
                "in this mode or for these inputs the model cannot be cut after "
                f"{', '.join(map(repr, missing))}: it can be evaluated but not trained; name cuts "
                "by modules that every mode runs"
            )
        if not variant.functions:
            variant.functions = self._passes.emit(variant.split, self.sources_by_name())
        return variant.functions

    def sources_by_name(self) -> dict[str, GradientSource]:
        """The source of every interface of the active graph.

        Raises:
            PlanMismatchError: this graph, made for other inputs or another mode, needs a source
                that the plan lacks.
        """
        variant = self._variant
        if variant.sources is None:
            sources = self._find_sources(variant)
            variant.served = serve(variant.split.interfaces, sources)
            variant.sources = sources
        return variant.sources

    def served(self) -> tuple[Served, ...]:
        """The sources of the active graph, each with the interfaces that it serves.

        Raises:
            PlanMismatchError: as for :meth:`sources_by_name`, or a boundary lacks a value that its
                source serves.
        """
        self.sources_by_name()
        for group in self._variant.served:
            if len(group.names) != len(group.source.specs):
                raise PlanMismatchError(
                    f"the source of {', '.join(map(repr, group.names))} serves "
                    f"{len(group.source.specs)} values, not all of which cross in this mode or for "
                    "these inputs; use one source for each interface"
                )
        return self._variant.served

    def find_inputs(self) -> dict[str, InputSource]:
        """The synthetic inputs of the active graph, by its own interface names."""
        known, plan = (
            self.inputs,
            {n: i.name for i in self.plan.interfaces for n in (*i.aliases, i.name)},
        )
        found = {}
        for interface in self._variant.split.interfaces if known else ():
            name = next((plan[n] for n in (interface.name, *interface.aliases) if n in plan), None)
            if name in known:
                found[interface.name] = known[name]
        return found

    def _find_sources(self, variant: Variant) -> dict[str, GradientSource]:
        known = {
            name: self.sources[i.name]
            for i in self.plan.interfaces
            for name in (*i.aliases, i.name)
        }
        found: dict[str, GradientSource] = {}
        missing = []
        for interface in variant.split.interfaces:
            names = [n for n in (interface.name, *interface.aliases) if n in known]
            if names:
                found[interface.name] = known[names[0]]
            else:
                missing.append(interface.name)
        if missing:
            raise PlanMismatchError(
                f"gradients now cross at {', '.join(map(repr, missing))}, where the plan has no "
                "source (a parameter was unfrozen, or the model takes another path for these "
                "inputs or in this mode); decouple again"
            )
        return found

    def as_module(
        self,
        synthesizer_optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.Adam,
        context: Callable[..., Any] | None = None,
        unit: float | Callable[[], float] = 1.0,
    ) -> nn.Module:
        """The model as a module that trains decoupled in an ordinary loop.

        ``loss = criterion(m(x), y); loss.backward(); optimizer.step()``. It is of a subclass of the
        model's class, with its signature, its parameters (by reference) and its ``state_dict``. In
        evaluation mode and under ``no_grad`` it is the model. The stages' activations are freed one
        stage after the other; the sources learn in ``backward``, for which those that learn from
        gradients are asked again. A call's gradients are handed over once: losses are added up
        before ``backward``. What is not finite teaches no source.

        The unit rule: where the loss is not the mean loss itself but a multiple of it, as with a
        GradScaler (``unit=scaler.get_scale``) or accumulation over n batches (``unit=1 / n``),
        ``unit`` says which. What the sources predict is multiplied by it and what they learn from
        divided, so that all stages' gradients have one scale. A source that learns from arriving
        gradients would find a constant factor by itself, others could not.

        Args:
            synthesizer_optimizer: makes an optimiser from a source's ``(name, parameter)`` pairs;
                it steps in ``backward``.
            context: takes the call's arguments and returns the training target that the sources may
                see, such as ``lambda *, labels, **_: labels``; or use ``with m.context(y):``, which
                goes before it.
            unit: the factor in front of the mean loss, or a function that returns it.

        Returns:
            The module.

        Raises:
            DecouplingError: a source that waits, or learns from more than the sum of its gradients;
                synthetic inputs.
        """
        from .runtime.module import make_module

        return make_module(self, synthesizer_optimizer, context, unit)

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoupled:
        """A copy of model and sources under the same plan, traced anew at its first call."""
        other = Decoupled(
            copy.deepcopy(self.model, memo), self._passes, copy.deepcopy(self.context, memo)
        )
        if self._plan is not None:
            other.synthesizers = copy.deepcopy(self.synthesizers, memo)
            object.__setattr__(other, "_plan", self._plan)
            object.__setattr__(other, "_leads", dict(self._leads))
            object.__setattr__(
                other, "_stages", tuple(Stage(other, k) for k in range(len(self._stages)))
            )
        return other

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a Decoupled object is not pickled: save its state_dict() and plan.to_json(), and "
            "decouple again"
        )

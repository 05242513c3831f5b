"""The optimisers of stages and of their sources: made, adopted, clipped, stepped, saved."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..errors import DecouplingError
from ..graphs.graphs import Graphs
from ..graphs.stage import Stage
from ..graphs.variants import Variant
from ..sources import default_optimizer
from .delays import find_delays, moved_along
from .joint import JointStep
from .whole import remembered, whole

NamedParameters = list[tuple[str, nn.Parameter]]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
LrScale = str | Mapping[str, float] | None


class StageOptimizers:
    """Every stage's optimiser, which owns that stage's parameters and no other, and the sources'.

    Args:
        make: makes an optimiser from the ``(name, parameter)`` pairs of one stage.
        make_for_sources: the same for a source; None for
            :func:`~dni_fx.sources.default_optimizer`.
        clip_norm: largest norm of one stage's gradients; None for no bound.
        unit: the factor in front of the mean loss, which sources are told.
        lr_scale: what the learning rates of a stage are multiplied with when its optimiser is made:
            by stage name, or ``"delay"`` for 1 / (1 + delay).

    Attributes:
        stages: the optimisers by stage name; a stage without parameters has none.
        sources: by interface name, that of a synthetic input by ``name@input``.
        make, make_for_sources: as given.
        parameters: what each stage's optimiser was given. A parameter used by several stages is
            given to the first of them.
    """

    def __init__(
        self,
        make: MakeOptimizer,
        make_for_sources: MakeOptimizer | None,
        clip_norm: float | None,
        unit: float,
        lr_scale: LrScale = None,
    ) -> None:
        self.make, self.make_for_sources = make, make_for_sources
        self.clip_norm, self.unit, self.lr_scale = clip_norm, unit, lr_scale
        self.stages: dict[str, torch.optim.Optimizer] = {}
        self.sources: dict[str, torch.optim.Optimizer] = {}
        self.parameters: dict[str, NamedParameters] = {}
        self._step = JointStep()
        self._variant: Variant | None = None  # the graph that all optimisers know
        self._scales: dict[str, float] = {}

    @property
    def is_prepared(self) -> bool:
        """Whether they have been made."""
        return self._variant is not None

    def prepare(self, graphs: Graphs, stages: Collection[Stage]) -> None:
        """Make all optimisers of the stages that are trained here, at the first call; later, have
        them adopt what only a graph made since uses, say that of training mode after one of
        evaluation.

        Raises:
            DecouplingError: what was returned is no optimiser, or steps what it was not given;
                rates of stages that there are not.
        """
        variant = graphs.variant
        if self._variant is variant:
            return
        if self._variant is None:
            self._scales = self._find_scales(graphs)
        self.adopt(stages)
        if self._variant is None:
            for source in graphs.sources.values():
                source.unit = self.unit
            here = {stage.index for stage in stages}
            self.sources.update(source_optimizers(graphs, self.make_for_sources, here))
        self._variant = variant

    def adopt(self, stages: Collection[Stage]) -> None:
        """Take in what no optimiser has yet."""
        for name, new in self._unowned(stages).items():
            if optimizer := self.stages.get(name):
                named = "param_names" in optimizer.param_groups[0]
                optimizer.add_param_group({"params": new if named else [p for _, p in new]})
                groups = optimizer.param_groups[-1:]
            else:
                self.stages[name] = _made_for(name, self.make, new, "optimizer")
                groups = self.stages[name].param_groups
            for group in groups if name in self._scales else ():
                group["lr"] = group["lr"] * self._scales[name]
            self.parameters.setdefault(name, []).extend(new)

    def _find_scales(self, graphs: Graphs) -> dict[str, float]:
        """What the rates of each stage are multiplied with, by name."""
        count, asked = len(graphs.variant.split.stages), self.lr_scale
        names = [f"stage_{k}" for k in range(count)]
        if asked is None:
            return {}
        if asked == "delay":
            delays = find_delays(graphs.served(), count)
            return {n: 1 / (1 + math.ceil(delays[k] * self.unit)) for k, n in enumerate(names)}
        assert not isinstance(asked, str)
        if unknown := sorted(set(asked) - set(names)):
            raise DecouplingError(
                f"lr_scale= names no stage: {', '.join(map(repr, unknown))}; the stages are "
                f"{names[0]} to {names[-1]}"
            )
        return dict(asked)

    def _unowned(self, stages: Collection[Stage]) -> dict[str, NamedParameters]:
        """Parameters that no optimiser has yet, by the first stage that uses them."""
        owned = {p for group in self.parameters.values() for _, p in group}
        found = {}
        for stage in stages:
            if new := [(n, p) for n, p in stage.named_parameters() if p not in owned]:
                found[stage.name] = new
                owned.update(p for _, p in new)
        return found

    def made_for_source(self, name: str, source: nn.Module) -> torch.optim.Optimizer:
        """A new optimiser for a source, or for a copy of one."""
        return _made_for_source(name, self.make_for_sources, source)

    def parameters_of(self, stage: str) -> list[nn.Parameter]:
        """The parameters that a stage's optimiser was given."""
        return [p for _, p in self.parameters.get(stage, [])]

    def every(self) -> list[torch.optim.Optimizer]:
        """All optimisers, the stages' first."""
        return [*self.stages.values(), *self.sources.values()]

    def remember(self) -> Callable[[], None]:
        """Puts back what the next step will change."""
        restores = [remembered(o) for o in self.every()]

        def restore() -> None:
            with torch.no_grad():
                for each in restores:
                    each()

        return restore

    def ahead(
        self, stage: int, steps: int, own: Collection[nn.Parameter]
    ) -> AbstractContextManager[None]:
        """Inside, a stage's own weights are where so many steps would take them."""
        updates = math.ceil(steps * self.unit)
        return moved_along(self.stages.get(f"stage_{stage}"), own, updates)

    def step(self) -> None:
        """Step all of them, or none where one fails."""
        every = self.every()
        with whole(every):
            for name in self.stages:
                self.clip(name, self.clip_norm)
            self._step(every)

    def clip(self, name: str, clip_norm: float | None) -> None:
        """Clip one stage's gradients to a norm; None for no bound."""
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters_of(name), clip_norm)

    def _by_kind(self) -> dict[str, dict[str, torch.optim.Optimizer]]:
        return {"optimizers": self.stages, "synthesizer_optimizers": self.sources}

    def state_dict(self) -> dict[str, Any]:
        """The optimisers' states, under ``optimizers`` and ``synthesizer_optimizers``."""
        kinds = self._by_kind().items()
        return {kind: {n: o.state_dict() for n, o in mine.items()} for kind, mine in kinds}

    def check_state(self, state: Mapping[str, Any], stages: Collection[Stage]) -> bool:
        """Whether a state fits only once what newer graphs use is adopted, as it was when saved.

        Raises:
            DecouplingError: it does not fit then, either.
        """
        adopts = False
        for kind, mine in self._by_kind().items():
            new = self._unowned(stages) if kind == "optimizers" else {}
            adopts |= fits_later(kind, mine, state[kind], {n: len(p) for n, p in new.items()})
        return adopts

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        for kind, mine in self._by_kind().items():
            load_optimizers(mine, state[kind])


def fits_later(
    kind: str,
    optimizers: Mapping[str, torch.optim.Optimizer],
    states: Mapping[str, Any],
    new: Mapping[str, int] | None = None,
) -> bool:
    """Whether states fit only once new parameters make groups of their own; how many, by name.

    Raises:
        DecouplingError: they do not fit then, either; ``kind`` is what they are called.
    """
    now = {n: _sizes(o.param_groups) for n, o in optimizers.items()}
    then = now | {n: [*now.get(n, []), count] for n, count in (new or {}).items()}
    if set(states) not in (set(now), set(then)):
        raise DecouplingError(
            f"this state has {kind} for {sorted(states)}, but here are {sorted(now)}: decouple "
            "with the plan that the state was saved with"
        )
    saved = {n: _sizes(s["param_groups"]) for n, s in states.items()}
    if saved not in (now, then):
        name = next(n for n in saved if saved[n] != now.get(n))
        raise DecouplingError(
            f"this state does not fit: the optimiser of {name!r} has groups of {saved[name]} "
            f"parameters in it, but of {now.get(name)} here; make the optimisers as they were "
            "made then, and call the model in the modes and order in which it was called before "
            "the state was saved, since what only a later call uses makes a group of its own"
        )
    return saved != now


def load_optimizers(
    optimizers: Mapping[str, torch.optim.Optimizer], states: Mapping[str, Any]
) -> None:
    """Take up copies of states, by name: torch would go on in the tensors that it is given."""
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(copy.deepcopy(states[name]))


def find_misfit(have: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """The first difference between two modules' states, in words; None where one can be loaded into
    the other.
    """
    for name in {**have, **given}:
        mine, other = (_shape(state, name) for state in (have, given))
        if mine != other and ("missing" in (mine, other) or not name.endswith("_extra_state")):
            return f"{name!r} is {other} in it, but {mine} here"
    return None


def _shape(state: Mapping[str, Any], name: str) -> str:
    return str(tuple(getattr(state[name], "shape", ()))) if name in state else "missing"


def _sizes(groups: list[dict[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def source_optimizers(
    graphs: Graphs, make: MakeOptimizer | None, stages: Collection[int] | None = None
) -> dict[str, torch.optim.Optimizer]:
    """A new one for every source of some stages, or of all, that has parameters.

    Raises:
        DecouplingError: what was returned is no optimiser, or steps what it was not given.
    """
    named = [(n, s) for n, s in graphs.named_learners(stages) if any(True for _ in s.parameters())]
    return {name: _made_for_source(name, make, source) for name, source in named}


def _made_for_source(
    name: str, make: MakeOptimizer | None, source: nn.Module
) -> torch.optim.Optimizer:
    learnt = list(source.named_parameters())
    if make is None:
        return default_optimizer(source, learnt)
    return _made_for(f"the source at {name!r}", make, learnt, "synthesizer_optimizer")


def _made_optimizer(optimizer: Any, name: str) -> torch.optim.Optimizer:
    """What a user's function, the argument ``name``, made, if it can step once a batch."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise DecouplingError(
            f"{name}= must return a torch.optim.Optimizer, but returned {type(optimizer).__name__}"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise DecouplingError(
            f"{name}= returned LBFGS, which evaluates the loss several times a step: use another"
        )
    return optimizer


def _made_for(
    owner: str, make: MakeOptimizer, given: NamedParameters, argument: str
) -> torch.optim.Optimizer:
    """A new optimiser that steps nothing but what it was given: else that would be stepped several
    times a step.
    """
    made, mine = _made_optimizer(make(given), argument), {p for _, p in given}
    held = [p for group in made.param_groups for p in group["params"]]
    if strange := sum(p not in mine for p in held):
        raise DecouplingError(
            f"{argument}= returned an optimiser for {owner} that steps {strange} parameters of "
            f"others besides {len(held) - strange} of its own: it is called once for each, and "
            "must make a new optimiser of the (name, parameter) pairs that it is given, such as "
            "lambda parameters: torch.optim.Adam(parameters)"
        )
    return made

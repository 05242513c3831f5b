"""The optimisers of stages and of their sources: made, adopted, clipped, stepped, saved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import DecouplingError
from ..graphs.graphs import Graphs
from ..graphs.stage import Stage
from .whole import whole

NamedParameters = list[tuple[str, nn.Parameter]]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


class NotMade(dict[str, torch.optim.Optimizer]):
    """Optimisers of a model that was not traced: none, which nobody should schedule."""

    def _refuse(self, *_: Any) -> Any:
        raise DecouplingError(
            "the optimisers are made when the model is traced, which happens at its first call: "
            "decouple with example_inputs=, or call prepare(x) on a trainer through time, before "
            "making schedulers"
        )

    __iter__ = __getitem__ = keys = values = items = get = _refuse


class StageOptimizers:
    """Every stage's optimiser, which owns that stage's parameters and no other, and the sources'.

    Args:
        make: makes an optimiser from the ``(name, parameter)`` pairs of one stage.
        make_for_sources: the same for a source.
        clip_norm: largest norm of one stage's gradients; None for no bound.

    Attributes:
        stages: the optimisers by stage name; a stage without parameters has none.
        sources: by interface name, that of a synthetic input by ``name@input``.
        parameters: what each stage's optimiser was given. A parameter used by several stages is
            given to the first of them.
    """

    def __init__(
        self, make: MakeOptimizer, make_for_sources: MakeOptimizer, clip_norm: float | None
    ) -> None:
        self._make, self._make_for_sources = make, make_for_sources
        self.clip_norm = clip_norm
        self.stages: dict[str, torch.optim.Optimizer] = {}
        self.sources: dict[str, torch.optim.Optimizer] = {}
        self.parameters: dict[str, NamedParameters] = {}
        self._variant: Any = None  # the graph that all optimisers know

    def prepare(self, graphs: Graphs, stages: Collection[Stage], unit: float) -> None:
        """Make all optimisers, at the first call; later, have them adopt what a new graph uses.

        Args:
            graphs: of the model; the one that is trained is active.
            stages: those that are trained here.
            unit: the factor in front of the mean loss, which sources are told.

        Raises:
            DecouplingError: what was returned is no optimiser, or steps what it was not given.
        """
        variant = graphs.variant
        if self._variant is variant:
            return
        self.adopt(stages)
        if self._variant is None:
            for source in graphs.sources.values():
                source.unit = unit
            for name, learner in graphs.named_learners({stage.index for stage in stages}):
                learnt = list(learner.named_parameters())
                if learnt:
                    self.sources[name] = self.made_for_source(name, learnt)
        self._variant = variant

    def adopt(self, stages: Iterable[Stage]) -> None:
        """Take in parameters that no optimiser has yet: at first all, then those that only a graph
        made later uses, say that of training mode after one of evaluation.
        """
        owned = {p for group in self.parameters.values() for _, p in group}
        for stage in stages:
            new = [(n, p) for n, p in stage.named_parameters() if p not in owned]
            owned.update(p for _, p in new)
            if not new:
                continue
            if optimizer := self.stages.get(stage.name):
                named = "param_names" in optimizer.param_groups[0]
                optimizer.add_param_group({"params": new if named else [p for _, p in new]})
            else:
                made = made_optimizer(self._make(new), "optimizer")
                _check_owned(made, new, "optimizer", stage.name)
                self.stages[stage.name] = made
            self.parameters.setdefault(stage.name, []).extend(new)

    def made_for_source(self, name: str, learnt: NamedParameters) -> torch.optim.Optimizer:
        """A new optimiser for a source, or for a copy of one."""
        made = made_optimizer(self._make_for_sources(learnt), "synthesizer_optimizer")
        _check_owned(made, learnt, "synthesizer_optimizer", f"the source at {name!r}")
        return made

    def parameters_of(self, stage: str) -> list[nn.Parameter]:
        """The parameters that a stage's optimiser was given."""
        return [p for _, p in self.parameters.get(stage, [])]

    def step(self) -> None:
        """Step all of them, or none where one fails."""
        with whole([*self.stages.values(), *self.sources.values()]):
            for name, optimizer in self.stages.items():
                self.clip(name)
                optimizer.step()
            for optimizer in self.sources.values():
                optimizer.step()

    @property
    def are_made(self) -> bool:
        """Whether the model was traced, after which they are."""
        return self._variant is not None

    def clip(self, name: str) -> None:
        """Clip one stage's gradients."""
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters_of(name), self.clip_norm)

    def state_dict(self) -> dict[str, Any]:
        """The optimisers' states, under ``optimizers`` and ``synthesizer_optimizers``."""
        return {
            "optimizers": {n: o.state_dict() for n, o in self.stages.items()},
            "synthesizer_optimizers": {n: o.state_dict() for n, o in self.sources.items()},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Whether a state is of these optimisers.

        Raises:
            DecouplingError: it is of other stages or sources.
        """
        for kind, mine in (("optimizers", self.stages), ("synthesizer_optimizers", self.sources)):
            if set(state[kind]) != set(mine):
                raise DecouplingError(
                    f"this state has {kind} for {sorted(state[kind])}, but the trainer has "
                    f"{sorted(mine)}: decouple with the plan that the state was saved with"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        for kind, mine in (("optimizers", self.stages), ("synthesizer_optimizers", self.sources)):
            for name, optimizer in mine.items():
                optimizer.load_state_dict(state[kind][name])


def made_optimizer(optimizer: Any, name: str) -> torch.optim.Optimizer:
    """What a user's function made, if it can step once a batch.

    Args:
        optimizer: what the function returned.
        name: the argument that the function was passed as, for the error.

    Raises:
        DecouplingError: it is no optimiser, or one that evaluates the loss several times a step.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise DecouplingError(
            f"{name}= must return a torch.optim.Optimizer, but returned {type(optimizer).__name__}"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise DecouplingError(
            f"{name}= returned LBFGS, which evaluates the loss several times a step; use another "
            "one"
        )
    return optimizer


def _check_owned(
    optimizer: torch.optim.Optimizer, given: NamedParameters, argument: str, owner: str
) -> None:
    """An optimiser that steps more than it was given would step that several times a step."""
    mine = {p for _, p in given}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strange = sum(p not in mine for p in held)
    if strange:
        raise DecouplingError(
            f"{argument}= returned an optimiser for {owner} that steps {strange} parameters of "
            f"others besides {len(held) - strange} of its own: it is called once for each, and "
            "must make a new optimiser of the (name, parameter) pairs that it is given, such as "
            "lambda parameters: torch.optim.Adam(parameters)"
        )

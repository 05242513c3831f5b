"""The trainer: runs the emitted functions in order, fits the sources, steps the optimisers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..decoupled import Decoupled, Stage
from ..diagnostics import Diagnosis
from ..errors import DecouplingError, NonFiniteError
from ..graphs.nested import map_tensors, unpack_batch
from ..parallel.executors import ThreadCrew
from ..passes.trace.state import restored, rng_state, set_rng_state
from ..reports.steps import InterfaceReport, StepReport, compare
from ..schedules import Mode, Schedule, Threads, make_schedule
from .emitted import all_finite, evaluate, keep_modes
from .in_turn import Run
from .tape import AllOrNothing

NamedParameters = list[tuple[str, nn.Parameter]]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


class Trainer:
    """Trains a decoupled model, every stage with an optimiser of its own.

    A step runs the stages one after the other: each runs forward, asks its sources for the
    gradients of what it sends, and pulls them back; the input gradients of the next stage are the
    targets of its sources (bootstrapped: Jaderberg et al. 2016, arXiv:1608.05343, section 2). A
    stage whose source waits for a message is pulled back when that is there, in the same step or a
    later one. Updates happen at the end of the step, once everything is known to be finite; since
    no stage reads another's parameters, that changes no number.

    Args:
        decoupled: the model.
        loss: ``loss(output, target)``, a scalar tensor; ``lambda out, _: out.loss`` for models that
            compute their own.
        optimizer: makes an optimiser from the ``(name, parameter)`` pairs of one stage, which
            torch.optim takes as they are. A parameter used by several stages is given to the first
            of them.
        synthesizer_optimizer: the same for the sources; Adam by default.
        schedule: which stages a step updates, and how much of the true gradient they get:
            ``"sequential"`` (all, none), ``"random"``, or one of :mod:`dni_fx.schedules`.
        clip_norm: largest norm of one stage's gradients. It is per stage: a global norm would have
            to wait for all.
        accumulate: how many steps' gradients make one update; the loss of each counts 1 /
            accumulate.
        metrics_every: how often the predictions are compared with their targets, in steps.

    Attributes:
        optimizers: by stage name, for learning-rate schedulers.
        synthesizer_optimizers: by interface name, that of a synthetic input by ``name@input``.
        steps: number of steps made.

    Raises:
        DecouplingError: arguments of the wrong kind.
    """

    def __init__(
        self,
        decoupled: Decoupled,
        loss: Callable[[Any, Any], torch.Tensor],
        *,
        optimizer: MakeOptimizer,
        synthesizer_optimizer: MakeOptimizer = torch.optim.Adam,
        schedule: str | Schedule = "sequential",
        clip_norm: float | None = None,
        accumulate: int = 1,
        metrics_every: int = 50,
    ) -> None:
        if not isinstance(decoupled, Decoupled):
            raise DecouplingError(
                f"Trainer takes what dni_fx.decouple returned, not {type(decoupled).__name__}"
            )
        self.schedule = make_schedule(schedule)
        if not callable(loss) or not callable(optimizer) or not callable(synthesizer_optimizer):
            raise DecouplingError("loss, optimizer and synthesizer_optimizer must be callables")
        if not all(type(n) is int and n >= 1 for n in (accumulate, metrics_every)):
            raise DecouplingError("accumulate and metrics_every must be whole numbers, at least 1")
        if clip_norm is not None and not (isinstance(clip_norm, int | float) and clip_norm > 0):
            raise DecouplingError(f"clip_norm must be positive, not {clip_norm!r}")
        self.decoupled, self.loss = decoupled, loss
        self.clip_norm, self.accumulate, self.metrics_every = clip_norm, accumulate, metrics_every
        self._make_optimizer, self._make_synthesizer_optimizer = optimizer, synthesizer_optimizer
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.synthesizer_optimizers: dict[str, torch.optim.Optimizer] = {}
        self.steps = 0
        self._measured: dict[str, InterfaceReport] = {}
        self._measure_next = False
        self._clock = 0
        self._under_way: list[Run] = []
        self._adopted: Any = None
        self._crew: ThreadCrew | None = None
        if decoupled.is_traced:
            self._make_optimizers()

    # ---- one step --------------------------------------------------------------------------------

    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> StepReport:
        """Train on one batch: the model's own call, plus the target.

        Args:
            *args: positional inputs of the model.
            target: what the loss and the context take.
            **kwargs: keyword inputs of the model.

        Returns:
            Loss, outputs and, every ``metrics_every`` steps, how good the predictions were.

        Raises:
            NonFiniteError: a value or gradient is NaN or infinite; named, and nothing is updated.
            DecouplingError: inputs that do not fit the plan, or a loss that is no scalar.

        After any error parameters, buffers, sources, random states and the gradients of an
        unfinished update are as they were before. Those of a finished update are dropped when the
        next step starts, as ``zero_grad`` would.
        """
        if isinstance(self.schedule, Threads):
            return self._step_on_threads(self.schedule, args, kwargs, target)
        values = self.decoupled.bind(*args, **kwargs)
        self._make_optimizers()
        self._adopt_parameters()
        mode = self._mode()
        if self._is_exact:
            mode = Mode(1.0, mode.active)
        run = Run(self.decoupled, self._scaled_loss, mode, self.loss, ask=not self._is_exact)
        output: list[Any] = []

        def begin() -> None:
            run.begin(values, self._context(target), target, self._clock)
            output.append(run.output)

        self._advance(run, begin)
        self.steps += 1
        loss = torch.tensor(math.nan) if run.loss is None else run.loss * self.accumulate
        return StepReport(loss, output[0], dict(self._measured), self.steps)

    def _mode(self) -> Mode:
        mode = self.schedule.mode(self.steps, len(self.decoupled.stages))
        if mode.active and max(mode.active) >= len(self.decoupled.stages):
            raise DecouplingError(
                f"the schedule {self.schedule!r} names stage {max(mode.active)}, but there are "
                f"{len(self.decoupled.stages)}, counted from 0"
            )
        return mode

    def _step_on_threads(
        self, schedule: Threads, args: Any, kwargs: Any, target: Any
    ) -> StepReport:
        args, kwargs, target = map_tensors(
            torch.clone, (args, kwargs, target)
        )  # the caller may write into its own
        if not self.decoupled.has_graph_for(*args, **kwargs):
            self.drain()  # a model is traced while nothing else uses it
        values = self.decoupled.bind(*args, **kwargs)
        self._make_optimizers()
        self._adopt_parameters()
        try:
            if self._crew is None:
                self._crew = ThreadCrew(self, schedule.flow)
            self._crew.submit(self._crew.make_jobs(self.steps, self._mode(), values, target))
            self._measure_next = False
            self.steps += 1
            return self._crew.report(self.steps)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the threads of ``schedules.Threads``, without waiting for batches that are under way;
        else do nothing.
        """
        crew, self._crew = self._crew, None
        if crew is not None:
            crew.close()

    def drain(self) -> int:
        """Finish the batches that are under way, each of whose messages comes a step later, without
        new ones.

        Returns:
            How many steps of time that took: 0 where no source is late. Each makes an update,
                unless one that
            ``accumulate`` has begun is under way: what comes late is added to that.

        Raises:
            DecouplingError: a source waits for something that does not come.
        """
        if self._crew is not None:
            try:
                return self._crew.drain()
            except BaseException:
                self.close()
                raise
        self.decoupled.plan  # noqa: B018  raises before the model is traced
        longest = sum(source.lag or 0 for source in self.decoupled.sources.values()) + len(
            self.decoupled.stages
        )
        count = 0
        while self._under_way:
            if count > longest:
                raise DecouplingError(
                    f"{len(self._under_way)} batches wait for messages that do not come"
                )
            self._advance(None, lambda: None)
            count += 1
        return count

    def _advance(self, run: Run | None, begin: Callable[[], None]) -> None:
        """One step of time: a new batch, everything that waited until now, and the update."""
        runs = [*self._under_way, *([] if run is None else [run])]
        restores = [r.snapshot() for r in self._under_way]
        unfinished = self.steps % self.accumulate != 0
        try:
            with self._all_or_nothing.step(unfinished) as before, keep_modes(), torch.enable_grad():
                begin()
                for each in reversed(
                    runs
                ):  # the new batch first: what the schedule leaves out of it is dropped
                    each.advance(self._clock)
                    if each is run and len(run.active) < len(self.decoupled.stages):
                        self._drop_gradients(run)
                losses = [pair for each in runs for pair in each.fit()]
                if losses:
                    # A failure must leave the graphs of sources whose message came late.
                    torch.autograd.backward(
                        [loss for _, loss in losses], retain_graph=bool(self._under_way)
                    )
                self._check_finite(runs, [(n, loss.detach()) for n, loss in losses])
                for (
                    parameter,
                    held,
                ) in before.held:  # earlier steps' part of the same update, added as autograd would
                    parameter.grad = held if parameter.grad is None else held.add_(parameter.grad)
                if self._measure_next or self.steps % self.metrics_every == 0:
                    for each in runs:
                        self._measured.update(each.compare(self.steps))
                    self._measure_next = False
                if (self.steps + (run is not None)) % self.accumulate == 0:
                    self._update()
        except BaseException as error:
            for restore in restores:
                restore()
            if (
                isinstance(error, NonFiniteError)
                and self._under_way
                and (run is None or run.is_finite())
            ):
                count, self._under_way = (
                    len(self._under_way),
                    [],
                )  # else no step could be made any more
                raise NonFiniteError(
                    f"{error} The {count} batches under way to late sources were dropped."
                ) from error
            raise
        self._under_way = [r for r in runs if not r.is_done]
        for each in self._under_way:
            each.forget()
        self._clock += 1

    def _drop_gradients(self, run: Run) -> None:
        """Stages that the schedule left out, where all had to run for the true gradient."""
        kept = {p for k in run.active for p in self.decoupled.stages[k].parameters()}
        for stage in self.decoupled.stages:
            for parameter in stage.parameters():
                if run.share > 0 and parameter not in kept:
                    parameter.grad = None

    def request_metrics(self) -> None:
        """Compare predictions with their targets at the next step, whatever ``metrics_every`` says."""
        self._measure_next = True

    def true_gradients(
        self, *args: Any, target: Any = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Backpropagation's gradient at every interface, with nothing changed.

        Args:
            *args: positional inputs of the model.
            target: what the loss takes.
            **kwargs: keyword inputs.

        Returns:
            The gradient of the loss for each interface's value, by name; zeros where none arrives.
        """
        return self._true_gradients(self._rehearse(Mode(1.0), args, kwargs, target, ask=False)[0])

    def diagnose(self, *args: Any, target: Any = None, **kwargs: Any) -> Diagnosis:
        """Compare what the sources predict with the true gradient, with nothing changed.

        Costs a step of backpropagation and a prediction of every source.

        Args:
            *args: positional inputs of the model.
            target: what the loss and the context take.
            **kwargs: keyword inputs.

        Returns:
            A report for every interface whose source predicts, with a verdict in words; prints as a
            table.
        """
        run, _ = self._rehearse(Mode(1.0), args, kwargs, target, ask=True)
        true = self._true_gradients(run)
        return Diagnosis(
            {n: compare(g, true[n], "true", self.steps) for n, g in run.guesses().items()}
        )

    def diagnose_parameters(self, *args: Any, target: Any = None, **kwargs: Any) -> Diagnosis:
        """Compare what the predictions make of the parameters' gradients with the true ones, with
        nothing changed.

        That is nearer to what training does than ``diagnose``. The gradient of a weight is a sum
        over samples and positions in which much of the values' gradients cancels, but errors that
        samples have in common do not: a prediction with a high cosine at the cut may still train
        the stage before it badly. Both depend on the batch; compare means over several, or take a
        large one. Costs a step of backpropagation and a decoupled one.

        Args:
            *args: positional inputs of the model.
            target: what the loss and the context take.
            **kwargs: keyword inputs.

        Returns:
            A report by stage name, over all parameters that only this stage uses, for the stages
            all of whose sources predict at once; prints as a table.
        """
        _, true = self._rehearse(Mode(1.0), args, kwargs, target, ask=False)
        if self.decoupled.is_exact:  # nobody predicts
            return Diagnosis({}, of="stage")
        run, predicted = self._rehearse(Mode(0.0), args, kwargs, target, ask=True)
        users = Counter(p for stage in self.decoupled.stages for p in set(stage.parameters()))
        found = {}
        for stage in self.decoupled.stages:
            own = [p for p in stage.parameters() if p.requires_grad and users[p] == 1]
            if own and run.answers_at_once(stage.index):
                found[stage.name] = compare(
                    _joined(predicted, own), _joined(true, own), "true", self.steps
                )
        return Diagnosis(found, of="stage")

    def _rehearse(
        self, mode: Mode, args: Any, kwargs: Any, target: Any, ask: bool
    ) -> tuple[Run, dict[nn.Parameter, torch.Tensor | None]]:
        """Run a batch up to its gradients, and put everything back; also what the parameters'
        gradients were.
        """
        if self._crew is not None:
            self.drain()
        args, kwargs = map_tensors(torch.clone, (args, kwargs))
        values = self.decoupled.bind(*args, **kwargs)
        parameters = list(self.decoupled.parameters())
        before = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        with restored(self.decoupled), keep_modes(), torch.enable_grad():
            try:
                run = Run(self.decoupled, self.loss, mode, ask=ask and not self.decoupled.is_exact)
                run.begin(values, self._context(target) if ask else None, target)
                run.advance(0)
                found = {p: p.grad for p in parameters}
            finally:
                for parameter, gradient in zip(parameters, before, strict=True):
                    parameter.grad = gradient
        return run, found

    @staticmethod
    def _true_gradients(run: Run) -> dict[str, torch.Tensor]:
        """By interface, zeros where none arrives."""
        return {
            n: g.detach() if (g := run.gradients.get(n)) is not None else torch.zeros_like(v)
            for n, v in run.sent.items()
        }

    def _context(self, target: Any) -> torch.Tensor | None:
        return (
            None
            if self.decoupled.context is None or target is None
            else self.decoupled.context(target)
        )

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int = 1,
        *,
        progress: bool = True,
        unpack: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any], Any]] | None = None,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> StepReport | None:
        """Train over a loader with a progress bar.

        Args:
            loader: gives batches ``(input, ..., target)``, or dicts with ``"target"`` or
                ``"labels"`` beside the model's keyword inputs.
            epochs: how often to go through it.
            progress: whether to show a bar.
            unpack: turns a batch of another form into ``(args, kwargs, target)``.
            on_step: called with each report, for learning-rate schedulers and logs.

        Returns:
            The last report; None if the loader was empty.
        """
        report = None
        for epoch in range(epochs):
            with tqdm(
                loader, desc=f"epoch {epoch + 1}/{epochs}", disable=not progress, leave=False
            ) as bar:
                for batch in bar:
                    args, kwargs, target = (unpack or unpack_batch)(batch)
                    report = self.step(*args, target=target, **kwargs)
                    if progress and self.steps % 10 == 0:
                        bar.set_postfix(loss=f"{report.loss.item():.4f}")
                    if on_step is not None:
                        on_step(report)
        return report

    # ---- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that training needs to go on bit for bit: model, sources, optimisers, random
        states, step.

        Raises:
            DecouplingError: batches are under way to a late source; their graphs cannot be saved.
        """
        if self._crew is not None:
            self.drain()
        if self._under_way:
            raise DecouplingError(
                f"{len(self._under_way)} batches are still under way to late sources and cannot be "
                "saved: call trainer.drain() first, which finishes them"
            )
        gradients = {n: p.grad for n, p in self.decoupled.named_parameters() if p.grad is not None}
        return {
            "decoupled": self.decoupled.state_dict(),
            "optimizers": {n: o.state_dict() for n, o in self.optimizers.items()},
            "synthesizer_optimizers": {
                n: o.state_dict() for n, o in self.synthesizer_optimizers.items()
            },
            "gradients": gradients if self.steps % self.accumulate else {},
            "steps": self.steps,
            "rng": rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; the plan must be the same. Batches under way are
        dropped.

        Args:
            state: what ``state_dict`` returned, for example by ``torch.load``.

        Raises:
            DecouplingError: the state belongs to other stages or sources; nothing is loaded then.
        """
        self.decoupled.plan  # noqa: B018  raises before the model is traced
        self.close()
        self._make_optimizers()
        parts = ("decoupled", "optimizers", "synthesizer_optimizers", "gradients", "steps", "rng")
        if not isinstance(state, dict) or any(part not in state for part in parts):
            raise DecouplingError(
                f"a trainer's state is a dict with {', '.join(parts)}, as state_dict() returns it"
            )
        for name, mine in (
            ("optimizers", self.optimizers),
            ("synthesizer_optimizers", self.synthesizer_optimizers),
        ):
            if name not in state or set(state[name]) != set(mine):
                raise DecouplingError(
                    f"this state has {name} for {sorted(state.get(name, {}))}, but the trainer has "
                    f"{sorted(mine)}: decouple with the plan that the state was saved with"
                )
        have = {k: getattr(v, "shape", None) for k, v in self.decoupled.state_dict().items()}
        given = {k: getattr(v, "shape", None) for k, v in state["decoupled"].items()}
        wrong = [
            k for k in {**have, **given} if k not in have or k not in given or have[k] != given[k]
        ]
        wrong = [
            k for k in wrong if not k.endswith("_extra_state") or k not in have or k not in given
        ]
        if wrong:
            raise DecouplingError(
                f"this state does not fit: {wrong[0]!r} is {_shape(given, wrong[0])} in it, but "
                f"{_shape(have, wrong[0])} here; decouple with the plan and sources that the state "
                "was saved with"
            )
        self.decoupled.load_state_dict(state["decoupled"])
        for name, mine in (
            ("optimizers", self.optimizers),
            ("synthesizer_optimizers", self.synthesizer_optimizers),
        ):
            for key, optimizer in mine.items():
                optimizer.load_state_dict(state[name][key])
        for name, parameter in self.decoupled.named_parameters():
            parameter.grad = state["gradients"].get(name)
        self.steps = state["steps"]
        self._under_way = []
        set_rng_state(state["rng"])

    # ---- parts -----------------------------------------------------------------------------------

    def _own_stages(self) -> tuple[Stage, ...]:
        """The stages that are trained here."""
        return self.decoupled.stages

    def _make_optimizers(self) -> None:
        if self.optimizers or self.synthesizer_optimizers:
            return
        seen: set[nn.Parameter] = set()
        self._stage_parameters: dict[str, NamedParameters] = {}
        for stage in self._own_stages():
            own = [(n, p) for n, p in stage.named_parameters() if p not in seen]
            seen.update(p for _, p in own)
            if own:
                self._stage_parameters[stage.name] = own
                self.optimizers[stage.name] = _made(self._make_optimizer(own), "optimizer")
        self._is_exact = self.decoupled.is_exact
        for source in self.decoupled.sources.values():
            source.unit = 1 / self.accumulate
        here = {stage.index for stage in self._own_stages()}
        for name, learner in self.decoupled.named_learners(here):
            learnt = list(learner.named_parameters())
            if learnt:
                made = _made(self._make_synthesizer_optimizer(learnt), "synthesizer_optimizer")
                self.synthesizer_optimizers[name] = made

    def _adopt_parameters(self) -> None:
        """Parameters that only a graph made later uses, say that of training mode after one of
        evaluation.
        """
        variant = self.decoupled._variant
        if variant is self._adopted:
            return
        self._adopted = variant
        self._all_or_nothing = AllOrNothing(self.decoupled)
        owned = {p for group in self._stage_parameters.values() for _, p in group}
        for stage in self._own_stages():
            new = [(n, p) for n, p in stage.named_parameters() if p not in owned]
            owned.update(p for _, p in new)
            if new and stage.name in self.optimizers:
                optimizer = self.optimizers[stage.name]
                named = "param_names" in optimizer.param_groups[0]
                optimizer.add_param_group({"params": new if named else [p for _, p in new]})
            elif new:
                self.optimizers[stage.name] = _made(self._make_optimizer(new), "optimizer")
            if new:
                self._stage_parameters.setdefault(stage.name, []).extend(new)

    def _scaled_loss(self, output: Any, target: Any) -> torch.Tensor:
        value = evaluate(self.loss, output, target)
        return value / self.accumulate if self.accumulate > 1 else value

    def _check_finite(self, runs: list[Run], losses: list[tuple[str, torch.Tensor]]) -> None:
        """Losses and parameters' gradients, which everything else flows into; the place is looked
        for on failure only.

        Values may hold infinities, as masked attention logits do.
        """
        gradients = [p.grad for p in self._all_or_nothing.parameters if p.grad is not None]
        found = [r.loss for r in runs if r.loss is not None]
        if all_finite([*found, *(loss for _, loss in losses), *gradients]):
            return
        places: list[tuple[str, torch.Tensor]] = []
        for run in runs:
            values = {n: v.nan_to_num(nan=torch.nan, neginf=0.0) for n, v in run.sent.items()}
            places += [(f"the value of interface {n!r}", v) for n, v in values.items()]
            places += run.places()
        named = [
            (f"gradient of parameter {n!r}", p.grad)
            for n, p in self.decoupled.model.named_parameters()
        ]
        places += [(n, g) for n, g in named if g is not None]
        for name, source in self.decoupled.named_learners():
            regressed = [
                *(loss for n, loss in losses if n == name),
                *(p.grad for p in source.parameters()),
            ]
            places += [
                (f"the regression of the source at interface {name!r}", t)
                for t in regressed
                if t is not None
            ]
        for name, tensor in places:
            if not bool(tensor.isfinite().all()):
                kind = "NaN" if bool(tensor.isnan().any()) else "infinite"
                raise NonFiniteError(
                    f"step {self.steps + 1}: {name} is {kind}; nothing was updated. Look at the "
                    "batch, lower the learning rates or set clip_norm="
                )

    def _update(self) -> None:
        for name, optimizer in self.optimizers.items():
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(
                    [p for _, p in self._stage_parameters[name]], self.clip_norm
                )
            optimizer.step()
        for optimizer in self.synthesizer_optimizers.values():
            optimizer.step()


def _made(optimizer: Any, name: str) -> torch.optim.Optimizer:
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


def _joined(
    gradients: dict[nn.Parameter, torch.Tensor | None], parameters: list[nn.Parameter]
) -> torch.Tensor:
    """The gradients of some parameters in one flat piece, zeros where there is none."""
    found = [(p, gradients[p]) for p in parameters]
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g.to_dense()).flatten() for p, g in found]
    )


def _shape(shapes: dict[str, Any], name: str) -> str:
    return "missing" if name not in shapes else str(tuple(shapes[name] or ()))

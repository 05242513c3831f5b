"""Decoupled through time: a recurrent model trained window by window, each ending in a synthetic
gradient.

Backpropagation through time unrolls a whole sequence; truncated to windows of ``T`` steps it is
blind to everything that an earlier window should have done for a later one. Here a window ends in a
prediction of what all later windows would send back to its last state, so that memory is a window's
and credit reaches further (Jaderberg et al. 2016, arXiv:1608.05343, section 2.2).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from .compiler import check_cuts, check_whole
from .decoupled import Decoupled
from .errors import DecouplingError
from .graphs.graphs import Graphs
from .graphs.pipeline import Recipe
from .passes.cut.insertion import Gradients
from .passes.search.choosing import Search
from .runtime.optimizing import MakeOptimizer
from .through_time.given_state import GivenState
from .through_time.held_state import HeldState
from .through_time.opening import WindowOpening
from .through_time.trainer import ThroughTime, WindowReport
from .through_time.window import InitialState, Window

__all__ = ["ThroughTime", "WindowReport", "decouple_through_time"]


def decouple_through_time(
    model: nn.Module,
    window: int,
    *,
    loss: Callable[[Any, Any], Tensor],
    optimizer: MakeOptimizer,
    synthesizer_optimizer: MakeOptimizer | None = None,
    gradients: Gradients = "auto",
    factor: float = 0.1,
    auxiliary: bool | float = False,
    cuts: Sequence[str] = (),
    context: Callable[[Any], Tensor] | None = None,
    initial_state: InitialState | None = None,
    unroll: bool | None = None,
    batch_first: bool | None = None,
    messages: Sequence[str] = (),
    message_factor: float = 1.0,
    input_gradients: bool = False,
    clip_norm: float | None = None,
    accumulate: int = 1,
    metrics_every: int = 50,
    check: bool = True,
) -> ThroughTime:
    """Train a recurrent model on windows of a sequence, with synthetic gradients at their ends.

    The graph of a window is traced at the first step and cut at its end: the state leaves, a source
    predicts the gradient for it, and what flows back to the next window's first state is that
    source's target.

    Args:
        model: ``nn.LSTM``, ``nn.GRU``, ``nn.RNN``, stacked or not; one of their cells; a model
            ``(x, state) -> (y, state)`` with any nesting of tensors as its state, of single steps,
            or of windows where it holds one of the former; or a model of ``x`` alone that holds
            such modules, whose state is then found and carried.
        window: T, the most time steps in one window.
        loss: ``loss(output, target)`` of one window, a scalar.
        optimizer: makes an optimiser from ``(name, parameter)`` pairs, as for
            :class:`dni_fx.Trainer`.
        synthesizer_optimizer: the same for the sources; by default Adam, by 0.001 between windows.
        gradients: what predicts: ``"auto"`` (an MLP on all tensors of the state together),
            ``"linear"``, ``"mlp"``, a factory; ``"zero"`` is truncated backpropagation through
            time, ``"exact"`` the full one, which keeps every window until all sequences of the
            batch have ended in one step; or a mapping from interface name to either
            (``next_hidden``, ...).
        factor: on the predicted gradient, on use; 0.1 as in the paper.
        auxiliary: predict the next prediction from the state, too; a number is the weight of that
            loss.
        cuts: names to cut after within a window, say ``"rnn.layer_0"`` of a stacked ``rnn``: these
            stages are decoupled from each other as by :func:`dni_fx.decouple`.
        context: from a window's target to a float tensor ``(batch, features)`` that the sources at
            its end see.
        initial_state: from the batch size to the state at the start of a sequence; zeros by
            default.
        unroll: whether the model takes single steps; by default it does unless it is or holds an
            ``nn.LSTM`` or such.
        batch_first: whether windows are ``(batch, time, ...)``; by default as the model's recurrent
            modules have it, else ``(time, batch, ...)``.
        messages: keys of the model's output, a dict, whose tensors ``(batch, ...)`` go to another
            network, which answers with their gradients (:meth:`ThroughTime.answer`); each has a
            source of its own, ``"exact"`` to wait.
        message_factor: on the predicted gradient of messages.
        input_gradients: give back the gradient of the windows' float tensors, for whoever sent
            them.
        clip_norm, accumulate, metrics_every: as for :class:`dni_fx.Trainer`.
        check: compare the traced window with the model at the first step.

    Returns:
        An object to train with: ``step(x_window, state=None, done=None, target=None)``.

    Raises:
        DecouplingError: arguments that do not fit together, or a model whose state cannot be
            carried.

    Source:
        Jaderberg et al. 2016, arXiv:1608.05343, section 2.2.
    """
    check_whole(model)
    if type(window) is not int or window < 1:
        raise DecouplingError(f"window={window!r}: expected a number of time steps, at least 1")
    numbers = {"factor": factor, "auxiliary": auxiliary, "message_factor": message_factor}
    for name, number in numbers.items():
        if not isinstance(number, int | float) or number < 0:
            raise DecouplingError(f"{name}={number!r}: expected a number, at least 0")
    _check_kinds(
        {"cuts": cuts, "messages": messages},
        {"context": context, "initial_state": initial_state},
        {"unroll": unroll, "batch_first": batch_first},
    )
    framed = frame(
        model, initial_state, unroll, batch_first, bool(cuts), bool(messages), input_gradients
    )
    opening = WindowOpening(
        framed, tuple(messages), input_gradients, factor, float(auxiliary), message_factor
    )
    recipe = Recipe(check_cuts(list(cuts), Search()), gradients, check=check, opening=opening)
    return ThroughTime(
        Decoupled(Graphs(model, recipe)),
        opening,
        window,
        loss,
        optimizer=optimizer,
        synthesizer_optimizer=synthesizer_optimizer,
        context=context,
        clip_norm=clip_norm,
        accumulate=accumulate,
        metrics_every=metrics_every,
    )


def _check_kinds(lists: dict[str, Any], functions: dict[str, Any], flags: dict[str, Any]) -> None:
    """Refuse lists of names, functions or None, and flags or None that are something else."""
    for name, value in lists.items():
        is_list = isinstance(value, Collection) and not isinstance(value, str)
        if not is_list or not all(isinstance(each, str) for each in value):
            such = [value] if isinstance(value, str) else ["..."]
            raise DecouplingError(f"{name}={value!r}: pass a list of names, {name}={such}")
    for name, value in functions.items():
        if value is not None and not callable(value):
            raise DecouplingError(f"{name}= must be a callable, or None, but is {value!r}")
    for name, value in flags.items():
        if value is not None and type(value) is not bool:
            raise DecouplingError(f"{name}={value!r}: expected True, False or None")


def frame(
    model: nn.Module,
    initial_state: InitialState | None = None,
    unroll: bool | None = None,
    batch_first: bool | None = None,
    layered: bool = False,
    messages: bool = False,
    input_gradients: bool = False,
) -> Window:
    """A model as a function of one window.

    Kinds of model are told apart: ``nn.LSTM`` and its like; a model ``(x, state) -> (y, state)`` of
    whole windows, or of single steps, which are then unrolled; and a model of ``x`` alone that
    holds recurrent modules, whose state is put in and taken out where they are called.

    Args:
        model, initial_state, unroll, batch_first: as for :func:`decouple_through_time`.
        layered: take stacked recurrent modules apart into their layers.
        messages, input_gradients: whether there are such; a model that carries nothing, ``x -> y``,
            has its use then.

    Raises:
        DecouplingError: a model of no kind that can be carried from window to window.
    """
    cores = {p: m for p, m in model.named_modules() if isinstance(m, nn.RNNBase)}
    for path, core in cores.items():
        if core.bidirectional:
            raise DecouplingError(
                f"{path or type(model).__name__!r} is bidirectional: its backward direction "
                "starts at the end of the sequence and cannot be carried from window to window"
            )
    takes_state = isinstance(model, nn.RNNBase | nn.RNNCellBase) or _positional(model) > 1
    unrolls = (takes_state and not cores) if unroll is None else unroll
    if messages and unrolls:
        raise DecouplingError(
            f"{type(model).__name__} takes single steps, so that it would send a message at each "
            "of them: let the model take windows, with its steps inside, and send one message for "
            "each"
        )
    if not takes_state and not cores:
        if messages or input_gradients:
            return Window(model)
        raise DecouplingError(
            f"{type(model).__name__}.forward takes one argument and the model holds no "
            "nn.LSTM, nn.GRU or nn.RNN whose state could be carried; let it take and return "
            "its state: forward(x, state) -> (y, state)"
        )
    layouts = {core.batch_first for core in cores.values()}
    if batch_first is None:
        if len(layouts) > 1:
            raise DecouplingError(
                "the model's recurrent modules differ in batch_first; pass batch_first="
            )
        batch_first = True in layouts
    if cores and (isinstance(model, nn.RNNBase) or not takes_state):
        return HeldState(model, batch_first, initial_state, cores, layered)
    # A model that takes its state as an argument is left to do so.
    return GivenState(model, batch_first, initial_state, unrolls)


def _positional(model: nn.Module) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds for p in inspect.signature(model.forward).parameters.values())

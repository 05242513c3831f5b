"""The second rung of the tracing ladder: what ``torch.export`` makes of a model, recorded again."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import TracingError
from .naming import check_inputs
from .recorder import Recorder
from .state import restored
from .traces import Trace
from .tracing import reason_of, record


def trace_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grad: bool = True
) -> Trace:
    """Trace by ``torch.export`` and record the exported operators.

    The batch dimension is dynamic where export allows it. The training mode is baked into the
    operators.

    Args:
        model: any module.
        args: example positional inputs.
        kwargs: example keyword inputs.
        grad: whether gradients are asked for, which code may look at.

    Returns:
        The trace; its parameters and buffers are the model's own.

    Raises:
        TracingError: export refuses the model; holds its message.
    """
    check_inputs(model, args, kwargs)
    with restored(model, args, kwargs), torch.set_grad_enabled(grad):
        try:
            with _unheard():
                program = _export(model, args, kwargs)
                exported = program.module(check_guards=False)
        except Exception as error:
            raise TracingError(f"torch.export: {reason_of(error)}") from error
        recorder = Recorder(model, FakeTensorMode(allow_non_fake_inputs=True), grad=grad)
        recorder.known.paths.clear()  # no module is called
        try:
            trace = record(recorder, _Replayed(exported, recorder), args, kwargs, {})
        except Exception as error:
            raise TracingError(
                f"torch.export: its graph cannot be recorded: {reason_of(error)}"
            ) from error
    trace.model = model
    return dataclasses.replace(trace, modes=tuple(model.modules()), rung="export")


class _Replayed:
    """Runs an exported graph node by node, telling the recorder which module each operator came
    from.
    """

    def __init__(self, module: fx.GraphModule, recorder: Recorder) -> None:
        self.module, self.forward = module, module.forward
        self.player = _Player(module, recorder)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = torch.utils._pytree.arg_tree_leaves(*args, **kwargs)
        result = self.player.run(*flat, enable_io_processing=False)
        self.player.close(())
        return self.module.graph._codegen.process_outputs(result)


class _Player(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, recorder: Recorder) -> None:
        super().__init__(module)
        self.recorder = recorder
        self.latest: Any = None

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("call_function", "call_method"):
            entered = [
                path.split("@")[0]
                for path, _ in (n.meta.get("nn_module_stack") or {}).values()
                if path
            ]
            self.close(entered)
            self.recorder.visits.stack[:] = entered
        value = super().run_node(n)
        if n.op in ("call_function", "call_method") and isinstance(value, torch.Tensor):
            self.latest = value
        return value

    def close(self, entered: Sequence[str]) -> None:
        """Note the output of every module that has been left."""
        known, visits = self.recorder.known, self.recorder.visits
        for path in reversed([p for p in visits.stack if p not in entered]):
            node = known.nodes.get(id(self.latest))
            visits.calls.append((path, node, next(iter(reversed(known.graph.nodes)))))
        visits.stack[:] = [p for p in visits.stack if p in entered]


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Without torch's remarks on its symbols and the unfinished graph that it prints: what fails is
    told by the error.
    """
    names = ("torch.fx.experimental.symbolic_shapes", "torch.export._trace")
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dynamic = torch.utils._pytree.tree_map(
        lambda v: {0: torch.export.Dim.AUTO} if isinstance(v, torch.Tensor) and v.dim() else None,
        (args, kwargs),
    )
    names = list(inspect.signature(model.forward).parameters)
    shapes = {**dict(zip(names, dynamic[0], strict=False)), **dynamic[1]}
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception:
        return torch.export.export(model, args, kwargs, strict=False)

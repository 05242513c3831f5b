"""The second rung of the tracing ladder: what ``torch.export`` makes of a model, recorded again."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ...errors import BakedInError, TracingError
from ...graphs.nested import map_tensors
from ...graphs.pictures import picture
from .contents import MISSING, Contents
from .effects import Watched
from .held import GRAD, Held, Reads
from .modules import state_of
from .naming import check_inputs
from .questions import OF_GRADIENTS
from .recorder import Recorder
from .routing import by_library, watching
from .settings import FAKES, unheard
from .state import python_draws, restored
from .traces import Trace
from .tracing import reason_of, record
from .values import copied


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
    watcher = _Watcher(model)
    if not grad:
        watcher.reads.mode(GRAD)
    try:
        with restored(model, args, kwargs) as changes, torch.set_grad_enabled(grad):
            _watch(watcher, model, args, kwargs)
        if changes.contents:
            with restored(model, args, kwargs), torch.set_grad_enabled(grad):
                _watch(watcher, model, args, kwargs, changes.contents)
    except Exception as error:
        raise TracingError(f"torch.export: {reason_of(error)}") from error
    with restored(model, args, kwargs), torch.set_grad_enabled(grad):
        try:
            with _unheard(), _no_text():
                program = _export(model, args, kwargs)
                exported = program.module(check_guards=False)
        except Exception as error:
            raise TracingError(f"torch.export: {reason_of(error)}") from error
        recorder = Recorder(model, FakeTensorMode(allow_non_fake_inputs=True), grad=grad)
        recorder.known.paths.clear()  # no module is called
        recorder.known.kept = None
        try:
            trace = record(recorder, _Replayed(exported, recorder), args, kwargs, {})
        except Exception as error:
            raise TracingError(
                f"torch.export: its graph cannot be recorded: {reason_of(error)}"
            ) from error
    trace.model = model
    modes = tuple(model.modules())
    held = watcher.held()
    notes = tuple(watcher.reads.baked_in())  # the recorder has only seen the exported model
    return dataclasses.replace(trace, modes=modes, held=held, notes=notes, rung="export")


def _watch(
    watcher: _Watcher,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outside: Sequence[Contents] = (),
) -> None:
    """Run the model as export does, on real tensors and the modules themselves, and note what its
    code reads: while it is exported, stand-ins for both hide that.

    Raises:
        BakedInError: it does something that an exported graph would leave out.
    """
    draws, watched = python_draws(), Watched(outside, model)
    copies: dict[int, torch.Tensor] = {}  # the same tensor again is one
    own = lambda t: copies.setdefault(id(t), copied(t))  # noqa: E731
    args, kwargs = map_tensors(own, (args, kwargs))
    with watching(watcher), _Asked(model, watcher.reads), _compiling_state_context():
        model(*args, **kwargs)
    if python_draws() != draws:
        raise BakedInError("the model draws from Python's or NumPy's random numbers")
    every = [path for path, _ in model.named_modules()]  # what is their own is looked at elsewhere
    if changed := watched.changed(every, lambda tensor: True):
        raise BakedInError(f"forward changes {changed}")


# what export's own text goes through
_PRINTS = (sys.stdlib_module_names | {"sympy"}) - {"__main__"}
# lost in an exported graph, or other than in a call
_HIDDEN = {"register_hook", "retain_grad", "register_post_accumulate_grad_hook", "_nnz"}


class _Asked(TorchFunctionMode):
    """Notes what a model's code asks tensors about gradients."""

    def __init__(self, model: nn.Module, reads: Reads) -> None:
        super().__init__()
        self._reads = reads
        self._parameters = list(model.named_parameters())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _HIDDEN or (name == "_is_view" and not by_library(2)):
            raise BakedInError(f"the model uses '{name}', which an exported graph cannot hold")
        if name == "__get__":
            asked = getattr(getattr(func, "__self__", None), "__name__", "")
            if asked in OF_GRADIENTS:
                self._reads.mode(GRAD)
            if asked == "grad":
                for name, parameter in self._parameters:
                    self._reads.gradient(name, parameter)
        return func(*args, **(kwargs or {}))


class _Watcher:
    """Notes what a model's code reads in a run that is to be exported.

    Attributes:
        reads: what was read.
        paused: never.
    """

    def __init__(self, model: nn.Module) -> None:
        self.reads, self.paused = Reads(copies=True), False
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._called: dict[int, nn.Module] = {}
        self._read: dict[tuple[int, str], nn.Module] = {}

    def call_module(self, original: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A module is called. Its graph would leave out what it keeps, and hold fast what it draws.

        Raises:
            BakedInError: its attributes are others afterwards.
        """
        if (path := self._paths.get(id(module))) is None:
            self.reads.foreign(module)
            return original(module, *args, **kwargs)
        self._called[id(module)] = module
        before = state_of(module)
        output = original(module, *args, **kwargs)
        now = state_of(module)
        if changed := [k for k, v in now.items() if k not in before or before[k] != v]:
            place = f"{path}.{changed[0]}" if path else changed[0]
            raise BakedInError(f"forward changes the attribute '{place}'")
        return output

    def read_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """An attribute is read."""
        self._read[id(module), name] = module

    @property
    def visits(self) -> _Watcher:
        """What is told of attributes that are written."""
        return self

    def writes(self, module: nn.Module, name: str, value: Any) -> None:
        """An attribute is written, which export undoes.

        Raises:
            BakedInError: it was something else before.
        """
        path = self._paths.get(id(module))
        if path is None or by_library(3):
            return
        if picture(getattr(module, name, MISSING)) != picture(value):
            place = f"{path}.{name}" if path else name
            raise BakedInError(f"forward changes the attribute '{place}'")

    def call_function(self, function: type[torch.autograd.Function], args: Any) -> Any:
        """A function with a backward of its own, which export would lose.

        Raises:
            BakedInError: always.
        """
        raise BakedInError(f"the backward of {function.__name__} would be lost")

    def held(self) -> tuple[Held, ...]:
        """All that was read, as it is now."""
        own = self._paths
        for module in [m for m in self._called.values() if id(m) in own]:
            self.reads.visited(module, own[id(module)])
        for (_, name), module in self._read.items():
            if id(module) in own:
                value = getattr(module, name, MISSING)
                self.reads.attribute(module, own[id(module)], name, value)
        return self.reads.held


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
def _no_text() -> Iterator[None]:
    """Numbers that export keeps symbolic have names in place of values: as text they are not what
    the model's code would see.

    Raises:
        BakedInError: that code makes text of one.
    """
    kinds: Any = (torch.SymInt, torch.SymFloat, torch.SymBool)
    before = [kind.__repr__ for kind in kinds]

    def told(known: Any) -> Any:
        def tell(number: Any) -> str:
            caller = str(sys._getframe(1).f_globals.get("__name__")).partition(".")[0]
            if not by_library(2) and caller not in _PRINTS:
                raise BakedInError("the model makes text of a number that export keeps symbolic")
            text: str = known(number)
            return text

        return tell

    for kind, known in zip(kinds, before, strict=True):
        kind.__repr__ = told(known)
    try:
        yield
    finally:
        for kind, known in zip(kinds, before, strict=True):
            kind.__repr__ = known


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Without torch's remarks on its symbols and the unfinished graph that it prints: what fails is
    told by the error.
    """
    names = ("torch.fx.experimental.symbolic_shapes", "torch.export._trace", FAKES)
    with unheard(*names), contextlib.redirect_stderr(io.StringIO()):
        yield


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

"""Runs a model once and writes down, as an fx graph, every torch function and leaf module that it
calls.

``torch.fx.Tracer`` feeds symbolic proxies through the model, so code that looks at a value (a
shape, a type, an ``isinstance``) breaks. Here the model runs on ordinary tensors (fake ones where
possible), watched by a ``TorchFunctionMode``: nothing in the model can tell the difference, and
shapes, dtypes, aliasing, in-place writes and ``requires_grad`` of every value are read off the
values themselves. ``provenance`` lists what is known of a node.
"""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode, resolve_name

from ...errors import TracingError
from ...graphs.nested import flatten
from ...graphs.pictures import Without
from .calls import GRADIENT_HOOKS, FunctionCall, Observer, check_saving, setitem
from .containers import Copy
from .contents import Contents
from .effects import Watched
from .held import GRAD, Reads
from .modules import Visits
from .ownership import LIBRARY
from .prefixes import mark_differentiated
from .provenance import Provenance
from .questions import BY_KIND, DATA_QUERIES, HISTORY, Questions
from .sizes import QUERIES, Sizes
from .symbols import Size, TracedInt
from .values import plain_tree, tensors_in

# how many tensors these return is a size, which the code around them has made use of
_COUNTED = {
    "unbind", "split", "chunk", "tensor_split", "hsplit", "vsplit", "dsplit", "unsafe_split",
    "unsafe_chunk",
}  # fmt: skip
_OPERATORS = {
    "torch.Tensor.add": operator.add,
    "torch.Tensor.sub": operator.sub,
    "torch.Tensor.mul": operator.mul,
    "torch.Tensor.div": operator.truediv,
    "torch.Tensor.matmul": operator.matmul,
    "torch.Tensor.__getitem__": operator.getitem,
}


class Recorder(TorchFunctionMode):
    """Records one call of a model. See the module's docstring.

    Args:
        model: the root module.
        fake: a fake tensor mode, or None to run on real tensors.
        opaque: paths of modules to keep as single nodes.
        plain: sizes that the model's code needs as plain integers.
        grad: whether gradients are asked for.
        watched: what an earlier recording has found changed outside of the modules.
        reached: identities of the tensors that the model could reach before.
        without: what may be changed outside of the modules all the same.

    Attributes:
        known: the graph, and the nodes of tensors.
        reads: plain values that the model's code has read.
        inputs: the example's tensors, by placeholder.
        sizes: what is answered about shapes.
        visits: the modules on the way.
        questions: what is asked tensors for plain values.
        autocasts: regions that the model itself entered, outermost first.
        paused: while a node runs, and nothing is recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        fake: Any,
        opaque: frozenset[str] = frozenset(),
        plain: frozenset[Size] = frozenset(),
        grad: bool = True,
        watched: Sequence[Contents] = (),
        reached: frozenset[int] = frozenset(),
        without: Without = frozenset(),
    ) -> None:
        super().__init__()
        self.grad = grad
        self.fake = fake
        self.reads = Reads(without=without)
        if not grad:
            self.reads.mode(GRAD)
        self.known = Provenance(model, bool(fake), self.reads, reached)
        self.sizes = Sizes(self.known, plain)
        self.visits = Visits(
            self.known, opaque, self.reads, Watched(watched, model), model, without
        )
        self.known.kept = self.visits.wholes
        self.inputs: dict[fx.Node, torch.Tensor] = {}
        looks = self.sizes.looks
        self.questions = Questions(self.known, looks, self.visits, self.reads, self.inputs)
        self.autocasts: list[tuple[Any, ...]] = []
        self.paused = False
        self._observer = Observer()

    # ---- what torch calls ------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            if func in HISTORY and not sys._getframe(1).f_code.co_filename.startswith(LIBRARY):
                self.questions.check_history(func, args[0])
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            if args[0] and not _is_leaving(sys._getframe(1)):
                self.reads.mode(GRAD)  # a region with gradients, whatever is outside
            return func(*args)
        try:
            name = resolve_name(func) or getattr(func, "__name__", str(func))
        except Exception:  # resolve_name refuses a few wrapped functions
            name = getattr(func, "__name__", str(func))
        short = name.removesuffix(".__get__").rsplit(".", 1)[-1]
        if short in GRADIENT_HOOKS:
            raise TracingError(f"the model reaches into its backward (by '{short}') while it runs")
        if name.endswith("requires_grad.__set__"):
            if not self.known.is_computed(args[0]):
                return func(*args)
            return self._create("call_method", "requires_grad_", args, {}, _set_requires_grad)
        if name.endswith(".__set__"):
            raise TracingError(f"the model assigns to a tensor's attribute ({name})")
        if name in QUERIES:
            return self.sizes.answer(name, args, kwargs)
        if short in DATA_QUERIES and any(isinstance(a, torch.Tensor) for a in args):
            return self.questions.read_value(short, args, kwargs)
        if name.startswith("torch.sym_") or short.startswith("_sym_"):
            return func(*[a.look() if isinstance(a, TracedInt) else a for a in args], **kwargs)
        return self._record_function(func, name, short, args, kwargs)

    def call_module(
        self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        """Stand-in for ``nn.Module.__call__`` while recording."""
        path = self.known.paths.get(id(module))
        if path is None:
            if not any(map(self.known.is_computed, module.parameters())):  # not made in this call
                self.reads.foreign(module)
            return original(module, *args, **kwargs)
        if self.visits.is_leaf(module, path):
            return self._call_leaf(original, module, path, args, kwargs)
        with self.visits.inside(module, path):
            output = original(module, *args, **kwargs)
        self.visits.returned(path, output)
        return output

    def read_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """The model's code reads an attribute of a module."""
        if isinstance(value, torch.Tensor) and self.known.is_computed(value):
            return  # written before in this call
        if self.visits.wholes.is_changed(module, name, value):
            return
        if (id(module), name) in self.visits.stored:
            return
        self.paused = True
        path = self.known.paths.get(id(module))
        try:
            if name != "training":
                outlined = self.visits.wholes.path_of(module) is not None
                self.reads.attribute(module, path, name, value, outlined)
            elif self.visits.visited.get(path or "") is not module:
                self.reads.training(module, path)
        finally:
            self.paused = False

    def call_function(self, function: type[torch.autograd.Function], args: Any) -> Any:
        """Stand-in for ``autograd.Function.apply`` while recording."""
        target = FunctionCall(function)
        return self._create("call_function", target, args, {}, lambda a, k: target(*a))

    # ---- recording -------------------------------------------------------------------------------

    def _record_function(self, func: Any, name: str, short: str, args: Any, kwargs: Any) -> Any:
        if name.endswith(".__get__"):
            if short == "grad_fn":  # None, or what no graph can hold
                self.reads.mode(GRAD)
                return func(*args)
            if short == "grad" and (owner := self.known.names.get(id(args[0]))):
                self.reads.gradient(owner, args[0])
            return self._create(
                "call_function", getattr, (args[0], short), {}, lambda a, k: getattr(a[0], short)
            )
        if name == "torch.Tensor.__setitem__":
            return self._create(
                "call_function", setitem, args, kwargs, lambda a, k: setitem(*a, **k)
            )
        run = lambda a, k: func(*a, **k)  # noqa: E731
        if name in _OPERATORS and len(args) == 2 and not kwargs:
            return self._create("call_function", _OPERATORS[name], args, kwargs, run)
        if not name.startswith("torch.Tensor."):
            return self._create("call_function", func, args, kwargs, run)
        return self._create("call_method", short, args, kwargs, run)

    def _call_leaf(
        self, original: Any, module: nn.Module, path: str, args: Any, kwargs: Any
    ) -> Any:
        self.known.attributes[path] = module
        run = lambda a, k: original(module, *a, **k)  # noqa: E731
        if path in self.visits.opaque:  # what it gives back in one call is not so in each
            run = lambda a, k: _apart(original(module, *a, **k), (*a, *k.values()))  # noqa: E731
        with self.visits.whole(path):
            output = self._create("call_module", path, args, kwargs, run)
        if any(output is a for a in (*args, *kwargs.values())):
            # an identity in this mode: which of the two is used later cannot be told
            self.visits.visited[path] = module
        self.visits.returned(path, output)
        return output

    def _create(
        self, op: str, target: Any, args: Any, kwargs: Any, run: Callable[[Any, Any], Any]
    ) -> Any:
        self.paused = True
        try:
            return self._create_paused(op, target, args, kwargs, run)
        finally:
            self.paused = False

    def _create_paused(
        self, op: str, target: Any, args: Any, kwargs: Any, run: Callable[[Any, Any], Any]
    ) -> Any:
        check_saving()
        inputs = list(tensors_in((args, kwargs)))
        whole = str(target) if op == "call_module" else None
        given = inputs if whole is None else [*inputs, *self.visits.wholes.given(whole)]
        asked = args[1] if target is getattr else getattr(target, "__name__", target)
        node_args, node_kwargs = self.known.arguments(args, kwargs, asked in BY_KIND)
        versions = [(t, t._version) for t in given if not t.is_inference()]
        before = len(self.known.graph.nodes)
        copies: list[Copy] = []
        taken = lambda: (plain_tree(args, copies), plain_tree(kwargs, copies))  # noqa: E731
        output = self._observed(target, lambda: run(*taken()))
        assert before == len(self.known.graph.nodes)
        is_callee = op == "call_module" or isinstance(target, FunctionCall)
        if is_callee:
            seen = [*self._observer.tensors.values()]
            self.known.check_captures(target, given, seen)
        written = [t for t, version in versions if t._version != version]
        leaves, structure = flatten(output)
        if not leaves and not written:
            opened = structure.kind != "constant" and not isinstance(output, tuple)
            if opened or (output is not None and op == "call_module"):
                raise TracingError(f"{target} returns no tensors but {type(output).__name__}")
            if output is not None:
                self.visits.tell_changes(target, copies)
                return self.questions.answer(op, target, node_args, node_kwargs, output)
        name = _node_name(op, target)
        node = self.known.graph.create_node(op, target, node_args, node_kwargs, name)
        _describe(node, self, self._observer, written)
        if whole is not None:
            passed = set(map(id, inputs))
            self.visits.wholes.called(whole, node, [t for t in seen if id(t) not in passed])
        if is_callee:
            self.visits.check_count(target, output)
            self.known.note_count(node, output)
        if target is torch.autograd.grad:
            mark_differentiated(node)
        self.known.attach(node, output)
        if op != "call_module" and not written:
            self.questions.guard_identity(node, output, args, node_args)
        if getattr(target, "__name__", target) in _COUNTED and isinstance(output, tuple | list):
            self.sizes.looks.guard(node.graph.call_function(len, (node,)), len(output))
        for tensor in written:
            self.known.refresh_aliases(tensor, node, output)
        self.visits.tell_changes(target, copies)
        return output

    def _observed(self, target: Any, run: Callable[[], Any]) -> Any:
        """Run a node and watch the operators below it."""
        self._observer.reset()
        try:
            with self._observer:
                return run()
        except Exception as error:
            refused = isinstance(error, TracingError)
            if self.fake or refused or target not in self.visits.opaque:
                raise
            with torch.overrides._pop_mode_temporarily():  # compiled code refuses to be watched
                output = run()
            self._observer.random = True
            return output


def _set_requires_grad(args: Any, kwargs: Any) -> Any:
    return args[0].requires_grad_(args[1])


def _apart(output: Any, given: Any) -> Any:
    """Another tensor on the same memory, where a tensor that was given came back."""
    if isinstance(output, torch.Tensor) and any(output is value for value in given):
        return output.view_as(output)
    return output


def _is_leaving(frame: types.FrameType | None) -> bool:
    """Whether gradients are switched on again where a region without ends."""
    for _ in range(2):
        if frame is not None and frame.f_code.co_qualname.endswith("__exit__"):
            return True
        frame = frame and frame.f_back
    return False


def _node_name(op: str, target: Any) -> str | None:
    if op == "call_module":
        name: str = target.replace(".", "_")
        return name
    return target.function.__name__.lower() if isinstance(target, FunctionCall) else None


def _describe(
    node: fx.Node, recorder: Recorder, observer: Observer, written: list[torch.Tensor]
) -> None:
    """What is known of a node besides its value."""
    known = recorder.known
    names = [known.names[i] for i in observer.parameters if i in known.names]
    if node.op == "call_module":
        module = known.attributes[str(node.target)]
        own = module.named_parameters(remove_duplicate=False)
        names = [known.names[id(p)] for _, p in own]
    node.meta.update(
        mutates=tuple(dict.fromkeys(known.storage(t) for t in written)),
        rebases=tuple(dict.fromkeys(known.storage(t) for t in written if t._is_view())),
        random=observer.random,
        by_value=observer.by_value and node.op != "call_module",
        parameters=tuple(dict.fromkeys(names)),
        modules=tuple(recorder.visits.stack),
        no_grad=not torch.is_grad_enabled(),
        grad=torch.is_grad_enabled() and not recorder.grad,
        autocast=tuple(recorder.autocasts),
    )

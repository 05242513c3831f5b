"""Runs a model once and writes down, as an fx graph, every torch function and leaf module that it
calls.

``torch.fx.Tracer`` feeds symbolic proxies through the model, so code that looks at a value (a
shape, a type, an ``isinstance``) breaks. Here the model runs on ordinary tensors (fake ones where
possible), watched by a ``TorchFunctionMode``: nothing in the model can tell the difference, and
shapes, dtypes, aliasing, in-place writes and ``requires_grad`` of every value are read off the
values themselves.

What is known of a node is kept in the ``meta`` of the new graph's nodes:

==============
========================================================================================== ``value``
the example tensor (without data once traced), or None; ``requires_grad`` as it was when made
``storage``     a number shared by values that alias each other ``view``        whether the value is
a view of another tensor ``mutates``     storages that the node writes to ``rebases``     those that
it writes to through a view, where autograd rebuilds histories ``random``      whether it draws
random numbers ``parameters``  names of the parameters that it reads ``modules``     paths of the
modules that it ran in, outermost first ``no_grad``     whether it ran under ``torch.no_grad``
``autocast``    the autocast regions around it that the model itself entered ``glued``       whether
it must stay with the node before it (members of containers, notes of a write) ==============
==========================================================================================
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode, resolve_name

from ...errors import BakedInError, DataDependentError, TracingError
from ...graphs.nested import flatten
from .calls import FunctionCall, Observer, after, setitem
from .state import python_draws
from .symbols import Looks, Size, TracedInt, plain
from .values import plain_tree, storage_key, tensors_in

_SIZE_QUERIES = {
    "torch.Tensor.shape.__get__",
    "torch.Tensor.size",
    "torch.Tensor.numel",
    "torch.Tensor.__len__",
}
_LAYOUT_QUERIES = {"is_contiguous", "stride", "storage_offset"}
_DATA_QUERIES = {
    "item",
    "tolist",
    "numpy",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__complex__",
    "is_nonzero",
    "equal",
    "allclose",
    "__contains__",
    "__array__",
    "__format__",
    "data_ptr",
}
# how many tensors these return is a size, which the code around them has made use of
_COUNTED = {
    "unbind",
    "split",
    "chunk",
    "tensor_split",
    "hsplit",
    "vsplit",
    "dsplit",
    "unsafe_split",
    "unsafe_chunk",
}
_OPERATORS = {
    "torch.Tensor.add": operator.add,
    "torch.Tensor.sub": operator.sub,
    "torch.Tensor.mul": operator.mul,
    "torch.Tensor.div": operator.truediv,
    "torch.Tensor.matmul": operator.matmul,
    "torch.Tensor.__getitem__": operator.getitem,
}
# nn modules that are only sequences of others: looked into, so that cuts can fall between their
# layers
_TRANSPARENT = (nn.Sequential, nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer)


def _is_opaque_by_nature(module: nn.Module) -> bool:
    """Hooks on a module that is looked into would run at trace time only."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class Recorder(TorchFunctionMode):
    """Records one call of a model. See the module's docstring.

    Args:
        model: the root module.
        fake: a fake tensor mode, or None to run on real tensors.
        opaque: paths of modules to keep as single nodes.
        plain: sizes that the model's code needs as plain integers.
    """

    def __init__(
        self,
        model: nn.Module,
        fake: Any,
        opaque: frozenset[str] = frozenset(),
        plain: frozenset[Size] = frozenset(),
    ) -> None:
        super().__init__()
        self.model, self.fake, self.opaque = model, fake, opaque
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.looks = Looks(plain)
        # module path, output node and last node made in it, in order of return
        self.calls: list[tuple[str, fx.Node | None, fx.Node]] = []
        self.visited: dict[
            str, nn.Module
        ] = {}  # modules whose training flag is baked into the graph
        self.failed_at: str | None = None
        self.failed_leaf = False
        self.paths: dict[int, str] = {}
        for path, module in model.named_modules():
            self.paths.setdefault(id(module), path)
        self.names: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.names.setdefault(id(tensor), name)
        own = (
            (k, v)
            for m in model.modules()
            for k, v in vars(m).items()
            if k not in _MODULE_INTERNALS
        )
        self.constants = {id(t) for _, value in own for t in tensors_in(value)}
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Any] = []
        self.storages: dict[int, tuple[int, list[torch.Tensor]]] = {}
        self.sizes: dict[tuple[fx.Node, int | str], int | TracedInt] = {}
        self.stack: list[str] = []
        self.autocasts: list[tuple[Any, ...]] = []
        self.observer = Observer()
        self.draws = python_draws()
        self.notes: list[str] = []
        self.paused = False
        self.thread = threading.get_ident()

    # ---- what torch calls ------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            return func(*args)
        try:
            name = resolve_name(func) or getattr(func, "__name__", str(func))
        except Exception:  # resolve_name refuses a few wrapped functions
            name = getattr(func, "__name__", str(func))
        short = name.removesuffix(".__get__").rsplit(".", 1)[-1]
        if name.endswith(".__set__"):
            raise TracingError(f"the model assigns to a tensor's attribute ({name})")
        if name in _SIZE_QUERIES:
            return self._size(name, args, kwargs)
        if short in _DATA_QUERIES and any(isinstance(a, torch.Tensor) for a in args):
            raise DataDependentError(
                f"the model reads the values of a tensor (by '{short}') while it runs"
            )
        if name.startswith("torch.sym_") or short.startswith("_sym_"):
            return func(*[a.look() if isinstance(a, TracedInt) else a for a in args], **kwargs)
        return self._record_function(func, name, short, args, kwargs)

    def call_module(
        self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        """Stand-in for ``nn.Module.__call__`` while recording."""
        path = self.paths.get(id(module))
        if self.paused or path is None or threading.get_ident() != self.thread:
            return original(module, *args, **kwargs)
        if path and self._is_leaf(module, path):
            return self._call_leaf(original, module, path, args, kwargs)
        self.visited[path] = module
        self.stack.append(path)
        before = self._state_of(module)
        try:
            output = original(module, *args, **kwargs)
            self._check_draws()
            changed = {
                k: v for k, v in self._state_of(module).items() if before.get(k, _MISSING) is not v
            }
            stored = all(isinstance(v, torch.Tensor) for v in changed.values()) and not path
            if stored:  # the top level cannot be opaque; what it only stores is not read again
                self.notes += [
                    f"forward stores a tensor in self.{name}; the stages do not" for name in changed
                ]
            elif changed:
                raise BakedInError(
                    f"forward changes the module's own attribute '{next(iter(changed))}': if only "
                    "its first call does that, call the model once before"
                )
        except Exception:
            if self.failed_at is None:
                self.failed_at = path
            raise
        finally:
            self.stack.pop()
        self._returned(path, output)
        return output

    def call_function(self, function: type[torch.autograd.Function], args: Any) -> Any:
        """Stand-in for ``autograd.Function.apply`` while recording."""
        target = FunctionCall(function)
        return self._create("call_function", target, args, {}, lambda a, k: target(*a))

    # ---- recording -------------------------------------------------------------------------------

    def placeholder(self, name: str, value: torch.Tensor) -> None:
        """Add a tensor input."""
        node = self.graph.placeholder(name)
        node.meta.update(
            mutates=(), random=False, parameters=(), modules=(), no_grad=False, autocast=()
        )
        self._attach(node, value)

    def _record_function(self, func: Any, name: str, short: str, args: Any, kwargs: Any) -> Any:
        if name.endswith(".__get__"):
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
        if name.startswith("torch.Tensor."):
            if short in _LAYOUT_QUERIES:
                return self._layout(short, args, kwargs)
            return self._create("call_method", short, args, kwargs, run)
        return self._create("call_function", func, args, kwargs, run)

    def _call_leaf(
        self, original: Any, module: nn.Module, path: str, args: Any, kwargs: Any
    ) -> Any:
        self.attributes[path] = module
        self._check_draws()
        try:
            output = self._create(
                "call_module", path, args, kwargs, lambda a, k: original(module, *a, **k)
            )
        except Exception:
            if self.failed_at is None:
                self.failed_at, self.failed_leaf = path, True
            raise
        self.draws = python_draws()
        if any(output is a for a in (*args, *kwargs.values())):
            self.visited[path] = (
                module  # an identity in this mode: which of the two is used later cannot be told
            )
        self._returned(path, output)
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
        inputs = list(tensors_in((args, kwargs)))
        node_args, node_kwargs = self._arguments(args), self._arguments(kwargs)
        versions = [(t, t._version) for t in inputs if not t.is_inference()]
        real_args, real_kwargs = plain_tree(args), plain_tree(kwargs)
        before = len(self.graph.nodes)
        self.observer.reset()
        try:
            with self.observer:
                output = run(real_args, real_kwargs)
        except Exception:
            if self.fake or target not in self.opaque:
                raise
            with torch.overrides._pop_mode_temporarily():  # compiled code refuses to be watched
                output = run(real_args, real_kwargs)
            self.observer.random = True
        assert before == len(self.graph.nodes)
        if op == "call_module" or isinstance(target, FunctionCall):
            self._check_captures(target, inputs)
        written = [t for t, version in versions if t._version != version]
        leaves, structure = (
            ([output], None) if isinstance(output, torch.Tensor) else flatten(output)
        )
        if not leaves and not written and structure is not None:
            if structure.kind != "constant" or (output is not None and op == "call_module"):
                raise TracingError(f"{target} returns no tensors but {type(output).__name__}")
            if output is not None:
                return output
        node = self.graph.create_node(
            op, target, node_args, node_kwargs, name=self._node_name(op, target)
        )
        names = [self.names[i] for i in self.observer.parameters if i in self.names]
        if op == "call_module":
            own = self.attributes[target].named_parameters(remove_duplicate=False)
            names = [self.names[id(p)] for _, p in own]
        node.meta.update(
            mutates=tuple(dict.fromkeys(self._storage(t) for t in written)),
            rebases=tuple(dict.fromkeys(self._storage(t) for t in written if t._is_view())),
            random=self.observer.random,
            parameters=tuple(dict.fromkeys(names)),
            modules=tuple(self.stack),
            no_grad=not torch.is_grad_enabled(),
            autocast=tuple(self.autocasts),
        )
        self._attach(node, output)
        if getattr(target, "__name__", target) in _COUNTED and isinstance(output, tuple | list):
            self.looks.guard(self.graph.call_function(len, (node,)), len(output))
        for tensor in written:
            self._refresh_aliases(tensor, node, output)
        return output

    def _attach(self, node: fx.Node, output: Any) -> None:
        """Remember which node a tensor came from; members of containers get nodes of their own."""
        node.meta["value"] = output if isinstance(output, torch.Tensor) else None
        if isinstance(output, torch.Tensor):
            node.meta["storage"] = self._storage(output)
            node.meta["differentiable"] = (
                output.requires_grad
            )  # a later write may change that of the same object
            node.meta["view"] = output._is_view()
            self.nodes[id(output)] = node
            self.alive.append(output)
            return
        node.meta["storage"] = None
        if output is None or isinstance(output, int | float | str | bool | TracedInt):
            return
        members: list[tuple[Callable[..., Any], Any, Any]]
        if isinstance(output, dict):
            members = [(operator.getitem, key, value) for key, value in output.items()]
        elif isinstance(output, tuple | list):
            members = [(operator.getitem, i, value) for i, value in enumerate(output)]
        elif hasattr(output, "__dataclass_fields__"):
            members = [
                (getattr, name, getattr(output, name)) for name in output.__dataclass_fields__
            ]
        else:
            raise TracingError(
                f"'{node.target}' returns a {type(output).__name__}, which holds tensors out of "
                "sight"
            )
        for access, key, value in members:
            if flatten(value)[0]:
                member = self.graph.call_function(access, (node, key))
                member.meta.update(
                    {k: v for k, v in node.meta.items() if k in ("modules", "no_grad", "autocast")}
                )
                member.meta.update(mutates=(), random=False, parameters=(), glued=True)
                self._attach(member, value)

    def _refresh_aliases(self, written: torch.Tensor, node: fx.Node, output: Any) -> None:
        """Views of written memory: their later uses depend on the write, whichever stage it ends up
        in.
        """
        for tensor in self.storages[storage_key(written)][1]:
            if tensor is output or id(tensor) not in self.nodes:
                continue
            old = self.nodes[id(tensor)]
            if old is node:
                continue
            fresh = self.graph.call_function(after, (old, node))
            fresh.meta.update(
                {k: v for k, v in node.meta.items() if k in ("modules", "no_grad", "autocast")},
                mutates=(), random=False, parameters=(), glued=True,
            )  # fmt: skip
            fresh.meta.update(value=tensor, storage=self._storage(tensor))
            fresh.meta.update(differentiable=tensor.requires_grad, view=tensor._is_view())
            self.nodes[id(tensor)] = fresh

    def _storage(self, tensor: torch.Tensor) -> int:
        key = storage_key(tensor)
        number, members = self.storages.setdefault(key, (len(self.storages), []))
        if all(m is not tensor for m in members):
            members.append(tensor)
            self.alive.append(tensor)
        return number

    def _arguments(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor_node(value)
        if isinstance(value, TracedInt):
            return value.as_node()
        if isinstance(value, torch.Size):
            return tuple(self._arguments(v) for v in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._arguments(v) for v in value))
        if isinstance(value, tuple | list):
            return (tuple if isinstance(value, tuple) else list)(self._arguments(v) for v in value)
        if isinstance(value, dict):
            if all(isinstance(k, str) for k in value):
                return {k: self._arguments(v) for k, v in value.items()}
            return self._constant(value)
        if isinstance(value, slice):
            return slice(*(self._arguments(v) for v in (value.start, value.stop, value.step)))
        if value is None or value is Ellipsis or type(value) in (bool, int, float, complex, str):
            return value
        if isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format):
            return value
        if isinstance(value, range):
            return list(value)
        if (
            type(value).__module__ == "numpy"
            and hasattr(value, "item")
            and getattr(value, "ndim", 1) == 0
        ):
            return value.item()
        if isinstance(value, nn.Module) and id(value) in self.paths:
            name = self.paths[id(value)]
            self.attributes[name] = value
            return self._get_attr(name, value)
        return self._constant(value)

    def _tensor_node(self, tensor: torch.Tensor) -> fx.Node:
        if id(tensor) in self.nodes:
            return self.nodes[id(tensor)]
        if id(tensor) in self.names:
            name = self.names[id(tensor)]
            self.attributes[name] = tensor
            return self._get_attr(name, tensor)
        seen_before = (
            not isinstance(tensor, torch._subclasses.FakeTensor)
            if self.fake
            else id(tensor) in self.constants
        )
        if not seen_before:
            raise TracingError(
                "a tensor was computed by code that tracing does not see (a scripted function, "
                "vmap, ...)"
            )
        return self._constant(tensor)

    def _get_attr(self, name: str, value: Any) -> fx.Node:
        node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        node.meta.update(mutates=(), random=False, modules=(), no_grad=False, autocast=())
        node.meta["parameters"] = (name,) if isinstance(value, nn.Parameter) else ()
        node.meta.update(value=value if isinstance(value, torch.Tensor) else None, storage=None)
        if isinstance(value, torch.Tensor):
            self._attach(node, value)
        return node

    def _constant(self, value: Any) -> fx.Node:
        held = flatten(dict(getattr(value, "__dict__", {})))[0]
        if not isinstance(value, torch.Tensor) and any(self._is_computed(t) for t in held):
            raise TracingError(f"a {type(value).__name__} carries computed tensors into a module")
        name = f"_constant_{sum(k.startswith('_constant_') for k in self.attributes)}"
        for known, other in self.attributes.items():
            if other is value and known.startswith("_constant_"):
                name = known
        self.attributes[name] = value
        return self._get_attr(name, value)

    # ---- sizes -----------------------------------------------------------------------------------

    def _size(self, name: str, args: Any, kwargs: Any) -> Any:
        tensor = args[0]
        node = self.nodes.get(id(tensor))
        dim = plain(args[1]) if len(args) > 1 else kwargs.get("dim")
        if node is None or node.op == "get_attr":  # a parameter's or constant's size never changes
            sizes = tensor.shape
            if name.endswith("numel"):
                return tensor.numel()
            if name.endswith("__len__"):
                return len(tensor)
            return sizes if dim is None else sizes[dim]
        if name.endswith("numel"):
            make = lambda: self.graph.call_method("numel", (node,))  # noqa: E731
            return self._integer(node, "numel", tensor.numel(), make)
        if name.endswith("__len__"):
            length = self._dim(node, tensor, 0)
            return length.look() if isinstance(length, TracedInt) else length
        if dim is not None:
            return self._dim(node, tensor, dim % max(tensor.dim(), 1))
        sizes = tuple(self._dim(node, tensor, d) for d in range(tensor.dim()))
        return torch.Size(sizes)

    def _dim(self, node: fx.Node, tensor: torch.Tensor, dim: int) -> int | TracedInt:
        make = lambda: self.graph.call_method("size", (node, dim))  # noqa: E731
        return self._integer(node, dim, tensor.shape[dim], make)

    def _integer(
        self, node: fx.Node, what: int | str, value: int, make: Callable[[], fx.Node]
    ) -> int | TracedInt:
        """A number of a node, made once; a plain one, with a guard, where the code needs that."""
        if (node, what) not in self.sizes:
            made = TracedInt(value, make, self.looks, frozenset({(what, value)}))
            wants_plain = self.looks.wants_plain((what, value))
            self.sizes[node, what] = made.look() if wants_plain else made
        return self.sizes[node, what]

    def _layout(self, short: str, args: Any, kwargs: Any) -> Any:
        """Strides and contiguity: the plain answer, with a guard."""
        self.paused = True
        try:
            answer = getattr(args[0], short)(*args[1:], **kwargs)
        finally:
            self.paused = False
        node = self.nodes.get(id(args[0]))
        if node is not None and node.op != "get_attr":
            query = self.graph.call_method(short, (node, *args[1:]), dict(kwargs))
            self.looks.guard(query, answer)
        return answer

    # ---- modules ---------------------------------------------------------------------------------

    def _is_leaf(self, module: nn.Module, path: str) -> bool:
        if (
            path in self.opaque
            or _is_opaque_by_nature(module)
            or getattr(module, "is_graph_leaf", False)
        ):
            return True
        from_torch = type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))
        return from_torch and not isinstance(module, _TRANSPARENT)

    def _returned(self, path: str, output: Any) -> None:
        first = isinstance(self.attributes.get(path), nn.RNNBase | nn.MultiheadAttention)
        if isinstance(output, tuple | list) and (len(output) == 1 or first):
            output = output[0]
        node = self.nodes.get(id(output)) if isinstance(output, torch.Tensor) else None
        self.calls.append((path, node, next(iter(reversed(self.graph.nodes)))))

    @staticmethod
    def _state_of(module: nn.Module) -> dict[str, Any]:
        state = {k: v for k, v in vars(module).items() if k not in _MODULE_INTERNALS}
        return {**state, **module._buffers, **module._parameters}

    def _node_name(self, op: str, target: Any) -> str | None:
        if op == "call_module":
            return target.replace(".", "_")
        if isinstance(target, FunctionCall):
            return target.function.__name__.lower()
        return None

    def _check_draws(self) -> None:
        """Python's and NumPy's random numbers are drawn by leaves, which draw anew in every call,
        or not at all.
        """
        if python_draws() != self.draws:
            raise BakedInError("the model draws from Python's or NumPy's random numbers")

    def _is_computed(self, tensor: torch.Tensor) -> bool:
        node = self.nodes.get(id(tensor))
        return node is not None and node.op != "get_attr"

    def _check_captures(self, target: Any, inputs: list[torch.Tensor]) -> None:
        known = {
            storage_key(t) for t in inputs
        }  # writing to a view also touches what it is a view of
        for tensor in self.observer.tensors.values():
            if self._is_computed(tensor) and storage_key(tensor) not in known:
                raise TracingError(
                    f"{target} uses a computed tensor that is not among its arguments"
                )


_MISSING = object()
_MODULE_INTERNALS = frozenset(vars(nn.Module()))


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Route module calls, custom functions and autocast regions of this thread to the recorder."""
    module_call, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__
    thread = threading.get_ident()

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.call_module(module_call, module, args, kwargs)

    def function_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.paused or threading.get_ident() != thread:
            return apply.__func__(cls, *args, **kwargs)
        return recorder.call_function(cls, args)

    def autocast_enter(region: Any) -> Any:
        if not recorder.paused and threading.get_ident() == thread:
            recorder.autocasts.append(
                (region.device, region.fast_dtype, region._enabled, region._cache_enabled)
            )
            region._recorded = True
        return enter(region)

    def autocast_exit(region: Any, *error: Any) -> Any:
        if getattr(region, "_recorded", False):
            recorder.autocasts.pop()
            region._recorded = False
        return leave(region, *error)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    torch.autograd.Function.apply = classmethod(function_apply)  # type: ignore[assignment, method-assign]
    torch.autocast.__enter__, torch.autocast.__exit__ = autocast_enter, autocast_exit  # type: ignore[method-assign]
    try:
        with recorder.fake or contextlib.nullcontext(), recorder:
            yield
    finally:
        recorder.looks.over = True
        nn.Module.__call__ = module_call  # type: ignore[method-assign]
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]
        torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]

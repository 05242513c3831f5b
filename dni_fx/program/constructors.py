"""Modules of ``torch.nn`` as the calls that make them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import DecouplingError
from ..passes.trace.held import is_hooked
from ..passes.trace.state import MODULE_INTERNALS, preserved_rng
from .functions import function_name
from .text import literal

_RNN = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout",
        "bidirectional", "proj_size")  # fmt: skip
_LAYER: dict[str, Callable[[Any], Any]] = {  # what a transformer's layer keeps in its parts
    "d_model": lambda layer: layer.self_attn.embed_dim,
    "nhead": lambda layer: layer.self_attn.num_heads,
    "dim_feedforward": lambda layer: layer.linear1.out_features,
    "dropout": lambda layer: layer.dropout.p,
    "layer_norm_eps": lambda layer: layer.norm1.eps,
    "batch_first": lambda layer: layer.self_attn.batch_first,
    "bias": lambda layer: layer.linear1.bias is not None,
}
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_NAMED = ("kernel_size", "output_size", "p", "dim", "normalized_shape")
_PLACED = ("normalized_shape", "p")  # written without their name, though they could have one


def constructed(module: nn.Module, path: str) -> str:
    """The call that makes a module like this one, whose weights are loaded later.

    Args:
        module: of ``torch.nn``.
        path: of it in the model.

    Raises:
        DecouplingError: a module that no such call makes.
    """
    if is_hooked(module):
        raise _unwritten(path, module, "has hooks, which stay out of files")
    kind = _kind_of(module)
    if kind is None:
        raise _unwritten(path, module, "is no module of torch.nn, and stays one node of the graph")
    wanted = dict(_arguments(module, kind))
    shortened = _shortened(kind, wanted)
    for given in (shortened, wanted):
        if _is_like(module, kind, given):
            return _call(kind, given) + _frozen(module) + ("" if module.training else ".eval()")
    raise _unwritten(path, module, "cannot be told from its settings")


def _kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The class of ``torch.nn`` that makes it; what this library derives from one is like it."""
    for kind in type(module).__mro__:
        if getattr(nn, kind.__name__, None) is kind:
            return kind
        if not kind.__module__.startswith("dni_fx."):
            return None
    return None


def _arguments(module: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Names and values of what a constructor is to be given."""
    if issubclass(kind, nn.RNNBase):
        names = [*_RNN[:2], *(["nonlinearity"] if kind is nn.RNN else []), *_RNN[2:]]
        defaults: dict[str, Any] = dict.fromkeys(names, False) | {"num_layers": 1, "bias": True}
        defaults |= {"dropout": 0.0, "proj_size": 0, "nonlinearity": "tanh"}
        for name in names:
            value = getattr(module, name)
            if name in _RNN[:2] or value != defaults[name]:
                yield name, value
    else:
        for name, parameter in inspect.signature(kind.__init__).parameters.items():
            if name in ("self", "device", "dtype") or parameter.kind in _STARRED:
                continue
            value = _setting(module, name, parameter)
            if parameter.default is parameter.empty or not _same(parameter.default, value):
                yield name, value
    first = next((t for t in module.parameters() if t.is_floating_point()), None)
    takes = "dtype" in inspect.signature(kind.__init__).parameters or issubclass(kind, nn.RNNBase)
    if first is not None and takes and first.dtype != torch.float32:
        yield "dtype", first.dtype


def _setting(module: Any, name: str, parameter: inspect.Parameter) -> Any:
    is_layer = isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
    if is_layer and name in _LAYER:
        return _LAYER[name](module)
    if name == "bias":
        held = getattr(module, name, getattr(module, "in_proj_bias", None))
        return held if isinstance(held, bool) else held is not None
    return getattr(module, name, parameter.default)


def _shortened(kind: type[nn.Module], wanted: dict[str, Any]) -> dict[str, Any]:
    """One number for a tuple of the same numbers, and none where it is taken anyway."""
    known = inspect.signature(kind.__init__).parameters
    short = {n: _short(v) for n, v in wanted.items()}
    return {n: v for n, v in short.items() if n not in known or not _same(known[n].default, v)}


def _short(value: Any) -> Any:
    several = isinstance(value, tuple) and len(value) and all(v == value[0] for v in value)
    return value[0] if several else value


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def _is_like(module: nn.Module, kind: type[nn.Module], given: dict[str, Any]) -> bool:
    """Whether the call makes such a module."""
    put_back_rng = preserved_rng()
    try:
        with torch.device("meta"):
            made = kind(**given)
    except Exception:
        return False
    finally:
        put_back_rng()
    made.train(module.training)
    return _facts(made) == _facts(module)


def _facts(module: nn.Module) -> list[Any]:
    found: list[Any] = []
    for path, part in module.named_modules():
        own = vars(part).items()
        found += [
            (path, n, v if callable(v) else repr(v))
            for n, v in own
            if n not in MODULE_INTERNALS and not n.startswith("_") and not hasattr(type(part), n)
        ]
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    return [*found, *((n, t.shape, t.dtype) for n, t in tensors)]


def _call(kind: type[nn.Module], given: dict[str, Any]) -> str:
    texts: list[str] = []
    required = [
        n
        for n, p in inspect.signature(kind.__init__).parameters.items()
        if n != "self" and p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    required += _RNN[:2] if issubclass(kind, nn.RNNBase) else ()
    plain = True
    for name, value in given.items():
        first = name in _PLACED and not texts
        plain = plain and (first or (name in required and name not in _NAMED))
        text = function_name(value)[0] if inspect.isfunction(value) else literal(value)
        texts.append(text if plain else f"{name}={text}")
    return f"nn.{kind.__name__}({', '.join(texts)})"


def _frozen(module: nn.Module) -> str:
    trained = [p.requires_grad for p in module.parameters()]
    return ".requires_grad_(False)" if trained and not any(trained) else ""


def _unwritten(path: str, module: nn.Module, why: str) -> DecouplingError:
    kind = type(module)
    return DecouplingError(
        f"submodule {path!r} ({kind.__module__}.{kind.__qualname__}) {why}, so it cannot be "
        "written as Python: let it be looked into (no hooks, no is_graph_leaf, no control flow on "
        "values; plan.report.notes says why it is not), or make it a module of torch.nn"
    )

"""Runs a hostile program beside plain PyTorch, and says what differs."""

from __future__ import annotations

import gc
import math
import pickle
import random
import re
import types
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle

import dni_fx
from dni_fx.errors import CutError, DecouplingError
from dni_fx.graphs.nested import flatten
from dni_fx.passes.trace.symbols import TracedInt

from ..helpers.comparing import describe, same_bits
from ..models.hostile import LIBRARIES, Call, Program, make_calls

CALLS = 3
_INTERNAL = frozenset(vars(nn.Module()))
_CACHES = re.compile(r"\b(C|cache)\d+$")
_PLACE = re.compile(r"program_\d+\.py:\d+|cross at '|cut after '|'(f|m|arg|n|at|v|p)\d+\b[^']*'")


class Wrong(AssertionError):
    """A program that does something else than plain PyTorch."""


class Side:
    """The model as plain PyTorch runs it, or what was made of it.

    Args:
        program: whose file is executed anew.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.model, self.scope = program.make()
        self.trainer: dni_fx.Trainer | None = None
        self.decoupled: dni_fx.Decoupled | None = None

    def decouple(self, first: Call, check: bool) -> None:
        """Cut the model; where the first layer is no legal place, at the first that is one. Every
        third program at two places.
        """
        inputs = first.inputs(self.scope)
        seeded(first.seed)
        options: dict[str, Any] = {"gradients": "exact", "check": check, "example_kwargs": inputs}
        cuts = ["m0"]
        if self.program.seed % 3 == 0:
            legal = self._legal(inputs)
            drawn = random.Random(first.seed).sample(range(len(legal)), min(2, len(legal)))
            cuts = [legal[k] for k in sorted(drawn)] or cuts
        try:
            self.decoupled = dni_fx.decouple(self.model, cuts, **options)
        except CutError:
            if not (legal := self._legal(inputs)):
                raise
            self.decoupled = dni_fx.decouple(self.model, legal[:1], **options)
        self.trainer = dni_fx.Trainer(self.decoupled, self.loss, optimizer=_sgd)

    def _legal(self, inputs: dict[str, Any]) -> list[str]:
        return [p.name for p in dni_fx.list_cut_points(self.model, (), inputs) if p.legal]

    def loss(self, output: Any, target: Any = None) -> Tensor:
        """Of all that the model returns, and what it keeps for it."""
        parts = [t.float().square().mean() for t in flatten(output)[0] if t.is_floating_point()]
        for used in self.program.used:
            if used.feature.loss:
                scope = {**self.scope, "m": eval(used.owner, self.scope)}
                parts.append(eval(used.text(used.feature.loss), scope))
        return torch.stack(parts).sum()

    def change(self, call: Call) -> None:
        """What happens before a call."""
        with torch.no_grad():
            for text in call.changes:
                exec(text, self.scope)

    def run(self, call: Call) -> dict[str, Any]:
        """One call: all that comes out of it, by name."""
        for parameter in self.model.parameters():
            parameter.grad = None
        inputs = call.inputs(self.scope)
        seeded(call.seed)
        with (
            torch.set_grad_enabled(call.kind != "no_grad"),
            torch.autocast("cpu", torch.bfloat16, call.autocast),
        ):
            results = self._step(inputs) if call.kind == "step" else self._call(inputs, call.kind)
        results["generators"] = generators()
        results["arguments"] = inputs
        return normal(results)

    def _step(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.trainer is not None:
            return {"loss": float(self.trainer.step(**inputs).loss)}
        loss = self.loss(self.model(**inputs))
        loss.backward()
        _sgd(self.model.parameters()).step()
        return {"loss": float(loss)}

    def _call(self, inputs: dict[str, Any], kind: str) -> dict[str, Any]:
        output = (self.decoupled or self.model)(**inputs)
        leaves = flatten(output)[0]
        roots = [t for t in leaves if t.requires_grad]
        results = {"outputs": output, "asks": [t.requires_grad for t in leaves]}
        if kind == "backward" and roots:
            torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])
            named = self.model.named_parameters()
            results["gradients"] = {n: p.grad for n, p in named if p.grad is not None}
            results["of x"] = inputs["x"].grad
        return results

    def state(self) -> dict[str, Any]:
        """All that the model and its file hold."""
        held: dict[str, Any] = {}
        for path, module in self.model.named_modules():
            own = {k: v for k, v in vars(module).items() if k not in _INTERNAL}
            held[path] = [own, module._parameters, module._buffers, module.training]
        mine = {
            k: v
            for k, v in self.scope.items()
            if k not in LIBRARIES and k not in ("model", "m") and k[:2] != "__"
        }
        return normal({"modules": held, "file": mine})


def check(program: Program, self_check: bool = True) -> str:
    """Run a program beside plain PyTorch.

    Returns:
        ``"equal"``, ``"refused"``, or ``"no program"`` where PyTorch itself refuses it.

    Raises:
        Wrong: with what differs, and the program.
    """
    eager, ours = Side(program), Side(program)
    calls = make_calls(program, CALLS)
    said: list[str] = []
    try:
        return _check(eager, ours, calls, self_check, said)
    except Exception as error:
        text = [program.source, *said, f"seed {program.seed}, self-check {self_check}"]
        what = f"{type(error).__name__}: {error}"
        raise Wrong("\n".join([what, *text])) from error


def _check(eager: Side, ours: Side, calls: list[Call], self_check: bool, said: list[str]) -> str:
    said.append(f"decouple: {calls[0]}")
    before = eager.state()
    seeded(calls[0].seed)
    states = generators()
    try:
        ours.decouple(calls[0], self_check)
    except Exception as error:
        compare(ours.state(), before, "after the refusal")
        return _judge(eager, calls[0], error)
    compare(ours.state(), before, "after decoupling")
    compare(generators(), states, "generators after decoupling")
    for call in calls:
        said.append(str(call))
        eager.change(call)
        ours.change(call)
        before = eager.state()
        try:
            want = eager.run(call)
        except Exception:
            return "no program"
        if not math.isfinite(want.get("loss", 0.0)):
            return "no program"
        try:
            got = ours.run(call)
        except DecouplingError as error:
            compare(ours.state(), before, "after the refusal")
            return _judge(None, call, error)
        compare(got, want, call.kind)
        compare(ours.state(), eager.state(), "what the model keeps")
    return "equal"


def _judge(eager: Side | None, call: Call, error: Exception) -> str:
    """Whether an error is a fair one."""
    if eager is not None:
        try:
            eager.run(call)
        except Exception:
            return "no program"
    if not isinstance(error, DecouplingError):
        raise error
    if not _PLACE.search(str(error)):
        raise Wrong(f"an error without a place: {error}") from error
    return "refused"


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1)


def seeded(seed: int) -> None:
    """Seed all generators of the process."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % (1 << 32))  # noqa: NPY002


def generators() -> list[bytes]:
    """States of all generators of the process."""
    named = random.getstate(), numpy.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state().numpy().tobytes(), *map(pickle.dumps, named)]


def compare(got: Any, want: Any, what: str) -> None:
    """Raise where two normal values differ."""
    if found := difference(got, want, what):
        raise Wrong(found)


def difference(got: Any, want: Any, at: str) -> str | None:
    """The first place where two normal values differ."""
    if isinstance(want, dict) and isinstance(got, dict):
        cache = _CACHES.search(at) is not None
        if not (got.keys() <= want.keys() if cache else got.keys() == want.keys()):
            return f"{at}: {list(got)} instead of {list(want)}"
        return next(filter(None, (difference(got[k], want[k], f"{at}.{k}") for k in got)), None)
    if isinstance(want, list) and isinstance(got, list) and len(got) == len(want):
        pairs = enumerate(zip(got, want, strict=True))
        return next(filter(None, (difference(*p, f"{at}[{k}]") for k, p in pairs)), None)
    if isinstance(want, Tensor) or isinstance(got, Tensor):
        return None if same_bits(got, want) else f"{at}: {describe(got, want)}"
    return None if type(got) is type(want) and got == want else f"{at}: {got!r} instead of {want!r}"


def normal(value: Any) -> Any:
    """A copy of a value made of dicts, lists, tensors and plain values."""
    if isinstance(value, FakeTensor | TracedInt):
        raise Wrong(f"a {type(value).__name__} is left behind")
    if isinstance(value, Tensor):
        dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        return dense.clone()
    if isinstance(value, dict):
        return {str(k): normal(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [normal(v) for v in value]
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return pickle.dumps(value.getstate())
    if isinstance(value, numpy.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, types.FunctionType | types.MethodType | type | types.ModuleType):
        return value.__name__
    if isinstance(value, RemovableHandle):
        return "handle"
    if hasattr(value, "cache_info"):
        return _cached(value)
    if hasattr(value, "__dict__"):
        return {"": type(value).__name__, **normal(vars(value))}
    return value if isinstance(value, int | float | str | bytes | None) else type(value).__name__


def _cached(function: Any) -> str:
    """Look into a memory of ``functools``; a graph may leave out what eager PyTorch adds."""
    for held in gc.get_referents(function):
        if isinstance(held, dict):
            normal({k: v for k, v in held.items() if not isinstance(v, types.FunctionType)})
    return str(function.__name__)

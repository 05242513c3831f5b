"""What cannot be decoupled, and arguments that do not fit together: one error, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..graphs.nested import flatten
from ..plan import CutPlan
from ..sources import EACH, JOINT


def check_whole(model: Any) -> None:
    """Refuse what cannot be decoupled as a whole: compiled, scripted, wrapped, lazy or hooked
    models.
    """
    if not isinstance(model, nn.Module):
        raise DecouplingError(f"decouple takes an nn.Module, not {type(model).__name__}")
    if isinstance(model, Decoupled):
        raise DecouplingError(
            "this model is decoupled already; pass decoupled.model to cut it in another way"
        )
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise DecouplingError(
            f"{name} is a compiled module; decouple the original one: model._orig_mod"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise DecouplingError(f"{name} wraps another module; decouple that one: model.module")
    if isinstance(model, torch.jit.ScriptModule):
        raise DecouplingError(
            f"{name} is a scripted module, which cannot be traced; decouple the Python module"
        )
    for path, module in model.named_modules():
        if any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False)):
            raise DecouplingError(
                f"lazy module {path!r} has no parameters yet: run the model once on a batch first"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise DecouplingError(
                f"submodule {path!r} is scripted, which cannot be traced; put the Python module "
                "there"
            )
        if path and hasattr(module, "_orig_mod"):
            raise DecouplingError(
                f"submodule {path!r} is compiled; decouple the model before compiling parts of it"
            )
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = [h.strip("_") for h in hooks if getattr(model, h)]
    if found:
        raise DecouplingError(
            f"{name} itself has {found[0].replace('_', ' ')}, which would not run: stages replace "
            "its forward. Remove them, or put them on submodules"
        )


def check_examples(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of an example batch, or an error that says what to pass."""
    if isinstance(args, torch.Tensor):
        raise DecouplingError(
            "example_inputs= must be a tuple of positional inputs; for one tensor pass (x,)"
        )
    if not isinstance(args, tuple | list | None) or not isinstance(kwargs, dict | None):
        raise DecouplingError(
            "example_inputs= must be a tuple of positional inputs, and example_kwargs= a dict"
        )
    args, kwargs = tuple(args or ()), dict(kwargs or {})
    for i, leaf in enumerate(flatten((args, kwargs))[0]):
        if leaf.is_inference():
            raise DecouplingError(
                f"example tensor {i} was made in inference mode; make it outside, or pass a clone"
            )
        if leaf.dim() and leaf.shape[0] == 0:
            raise DecouplingError(
                f"example tensor {i} has an empty batch, shape {tuple(leaf.shape)}; pass a real "
                "batch"
            )
    return args, kwargs


def check_cuts(cuts: Any, stages: Any) -> tuple[str, ...] | CutPlan | None:
    """Names of cuts or a plan, or an error that says what to pass; None for ``"auto"``."""
    if isinstance(cuts, bool | int):
        raise DecouplingError(
            f"cuts={cuts!r}: for a number of stages pass stages={cuts!r}; cuts= takes names"
        )
    if stages is not None and (
        isinstance(stages, bool) or not isinstance(stages, int) or stages < 1
    ):
        raise DecouplingError(f"stages={stages!r}: expected a whole number, at least 1")
    if isinstance(cuts, str):
        if cuts != "auto":
            raise DecouplingError(
                f"cuts={cuts!r}: pass a list of names, cuts=[{cuts!r}], or 'auto'"
            )
        return None
    if stages is not None:
        raise DecouplingError("stages= goes with cuts='auto'; n named cuts make n + 1 stages")
    if isinstance(cuts, CutPlan):
        return cuts
    if not isinstance(cuts, list | tuple):
        raise DecouplingError(f"cuts={cuts!r}: expected a list of names, a CutPlan, or 'auto'")
    names = tuple(cuts)
    wrong = [n for n in names if not isinstance(n, str)]
    if wrong:
        raise DecouplingError(f"cuts= must hold names (text), but holds {wrong[0]!r}")
    return names


def check_known(
    pairs: Iterable[tuple[str, str]], known: Iterable[str], argument: str
) -> dict[str, str]:
    """A plan's names of sources, or an error for one that only a factory could make."""
    own = [(i, n) for i, n in pairs if n.removeprefix(JOINT).removeprefix(EACH) not in known]
    if own:
        interface, name = own[0]
        raise DecouplingError(
            f"the plan was made with a source of your own at {interface!r} ({name}), which JSON "
            f"cannot hold; pass {argument}="
        )
    return dict(pairs)

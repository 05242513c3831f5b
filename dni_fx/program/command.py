"""``dni-fx emit``: a model's program as files, from the shell."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compiler import decouple
from ..errors import DecouplingError, did_you_mean
from ..sources import one_hot

_OPTIMIZERS = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad")


def add_options(add: Callable[..., Any], whole: Callable[[str], Any]) -> None:
    """The command's own options, besides the model's.

    Args:
        add: of the parser.
        whole: reads a whole number.
    """
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder, or an empty one")
    about = "a cut to make; may be repeated (default: those of the search for throughput)"
    add("--cut", action="append", default=[], metavar="NAME", help=about)
    add("--stages", type=whole, metavar="N", help="how many stages the search makes (default: 4)")
    about = "auto, linear, mlp, conv, local, zero (default: auto)"
    add("--gradients", default="auto", metavar="SOURCE", help=about)
    about = "let the sources see labels of so many classes"
    add("--classes", type=whole, metavar="N", help=about)
    about = "a loss of torch.nn.functional (default: cross_entropy)"
    add("--loss", default="cross_entropy", metavar="NAME", help=about)
    about = "of each stage (default: Adam)"
    add("--optimizer", choices=_OPTIMIZERS, default="Adam", help=about)
    add("--lr", type=float, default=1e-3, metavar="RATE", help="of the optimisers (default: 1e-3)")


def emit(options: argparse.Namespace, model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Decouple a model and write its program.

    Raises:
        DecouplingError: no such loss, or what :meth:`dni_fx.Decoupled.to_folder` refuses.
    """
    loss = getattr(nn.functional, options.loss, None)
    if not callable(loss):
        hint = did_you_mean(options.loss, [n for n in dir(nn.functional) if "loss" in n])
        raise DecouplingError(f"torch.nn.functional has no loss {options.loss!r}{hint}")
    context = None if options.classes is None else one_hot(options.classes)
    decoupled = decouple(
        model,
        options.cut or "auto",
        stages=None if options.cut else options.stages,
        example_inputs=inputs,
        gradients=options.gradients,
        context=context,
    )
    make = functools.partial(getattr(torch.optim, options.optimizer), lr=options.lr)
    decoupled.to_folder(options.out, loss=loss, optimizer=make)
    print(decoupled.plan)
    print(f"program written to {options.out}: python {options.out / 'train.py'}")
    return 0

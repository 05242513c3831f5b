"""What the command ``dni-fx`` takes: its options, and what their texts must be."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .errors import did_you_mean

DTYPES = ("float16", "float32", "float64", "bfloat16", "int32", "int64", "bool")
UNITS = {"": 1, "B": 1} | {p + "B": 1000**i for i, p in enumerate("kMGT", 1)}
UNITS |= {p + "iB": 1024**i for i, p in enumerate("KMGT", 1)}

DESCRIPTION = """\
The command ``dni-fx``: where a model can be cut, a plan with what it would bring, and the demo."""
EXAMPLES = """\
examples:
  dni-fx points torchvision.models:resnet18 --input 8x3x224x224
  dni-fx plan torchvision.models:resnet18 --input 8x3x224x224 --stages 4 --out plan.json \
--draw plan.html
  dni-fx plan mypackage.models:small --input 8x16:int64 --input 8x16:bool --must-cut encoder \
--memory-cap 2GiB
  dni-fx demo --steps 100

exit codes: 0 done; 1 a model, plan or file that cannot be used, and why; 2 wrong usage; \
130 interrupted"""


def make_parser() -> argparse.ArgumentParser:
    """Commands and options, each checked as far as its text goes."""
    form: dict[str, Any] = {
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
        "epilog": EXAMPLES,
    }
    parser = argparse.ArgumentParser("dni-fx", description=DESCRIPTION, **form)
    version = f"dni_fx {__version__}, torch {torch.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{plan,points,demo}")
    plan = commands.add_parser("plan", help="choose cuts; tell what they would bring", **form)
    points = commands.add_parser("points", help="list where a model can be cut", **form)
    for command in (plan, points):
        _add_model(command)
    _add_wishes(plan)
    _add_simulation(plan)
    _add_files(plan)
    commands.add_parser(
        "demo",
        help="train on handwritten digits with and without dni_fx (in a checkout)",
        description="Runs examples/digits.py of a checkout. Options are the demo's: --data, "
        "--steps, --seed, --out.",
        **form,
    )
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    """The model and its inputs."""
    command.add_argument(
        "target",
        type=_target,
        metavar="package.module:factory",
        help="a function without arguments that returns the model, or the model; the current "
        "directory is searched",
    )
    command.add_argument(
        "--input",
        type=parse_input,
        action="append",
        required=True,
        metavar="SIZES[:DTYPE]",
        help="one positional input, such as 8x3x224x224 or 8x16:int64 (whole numbers are 0 or 1); "
        "once for each",
    )
    about = "for parameters and inputs (default: 0)"
    command.add_argument("--seed", type=int, default=0, help=about)


def _add_wishes(plan: argparse.ArgumentParser) -> None:
    """What the cuts are chosen for."""
    add = plan.add_argument
    add("--stages", type=_whole, metavar="N", help="how many stages (default: 4)")
    add(
        "--objective",
        choices=("throughput", "memory", "traffic"),
        default="throughput",
        help="what to keep small: the slowest stage's time (the default), its memory, or the bytes "
        "that cross; learnability needs batches and a loss, so it is for dni_fx.plan_cuts only",
    )
    costs = ("analytic", "measured")
    add("--costs", choices=costs, default="analytic", help="estimate, or time the model")
    about = "auto, linear, mlp, conv, zero, ... (default: auto)"
    add("--gradients", default="auto", metavar="SOURCE", help=about)
    add("--memory-cap", type=parse_bytes, metavar="SIZE", help="of each stage, such as 2GiB")
    names: dict[str, Any] = {"action": "append", "default": []}
    add("--must-cut", metavar="NAME", help="a cut to make; may be repeated", **names)
    add("--never-cut", metavar="NAME", help="a cut not to make; may be repeated", **names)
    about = "a module, or several names, to keep in one stage; may be repeated"
    add("--keep-together", type=_names, metavar="A[,B,...]", help=about, **names)


def _add_simulation(plan: argparse.ArgumentParser) -> None:
    """The devices and links that stages are thought to run on."""
    add = plan.add_argument
    about = "of each link, a second (default: 1e10)"
    add("--bandwidth", type=_positive, default=1e10, metavar="BYTES", help=about)
    about = "of each message (default: 0)"
    add("--latency", type=_seconds, default=0.0, metavar="SECONDS", help=about)
    about = "in pipelines to compare with (default: 8)"
    add("--micro-batches", type=_whole, default=8, metavar="N", help=about)
    add("--speeds", type=_speeds, metavar="A,B,...", help="relative speed of each stage's device")


def _add_files(plan: argparse.ArgumentParser) -> None:
    """What is written."""
    add = plan.add_argument
    about = "write the plan; an existing file is replaced"
    add("--out", type=Path, metavar="PLAN.json", help=about)
    add("--draw", type=_drawing, metavar="PLAN.html", help="draw the plan, as .html or .svg")
    add("--quiet", action="store_true", help="no progress bar")


def _target(text: str) -> tuple[str, str]:
    name, _, attribute = text.partition(":")
    if name.endswith(".py") or "/" in name:
        hint = name.removesuffix(".py").strip("./").replace("/", ".")
        raise argparse.ArgumentTypeError(
            f"{text!r} names a file: expected {hint}:{attribute or 'factory'}"
        )
    if not all(part.isidentifier() for part in [*name.split("."), *attribute.split(".")]):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected package.module:factory, such as mymodels:make_net"
        )
    return name, attribute


def parse_input(text: str) -> tuple[tuple[int, ...], torch.dtype | None]:
    """Sizes and dtype of an input, from ``8x3x224x224`` or ``8x16:int64``."""
    sizes, colon, dtype = text.partition(":")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected sizes of 1 or more joined by x, batch first, such as 8x3x224x224; "
            f"found {sizes!r}"
        )
    if colon and dtype not in DTYPES:
        hint = did_you_mean(dtype, DTYPES)
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected one of {', '.join(DTYPES)}, found {dtype!r}{hint}"
        )
    return tuple(int(s) for s in sizes.split("x")), getattr(torch, dtype) if dtype else None


def _number(
    kind: Callable[[str], Any], least: float, expected: str, *, above: bool = False
) -> Callable[[str], Any]:
    """A parser of numbers in a range, whose refusal says what was expected."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value > least if above else least <= value < math.inf):
            raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
        return value

    return parse


_whole = _number(int, 1, "a whole number, at least 1")
_seconds = _number(float, 0, "seconds, 0 or more, such as 1e-4")
_positive = _number(float, 0, "bytes a second, more than 0, such as 1e10", above=True)


def _speeds(text: str) -> list[float]:
    expected = "numbers above 0 joined by commas, one for each stage, such as 1,1,0.5"
    parse = _number(float, 0, expected, above=True)
    return [parse(part) for part in text.split(",")]


def parse_bytes(text: str) -> int:
    """A number of bytes, from ``500000000``, ``500MB`` or ``2GiB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?) ?([a-zA-Z]*)", text, re.ASCII)
    if match is None or match[2] not in UNITS or not float(match[1]) * UNITS[match[2]] >= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected bytes, such as 500000000, 500MB or 2GiB"
        )
    return int(float(match[1]) * UNITS[match[2]])


def _names(text: str) -> str | tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a name, or names joined by commas, such as embed,head"
        )
    return names if len(names) > 1 else names[0]


def _drawing(text: str) -> Path:
    if Path(text).suffix not in (".html", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a name that ends in .html or .svg")
    return Path(text)

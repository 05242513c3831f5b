"""The command ``dni-fx``: its options, and what each of its commands does."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import random
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__, list_cut_points, plan_cuts, simulate
from .errors import DecouplingError, did_you_mean, user_line
from .passes.search.choosing import WITHIN
from .program.command import add_options, emit
from .reports.files import write_atomically
from .reports.sizes import parse_size

DTYPES = ("float16", "float32", "float64", "bfloat16", "int32", "int64", "bool")

DESCRIPTION = """\
The command ``dni-fx``: where a model can be cut, a plan with what it would bring, the program as
files, and the demo."""
EXAMPLES = """\
examples:
  dni-fx points torchvision.models:resnet18 --input 8x3x224x224
  dni-fx plan torchvision.models:resnet18 --input 8x3x224x224 --stages 4 --out plan.json \
--draw plan.html
  dni-fx plan mypackage.models:small --input 8x16:int64 --input 8x16:bool --must-cut encoder \
--memory-cap 2GiB
  dni-fx emit torchvision.models:resnet18 --input 8x3x224x224 --classes 1000 --out program
  dni-fx demo --steps 100

exit codes: 0 done; 1 a model, plan or file that cannot be used, and why; 2 wrong usage; \
130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows ``dni-fx``; ``sys.argv`` if None.

    Returns:
        Exit code: 0, 1 for a ``DecouplingError``, 130 after an interrupt, 141 where nobody reads
            the output.

    Raises:
        SystemExit: code 2 for wrong usage, 0 for ``--help`` and ``--version``.
    """
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "demo":
        parser.error(
            f"unrecognized arguments: {' '.join(rest)}; see dni-fx {options.command} --help"
        )
    options.rest = rest
    try:
        code: int = options.run(options)
        sys.stdout.flush()  # a closed pipe shows here rather than at exit
        return code
    except DecouplingError as error:
        print(f"dni-fx: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dni-fx: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # else Python complains at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def run_plan(options: argparse.Namespace) -> int:
    """Plan, write, draw, and compare schedules."""
    for path in (options.out, options.draw):
        if path is not None:
            check_place(path)  # before minutes of measuring
    devices = {"bandwidth": options.bandwidth, "speeds": options.speeds}
    wishes = ["stages", "objective", "gradients", "costs", "memory_cap"]
    wishes += ["keep_together", "never_cut", "must_cut", "within", "max_values"]
    asked: dict[str, Any] = devices | {name: getattr(options, name) for name in wishes}
    model, inputs = make_model(options)
    plan = plan_cuts(model, inputs, progress=not options.quiet, **asked)
    print(plan)
    if options.out is not None:
        write_atomically(options.out, plan.to_json())
        print(f"plan written to {options.out}")
    if options.draw is not None:
        plan.draw(options.draw)
        print(f"plan drawn in {options.draw}")
    pipelines = {"micro_batches": options.micro_batches, "latency": options.latency}
    simulation = simulate(plan, **pipelines, **devices)
    if options.memory_cap is not None:
        one = {"memory_cap": options.memory_cap, "moments": options.moments}
        print(f"\n{simulation.on_one_device(store_bandwidth=options.store_bandwidth, **one)}")
    print(f"\n{simulation}")
    return 0


def run_emit(options: argparse.Namespace) -> int:
    """Write the program as files."""
    return emit(options, *make_model(options))


def run_points(options: argparse.Namespace) -> int:
    """List cut points."""
    print(list_cut_points(*make_model(options)))
    return 0


def check_place(path: Path) -> None:
    """Check that a file can be there.

    Raises:
        DecouplingError: it is a directory, or would be in one that does not exist.
    """
    what = "is a directory" if path.is_dir() else f"the directory {path.parent} does not exist"
    if path.is_dir() or not path.parent.is_dir():
        raise DecouplingError(
            f"cannot write {str(path)!r}: {what}; name a file in an existing directory"
        )


def run_demo(options: argparse.Namespace) -> int:
    """Run the demo of the checkout that dni_fx comes from, or that is the current directory."""
    script = find_demo()
    missing = [n for n in ("matplotlib", "sklearn") if importlib.util.find_spec(n) is None]
    if missing:
        raise DecouplingError(f"the demo needs {' and '.join(missing)}: pip install 'dni_fx[demo]'")
    before = sys.argv, list(sys.path)
    sys.argv = [str(script), *options.rest]
    sys.path.insert(0, str(script.parent))  # as for any script; the demo has a module beside it
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv, sys.path[:] = before
    return 0


def find_demo() -> Path:
    """Where the demo is; it is no part of the installed package.

    Raises:
        DecouplingError: neither dni_fx nor the current directory is a checkout.
    """
    folders = [Path(__file__).resolve().parents[1], Path.cwd()]
    for folder in folders:
        script = folder / "experiments" / "digits.py"
        if script.is_file() and (folder / "dni_fx" / "cli.py").is_file():
            return script
    raise DecouplingError(
        "the demo is experiments/digits.py of dni_fx's source repository; a package does "
        f"not hold it, and it is neither in {folders[0]} nor in {folders[1]}: run dni-fx demo, or "
        "make demo, in a checkout"
    )


def make_model(options: argparse.Namespace) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model that the target names, and random inputs.

    Raises:
        DecouplingError: no such module or attribute, or what it names makes no model.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as with python -m
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    name, attribute = options.target
    wanted = "expected a function without arguments that returns an nn.Module, or an nn.Module"
    found = _import(name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            hint = did_you_mean(part, [n for n in dir(found) if not n.startswith("_")])
            raise DecouplingError(f"{name} has no {attribute!r}: {wanted}{hint}")
        found = getattr(found, part)
    made = "is"
    if not isinstance(found, nn.Module) and callable(found):
        made = "returned a value"
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise DecouplingError(
                f"{name}:{attribute} raised {_describe(error)}; {wanted}"
            ) from error
    if not isinstance(found, nn.Module):
        raise DecouplingError(f"{name}:{attribute} {made} of type {type(found).__name__}: {wanted}")
    device = next((t.device for t in [*found.parameters(), *found.buffers()]), torch.device("cpu"))
    generator = torch.Generator().manual_seed(options.seed)
    return found, tuple(
        _random(sizes, dtype, generator).to(device) for sizes, dtype in options.input
    )


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise DecouplingError(
                f"no module {name!r}, neither in {os.getcwd()} nor installed: run dni-fx in the "
                f"directory that holds {name.split('.')[0]!r}, or install it"
            ) from error
        raise DecouplingError(
            f"importing {name!r} raised {_describe(error)}; it must import cleanly"
        ) from error


def _describe(error: BaseException) -> str:
    """Type, message, and the last of the user's lines that it passed."""
    line = user_line(error)
    place = f" ({line})" if line else ""
    return f"{type(error).__name__}: {error}{place}"


def _random(
    sizes: tuple[int, ...], dtype: torch.dtype | None, generator: torch.Generator
) -> Tensor:
    if dtype is None or dtype.is_floating_point:
        return torch.randn(sizes, generator=generator, dtype=dtype)
    return torch.randint(0, 2, sizes, generator=generator).to(dtype)


# ---- options ------------------------------------------------------------------------------------


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
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{plan,points,emit,demo}"
    )
    plan = commands.add_parser("plan", help="choose cuts; tell what they would bring", **form)
    points = commands.add_parser("points", help="list where a model can be cut", **form)
    emitting = commands.add_parser("emit", help="write a program that imports torch alone", **form)
    about = "a function without arguments that returns the model, or the model; the current "
    about += "directory is searched"
    sizes = "one positional input, such as 8x3x224x224 or 8x16:int64 (whole numbers are 0 or 1); "
    sizes += "once for each"
    many: dict[str, Any] = {"type": parse_input, "action": "append", "required": True}
    for command in (plan, points, emitting):
        add = command.add_argument
        add("target", type=_target, metavar="package.module:factory", help=about)
        add("--input", metavar="SIZES[:DTYPE]", help=sizes, **many)
        add("--seed", type=int, default=0, help="for parameters and inputs (default: 0)")
    _add_wishes(plan.add_argument)
    add_options(emitting.add_argument, _whole)
    demo = commands.add_parser(
        "demo",
        help="train on handwritten digits with and without dni_fx (in a checkout)",
        description="Runs experiments/digits.py of a checkout. Options are the demo's: --data, "
        "--steps, --seed, --out.",
        **form,
    )
    runs = (plan, run_plan), (points, run_points), (emitting, run_emit), (demo, run_demo)
    for command, run in runs:
        command.set_defaults(run=run)
    return parser


def _add_wishes(add: Callable[..., Any]) -> None:
    """What cuts are chosen for, on what devices and links, and what is written."""
    add("--stages", type=_whole, metavar="N", help="how many stages (default: 4)")
    about = "what to keep small: the slowest stage's time (the default), its memory, or the bytes "
    about += "that cross; learnability needs batches and a loss, so it is for dni_fx.plan_cuts only"
    objectives = ("throughput", "memory", "traffic")
    add("--objective", choices=objectives, default="throughput", help=about)
    costs = ("analytic", "measured")
    add("--costs", choices=costs, default="analytic", help="estimate, or time the model")
    about = "auto, linear, mlp, conv, zero, ..., or one with options, such as 'linear(rank=16)' "
    about += "(default: auto)"
    add("--gradients", default="auto", metavar="SOURCE", help=about)
    about = "of each stage, such as 2GiB; and what a step on one device would take is told"
    add("--memory-cap", type=parse_bytes, metavar="SIZE", help=about)
    about = "that the optimiser keeps for each parameter (default: 2, as Adam does)"
    add("--moments", type=_moments, default=2.0, metavar="N", help=about)
    about = "of a store for stages that are not in memory, a second (default: 1e9)"
    add("--store-bandwidth", type=_positive, default=1e9, metavar="BYTES", help=about)
    names: dict[str, Any] = {"action": "append", "default": []}
    add("--must-cut", metavar="NAME", help="a cut to make; may be repeated", **names)
    add("--never-cut", metavar="NAME", help="a cut not to make; may be repeated", **names)
    about = "cut only where a module ends, or wherever it is best (default: the former, unless it "
    add("--within", choices=WITHIN, help=about + "costs more than 5 %%)")
    about = "most values with a gradient that may cross at a cut"
    add("--max-values", type=_whole, metavar="N", help=about)
    about = "a module, or several names, to keep in one stage; may be repeated"
    add("--keep-together", type=_names, metavar="A[,B,...]", help=about, **names)
    about = "of each link, a second (default: 1e10)"
    add("--bandwidth", type=_positive, default=1e10, metavar="BYTES", help=about)
    about = "of each message (default: 0)"
    add("--latency", type=_seconds, default=0.0, metavar="SECONDS", help=about)
    about = "in pipelines to compare with (default: 8)"
    add("--micro-batches", type=_whole, default=8, metavar="N", help=about)
    add("--speeds", type=_speeds, metavar="A,B,...", help="relative speed of each stage's device")
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
    kind: Callable[[str], Any], least: float, expected: str, above: bool = False
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
_moments = _number(float, 0, "a number, 0 or more")
_positive = _number(float, 0, "bytes a second, more than 0, such as 1e10", True)


def _speeds(text: str) -> list[float]:
    expected = "numbers above 0 joined by commas, one for each stage, such as 1,1,0.5"
    parse = _number(float, 0, expected, True)
    return [parse(part) for part in text.split(",")]


def parse_bytes(text: str) -> int:
    """A number of bytes, from ``500000000``, ``500MB`` or ``2GiB``."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


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

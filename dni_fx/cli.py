"""The command ``dni-fx``: what each of its commands does."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import random
import runpy
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import list_cut_points, plan_cuts, simulate
from .cli_options import make_parser
from .errors import DecouplingError, did_you_mean, user_line


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
    try:
        code = run(options, rest)
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


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Run the command that was asked for.

    Args:
        options: as parsed.
        rest: what the parser does not know.

    Returns:
        The exit code.
    """
    if options.command == "demo":
        return run_demo(rest)
    (run_plan if options.command == "plan" else run_points)(options)
    return 0


def run_plan(options: argparse.Namespace) -> None:
    """Plan, write, draw, and compare schedules."""
    for path in (options.out, options.draw):
        if path is not None:
            check_place(path)  # before minutes of measuring
    model, inputs = make_model(options)
    plan = plan_cuts(
        model,
        inputs,
        stages=options.stages,
        objective=options.objective,
        gradients=options.gradients,
        costs=options.costs,
        bandwidth=options.bandwidth,
        speeds=options.speeds,
        memory_cap=options.memory_cap,
        keep_together=options.keep_together,
        never_cut=options.never_cut,
        must_cut=options.must_cut,
        progress=not options.quiet,
    )
    print(plan)
    if options.out is not None:
        with replacing(options.out) as path:
            path.write_text(plan.to_json(), encoding="utf-8")
        print(f"plan written to {options.out}")
    if options.draw is not None:
        with replacing(options.draw) as path:
            plan.draw(path)
        print(f"plan drawn in {options.draw}")
    told = simulate(
        plan,
        micro_batches=options.micro_batches,
        latency=options.latency,
        bandwidth=options.bandwidth,
        speeds=options.speeds,
    )
    print(f"\n{told}")


def check_place(path: Path) -> None:
    """Check that a file can be there.

    Raises:
        DecouplingError: it is a directory, or would be in one that does not exist.
    """
    what = "is a directory" if path.is_dir() else f"the directory {path.parent} does not exist"
    if path.is_dir() or not path.parent.is_dir():
        raise DecouplingError(f"cannot write {path}: {what}; name a file in an existing directory")


def run_points(options: argparse.Namespace) -> None:
    """List cut points."""
    print(list_cut_points(*make_model(options)))


def run_demo(rest: list[str]) -> int:
    """Run the demo of the checkout that dni_fx comes from, or that is the current directory."""
    script = find_demo()
    missing = [n for n in ("matplotlib", "sklearn") if importlib.util.find_spec(n) is None]
    if missing:
        raise DecouplingError(f"the demo needs {' and '.join(missing)}: pip install 'dni_fx[demo]'")
    before = sys.argv, list(sys.path)
    sys.argv = [str(script), *rest]
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
        script = folder / "examples" / "digits.py"
        if script.is_file() and (folder / "dni_fx" / "cli.py").is_file():
            return script
    raise DecouplingError(
        "the demo is examples/digits.py of dni_fx's source repository; the installed package does "
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
    wanted = "a function without arguments that returns an nn.Module, or an nn.Module"
    found = _import(name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            hint = did_you_mean(part, [n for n in dir(found) if not n.startswith("_")])
            raise DecouplingError(f"{name} has no {attribute!r}: expected {wanted}{hint}")
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise DecouplingError(
                f"{name}:{attribute} is of type {type(found).__name__}: expected {wanted}"
            )
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise DecouplingError(
                f"{name}:{attribute} raised {_describe(error)}; expected {wanted}"
            ) from error
    if not isinstance(found, nn.Module):
        raise DecouplingError(
            f"{name}:{attribute} returned a value of type {type(found).__name__}: expected {wanted}"
        )
    device = next((t.device for t in [*found.parameters(), *found.buffers()]), torch.device("cpu"))
    generator = torch.Generator().manual_seed(options.seed)
    return found, tuple(
        _random(sizes, dtype, generator).to(device) for sizes, dtype in options.input
    )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its place once it is complete; nothing is left of it after
    an error.
    """
    target = path.resolve()  # a link stays a link
    special = target.exists() and not target.is_file()  # such as /dev/null
    part = target if special else target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        yield part
        if not special:
            if target.exists():
                shutil.copymode(target, part)
            part.replace(target)
    except OSError as error:
        raise DecouplingError(
            f"cannot write {path}: {error.strerror or error}; name another file"
        ) from error
    finally:
        if not special:
            part.unlink(missing_ok=True)


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


if __name__ == "__main__":
    sys.exit(main())

"""cDNI with linear synthesizers on MNIST, beside backprop, DNI without labels and both controls, over several seeds.

Four hidden layers of 256, a cut after each, batches of 256: the feed-forward experiment of Jaderberg et al. 2016
(arXiv:1608.05343, section 3.1), at 3,000 steps instead of 500,000. Prints the table of ``docs/results.md``. Each
finished (method, seed) is kept in a JSON file, so an interrupted run goes on where it was:

    python examples/mnist.py [--data DIR] [--seeds 0 1 2] [--methods backprop cdni ...] [--steps 3000] [--out FILE]

The defaults. Hidden layers are Linear, BatchNorm, ReLU, as in the paper: without the normalisation (``--no-norm``)
layers outrun their synthesizers and cDNI is far behind after this many steps. Synthesizers learn targets of unit size
from a zero start, so at Adam 1e-3 a weight needs a thousand steps to get anywhere: theirs is 3e-2, the model's 1e-3.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from data import DataError, Digits, mnist
from digits import METHODS, train

Record = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="directory of MNIST's .gz files (default: found or downloaded)")
    usual = [method for method in METHODS if method != "exact"]  # exact mode is backprop
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=usual)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's rate for the model (default: 1e-3)")
    parser.add_argument("--synthesizer-lr", type=float, default=3e-2, help="and for the synthesizers (default: 3e-2)")
    parser.add_argument("--no-norm", dest="norm", action="store_false", help="hidden layers without BatchNorm")
    parser.add_argument("--measure-every", type=int, default=100, help="steps between test errors (default: 100)")
    parser.add_argument("--out", type=Path, default=Path("out/mnist.json"), help="finished runs (out/mnist.json)")
    args = parser.parse_args()
    if args.steps < 1 or args.measure_every < 1:
        parser.error("--steps and --measure-every must be at least 1")
    return args


def run_one(method: str, seed: int, data: Digits, settings: Record) -> Record:
    """Train once and keep what the table needs, errors in per cent."""
    run = train(method, data, seed=seed, batch=256, width=256, **settings)
    errors = [100.0 * (1.0 - accuracy) for accuracy in run.accuracy]
    return {
        "method": method,
        "seed": seed,
        "settings": settings,
        "test_error": errors[-1],
        "best_test_error": min(errors),
        "train_error": 100.0 * (1.0 - run.train_accuracy),
        "cosine": run.mean_cosine,
        "seconds": run.seconds,
        "synthesizer_parameters": run.synthesizer_parameters,
        "steps": run.steps,
        "test_errors": errors,
    }


def read_records(path: Path) -> list[Record]:
    """The finished runs, none where there is no file yet."""
    if not path.exists():
        return []
    try:
        records: list[Record] = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} holds no finished runs ({error}): delete it or name another with --out") from error
    return records


def write_records(path: Path, records: list[Record]) -> None:
    """Write at once, so that an interruption leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(records, indent=1) + "\n")
    partial.replace(path)


def table(records: list[Record], methods: list[str], steps: int) -> str:
    """Mean and each seed, as markdown."""
    lines = [
        f"| method | test error at {steps:,} steps, % | best, % | train error, % | gap | cosine at first cut | seconds "
        "| synthesizer parameters |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method in methods:
        runs = [record for record in records if record["method"] == method]
        gaps = [run["test_error"] - run["train_error"] for run in runs]
        columns = [
            *(spread([run[key] for run in runs]) for key in ("test_error", "best_test_error", "train_error")),
            f"{statistics.mean(gaps):.2f}",
            f"{statistics.mean(run['cosine'] for run in runs):.2f}".replace("nan", "-"),
            f"{statistics.mean(run['seconds'] for run in runs):.0f}",
            f"{runs[0]['synthesizer_parameters']:,}",
        ]
        lines.append(f"| {method} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """The mean, and each seed's value in brackets."""
    return f"{statistics.mean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})"


def main() -> int:
    """Train what is not finished, then print the table."""
    args = parse_arguments()
    torch.set_num_threads(1)
    settings = {
        "steps": args.steps,
        "lr": args.lr,
        "synthesizer_lr": args.synthesizer_lr,
        "norm": args.norm,
        "measure_every": args.measure_every,
    }
    try:
        data, records = mnist(args.data), read_records(args.out)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1

    wanted = []
    for seed in args.seeds:
        for method in args.methods:
            known = [r for r in records if (r["method"], r["seed"], r["settings"]) == (method, seed, settings)]
            if not known:
                print(f"seed {seed}, {method}", file=sys.stderr)
                known = [run_one(method, seed, data, settings)]
                records += known
                write_records(args.out, records)
            wanted += known
    print(table(wanted, args.methods, args.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Layers that update at random steps only, with and without synthetic inputs, on MNIST.

At every step each layer updates with probability p, independently of the others (Jaderberg et al.
2016, arXiv:1608.05343, section 3.1: sparse updates and, with synthetic inputs, the complete
unlock). Four hidden layers of 256 and a cut after each. Steps are chosen so that every layer
updates equally often whatever p is. Controls, at p = 1: backprop and no gradient at all. Finished
runs are kept in a JSON file beside the figure, so the same command goes on where it was:

    python experiments/paper_sparse_updates.py --updates 3000 --probabilities 0.05 0.1 0.2 0.5 1
    --seeds 0 1 2 --jobs 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from data import Digits
from digits import CUTS, batches, mlp
from experiment import (
    SETTINGS,
    Progress,
    Record,
    Settings,
    add_arguments,
    carry_out,
    check_arguments,
    figure,
    finish_axes,
    groups,
    line,
    load_data,
    make_run,
    mean_curve,
    shown,
    table,
    train,
)

NET: Settings = {"batch": 256, "optimizer": {"name": "adam", "lr": 1e-3}, "decay": "cosine"}
DNI: Settings = {
    "gradients": {"source": "mlp", "hidden": 2, "width": 256, "norm": "batch"},
    "optimizer": {"name": "adam", "lr": 1e-4},
    "earlier_rate": 0.6,
    "label_smoothing": 0.2,
    "synthesizer_optimizer": {"name": "adam", "lr": 1e-2, "betas": [0.9, 0.99]},
}
CDNI: Settings = {
    "gradients": "linear",
    "labels": True,
    "synthesizer_optimizer": {"name": "adam", "lr": 3e-2},
}
# With them, the complete unlock. A second hidden layer, since it predicts at once what several
# layers compute.
INPUTS: Settings = {"inputs": {"source": "mlp", "hidden": 2}, "input_lr": 3e-3}
METHODS: dict[str, Settings] = {
    "dni": DNI,
    "cdni": CDNI,
    "dni + inputs": {**DNI, **INPUTS},
    "cdni + inputs": {**CDNI, **INPUTS},
    "cdni + linear inputs": {**CDNI, "inputs": "linear", "input_lr": 1e-2},
    "backprop": {"gradients": None},
    "zero": {"gradients": "zero"},
}
USUAL = ("dni", "cdni", "dni + inputs", "cdni + inputs", "backprop", "zero")
CONTROLS = ("backprop", "zero")  # at p = 1 only


def make_settings(args: argparse.Namespace, method: str, probability: float) -> Settings:
    """Everything that decides a run."""
    settings = {**SETTINGS, **NET, **METHODS[method]}
    steps = round(args.updates / probability)
    if method not in CONTROLS:
        settings["schedule"] = {"schedule": "RandomUpdates", "probability": probability}
    if args.lr is not None:
        settings["optimizer"] = {**settings["optimizer"], "lr": args.lr}
    if args.synthesizer_lr is not None:
        settings["synthesizer_optimizer"] = {
            **settings["synthesizer_optimizer"],
            "lr": args.synthesizer_lr,
        }
    every = args.measure_every or max(
        args.updates // 10, 1
    )  # in updates, so that curves can be compared
    return settings | {
        "steps": steps,
        "measure_every": round(every / probability),
        "probability": probability,
        "width": args.width,
        "data_set": args.data_set,
        "limit": args.limit,
    }


def make_runs(args: argparse.Namespace) -> list[Record]:
    """All runs asked for, seed by seed; the frequent updates first, since they take the fewest
    steps.
    """
    return [
        make_run(method, f"p = {p:g}", seed, make_settings(args, method, p))
        for seed in args.seeds
        for p in sorted(
            {*args.probabilities, *([1.0] if set(args.methods) & set(CONTROLS) else [])},
            reverse=True,
        )
        for method in args.methods
        if (p == 1 if method in CONTROLS else p in args.probabilities)
    ]


def run_one(run: Record, data: Digits, progress: Progress) -> Record:
    """Train a fresh net."""
    settings, seed = run["settings"], run["seed"]
    torch.manual_seed(seed)
    model = mlp(data.pixels, settings["width"])
    drawn = batches(data, min(settings["batch"], len(data.train_x)), settings["steps"], seed)
    return train(model, CUTS, data, drawn, settings, seed=seed, progress=progress)


def draw(records: list[Record], path: Path) -> None:
    """Error at the end against p, and learning curves against updates, a panel for each method."""
    methods = [m for m in dict.fromkeys(r["method"] for r in records) if m not in CONTROLS]
    by_group = {
        (runs[0]["settings"]["probability"], method): runs
        for (_, method), runs in groups(records).items()
    }
    probabilities = sorted({p for p, _ in by_group}, reverse=True)
    controls = [(method, runs) for (_, method), runs in by_group.items() if method in CONTROLS]
    with figure(path, 1 + len(methods)) as (left, *panels):
        for index, method in enumerate(methods):
            known = [p for p in probabilities if (p, method) in by_group]
            errors = [
                statistics.mean(shown(r["test_accuracy"], True) for r in by_group[p, method])
                for p in known
            ]
            left.plot(known, errors, marker="o", label=method, **line(index))
        for index, (method, runs) in enumerate(controls):
            level = statistics.mean(shown(r["test_accuracy"], True) for r in runs)
            left.axhline(
                level, color="grey", linestyle=("--", ":")[index % 2], label=f"{method}, p = 1"
            )
        left.set_xscale("log")
        left.set(xlabel="probability of an update", title="at the end")
        finish_axes(left, errors=True)
        for axes, method in zip(panels, methods, strict=True):
            for index, p in enumerate(probabilities):
                if (p, method) in by_group:
                    steps, errors = mean_curve(by_group[p, method], errors=True)
                    axes.plot(
                        [p * s for s in steps],
                        errors,
                        label=f"p = {p:g}",
                        marker=".",
                        **line(index),
                    )
            for index, (control, runs) in enumerate(controls):
                steps, errors = mean_curve(runs, errors=True)
                axes.plot(
                    steps,
                    errors,
                    color="grey",
                    linestyle=("--", ":")[index % 2],
                    label=f"{control}, p = 1",
                )
            axes.set(xlabel="updates of each layer", title=method)
            finish_axes(axes, errors=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--updates", type=int, default=3000, help="of each layer, in the mean (default: 3000)"
    )
    parser.add_argument("--steps", type=int, help="of p = 1; the same as --updates")
    parser.add_argument(
        "--probabilities", nargs="+", type=float, default=[0.05, 0.1, 0.2, 0.5, 1.0]
    )
    parser.add_argument("--width", type=int, default=256, help="of hidden layers (default: 256)")
    parser.add_argument("--data-set", choices=("mnist", "digits"), default="mnist")
    parser.add_argument(
        "--lr", type=float, help="of the layers (default: as in the table at the top)"
    )
    parser.add_argument(
        "--synthesizer-lr", type=float, help="of the synthesizers (default: as in the table)"
    )
    add_arguments(parser, METHODS, USUAL, "out/paper_sparse_updates.json")
    args = parser.parse_args(arguments)
    check_arguments(parser, args, "updates", "steps", "width")
    if not all(0 < p <= 1 for p in args.probabilities):
        parser.error("--probabilities must be above 0 and at most 1")
    args.updates = args.steps or args.updates
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not finished, then print the table and draw the curves."""
    args = parse_arguments(arguments)

    def report(records: list[Record]) -> None:
        in_order = sorted(
            records, key=lambda r: (args.methods.index(r["method"]), -r["settings"]["probability"])
        )
        print(table(in_order, errors=True))
        picture = args.out.with_suffix(".png")
        draw(records, picture)
        print(f"\nerror over probabilities and learning curves: {picture}")

    return carry_out(
        args,
        make_runs(args),
        run_one,
        partial(load_data, args.data_set, args.data, args.limit),
        report,
    )


if __name__ == "__main__":
    sys.exit(main())

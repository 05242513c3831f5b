"""Does it pay to cut where gradients can be predicted? Balanced cuts against learnable ones, on
CIFAR-10.

A convolutional net is cut into stages twice, by ``plan_cuts(objective="throughput")`` and by
``"learnability"``, within 5 % of the best throughput, and trained with the same synthesizers from
the same weights on the same batches; beside both are backprop and, at both kinds of cuts, no
gradient at all (``zero``) and the last batch's (``stale``). Costs are analytic, so that the plans
are the same on every machine. Finished runs are kept in a JSON file, so an interrupted experiment
goes on where it was:

    python experiments/cut_choice.py [--data DIR] [--seeds 0 1 2] [--steps 600] [--stages 4] [--out
    FILE]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import dni_fx
from data import DataError, Digits, cifar10
from digits import accuracy, batches
from experiment import read_records, write_records

BATCH = 64
PROBED = 8  # batches that the learnability is measured on
SOURCES = ("linear", "zero", "stale")

Record = dict[str, Any]


def network() -> nn.Sequential:
    """Nine convolutions with batch norm, two poolings and a linear head; about 150,000
    parameters.
    """
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise((3, 16, 16, 16, 32, 32, 32, 64, 64, 64))):
        block = [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        layers.append(nn.Sequential(*block, *([nn.MaxPool2d(2)] if i in (2, 5) else [])))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def plan(objective: str, model: nn.Module, data: Digits, stages: int) -> dni_fx.CutPlan:
    """The cuts for an objective; the weights are those at the start of training."""
    probe: dict[str, Any] = {}
    if objective == "learnability":
        probe = {"batches": list(batches(data, BATCH, PROBED, seed=1000)), "loss": F.cross_entropy}
    return dni_fx.plan_cuts(
        model, (data.train_x[:BATCH],), stages=stages, objective=objective, costs="analytic",
        gradients="linear", context=dni_fx.one_hot(10), progress=True, **probe,
    )  # fmt: skip


def run_one(objective: str, source: str, seed: int, data: Digits, settings: Record) -> Record:
    """Train once; test accuracy in per cent."""
    torch.manual_seed(seed)
    model = network()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    record: Record = {
        "objective": objective,
        "source": source,
        "seed": seed,
        "settings": settings,
        "cuts": [],
    }
    steps = settings["steps"]
    if objective == "backprop":
        adam = torch.optim.Adam(model.parameters(), settings["lr"])

        def step(x: torch.Tensor, y: torch.Tensor) -> None:
            F.cross_entropy(model(x), y).backward()
            adam.step()
            adam.zero_grad()
    else:
        found = plan(objective, model, data, settings["stages"])
        model.load_state_dict(start)
        assert found.report is not None
        assert found.report.search is not None
        record["cuts"], record["slowest"] = list(found.cuts), found.report.search.slowest
        record["explained"] = found.report.search.explained
        decoupled = dni_fx.decouple(
            model,
            list(found.cuts),
            example_inputs=(data.train_x[:BATCH],),
            gradients=source,
            context=dni_fx.one_hot(10),
        )
        trainer = dni_fx.Trainer(
            decoupled,
            F.cross_entropy,
            optimizer=partial(torch.optim.Adam, lr=settings["lr"]),
            synthesizer_optimizer=partial(torch.optim.Adam, lr=settings["synthesizer_lr"]),
            metrics_every=steps,
        )

        def step(x: torch.Tensor, y: torch.Tensor) -> None:
            trainer.step(x, target=y)

    begin = time.perf_counter()
    for x, y in tqdm(
        batches(data, BATCH, steps, seed),
        total=steps,
        desc=f"{objective} {source} {seed}",
        leave=False,
    ):
        step(x, y)
    record["seconds"] = time.perf_counter() - begin
    record["accuracy"] = 100 * accuracy(model, data.test_x, data.test_y)
    return record


def table(records: list[Record], steps: int) -> str:
    """Mean and each seed, as markdown."""
    lines = [
        f"| cuts | gradients | test accuracy at {steps:,} steps, % | seconds | cut after |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    groups = dict.fromkeys((r["objective"], r["source"]) for r in records)
    for objective, source in groups:
        runs = [r for r in records if (r["objective"], r["source"]) == (objective, source)]
        each = ", ".join(f"{r['accuracy']:.1f}" for r in runs)
        cuts = "; ".join(dict.fromkeys(", ".join(r["cuts"]) or "-" for r in runs))
        mean, seconds = (statistics.mean(r[k] for r in runs) for k in ("accuracy", "seconds"))
        lines.append(f"| {objective} | {source} | {mean:.1f} ({each}) | {seconds:.0f} | {cuts} |")
    return "\n".join(lines)


def main() -> int:
    """Train what is not finished, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        type=Path,
        help="directory of CIFAR-10's binary files (default: found or downloaded)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument(
        "--lr", type=float, default=1e-3, help="Adam's rate for the model (default: 1e-3)"
    )
    parser.add_argument(
        "--synthesizer-lr",
        type=float,
        default=3e-3,
        help="and for the synthesizers (default: 3e-3)",
    )
    parser.add_argument(
        "--limit", type=int, help="use only so many images of each part, for a quick try"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/cut_choice.json"), help="finished runs"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {k: getattr(args, k) for k in ("steps", "stages", "lr", "synthesizer_lr")}
    try:
        whole, records = cifar10(args.data), read_records(args.out)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    data = Digits(whole.name, *(part[: args.limit] for part in whole[1:]))
    settings |= {} if args.limit is None else {"limit": args.limit}
    runs = [
        ("backprop", "true"),
        *((o, s) for o in ("throughput", "learnability") for s in SOURCES),
    ]
    wanted = []
    for (objective, source), seed in itertools.product(runs, args.seeds):
        key = (objective, source, seed, settings)
        known = [
            r for r in records if (r["objective"], r["source"], r["seed"], r["settings"]) == key
        ]
        if not known:
            known = [run_one(objective, source, seed, data, settings)]
            records += known
            write_records(args.out, records)
        wanted += known
    print(table(wanted, args.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Copy and repeat copy over spans longer than the unroll: DNI through time against truncated BPTT.

The copy and repeat-copy tasks of Jaderberg et al. 2016 (arXiv:1608.05343, section 3.2). Random
patterns of eight bits are shown one after the other and must be reproduced from memory. Training
sees T time steps at a time: truncated BPTT (``bptt``) learns nothing about what comes after them,
DNI predicts the gradient of it, alone (``dni``) or with the auxiliary task of predicting the next
boundary's prediction (``dni+aux``). ``stale``, the last boundary's true gradient, is a control;
``full``, BPTT over the whole sequence with one update for each, is the upper end where it is asked
for.

One step is one window of T time steps, so methods of the same T are compared at equal windows, time
steps and updates (``full`` makes fewer updates). The last window of a sequence may be shorter.
Finished runs are kept in a JSON file beside the figure, so the same command goes on where it was:

    python experiments/paper_copy.py --tasks copy repeat-copy --windows 2 3 4 5 --steps 100000
    --seeds 0 1 --jobs 2
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dni_fx.errors import NonFiniteError
from experiment import (
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
    make_recurrent_trainer,
    make_run,
    mean_curve,
    mean_or_dash,
    override_source,
    spread,
)

BITS = 8  # of a pattern
FLAGS = 2  # channels of the input besides the bits
NOT_ASKED = -1.0  # in a target
THRESHOLD = 0.15  # bits of error per bit to be reproduced, below which a length is solved
REPEATS_UNIT = 10  # the number of repeats is shown divided by it
TASKS = ("copy", "repeat-copy")

METHODS: dict[str, Settings] = {
    "bptt": {"gradients": "zero"},
    "dni": {"gradients": "auto", "auxiliary": False, "factor": 0.1, "synthesizer_lr": 1e-3},
    "dni+aux": {"gradients": "auto", "auxiliary": True, "factor": 0.1, "synthesizer_lr": 1e-3},
    "stale": {"gradients": "stale", "factor": 0.1},
    "full": {"gradients": "exact"},
}
USUAL = ("bptt", "dni", "dni+aux", "stale")


# ---- the tasks -----------------------------------------------------------------------------------


@dataclass
class Curriculum:
    """What is to be learnt next: ``patterns`` in a sequence, ``repeats`` of them.

    Copy goes from N patterns to N + 1. Repeat copy takes turns: another repeat where there are
    fewer of them than patterns, else another pattern, so (1, 1), (2, 1), (2, 2), (3, 2), ...
    """

    task: str
    patterns: int = 1
    repeats: int = 1
    solved: int = 0

    @property
    def length(self) -> int:
        """How long the present sequences count as.

        For copy the number of patterns. For repeat copy the time steps of the whole sequence,
        (repeats + 1) x patterns + 3: of the usual ways to count it is the one that gives the
        lengths in the paper's table (5, 7, 19, 23, 33, 39, 59, 67).
        """
        return self.patterns if self.task == "copy" else (self.repeats + 1) * self.patterns + 3

    def see(self, error: float) -> bool:
        """Go on to the next length if a batch's error is small enough; whether it was."""
        if not error < THRESHOLD:
            return False
        self.solved = self.length
        if self.task == "repeat-copy" and self.repeats < self.patterns:
            self.repeats += 1
        else:
            self.patterns += 1
        return True


def make_batch(
    task: str, patterns: int, repeats: int, batch: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """A batch of sequences of equal length.

    Copy: a start flag, the patterns, an end flag, then silence in which they are to be reproduced.
    Repeat copy: a start flag, the patterns, the number of repeats in a channel of its own, silence,
    and at the end of it a marker to be given by the net, in a ninth output, without which the
    number would not matter.

    Returns:
        Inputs ``(time, batch, bits + 2)`` and targets ``(time, batch, outputs)``, :data:`NOT_ASKED`
        where any answer will do.
    """
    bits = torch.randint(0, 2, (patterns, batch, BITS), generator=generator).float()
    marked = task == "repeat-copy"
    begin, end = patterns + 2, patterns + 2 + repeats * patterns  # of what is to be reproduced
    x = torch.zeros(end + marked, batch, BITS + FLAGS)
    x[0, :, BITS] = 1.0
    x[1 : patterns + 1, :, :BITS] = bits
    x[patterns + 1, :, BITS + 1] = repeats / REPEATS_UNIT if marked else 1.0
    target = torch.full((end + marked, batch, BITS + marked), NOT_ASKED)
    target[begin:end, :, :BITS] = bits.repeat(repeats, 1, 1)
    if marked:
        target[begin:end, :, BITS] = 0.0
        target[end, :, BITS] = 1.0
    return x, target


def summed_error(output: Tensor, target: Tensor) -> Tensor:
    """Sigmoid cross entropy in nats, summed over what is asked; where nothing is, a zero that has a
    graph.
    """
    errors = F.binary_cross_entropy_with_logits(output, target.clamp(min=0.0), reduction="none")
    return (errors * (target != NOT_ASKED)).sum()


def bits_to_reproduce(target: Tensor) -> int:
    """Number of patterns' bits in a target."""
    return int((target[..., :BITS] != NOT_ASKED).sum())


class Memory(nn.Module):
    """An LSTM and a linear head."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BITS + FLAGS, width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(time, batch, outputs)``."""
        hidden, _ = self.lstm(x)
        logits: Tensor = self.head(hidden)
        return logits


# ---- runs ----------------------------------------------------------------------------------------


def run_one(run: Record, data: None, progress: Progress) -> Record:
    """Train a fresh net for so many windows.

    Returns:
        ``solved`` (longest, as :attr:`Curriculum.length` counts, 0 for none), ``levels`` (step,
        patterns and repeats of each length solved), ``curve`` (steps; solved; the mean error, in
        bits per bit, of the sequences that ended since the last measurement, None without one),
        ``sequences`` (batches of them that ended), ``time_steps``, ``seconds`` and
        ``processor_seconds`` (of training steps), ``synthesizer_parameters``, ``diverged`` (the
        step at which a value was no longer finite and the run ended, or None).
    """
    settings = run["settings"]
    torch.manual_seed(run["seed"])
    generator = torch.Generator().manual_seed(run["seed"])
    window, batch, every, steps = (
        settings[key] for key in ("window", "batch", "measure_every", "steps")
    )
    model = Memory(settings["width"], BITS + (settings["task"] == "repeat-copy"))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        # Every bit weighs the same, in a window that is full of them and in one that has only a
        # few.
        return summed_error(output, target) / (window * batch * BITS)

    trainer = make_recurrent_trainer(model, loss, settings)
    curriculum = Curriculum(settings["task"])
    curve: Record = {"steps": [], "solved": [], "error": []}
    levels: list[list[int]] = []
    errors: list[float] = []
    windows: Iterator[tuple[Tensor, Tensor]] = iter(())
    nats, asked, sequences, time_steps, left = 0.0, 0, 0, 0, 0
    seconds, processor_seconds, diverged, count = 0.0, 0.0, None, 0
    for count in range(1, steps + 1):
        if not left:
            x, target = make_batch(
                settings["task"], curriculum.patterns, curriculum.repeats, batch, generator
            )
            windows, left = (
                zip(x.split(window), target.split(window), strict=True),
                math.ceil(len(x) / window),
            )
            nats, asked = 0.0, bits_to_reproduce(target)
        x, target = next(windows)
        left -= 1
        time_steps += len(x)
        start, processor_start = time.perf_counter(), time.process_time()
        try:
            report = trainer.step(x, done=left == 0, target=target)
        except NonFiniteError:
            diverged = count
        seconds += time.perf_counter() - start
        processor_seconds += time.process_time() - processor_start
        note = ""
        if diverged is None:
            nats += summed_error(report.outputs.detach(), target).item()
            if not left:
                sequences += 1
                errors.append(nats / math.log(2) / asked)
                level = [count, curriculum.patterns, curriculum.repeats]
                if curriculum.see(errors[-1]):
                    levels.append(level)
                    note = f"solved {curriculum.solved}"
        if count % every == 0 or count == steps or diverged:
            curve["steps"].append(count)
            curve["solved"].append(curriculum.solved)
            curve["error"].append(statistics.mean(errors) if errors else None)
            errors = []
        progress(1, note)
        if diverged:
            break
    progress(steps - count, "")
    return {
        "solved": curriculum.solved,
        "levels": levels,
        "curve": curve,
        "sequences": sequences,
        "time_steps": time_steps,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "synthesizer_parameters": sum(p.numel() for p in trainer.synthesizers.parameters()),
        "diverged": diverged,
    }


def make_settings(args: argparse.Namespace, task: str, window: int, method: str) -> Settings:
    """Everything that decides a run."""
    settings: Settings = {
        "task": task,
        "window": window,
        "steps": args.steps,
        "batch": args.batch,
        "width": args.width,
        "optimizer": {"name": "adam", "lr": args.lr},
        "clip_norm": args.clip_norm,
        "measure_every": args.measure_every or max(args.steps // 50, 1),
        **METHODS[method],
    }
    override_source(settings, args)
    return settings


def make_runs(args: argparse.Namespace) -> list[Record]:
    """All runs asked for, seed by seed, so that an early look at the table compares all methods."""
    return [
        make_run(method, f"{task}, T = {window}", seed, make_settings(args, task, window, method))
        for seed in args.seeds
        for task in args.tasks
        for window in args.windows
        for method in args.methods
    ]


# ---- tables and figures --------------------------------------------------------------------------


def table(records: list[Record]) -> str:
    """Mean and each seed, as markdown."""
    lines = [
        "| setting | method | longest length solved | patterns x repeats | error of the next, bits "
        "per bit | windows | time steps | batches of sequences | CPU seconds | synthesizer "
        "parameters |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (setting, method), runs in groups(records).items():
        marks = [
            "" if r["diverged"] is None else f", diverged at step {r['diverged']:,}" for r in runs
        ]
        columns = [
            spread([r["solved"] for r in runs], marks, digits=0),
            ", ".join(
                f"{r['levels'][-1][1]} x {r['levels'][-1][2]}" if r["levels"] else "-" for r in runs
            ),
            mean_or_dash(
                [
                    known[-1]
                    for r in runs
                    if (known := [e for e in r["curve"]["error"] if e is not None])
                ]
            ),
            f"{runs[0]['settings']['steps']:,}",
            *(
                f"{statistics.mean(r[key] for r in runs):,.0f}"
                for key in ("time_steps", "sequences")
            ),
            f"{statistics.mean(r['processor_seconds'] for r in runs):.0f}",
            f"{runs[0]['synthesizer_parameters']:,}",
        ]
        lines.append(f"| {setting} | {method} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def draw(records: list[Record], path: Path) -> None:
    """Longest length solved against windows, a panel for each setting: the mean over seeds."""
    settings = list(dict.fromkeys(record["setting"] for record in records))
    methods = list(dict.fromkeys(record["method"] for record in records))
    with figure(path, len(settings)) as panels:
        for axes, setting in zip(panels, settings, strict=True):
            for (at, method), runs in groups(records).items():
                if at == setting:
                    steps, solved = mean_curve(runs, errors=False, key="solved")
                    axes.plot(steps, solved, label=method, **line(methods.index(method)))
            axes.set(xlabel="windows", title=setting)
            finish_axes(axes, errors=False)
            axes.set_ylabel("longest length solved")


# ---- command line --------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument(
        "--windows", nargs="+", type=int, default=[2, 3, 4, 5], help="T, in time steps (2 3 4 5)"
    )
    parser.add_argument(
        "--steps", type=int, default=30_000, help="windows of each run (default: 30000)"
    )
    parser.add_argument("--batch", type=int, default=32, help="sequences at a time (default: 32)")
    parser.add_argument("--width", type=int, default=256, help="of the LSTM (default: 256)")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the net (default: 1e-3)")
    parser.add_argument(
        "--synthesizer-lr", type=float, help="of the synthesizers (default: as in the table)"
    )
    parser.add_argument(
        "--factor", type=float, help="on synthetic gradients in use (default: as in the table)"
    )
    parser.add_argument(
        "--auxiliary", type=float, help="weight of the auxiliary loss (default: as in the table)"
    )
    parser.add_argument(
        "--clip-norm", type=float, default=1.0, help="of the net's gradient (default: 1)"
    )
    add_arguments(parser, METHODS, USUAL, "out/paper_copy.json", samples=None)
    parser.set_defaults(seeds=[0, 1])
    args = parser.parse_args(arguments)
    check_arguments(parser, args, "steps", "batch", "width")
    if min(args.windows) < 1:
        parser.error("--windows must be at least 1")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not finished, then print the table and draw the curves."""
    args = parse_arguments(arguments)

    def report(records: list[Record]) -> None:
        in_order = sorted(
            records,
            key=lambda r: (args.tasks.index(r["settings"]["task"]), r["settings"]["window"]),
        )
        print(table(in_order))
        picture: Path = args.out.with_suffix(".png")
        draw(in_order, picture)
        print(f"\nlongest length over windows: {picture}")

    def no_data() -> Any:
        return None

    return carry_out(args, make_runs(args), run_one, no_data, report)


if __name__ == "__main__":
    sys.exit(main())

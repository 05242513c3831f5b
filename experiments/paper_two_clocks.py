"""Two networks with clocks of their own: DNI on the message between them against locking the fast
to the slow one.

The system of Jaderberg et al. 2016 (arXiv:1608.05343, section 3.3). Network A sees a digit at every
tick, and says every T ticks how many of the last T were odd; then it sends a message to network B,
which ticks once in T ticks and says after T messages how many of the T x T digits were threes. A
never hears of threes but through the gradient of its messages. ``locked`` waits for that, so both
networks update every T x T ticks, with true gradients. With a source on the message A updates every
T ticks: ``dni`` predicts the gradient from the message alone, ``cdni`` also sees how many threes
there were. Controls: ``zero`` (no gradient), ``stale`` (that of the messages before).

Sequences are T x T ticks long, with digits drawn anew. Both reports are classifications (0 to T, 0
to T x T) and are trained by cross entropy; what is measured is how often they are wrong. Between
its windows A's state is carried, but no gradient: truncated BPTT, the same for all methods. One
step is one sequence for every network, so methods are compared at equal ticks; updates are counted.
Finished runs are kept in a JSON file beside the figure, so the same command goes on where it was:

    python experiments/paper_two_clocks.py --steps 3000 --seeds 0 1 2 --jobs 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from data import Digits
from dni_fx.errors import NonFiniteError
from dni_fx.networks import Collection, Link, Member
from dni_fx.recurrent import decouple_through_time
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
    load_data,
    make_optimizer,
    make_run,
    make_source,
    mean_curve,
    override_source,
    spread,
)

THREE = 3
TEST_SEQUENCES = 1024
SOON = 20.0  # error in per cent, for which the table says when it was reached
REPORTS = {"threes": "threes", "odd": "odd digits"}  # B's, A's

MLP: Settings = {"source": "mlp", "hidden": 1}  # the paper's, as wide as the message
METHODS: dict[str, Settings] = {
    "locked": {"gradients": "exact"},
    "dni": {"gradients": MLP, "factor": 10.0, "synthesizer_lr": 1e-2},
    "cdni": {"gradients": "linear", "labels": "threes", "factor": 10.0, "synthesizer_lr": 1e-2},
    "zero": {"gradients": "zero"},
    "stale": {"gradients": "stale", "factor": 1.0},
}
USUAL = ("locked", "dni", "cdni", "zero", "stale")


# ---- the task ------------------------------------------------------------------------------------


class Sequences(NamedTuple):
    """A batch of sequences: ``x`` ``(T * T, batch, pixels)``, and the numbers to be told.

    ``odd`` and ``threes_of_each`` count the digits of each window of T ticks, ``(T, batch)``;
    ``threes`` those of the whole sequence, ``(batch,)``.
    """

    x: Tensor
    odd: Tensor
    threes_of_each: Tensor
    threes: Tensor


def make_sequences(
    images: Tensor, labels: Tensor, ticks: int, batch: int, generator: torch.Generator | None = None
) -> Sequences:
    """Sequences of digits drawn independently.

    Args:
        images: ``(samples, ...)``.
        labels: ``(samples,)``.
        ticks: T.
        batch: number of sequences.
        generator: of random numbers.
    """
    chosen = torch.randint(len(labels), (ticks * ticks, batch), generator=generator)
    by_window = labels[chosen].unflatten(0, (ticks, ticks))
    threes = (by_window == THREE).sum(1)
    return Sequences(images[chosen].flatten(2), (by_window % 2).sum(1), threes, threes.sum(0))


class Fast(nn.Module):
    """Network A: two layers on each digit, an LSTM, the number of odd digits and a message.

    Args:
        pixels: of a digit.
        width: of the layers, the LSTM and the message.
        ticks: T.
    """

    def __init__(self, pixels: int, width: int, ticks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (pixels, width):
            layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
        self.front = nn.Sequential(*layers)
        self.core = nn.LSTM(width, width)
        self.count = nn.Linear(width, ticks + 1)
        self.message = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))

    def forward(self, x: Tensor, state: Any) -> tuple[dict[str, Tensor], Any]:
        """From a window ``(T, batch, pixels)``: logits ``(batch, T + 1)`` and message ``(batch,
        width)`` at its end.
        """
        seen = self.front(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        hidden, state = self.core(seen, state)
        return {"odd": self.count(hidden[-1]), "message": self.message(hidden[-1])}, state


class Slow(nn.Module):
    """Network B: an LSTM on messages, and the number of threes.

    Args:
        width: of the messages and the LSTM.
        ticks: T.
    """

    def __init__(self, width: int, ticks: int) -> None:
        super().__init__()
        self.core = nn.LSTM(width, width)
        self.count = nn.Linear(width, ticks * ticks + 1)

    def forward(self, messages: Tensor, state: Any) -> tuple[Tensor, Any]:
        """From messages ``(T, batch, width)``: logits ``(batch, T * T + 1)`` after the last."""
        hidden, state = self.core(messages, state)
        return self.count(hidden[-1]), state


@torch.no_grad()
def measure(fast: nn.Module, slow: nn.Module, sequences: Sequences, ticks: int) -> dict[str, float]:
    """How often each report is wrong, in per cent, and its cross entropy in nats, in eval mode."""
    fast.eval()
    slow.eval()
    state, odd, messages = None, [], []
    for window in sequences.x.split(ticks):
        output, state = fast(window, state)
        odd.append(output["odd"])
        messages.append(output["message"])
    logits = {"odd": torch.cat(odd), "threes": slow(torch.stack(messages), None)[0]}
    truth = {"odd": sequences.odd.flatten(), "threes": sequences.threes}
    fast.train()
    slow.train()
    errors = {
        name: 100.0 * (logits[name].argmax(1) != truth[name]).double().mean().item()
        for name in REPORTS
    }
    return errors | {
        f"{name}_loss": F.cross_entropy(logits[name], truth[name]).item() for name in REPORTS
    }


# ---- runs ----------------------------------------------------------------------------------------


def make_collection(
    fast: nn.Module, slow: nn.Module, settings: Settings, updates: dict[str, int]
) -> Collection:
    """Both networks with their trainers, A sending to B.

    Args:
        fast: as :class:`Fast`.
        slow: as :class:`Slow`.
        settings: ``ticks``, ``optimizer``, ``clip_norm``, ``gradients`` of the message, and where
            its source takes them ``factor``, ``labels`` (which of A's two counts it sees) and
            ``synthesizer_optimizer``.
        updates: where those of A and B are counted.
    """
    ticks = settings["ticks"]

    def optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
        made = make_optimizer(settings["optimizer"], parameters)
        updates[name] = 0

        def count(
            *_: Any,
        ) -> None:  # answers to messages that have their gradients already make steps without any
            updates[name] += any(
                p.grad is not None for group in made.param_groups for p in group["params"]
            )

        made.register_step_post_hook(count)
        return made

    options: dict[str, Any] = {}
    if "synthesizer_optimizer" in settings:
        options["synthesizer_optimizer"] = partial(
            make_optimizer, settings["synthesizer_optimizer"]
        )
    if "labels" in settings:
        encode = dni_fx.one_hot(ticks + 1)
        options["context"] = lambda target: encode(target[settings["labels"]])

    def count_odd(output: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(output["odd"], target["odd"])

    a = decouple_through_time(
        fast,
        ticks,
        loss=count_odd,
        optimizer=partial(optimizer, "A"),
        gradients={
            "message": make_source(settings["gradients"]),
            "next_0": "zero",
            "next_1": "zero",
        },
        messages=("message",),
        message_factor=settings.get("factor", 1.0),
        clip_norm=settings["clip_norm"],
        metrics_every=ticks,  # each sequence
        **options,
    )
    b = decouple_through_time(
        slow,
        ticks,
        loss=F.cross_entropy,
        optimizer=partial(optimizer, "B"),
        gradients="zero",  # its one window is the whole sequence
        input_gradients=True,
        clip_norm=settings["clip_norm"],
    )
    return Collection({"A": Member(a), "B": Member(b, every=ticks)}, [Link("A", "message", "B")])


def train_on(collection: Collection, sequences: Sequences, ticks: int) -> float | None:
    """Train on a batch of sequences, tick by tick.

    Returns:
        Cosine of the message's gradient with its target, as last measured; None where nothing is
        predicted.
    """
    cosine = None
    for t, x in enumerate(sequences.x):
        window = t // ticks
        target = {"odd": sequences.odd[window], "threes": sequences.threes_of_each[window]}
        reports = collection.tick(
            {"A": x}, {"A": target, "B": sequences.threes}, done=t + 1 == len(sequences.x)
        )
        if "A" in reports and "message" in reports["A"].interfaces:
            cosine = reports["A"].interfaces["message"].cosine
    return None if cosine is None or cosine != cosine else cosine


def run_one(run: Record, data: Digits, progress: Progress) -> Record:
    """Train two fresh networks on so many batches of sequences.

    Returns:
        ``curve`` (steps; ``ticks`` of each sequence of the batch, all in all; test error in per
        cent of ``odd`` and ``threes``, and their losses; ``cosine`` of the message's gradient),
        ``odd`` and ``threes`` (errors at the end), ``updates`` of A and B, ``seconds`` and
        ``processor_seconds`` (of training), ``synthesizer_parameters``, ``diverged`` (the step at
        which a value was no longer finite and the run ended, or None).
    """
    settings = run["settings"]
    ticks, every, steps = settings["ticks"], settings["measure_every"], settings["steps"]
    torch.manual_seed(run["seed"])
    generator = torch.Generator().manual_seed(run["seed"])
    fast, slow = Fast(data.pixels, settings["width"], ticks), Slow(settings["width"], ticks)
    updates: dict[str, int] = {}
    collection = make_collection(fast, slow, settings, updates)
    draw_test = torch.Generator().manual_seed(0)
    test = make_sequences(data.test_x, data.test_y, ticks, TEST_SEQUENCES, draw_test)
    curve: Record = {key: [] for key in ("steps", "ticks", "cosine")}
    seconds, processor_seconds, diverged, cosine = 0.0, 0.0, None, None
    for count in range(1, steps + 1):
        sequences = make_sequences(data.train_x, data.train_y, ticks, settings["batch"], generator)
        start, processor_start = time.perf_counter(), time.process_time()
        try:
            cosine = train_on(collection, sequences, ticks)
        except NonFiniteError:
            diverged = count
        seconds += time.perf_counter() - start
        processor_seconds += time.process_time() - processor_start
        note = ""
        if count % every == 0 or count == steps or diverged:
            curve["steps"].append(count)
            curve["ticks"].append(count * ticks * ticks)
            curve["cosine"].append(cosine)
            for key, value in measure(fast, slow, test, ticks).items():
                curve.setdefault(key, []).append(value)
            note = ", ".join(f"{curve[name][-1]:.1f} % {name}" for name in REPORTS)
        progress(1, note)
        if diverged:
            break
    progress(steps - count, "")
    return {
        "curve": curve,
        **{name: curve[name][-1] for name in REPORTS},
        "updates": updates,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "synthesizer_parameters": sum(
            p.numel()
            for member in collection.members.values()
            for p in member.trainer.synthesizers.parameters()
        ),
        "diverged": diverged,
    }


def make_settings(args: argparse.Namespace, method: str, rate: float) -> Settings:
    """Everything that decides a run."""
    settings: Settings = {
        "ticks": args.ticks,
        "steps": args.steps,
        "batch": args.batch,
        "width": args.width,
        "optimizer": {"name": "adam", "lr": rate},
        "clip_norm": args.clip_norm,
        "measure_every": args.measure_every or max(args.steps // 20, 1),
        "data_set": args.data_set,
        "limit": args.limit,
        **METHODS[method],
    }
    override_source(settings, args)
    return settings


def make_runs(args: argparse.Namespace) -> list[Record]:
    """All runs asked for, seed by seed, so that an early look at the table compares all methods."""
    return [
        make_run(
            method,
            f"T = {args.ticks}, learning rate {rate:g}",
            seed,
            make_settings(args, method, rate),
        )
        for seed in args.seeds
        for rate in args.lr
        for method in args.methods
    ]


# ---- tables and figures --------------------------------------------------------------------------


def ticks_until(record: Record, name: str, error: float) -> int | None:
    """After how many ticks a report was first measured to be wrong less often than so."""
    pairs = zip(record["curve"]["ticks"], record["curve"][name], strict=True)
    return next((ticks for ticks, found in pairs if found < error), None)


def table(records: list[Record]) -> str:
    """Mean and each seed, as markdown."""
    lines = [
        "| setting | method | threes (B): error, % | loss | odd digits (A): error, % | loss "
        f"| ticks to {SOON:g} % error on threes | ticks | updates of A | of B | CPU seconds | "
        "synthesizer parameters |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (setting, method), runs in groups(records).items():
        marks = [
            "" if r["diverged"] is None else f", diverged at step {r['diverged']:,}" for r in runs
        ]
        soon = [ticks_until(r, "threes", SOON) for r in runs]
        columns = [
            spread([r["threes"] for r in runs], marks),
            f"{statistics.mean(r['curve']['threes_loss'][-1] for r in runs):.3f}",
            spread([r["odd"] for r in runs], marks),
            f"{statistics.mean(r['curve']['odd_loss'][-1] for r in runs):.3f}",
            ", ".join("-" if n is None else f"{n:,}" for n in soon),
            f"{runs[0]['curve']['ticks'][-1]:,}",
            *(f"{statistics.mean(r['updates'][name] for r in runs):,.0f}" for name in ("A", "B")),
            f"{statistics.mean(r['processor_seconds'] for r in runs):.0f}",
            f"{runs[0]['synthesizer_parameters']:,}",
        ]
        lines.append(f"| {setting} | {method} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def draw(records: list[Record], path: Path) -> None:
    """Errors of both reports against ticks and against A's updates, for each setting: the mean over
    seeds.
    """
    settings = list(dict.fromkeys(record["setting"] for record in records))
    methods = list(dict.fromkeys(record["method"] for record in records))
    panels = [
        (setting, name, unit)
        for setting in settings
        for unit in ("ticks", "updates of A")
        for name in REPORTS
    ]
    with figure(path, len(panels)) as all_axes:
        for axes, (setting, name, unit) in zip(all_axes, panels, strict=True):
            for (at, method), runs in groups(records).items():
                if at != setting:
                    continue
                steps, errors = mean_curve(runs, errors=False, key=name)
                last = runs[0]["curve"]["steps"][-1]
                whole = (
                    runs[0]["curve"]["ticks"][-1] if unit == "ticks" else runs[0]["updates"]["A"]
                )
                style = line(methods.index(method))
                axes.plot(
                    [whole / last * s for s in steps], errors, label=method, marker=".", **style
                )
            axes.set(xlabel=unit, title=f"{REPORTS[name]}, {setting}")
            finish_axes(axes, errors=True)


# ---- command line --------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ticks", type=int, default=4, help="T: ticks of A for one of B (default: 4)"
    )
    parser.add_argument(
        "--steps", type=int, default=3000, help="batches of sequences (default: 3000)"
    )
    parser.add_argument("--batch", type=int, default=64, help="sequences at a time (default: 64)")
    parser.add_argument(
        "--width", type=int, default=128, help="of layers, LSTMs and message (default: 128)"
    )
    parser.add_argument("--data-set", choices=("mnist", "digits"), default="mnist")
    parser.add_argument(
        "--lr", nargs="+", type=float, default=[3e-4], help="of both networks (default: 3e-4)"
    )
    parser.add_argument(
        "--synthesizer-lr",
        type=float,
        help="of the synthesizer (default: as in the table at the top)",
    )
    parser.add_argument(
        "--factor", type=float, help="on predicted gradients in use (default: as in the table)"
    )
    parser.add_argument(
        "--clip-norm", type=float, help="largest norm of a network's gradient (default: none)"
    )
    add_arguments(parser, METHODS, USUAL, "out/paper_two_clocks.json")
    args = parser.parse_args(arguments)
    check_arguments(parser, args, "ticks", "steps", "batch", "width")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not finished, then print the table and draw the curves."""
    args = parse_arguments(arguments)

    def report(records: list[Record]) -> None:
        print(table(records))
        picture: Path = args.out.with_suffix(".png")
        draw(records, picture)
        print(f"\nerrors over ticks and updates: {picture}")

    return carry_out(
        args,
        make_runs(args),
        run_one,
        partial(load_data, args.data_set, args.data, args.limit),
        report,
    )


if __name__ == "__main__":
    sys.exit(main())

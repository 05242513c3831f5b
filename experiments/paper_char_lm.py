"""A character language model whose unroll is short: DNI through time at T = 8 against truncated
BPTT at 8 and 40.

Bits per character of an LSTM on the Penn Treebank (Jaderberg et al. 2016, arXiv:1608.05343, section
3.2) or on any text file. The treebank may not be passed on, so it is not downloaded: name the
directory of its three files with --data or DNI_FX_DATA. Training reads contiguous streams side by
side, T characters of each at a time, and carries the state along; so does the evaluation. Test
figures are those of the weights that were best in validation.

``--steps`` gives all runs the same number of updates, ``--characters`` the same amount of text.
Finished runs are kept in a JSON file beside the figure, so the same command goes on where it was:

    python experiments/paper_char_lm.py --steps 20000 --seeds 0 1 --jobs 2
    python experiments/paper_char_lm.py --characters 10_000_000 --text some_book.txt
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import DATA_VARIABLE, NEIGHBOUR, DataError
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
    override_source,
    spread,
)

TREEBANK = {  # name: SHA-256 of Mikolov's word-level files
    "ptb.train.txt": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "ptb.valid.txt": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "ptb.test.txt": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
}
SHARES = (0.9, 0.95)  # of a text file: where validation and test begin
STREAMS = 32  # read side by side in an evaluation
MEASURED_STEP = 2  # whose memory is measured: one as all later ones are

METHODS: dict[str, Settings] = {
    "bptt": {"gradients": "zero"},
    "dni": {"gradients": "auto", "auxiliary": False, "factor": 0.1, "synthesizer_lr": 1e-3},
    "dni+aux": {"gradients": "auto", "auxiliary": True, "factor": 0.1, "synthesizer_lr": 1e-3},
    "stale": {"gradients": "stale", "factor": 0.1},
}
USUAL = ("bptt", "dni", "dni+aux")


# ---- text ----------------------------------------------------------------------------------------


class Text(NamedTuple):
    """Character codes ``(characters,)`` as int64, in three parts, and how many codes there are."""

    train: Tensor
    valid: Tensor
    test: Tensor
    symbols: int


def load_text(text: Path | None, directory: Path | None, limit: int | None = None) -> Text:
    """A text file, or the Penn Treebank where none is given, cut to so many characters of each
    part.

    Raises:
        DataError: there is no such file, or too little in it.
    """
    if text is not None:
        parts = read_file(text)
    else:
        parts = [as_characters(part) for part in read_treebank(find_treebank(directory))]
    codes = {symbol: code for code, symbol in enumerate(sorted(set().union(*parts)))}
    # All parts count, so that no symbol is unknown.
    train, valid, test = (
        torch.tensor([codes[c] for c in part[:limit]], dtype=torch.int64) for part in parts
    )
    return Text(train, valid, test, len(codes))


def read_file(path: Path) -> list[str]:
    """A user's text: the first 90 % to train on, 5 % for validation, 5 % for the test."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} as text: {error}") from error
    if len(content) < 100 * STREAMS:
        raise DataError(
            f"{path} is too short: {len(content):,} characters, at least {100 * STREAMS:,} are "
            "needed"
        )
    ends = [round(share * len(content)) for share in SHARES]
    return [content[: ends[0]], content[ends[0] : ends[1]], content[ends[1] :]]


def find_treebank(directory: Path | None) -> Path:
    """The folder of the Penn Treebank's files, that named or the one above it."""
    named = directory or os.environ.get(DATA_VARIABLE)
    for folder in [Path(named)] if named else [NEIGHBOUR]:
        for candidate in (folder, folder / "ptb"):
            if any((candidate / name).exists() for name in TREEBANK):
                return candidate
    source = f" (from {DATA_VARIABLE})" if named and not directory else ""
    raise DataError(
        f"no Penn Treebank in {named or 'the usual place'}{source}. Name the directory of "
        f"{', '.join(TREEBANK)} with --data or in {DATA_VARIABLE}, or train on a text of your own "
        "with --text FILE."
    )


def read_treebank(folder: Path) -> list[str]:
    """Training, validation and test text, word by word as published; checked."""
    parts = []
    for name, expected in TREEBANK.items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {folder / name}: {error.strerror or error}") from error
        if hashlib.sha256(content).hexdigest() != expected:
            raise DataError(f"{folder / name} is not the published file: put the original there")
        parts.append(content.decode())
    return parts


def as_characters(words: str) -> str:
    """The treebank's character level: blanks between words become underscores, those around lines
    vanish.
    """
    return "".join(
        "_".join(words_of_line.split()) + "\n" for words_of_line in words.split("\n")[:-1]
    )


def streams(text: Tensor, batch: int) -> Tensor:
    """The text in so many contiguous parts of equal length, ``(time, batch)``; the rest is left
    out.
    """
    length = len(text) // batch
    return text[: length * batch].view(batch, length).t().contiguous()


def windows(text: Tensor, batch: int, window: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Characters, those that follow, and whether the streams end, over and over.

    What is left of the streams when the next window does not fit is not read.
    """
    side_by_side = streams(text, batch)
    starts = range(0, len(side_by_side) - window, window)
    if not starts:
        raise DataError(
            f"{len(text):,} characters are too few for {batch} streams and windows of {window}"
        )
    while True:
        for start in starts:
            x, y = (side_by_side[start + shift : start + shift + window] for shift in (0, 1))
            yield x, y, start == starts[-1]


class CharacterModel(nn.Module):
    """Embedding, LSTM and linear head."""

    def __init__(self, symbols: int, width: int, embedding: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, embedding)
        self.lstm = nn.LSTM(embedding, width)
        self.head = nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(time, batch, symbols)`` of the characters that follow."""
        return self.read(x, None)[0]

    def read(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The same from a state on, None at first, and the state afterwards."""
        hidden, state = self.lstm(self.embedding(x), state)
        return self.head(hidden), state


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over characters, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@torch.no_grad()
def bits_per_character(model: CharacterModel, text: Tensor) -> float:
    """Cross entropy in bits, in eval mode, the state carried from the start of a stream to its
    end.
    """
    training = model.training
    model.eval()
    side_by_side, state, nats = streams(text, min(STREAMS, len(text) // 2)), None, 0.0
    x, y = side_by_side[:-1], side_by_side[1:]
    for part_x, part_y in zip(x.split(200), y.split(200), strict=True):
        logits, state = model.read(part_x, state)
        nats += cross_entropy(logits, part_y).item() * part_y.numel()
    model.train(training)
    return nats / y.numel() / math.log(2)


# ---- runs ----------------------------------------------------------------------------------------


def kept_for_backward(step: Callable[[], Any], lasting: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps between the forward and the backward passes of a step: its
    activation memory.

    Every storage counts once; lasting ones, of parameters and of the text, do not. It is the part
    of a step's memory that grows with the window.
    """
    known = {p.untyped_storage().data_ptr() for p in lasting}
    kept: dict[
        int, Tensor
    ] = {}  # the tensors are held, so that no storage comes twice under one address

    def pack(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in known:
            kept[address] = tensor.detach()
        return tensor.detach()  # an output itself would hold its node

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def run_one(run: Record, data: Text, progress: Progress) -> Record:
    """Train a fresh model.

    Returns:
        ``test`` (bits per character, of the weights with the best validation), ``valid`` (the
        best), ``curve`` (steps; validation), ``characters`` (trained on), ``kept_bytes`` (see
        :func:`kept_for_backward`), ``seconds`` and ``processor_seconds`` (of training steps),
        ``synthesizer_parameters``, ``diverged`` (the step at which a value was no longer finite and
        the run ended, or None).
    """
    settings = run["settings"]
    torch.manual_seed(run["seed"])
    window, batch, every, steps = (
        settings[key] for key in ("window", "batch", "measure_every", "steps")
    )
    model = CharacterModel(data.symbols, settings["width"], settings["embedding"])
    trainer = make_recurrent_trainer(model, cross_entropy, settings)
    curve: Record = {"steps": [], "valid": []}
    best, kept, diverged, seconds, processor_seconds, count = None, 0, None, 0.0, 0.0, 0
    drawn = windows(data.train, batch, window)
    for count in range(1, steps + 1):
        x, y, ends = next(drawn)
        step = partial(trainer.step, x, done=ends, target=y)
        start, processor_start = time.perf_counter(), time.process_time()
        try:
            if count == min(MEASURED_STEP, steps):
                kept = kept_for_backward(step, [*model.parameters(), x, y])
            else:
                step()
        except NonFiniteError:
            diverged = count
        seconds += time.perf_counter() - start
        processor_seconds += time.process_time() - processor_start
        note = ""
        if count % every == 0 or count == steps or diverged:
            curve["steps"].append(count)
            curve["valid"].append(bits_per_character(model, data.valid))
            note = f"{curve['valid'][-1]:.3f} bits"
            if best is None or curve["valid"][-1] <= min(curve["valid"]):
                best = copy.deepcopy(model.state_dict())
        progress(1, note)
        if diverged:
            break
    progress(steps - count, "")
    if best is not None:
        model.load_state_dict(best)
    return {
        "test": bits_per_character(model, data.test),
        "valid": min(curve["valid"]),
        "curve": curve,
        "characters": count * window * batch,
        "kept_bytes": kept,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "synthesizer_parameters": sum(p.numel() for p in trainer.synthesizers.parameters()),
        "diverged": diverged,
    }


def make_settings(args: argparse.Namespace, window: int, method: str) -> Settings:
    """Everything that decides a run."""
    steps = args.steps or max(args.characters // (args.batch * window), 1)
    settings: Settings = {
        "text": str(args.text) if args.text else "ptb",
        "limit": args.limit,
        "window": window,
        "steps": steps,
        "batch": args.batch,
        "width": args.width,
        "embedding": args.embedding,
        "optimizer": {"name": "adam", "lr": args.lr},
        "clip_norm": args.clip_norm,
        "measure_every": args.measure_every or max(steps // 20, 1),
        **METHODS[method],
    }
    override_source(settings, args)
    return settings


def make_runs(args: argparse.Namespace) -> list[Record]:
    """All runs asked for, seed by seed, so that an early look at the table compares all methods."""
    return [
        make_run(method, f"T = {window}", seed, make_settings(args, window, method))
        for seed in args.seeds
        for method in args.methods
        for window in (args.bptt_windows if method == "bptt" else args.windows)
    ]


# ---- tables and figures --------------------------------------------------------------------------


def table(records: list[Record]) -> str:
    """Mean and each seed, as markdown."""
    lines = [
        "| setting | method | test, bits per character | validation | steps | characters, millions "
        "| kept for the backward pass, MB | CPU microseconds per character | CPU seconds | "
        "synthesizer parameters |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (setting, method), runs in groups(records).items():
        marks = [
            "" if r["diverged"] is None else f", diverged at step {r['diverged']:,}" for r in runs
        ]
        columns = [
            spread([r["test"] for r in runs], marks, digits=3),
            spread([r["valid"] for r in runs], digits=3),
            f"{runs[0]['settings']['steps']:,}",
            f"{statistics.mean(r['characters'] for r in runs) / 1e6:.2f}",
            f"{statistics.mean(r['kept_bytes'] for r in runs) / 1e6:.2f}",
            f"{statistics.mean(1e6 * r['processor_seconds'] / r['characters'] for r in runs):.1f}",
            f"{statistics.mean(r['processor_seconds'] for r in runs):.0f}",
            f"{runs[0]['synthesizer_parameters']:,}",
        ]
        lines.append(f"| {setting} | {method} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def draw(records: list[Record], path: Path) -> None:
    """Validation bits per character, against steps and against characters: the mean over seeds."""
    with figure(path, 2) as panels:
        for axes, unit in zip(panels, ("steps", "characters, millions"), strict=True):
            for index, ((setting, method), runs) in enumerate(groups(records).items()):
                steps, bits = mean_curve(runs, errors=False, key="valid")
                settings = runs[0]["settings"]
                each = 1 if unit == "steps" else settings["window"] * settings["batch"] / 1e6
                axes.plot(
                    [each * s for s in steps], bits, label=f"{method}, {setting}", **line(index)
                )
            axes.set(xlabel=unit)
            finish_axes(axes, errors=False)
            axes.set_ylabel("validation, bits per character")


# ---- command line --------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text", type=Path, help="a text file in place of the Penn Treebank, split 90 : 5 : 5"
    )
    parser.add_argument(
        "--windows", nargs="+", type=int, default=[8], help="T of DNI and controls (default: 8)"
    )
    parser.add_argument(
        "--bptt-windows", nargs="+", type=int, default=[8, 40], help="T of BPTT (default: 8 40)"
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--steps", type=int, help="windows of each run: equal updates (default: 10000)"
    )
    amount.add_argument(
        "--characters", type=int, help="of each run: equal text, fewer updates for longer windows"
    )
    parser.add_argument("--batch", type=int, default=32, help="streams side by side (default: 32)")
    parser.add_argument("--width", type=int, default=256, help="of the LSTM (default: 256)")
    parser.add_argument("--embedding", type=int, default=64, help="of a character (default: 64)")
    parser.add_argument("--lr", type=float, default=2e-3, help="of the model (default: 2e-3)")
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
        "--clip-norm", type=float, default=1.0, help="of the model's gradient (default: 1)"
    )
    add_arguments(parser, METHODS, USUAL, "out/paper_char_lm.json", samples="characters")
    parser.set_defaults(seeds=[0, 1])
    args = parser.parse_args(arguments)
    check_arguments(parser, args, "steps", "characters", "batch", "width", "embedding")
    if min(*args.windows, *args.bptt_windows, 1) < 1:
        parser.error("windows must be at least 1")
    if args.steps is None and args.characters is None:
        args.steps = 10_000
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not finished, then print the table and draw the curves."""
    args = parse_arguments(arguments)

    def report(records: list[Record]) -> None:
        in_order = sorted(
            records, key=lambda r: (args.methods.index(r["method"]), r["settings"]["window"])
        )
        equal = f"{args.steps:,} steps" if args.steps else f"{args.characters:,} characters"
        print(f"Every run: {equal}.\n")
        print(table(in_order))
        picture: Path = args.out.with_suffix(".png")
        draw(in_order, picture)
        print(f"\nvalidation curves: {picture}")

    return carry_out(
        args, make_runs(args), run_one, partial(load_text, args.text, args.data, args.limit), report
    )


if __name__ == "__main__":
    sys.exit(main())

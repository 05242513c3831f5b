"""What the experiments share: one training run, finished runs in a file, several runs at a time,
tables and curves.

A run is a dict of plain data: ``method``, ``setting`` (a line of text that groups methods to
compare), ``seed`` and ``settings`` (see :data:`SETTINGS`). Its record is the run itself and what
came of it. A run whose four entries are in the file of records already is not made again, so an
interrupted experiment goes on where it was, and changed settings are new runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import signal
import statistics
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing import connection as connections
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dni_fx
from data import DataError, Digits, cifar10, digits, mnist
from dni_fx.errors import NonFiniteError

Record = dict[str, Any]
Settings = dict[str, Any]
Progress = Callable[[int, str], None]  # steps made since the last call, and a note
Work = Callable[[Record, Any, Progress], Record]

CLASSES = 10
HEAD, LARGE_HEAD = (
    {"hidden": 2, "stride": 2},
    {"hidden": 3, "stride": 2, "width": 128},
)  # options of loss heads
TRAIN_IMAGES = (
    10_000  # of the training images, at most so many are classified for the training accuracy
)

# plain data, so that records can be compared; experiments add what else decides a run
SETTINGS: Settings = {
    "steps": 3000,
    "batch": 256,
    "measure_every": 300,
    "optimizer": {"name": "adam", "lr": 1e-3},  # of every stage; names as in OPTIMIZERS
    "synthesizer_optimizer": {"name": "adam", "lr": 3e-2},
    "input_lr": None,  # of synthetic inputs, where it is not that of the synthesizers
    "decay": "none",  # of all learning rates, see DECAYS
    "rate_warm_up": 0,  # steps in which all rates rise from 0
    "earlier_rate": 1.0,  # factor on a stage's rate for each stage behind it
    "label_smoothing": 0.0,  # of the cross entropy
    # None: backprop, without dni_fx; else a name or {"source": name, option: value, ...}
    "gradients": None,
    "labels": False,  # whether sources see them
    "inputs": None,  # synthetic inputs: a name or {"source": name, option: value, ...}
    "share_ramp": None,  # [from, to]: λ of sources that mix, over the run
    # None: sequential; else {"schedule": name of a class in dni_fx.schedules, option: value, ...}
    "schedule": None,
    "clip_norm": None,
    "channels_last": False,
}

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}

DECAYS: dict[str, Callable[[float], float]] = {  # factor on all rates after a share of the steps
    "none": lambda share: 1.0,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),  # to 0
    "steps": lambda share: (
        0.1 ** ((share >= 0.6) + (share >= 0.8))
    ),  # the paper's: at 300k and 400k of 500k
}


# ---- records -------------------------------------------------------------------------------------


def read_records(path: Path) -> list[Record]:
    """The finished runs, none where there is no file yet."""
    if not path.exists():
        return []
    try:
        records: list[Record] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(records, list) or not all(
            isinstance(r, dict) and "seed" in r for r in records
        ):
            raise ValueError("not a list of records")
    except ValueError as error:
        raise DataError(
            f"{path} holds no finished runs ({error}): delete it or name another with --out"
        ) from error
    return records


def write_records(path: Path, records: list[Record]) -> None:
    """Write at once, so that an interruption leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_suffix(".partial")
    partial_file.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    partial_file.replace(path)


def find(run: Record, records: list[Record]) -> Record | None:
    """The record of a run that is finished."""
    keys = ("method", "setting", "seed", "settings")
    return next((r for r in records if all(r.get(key) == run[key] for key in keys)), None)


def make_run(method: str, setting: str, seed: int, settings: Settings) -> Record:
    """A run, as it will read back from the file."""
    run: Record = json.loads(
        json.dumps({"method": method, "setting": setting, "seed": seed, "settings": settings})
    )
    return run


# ---- one run -------------------------------------------------------------------------------------


def make_source(spec: Any, own: Mapping[str, Any] | None = None) -> Any:
    """A gradient source from plain data, or with ``own=dni_fx.sources.INPUTS`` a synthetic input.

    Args:
        spec: a name, or ``{"source": name, option: value, ...}``; an option called ``by`` is itself
            such a spec, passed as ``source=`` to sources that wrap another one.
        own: classes of the experiment's own by name, looked up first.

    Returns:
        What ``dni_fx.decouple(gradients=...)`` takes, or ``inputs=``.
    """
    if isinstance(spec, str):
        return (own or {}).get(spec, spec)
    options = dict(spec)
    name = options.pop("source")
    if "by" in options:
        options["source"] = make_source(options.pop("by"), own)
    known = {**dni_fx.sources.SOURCES, **(own or {})}
    if name not in known:
        raise dni_fx.DecouplingError(f"unknown gradient source {name!r}; known: {', '.join(known)}")
    return partial(known[name], **options)


def make_schedule(spec: Mapping[str, Any], steps: int, seed: int) -> Any:
    """A schedule from plain data, ``{"schedule": class, option: value, ...}``.

    A float for ``steps``, ``fade`` or ``exact_from`` is a share of all steps; ``then`` is itself
    such a spec; the seed is given to RandomUpdates.
    """
    import dni_fx.schedules  # not every experiment needs them

    options = dict(spec)
    name = options.pop("schedule")
    for key in ("steps", "fade", "exact_from"):
        if isinstance(options.get(key), float):
            options[key] = round(options[key] * steps)
    if isinstance(options.get("then"), Mapping):
        options["then"] = make_schedule(options["then"], steps, seed)
    if name == "RandomUpdates":
        options["seed"] = seed
    return getattr(dni_fx.schedules, name)(**options)


def make_optimizer(spec: Mapping[str, Any], parameters: Any) -> torch.optim.Optimizer:
    """An optimiser from plain data, ``{"name": name, "lr": rate, option: value, ...}``."""
    options = {k: v for k, v in spec.items() if k != "name"}
    return OPTIMIZERS[spec["name"]](parameters, **options)


def train(
    model: nn.Module,
    cuts: Sequence[str],
    data: Digits,
    batches: Iterable[tuple[Tensor, Tensor]],
    settings: Settings,
    *,
    seed: int,
    progress: Progress,
    own_sources: Mapping[str, Any] | None = None,
) -> Record:
    """Train a model once, in place, and measure as it goes.

    Args:
        model: freshly made.
        cuts: names of modules to cut after.
        data: for the measurements.
        batches: as many as there are steps.
        settings: as in :data:`SETTINGS`.
        seed: of random schedules.
        progress: is told of every step.
        own_sources: classes of gradient sources by the names that ``settings["gradients"]`` may
            use.

    Returns:
        ``curve`` (steps and test accuracy in per cent at each; by cut the cosines with backprop's
        gradient of what is predicted for its value, and of what that makes of the gradients of the
        parameters before it; None where nothing is predicted), ``test_accuracy`` (at the end),
        ``best_test_accuracy``, ``train_accuracy``, ``seconds`` and ``processor_seconds`` (of steps,
        without measurements; the latter is the same beside other work), ``synthesizer_parameters``,
        ``updates`` by stage, ``diverged`` (the step at which a value was no longer finite and the
        run ended, or None), ``batches`` (a checksum of those seen).
    """
    steps, every = settings["steps"], settings["measure_every"]
    layout = torch.channels_last if settings["channels_last"] else torch.contiguous_format
    model.to(memory_format=layout).train()  # type: ignore[call-overload]
    trainer, optimizers, step = _stepper(model, cuts, data, settings, layout, seed, own_sources)
    rates = [(group, group["lr"]) for o in optimizers.values() for group in o.param_groups]
    mixing = (
        [s for s in trainer.decoupled.sources.values() if hasattr(s, "share")] if trainer else []
    )
    updates = _count_updates(
        {n: o for n, o in optimizers.items() if not n.startswith("source of ")}
    )

    curve: Record = {"steps": [], "test_accuracy": [], "cosines": {}, "parameter_cosines": {}}
    for cosines in (curve["cosines"], curve["parameter_cosines"]):
        cosines.update({cut: [] for cut in cuts})
    checksum, seconds, processor_seconds, diverged, count = 0, 0.0, 0.0, None, 0
    for count, (images, y) in enumerate(batches, start=1):
        x = images.contiguous(memory_format=layout)
        checksum = zlib.crc32(
            y.numpy().tobytes() + images.flatten()[::97].numpy().tobytes(), checksum
        )
        # Not LambdaLR: it warns where a random schedule has not stepped an optimiser yet.
        factor = DECAYS[settings["decay"]]((count - 1) / steps) * min(
            1.0, count / (settings["rate_warm_up"] or 1)
        )
        for group, rate in rates:
            group["lr"] = rate * factor
        if settings["share_ramp"] is not None:
            low, high = settings["share_ramp"]
            for source in mixing:
                source.share = low + (high - low) * (count - 1) / max(steps - 1, 1)
        measured = count % every == 0 or count == steps
        cosines = predicted_cosines(trainer, x, y) if measured else {}
        parameter_cosines = predicted_parameter_cosines(trainer, cuts, x, y) if measured else {}
        start, processor_start = time.perf_counter(), time.process_time()
        try:
            step(x, y)
        except NonFiniteError:
            diverged = count
        seconds += time.perf_counter() - start
        processor_seconds += time.process_time() - processor_start
        note = ""
        if measured or diverged:
            curve["steps"].append(count)
            curve["test_accuracy"].append(accuracy(model, data.test_x, data.test_y, layout))
            for cut in cuts:
                curve["cosines"][cut].append(cosines.get(cut))
                curve["parameter_cosines"][cut].append(parameter_cosines.get(cut))
            note = f"{curve['test_accuracy'][-1]:.1f} %"
        progress(1, note)
        if diverged:
            break
    progress(steps - count, "")
    known = curve["test_accuracy"]
    return {
        "curve": curve,
        "test_accuracy": known[-1],
        "best_test_accuracy": max(known),
        "train_accuracy": accuracy(
            model, data.train_x[:TRAIN_IMAGES], data.train_y[:TRAIN_IMAGES], layout
        ),
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "synthesizer_parameters": _count_parameters(trainer),
        "updates": updates,
        "diverged": diverged,
        "batches": f"{checksum:08x}",
    }


def _stepper(
    model: nn.Module,
    cuts: Sequence[str],
    data: Digits,
    settings: Settings,
    layout: torch.memory_format,
    seed: int,
    own_sources: Mapping[str, Any] | None,
) -> tuple[
    dni_fx.Trainer | None, dict[str, torch.optim.Optimizer], Callable[[Tensor, Tensor], None]
]:
    """The trainer (None for backprop), all optimisers by name, and a function that makes one
    step.
    """
    optimizer = partial(make_optimizer, settings["optimizer"])
    loss_function = partial(F.cross_entropy, label_smoothing=settings["label_smoothing"])
    clip = settings["clip_norm"]
    if settings["gradients"] is None:
        whole = optimizer(model.named_parameters())

        def backprop(x: Tensor, y: Tensor) -> None:
            whole.zero_grad()
            loss = loss_function(model(x), y)
            if not loss.isfinite():
                raise NonFiniteError("the loss is not finite")
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            whole.step()

        return None, {"model": whole}, backprop

    options: dict[str, Any] = {"gradients": make_source(settings["gradients"], own_sources)}
    if settings["inputs"] is not None:
        options["inputs"] = make_source(settings["inputs"], dni_fx.sources.INPUTS)
    options |= {"context": dni_fx.one_hot(CLASSES)} if settings["labels"] else {}
    example = data.train_x[: settings["batch"]].contiguous(memory_format=layout)
    decoupled = dni_fx.decouple(model, cuts=list(cuts), example_inputs=(example,), **options)
    scheduled: dict[str, Any] = {}
    if settings["schedule"] is not None:
        scheduled = {"schedule": make_schedule(settings["schedule"], settings["steps"], seed)}
    trainer = dni_fx.Trainer(
        decoupled,
        loss_function,
        optimizer=optimizer,
        synthesizer_optimizer=partial(make_optimizer, settings["synthesizer_optimizer"]),
        clip_norm=clip,
        metrics_every=settings["steps"],  # predicted_cosines measures
        **scheduled,
    )

    def decoupled_step(x: Tensor, y: Tensor) -> None:
        trainer.step(x, target=y)

    sources = {f"source of {name}": o for name, o in trainer.synthesizer_optimizers.items()}
    for behind, stage in enumerate(reversed(trainer.optimizers.values())):
        for group in stage.param_groups:
            group["lr"] *= settings["earlier_rate"] ** behind
    if settings["input_lr"] is not None:
        for group in (
            g for n, o in sources.items() if n.endswith("@input") for g in o.param_groups
        ):
            group["lr"] = settings["input_lr"]
    return trainer, {**trainer.optimizers, **sources}, decoupled_step


def override_source(settings: Settings, args: argparse.Namespace) -> None:
    """Put what the command line says of synthetic gradients into a method's settings, where the
    method has it.
    """
    for key in ("factor", "auxiliary"):
        if settings.get(key) and getattr(args, key, None) is not None:
            settings[key] = getattr(args, key)
    if "synthesizer_lr" in settings:
        usual = settings.pop("synthesizer_lr")
        settings["synthesizer_optimizer"] = {"name": "adam", "lr": args.synthesizer_lr or usual}


def make_recurrent_trainer(
    model: nn.Module, loss: Callable[[Any, Any], Tensor], settings: Settings
) -> Any:
    """A trainer that decouples a model through time.

    Args:
        model: freshly made.
        loss: of one window.
        settings: ``window``, ``optimizer``, ``clip_norm``, ``measure_every`` and ``gradients``, and
            where its source takes them ``auxiliary``, ``factor`` and ``synthesizer_optimizer``.
    """
    import dni_fx.recurrent  # not every experiment needs it

    options: dict[str, Any] = {
        key: settings[key] for key in ("auxiliary", "factor") if key in settings
    }
    if "synthesizer_optimizer" in settings:
        options["synthesizer_optimizer"] = partial(
            make_optimizer, settings["synthesizer_optimizer"]
        )
    return dni_fx.recurrent.decouple_through_time(
        model,
        window=settings["window"],
        loss=loss,
        optimizer=partial(make_optimizer, settings["optimizer"]),
        gradients=make_source(settings["gradients"]),
        clip_norm=settings["clip_norm"],
        metrics_every=settings["measure_every"],
        **options,
    )


def _count_updates(optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, int]:
    """A table that counts every optimiser's steps from now on, without those that had no gradient
    to go by.
    """
    updates = dict.fromkeys(optimizers, 0)

    def count(name: str, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        updates[name] += any(
            p.grad is not None for group in optimizer.param_groups for p in group["params"]
        )

    for name, optimizer in optimizers.items():
        optimizer.register_step_post_hook(partial(count, name))
    return updates


def _count_parameters(trainer: dni_fx.Trainer | None) -> int:
    """Of everything that is not the model: gradient sources, and synthetic inputs where there are
    any.
    """
    if trainer is None:
        return 0
    own = {id(p) for p in trainer.decoupled.model.parameters()}
    return sum(p.numel() for p in trainer.decoupled.parameters() if id(p) not in own)


def predicted_cosines(trainer: dni_fx.Trainer | None, x: Tensor, y: Tensor) -> dict[str, float]:
    """Cosine of each predicted gradient with backprop's on a batch, by cut; nothing is changed.

    Cuts without a prediction are left out: those of sources that wait for the true gradient, and
    zero gradients.
    """
    if trainer is None or trainer.decoupled.is_exact:
        return {}
    reports = trainer.diagnose(x, target=y)
    return {
        name: report.cosine for name, report in reports.items() if not math.isnan(report.cosine)
    }


def predicted_parameter_cosines(
    trainer: dni_fx.Trainer | None, cuts: Sequence[str], x: Tensor, y: Tensor
) -> dict[str, float]:
    """The same of the gradients of all parameters between a cut and the one before it, in nets that
    are chains.
    """
    if trainer is None or trainer.decoupled.is_exact:
        return {}
    reports = trainer.diagnose_parameters(x, target=y)
    stages = zip(cuts, trainer.decoupled.stages, strict=False)  # the last stage ends with no cut
    found = {cut: reports[stage.name].cosine for cut, stage in stages if stage.name in reports}
    return {cut: cosine for cut, cosine in found.items() if not math.isnan(cosine)}


@torch.no_grad()
def accuracy(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    layout: torch.memory_format = torch.contiguous_format,
) -> float:
    """Right answers in per cent, in eval mode; the model's mode is as it was afterwards."""
    training = model.training
    model.eval()
    parts = images.split(500)  # maps of more images do not stay in the caches
    predicted = torch.cat(
        [model(part.contiguous(memory_format=layout)).argmax(1) for part in parts]
    )
    model.train(training)
    return 100.0 * (predicted == labels).double().mean().item()


# ---- many runs -----------------------------------------------------------------------------------


def load_data(
    name: str, directory: Path | None, limit: int | None = None, images: int | None = None
) -> Digits:
    """A data set by name, cut to so many images of each part, or of the training part."""
    makers: dict[str, Callable[[], Digits]] = {
        "digits": digits,
        "mnist": partial(mnist, directory),
        "cifar10": partial(cifar10, directory),
    }
    data = makers[name]()
    sizes = [
        min(n or len(data.train_x), limit or len(data.train_x))
        for n in (images, images, None, None)
    ]
    # Clones, so that the whole set is not kept in memory by a few of its images.
    parts = [
        part if n >= len(part) else part[:n].clone()
        for part, n in zip(data[1:], sizes, strict=True)
    ]
    return Digits(name, *parts)


def run_missing(
    runs: list[Record],
    records: list[Record],
    path: Path,
    work: Work,
    load: Callable[[], Any],
    jobs: int,
) -> list[str]:
    """Make every run that has no record yet; ``records`` and the file grow with each that ends.

    Args:
        runs: to be made, in order.
        records: the finished ones.
        path: their file.
        work: ``work(run, data, progress)`` makes one and returns what came of it.
        load: makes the data, once in every process.
        jobs: processes; with 1 everything happens in this one.

    Returns:
        A traceback for every run that failed; the others go on.

    Raises:
        DataError: the data cannot be loaded.
    """
    missing = [run for run in runs if find(run, records) is None]
    failures: list[str] = []

    def finish(run: Record, result: Record | None, failure: str) -> None:
        if result is None:
            failures.append(f"{label(run)}: {failure}")
            return
        records.append({**run, **result})
        write_records(path, records)

    total = sum(run["settings"]["steps"] for run in missing)
    if not missing:
        return []
    with tqdm(total=total, unit="step", dynamic_ncols=True) as bar:
        make = _run_here if jobs == 1 else partial(_run_apart, jobs=min(jobs, len(missing)))
        make(missing, work, load, finish, bar)
    return failures


def label(run: Record) -> str:
    """A run in a few words."""
    return ", ".join(
        part for part in (run["setting"], run["method"], f"seed {run['seed']}") if part
    )


def _run_here(
    missing: list[Record], work: Work, load: Callable[[], Any], finish: Any, bar: tqdm
) -> None:
    data = load()
    for run in missing:
        bar.set_postfix_str("", refresh=False)
        bar.set_description(label(run))

        def progress(steps: int, note: str) -> None:
            bar.update(steps)
            if note:
                bar.set_postfix_str(note, refresh=False)

        try:
            result, failure = work(run, data, progress), ""
        except Exception:
            result, failure = None, traceback.format_exc()
        finish(run, result, failure)


def _run_apart(
    missing: list[Record], work: Work, load: Callable[[], Any], finish: Any, bar: tqdm, jobs: int
) -> None:
    """Long-lived workers, each with a pipe of its own, so that the death of either side is noticed
    by the other.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(missing)
    busy: dict[Any, Record] = {}
    workers = []
    try:
        for _ in range(jobs):
            mine, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs, work, load), daemon=True)
            worker.start()
            theirs.close()
            workers.append(worker)
            busy[mine] = waiting.pop(0)
            mine.send(busy[mine])
        bar.set_description(f"{jobs} at a time")
        while busy:
            ready: Any
            for ready in connections.wait(list(busy)):
                kind, content = _receive(ready)
                if kind == "progress":
                    steps, note = content
                    bar.update(steps)
                    if note:
                        bar.set_postfix_str(f"{label(busy[ready])}: {note}", refresh=False)
                    continue
                if kind == "data":
                    raise DataError(content)
                run = busy.pop(ready)
                finish(run, content if kind == "result" else None, str(content))
                if kind == "dead":
                    continue
                if waiting:
                    busy[ready] = waiting.pop(0)
                    ready.send(busy[ready])
                else:
                    ready.send(None)
        failed = "not begun: no process is left"
        for run in waiting:
            finish(run, None, failed)
    finally:
        for worker in workers:
            if busy:  # left by an error or an interruption
                worker.terminate()
            worker.join()


def _receive(ready: Any) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = ready.recv()
    except (EOFError, OSError):
        return "dead", "its process died; out of memory?"
    return message


def _serve(connection: Any, work: Work, load: Callable[[], Any]) -> None:
    """In a worker: make the runs that come through the pipe, and say how they go."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)
    try:
        data = load()
    except DataError as error:
        connection.send(("data", str(error)))
        return
    said, steps = time.monotonic(), 0

    def progress(more: int, note: str) -> None:
        nonlocal said, steps
        steps += more
        if note or time.monotonic() - said > 0.5:
            connection.send(("progress", (steps, note)))
            said, steps = time.monotonic(), 0

    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        for run in iter(connection.recv, None):
            answer: tuple[str, Any]
            try:
                answer = ("result", work(run, data, progress))
            except BrokenPipeError:
                raise
            except Exception:
                answer = ("failure", traceback.format_exc())
            connection.send(("progress", (steps, "")))
            steps = 0
            connection.send(answer)


# ---- command line --------------------------------------------------------------------------------


def add_arguments(
    parser: argparse.ArgumentParser,
    methods: Iterable[str],
    usual: Iterable[str],
    out: str,
    samples: str | None = "images",
    measured: str = "a tenth of all",
) -> None:
    """What every experiment takes, besides ``--steps``.

    Args:
        parser: gets the options.
        methods: names of all.
        usual: names of those that are run where none are named.
        out: usual file of the finished runs.
        samples: what the data are made of; None where they are not read from files.
        measured: how many steps lie between measurements by default, in words.
    """
    if samples is not None:
        found = "directory of the data set's files (default: found or downloaded)"
        parser.add_argument("--data", type=Path, help=found)
        parser.add_argument(
            "--limit", type=int, help=f"use only so many {samples} of each part, for a quick try"
        )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--methods", nargs="+", choices=list(methods), default=list(usual), metavar="METHOD"
    )
    parser.add_argument(
        "--measure-every", type=int, help=f"steps between measurements (default: {measured})"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at a time, one process and thread each (default: 1)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(out),
        help=f"finished runs, and beside them a figure ({out})",
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Numbers below 1 are errors."""
    for name in ("jobs", "limit", "measure_every", *names):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")


def carry_out(
    args: argparse.Namespace,
    runs: list[Record],
    work: Work,
    load: Callable[[], Any],
    report: Callable[[list[Record]], None],
) -> int:
    """Make what is missing, then report on all runs asked for; the exit status."""
    torch.set_num_threads(1)
    try:
        records = read_records(args.out)
        failures = run_missing(runs, records, args.out, work, load, args.jobs)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"interrupted: the same command goes on after the runs in {args.out}", file=sys.stderr
        )
        return 130
    finished = [record for run in runs if (record := find(run, records)) is not None]
    if finished:
        report(finished)
    for failure in failures:
        print(f"\nFAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


# ---- tables and figures --------------------------------------------------------------------------


def spread(values: Sequence[float], marks: Sequence[str] | None = None, digits: int = 2) -> str:
    """The mean, and each seed's value in brackets, with a mark behind it."""
    each = ", ".join(
        f"{v:.{digits}f}{m}" for v, m in zip(values, marks or [""] * len(values), strict=True)
    )
    return f"{statistics.mean(values):.{digits}f} ({each})"


def groups(records: list[Record]) -> dict[tuple[str, str], list[Record]]:
    """Runs by setting and method, in order; each group differs in seeds only."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record["setting"], record["method"]), []).append(record)
    return found


def table(records: list[Record], *, errors: bool) -> str:
    """Mean and each seed, as markdown.

    Args:
        records: the runs.
        errors: whether to print error rates instead of accuracies.
    """
    kind = "error" if errors else "accuracy"
    lines = [
        f"| setting | method | test {kind}, % | best, % | train {kind}, % | gap | cosine at first "
        "cut | CPU seconds | synthesizer parameters | updates per layer |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (setting, method), runs in groups(records).items():
        columns = [
            spread([shown(r["test_accuracy"], errors) for r in runs], divergences(runs)),
            *(
                spread([shown(r[key], errors) for r in runs])
                for key in ("best_test_accuracy", "train_accuracy")
            ),
            f"{statistics.mean(r['train_accuracy'] - r['test_accuracy'] for r in runs):.2f}",
            mean_or_dash([c for r in runs if (c := first_cosine(r)) is not None]),
            f"{statistics.mean(r['processor_seconds'] for r in runs):.0f}",
            f"{runs[0]['synthesizer_parameters']:,}",
            f"{statistics.mean(n for r in runs for n in r['updates'].values()):,.0f}",
        ]
        lines.append(f"| {setting} | {method} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def agreement_table(records: list[Record]) -> str:
    """Cosines with backprop's gradients, means over the measurements and seeds, as markdown.

    By cut, of the value that crosses it and, behind the stroke, of the parameters before it; runs
    whose sources predict nothing are left out.
    """
    cuts = list(dict.fromkeys(cut for r in records for cut in r["curve"]["cosines"]))
    lines = [f"| setting | method | {' | '.join(cuts)} |", f"| --- | --- |{' ---: |' * len(cuts)}"]
    for (setting, method), runs in groups(records).items():
        cells = []
        for cut in cuts:
            pair = [
                mean_or_dash(
                    [c for r in runs for c in r["curve"].get(key, {}).get(cut, []) if c is not None]
                )
                for key in ("cosines", "parameter_cosines")
            ]
            cells.append(" / ".join(pair))
        if any(cell != "- / -" for cell in cells):
            lines.append(f"| {setting} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_table(records: list[Record], step_seconds: Callable[[Record], float]) -> str:
    """Accuracies beside what a step costs, as markdown.

    Args:
        records: the runs.
        step_seconds: a run's seconds of a processor for each step.
    """
    names = ("test accuracy, %", "train, %", "CPU seconds a step", "synthesizer parameters")
    lines = [f"| method | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for (_, method), runs in groups(records).items():
        columns = [
            spread([r["test_accuracy"] for r in runs], divergences(runs)),
            f"{statistics.mean(r['train_accuracy'] for r in runs):.2f}",
            f"{statistics.mean(map(step_seconds, runs)):.3f}",
            f"{runs[0]['synthesizer_parameters']:,}",
        ]
        lines.append(f"| {method} | {' | '.join(columns)} |")
    return "\n".join(lines)


def divergences(runs: list[Record]) -> list[str]:
    """A mark behind each run that ended early."""
    return ["" if r["diverged"] is None else f", diverged at step {r['diverged']:,}" for r in runs]


def shown(accuracy_in_per_cent: float, errors: bool) -> float:
    """An accuracy, or the error that goes with it."""
    return 100.0 - accuracy_in_per_cent if errors else accuracy_in_per_cent


def first_cosine(record: Record) -> float | None:
    """Mean cosine over the measured steps, at the first cut where a gradient was predicted."""
    for values in record["curve"]["cosines"].values():
        known = [v for v in values if v is not None]
        if known:
            return statistics.mean(known)
    return None


def mean_or_dash(values: list[float]) -> str:
    """The mean, a dash where there is nothing."""
    return f"{statistics.mean(values):.2f}" if values else "-"


def mean_curve(
    runs: list[Record], errors: bool, key: str = "test_accuracy"
) -> tuple[list[int], list[float]]:
    """Steps and the mean over seeds at each of them; a run that diverged counts as long as it
    lasted.
    """
    at: dict[int, list[float]] = {}
    for run in runs:
        for step, value in zip(run["curve"]["steps"], run["curve"][key], strict=True):
            at.setdefault(step, []).append(shown(value, errors))
    return sorted(at), [statistics.mean(at[step]) for step in sorted(at)]


def draw(records: list[Record], path: Path, *, errors: bool) -> None:
    """Learning curves, a panel for each setting: mean over seeds against steps."""
    settings = list(dict.fromkeys(record["setting"] for record in records))
    methods = list(dict.fromkeys(record["method"] for record in records))
    with figure(path, len(settings)) as panels:
        for axes, setting in zip(panels, settings, strict=True):
            for (at, method), runs in groups(records).items():
                if at == setting:
                    steps, values = mean_curve(runs, errors)
                    axes.plot(
                        steps, values, label=method, **line(methods.index(method)), marker="."
                    )
            axes.set(xlabel="step", title=setting)
            finish_axes(axes, errors)


@contextlib.contextmanager
def figure(path: Path, panels: int) -> Iterator[list[Any]]:
    """Axes, three in a row, saved when done."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns, rows = min(panels, 3), -(-panels // 3)
    size = (1 + 5 * columns, 0.5 + 4.5 * rows)
    made, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for unused in axes.flat[panels:]:
        unused.set_visible(False)
    yield list(axes.flat[:panels])
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=120)
    plt.close(made)


def line(index: int) -> dict[str, Any]:
    """A colour and a dash of its own for every method, however many."""
    return {"color": f"C{index % 10}", "linestyle": ("-", "--", ":", "-.")[index // 10 % 4]}


def finish_axes(axes: Any, errors: bool) -> None:
    """Axis names, a grid and a legend; errors on a logarithmic scale, where differences of small
    ones can be seen.
    """
    axes.set_ylabel("test error, %" if errors else "test accuracy, %")
    if errors:
        from matplotlib.ticker import FormatStrFormatter, LogFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(3, 1)))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")

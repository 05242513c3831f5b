"""Cases that every rank of a torchrun goes through; what each finds goes to a file.

    python -m torch.distributed.run --standalone --nproc-per-node 2 ranks.py OUT CASE...

A case is compared, in rank 0, with training in one process, which the other ranks wait for.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

import dni_fx
from dni_fx import distributed
from dni_fx.errors import DecouplingError
from dni_fx.parallel import streams
from dni_fx.schedules import Calibration, RandomUpdates, WarmUp

CUTS = ["a", "b", "c"]
SHORTER = 1  # by how much the longest case is, where only its end matters


class Skips(nn.Module):
    """Two towers, joined; what the first sends is used in all later stages."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(12, width), nn.Tanh()), nn.Linear(12, width)
        self.c, self.d = nn.Linear(2 * width, width), nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x), self.b(x).relu()
        joined = self.c(torch.cat([left, right], 1)).relu()
        return self.d(torch.cat([joined, left], 1))


class Tied(Skips):
    """Two stages share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Linear(32, 16)
        self.d.weight = self.c.weight


class SharedStatistics(Skips):
    """Two stages write to the same buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.norm(self.a(x)), self.b(x).relu()
        joined = self.norm(self.c(torch.cat([left, right], 1))).relu()
        return self.d(torch.cat([joined, left], 1))


def batch(
    step: int, dtype: torch.dtype = torch.float32, sizes: Sequence[int] = (8, 8, 5)
) -> tuple[Tensor, Tensor]:
    size, generator = sizes[step % len(sizes)], torch.Generator().manual_seed(100 + step)
    return torch.randn(size, 12, generator=generator).to(dtype), torch.randint(
        5, (size,), generator=generator
    )


def built(model: type[nn.Module], dtype: torch.dtype, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return model(**arguments).to(dtype)


def trainer_of(
    gradients: Any = "linear",
    *,
    alone: bool = False,
    model: nn.Module | None = None,
    inputs: Any = None,
    dtype: torch.dtype = torch.float32,
    cuts: list[str] | None = None,
    **options: Any,
) -> Any:
    """A distributed trainer; or one of the package's own, for the options that both know."""
    decoupled = dni_fx.decouple(
        built(Skips, dtype) if model is None else model,
        cuts or CUTS,
        example_inputs=(batch(0, dtype)[0],),
        gradients=gradients,
        inputs=inputs,
        context=dni_fx.one_hot(5),
        check=False,
    )
    if alone:
        options = {
            n: v
            for n, v in options.items()
            if n in ("schedule", "clip_norm", "accumulate", "metrics_every")
        }
    else:
        options.setdefault("timeout", 15.0)
    make = dni_fx.Trainer if alone else distributed.Trainer
    loss = options.pop("loss", F.cross_entropy)
    return make(decoupled, loss, optimizer=lambda p: torch.optim.Adam(p, lr=0.01), **options)


def train(
    trainer: Any, steps: int, dtype: torch.dtype = torch.float32, sizes: Sequence[int] = (8, 8, 5)
) -> Any:
    for step in range(trainer.steps, trainer.steps + steps):
        x, y = batch(step, dtype, sizes)
        trainer.step(x, target=y)
    trainer.drain()
    return trainer


def weights(trainer: Any) -> dict[str, Tensor]:
    """Of the whole model; ends a distributed trainer."""
    if not isinstance(trainer, distributed.Trainer):
        return copy.deepcopy(trainer.decoupled.model.state_dict())
    found = copy.deepcopy(trainer.gather())
    trainer.close()
    return found


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], what: Any) -> None:
    assert a.keys() == b.keys()
    wrong = [n for n in a if not torch.equal(a[n], b[n])]
    assert not wrong, f"{what}: {wrong} differ by up to {difference(a, b)}"


def compare(
    gradients: Any,
    steps: int = 7,
    tolerance: float = 0.0,
    sizes: Sequence[int] = (8, 8, 5),
    **options: Any,
) -> None:
    """Train by all processes, and by each alone."""
    dtype = options.get("dtype", torch.float32)
    apart = weights(train(trainer_of(gradients, **options), steps, dtype, sizes))
    alone = weights(train(trainer_of(gradients, alone=True, **options), steps, dtype, sizes))
    if tolerance:
        assert difference(apart, alone) < tolerance, (
            f"{gradients}, {options}: {difference(apart, alone)}"
        )
    else:
        assert_same(apart, alone, (gradients, options))
    assert (
        difference(alone, weights(trainer_of(alone=True, **options))) > 1e-3
    )  # something was learnt


# --------------------------------------------------------------------------------------------------


def exact() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        compare("exact", dtype=dtype)
        compare("exact", dtype=dtype, queue=1, staleness=2)


def no_staleness() -> None:
    for gradients in (
        "linear",
        "local",
        "critic",
        "feedback",
        "stale",
        "each:linear",
        "joint:linear",
    ):
        compare(gradients, staleness=0)
    compare("linear", staleness=0, dtype=torch.bfloat16)
    compare("mix", staleness=0, tolerance=1e-5)


def options() -> None:
    for more in (
        {"accumulate": 2},
        {"clip_norm": 0.1},
        {"inputs": "mlp"},
        {"inputs": "mlp", "accumulate": 2},
    ):
        compare("linear", staleness=0, **more)  # type: ignore[arg-type]
    for schedule in (Calibration(every=3), WarmUp(2, fade=2), RandomUpdates(0.5, seed=1)):
        compare("linear", staleness=0, schedule=schedule)
        compare("each:linear", staleness=0, schedule=schedule)


def synthetic_inputs_and_exact_steps() -> None:
    for schedule in (Calibration(every=3), WarmUp(2, fade=2)):
        compare("linear", staleness=0, schedule=schedule, inputs="mlp")
        compare("feedback", staleness=0, schedule=schedule, inputs="mlp")


def interleaved() -> None:
    for placement in (
        [0, 1, 0, 1],
        [1, 0, 0, 1],
        {"stage_0": 1, "stage_1": 1, "stage_2": 0, "stage_3": 0},
    ):
        compare("exact", placement=placement)
        compare("each:linear", placement=placement, staleness=0)


def four_ranks_equal_one() -> None:
    for placement in (None, [3, 1, 0, 2]):
        for dtype in (torch.float32, torch.bfloat16):
            compare("exact", placement=placement, dtype=dtype)
        compare("each:linear", placement=placement, staleness=0)
        compare("critic", placement=placement, staleness=0, inputs="mlp")
    compare(
        "exact",
        placement=[[0, 1], [2, 3], 0, [0, 1, 2, 3]],
        staleness=0,
        tolerance=1e-6,
        sizes=(8, 7, 9),
    )


def four_ranks_run_free() -> None:
    free("linear", inputs=None)
    free("delayed", placement=[3, 1, 0, 2])
    free("feedback", inputs="mlp")


def four_ranks_need_four_stages() -> None:
    fails(
        "there are 4 processes, but only 2 stages: cut into more",
        lambda: train(trainer_of(cuts=["a"]), 1),
    )


def shared() -> None:
    """Stages on both ranks."""
    for placement in ([0, [0, 1], 1, [0, 1]], [[0, 1]] * 4):
        for gradients in ("exact", "zero"):
            compare(gradients, placement=placement, staleness=0, tolerance=1e-6, sizes=(8, 5, 3))
    compare("zero", placement=[0, [0, 1], 1, 0], staleness=0, tolerance=1e-6, accumulate=2)


def control() -> None:
    """The negative control: what one rank does otherwise is seen."""
    model = built(Skips, torch.float32)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.c.bias[0] += 1e-6
    apart = weights(train(trainer_of("exact", model=model), 7))
    assert difference(apart, weights(train(trainer_of("exact", alone=True), 7))) > 1e-7
    late = weights(train(trainer_of("linear", staleness=1), 7))
    assert difference(late, weights(train(trainer_of("linear", alone=True), 7))) > 1e-5


def repeats() -> None:
    for gradients in ("linear", "delayed", "corrected", "critic", "each:linear"):
        for inputs in (None, "mlp"):
            runs = [
                weights(train(trainer_of(gradients, staleness=2, inputs=inputs), 12))
                for _ in range(2)
            ]
            assert_same(*runs, (gradients, inputs))


def lengths() -> None:
    """Letters longer than the receives that are posted, in any order of lengths."""
    sizes = [4, 600, 1, 3000, 2, 2, 900, 64, 2500, 3, 1, 1, 1, 700, 5]
    for gradients, more in (("exact", {}), ("each:linear", {"staleness": 0})):
        compare(gradients, len(sizes), sizes=sizes, **more)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------


def free(gradients: str, **options: Any) -> None:
    trainer = train(trainer_of(gradients, queue=2, **options), 15)
    for worker in trainer.process.workers.values():
        assert worker.learner.updates >= 15, (
            f"{gradients}: {worker.name} made {worker.learner.updates} updates in 15 steps"
        )
        worker.desk.check()
        assert worker.desk.is_idle
    found = weights(trainer)
    assert all(bool(t.isfinite().all()) for t in found.values())


def free_running() -> None:
    for gradients in (
        "linear",
        "local",
        "critic",
        "sobolev",
        "distill",
        "delayed",
        "corrected",
        "mix",
        "feedback",
    ):
        free(gradients)
    for gradients in ("zero", "stale", "joint:linear", "each:linear"):
        free(gradients, placement=[0, 1, 0, 1])


def free_running_on_synthetic_inputs() -> None:
    for gradients in ("linear", "critic", "delayed", "mix", "feedback", "each:linear"):
        free(gradients, inputs="mlp")
        free(gradients, inputs="mlp", placement=[0, 1, 0, 1])


def free_running_with_schedules() -> None:
    for inputs in (None, "mlp"):
        for schedule in (Calibration(every=4), WarmUp(3), RandomUpdates(0.5)):
            trainer = train(trainer_of("linear", queue=1, inputs=inputs, schedule=schedule), 15)
            trainer.close()


def dropping() -> None:
    """A rank that sleeps now and then leaves out what it cannot take; one that stands still holds
    nobody back.
    """
    cases: list[tuple[str | None, int, list[int] | None]]
    cases = [
        ("mlp", 100, None),
        (None, 100, None),
        (None, 100, [0, 1, 0, 1]),
        ("mlp", 60, [1, 0, 0, 1]),
    ]
    store = dist.distributed_c10d._get_default_store()
    for inputs, whole, placement in cases:
        steps = whole // SHORTER
        for gradients in ("linear", "critic") if inputs else ("linear", "delayed", "each:linear"):
            trainer = trainer_of(
                gradients, policy="drop_oldest", queue=2, inputs=inputs, placement=placement
            )
            asleep, key = random.Random(1), f"{gradients} {inputs} {placement}"
            for step in range(steps):
                x, y = batch(step)
                trainer.step(x, target=y)
                if dist.get_rank() == 1 and asleep.random() < 0.2:
                    time.sleep(0.01)
                if dist.get_rank() == 1 and step == steps * 2 // 5 and placement is None:
                    store.wait([key])
            workers = trainer.process.workers.values()
            if dist.get_rank() == 0 and placement is None:
                assert gradients == "delayed" or all(w.learner.updates == steps for w in workers)
                store.set(key, "made all steps")
            if gradients != "delayed":
                assert all(w.learner.updates + w.missed == steps for w in workers)
            trainer.drain()
            for worker in workers:
                worker.desk.check()
                assert worker.desk.is_idle
            trainer.close()


def waiting_while_dropping() -> None:
    for gradients, schedule in (
        ("mix", "sequential"),
        ("feedback", "sequential"),
        ("linear", Calibration(every=1)),
    ):
        trainer = trainer_of(gradients, policy="drop_oldest", schedule=schedule)
        fails("pass policy='wait'", lambda trainer=trainer: train(trainer, 1))  # type: ignore[misc]


# --------------------------------------------------------------------------------------------------


def whole_model() -> None:
    """evaluate, gather, mean, status and the timeline."""
    for options in ({"staleness": 0}, {}, {"placement": [0, 1, 0, 1], "queue": 1}):
        trainer = train(trainer_of("linear", **options), 6)  # type: ignore[arg-type]
        x, y = batch(0)
        output = trainer.evaluate(x)
        state = trainer.gather()
        model = built(Skips, torch.float32)
        model.load_state_dict(state)
        want = model(x)
        has_last = 3 in trainer.process.workers
        assert (output is not None) == has_last
        if has_last:
            assert torch.equal(output, want)
            assert not output.requires_grad
        loss = F.cross_entropy(want, y).item()
        assert trainer.mean(F.cross_entropy(output, y).item() if has_last else float("nan")) == loss
        assert trainer.mean(float(dist.get_rank()), weight=1.0 + 2 * dist.get_rank()) == 0.75
        report = trainer.step(x, target=y)
        assert (report.outputs is not None) == has_last
        assert bool(report.loss.isnan()) != has_last
        text = str(trainer.status(everywhere=True))
        assert all(f"stage_{k}" in text for k in range(4)), text
        assert len(trainer.status().rows) == 2
        path = OUT / "timeline.json"
        trainer.save_timeline(path)
        if dist.get_rank() == 0:
            events = json.loads(path.read_text())["traceEvents"]
            assert {e["pid"] for e in events} == {0, 1}
            assert {e["tid"] for e in events} == {0, 1, 2, 3}
            assert all(e["dur"] >= 0 and e["ph"] == "X" for e in events)
        trainer.close()
        trainer.close()


def evaluating_between_steps() -> None:
    """A rank that is through with its steps may wait for the others' values, and owes them
    answers.
    """
    model = built(Skips, torch.float32)
    if dist.get_rank() == 1:
        model.b.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    cases = [("wait", "mlp", "linear"), ("drop_oldest", "mlp", "linear"), ("wait", None, "delayed")]
    for policy, inputs, gradients in [*cases, ("drop_oldest", "mlp", "delayed")]:
        trainer = trainer_of(
            gradients, model=model, policy=policy, inputs=inputs, queue=1, placement=[0, 1, 0, 1]
        )
        for step in range(10):
            x, y = batch(step)
            trainer.step(x, target=y)
            if step % 3 == 0:
                trainer.evaluate(x)
                trainer.mean(1.0)
        trainer.close()


def channels_last() -> None:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    states = []
    for make in (distributed.Trainer, dni_fx.Trainer):
        decoupled = dni_fx.decouple(
            copy.deepcopy(model), ["1", "3"], example_inputs=(x,), gradients="exact"
        )
        trainer = make(decoupled, F.cross_entropy, optimizer=torch.optim.SGD)
        for _ in range(3):
            trainer.step(x, target=torch.arange(4))
        states.append(weights(trainer))
    assert_same(*states, "channels last")


def fails(message: str, run: Callable[[], Any], kind: type[Exception] = DecouplingError) -> None:
    found = "nothing"
    try:
        run()
    except kind as error:
        found = str(error)
    assert message in found, f"{message!r} is not in {found!r}"


def refused() -> None:
    """What is wrong before the first step is said in every process, and nobody hangs."""
    me = dist.get_rank()

    def first(*arguments: Any, **options: Any) -> None:
        train(trainer_of(*arguments, **options), 1)

    tied = "'c.weight' is used by stage_2, stage_3, which are placed on different ranks"
    fails(tied, lambda: first("zero", model=built(Tied, torch.float32), placement=[0, 0, 1, 0]))
    fails("placement has 2 entries for 4 stages", lambda: first(placement=[0, 1]))
    fails("gives rank 1 nothing to do", lambda: first(placement=[0, 0, 0, 0]))
    fails("names rank 2, but there are ranks 0 to 1", lambda: first(placement=[0, 1, 2, 0]))
    fails("no stage: 'stage_9'", lambda: first(placement={"stage_9": 0}))
    fails("leaves out stage_1, stage_2, stage_3", lambda: first(placement={"stage_0": 0}))
    fails(
        "at least one rank for each stage, and none twice",
        lambda: first(placement=[0, [1, 1], 0, 0], staleness=0),
    )
    fails("pass staleness=", lambda: first(placement=[0, [0, 1], 0, 0]))
    fails("rank 1 has another plan than rank 0", lambda: first(cuts=["a", "b" if me else "c"]))
    fails(
        "rank 1 has another placement than rank 0",
        lambda: first(placement=[0, 1, 1, 1] if me else [0, 0, 1, 1]),
    )
    fails("rank 1 has another queue, policy, staleness or discount", lambda: first(queue=2 + me))
    fails(
        "a batch of 1 has no row for each of 2 ranks",
        lambda: train(trainer_of("zero", placement=[0, [0, 1], 1, 1], staleness=0), 1, sizes=(1,)),
    )
    fails("dni_fx.Trainer", lambda: first(schedule="threads"))
    fails("timeout must be", lambda: first(timeout=0))


def refused_buffers() -> None:
    """Statistics that several ranks would keep apart."""
    model = built(SharedStatistics, torch.float32)
    fails(
        "different ranks", lambda: train(trainer_of("zero", model=model, placement=[0, 0, 1, 1]), 1)
    )


def after_the_end() -> None:
    """A trainer that was closed says so; another one in the same process works."""
    trainer = train(trainer_of(timeout=8.0), 2)
    trainer.close()
    fails("closed", lambda: train(trainer, 1))
    compare("linear", staleness=0)


def quiet_after_the_end() -> None:
    """What a closed trainer leaves behind neither works nor grows, whoever closes last."""

    def threads() -> list[str]:
        return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))

    before = (
        threading.enumerate()
    )  # those of trainers that failed in other cases, and were not closed
    counts = []
    for _ in range(3):
        trainer = train(trainer_of(), 3)
        if (
            dist.get_rank() == 0
        ):  # whose letters of the second drain come when rank 1 has long said its last word
            time.sleep(0.3)
        trainer.drain()
        trainer.close()
        left = [t.name for t in threading.enumerate() if t not in before]
        assert not left, left
        counts.append(len(threads()))
    dist.barrier()
    busy = time.process_time()
    time.sleep(1.0)
    busy = time.process_time() - busy
    assert busy < 0.5, (
        f"{busy} s of work in 1 s of sleep"
    )  # one that spins takes all of it, or its share of a core
    # Now, not at close(): the system may count a thread for a moment after it has been joined.
    assert len(threads()) <= counts[0], f"threads: {counts}, then {threads()}"


def data_parallel_around_a_drop_in() -> None:
    """DistributedDataParallel takes the drop-in for a model; the sources of each rank are its
    own.
    """

    def trained(gradients: str | None) -> Tensor:
        model = built(Skips, torch.float32)
        inner, context = model, lambda y: contextlib.nullcontext()
        if gradients is not None:
            inner = dni_fx.decouple(
                model,
                CUTS,
                example_inputs=(batch(0)[0],),
                gradients=gradients,
                context=dni_fx.one_hot(5),
            ).as_module(synthesizer_optimizer=lambda p: torch.optim.Adam(p, 1e-2))
            context = inner.context
        wrapped = nn.parallel.DistributedDataParallel(inner)
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
        for step in range(6):
            x, y = batch(2 * step + dist.get_rank())
            with context(y):
                loss = F.cross_entropy(wrapped(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = nn.utils.parameters_to_vector(model.parameters()).detach()
        every = [torch.empty_like(found) for _ in range(dist.get_world_size())]
        dist.all_gather(every, found)
        assert all(torch.equal(found, other) for other in every), gradients
        return found

    plain = trained(None)
    assert torch.equal(trained("exact"), plain)
    for gradients in ("linear", "local"):
        assert (trained(gradients) - plain).abs().max() > 1e-3, gradients


def plans() -> None:
    """One plan for all ranks, whatever each would have measured."""
    model, inputs = built(Skips, torch.float32), (batch(0)[0],)
    decoupled = distributed.decouple(
        model, "auto", stages=3, example_inputs=inputs, gradients="linear"
    )
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, decoupled.plan.to_json())
    assert len(set(every)) == 1
    fails(
        "unknown gradient source",
        lambda: distributed.decouple(model, example_inputs=inputs, gradients="x"),
    )


def same_script() -> None:
    """For the test that runs :func:`alone` without a process group."""
    found = alone()
    if dist.get_rank() == 0:
        torch.save(found, OUT / "weights.pt")


def alone() -> dict[str, Tensor]:
    """A script that does not know whether it is distributed."""
    trainer = train(trainer_of("each:linear", staleness=0), 6)
    assert trainer.mean(2.0) == 2.0
    assert len(trainer.status(everywhere=True).rows) == 4
    x, _ = batch(0)
    trainer.evaluate(x)
    return weights(trainer)


OUT = Path()


def run(names: list[str]) -> dict[str, tuple[str, float]]:
    """Every case in a process group of its own, so that one that fails takes no other along.

    Returns:
        For each, what is wrong with it, and how many seconds it took; also written to ``OUT``.
    """
    torch.set_num_threads(1)
    store, rank, world = next(rendezvous("env://"))
    results = {}
    for name in names:
        began, error = time.perf_counter(), ""
        named = dist.PrefixStore(name, store)
        dist.init_process_group(
            "gloo", store=named, rank=rank, world_size=world, timeout=timedelta(seconds=40)
        )
        streams._trainers = 0  # the ranks that failed may have made fewer
        try:
            globals()[name]()
            dist.barrier()
        except BaseException:
            error = traceback.format_exc()
        results[name] = (error, time.perf_counter() - began)
        (OUT / f"rank{rank}.json").write_text(json.dumps(results))
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    OUT = Path(sys.argv[1])
    run(sys.argv[2:])

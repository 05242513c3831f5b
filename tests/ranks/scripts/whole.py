"""The whole model on several ranks: evaluated, gathered, planned, wrapped, closed."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dni_fx import distributed
from dni_fx.errors import DecouplingError

from ...helpers.optimisers import adam
from ...helpers.training import batch, decoupled_of
from ...models.small import TOWERS
from .. import kit
from ..kit import compare, fails, train, trainer_of, weights


def whole_model() -> None:
    """evaluate, gather, mean, status and the timeline."""
    for options in ({"staleness": 0}, {}, {"placement": [0, 1, 0, 1], "queue": 1}):
        trainer = train(trainer_of("linear", **options), 6)  # type: ignore[arg-type]
        x, y = batch(0)
        output = trainer.forward(x)
        state = trainer.gather()
        model = TOWERS.build()
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
        assert bool(report.loss.isfinite()), "every rank knows the loss"
        text = str(trainer.status(everywhere=True))
        assert all(f"stage_{k}" in text for k in range(4)), text
        rows = trainer.status().rows
        assert [r["stage"] for r in rows] == [f"stage_{k}" for k in range(4)], rows
        path = kit.OUT / "timeline.json"
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
    model = TOWERS.build()
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
                trainer.forward(x)
                trainer.mean(1.0)
        trainer.close()


def held_out() -> None:
    """Every rank gets the numbers of the whole model, and one error where ranks do not do the
    same.
    """
    rank = dist.get_rank()
    batches = [batch(step, size) for step, size in enumerate((8, 8, 5))]

    def right(output: Tensor, target: Tensor) -> Tensor:
        return output.argmax(1) == target

    for options in ({"staleness": 0}, {"staleness": 0, "placement": [0, 1, 0, [0, 1]]}):
        trainer = train(trainer_of("linear", **options), 4)  # type: ignore[arg-type]
        found = trainer.evaluate(batches, {"right": right, "loss": F.cross_entropy})
        assert trainer.decoupled.model.training
        again = train(trainer, 2)
        model = TOWERS.build()
        model.load_state_dict(again.gather())
        assert abs(found["loss"] - again.evaluate(batches)) > 1e-6, "trained on"
        alone = trainer_of("linear", alone=True, model=model)
        want = alone.evaluate(batches, {"right": right, "loss": F.cross_entropy})
        found = again.evaluate(batches, {"right": right, "loss": F.cross_entropy})
        assert found["right"] == want["right"], (found, want)
        assert abs(found["loss"] - want["loss"]) < 1e-6, (found, want)
        again.close()

    def raises(output: Tensor, target: Tensor) -> Tensor:
        raise KeyError("of the metric")

    shuffled, fewer = batches[::-1], batches[: 3 - rank]
    for mine, metric, says in [
        (shuffled if rank else batches, right, "with the same batches"),
        (fewer, right, "without any more batch"),
        (batches, raises, "KeyError" if rank == 0 else "of the metric"),
    ]:
        trainer = train(trainer_of("linear", staleness=0), 2)
        fails(says, lambda: trainer.evaluate(mine, metric), Exception)  # noqa: B023
        with contextlib.suppress(DecouplingError):
            trainer.close()


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
        model = TOWERS.build()
        inner, context = model, lambda y: contextlib.nullcontext()
        if gradients is not None:
            decoupled = decoupled_of(gradients, TOWERS, model=model)
            inner = decoupled.as_module(synthesizer_optimizer=adam)
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
    model, inputs = TOWERS.build(), (batch(0)[0],)
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
        torch.save(found, kit.OUT / "weights.pt")


def alone() -> dict[str, Tensor]:
    """A script that does not know whether it is distributed."""
    trainer = train(trainer_of("each:linear", staleness=0), 6)
    assert trainer.mean(2.0) == 2.0
    assert len(trainer.status(everywhere=True).rows) == 4
    x, _ = batch(0)
    trainer.forward(x)
    return weights(trainer)


TWO = [
    whole_model,
    evaluating_between_steps,
    held_out,
    after_the_end,
    quiet_after_the_end,
    data_parallel_around_a_drop_in,
    plans,
    same_script,
]

"""One trunk that serves three clients, each with a head, images and a question of its own; one of
them is slow.

    python experiments/shared_trunk.py                                     # stages on threads
    torchrun --standalone --nproc-per-node 4 experiments/shared_trunk.py   # on processes, 4 or 5

Every client learns from its own loss, in its own stage. What the trunk learns from is predicted, by
one source for each client, which is corrected whenever that client's gradient comes. So nobody
waits for the slow one: it leaves out what it has no time for. Trains for --seconds, with all
clients equally fast and with one 10 times slower; prints the updates of every stage in that time
and what each client has learnt, beside a trunk that does not learn (zero).

Three clients and a trunk at work need more cores than most machines have; here their work is mostly
a pause (--work).
"""

from __future__ import annotations

import argparse
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
import ranks
from data import Digits, digits
from dni_fx import distributed
from dni_fx.schedules import Threads
from dni_fx.sources import GradientSource, Prediction

CLIENTS = {
    "digit": 10,
    "parity": 2,
    "large": 2,
}  # number of answers: which digit, odd or even, above 4 or not
SLOW = "large"
ENDS = list(itertools.accumulate(CLIENTS.values(), initial=0))
COLUMNS = {
    name: slice(*ENDS[k : k + 2]) for k, name in enumerate(CLIENTS)
}  # of outputs, and of labels as context

Batch = tuple[dict[str, Tensor], dict[str, Tensor]]  # images and labels of each client


class Pause(torch.autograd.Function):
    """The value itself, after some seconds: a stage that has more to do than these small ones."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, seconds: float) -> Tensor:
        """Sleep."""
        time.sleep(seconds)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Any:
        """Nothing of it."""
        return above[0], None


class Service(nn.Module):
    """The trunk on all images at once, and on its features each client's head.

    Args:
        seconds: that the trunk and each client work besides.
    """

    def __init__(self, seconds: dict[str, float]) -> None:
        super().__init__()
        self.seconds = seconds
        hidden = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
        self.trunk = nn.Sequential(nn.Flatten(2), *hidden, nn.Linear(64, 16), nn.Tanh())
        self.heads = nn.ModuleDict(
            {name: nn.Linear(16, answers) for name, answers in CLIENTS.items()}
        )

    def forward(self, images: dict[str, Tensor]) -> Tensor:
        """Images ``(batch, 1, 8, 8)`` of each client to the answers of all, side by side."""
        every = torch.stack([images[name] for name in CLIENTS], 1)
        features = self.trunk(Pause.apply(every, self.seconds["trunk"]))  # (batch, client, feature)
        answers = []
        for place, (name, head) in enumerate(self.heads.items()):
            answers.append(head(Pause.apply(features[:, place], self.seconds[name])))
        return torch.cat(answers, 1)  # in a stage of its own, which only collects


class Labels:
    """What the sources see: whose image it is and what its label is, one of 14 numbers, ``(batch,
    client, 14)``.
    """

    features, positions = ENDS[-1], 1

    def __call__(self, labels: dict[str, Tensor]) -> Tensor:
        """One-hot rows."""
        numbers = torch.stack([labels[name] + COLUMNS[name].start for name in CLIENTS], 1)
        return F.one_hot(numbers, self.features).float()


class OwnLoss(GradientSource):
    """The loss of one client, at its head's output: nothing has to come back."""

    message = "none"
    client = ""

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        """The gradient of the cross entropy."""
        assert context is not None
        labels = context[:, list(CLIENTS).index(self.client), COLUMNS[self.client]]
        with torch.enable_grad():
            answers = values[0].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(answers, labels) * self.unit, answers)
        return Prediction((gradient,))

    def flops(self) -> int:
        """About five operations for each answer."""
        return 5 * self.specs[0].shape[0] * self.specs[0].shape[1]


OWN_LOSSES = {name: type(f"{name.title()}Loss", (OwnLoss,), {"client": name}) for name in CLIENTS}


def total_loss(answers: Tensor, labels: dict[str, Tensor]) -> Tensor:
    """What the last stage reports; no stage learns from it."""
    return torch.stack([F.cross_entropy(answers[:, COLUMNS[n]], labels[n]) for n in CLIENTS]).sum()


def labels_of(digit: Tensor) -> dict[str, Tensor]:
    """Each client's own question about the same digits."""
    return {"digit": digit, "parity": digit % 2, "large": (digit > 4).long()}


def batches(data: Digits, size: int, seed: int) -> Iterator[Batch]:
    """A stream for each client, of a third of the images that no other client sees."""
    generator = torch.Generator().manual_seed(seed)
    share = len(data.train_x) // len(CLIENTS)
    while True:
        chosen = {
            n: torch.randint(share, (size,), generator=generator) + k * share
            for k, n in enumerate(CLIENTS)
        }
        images = {name: data.train_x[rows] for name, rows in chosen.items()}
        yield images, {name: labels_of(data.train_y[rows])[name] for name, rows in chosen.items()}


# ---- one run -------------------------------------------------------------------------------------


@dataclass
class Run:
    """What came of it: updates within the time by stage, and test accuracy by client."""

    updates: dict[str, int]
    accuracy: dict[str, float]


class Updates:
    """Counts the updates of every stage that is trained here, from now until the time is over."""

    def __init__(self, optimizers: dict[str, torch.optim.Optimizer], seconds: float) -> None:
        self.end = time.perf_counter() + seconds
        self.count: dict[str, int] = {}
        for k, name in enumerate(["trunk", *CLIENTS]):
            if f"stage_{k}" in optimizers:
                self.count[name] = 0
                optimizers[f"stage_{k}"].register_step_post_hook(partial(self.note, name))

    def note(self, name: str, *_: Any) -> None:
        """An update."""
        self.count[name] += time.perf_counter() < self.end


def make(
    args: argparse.Namespace, source: str, slow: float, example: Batch
) -> tuple[nn.Module, dict[str, Any]]:
    """A fresh model, and the trainer's arguments."""
    seconds = dict.fromkeys(["trunk", *CLIENTS], args.work / 1000)
    seconds[SLOW] *= slow
    torch.manual_seed(args.seed)
    model = Service(seconds)
    heads = {f"heads.{name}": OWN_LOSSES[name] for name in CLIENTS}
    decoupled = dni_fx.decouple(
        model,
        ["trunk", *heads],  # the stages: trunk, three clients, and what collects their answers
        example_inputs=(example[0],),
        gradients={"trunk": source, **heads},
        context=Labels(),
    )
    return model, {
        "decoupled": decoupled,
        "loss": total_loss,
        "optimizer": partial(torch.optim.Adam, lr=2e-3),
        "synthesizer_optimizer": partial(torch.optim.Adam, lr=3e-3),
    }


def run_threads(args: argparse.Namespace, data: Digits, source: str, slow: float) -> Run:
    """Every stage on a thread; batches come as fast as the trunk takes them."""
    stream = batches(data, args.batch, args.seed)
    model, options = make(args, source, slow, next(stream))
    trainer = dni_fx.Trainer(**options, schedule=Threads(args.queue, args.policy))
    updates, room = Updates(trainer.optimizers, args.seconds), threading.Semaphore(args.queue)
    trainer.optimizers["stage_0"].register_step_post_hook(lambda *_: room.release())
    while time.perf_counter() < updates.end:
        if room.acquire(timeout=0.1):
            images, labels = next(stream)
            trainer.step(images, target=labels)
    trainer.drain()
    trainer.close()
    with torch.no_grad():
        return Run(updates.count, accuracies(model.eval(), data))


def run_processes(
    args: argparse.Namespace, data: Digits, source: str, slow: float, name: str
) -> Run:
    """Every stage on a process; all make as many steps as the trunk has had time for.

    The process of the trunk says which batch is the last before it sends that batch, so that the
    others know in time.
    """
    stream = batches(data, args.batch, args.seed)
    model, options = make(args, source, slow, next(stream))
    last = dist.get_world_size() - 1
    placement = [
        min(k, last) for k in range(len(CLIENTS) + 2)
    ]  # the last process is the slow client's
    store = dist.PrefixStore(name, ranks.common_store())
    with distributed.Trainer(
        **options, placement=placement, queue=args.queue, policy=args.policy
    ) as trainer:
        images, labels = next(stream)
        trainer.step(images, target=labels)  # connects
        trainer.drain()
        dist.barrier()
        updates = Updates(trainer.optimizers, args.seconds)
        while not (store.check(["last"]) and int(store.get("last")) < trainer.steps):
            if trainer.rank == 0 and time.perf_counter() > updates.end:
                store.set("last", str(trainer.steps))
            images, labels = next(stream)
            trainer.step(images, target=labels)
        trainer.drain()
        model.eval()
        found = accuracies(trainer.forward, data)
        accuracy = {n: trainer.mean(value) for n, value in found.items()}
        if args.status:
            ranks.say(trainer.status(everywhere=True))
        parts: list[Any] = [None] * (last + 1)
        dist.all_gather_object(parts, updates.count)
    return Run({n: count for part in parts for n, count in part.items()}, accuracy)


def accuracies(model: Callable[..., Tensor | None], data: Digits) -> dict[str, float]:
    """Share of each client's right answers on the test images; nan where there is no output."""
    answers = model(dict.fromkeys(CLIENTS, data.test_x))
    if answers is None:
        return dict.fromkeys(CLIENTS, float("nan"))
    right = labels_of(data.test_y)
    return {
        n: float((answers[:, COLUMNS[n]].argmax(1) == right[n]).float().mean()) for n in CLIENTS
    }


# ---- all of them ---------------------------------------------------------------------------------


def main() -> None:
    """Train with and without a slow client, and with a trunk that does not learn; print what became
    of all.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run (default: 20)")
    parser.add_argument(
        "--work", type=float, default=20.0, help="of each stage, milliseconds a batch (default: 20)"
    )
    parser.add_argument(
        "--slow", type=float, default=10.0, help="how much slower one client is (default: 10)"
    )
    parser.add_argument(
        "--source", default="each:mlp", help="of the trunk's gradients (default: each:mlp)"
    )
    parser.add_argument(
        "--policy", choices=("drop_oldest", "wait"), default="drop_oldest", help="at a full queue"
    )
    parser.add_argument(
        "--queue", type=int, default=4, help="values under way between two stages (default: 4)"
    )
    parser.add_argument("--batch", type=int, default=64, help="images of each client (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--status", action="store_true", help="print what every stage did (with processes)"
    )
    args = parser.parse_args()
    data = digits()
    with ranks.processes() as count:
        if count not in (1, 4, 5):
            parser.error(
                f"the trunk and three clients need 4 or 5 processes, or threads in one, not {count}"
            )

        def run(name: str, source: str, slow: float) -> Run:
            if count == 1:
                return run_threads(args, data, source, slow)
            return run_processes(args, data, source, slow, name)

        kind = "threads" if count == 1 else f"{count} processes"
        ranks.say(
            f"{args.seconds:g} s a run on {kind}, {args.policy}; the trunk learns from "
            f"{args.source!r}"
        )
        alike, slow = run("alike", args.source, 1.0), run("slow", args.source, args.slow)
        frozen = run("zero", "zero", args.slow)
        ranks.say(
            f"\n| updates | all alike | {SLOW!r} {args.slow:g} x slower | change |\n| --- | ---: | "
            "---: | ---: |"
        )
        for name in alike.updates:
            before, after = alike.updates[name], slow.updates[name]
            ranks.say(f"| {name} | {before} | {after} | {after / max(before, 1) - 1:+.1%} |")
        ranks.say("\n| test accuracy | all alike | one slow | one slow, trunk not trained |")
        ranks.say("| --- | ---: | ---: | ---: |")
        for name in CLIENTS:
            cells = (f"{found.accuracy[name]:.1%}" for found in (alike, slow, frozen))
            ranks.say(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

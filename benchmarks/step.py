"""What one decoupled step costs, next to the loop that a careful person would write, and to
backprop.

    python benchmarks/step.py
    python benchmarks/step.py --profile

The network is an MLP (784 inputs, four hidden layers of 256, 10 classes; batch 256) cut after its
first three hidden layers, with linear synthesizers that see the labels, Adam everywhere and one
thread. The hand-written loop does the same mathematics, so both must end in the same weights: that
is checked before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import pstats
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probe import capacity, describe_environment, interleave

INPUTS, HIDDEN, CLASSES, BATCH = 784, 256, 10, 256
LEARNING_RATE = 1e-3
CUTS = ("hidden1", "hidden2", "hidden3")
WINDOW = 100  # targets in the running scale, as in dni_fx.sources
CHECKED_STEPS = 20

Step = Callable[[Tensor, Tensor], object]


class Network(nn.Module):
    """Four hidden layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden1 = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU())
        self.hidden2 = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        self.hidden3 = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        self.hidden4 = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 784)`` to ``(batch, 10)`` logits."""
        return self.head(self.hidden4(self.hidden3(self.hidden2(self.hidden1(x)))))


class HandWritten:
    """Decoupled training of `Network`, for this network and these cuts only.

    Each synthesizer runs once a step; its output is kept for the regression, whose target is
    divided by the running root mean square of the targets so far. All parameters are updated at the
    end of the step.
    """

    def __init__(self, model: Network) -> None:
        self.stages = (
            model.hidden1,
            model.hidden2,
            model.hidden3,
            nn.Sequential(model.hidden4, model.head),
        )
        self.synthesizers = nn.ModuleList(nn.Linear(HIDDEN + CLASSES, HIDDEN) for _ in CUTS)
        for parameter in self.synthesizers.parameters():
            nn.init.zeros_(parameter)
        self.scale = torch.zeros(len(CUTS))
        self.count = torch.zeros(len(CUTS))
        self.optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        self.synthesizer_optimizer = torch.optim.Adam(self.synthesizers.parameters(), LEARNING_RATE)

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        """One step; returns the loss, detached."""
        self.optimizer.zero_grad()
        self.synthesizer_optimizer.zero_grad()
        context = F.one_hot(labels, CLASSES).to(x.dtype)
        scales = self.scale.unbind()
        predictions, targets = [], []
        received = x
        for index, (stage, synthesizer) in enumerate(
            zip(self.stages, self.synthesizers, strict=False)
        ):
            sent = stage(received)
            prediction = synthesizer(torch.cat((sent.detach(), context), 1))
            sent.backward(prediction.detach() * scales[index])
            if index:
                targets.append(_gradient(received))
            predictions.append(prediction)
            received = sent.detach().requires_grad_()
        loss = F.cross_entropy(self.stages[-1](received), labels)
        loss.backward()
        targets.append(_gradient(received))

        self._update_scale(targets)
        inverse = (
            self.scale.reciprocal().nan_to_num(posinf=0.0).unbind()
        )  # a zero scale means zero targets
        for prediction, target, factor in zip(predictions, targets, inverse, strict=True):
            F.mse_loss(prediction, target * factor).backward()
        self.optimizer.step()
        self.synthesizer_optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def _update_scale(self, targets: list[Tensor]) -> None:
        square = torch.stack(
            [torch.linalg.vector_norm(target).square() / target.numel() for target in targets]
        )
        known = (square > 0) & square.isfinite()
        self.count.add_(known).clamp_(max=WINDOW)
        updated = self.scale.square().lerp(square, self.count.reciprocal()).sqrt()
        self.scale.copy_(torch.where(known, updated, self.scale))


def _gradient(received: Tensor) -> Tensor:
    assert received.grad is not None
    return received.grad


class Library:
    """The same through dni_fx."""

    def __init__(self, model: Network, x: Tensor, compiled: bool = False) -> None:
        import dni_fx

        self.decoupled = dni_fx.decouple(
            model,
            cuts=list(CUTS),
            example_inputs=(x,),
            gradients="linear",
            context=dni_fx.one_hot(CLASSES),
            check=False,
        )

        def adam(parameters: object) -> torch.optim.Optimizer:
            return torch.optim.Adam(parameters, LEARNING_RATE)  # type: ignore[arg-type]

        self.trainer = dni_fx.Trainer(
            self.decoupled,
            loss=F.cross_entropy,
            optimizer=adam,
            synthesizer_optimizer=adam,
            compile=compiled,
        )

    def __call__(self, x: Tensor, labels: Tensor) -> object:
        """One step."""
        return self.trainer.step(x, target=labels)


class Backprop:
    """Ordinary training."""

    def __init__(self, model: Network) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        """One step; returns the loss, detached."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Random images and labels of one seed."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(BATCH, INPUTS, generator=generator),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(count)
    ]


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest absolute difference between two rows of parameters; 0.0 only where they are
    equal.
    """
    return max(
        float((a.detach() - b.detach()).abs().max()) for a, b in zip(ours, theirs, strict=True)
    )


def compare_weights(start: Network) -> str:
    """Train both from one start for `CHECKED_STEPS` and compare all weights, the synthesizers' too.

    Raises:
        AssertionError: they differ by more than float32 rounding explains.
    """
    data = batches(CHECKED_STEPS)
    by_hand, by_library = copy.deepcopy(start), copy.deepcopy(start)
    hand, library = HandWritten(by_hand), Library(by_library, data[0][0])
    for x, labels in data:
        hand(x, labels)
        library(x, labels)
    synthesizers = [p for cut in CUTS for p in library.decoupled.synthesizers[cut].parameters()]
    model = largest_difference(list(by_library.parameters()), list(by_hand.parameters()))
    synthesizer = largest_difference(synthesizers, list(hand.synthesizers.parameters()))
    moved = largest_difference(list(by_hand.parameters()), list(start.parameters()))
    if model == synthesizer == 0.0:
        both = "dni_fx and the hand-written loop"
        return f"After {CHECKED_STEPS} steps {both} have the same weights, bit for bit."
    text = f"After {CHECKED_STEPS} steps weights differ by up to {model:.2e}"
    text += f", the synthesizers' by {synthesizer:.2e}"
    assert model < 1e-3 * moved, (
        f"{text}; training moved them by up to {moved:.2e}: this is not the same mathematics"
    )
    return f"{text}."


def profile(step: Step, steps: int) -> None:
    """Print where the time of ``step`` goes, by function, operators included."""
    data = batches(1)[0]
    step(*data)
    profiler = cProfile.Profile()
    with profiler:
        for _ in range(steps):
            step(*data)
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(30)


def main() -> None:
    """Check the weights, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100, help="turns that each variant gets")
    parser.add_argument("--calls", type=int, default=10, help="steps in one turn")
    parser.add_argument(
        "--profile", action="store_true", help="print where the time goes, and no table"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = Network()
    x, labels = batches(1)[0]
    steps: dict[str, Step] = {
        "backprop": Backprop(copy.deepcopy(start)),
        "hand-written": HandWritten(copy.deepcopy(start)),
        "dni_fx": Library(copy.deepcopy(start), x),
        "dni_fx, compiled": Library(copy.deepcopy(start), x, compiled=True),
    }
    if arguments.profile:
        for name in ("hand-written", "dni_fx"):
            print(f"== {name}")
            profile(steps[name], arguments.calls * 10)
        return
    print(f"{describe_environment()}; {capacity()}\n")
    print(compare_weights(start) + "\n")
    variants = {name: (lambda step=step: step(x, labels)) for name, step in steps.items()}
    timings = interleave(variants, rounds=arguments.rounds, calls=arguments.calls, warmup=10)
    by_hand, backprop = timings["hand-written"], timings["backprop"]
    print(
        "| step | min, ms | median, ms | x hand-written (min) | x hand-written (median) | x "
        "backprop (min) |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, timing in timings.items():
        print(
            f"| {name} | {timing.best * 1e3:.3f} | {timing.median * 1e3:.3f} | "
            f"{timing.best / by_hand.best:.3f} | {timing.median / by_hand.median:.3f} | "
            f"{timing.best / backprop.best:.2f} |"
        )
    print("\nGoal: dni_fx at most 1.1 x hand-written.")


if __name__ == "__main__":
    main()

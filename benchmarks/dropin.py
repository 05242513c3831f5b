"""What a drop-in module saves: activation memory and time of a step, next to backprop and
activation checkpoints.

    python benchmarks/dropin.py
    python benchmarks/dropin.py --quick

A step is ``zero_grad``, forward, loss and backward, in which sources also take a step of their own;
the model's optimiser is left out. Networks: a residual network for images of 32 x 32 (six layers a
unit of depth, and two), and a transformer encoder of 12 blocks. Stages are blocks in a row, divided
by what autograd keeps of them, the same for checkpoints (every stage but the last is one, as in the
drop-in) and for the drop-in. Where transformers is installed, a BERT of MiniLM's shape is measured
as well, with the two cuts of ``experiments/finetune_pretrained.py``.

Memory is counted, not sampled. A ``TorchDispatchMode`` sees every tensor that an operator returns,
in forward and in backward; each new storage counts with its bytes from then until it is freed,
which a weak reference tells. The figure is the largest sum in one step, without what was there
before (parameters, inputs, optimisers' states) and without what is a parameter's gradient at the
end; with these it is given, too, since the drop-in makes them in forward. What a kernel allocates
for itself, and does not return, is not seen. Known sequences with known sums are checked first.

Target: at 8 stages at most 0.35 of backprop's memory.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

import dni_fx
import torchvision_cpu  # noqa: F401  (before transformers looks for torchvision)
from probe import capacity, describe_environment, interleave

TARGET = 0.35
CLASSES = 10
SOURCES = {
    "zero": ("zero", False),
    "local, label": ("local", True),
    "linear": ("linear", False),
    "linear, label": ("linear", True),
}


# ---- memory --------------------------------------------------------------------------------------


class Storages(TorchDispatchMode):
    """Logs when storages made inside appear and go."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[int, int]] = []  # number of the storage, bytes (negative when it goes)
        self.live: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)
        }
        found = func(*args, **(kwargs or {}))
        for tensor in tree_iter(found):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in before:
                self.note(tensor)
        return found

    def note(self, tensor: Tensor) -> None:
        """Count the tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        if id(storage) in self.live:
            return
        number, size, key, log, live = (
            self.count,
            storage.nbytes(),
            id(storage),
            self.log,
            self.live,
        )

        def gone(_: Any) -> None:
            log.append((number, -size))
            live.pop(key, None)

        self.count += 1
        log.append((number, size))
        live[key] = (number, weakref.ref(storage, gone))

    def peak(self, without: list[Tensor]) -> int:
        """Most bytes alive at once, some tensors' storages left out."""
        left_out = {self.live[k][0] for t in without if (k := id(t.untyped_storage())) in self.live}
        now = most = 0
        for number, size in self.log:
            if number not in left_out:
                now += size
                most = max(most, now)
        return most


def peak(step: Callable[[], object], parameters: list[nn.Parameter]) -> tuple[int, int]:
    """Bytes of a step at its peak, without and with the parameters' gradients.

    Args:
        step: forward and backward; run twice, the second time under watch.
        parameters: whose gradients do not count.
    """
    step()
    for parameter in parameters:
        parameter.grad = None
    gc.collect()
    gc.disable()  # what only a collection would free counts
    try:
        with Storages() as storages:
            step()
        return storages.peak([p.grad for p in parameters if p.grad is not None]), storages.peak([])
    finally:
        gc.enable()


def check() -> str:
    """Sequences whose sums are known.

    Raises:
        SystemExit: another number comes out.
    """
    x, w = torch.ones(1000), nn.Parameter(torch.ones(1000))

    def plain() -> None:
        a = x * 2  # 1
        b = a.view(10, 100).exp()  # 2, the view is none
        del a  # 1
        b.mul_(3)  # in place: none
        c = b + 1  # 2
        (b + c).view(-1)  # 3
        del b, c

    def trained() -> None:
        y = (w * x).sin().exp()  # w x is kept for sin, y for exp; sin's result goes: 2
        y.backward(
            torch.ones(1000)
        )  # ones, y' = y ones, cos(w x), and the product of the last two: 6

    for function, expected in ((plain, 12_000), (trained, 24_000)):
        found, _ = peak(function, [w])
        if found != expected:
            raise SystemExit(f"{function.__name__}: {found} bytes counted, {expected} expected")
    return "known sequences of 12,000 and 24,000 bytes are counted right"


# ---- networks ------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = (
            nn.Identity() if before == width else nn.Conv2d(before, width, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, before, h, w)`` to ``(batch, width, h / stride, w / stride)``."""
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class Attention(nn.Module):
    """A block of a transformer encoder, normalised first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, time, width)`` to the same."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Network(nn.Module):
    """Blocks in a row and a head; stages behind checkpoints where ``ends`` says so."""

    def __init__(self, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), head
        self.ends: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        """Inputs to logits."""
        first = 0
        for end in self.ends:
            x = checkpoint(nn.Sequential(*list(self.blocks)[first:end]), x, use_reentrant=False)
            first = end
        for block in list(self.blocks)[first:]:
            x = block(x)
        return self.head(x)


class MeanOverTime(nn.Module):
    """``(batch, time, width)`` to ``(batch, width)``."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean."""
        return x.mean(1)


def resnet(depth: int) -> Network:
    """6 ``depth`` + 2 layers, widths 16, 32 and 64."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks, before = [], 16
    for width in (16, 32, 64):
        for k in range(depth):
            blocks.append(Residual(before, width, 2 if width > 16 and k == 0 else 1))
            before = width
    return Network([nn.Sequential(stem, blocks[0]), *blocks[1:]], nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)
    ))  # fmt: skip


def transformer(blocks: int, width: int) -> Network:
    """An encoder that classifies sequences."""
    head = nn.Sequential(nn.LayerNorm(width), MeanOverTime(), nn.Linear(width, CLASSES))
    return Network([Attention(width, 4) for _ in range(blocks)], head)


class MiniLM(nn.Module):
    """A BERT classifier of MiniLM's shape, on texts without padding, with new weights."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        shape = {
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
        }
        self.bert = BertForSequenceClassification(BertConfig(num_labels=CLASSES, **shape))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, time)`` tokens to logits."""
        return self.bert(x).logits


def minilm(x: Tensor, y: Tensor) -> dict[str, Variant]:
    """Backprop, checkpoints (of each layer, as transformers makes them) and drop-ins with two cuts,
    by name.
    """

    def fresh() -> MiniLM:
        torch.manual_seed(0)
        return MiniLM()

    checkpoints = fresh()
    checkpoints.bert.gradient_checkpointing_enable({"use_reentrant": False})
    found = {
        "backprop": make_step(fresh(), x, y, False),
        "checkpoints": make_step(checkpoints, x, y, False),
    }
    for name, (gradients, label) in SOURCES.items():
        decoupled = dni_fx.decouple(
            fresh(),
            [f"bert.bert.encoder.layer.{k}" for k in (1, 3)],
            example_inputs=(x,),
            gradients=gradients,
            context=dni_fx.one_hot(CLASSES) if label else None,
            check=False,
        )
        found[f"drop-in {name}, 3 stages"] = make_step(decoupled.as_module(), x, y, label)
    return found


def ends(model: Network, x: Tensor, stages: int) -> list[int]:
    """Where stages end, so that autograd keeps equally much of each: numbers of blocks, without the
    last stage's.
    """
    kept: list[int] = []
    for block in model.blocks:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()  # an output itself would hold its node

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = block(x)
        kept.append(sum(seen.values()))
        x = y.detach()
    total, sums = sum(kept), [sum(kept[: k + 1]) for k in range(len(kept))]
    return [
        min(range(len(sums)), key=lambda k: abs(sums[k] - total * s / stages)) + 1
        for s in range(1, stages)
    ]


# ---- the table -----------------------------------------------------------------------------------


@dataclass
class Variant:
    """A way to make a step.

    Attributes:
        step: forward and backward.
        parameters: the model's.
    """

    step: Callable[[], object]
    parameters: list[nn.Parameter]


def make_step(m: Any, x: Tensor, y: Tensor, context: bool) -> Variant:
    """Of an ordinary loop."""

    def step() -> None:
        m.zero_grad()
        with m.context(y) if context else _nothing():
            loss = F.cross_entropy(m(x), y)
        loss.backward()

    return Variant(step, list(m.parameters()))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def variants(
    make: Callable[[], Network], x: Tensor, y: Tensor, stages: list[int]
) -> dict[str, Variant]:
    """Backprop, checkpoints and drop-ins, by name."""

    def fresh() -> Network:
        torch.manual_seed(0)
        return make()

    found = {"backprop": make_step(fresh(), x, y, False)}
    for count in stages:
        model = fresh()
        model.ends = ends(model, x, count)
        found[f"checkpoints, {count} stages"] = make_step(model, x, y, False)
    for name, (gradients, label) in SOURCES.items():
        for count in stages:
            model = fresh()
            cuts = [f"blocks.{k - 1}" for k in ends(model, x, count)]
            decoupled = dni_fx.decouple(
                model, cuts, example_inputs=(x,), gradients=gradients, check=False,
                context=dni_fx.one_hot(CLASSES) if label else None,
            )  # fmt: skip
            found[f"drop-in {name}, {count} stages"] = make_step(decoupled.as_module(), x, y, label)
    return found


def table(name: str, found: dict[str, Variant], rounds: int) -> list[str]:
    """Print a network's rows.

    Returns:
        Names of the drop-ins with 8 stages that miss the target.
    """
    peaks = {n: peak(v.step, v.parameters) for n, v in found.items()}
    timings = interleave({n: v.step for n, v in found.items()}, rounds=rounds)
    memory, everything = peaks["backprop"]
    best = timings["backprop"].best
    print(
        f"\n{name}\n\n| step | peak, MB | x backprop | with gradients, MB | x backprop | min, ms | "
        "x backprop |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for n, (a, b) in peaks.items():
        t = timings[n].best
        print(
            f"| {n} | {a / 1e6:.2f} | {a / memory:.2f} | {b / 1e6:.2f} | {b / everything:.2f} "
            f"| {t * 1e3:.1f} | {t / best:.2f} |"
        )
    return [
        f"{name}: {n}"
        for n, (a, _) in peaks.items()
        if "drop-in" in n and "8" in n and a > TARGET * memory
    ]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="small batches, short and narrow sequences, two rounds"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns that each variant gets")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{describe_environment()}; {capacity()}\n{check()}")
    quick = arguments.quick
    size, time, width, rounds = (4, 16, 64, 2) if quick else (32, 64, 128, arguments.rounds)
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (size,), generator=generator)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    sequences = torch.randn(size, time, width, generator=generator)
    missed = table(
        f"residual network of 50 layers, batch {size}",
        variants(lambda: resnet(8), images, y, arguments.stages),
        rounds,
    )
    missed += table(
        f"transformer of 12 blocks, width {width}, {time} tokens, batch {size}",
        variants(lambda: transformer(12, width), sequences, y, arguments.stages),
        rounds,
    )
    if importlib.util.find_spec("transformers") is None:
        print("\nMiniLM: transformers is not installed")
    else:
        tokens = torch.randint(1000, (size, time), generator=generator)
        table(f"BERT of MiniLM's shape, {time} tokens, batch {size}", minilm(tokens, y), rounds)
    print(f"\nat 8 stages, above {TARGET} of backprop's memory: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()

"""Program folders, written, run without dni_fx, and compared with the trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.recurrent import decouple_through_time

from ..helpers.paths import ROOT
from ..models.feedforward import UNet
from ..models.sequences import GPT
from .models import CharacterModel, ResNet18, per_token
from .running import SEED

STEPS = 10
TOKENS = 11


@dataclass(frozen=True)
class Case:
    """A model to write: what makes its trainer, and its batches."""

    make: Callable[[], Any]
    batches: Callable[[], list[Any]]


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98))


def trainer(
    model: Callable[[], nn.Module],
    cuts: Sequence[str],
    x: Tensor,
    loss: Callable[..., Tensor],
    optimizer: Any = momentum,
    more: dict[str, Any] | None = None,
    **options: Any,
) -> Callable[[], dni_fx.Trainer]:
    def make() -> dni_fx.Trainer:
        torch.manual_seed(0)
        decoupled = dni_fx.decouple(model(), cuts, example_inputs=(x,), check=False, **options)
        return dni_fx.Trainer(decoupled, loss, optimizer=optimizer, **(more or {}))

    return make


def images(size: int, classes: int = 10) -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randn(4, 3, size, size), torch.randint(classes, (4,))) for _ in range(STEPS)]


def maps() -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8)) for _ in range(STEPS)]


def texts(length: int = 6) -> list[Any]:
    torch.manual_seed(1)
    draw = lambda: torch.randint(TOKENS, (4, length))  # noqa: E731
    return [(draw(), draw()) for _ in range(STEPS)]


def windows() -> list[Any]:
    return [(x, y, k % 4 == 3) for k, (x, y) in enumerate(texts())]


def window_trainer(**options: Any) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        made = decouple_through_time(
            CharacterModel(), 6, loss=per_token, optimizer=adamw, check=False, **options
        )
        return made.prepare(windows()[0][0])

    return make


_IMAGE, _MAP = torch.randn(4, 3, 32, 32), torch.randn(2, 2, 8, 8)
_TEXT = torch.randint(TOKENS, (4, 6))
_LABELS = {"context": dni_fx.one_hot(10)}
_RESNET = (ResNet18, ["layer1", "layer2", "layer3"], _IMAGE, F.cross_entropy)
_UNET = (UNet, ["down2", "middle"], _MAP, nn.MSELoss())

CASES: dict[str, Case] = {
    "resnet, auto": Case(trainer(*_RESNET, **_LABELS), lambda: images(32)),
    "resnet, local": Case(trainer(*_RESNET, gradients="local", **_LABELS), lambda: images(32)),
    "unet, auto": Case(trainer(*_UNET), maps),
    "unet, joint": Case(trainer(*_UNET, gradients="joint:conv"), maps),
    "unet, zero, clipped": Case(
        trainer(*_UNET, adamw, more={"clip_norm": 0.1}, gradients="zero"), maps
    ),
    "gpt, mlp": Case(trainer(GPT, ["blocks.0"], _TEXT, per_token, adamw, gradients="mlp"), texts),
    "gpt, local": Case(
        trainer(
            GPT, ["blocks.0"], _TEXT, per_token, gradients="local",
            context=dni_fx.one_hot(TOKENS, positions=1), example_target=_TEXT,
        ),
        texts,
    ),
    "lstm, auto": Case(window_trainer(), windows),
    "lstm, zero": Case(window_trainer(gradients="zero"), windows),
    "lstm, cut inside": Case(window_trainer(gradients="linear", cuts=["embed"]), windows),
}  # fmt: skip


@dataclass
class Ran:
    """A folder that was written and run: what the trainer made, and what the program made."""

    folder: Path
    trained: dict[str, Tensor]
    losses: list[Tensor]
    found: dict[str, Any]
    made: Any


def write(made: Any, folder: Path, batches: list[Any]) -> None:
    """A trainer's program, and batches beside it."""
    made.to_folder(folder)
    torch.save(batches, folder.with_suffix(".batches.pt"))


def train(made: Any, batches: list[Any]) -> list[Tensor]:
    """The losses of the trainer itself."""
    torch.manual_seed(SEED)
    if isinstance(made, dni_fx.Trainer):
        return [made.step(*x, target=y).loss for *x, y in batches]
    return [made.step(x, done=done, target=y).loss for x, y, done in batches]


def trained_weights(made: Any) -> dict[str, Tensor]:
    """All tensors of model and sources."""
    decoupled = made.decoupled
    return {n: t.detach().clone() for n, t in decoupled.state_dict(keep_vars=True).items()}


def poisoned(folder: Path) -> str:
    """A path on which importing dni_fx fails."""
    place = folder / "poison" / "dni_fx"
    place.mkdir(parents=True, exist_ok=True)
    (place / "__init__.py").write_text('raise ImportError("no dni_fx here")\n')
    return str(place.parent)


def run_folders(place: Path, folders: Sequence[Path]) -> None:
    """Run programs in a process where dni_fx cannot be imported."""
    script = Path(__file__).with_name("running.py")
    path = os.pathsep.join([poisoned(place), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *map(str, folders)]
    subprocess.run(command, env=env, check=True, timeout=120)


def of_stages(found: dict[str, Tensor], trained: dict[str, Tensor]) -> dict[str, tuple[Any, Any]]:
    """What a program has of the model, with what the trainer has, by the program's names."""
    pairs = {}
    for name, tensor in found.items():
        kind, _, key = name.partition(".")
        if kind.startswith("stage_"):
            pairs[name] = (tensor, trained[f"model.{key}"])
    return pairs

"""What autograd, global state and randomness bring: checkpoints, own functions, frozen parts,
buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .feedforward import norm_dropout_chain


class CheckpointedBlock(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.body, x, use_reentrant=self.use_reentrant)


def checkpointed_chain(use_reentrant: bool) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(6, 8),
        CheckpointedBlock(use_reentrant),
        CheckpointedBlock(use_reentrant),
        nn.Linear(8, 3),
    )


class Binarise(torch.autograd.Function):
    """Straight-through sign: the backward is not the derivative of the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.width = width
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < ctx.width).to(grad.dtype), None


class ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.25


class BinaryNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = Binarise.apply(self.fc1(x), 1.0)
        x = torch.relu(self.fc2(x))
        return self.fc3(ScaleGradient.apply(x))


class NoGradTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.teacher = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.student(x)
        with torch.no_grad():
            goal = torch.tanh(self.teacher(x))
            scale = h.abs().mean() + 1
        return self.head(h / scale), F.mse_loss(h, goal)


class DetachedBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.probe = nn.Linear(8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.fc1(x))
        y = torch.relu(self.fc2(h))
        return self.head(y), self.probe(h.detach()) * y.detach().mean()


class AutocastInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.body(h)
        h = self.norm(h + y.to(h.dtype))
        return self.head(h)


def frozen_chain(*frozen: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Sequential(
            *(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(5))
        )
        for index in frozen:
            model[index].requires_grad_(False)
        return model

    return make


def frozen_norm_chain() -> nn.Module:
    model = norm_dropout_chain()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval().requires_grad_(False)
    return model


class RandomDepthBlock(nn.Module):
    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand([]) < self.drop:
            return x
        return x + self.body(x)


def stochastic_depth_chain() -> nn.Module:
    blocks = (RandomDepthBlock(6, 0.4) for _ in range(4))
    return nn.Sequential(nn.Linear(6, 6), *blocks, nn.Linear(6, 3))


class RowDrop(nn.Module):
    """torchvision's ``stochastic_depth`` in row mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        survival = 1.0 - self.p
        size = [x.shape[0]] + [1] * (x.ndim - 1)
        noise = torch.empty(size, dtype=x.dtype, device=x.device)
        noise = noise.bernoulli_(survival)
        if survival > 0.0:
            noise.div_(survival)
        return x * noise


class RowDropNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.drop = RowDrop(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + self.drop(torch.relu(layer(x)))
        return self.head(x)


class RunningMean(nn.Module):
    ema: Tensor
    steps: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("ema", torch.zeros(width))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            with torch.no_grad():
                self.ema.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x - self.ema / (1 - 0.9 ** (self.steps + 1))


class Rebinding(nn.Module):
    """Assigns a new tensor to its buffer, as many moving averages do."""

    mean: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


def buffer_chain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), RunningMean(8), nn.ReLU(), nn.Linear(8, 8), RunningMean(8), nn.Linear(8, 3)
    )


def rebinding_chain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), Rebinding(8), nn.ReLU(), nn.Linear(8, 8), Rebinding(8), nn.Linear(8, 3)
    )

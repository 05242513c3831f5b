"""Control flow and odds and ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import floats
from .feedforward import ConvNet, mlp_chain


class ShapeControl(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 2, f"want (batch, 6), got {tuple(x.shape)}"
        assert x.shape[-1] == 6
        h = self.fc1(x)
        if x.shape[0] > 1:
            h = h - h.mean(0, keepdim=True)
        h = torch.relu(self.fc2(torch.relu(h)))
        return self.fc3(h) / len(x)


class TrainingControl(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.extra = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(torch.relu(self.fc1(x)), 0.2, self.training)
        h = self.fc2(h)
        if self.training:
            h = h + 0.1 * torch.randn_like(h)
            return self.fc3(torch.relu(h + self.extra(h)))
        return self.fc3(torch.relu(h)).softmax(-1)


def normed_chain(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return nn.Sequential(
            norm(nn.Linear(6, 8)),
            nn.ReLU(),
            norm(nn.Linear(8, 8)),
            nn.ReLU(),
            norm(nn.Linear(8, 3)),
        )

    return make


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.squeeze = nn.Conv2d(6, 2, 1)
        self.excite = nn.Conv2d(2, 6, 1)
        self.conv2 = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.conv1(x)))
        scale = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)), inplace=True))
        return self.conv2(x * scale.sigmoid()).amax((2, 3))


class GroupNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 6, 3, padding=1)
        self.gn1 = nn.GroupNorm(3, 6)
        self.conv2 = nn.Conv1d(6, 6, 3, padding=1, groups=3)
        self.gn2 = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.gn1(self.conv1(x)), inplace=True)
        x = F.elu(self.gn2(self.conv2(x)), inplace=True)
        return self.head(x.flatten(2).mean(dim=-1))


class Routing(nn.Module):
    """Integer and boolean tensors cross the cuts: the expert's index and the mask of kept units."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.inp = nn.Linear(6, 8)
        self.experts = nn.Parameter(torch.randn(3, 8, 8) * 0.3)
        self.norm = nn.LayerNorm(8)
        self.table = nn.Embedding(3, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(x).softmax(-1)
        choice = scores.argmax(-1)
        h = self.inp(x)
        keep = h > -0.5
        y = self.norm(torch.bmm(h.unsqueeze(1), self.experts[choice]).squeeze(1))
        y = torch.where(keep, y, torch.zeros_like(y)) * scores.gather(1, choice[:, None])
        return self.head(y + self.table(choice)), choice


class TensorAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 3)
        self.scale = torch.linspace(0.5, 1.5, 8)
        self.shifts = [torch.zeros(8), torch.ones(8)]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x)) * self.scale.to(x.dtype)
        h = torch.relu(self.fc2(h)) + self.shifts[1].to(x)
        return self.fc3(h * self.scale.to(x.dtype))


def halve(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 0.5


def shift(module: nn.Module, inputs: Any) -> Any:
    return (inputs[0] + 0.25,)


def hooked_chain() -> nn.Module:
    model = mlp_chain()
    model.get_submodule("2").register_forward_hook(halve)
    model.get_submodule("4").register_forward_pre_hook(shift)
    return model


class Factories(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(4, 8)
        self.mid = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        h = self.inp(x)
        decay = torch.arange(t, device=x.device, dtype=x.dtype)
        carry = torch.zeros(b, t, 8, dtype=x.dtype)
        carry[:, 0] = 1
        h = torch.relu(h) * torch.exp(-decay / t)[None, :, None] + carry
        h = (
            self.mid(h) * x.new_full((b, 1, 1), 0.5)
            + torch.linspace(0, 1, 8).to(h)
            + torch.ones_like(h)
        )
        return self.head(h).sum(1) / torch.tensor(float(t), dtype=x.dtype)


def channels_last_convnet() -> nn.Module:
    return ConvNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs


def channels_last_rows(batch: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (
        torch.randn(batch, 3, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last),
    ), {}


def gated(batch: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, _ = floats((4,), (5,))(batch, dtype)
    return (*args, torch.rand(batch) > 0.3), {}

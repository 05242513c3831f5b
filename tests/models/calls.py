"""Structured inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 8)
        self.mid = nn.Linear(8, 8)
        self.boxes = nn.Linear(8, 4)
        self.scores = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = torch.relu(self.trunk(x))
        y = torch.relu(self.mid(h))
        return {
            "boxes": self.boxes(y),
            "scores": [self.scores(y), self.scores(h)],
            "size": x.shape[1],
            "extra": None,
        }


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None
    count: int = 0


class DataclassOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Answer:
        h = torch.tanh(self.fc1(x))
        return Answer(logits=self.fc3(torch.tanh(self.fc2(h))), hidden=h)


class Moments(NamedTuple):
    mean: Tensor
    log_var: Tensor
    sample: Tensor


class NamedTupleOutput(nn.Module):
    """A variational encoder: random numbers in the middle stage."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 8)
        self.mean = nn.Linear(8, 3)
        self.log_var = nn.Linear(8, 3)
        self.decoder = nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Moments:
        h = torch.relu(self.encoder(x))
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        return Moments(mean, log_var, self.decoder(z))


class NestedInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(6, 8)
        self.kind = nn.Embedding(5, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, batch: dict[str, Any], *, weights: Tensor) -> Tensor:
        pixels, kinds = batch["image"]["pixels"], batch["kinds"]
        h = torch.relu(self.image(pixels) + self.kind(kinds[0]))
        return self.head(torch.relu(self.mix(h) + self.kind(kinds[1]))) * weights


def nested_input(batch: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kinds = [torch.randint(0, 5, (batch,)), torch.randint(0, 5, (batch,))]
    nested = {
        "image": {"pixels": torch.randn(batch, 6, dtype=dtype), "id": "photo"},
        "kinds": kinds,
    }
    return (nested,), {"weights": torch.rand(batch, 1, dtype=dtype)}


class OptionalArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 3)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        h = torch.relu(self.fc1(x))
        if mask is not None:
            h = h * mask
        h = torch.relu(self.fc2(h))
        if bias is not None:
            h = h + bias
        return self.fc3(h) * scale


class SeveralInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.b = nn.Linear(5, 8)
        self.c = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        h = torch.where(gate.unsqueeze(1), h, self.b(y))
        h = torch.tanh(self.c(h)) * gate.to(h.dtype)[:, None]
        return self.head(h) + x[:, :2]


class EarlyOutputs(nn.Module):
    """Deep supervision: an output of every stage, one of them fed on, one the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.exit1 = nn.Linear(8, 3)
        self.fc2 = nn.Linear(8, 8)
        self.exit2 = nn.Linear(8, 3)
        self.fc3 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h1 = torch.relu(self.fc1(x))
        e1 = self.exit1(h1)
        h2 = torch.relu(self.fc2(h1))
        e2 = self.exit2(h2)
        return e1, e2, self.fc3(h2) + e1, h1, x


class OpenArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 3)

    def forward(self, x: Tensor, *extra: Tensor, **options: Any) -> Tensor:
        h = torch.relu(self.fc1(x))
        for tensor in extra:
            h = h * tensor
        h = torch.relu(self.fc2(h))
        if options.get("shift") is not None:
            h = h + options["shift"]
        return -self.fc3(h) if options.get("negate", False) else self.fc3(h)

"""Where a model can be cut, the cuts that balance its stages, and a plan kept as text."""

from pathlib import Path

import torch
from torch import nn

import dni_fx


class Block(nn.Module):
    """Two convolutions and a skip: a cut inside would have to carry both branches."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))


torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1), *(Block(16) for _ in range(4)), nn.Flatten(),
    nn.Linear(16 * 16 * 16, 10),
)  # fmt: skip
x, y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))

# Every place, with what would cross it, and why some are no places.
places = dni_fx.list_cut_points(model, (x,))
print(f"{sum(place.legal for place in places)} of {len(places)} places can be cut")

# The slowest stage is as fast as can be, sources included. The same on every run and machine.
plan = dni_fx.plan_cuts(model, (x,), stages=3, gradients="linear", context=dni_fx.one_hot(10))
print(plan)

# A plan is text. Another process, or the next version of a script, cuts in the same places.
path = Path("plan.json")
path.write_text(plan.to_json())
again = dni_fx.CutPlan.from_json(path.read_text())
path.unlink()
decoupled = dni_fx.decouple(model, again, example_inputs=(x,), context=dni_fx.one_hot(10))
assert decoupled.plan.cuts == plan.cuts

# What it would bring on several devices, before any training.
print(dni_fx.simulate(plan, latency=1e-4, bandwidth=1e9))

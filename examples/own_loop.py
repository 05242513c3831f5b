"""A training loop of your own over the stages, and what a source brings over none."""

import torch
import torch.nn.functional as F
from torch import nn

import dni_fx

torch.manual_seed(0)
x = torch.randn(256, 16)
y = (x @ torch.randn(16, 4)).argmax(1)


def train(gradients, steps):
    """Stages one after the other: run, predict, learn from what comes back."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    decoupled = dni_fx.decouple(
        model, ["1", "3"], gradients=gradients, example_inputs=(x,), context=dni_fx.one_hot(4)
    )
    learning = [torch.optim.Adam(stage.parameters(), 1e-3) for stage in decoupled.stages]
    predicting = [
        torch.optim.Adam(source.parameters(), 3e-3)
        for source in decoupled.sources.values()
        if list(source.parameters())
    ]
    for _ in range(steps):
        for optimizer in learning + predicting:
            optimizer.zero_grad()
        values, context = decoupled.bind(x), decoupled.context(y)
        results, targets = [], {}
        for stage in decoupled.stages:
            result = stage.step(values, context, F.cross_entropy, y)  # forward and backward
            values.update(result.outputs)  # what later stages take
            targets.update(result.input_gradients)  # what the sources before should have said
            results.append(result)
        for stage, result in zip(decoupled.stages, results, strict=True):
            stage.fit(result.predictions, targets)  # leaves gradients in the sources' parameters
        for optimizer in learning + predicting:
            optimizer.step()
    return F.cross_entropy(model(x), y).item()


for gradients in ("linear", "zero"):
    print(f"{gradients:7} loss {train(gradients, steps=200):.3f}")

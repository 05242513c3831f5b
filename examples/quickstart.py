"""The README's example on real digits: cut a model, look at what was made, train it decoupled."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import dni_fx
from data import digits


def main() -> None:
    """Train three stages that do not wait for each other's gradients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    data = digits()
    model = nn.Sequential()  # any model does; this one needs no other package
    model.add_module("flatten", nn.Flatten())
    model.add_module("layer1", nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU()))
    model.add_module("layer2", nn.Sequential(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU()))
    model.add_module("head", nn.Linear(128, 10))

    decoupled = dni_fx.decouple(
        model,
        cuts=["layer1", "layer2"],
        example_inputs=(data.train_x[:64],),
        context=dni_fx.one_hot(10),  # the synthesizers see the labels (cDNI)
    )
    print(decoupled.plan)  # the table of stages and interfaces
    print(decoupled.stages[0].code)  # the emitted training function, as Python source

    trainer = dni_fx.Trainer(
        decoupled,
        loss=F.cross_entropy,
        optimizer=lambda params: torch.optim.Adam(params, 1e-3),
        synthesizer_optimizer=lambda params: torch.optim.Adam(params, 3e-2),
    )
    for step in range(steps):
        chosen = torch.randint(len(data.train_x), (64,))
        report = trainer.step(data.train_x[chosen], target=data.train_y[chosen])
        if step % 50 == 0:  # when predictions are measured; the first is zero and has no direction
            print(
                f"step {step:4}  loss {report.loss:.3f}  cosine at layer2 "
                f"{report.interfaces['layer2'].cosine:.2f}"
            )

    model.eval()  # the user's own model was trained in place
    with torch.no_grad():
        right = (model(data.test_x).argmax(1) == data.test_y).float().mean()
    print(f"test accuracy {right:.1%}")


if __name__ == "__main__":
    main()

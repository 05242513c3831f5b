"""Stages of one process on threads, each at the speed of its own work."""

import time

import torch
import torch.nn.functional as F
from torch import nn

import dni_fx

torch.set_num_threads(1)  # operators of one thread each, so that the stages' threads show


def train(schedule, steps=60):
    """Time of a step, and the loss."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(6)]
    model = nn.Sequential(*blocks, nn.Linear(256, 10))
    x = torch.randn(256, 256)
    y = x[:, :10].argmax(1)
    decoupled = dni_fx.decouple(
        model, ["1", "3"], gradients="local", example_inputs=(x,), context=dni_fx.one_hot(10)
    )
    trainer = dni_fx.Trainer(
        decoupled,
        F.cross_entropy,
        optimizer=lambda params: torch.optim.Adam(params, 3e-3),
        schedule=schedule,
    )
    trainer.step(x, target=y)
    trainer.drain()
    began = time.perf_counter()
    for _ in range(steps):
        trainer.step(x, target=y)  # with threads: hands the batch over
    trainer.drain()  # waits for what is under way
    seconds = time.perf_counter() - began
    loss = trainer.evaluate([(x, y)])
    trainer.close()
    return 1000 * seconds / steps, loss


for name, schedule in [
    ("in turn", "sequential"),
    ("on threads", dni_fx.schedules.Threads(queue=4)),
]:
    milliseconds, loss = train(schedule)
    print(f"{name:11} {milliseconds:5.1f} ms a step, loss {loss:.2f}")

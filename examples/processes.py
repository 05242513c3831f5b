"""Stages on two processes, restarted from the last checkpoint where one dies:

torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/processes.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import dni_fx
from dni_fx import distributed

rank = distributed.start()  # joins the others; alone, without torchrun, the script trains, too
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def batch(step):
    """The same in every process, and after a restart."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
    return x, x[:, :10].argmax(1)


decoupled = distributed.decouple(  # one plan for all
    model, cuts=["1"], gradients="linear", context=dni_fx.one_hot(10), example_inputs=batch(0)[:1]
)
trainer = distributed.Trainer(
    decoupled,
    F.cross_entropy,
    optimizer=lambda params: torch.optim.Adam(params, 3e-3),
    staleness=2,  # answers are learnt from two steps later: nobody waits, and runs repeat
)
trainer.resume("checkpoints")  # goes on where the last one was saved, if there is one
for step in range(trainer.steps, 200):
    x, y = batch(step)
    trainer.step(x, target=y)  # this process's stages; the others are elsewhere
    if trainer.steps % 100 == 0:
        trainer.save("checkpoints")

held_out = [batch(10_000 + k) for k in range(4)]
accuracy = trainer.evaluate(held_out, lambda output, y: output.argmax(1) == y)  # the same in all
state = trainer.gather()  # the whole model, in every process
trainer.close()
if rank == 0:
    print(f"held-out accuracy {accuracy:.1%}, {len(state)} tensors gathered")

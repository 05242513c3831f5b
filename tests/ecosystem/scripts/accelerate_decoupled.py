"""Numbers of two kinds, told apart by a small network, two batches an update: a loop with
accelerate.

usage: python script.py precision
"""

import sys

import accelerate
import torch
from torch import nn
from torch.nn import functional as F

from dni_fx import decouple, one_hot

accelerate.utils.set_seed(0)
accelerator = accelerate.Accelerator(
    cpu=True, gradient_accumulation_steps=2, mixed_precision=sys.argv[1]
)
x = torch.randn(512, 6)
y = (x[:, 0] * x[:, 1] > 0).long()
loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(x[:384], y[:384]), 16, shuffle=True
)
model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
model = decouple(model, ["1", "3"], gradients="local", context=one_hot(2)).as_module(unit=1 / 2)
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
losses = []
for _ in range(12):
    for inputs, labels in loader:
        with accelerator.accumulate(model), model.context(labels):
            loss = F.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
model.eval()
result = {"accuracy": (model(x[384:]).argmax(1) == y[384:]).float().mean().item()}

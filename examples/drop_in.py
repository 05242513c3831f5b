"""A decoupled model in an ordinary training loop, as a module of the model's own class."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import dni_fx


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(16, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16 * 9, 10)

    def forward(self, images):
        return self.head(self.conv2(self.conv1(images)).flatten(1))


torch.manual_seed(0)
images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16
train, test = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])

model = Net()
decoupled = dni_fx.decouple(
    model, ["conv1", "conv2"], gradients="local", context=dni_fx.one_hot(10),
    example_inputs=(train[0][:64],),
)  # fmt: skip
module = decoupled.as_module(synthesizer_optimizer=lambda p: torch.optim.Adam(p, 3e-3))
assert isinstance(module, Net)  # it shares the model's parameters, and saves under their names

# From here on everything is as without dni_fx, except for one line.
optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=200)
for _ in range(200):
    chosen = torch.randint(len(train[0]), (64,))
    with module.context(train[1][chosen]):  # the labels, for the sources that see them
        loss = F.cross_entropy(module(train[0][chosen]), train[1][chosen])
    optimizer.zero_grad()
    loss.backward()  # each stage's activations are freed before the next stage's are made
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    schedule.step()

model.eval()  # the plain model was trained in place
with torch.no_grad():
    print(f"test accuracy {(model(test[0]).argmax(1) == test[1]).float().mean():.1%}")

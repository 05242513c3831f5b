"""A source of gradients of your own, a contrastive loss at each cut, beside the library's."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import dni_fx
from dni_fx.sources import Asks, GradientSource, Prediction


class Contrastive(GradientSource):
    """Pulls samples of one class together and pushes others apart."""

    asks = Asks(learns_from=())  # nothing needs to come back to it

    def predict(self, values, context=None):
        with torch.enable_grad():  # predict is called without gradients
            value = values[0].detach().requires_grad_()
            features = F.normalize(value.flatten(1), dim=1)
            alike = context @ context.T  # 1 where two samples are of one class, else 0
            loss = F.mse_loss(features @ features.T, alike)
            (gradient,) = torch.autograd.grad(loss, value)
        return Prediction((gradient * self.unit,))  # unit: the factor in front of the mean loss


images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
images = images.float() / 16
held_out = [(images[1400:], labels[1400:])]

for source in (Contrastive, "local", "zero"):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU()),
        nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()),
        nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()),
        nn.Linear(32, 10),
    )
    decoupled = dni_fx.decouple(
        model, ["0", "1", "2"], gradients=source, context=dni_fx.one_hot(10),
        example_inputs=(images[:64],),
    )  # fmt: skip
    trainer = dni_fx.Trainer(
        decoupled, F.cross_entropy, optimizer=lambda params: torch.optim.Adam(params, 3e-3)
    )
    for _ in range(120):
        chosen = torch.randint(1400, (64,))
        trainer.step(images[chosen], target=labels[chosen])
    accuracy = trainer.evaluate(held_out, lambda output, y: output.argmax(1) == y)
    print(f"{getattr(source, '__name__', source):12} {accuracy:6.1%}")

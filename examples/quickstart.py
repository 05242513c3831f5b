"""Train four stages that do not wait for each other, beside backpropagation and no gradient."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dni_fx

images, labels = load_digits(return_X_y=True)  # 8 x 8 pixels
data = TensorDataset(torch.tensor(images).float() / 16, torch.tensor(labels))
train, test = torch.utils.data.random_split(data, (1400, 397), torch.Generator().manual_seed(0))


def make_model():
    width = 32
    sizes = [(64, width), (width, width), (width, width), (width, width)]
    layers = [nn.Sequential(nn.Linear(*s), nn.BatchNorm1d(width), nn.ReLU()) for s in sizes]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def right(output, target):
    return output.argmax(1) == target


for name, gradients in [("backprop", "exact"), ("decoupled", "auto"), ("no gradient", "zero")]:
    torch.manual_seed(0)
    model = make_model()
    decoupled = dni_fx.decouple(
        model,
        cuts=["0", "1", "2"],  # names of modules to cut after
        gradients=gradients,  # what stands for the gradient at a cut
        context=dni_fx.one_hot(10),  # what predicts it may see the labels
        example_inputs=(train[0][0][None].repeat(64, 1),),
    )
    trainer = dni_fx.Trainer(
        decoupled,
        loss=F.cross_entropy,
        optimizer=lambda params: torch.optim.Adam(params, 3e-3),  # one for each stage
        synthesizer_optimizer=lambda params: torch.optim.Adam(params, 3e-2),  # and each source
    )
    trainer.fit(DataLoader(train, 64, shuffle=True), epochs=12, progress=False)
    accuracy = trainer.evaluate(DataLoader(test, 64), right)
    print(f"{name:12} {accuracy:6.1%}")

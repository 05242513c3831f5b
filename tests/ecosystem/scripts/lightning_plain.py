"""Pictures that are brighter above or not, told apart by a small convolutional network: Trainer of
Lightning.

usage: python script.py folder
"""

import sys

import lightning
import torch
from torch import nn
from torch.nn import functional as F

lightning.seed_everything(0)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4)
        )
        self.head = nn.Linear(8 * 4, 2)

    def forward(self, x, labels=None):
        logits = self.head(self.second(self.first(x)).flatten(1))
        return {
            "logits": logits,
            "loss": None if labels is None else F.cross_entropy(logits, labels),
        }


class Classifier(lightning.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, index):
        x, y = batch
        loss = self.network(x, labels=y)["loss"]
        losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        x, y = batch
        self.log("accuracy", (self.network(x)["logits"].argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


images = torch.randn(512, 1, 8, 8)
labels = torch.randint(2, (512,))
images[labels == 1, :, :4] += 0.7
data = torch.utils.data.TensorDataset(images, labels)
train, test = torch.utils.data.random_split(data, [384, 128])
losses = []
model = Network()
classifier = Classifier(model)
trainer = lightning.Trainer(
    default_root_dir=sys.argv[1],
    accelerator="cpu",
    max_epochs=4,
    logger=False,
    enable_progress_bar=False,
)
trainer.fit(
    classifier,
    torch.utils.data.DataLoader(train, 16, shuffle=True),
    torch.utils.data.DataLoader(test, 128),
)
result = {name: float(value) for name, value in trainer.callback_metrics.items()}
trainer.save_checkpoint(f"{sys.argv[1]}/last.ckpt")

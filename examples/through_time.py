"""A recurrent model trained window by window to remember what the window before showed."""

import torch
import torch.nn.functional as F
from torch import nn

from dni_fx.recurrent import decouple_through_time

DELAY, WINDOW, STREAMS = 1, 1, 64  # what is asked for lies in an earlier window


class Recall(nn.Module):
    """Its state stays inside; it is found, put in and taken out."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def stream(windows, seed):
    """Windows ``(x, symbols of DELAY steps ago, whose sequence ends)`` of many streams."""
    generator = torch.Generator().manual_seed(seed)
    symbols = torch.randint(4, (windows * WINDOW + DELAY, STREAMS), generator=generator)
    for k in range(windows):
        now = slice(k * WINDOW + DELAY, (k + 1) * WINDOW + DELAY)
        before = slice(k * WINDOW, (k + 1) * WINDOW)
        yield F.one_hot(symbols[now], 4).float(), symbols[before], k == windows - 1


def loss(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


for name, gradients in [("truncated", "zero"), ("synthetic", "auto")]:
    torch.manual_seed(0)
    trainer = decouple_through_time(
        Recall(),
        window=WINDOW,
        loss=loss,
        optimizer=lambda params: torch.optim.Adam(params, 3e-3),
        gradients=gradients,  # at the end of each window
    )
    trainer.fit(stream(600, seed=0), progress=False)
    right = trainer.evaluate(stream(50, seed=1), lambda output, y: output.argmax(-1) == y)
    print(f"{name:10} remembers {right:.0%} of the symbols of the window before")

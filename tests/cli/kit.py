"""The command line as a shell user meets it: models to name, and how it is run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dni_fx.plan import CutPlan

from ..helpers.paths import ROOT
from ..plans.events import balanced, make_plan

MODELS = """\
import os, signal
import torch
from torch import nn

class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(2, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    def forward(self, tokens, scale):
        print(tuple(tokens.shape), tokens.dtype, tuple(scale.shape), scale.dtype)
        return self.head(self.middle(self.embed(tokens) * scale).relu())

def chain(): return nn.Sequential(*[nn.Linear(6, 6) for _ in range(6)])
def raising(): raise RuntimeError("no luck")
def needs(width): return nn.Linear(width, width)
def number(): return 3
def leaving(): raise SystemExit("bye")
def interrupted():
    # a background job of a shell ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)
ready, table = chain(), {}
"""


def run(*arguments: str, cwd: Path, module: bool = True) -> subprocess.CompletedProcess[str]:
    """In a process of its own: ``python -m dni_fx.cli``, or as the installed script starts it."""
    start = (
        ["-m", "dni_fx"]
        if module
        else ["-c", "import sys; from dni_fx.cli import main; sys.exit(main())"]
    )
    # Safe path: an installed script has no current directory on its path either.
    command = [sys.executable, *([] if module else ["-P"]), *start, *arguments]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=cwd, env=settings, capture_output=True, text=True, check=False, timeout=300
    )


CHAIN = ("plan", "models_here:chain", "--input", "4x6", "--costs", "analytic", "--quiet")


class Recorder:
    """A plan_cuts that keeps its arguments, for a plan of four equal stages."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.inputs: tuple[torch.Tensor, ...] = ()

    def __call__(
        self, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], **options: Any
    ) -> CutPlan:
        self.inputs, self.options = inputs, options
        return make_plan(balanced(4, parameter_bytes=8))

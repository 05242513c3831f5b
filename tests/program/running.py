"""Runs program folders where dni_fx cannot be imported: ``python running.py FOLDER...``.

Each folder has batches beside it, ``FOLDER.batches.pt``; what its ``train_step`` made of the
weights goes to ``FOLDER.after.pt``.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

import torch


def run(folder: Path) -> dict[str, Any]:
    """All weights after a step on each batch, and the losses."""
    sys.path.insert(0, str(folder))
    try:
        train = importlib.import_module("train")
        program = train.Program()
        batches = torch.load(folder.with_suffix(".batches.pt"), weights_only=False)
        torch.manual_seed(7)
        losses = [train.train_step(program, *batch) for batch in batches]
        modules = {n: m for n, m in vars(program).items() if isinstance(m, torch.nn.Module)}
        found = {f"{n}.{k}": t for n, m in modules.items() for k, t in m.state_dict().items()}
        return {"weights": found, "losses": losses}
    finally:
        sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", "")).startswith(str(folder)):
                del sys.modules[name]


def main() -> None:
    """Every folder that is named."""
    try:
        import dni_fx  # noqa: F401
    except ImportError:
        pass
    else:
        raise SystemExit("dni_fx can be imported here")
    for name in sys.argv[1:]:
        folder = Path(name)
        try:
            found = run(folder)
        except Exception:
            found = {"error": traceback.format_exc()}
        torch.save(found, folder.with_suffix(".after.pt"))


if __name__ == "__main__":
    main()

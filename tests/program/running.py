"""Runs program folders where dni_fx cannot be imported: ``python running.py FOLDER...``.

Each folder has batches beside it, ``FOLDER.batches.pt``; what its ``train.py`` made of the weights,
and ``train_threads.py`` where it waits for every answer, go to ``FOLDER.after.pt``.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

SEED = 7


def run(folder: Path) -> dict[str, Any]:
    """All weights after a step on each batch, and the losses."""
    sys.path.insert(0, str(folder))
    try:
        train = importlib.import_module("train")
        batches = torch.load(folder.with_suffix(".batches.pt"), weights_only=False)
        program = train.Program()
        torch.manual_seed(SEED)
        losses = through_time(train, program, batches)
        if not losses:
            losses = [train.train_step(program, *batch) for batch in batches]
        found = {"weights": weights(program), "losses": losses}
        if (folder / "train_threads.py").exists():
            threads = importlib.import_module("train_threads")
            threads.STALENESS = 0
            program = train.Program()
            threads.train(program, batches, len(batches))
            found["on threads"] = weights(program)
        return found
    finally:
        sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", "")).startswith(str(folder)):
                del sys.modules[name]


def through_time(train: Any, program: Any, batches: list[Any]) -> list[Any]:
    """The losses of windows; none where there is no state."""
    losses: list[Any] = []
    if hasattr(train, "start"):
        carried = train.start(len(batches[0][0]))
        for batch in batches:
            loss, carried = train.train_step(program, carried, *batch)
            losses.append(loss)
    return losses


def weights(program: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers of all stages and sources."""
    modules = {n: m for n, m in vars(program).items() if isinstance(m, torch.nn.Module)}
    return {f"{n}.{k}": t for n, m in modules.items() for k, t in m.state_dict().items()}


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

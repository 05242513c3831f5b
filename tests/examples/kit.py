"""Examples as commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ..helpers.paths import EXAMPLES, ROOT


def run_example(name: str, cwd: Path, processes: int = 1) -> str:
    """What an example prints, run from another directory, with warnings as errors."""
    command = [sys.executable, "-W", "error"]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, str(EXAMPLES / f"{name}.py")],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

"""Where things stand in the repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, EXPERIMENTS = ROOT / "examples", ROOT / "experiments"

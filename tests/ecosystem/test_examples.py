"""The example that needs transformers."""

from __future__ import annotations

import re
from pathlib import Path

from ..examples.kit import run_example


def test_a_transformer_is_fine_tuned(tmp_path: Path) -> None:
    printed = run_example("finetune_huggingface", tmp_path).splitlines()[-1]
    assert int(re.findall(r"(\d+)%", printed)[0]) > 70

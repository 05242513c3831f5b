"""A run on two hosts goes on by itself where a process of one of them is killed."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..helpers.comparing import assert_bits_equal
from ..helpers.processes import once
from .kit import trainer_of, weights
from .scripts.two_hosts import SAVED, STEPS, steps


def test_two_hosts_resume(shared: Path) -> None:
    """The hosts' torchruns count their restarts apart, and keep one store: they meet anyhow."""
    folder = once(
        shared / "two-hosts",
        ["-m", "tests.ranks.scripts.two_hosts", str(shared / "two-hosts")],
    )
    ended, output = (
        json.loads((folder / "ended.json").read_text()),
        (folder / "output.txt").read_text()[-3000:],
    )
    assert ended == {"code": 0, "left": 0}, output
    for host in "ab":
        began = (folder / f"began-{host}").read_text().split()
        assert (began[0], began[-1]) == ("0", str(SAVED)), output
    alone = weights(steps(trainer_of("linear", alone=True), STEPS))
    assert_bits_equal(torch.load(folder / "weights.pt"), alone, "two hosts")

"""``trainer.save_model``: a plain checkpoint, written while most stages are out of memory."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from dni_fx.errors import DecouplingError

from ..helpers.comparing import assert_bits_equal
from ..helpers.optimisers import adam
from ..helpers.training import train, trainer_of
from ..models.small import CHAIN

NAMES = ["weights.pt", "weights.safetensors"]


def loaded(path: Path) -> dict[str, Any]:
    """What a plain script would load."""
    if path.suffix == ".safetensors":
        return pytest.importorskip("safetensors.torch").load_file(path)
    return torch.load(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_out_of_memory_is_saved_as_a_plain_checkpoint(
    name: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"optimizer": adam, "resident": 1, "store": tmp_path / "store"}
    with contextlib.closing(trainer_of("local", **options)) as trainer:
        train(trainer, 3)
        residency, most = trainer.beside.executor.residency, 0
        come = residency._come

        def counted(stage: int) -> None:
            nonlocal most
            come(stage)
            most = max(most, 4 - len(residency._away))

        residency._come = counted
        assert trainer.save_model(tmp_path / name) == tmp_path / name
        assert most == 1
        assert len(residency.away) == 3
        before = (tmp_path / name).read_bytes()
        train(trainer, 1)  # it goes on
        trainer.gather()
        other = trainer.decoupled.model.state_dict()
    plain = train(trainer_of("local", optimizer=adam), 3).decoupled.model.state_dict()
    found = loaded(tmp_path / name)
    assert list(found) == list(plain) or name.endswith("safetensors")
    assert_bits_equal(dict(sorted(found.items())), dict(sorted(plain.items())), "saved")
    CHAIN.build().load_state_dict(found)
    assert any(not torch.equal(found[n], other[n]) for n in other)  # the control
    assert (tmp_path / name).read_bytes() == before
    assert not list(tmp_path.glob("*.writing*"))


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_written_leaves_what_was_there(name: str, tmp_path: Path) -> None:
    trainer = train(trainer_of("local", optimizer=adam), 1)
    (tmp_path / name).mkdir()
    with pytest.raises(DecouplingError, match="was not saved to"):
        trainer.save_model(tmp_path / name)
    assert not list(tmp_path.glob("*.writing*"))
    with pytest.raises(DecouplingError, match="was not saved to"):
        trainer.save_model(tmp_path / "nowhere" / name)

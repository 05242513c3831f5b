"""GPT-2 as transformers has it: its program needs neither transformers nor dni_fx."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dni_fx

from .kit import TOKENS, adamw, of_stages, run_folders, texts, train, trained_weights, write
from .models import per_token

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


class Logits(nn.Module):
    """A small GPT-2 that returns its logits alone."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.GPT2Config(
            vocab_size=TOKENS, n_positions=16, n_embd=16, n_layer=4, n_head=2,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        self.gpt = transformers.GPT2LMHeadModel(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.gpt(ids, use_cache=False).logits


def test_ten_steps_of_gpt2_have_the_trainers_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches, folder = texts(), tmp_path / "gpt2"
    made = dni_fx.Trainer(
        dni_fx.decouple(
            Logits(), ["gpt.transformer.h.1"], example_inputs=batches[0][:1], gradients="mlp",
            check=False,
        ),
        per_token,
        optimizer=adamw,
    )  # fmt: skip
    write(made, folder, batches)
    train(made, batches)
    run_folders(tmp_path, [folder])
    found = torch.load(folder.with_suffix(".after.pt"), weights_only=False)
    assert found.get("error") is None
    pairs = of_stages(found["weights"], trained_weights(made))
    assert len(pairs) > 50
    assert [n for n, (mine, trainers) in pairs.items() if not torch.equal(mine, trainers)] == []
    assert "transformers" not in (folder / "stage_0.py").read_text()

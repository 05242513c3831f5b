"""LoRA adapters on a frozen base: sources where gradients cross, adapters that train and load in a
plain model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import dni_fx
from dni_fx.errors import CutError

from ..helpers.comparing import assert_bits_equal, state_of
from .test_transformers import adam, build, example

LAYER = "base_model.model.bert.encoder.layer"


def adapted(first: int = 0) -> Any:
    """A small BERT with adapters from one of its four layers on."""
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_dropout=0.1, target_modules=["query", "value"],
        layers_to_transform=list(range(first, 4)), layers_pattern="layer",
    )  # fmt: skip
    model = build("bert")
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


def cut(first: int, layers: list[int], gradients: str = "local") -> Any:
    return dni_fx.decouple(
        adapted(first).train(), [f"{LAYER}.{i}" for i in layers], example_kwargs=example("bert", 0),
        gradients=gradients, context=dni_fx.one_hot(2),
    )  # fmt: skip


def train(m: Any, steps: int) -> list[float]:
    optimizer, losses = adam([p for p in m.parameters() if p.requires_grad]), []
    for step in range(steps):
        torch.manual_seed(step)
        loss = m(**example("bert", step, 16)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_adapters_train_and_the_base_does_not(tmp_path: Path) -> None:
    decoupled = cut(0, [0, 1])
    m: Any = decoupled.as_module(context=lambda *_, labels, **__: labels)
    before = state_of(m)
    losses = train(m, 120)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    changed = {n for n, t in state_of(m).items() if not torch.equal(t, before[n])}
    trainable = {n for n, p in m.named_parameters() if p.requires_grad}
    assert changed == trainable
    assert all("lora_" in n or "classifier" in n for n in trainable)
    assert {n.split(".")[5] for n in changed if "lora_" in n} == {
        "0",
        "1",
        "2",
        "3",
    }  # in every stage
    m.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    inputs = example("bert", 1)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, m.eval()(**inputs).logits)
        assert not torch.equal(loaded(**inputs).logits, build("bert").eval()(**inputs).logits)


def test_exact_gradients_are_backpropagation() -> None:
    plain = adapted().train()
    train(plain, 3)
    for gradients, equal in (("exact", True), ("zero", False)):
        trainer = dni_fx.Trainer(
            cut(0, [0, 1], gradients), lambda output, _: output.loss, optimizer=adam
        )
        for step in range(3):
            torch.manual_seed(step)
            trainer.step(**example("bert", step, 16))
        if equal:
            assert_bits_equal(state_of(trainer.decoupled.model), state_of(plain), gradients)
        else:
            with pytest.raises(AssertionError, match="differ"):
                assert_bits_equal(state_of(trainer.decoupled.model), state_of(plain), gradients)


def test_a_cut_before_the_first_adapter_is_refused_by_name() -> None:
    with pytest.raises(CutError, match=r"layer\.1': no value on a trainable path crosses.*frozen"):
        cut(2, [1, 2])
    decoupled = cut(2, [2])
    assert list(decoupled.sources) == [f"{LAYER}.2"]
    m: Any = decoupled.as_module(context=lambda *_, labels, **__: labels)
    m(**example("bert", 0)).loss.backward()
    assert {n for n, p in m.named_parameters() if p.grad is not None} == {
        n for n, p in m.named_parameters() if p.requires_grad
    }

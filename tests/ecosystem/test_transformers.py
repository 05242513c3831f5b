"""Models of transformers called as training loops call them: by keyword, with labels, padded, in
changing lengths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import dni_fx
import zoo_transformers as zoo

from ..helpers.comparing import assert_bits_equal, state_of

LENGTHS, CLIP = (12, 9, 12, 7), 1000
CUTS = {
    "bert": ("bert.encoder.layer.0", "bert.encoder.layer.1"),
    "gpt2": ("transformer.h.0", "transformer.h.1"),
    "llama": ("model.layers.0", "model.layers.1"),
    "t5": ("encoder.block.1", "decoder.block.1"),
    "bart": ("model.encoder.layers.1", "model.decoder.layers.1"),
    "vit": ("vit.layers.0", "vit.layers.1"),
    "wav2vec2": ("wav2vec2.encoder.layers.0", "wav2vec2.encoder.layers.1"),
}


def build(name: str, **changes: Any) -> Any:
    """A small random model; its dropout is the family's."""
    kind, options = zoo.TABLE[name]
    options = (
        zoo._settings(kind, options) | ({"layerdrop": 0.0} if name == "wav2vec2" else {}) | changes
    )
    attention = options.pop("attn_implementation", None)
    config = transformers.AutoConfig.for_model(name, **options)
    auto = "AutoModelForAudioClassification" if kind == "CTC" else f"AutoModelFor{kind}"
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config, attn_implementation=attention)
    if name == "wav2vec2":
        model(torch.zeros(1, CLIP))  # a first call installs the hooks that collect hidden states
    return model


def example(name: str, step: int, size: int = 4) -> dict[str, Any]:
    """Keyword inputs with labels; every batch of texts or clips has a length of its own, and
    padding.
    """
    inputs = zoo.example(name, size, step, torch.float32)
    length = LENGTHS[step % len(LENGTHS)]
    if name == "wav2vec2":
        inputs = {
            "input_values": inputs["input_values"][:, : 100 + 150 * length]
        }  # its padding is zeros, not a mask
    elif name != "vit":
        inputs = {k: v[:, :length].clone() for k, v in inputs.items()}
    if "labels" not in inputs:
        inputs["labels"] = labels = torch.arange(size) % 2
        for value in inputs.values():
            if value.is_floating_point():
                value += labels.view(-1, *[1] * (value.dim() - 1))
        if name == "bert":
            inputs["input_ids"][:, 0] = 1 + labels
    return inputs


def cut(name: str, gradients: str, **options: Any) -> dni_fx.Decoupled:
    model = options.pop("model", None) or build(name)
    return dni_fx.decouple(
        model.train(),
        list(CUTS[name]),
        example_kwargs=example(name, 0),
        gradients=gradients,
        **options,
    )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=2e-3)


def trained_plainly(name: str, steps: int) -> Any:
    model = build(name).train()
    optimizer = sgd(model.parameters())
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(**example(name, step)).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", CUTS)
def test_exact_gradients_are_backpropagation(name: str) -> None:
    found = {}
    for gradients in ("exact", "zero"):
        trainer = dni_fx.Trainer(cut(name, gradients), lambda output, _: output.loss, optimizer=sgd)
        for step in range(4):
            torch.manual_seed(step)
            trainer.step(**example(name, step))
        found[gradients] = state_of(trainer.decoupled.model)
    want = state_of(trained_plainly(name, 4))
    assert_bits_equal(found["exact"], want, name)
    with pytest.raises(AssertionError, match="differ"):
        assert_bits_equal(found["zero"], want, "negative control")


@pytest.mark.parametrize("name", CUTS)
def test_a_drop_in_trains(name: str) -> None:
    """Classifiers by local heads, which see the labels; language models by regressed gradients."""
    classes = name in ("bert", "vit", "wav2vec2")
    options: dict[str, Any] = {"context": dni_fx.one_hot(2)} if classes else {}
    decoupled = cut(name, "local" if classes else "auto", check=False, **options)
    m: Any = decoupled.as_module(context=(lambda *_, labels, **__: labels) if classes else None)
    assert len(decoupled.stages) == 3
    optimizer, before, losses = adam(m.parameters()), state_of(m), []
    for step in range(60):
        output = m(**example(name, step % 4))
        assert isinstance(output, transformers.utils.ModelOutput)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.4
    after = state_of(m)
    for stage in decoupled.stages:
        assert any(not torch.equal(after[n], before[n]) for n, _ in stage.named_parameters()), (
            stage.name
        )


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_what_is_saved_loads_as_the_plain_class(name: str, tmp_path: Path) -> None:
    m: Any = cut(name, "zero", check=False).as_module()
    optimizer = sgd(m.parameters())
    m(**example(name, 0)).loss.backward()
    optimizer.step()
    m.save_pretrained(tmp_path)
    plain = type(m).__mro__[2]
    loaded = plain.from_pretrained(tmp_path).eval()
    assert loaded.config.architectures == [plain.__name__]
    assert list(loaded.state_dict()) == list(m.state_dict())
    assert not hasattr(loaded, "synthesizer_state_dict")
    inputs = example(name, 1)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, m.eval()(**inputs).logits)


def masked(inputs: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind == "absent":
        return {k: v for k, v in inputs.items() if k != "attention_mask"}
    return inputs | (
        {"attention_mask": torch.ones_like(inputs["attention_mask"])} if kind == "ones" else {}
    )


def measured(model: nn.Module, call: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    output = call(**inputs)
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), "loss": output.loss.detach(), **gradients}


NO_DROPOUT = {
    "bert": {"attention_probs_dropout_prob": 0.0},
    "gpt2": {"attn_pdrop": 0.0},
    "llama": {"num_key_value_heads": 4},
    "t5": {"dropout_rate": 0.0},
    "bart": {"attention_dropout": 0.0},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", ["padded", "ones", "absent"])
@pytest.mark.parametrize("name", NO_DROPOUT)
def test_masks(name: str, mask: str, attention: str) -> None:
    """Without padding the model hands sdpa no mask, while its graph always builds one: here the
    bits are the same.
    """
    model = build(name, **NO_DROPOUT[name], attn_implementation=attention)
    decoupled, inputs = cut(name, "zero", model=model), masked(example(name, 0), mask)
    want = measured(model, model, inputs)
    assert_bits_equal(measured(model, decoupled, inputs), want, name)
    if mask == "ones":
        with pytest.raises(AssertionError, match="differ"):
            assert_bits_equal(
                measured(model, decoupled, masked(example(name, 0), "padded")), want, name
            )


def test_masks_of_grouped_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """There sdpa repeats keys only beside a mask, so a mask of ones makes a difference in the last
    bits, on most processors: the graph passes none where the model does not.
    """
    model = build("llama", num_key_value_heads=2)
    decoupled, inputs = cut("llama", "zero", model=model), masked(example("llama", 0), "ones")
    want, got = (measured(model, call, inputs) for call in (model, decoupled))
    assert_bits_equal(got, want, "ones")
    absent = masked(inputs, "absent")
    assert_bits_equal(measured(model, decoupled, absent), measured(model, model, absent), "no mask")
    monkeypatch.setattr(
        "transformers.masking_utils._ignore_causal_mask_sdpa", lambda *_, **__: False
    )
    for name, value in measured(model, model, inputs).items():  # with a mask
        assert (got[name] - value).abs().max() <= 1e-6 * value.abs().max(), name


# ------------------------------------------------------------------------------------------------ w


def test_layers_that_are_dropped() -> None:
    """LayerDrop draws which layers run: they are one node in training, which trains."""
    torch.manual_seed(0)
    model = build("wav2vec2", layerdrop=0.3).train()
    cuts = ["wav2vec2.feature_projection", "wav2vec2.encoder"]
    decoupled = dni_fx.decouple(
        model,
        cuts,
        example_kwargs=example("wav2vec2", 0),
        gradients="local",
        context=dni_fx.one_hot(2),
    )
    assert any(
        "wav2vec2.encoder" in note and "opaque" in note for note in str(decoupled.plan).splitlines()
    )
    m: Any = decoupled.as_module(context=lambda *_, labels, **__: labels)
    optimizer, losses, dropped = adam(m.parameters()), [], set()
    for step in range(60):
        loss = m(**example("wav2vec2", step % 4)).loss
        optimizer.zero_grad()
        loss.backward()
        missing = {
            n.split(".")[3]
            for n, p in m.named_parameters()
            if "encoder.layers" in n and p.grad is None
        }
        dropped.add(frozenset(missing))
        optimizer.step()
        losses.append(loss.item())
    assert len(dropped) > 2
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.4


def test_a_loss_that_checks_its_labels_is_taken_outside() -> None:
    """CTC reads the labels' values, which is refused by line; without labels the
    model is cut.
    """
    kind, options = zoo.TABLE["wav2vec2"]
    config = transformers.AutoConfig.for_model(
        "wav2vec2", **zoo._settings(kind, options), layerdrop=0.0
    )
    model = transformers.AutoModelForCTC.from_config(config).train()
    inputs = zoo.example("wav2vec2", 4, 0, torch.float32)
    labels = torch.randint(3, zoo.VOCABULARY, (4, 5))
    with pytest.raises(
        dni_fx.errors.DecouplingError,
        match=r"reads the values of a tensor.*\.py:\d+",
    ):
        dni_fx.decouple(
            model,
            list(CUTS["wav2vec2"]),
            example_kwargs=inputs | {"labels": labels},
            gradients="zero",
        )
    m: Any = dni_fx.decouple(
        model, list(CUTS["wav2vec2"]), example_kwargs=inputs, gradients="zero"
    ).as_module()
    losses, optimizer = [], adam(m.parameters())
    for _ in range(20):
        logits = m(**inputs).logits
        lengths = m._get_feat_extract_output_lengths(inputs["attention_mask"].sum(-1))
        predictions = logits.log_softmax(-1).transpose(0, 1)
        loss = nn.functional.ctc_loss(predictions, labels, lengths, torch.full((4,), 5), blank=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_hidden_states_are_returned() -> None:
    model, inputs = build("bert").train(), example("bert", 0) | {"output_hidden_states": True}
    model(**inputs)
    decoupled = dni_fx.decouple(model, list(CUTS["bert"]), example_kwargs=inputs, gradients="zero")
    torch.manual_seed(3)
    want = model(**inputs)
    torch.manual_seed(3)
    got = decoupled.as_module()(**inputs)
    assert len(got.hidden_states) == len(want.hidden_states) == 5
    assert all(map(torch.equal, got.hidden_states, want.hidden_states))


def test_a_first_call_that_hooks_the_model_up_does_so_in_the_stages() -> None:
    """Nothing is left by the transform; the first call of whichever is called first hooks it up."""
    inputs = example("bert", 0) | {"output_hidden_states": True}
    for first in (True, False):
        model, plain = build("bert").eval(), build("bert").eval()
        plain.load_state_dict(model.state_dict())
        cuts = list(CUTS["bert"])
        decoupled = dni_fx.decouple(model, cuts, example_kwargs=inputs, gradients="zero")
        want = plain(**inputs).hidden_states
        for call in (decoupled, model) if first else (model, decoupled):
            got = call(**inputs).hidden_states
            assert len(got) == len(want) == 5
            assert all(map(torch.equal, got, want))


def test_smoothed_labels_are_those_of_the_models_class(tmp_path: Path) -> None:
    """The Trainer shifts labels for classes whose name it knows."""
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, label_smoothing_factor=0.2, report_to="none", use_cpu=True
    )
    losses = []
    for gradients in (None, "exact"):
        model = build("llama").train()
        module = model if gradients is None else cut("llama", gradients, model=model).as_module()
        losses.append(
            transformers.Trainer(module, arguments).compute_loss(module, example("llama", 0))
        )
    assert torch.equal(*losses)

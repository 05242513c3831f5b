"""The transformers architectures of the zoo: small, randomly initialised, called as a training loop
calls them.

A row of the table is a model type, the class that the library's ``Auto`` machinery is to build
(``CausalLM`` stands for ``AutoModelForCausalLM``, a name in full for itself) and what its
configuration has besides `SMALL`. Dropout, LayerDrop and everything else is the family's default.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INTRODUCTION = (
    "Small random configurations with the family's own dropout and LayerDrop, called by keyword: "
    "padded texts and clips with their masks, labels for language models; the output is the "
    "family's `ModelOutput` with its loss. SpecAugment is off, and experts are computed by "
    "`batched_mm`."
)

VOCABULARY, LENGTH, IMAGE, PATCH, CLIP = 100, 12, 32, 8, 2000
FREE = {"num_hidden_layers": None, "num_attention_heads": None}
BLOCKS = {**FREE, "depths": [1, 1, 2, 1]}
STEPS = {**BLOCKS, "hidden_sizes": [8, 16, 32, 64]}  # of a hierarchical vision model
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
LLAMA = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
WAVES = {
    "conv_dim": [16, 16, 16], "conv_kernel": [10, 3, 3], "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
}  # fmt: skip
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 64, "image_size": IMAGE,
    "patch_size": PATCH, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
COUPLED = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "d_model": 32, "encoder_layers": 4, "decoder_layers": 4,
    "encoder_attention_heads": 4, "forced_eos_token_id": 2, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 4,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
TOWERS = {
    "text_config": {**SMALL, "projection_dim": 16},
    "vision_config": {**SMALL, "projection_dim": 16}, "projection_dim": 16,
}  # fmt: skip

# model types, their class and configuration; the class decides the inputs, see `example`
_ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("bert roberta electra camembert xlm-roberta roberta-prelayernorm ernie megatron-bert "
     "data2vec-text mpnet deberta deberta-v2 rembert convbert nystromformer ibert modernbert esm "
     "fnet", "SequenceClassification", {}),
    ("squeezebert", "SequenceClassification", {"embedding_size": 32}),
    ("roc_bert", "SequenceClassification",
     {"pronunciation_vocab_size": 100, "shape_vocab_size": 100}),
    ("albert", "SequenceClassification", {"embedding_size": 16}),
    ("distilbert", "SequenceClassification",
     {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64}),
    ("mobilebert", "SequenceClassification",
     {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16}),
    ("xlnet", "SequenceClassification",
     {"d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 64, "max_position_embeddings": None}),
    ("llama mistral qwen2 qwen3 gemma gemma2 phi phi3 stablelm starcoder2 olmo olmo2 granite "
     "cohere glm nemotron helium smollm3 persimmon", "CausalLM", LLAMA),
    ("mixtral granitemoe olmoe", "CausalLM", {**LLAMA, **EXPERTS}),
    ("qwen2_moe qwen3_moe", "CausalLM",
     {**LLAMA, **EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}),
    ("gpt2 gpt_bigcode openai-gpt gpt_neox falcon bloom biogpt", "CausalLM", {}),
    ("codegen gptj", "CausalLM", {"rotary_dim": 4}),
    ("gpt_neo", "CausalLM",
     {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8}),
    ("opt", "CausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    ("xglm", "CausalLM", {"d_model": 32, "num_layers": 4, "attention_heads": 4, "ffn_dim": 64}),
    ("mpt", "CausalLM", {"d_model": 32, "n_layers": 4, "n_heads": 4}),
    ("mamba", "CausalLM", {"state_size": 8}),
    ("mamba2", "CausalLM",
     {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 4}),
    ("bart mbart marian pegasus blenderbot blenderbot-small m2m_100 plbart mvp",
     "Seq2SeqLM", COUPLED),
    ("t5 longt5 switch_transformers", "Seq2SeqLM", T5),
    ("vit beit dinov2", "ImageClassification", {}),
    ("deit", "DeiTForImageClassification", {}),
    ("swin swinv2", "ImageClassification",
     {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, "patch_size": 4,
      **FREE}),
    ("convnext", "ImageClassification", {**STEPS, "patch_size": 2}),
    ("segformer", "ImageClassification",
     {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], **FREE}),
    ("resnet", "ImageClassification", {**STEPS, "embedding_size": 16}),
    ("poolformer", "ImageClassification",
     {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 64], "patch_size": 7}),
    ("focalnet", "ImageClassification",
     {"embed_dim": 16, "depths": [1, 2, 1], "focal_levels": [1] * 3, "focal_windows": [3] * 3,
      "patch_size": 4}),
    ("mobilevit", "ImageClassification",
     {"hidden_sizes": [16, 24, 32], "patch_size": 2, "image_size": 64}),
    ("vit_mae", "PreTraining",
     {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
      "decoder_intermediate_size": 32}),
    ("wav2vec2 hubert wavlm", "CTC", WAVES),
    ("whisper", "SpeechSeq2Seq",
     {**COUPLED, "num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 30}),
    ("speech_to_text", "SpeechSeq2Seq",
     {**COUPLED, "input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions": 60}),
    ("audio-spectrogram-transformer", "AudioClassification",
     {"max_length": 40, "num_mel_bins": 16}),
    ("clip", "CLIPModel", TOWERS),
    ("siglip", "SiglipModel", TOWERS),
    ("vilt", "ViltModel", {}),
]  # fmt: skip
TABLE = {name: (kind, options) for names, kind, options in _ROWS for name in names.split()}

_IMAGES = ("ImageClassification", "PreTraining", "DeiTForImageClassification")
_WITH_IMAGES = ("CLIPModel", "SiglipModel", "ChineseCLIPModel", "ViltModel")


def _settings(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """What the configuration is made with; None leaves a setting of `SMALL` to the family."""
    if options is TOWERS:
        return options
    return {key: value for key, value in {**SMALL, **options}.items() if value is not None}


def build(name: str) -> nn.Module:
    """The architecture ``name`` of the table, randomly initialised."""
    import transformers

    kind, options = TABLE[name]
    config = transformers.AutoConfig.for_model(name, **_settings(kind, options))
    auto = getattr(transformers, f"AutoModelFor{kind}", None)
    if "num_experts_per_tok" in options:
        config._experts_implementation = (
            "batched_mm"  # the default, grouped_mm, is not faked in single precision
        )
    return auto.from_config(config) if auto else getattr(transformers, kind)(config)


def example(name: str, batch: int, seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword inputs: texts and clips of several lengths with their masks, labels where the model
    computes a loss.
    """
    kind, options = TABLE[name]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def mask(length: int) -> Tensor:
        return (
            torch.arange(length) < length - torch.arange(batch).view(-1, 1) * (length // 5)
        ).long()

    def tokens() -> Tensor:
        return torch.randint(3, VOCABULARY, (batch, LENGTH), generator=generator)

    image = options.get("image_size", IMAGE)
    if kind in _IMAGES:
        return {"pixel_values": draw(batch, 3, image, image)}
    if kind == "CTC":
        return {"input_values": draw(batch, CLIP), "attention_mask": mask(CLIP)}
    if name == "whisper":
        return {"input_features": draw(batch, 16, 60), "labels": tokens()}
    if name == "speech_to_text":
        return {
            "input_features": draw(batch, 60, 16),
            "attention_mask": mask(60),
            "labels": tokens(),
        }
    if kind == "AudioClassification":
        return {"input_values": draw(batch, 40, 16)}
    kept = mask(LENGTH)
    inputs: dict[str, Any] = {"input_ids": tokens() * kept, "attention_mask": kept}
    if kind in _WITH_IMAGES:
        inputs["pixel_values"] = draw(batch, 3, image, image)
    elif kind == "Seq2SeqLM":
        inputs["labels"] = tokens()
    elif kind == "CausalLM":
        inputs["labels"] = inputs["input_ids"].masked_fill(kept == 0, -100)
    return inputs

"""The models of other people's packages that rearrange with einops: vit-pytorch and x-transformers.

einops keeps what it computes from shapes in caches of the process, so these models show what a
first call leaves behind. A row of a table is a name and what differs from `VIT` or `LAYERS`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

INTRODUCTION = (
    "Small random configurations; images, clips and series of numbers for vit-pytorch, texts and "
    "images for x-transformers, whose options are named after its `Encoder` and `Decoder`."
)

IMAGE, PATCH, FRAMES, CLASSES, VOCABULARY, LENGTH = 32, 8, 4, 5, 50, 12
VIT = {
    "image_size": IMAGE, "patch_size": PATCH, "num_classes": CLASSES, "dim": 32, "depth": 4,
    "heads": 4, "mlp_dim": 64, "dim_head": 8,
}  # fmt: skip
CLIP = {"patch_size": None, "image_patch_size": PATCH, "frames": FRAMES, "frame_patch_size": 2}
IMAGES = {"levit": 64, "cross_vit": 96, "mobile_vit": 64, "sep_vit": 224}  # other sizes
SERIES: dict[str, Any] = {"image_size": None, "seq_len": 64}
STAGED = {"image_size": None, "patch_size": None, "mlp_dim": None, "dim_head": None}
FOUR = {**STAGED, "depth": (1, 1, 2, 1)}

# modules of vit_pytorch, the class in them, what differs from `VIT` (None: no such option)
_VITS: list[tuple[str, str, dict[str, Any]]] = [
    ("vit learnable_memory_vit parallel_vit vit_for_small_dataset vit_with_decorr vat", "ViT", {}),
    ("vit_with_patch_merger vit_with_patch_dropout vit_with_keel_post_ln vit_5 mp3", "ViT", {}),
    ("simple_vit simple_vit_with_qk_norm simple_vit_with_register_tokens", "SimpleViT", {}),
    ("simple_vit_with_value_residual simple_vit_with_patch_dropout", "SimpleViT", {}),
    ("simple_vit_orthog_residual_update simple_vit_with_specialized_cls", "SimpleViT", {}),
    ("simple_vit_with_relative_proj_pos_bias", "SimpleViT", {}),
    ("attn_residual_with_dca_simple_vit", "SimpleViT", {}),
    ("simple_flash_attn_vit", "SimpleViT", {}),
    ("deepvit", "DeepViT", {}),
    ("simple_vit_with_fft", "SimpleViT", {"freq_patch_size": PATCH}),
    ("simple_vit_with_hyper_connections", "SimpleViT", {"num_residual_streams": 2}),
    ("simple_vit_attn_residual", "SimpleViTAttnResidual", {}),
    ("simple_uvit", "SimpleUViT", {}),
    ("jumbo_vit", "JumboViT", {}),
    ("normalized_vit", "nViT", {}),
    ("rvt", "RvT", {}),
    ("vit_detpool", "ViTDetPool", {}),
    ("ats_vit", "ViT", {"max_tokens_per_depth": (12, 8, 6, 4)}),
    ("cait", "CaiT", {"cls_depth": 2}),
    ("xcit", "XCiT", {"cls_depth": 2}),
    ("pit", "PiT", {"depth": (2, 1, 2)}),
    ("levit", "LeViT", {"patch_size": None, "mlp_dim": None, "dim_head": None,
                        "mlp_mult": 2}),
    ("t2t", "T2TViT", {"patch_size": None}),
    ("nest", "NesT", {"depth": None, "mlp_dim": None, "patch_size": 4, "num_hierarchies": 3,
                      "block_repeats": (1, 1, 2)}),
    ("cross_vit", "CrossViT", {**STAGED, "image_size": IMAGE, "dim": None, "heads": None,
     "depth": 2,
                               "sm_dim": 24, "lg_dim": 32, "sm_enc_mlp_dim": 48,
                               "lg_enc_mlp_dim": 64, "lg_enc_depth": 1}),
    ("mobile_vit", "MobileViT", {**STAGED, "image_size": IMAGE, "dim": None, "depth": None,
                                 "heads": None, "dims": [24, 32, 40],
                                 "channels": [8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 48]}),
    ("max_vit", "MaxViT", {**STAGED, "image_size": None, "heads": None, "dim_head": 8,
                           "depth": (1, 1, 2), "window_size": 2}),
    ("crossformer", "CrossFormer", {**FOUR, "heads": None, "dim": (32, 64, 96, 128),
                                    "global_window_size": (4, 2, 2, 1), "local_window_size": 1}),
    ("regionvit", "RegionViT", {**FOUR, "heads": None, "dim": (16, 32, 48, 64), "window_size": 2}),
    ("scalable_vit", "ScalableViT", {**FOUR, "heads": (1, 2, 2, 4),
                                     "reduction_factor": (4, 2, 2, 1),
                                     "window_size": (4, 4, None, None)}),
    ("sep_vit", "SepViT", {**FOUR, "heads": (1, 2, 2, 4)}),
    ("cvt", "CvT", {**STAGED, "dim": None, "depth": None, "heads": None}),
    ("twins_svt", "TwinsSVT", {**STAGED, "dim": None, "depth": None, "heads": None,
                               **{f"s{n}_local_patch_size": 1 for n in (1, 2, 3)},
                               **{f"s{n}_global_k": 1 for n in (1, 2, 3, 4)}}),
    ("vit_1d", "ViT", SERIES),
    ("simple_vit_1d", "SimpleViT", SERIES),
    ("vit_3d", "ViT", CLIP),
    ("simple_vit_3d", "SimpleViT", CLIP),
    ("simple_flash_attn_vit_3d", "SimpleViT", CLIP),
    ("vivit", "ViViT", {**CLIP, "depth": None, "spatial_depth": 2, "temporal_depth": 2}),
]  # fmt: skip

LAYERS = {"dim": 32, "depth": 4, "heads": 4, "attn_dim_head": 32}
# a text model of x_transformers, `Decoder` if not said otherwise
_TEXTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "encoder": {"kind": "Encoder"},
    "rotary": {"rotary_pos_emb": True},
    "xpos": {"rotary_xpos": True},
    "alibi": {"alibi_pos_bias": True},
    "relative": {"rel_pos_bias": True},
    "dynamic": {"dynamic_pos_bias": True},
    "rmsnorm_glu": {"use_rmsnorm": True, "ff_glu": True, "ff_swish": True},
    "qk_norm": {"attn_qk_norm": True},
    "one_kv_head": {"attn_one_kv_head": True},
    "grouped": {"attn_kv_heads": 2},
    "talking_heads": {"attn_pre_talking_heads": True},
    "gated_values": {"attn_gate_values": True},
    "sandwich": {"sandwich_norm": True},
    "macaron": {"macaron": True},
    "shifted": {"shift_tokens": 1},
    "memory_keys": {"attn_num_mem_kv": 4},
    "layer_drop": {"layer_dropout": 0.2, "attn_dropout": 0.1, "ff_dropout": 0.1},
}
NAMES = {
    "vit_pytorch": [name for names, _, _ in _VITS for name in names.split()],
    "x_transformers": [*_TEXTS, "memory_tokens", "image", "translation"],
}


def build(library: str, name: str) -> nn.Module:
    """The model ``name`` of ``vit_pytorch`` or ``x_transformers``, randomly initialised."""
    return _vit(name) if library == "vit_pytorch" else _transformer(name)


def _vit(name: str) -> nn.Module:
    kind, changes = _row(name)
    options = {key: value for key, value in {**VIT, **changes}.items() if value is not None}
    if name in IMAGES and "image_size" in options:
        size = IMAGES[name]
        options["image_size"] = (size, size) if name == "mobile_vit" else size
    return getattr(importlib.import_module(f"vit_pytorch.{name}"), kind)(**options)


def _row(name: str) -> tuple[str, dict[str, Any]]:
    return next((kind, changes) for names, kind, changes in _VITS if name in names.split())


def _transformer(name: str) -> nn.Module:
    import x_transformers as xt

    if name == "image":
        layers = xt.Encoder(**LAYERS)
        return xt.ViTransformerWrapper(
            image_size=IMAGE, patch_size=PATCH, num_classes=CLASSES, attn_layers=layers
        )
    if name == "translation":
        sizes = {"num_tokens": VOCABULARY, "depth": 2, "heads": 4, "max_seq_len": 32}
        both = {f"{side}_{key}": value for side in ("enc", "dec") for key, value in sizes.items()}
        return xt.XTransformer(dim=32, **both)
    options = dict(_TEXTS.get(name, {}))
    layers = getattr(xt, options.pop("kind", "Decoder"))(**LAYERS, **options)
    extra = {"num_memory_tokens": 3} if name == "memory_tokens" else {}
    return xt.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=32, attn_layers=layers, **extra)


def example(library: str, name: str, batch: int, seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Positional inputs: images, clips, series or texts."""
    generator = torch.Generator().manual_seed(seed)
    if library == "x_transformers" and name != "image":
        texts = torch.randint(1, VOCABULARY, (2, batch, LENGTH), generator=generator)
        return tuple(texts) if name == "translation" else (texts[0],)
    options = {} if library == "x_transformers" else _row(name)[1]
    size = IMAGES.get(name, IMAGE)
    shape: tuple[int, ...] = (batch, 3, size, size)
    if options is SERIES:
        shape = batch, 3, SERIES["seq_len"]
    elif "frames" in options:
        shape = batch, 3, FRAMES, size, size
    return (torch.randn(shape, generator=generator).to(dtype),)

"""Models of packages for texts, tables, series and policies; see `zoo_packages`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo_packages import Row, ids, named, ones, real, row

WORDS, LENGTH, WIDTH = 50, 32, 32
_TEXT = ids(WORDS, LENGTH)
_LM: dict[str, Any] = {"num_tokens": WORDS, "dim": WIDTH, "depth": 4, "heads": 4}


def _mamba() -> nn.Module:
    config = named("mambapy.mamba:MambaConfig")
    return named("mambapy.mamba:Mamba")(config(d_model=WIDTH, n_layers=4, use_cuda=False))


def _mamba2() -> nn.Module:
    config = named("mambapy.mamba2:Mamba2Config")
    return named("mambapy.mamba2:Mamba2")(
        config(d_model=64, n_layers=3, d_state=16, d_head=16, use_mem_eff_path=False)
    )


class Streams(nn.Module):
    """Residual streams around layers, as the page of hyper-connections has them."""

    def __init__(self) -> None:
        super().__init__()
        init = named("hyper_connections:get_init_and_expand_reduce_stream_functions")
        connect, self.expand, self.reduce = init(4)
        layers = (nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(4))
        self.layers = nn.ModuleList(connect(dim=WIDTH, branch=layer) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of what the streams come to."""
        x = self.expand(x)
        for layer in self.layers:
            x = layer(x)
        return self.reduce(x)


class Tagger(nn.Module):
    """A recurrent tagger whose loss is a conditional random field's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.encode = nn.LSTM(WIDTH, WIDTH, batch_first=True, bidirectional=True)
        self.score = nn.Linear(2 * WIDTH, 5)
        self.crf = named("torchcrf:CRF")(5, batch_first=True)

    def forward(self, words: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        """The negative log-likelihood of the tags."""
        return -self.crf(self.score(self.encode(self.embed(words))[0]), tags, mask=mask)


class Experts(nn.Module):
    """Layers with experts between them, whose auxiliary losses are part of the output."""

    def __init__(self, make: str, **options: Any) -> None:
        super().__init__()
        self.enter = nn.Linear(16, WIDTH)
        self.experts = nn.ModuleList(named(make)(WIDTH, **options) for _ in range(2))
        self.leave = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Any:
        """The output, with the sum of the auxiliary losses where there are any."""
        x, total = self.enter(x), None
        for layer in self.experts:
            found = layer(x)
            if isinstance(found, Tensor):
                x = x + found
            else:
                x = x + found[0]
                total = found[1] if total is None else total + found[1]
        return self.leave(x) if total is None else (self.leave(x), total)


class Rotary(nn.Module):
    """Attention with rotated queries and keys, as the page of rotary-embedding-torch has it."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary = named("rotary_embedding_torch:RotaryEmbedding")(dim=8)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.project = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        """Scores of the next word."""
        x = self.embed(words)
        for project in self.project:
            parts = project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            q, k = map(self.rotary.rotate_queries_or_keys, (parts[0], parts[1]))
            attend = nn.functional.scaled_dot_product_attention
            x = x + attend(q, k, parts[2], is_causal=True).transpose(1, 2).flatten(2)
        return self.head(x)


class Quantized(nn.Module):
    """An encoder and a decoder with a quantizer between them."""

    def __init__(self, quantizer: str, **options: Any) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(16, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.quantize = named(f"vector_quantize_pytorch:{quantizer}")(dim=WIDTH, **options)
        self.decode = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 16))

    def forward(self, x: Tensor) -> Any:
        """What is decoded and what else the quantizer returns."""
        quantized, *others = self.quantize(self.encode(x))
        return self.decode(quantized), *others


def _policy(kind: str, observations: Any, actions: Any) -> Any:
    spaces = named("gymnasium:spaces")
    return named(f"stable_baselines3.common.policies:{kind}")(
        observations(spaces), actions(spaces), lr_schedule=lambda _: 1e-3
    )


def _box(*shape: int) -> Any:
    return lambda spaces: spaces.Box(-1.0, 1.0, shape)


def _pixels(spaces: Any) -> Any:
    return spaces.Box(0, 255, (3, 64, 64), named("numpy:uint8"))


class Evaluated(nn.Module):
    """A policy as PPO and A2C train it: `evaluate_actions`."""

    def __init__(self, kind: str, observations: Any, actions: Any) -> None:
        super().__init__()
        self.policy = _policy(kind, observations, actions)

    def forward(self, observations: Tensor, actions: Tensor) -> Any:
        """Values, log-probabilities and entropies."""
        return self.policy.evaluate_actions(observations, actions)


def _q_network() -> nn.Module:
    spaces = named("gymnasium:spaces")
    extractor = named("stable_baselines3.common.torch_layers:FlattenExtractor")
    space = spaces.Box(-1.0, 1.0, (6,))
    return named("stable_baselines3.dqn.policies:QNetwork")(
        space, spaces.Discrete(4), extractor(space), 6
    )


def _critic() -> nn.Module:
    spaces = named("gymnasium:spaces")
    extractor = named("stable_baselines3.common.torch_layers:FlattenExtractor")
    space = spaces.Box(-1.0, 1.0, (6,))
    return named("stable_baselines3.common.policies:ContinuousCritic")(
        space, spaces.Box(-1.0, 1.0, (2,)), [32, 32, 32], extractor(space), 6
    )


def _discrete(spaces: Any) -> Any:
    return spaces.Discrete(4)


def _tabm(**options: Any) -> nn.Module:
    embeddings = named("rtdl_num_embeddings:LinearReLUEmbeddings")(options["n_num_features"])
    return named("tabm:TabM").make(num_embeddings=embeddings, **options)


def _periodic() -> nn.Module:
    embeddings = named("rtdl_num_embeddings:PeriodicEmbeddings")(6, 8, lite=False)
    return nn.Sequential(
        embeddings, nn.Flatten(), nn.Linear(6 * 8, 16), nn.ReLU(), nn.Linear(16, 2)
    )


class Sparse(nn.Module):
    """Attention whose weights are sparse, with a power that is learnt in a second one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.power = nn.Parameter(torch.tensor(1.5))
        self.last = named("entmax:Sparsemax")(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Features that sum to one."""
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        first = named("entmax:entmax15")(scores, dim=-1) @ self.v(x)
        second = named("entmax:entmax_bisect")(scores, self.power, dim=-1) @ x
        return self.last(self.out(first + second))


class Constrained(nn.Module):
    """A recurrence by an orthogonal matrix and one of low rank, as geotorch keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.turn, self.mix, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        named("geotorch:orthogonal")(self.turn, "weight")
        named("geotorch:low_rank")(self.mix, "weight", 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the last state."""
        for _ in range(3):
            x = torch.tanh(self.turn(x) + self.mix(x))
        return self.out(x)


TABLE: dict[str, Row] = {
    "reformer_pytorch/lm": row(
        "reformer_pytorch:ReformerLM", _TEXT, **_LM, max_seq_len=64, bucket_size=8, n_hashes=2,
        causal=True, ff_chunks=1),
    "reformer_pytorch/full_attention": row(
        "reformer_pytorch:ReformerLM", _TEXT, **_LM, max_seq_len=64, bucket_size=8,
        use_full_attn=True),
    "performer_pytorch/lm": row(
        "performer_pytorch:PerformerLM", _TEXT, **_LM, max_seq_len=64, causal=False),
    "performer_pytorch/generalized": row(
        "performer_pytorch:PerformerLM", _TEXT, **_LM, max_seq_len=64, generalized_attention=True,
        feature_redraw_interval=2),
    "performer_pytorch/reversible": row(
        "performer_pytorch:PerformerLM", _TEXT, **_LM, max_seq_len=64, reversible=True),
    "linear_attention_transformer/lm": row(
        "linear_attention_transformer:LinearAttentionTransformerLM", _TEXT, **_LM,
        max_seq_len=64),
    "linear_attention_transformer/causal": row(
        "linear_attention_transformer:LinearAttentionTransformerLM", _TEXT, **_LM, max_seq_len=64,
        causal=True, blindspot_size=8, n_local_attn_heads=2, local_attn_window_size=8),
    "routing_transformer/lm": row(
        "routing_transformer:RoutingTransformerLM", _TEXT, **_LM, max_seq_len=32, window_size=8,
        n_local_attn_heads=2, causal=True),
    "sinkhorn_transformer/lm": row(
        "sinkhorn_transformer:SinkhornTransformerLM", _TEXT, **_LM, max_seq_len=32, bucket_size=8,
        causal=True),
    "sinkhorn_transformer/sortcut": row(
        "sinkhorn_transformer:SinkhornTransformerLM", _TEXT, **_LM, max_seq_len=32, bucket_size=8,
        n_sortcut=2),
    "h_transformer_1d/encoder": row(
        "h_transformer_1d:HTransformer1D", _TEXT, **_LM, max_seq_len=64, block_size=8),
    "h_transformer_1d/causal": row(
        "h_transformer_1d:HTransformer1D", _TEXT, **_LM, max_seq_len=64, block_size=8, causal=True),
    "local_attention/transformer": row(
        "local_attention:LocalTransformer", _TEXT, **_LM, max_seq_len=64, local_attn_window_size=8),
    "local_attention/xpos": row(
        "local_attention:LocalTransformer", _TEXT, **_LM, max_seq_len=64, local_attn_window_size=8,
        use_xpos=True, use_dynamic_pos_bias=True),
    "nystrom_attention/nystromformer": row(
        "nystrom_attention:Nystromformer", real(32, WIDTH), dim=WIDTH, depth=3, heads=4,
        dim_head=8, num_landmarks=8),
    "g_mlp_pytorch/text": row(
        "g_mlp_pytorch:gMLP", _TEXT, num_tokens=WORDS, dim=WIDTH, depth=4, seq_len=LENGTH),
    "g_mlp_pytorch/survival": row(
        "g_mlp_pytorch:gMLP", _TEXT, num_tokens=WORDS, dim=WIDTH, depth=4, seq_len=LENGTH,
        prob_survival=0.9, causal=True, attn_dim=16),
    "rotary_embedding_torch/attention": row(Rotary, _TEXT),
    "hyper_connections/streams": row(Streams, real(8, WIDTH)),
    "mambapy/mamba": row(_mamba, real(16, WIDTH)),
    "soft_moe_pytorch/experts": row(
        Experts, real(16, 16), make="soft_moe_pytorch:SoftMoE", seq_len=16, num_experts=4),
    "mixture_of_experts/experts": row(
        Experts, real(16, 16), make="mixture_of_experts:MoE", num_experts=4),
    "st_moe_pytorch/experts": row(
        Experts, real(16, 16), make="st_moe_pytorch:MoE", num_experts=4),
    "vector_quantize_pytorch/vq": row(
        Quantized, real(16, 16), quantizer="VectorQuantize", codebook_size=16),
    "vector_quantize_pytorch/residual": row(
        Quantized, real(16, 16), quantizer="ResidualVQ", codebook_size=16, num_quantizers=2),
    "vector_quantize_pytorch/lookup_free": row(
        Quantized, real(16, 16), quantizer="LFQ", codebook_size=16),
    "vector_quantize_pytorch/fsq": row(
        Quantized, real(16, 16), quantizer="FSQ", levels=[5, 5, 3]),
    "pytorch_crf/tagger": row(Tagger, ids(WORDS, 8), ids(5, 8), ones(8)),
    "tab_transformer_pytorch/tab": row(
        "tab_transformer_pytorch:TabTransformer", ids(5, 3), real(4), categories=(5, 6, 7),
        num_continuous=4, dim=16, depth=3, heads=4, mlp_act=nn.ReLU()),
    "tab_transformer_pytorch/ft": row(
        "tab_transformer_pytorch:FTTransformer", ids(5, 3), real(4), categories=(5, 6, 7),
        num_continuous=4, dim=16, depth=3, heads=4),
    "pytorch_tabnet/tabnet": row(
        "pytorch_tabnet.tab_network:TabNet", real(12), input_dim=12, output_dim=3,
        group_attention_matrix=torch.eye(12)),
    "tabm/ensemble": row(
        _tabm, real(6), ids(3, 2), n_num_features=6, cat_cardinalities=[3, 4], d_out=2, k=4,
        n_blocks=3, d_block=16),
    "rtdl_num_embeddings/periodic": row(_periodic, real(6)),
    "rtdl_revisiting_models/ft": row(
        "rtdl_revisiting_models:FTTransformer", real(5), ids(3, 2), n_cont_features=5,
        cat_cardinalities=[3, 4], d_out=2, n_blocks=3, d_block=32, attention_n_heads=4,
        attention_dropout=0.1, ffn_d_hidden=None, ffn_d_hidden_multiplier=1.3, ffn_dropout=0.1,
        residual_dropout=0.0),
    "rtdl_revisiting_models/resnet": row(
        "rtdl_revisiting_models:ResNet", real(5), d_in=5, d_out=2, n_blocks=3, d_block=16,
        d_hidden=None, d_hidden_multiplier=2.0, dropout1=0.1, dropout2=0.0),
    "entmax/attention": row(Sparse, real(5, 8)),
    "geotorch/recurrent": row(Constrained, real(8)),
    "pytorch_tcn/tcn": row(
        "pytorch_tcn:TCN", real(4, 32), num_inputs=4, num_channels=[16, 16, 16, 16]),
    "ncps/cfc": row("ncps.torch:CfC", real(6, 8), input_size=8, units=16),
    "ncps/ltc": row("ncps.torch:LTC", real(4, 8), input_size=8, units=16),
    "conformer/conformer": row(
        "conformer:Conformer", real(32, WIDTH), dim=WIDTH, depth=3, heads=4, dim_head=8,
        conv_kernel_size=7),
    "stable_baselines3/actor_critic": row(
        Evaluated, real(6), real(2), kind="ActorCriticPolicy", observations=_box(6),
        actions=_box(2)),
    "stable_baselines3/actor_critic_discrete": row(
        Evaluated, real(6), ids(4), kind="ActorCriticPolicy", observations=_box(6),
        actions=_discrete),
    "stable_baselines3/actor_critic_sampled": row(
        lambda: _policy("ActorCriticPolicy", _box(6), _box(2)), real(6)),
    "stable_baselines3/actor_critic_images": row(
        Evaluated, ids(256, 3, 64, 64), ids(4), kind="ActorCriticCnnPolicy", observations=_pixels,
        actions=_discrete),
    "stable_baselines3/q_network": row(_q_network, real(6)),
    "stable_baselines3/critic": row(_critic, real(6), real(2)),
}  # fmt: skip

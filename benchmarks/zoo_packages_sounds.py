"""Models of packages for waves, brain signals and forecasts; see `zoo_packages`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo_packages import Make, Row, ids, named, real, row

WIDTH, FRAMES, MELS = 32, 40, 16
_WAVE = real(1, 1024)


def _lengths(length: int) -> Make:
    """Every sample has its full length."""
    return lambda batch, _generator, _dtype: torch.full((batch,), length)


def _whole(batch: int, _generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.ones(batch, dtype=dtype)


def _tokens(batch: int, generator: torch.Generator, _dtype: torch.dtype) -> Tensor:
    return torch.randint(1, 20, (batch, 6), generator=generator)  # 0 pads


_WAV2VEC = {
    "extractor_mode": "group_norm", "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2)],
    "extractor_conv_bias": False, "encoder_embed_dim": 32, "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 16, "encoder_pos_conv_groups": 4, "encoder_num_layers": 3,
    "encoder_num_heads": 4, "encoder_attention_dropout": 0.1, "encoder_ff_interm_features": 64,
    "encoder_ff_interm_dropout": 0.1, "encoder_dropout": 0.1, "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.1, "aux_num_out": 8,
}  # fmt: skip


class Features(nn.Module):
    """Spectra of torchaudio under a small classifier, with SpecAugment's masks."""

    def __init__(self) -> None:
        super().__init__()
        transforms = named("importlib:import_module")("torchaudio.transforms")
        self.mel = transforms.MelSpectrogram(16000, n_fft=128, hop_length=64, n_mels=MELS)
        self.decibels = transforms.AmplitudeToDB()
        self.mask = nn.Sequential(transforms.FrequencyMasking(4), transforms.TimeMasking(4))
        self.layers = nn.Sequential(
            nn.Conv1d(MELS, WIDTH, 3), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Conv1d(WIDTH, WIDTH, 3),
            nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(WIDTH, 5),
        )  # fmt: skip

    def forward(self, waves: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.layers(self.mask(self.decibels(self.mel(waves))))


def _encodec() -> nn.Module:
    modules = named("importlib:import_module")("encodec.modules")
    options: dict[str, Any] = {"dimension": 16, "n_filters": 4, "ratios": [4, 2], "lstm": 1}
    quantizer = named("encodec.quantization:ResidualVectorQuantizer")(
        dimension=16, n_q=2, bins=16, kmeans_init=False
    )
    return named("encodec.model:EncodecModel")(
        modules.SEANetEncoder(**options), modules.SEANetDecoder(**options), quantizer, [6.0],
        sample_rate=1000, channels=1,
    )  # fmt: skip


def _vocos() -> nn.Module:
    return nn.Sequential(
        named("vocos.models:VocosBackbone")(MELS, WIDTH, 64, 3),
        named("vocos.heads:ISTFTHead")(WIDTH, 128, 32),
    )


class Speech(nn.Module):
    """speechbrain's recogniser: a front end, then its transformer over what is heard and said."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.net = named("speechbrain.lobes.models.transformer.TransformerASR:TransformerASR")(
            tgt_vocab=20, input_size=MELS, d_model=WIDTH, nhead=4, num_encoder_layers=2,
            num_decoder_layers=2, d_ffn=64, **options,
        )  # fmt: skip
        self.head = nn.Linear(WIDTH, 20)

    def forward(self, heard: Tensor, said: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder makes of the sound, and scores of the next token."""
        encoded, decoded = self.net(heard, said, lengths)
        return encoded, self.head(decoded)


def _dual_path() -> nn.Module:
    module = named("importlib:import_module")("speechbrain.lobes.models.dual_path")
    block = {"num_layers": 1, "d_model": 16, "nhead": 4, "d_ffn": 32}
    return module.Dual_Path_Model(
        16, 16, module.SBTransformerBlock(**block), module.SBTransformerBlock(**block),
        num_layers=2, K=10,
    )  # fmt: skip


def _series(past: int, future: int, width: int) -> Make:
    """A batch as pytorch-forecasting's loaders give it."""

    def make(batch: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
        def draw(*shape: int) -> Tensor:
            return torch.randn((batch, *shape), generator=generator, dtype=dtype)

        return {
            "encoder_cont": draw(past, width), "decoder_cont": draw(future, width),
            "encoder_cat": torch.zeros(batch, past, 0, dtype=torch.long),
            "decoder_cat": torch.zeros(batch, future, 0, dtype=torch.long),
            "encoder_lengths": torch.full((batch,), past),
            "decoder_lengths": torch.full((batch,), future),
            "encoder_target": draw(past), "decoder_target": draw(future),
            "target_scale": torch.ones(batch, 2, dtype=dtype),
        }  # fmt: skip

    return make


class Forecast(nn.Module):
    """A model of pytorch-forecasting, whose outputs become a plain dict."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        metrics = named("importlib:import_module")("pytorch_forecasting.metrics")
        loss = metrics.MAE() if "output_size" not in options else metrics.QuantileLoss()
        normalizer = named("pytorch_forecasting.data.encoders:TorchNormalizer")(method="identity")
        self.net = named(f"pytorch_forecasting.models:{name}")(
            loss=loss, output_transformer=normalizer, **options
        )

    def forward(self, x: dict[str, Tensor]) -> Any:
        """The prediction."""
        return self.net(x)["prediction"]


_REALS = {"x_reals": ["a", "b", "c"], "x_categoricals": []}
_SIGNAL = {"n_chans": 8, "n_outputs": 4, "n_times": 256}
_ASR: tuple[Make, ...] = (real(FRAMES, MELS), _tokens, _whole)
_LOBES = "speechbrain.lobes.models."

TABLE: dict[str, Row] = {
    "torchaudio/conformer": row(
        "torchaudio.models:Conformer", real(FRAMES, WIDTH), _lengths(FRAMES), input_dim=WIDTH,
        num_heads=4, ffn_dim=64, num_layers=3, depthwise_conv_kernel_size=7, dropout=0.1),
    "torchaudio/conv_tasnet": row(
        "torchaudio.models:ConvTasNet", _WAVE, num_sources=2, enc_num_feats=16, msk_num_feats=16,
        msk_num_hidden_feats=16, msk_num_layers=2, msk_num_stacks=2),
    "torchaudio/wav2letter": row(
        "torchaudio.models:Wav2Letter", real(MELS, FRAMES), num_classes=8, input_type="mfcc",
        num_features=MELS),
    "torchaudio/deep_speech": row(
        "torchaudio.models:DeepSpeech", real(1, FRAMES, MELS), n_feature=MELS, n_hidden=WIDTH,
        n_class=8, dropout=0.1),
    "torchaudio/wav2vec2": row("torchaudio.models:wav2vec2_model", real(800), **_WAV2VEC),
    "torchaudio/emformer": row(
        "torchaudio.models:Emformer", real(20, WIDTH), _lengths(20), input_dim=WIDTH, num_heads=4,
        ffn_dim=64, num_layers=3, segment_length=4, right_context_length=1),
    "torchaudio/wavernn": row(
        "torchaudio.models:WaveRNN", real(1, 480), real(1, MELS, 64), upsample_scales=[2, 4],
        n_classes=8, hop_length=8, n_res_block=2, n_rnn=16, n_fc=16, n_freq=MELS, n_hidden=16,
        n_output=16),
    "torchaudio/tacotron2": row(
        "torchaudio.models:Tacotron2", ids(20, 8), _lengths(8), real(MELS, 6), _lengths(6),
        n_mels=MELS, n_symbol=20, symbol_embedding_dim=16, encoder_embedding_dim=16,
        decoder_rnn_dim=16, attention_rnn_dim=16, attention_hidden_dim=8, prenet_dim=16,
        postnet_embedding_dim=16, postnet_n_convolution=2, encoder_n_convolution=2),
    "torchaudio/spectra": row(Features, real(2048)),
    "demucs/waves": row(
        "demucs.demucs:Demucs", real(2, 2048), sources=["a", "b"], channels=8, depth=3,
        resample=False),
    "demucs/lstm": row(
        "demucs.demucs:Demucs", real(2, 2048), sources=["a", "b"], channels=8, depth=3,
        lstm_layers=1, resample=False),
    "encodec/model": row(_encodec, _WAVE),
    "vocos/generator": row(_vocos, real(MELS, FRAMES)),
    "speechbrain/ecapa_tdnn": row(
        _LOBES + "ECAPA_TDNN:ECAPA_TDNN", real(FRAMES, MELS), _whole, input_size=MELS,
        channels=[16, 16, 16, 16, 48], attention_channels=8, lin_neurons=16, se_channels=8,
        res2net_scale=4),
    "speechbrain/xvector": row(
        _LOBES + "Xvector:Xvector", real(FRAMES, MELS), in_channels=MELS,
        tdnn_channels=[16, 16, 16, 16, 48], lin_neurons=16),
    "speechbrain/crdnn": row(
        _LOBES + "CRDNN:CRDNN", real(FRAMES, MELS), input_shape=[None, None, MELS],
        cnn_channels=[8, 16], rnn_layers=1, rnn_neurons=16, dnn_neurons=16),
    "speechbrain/transformer": row(Speech, *_ASR, causal=True),
    "speechbrain/conformer": row(
        Speech, *_ASR, encoder_module="conformer", attention_type="RelPosMHAXL", kernel_size=7,
        normalize_before=True, causal=False),
    "speechbrain/dual_path": row(_dual_path, real(16, 60)),
    "braindecode/eegnet": row("braindecode.models:EEGNet", real(8, 256), **_SIGNAL),
    "braindecode/shallow": row("braindecode.models:ShallowFBCSPNet", real(8, 256), **_SIGNAL),
    "braindecode/conformer": row(
        "braindecode.models:EEGConformer", real(8, 256), **_SIGNAL, num_layers=3, num_heads=4),
    "braindecode/atcnet": row(
        "braindecode.models:ATCNet", real(8, 512), n_chans=8, n_outputs=4, n_times=512, sfreq=128,
        input_window_seconds=4.0),
    "braindecode/tidnet": row("braindecode.models:TIDNet", real(8, 256), **_SIGNAL),
    "pytorch_forecasting/nbeats": row(
        Forecast, _series(20, 5, 1), name="NBeats", prediction_length=5, context_length=20,
        widths=[16, 16], num_blocks=[2, 2]),
    "pytorch_forecasting/decoder_mlp": row(
        Forecast, _series(20, 5, 3), name="DecoderMLP", hidden_size=16, output_size=7, **_REALS,
        time_varying_reals_decoder=["a", "b"], static_reals=["c"],
        time_varying_reals_encoder=["a", "b"]),
    "pytorch_forecasting/temporal_fusion": row(
        Forecast, _series(20, 5, 3), name="TemporalFusionTransformer", hidden_size=16,
        hidden_continuous_size=8, output_size=7, max_encoder_length=20, **_REALS,
        time_varying_reals_encoder=["a", "b"], time_varying_reals_decoder=["b"],
        static_reals=["c"]),
}  # fmt: skip

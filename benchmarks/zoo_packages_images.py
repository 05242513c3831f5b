"""Models of packages for images and volumes; see `zoo_packages`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo_packages import Make, Row, constant, ids, named, real, row, unit

_IMAGE, _SMALL, _VOLUME = real(3, 64, 64), real(3, 32, 32), real(1, 32, 32, 32)
_UNET: dict[str, Any] = {
    "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": (8, 16, 32, 64),
    "strides": (2, 2, 2),
}  # fmt: skip
_SMP: dict[str, Any] = {"encoder_name": "resnet18", "encoder_weights": None, "classes": 3}


def _steps(count: int = 1000) -> Make:
    return ids(count)


def _diffusers(name: str, *inputs: Make, keywords: dict[str, Make], **options: Any) -> Row:
    return Row(f"diffusers:{name}", inputs, options, keywords)


class Denoised(nn.Module):
    """A U-Net of diffusers in the loss of its training script."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = named("diffusers:UNet2DModel")(
            sample_size=16, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), layers_per_block=1,
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        self.scheduler = named("diffusers:DDPMScheduler")(num_train_timesteps=100)

    def forward(self, images: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """The mean squared error of the noise."""
        noisy = self.scheduler.add_noise(images, noise, steps)
        return nn.functional.mse_loss(self.unet(noisy, steps, return_dict=False)[0], noise)


def _diffusion(**options: Any) -> nn.Module:
    unet = named("denoising_diffusion_pytorch:Unet")(
        16, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8, **options
    )
    return named("denoising_diffusion_pytorch:GaussianDiffusion")(unet, image_size=16, timesteps=50)


def _diffusion_1d() -> nn.Module:
    unet = named("denoising_diffusion_pytorch:Unet1D")(16, dim_mults=(1, 2), channels=4)
    return named("denoising_diffusion_pytorch:GaussianDiffusion1D")(
        unet, seq_length=32, timesteps=50
    )


def _efficientnet() -> nn.Module:
    return named("efficientnet_pytorch:EfficientNet").from_name("efficientnet-b0", num_classes=5)


def _open_clip(name: str = "CLIP", **options: Any) -> nn.Module:
    module = named("importlib:import_module")("open_clip.model")
    vision = module.CLIPVisionCfg(layers=3, width=32, head_width=8, patch_size=8, image_size=32)
    text = module.CLIPTextCfg(context_length=16, vocab_size=60, width=32, heads=4, layers=3)
    return getattr(module, name)(embed_dim=24, vision_cfg=vision, text_cfg=text, **options)


class SelfSupervised(nn.Module):
    """Two views of a batch through a backbone and the heads of lightly, as its pages have it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1),
            nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        heads, losses = "lightly.models.modules.heads:", "lightly.loss:"
        self.predict: nn.Module | None = None
        if kind == "simsiam":
            self.project = named(heads + "SimSiamProjectionHead")(32, 32, 16)
            self.predict = named(heads + "SimSiamPredictionHead")(16, 8, 16)
            self.loss = named(losses + "NegativeCosineSimilarity")()
        elif kind == "barlow":
            self.project = named(heads + "BarlowTwinsProjectionHead")(32, 64, 64)
            self.loss = named(losses + "BarlowTwinsLoss")()
        elif kind == "vicreg":
            self.project = named(heads + "VICRegProjectionHead")(32, 64, 64, num_layers=2)
            self.loss = named(losses + "VICRegLoss")()
        else:
            self.project = named(heads + "SimCLRProjectionHead")(32, 32, 16)
            self.loss = named(losses + "NTXentLoss")()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss of the pair."""
        one, other = (self.project(self.backbone(view)) for view in (first, second))
        if self.predict is None:
            return self.loss(one, other)
        pairs = (self.predict(one), other.detach()), (self.predict(other), one.detach())
        return 0.5 * sum(self.loss(*pair) for pair in pairs)


class Slots(nn.Module):
    """Features of an image bound to slots."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.ReLU(), nn.Conv2d(32, 32, 1))
        self.slots = named("slot_attention:SlotAttention")(num_slots=4, dim=32, iters=3)
        self.decode = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, images: Tensor) -> Tensor:
        """What each slot holds."""
        return self.decode(self.slots(self.encode(images).flatten(2).transpose(1, 2)))


def _lambda_network() -> nn.Module:
    layer = named("lambda_networks:LambdaLayer")
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(),
        layer(16, dim_out=16, n=4, dim_k=8, heads=4), nn.BatchNorm2d(16), nn.ReLU(),
        layer(16, dim_out=16, r=3, dim_k=8, heads=4, dim_u=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def _axial() -> nn.Module:
    return named("axial_attention:AxialImageTransformer")(
        dim=16, depth=3, heads=4, axial_pos_emb_shape=(8, 8)
    )


class Augmented(nn.Module):
    """A classifier behind kornia's augmentations, which draw for each batch."""

    def __init__(self) -> None:
        super().__init__()
        kinds = named("importlib:import_module")("kornia.augmentation")
        self.augment = kinds.AugmentationSequential(
            kinds.RandomHorizontalFlip(p=0.5), kinds.ColorJitter(0.1, 0.1, 0.1, 0.1, p=1.0)
        )
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.layers(self.augment(images))


class Filtered(nn.Module):
    """Filters and colours of kornia between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.blur = named("kornia.filters:GaussianBlur2d")((3, 3), (1.0, 1.0))
        self.edges = named("kornia.filters:Sobel")()

    def forward(self, images: Tensor) -> Tensor:
        """Features of the edges of what the first convolution finds."""
        return self.last(self.edges(self.blur(torch.sigmoid(self.first(images)))))


def _perceptual() -> nn.Module:
    return named("lpips:LPIPS")(
        pretrained=False, pnet_rand=True, net="squeeze", verbose=False, eval_mode=False,
        pnet_tune=True,
    )  # fmt: skip


_CROSS = {"cross_attention_dim": 16, "attention_head_dim": 8, "norm_num_groups": 8}
_DOWN, _UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


def _nnunet(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        kind = named(f"dynamic_network_architectures.architectures.unet:{name}")
        return kind(
            1, 3, [8, 16, 16], nn.Conv2d, 3, [1, 2, 2], [1, 1, 1], 2, [1, 1], conv_bias=True,
            norm_op=nn.InstanceNorm2d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
            deep_supervision=True,
        )  # fmt: skip

    return make


TABLE: dict[str, Row] = {
    "diffusers/unet_2d": _diffusers(
        "UNet2DModel", real(3, 16, 16), _steps(), keywords={}, sample_size=16,
        block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=8, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D")),
    "diffusers/unet_2d_loss": row(Denoised, real(3, 16, 16), real(3, 16, 16), _steps(100)),
    "diffusers/unet_2d_condition": _diffusers(
        "UNet2DConditionModel", real(4, 16, 16), _steps(), keywords={
            "encoder_hidden_states": real(7, 16)}, sample_size=16, block_out_channels=(16, 32),
        layers_per_block=1, down_block_types=_DOWN, up_block_types=_UP, **_CROSS),
    "diffusers/unet_2d_condition_one_step": _diffusers(
        "UNet2DConditionModel", real(4, 16, 16), constant(7), keywords={
            "encoder_hidden_states": real(7, 16)}, sample_size=16, block_out_channels=(16, 32),
        layers_per_block=1, down_block_types=_DOWN, up_block_types=_UP, **_CROSS),
    "diffusers/autoencoder_kl": _diffusers(
        "AutoencoderKL", _SMALL, keywords={}, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
    "diffusers/autoencoder_tiny": _diffusers(
        "AutoencoderTiny", _SMALL, keywords={}, encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16), num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1)),
    "diffusers/vq": _diffusers(
        "VQModel", _SMALL, keywords={}, block_out_channels=(16, 32), norm_num_groups=8,
        num_vq_embeddings=32, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2),
    "diffusers/dit": _diffusers(
        "DiTTransformer2DModel", real(4, 8, 8), keywords={
            "timestep": _steps(), "class_labels": ids(10)}, num_attention_heads=2,
        attention_head_dim=8, num_layers=4, sample_size=8, num_embeds_ada_norm=10),
    "diffusers/pixart": _diffusers(
        "PixArtTransformer2DModel", real(4, 8, 8), keywords={
            "encoder_hidden_states": real(6, 16), "timestep": _steps(),
            "added_cond_kwargs": constant({"resolution": None, "aspect_ratio": None})},
        num_attention_heads=2, attention_head_dim=8, num_layers=3, sample_size=8,
        cross_attention_dim=16, caption_channels=16, use_additional_conditions=False),
    "diffusers/sd3": _diffusers(
        "SD3Transformer2DModel", real(4, 8, 8), keywords={
            "encoder_hidden_states": real(6, 16), "pooled_projections": real(24),
            "timestep": _steps()}, sample_size=8, in_channels=4, out_channels=4, num_layers=3,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=24, pos_embed_max_size=8),
    "diffusers/prior": _diffusers(
        "PriorTransformer", real(16), _steps(), real(16), keywords={
            "encoder_hidden_states": real(7, 16)}, num_attention_heads=2, attention_head_dim=8,
        num_layers=3, embedding_dim=16, num_embeddings=7),
    "denoising_diffusion_pytorch/images": row(_diffusion, unit(3, 16, 16)),
    "denoising_diffusion_pytorch/self_condition": row(
        _diffusion, unit(3, 16, 16), self_condition=True),
    "denoising_diffusion_pytorch/series": row(_diffusion_1d, unit(4, 32)),
    "denoising_diffusion_pytorch/unet": row(
        "denoising_diffusion_pytorch:Unet", real(3, 16, 16), _steps(), dim=16, dim_mults=(1, 2),
        attn_heads=2, attn_dim_head=8),
    "monai/unet": row("monai.networks.nets:UNet", real(1, 32, 32), **_UNET, num_res_units=1),
    "monai/attention_unet": row("monai.networks.nets:AttentionUnet", real(1, 32, 32), **_UNET),
    "monai/autoencoder": row(
        "monai.networks.nets:AutoEncoder", real(1, 32, 32), spatial_dims=2, in_channels=1,
        out_channels=1, channels=(8, 16, 32), strides=(2, 2, 2)),
    "monai/var_autoencoder": row(
        "monai.networks.nets:VarAutoEncoder", real(1, 32, 32), spatial_dims=2,
        in_shape=(1, 32, 32), out_channels=1, latent_size=8, channels=(8, 16), strides=(2, 2)),
    "monai/basic_unet_plus_plus": row(
        "monai.networks.nets:BasicUNetPlusPlus", real(1, 32, 32), spatial_dims=2,
        features=(8, 8, 16, 16, 32, 8)),
    "monai/dynunet": row(
        "monai.networks.nets:DynUNet", real(1, 32, 32), spatial_dims=2, in_channels=1,
        out_channels=2, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2],
        filters=[8, 16, 32], deep_supervision=True),
    "monai/segresnet": row(
        "monai.networks.nets:SegResNet", real(1, 16, 16, 16), blocks_down=(1, 1, 1),
        blocks_up=(1, 1)),
    "monai/segresnet_ds": row(
        "monai.networks.nets:SegResNetDS", real(1, 16, 16, 16), init_filters=8,
        blocks_down=(1, 1, 1), dsdepth=2),
    "monai/vnet": row(
        "monai.networks.nets:VNet", real(1, 32, 32), spatial_dims=2, dropout_dim=2),
    "monai/highresnet": row(
        "monai.networks.nets:HighResNet", real(1, 16, 16), spatial_dims=2),
    "monai/unetr": row(
        "monai.networks.nets:UNETR", _VOLUME, in_channels=1, out_channels=2, img_size=32,
        feature_size=8, hidden_size=24, mlp_dim=48, num_heads=4),
    "monai/swin_unetr": row(
        "monai.networks.nets:SwinUNETR", real(1, 64, 64), in_channels=1, out_channels=2,
        feature_size=12, depths=(1, 1, 1, 1), spatial_dims=2),
    "monai/vit": row(
        "monai.networks.nets:ViT", real(1, 16, 16, 16), in_channels=1, img_size=16, patch_size=8,
        hidden_size=24, mlp_dim=48, num_layers=4, num_heads=4, classification=True),
    "monai/densenet": row(
        "monai.networks.nets:DenseNet", real(1, 32, 32), spatial_dims=2, in_channels=1,
        out_channels=3, init_features=8, growth_rate=8, block_config=(2, 2, 2)),
    "monai/diffusion_unet": row(
        "monai.networks.nets:DiffusionModelUNet", real(1, 16, 16), _steps(), spatial_dims=2,
        in_channels=1, out_channels=1, num_res_blocks=1, channels=(8, 16),
        attention_levels=(False, True), norm_num_groups=8, num_head_channels=8),
    "monai/autoencoder_kl": row(
        "monai.networks.nets:AutoencoderKL", real(1, 16, 16), spatial_dims=2, num_res_blocks=(1, 1),
        channels=(8, 16), attention_levels=(False, True), norm_num_groups=8),
    "kornia/vit": row(
        "kornia.models.vit:VisionTransformer", _SMALL, image_size=32, patch_size=8, embed_dim=32,
        depth=4, num_heads=4),
    "kornia/hardnet": row("kornia.feature:HardNet", real(1, 32, 32), pretrained=False),
    "kornia/sosnet": row("kornia.feature:SOSNet", real(1, 32, 32), pretrained=False),
    "kornia/tfeat": row("kornia.feature:TFeat", real(1, 32, 32), pretrained=False),
    "kornia/augmented": row(Augmented, unit(3, 32, 32)),
    "kornia/filtered": row(Filtered, unit(3, 32, 32)),
    "segmentation_models_pytorch/unet": row("segmentation_models_pytorch:Unet", _IMAGE, **_SMP),
    "segmentation_models_pytorch/unet_plus_plus": row(
        "segmentation_models_pytorch:UnetPlusPlus", _IMAGE, **_SMP),
    "segmentation_models_pytorch/fpn": row("segmentation_models_pytorch:FPN", _IMAGE, **_SMP),
    "segmentation_models_pytorch/deeplab_v3_plus": row(
        "segmentation_models_pytorch:DeepLabV3Plus", _IMAGE, **_SMP),
    "segmentation_models_pytorch/manet": row("segmentation_models_pytorch:MAnet", _IMAGE, **_SMP),
    "segmentation_models_pytorch/linknet": row(
        "segmentation_models_pytorch:Linknet", _IMAGE, **_SMP),
    "segmentation_models_pytorch/classified": row(
        "segmentation_models_pytorch:Unet", _IMAGE, **_SMP, aux_params={"classes": 4}),
    "open_clip_torch/clip": row(_open_clip, real(3, 32, 32), ids(60, 16)),
    "open_clip_torch/dict": row(_open_clip, real(3, 32, 32), ids(60, 16), output_dict=True),
    "open_clip_torch/custom_text": row(
        _open_clip, real(3, 32, 32), ids(60, 16), name="CustomTextCLIP"),
    "lightly/simclr": row(SelfSupervised, _SMALL, _SMALL, kind="simclr"),
    "lightly/simsiam": row(SelfSupervised, _SMALL, _SMALL, kind="simsiam"),
    "lightly/barlow_twins": row(SelfSupervised, _SMALL, _SMALL, kind="barlow"),
    "lightly/vicreg": row(SelfSupervised, _SMALL, _SMALL, kind="vicreg"),
    "efficientnet_pytorch/b0": row(_efficientnet, _IMAGE),
    "mlp_mixer_pytorch/mixer": row(
        "mlp_mixer_pytorch:MLPMixer", _SMALL, image_size=32, channels=3, patch_size=8, dim=32,
        depth=4, num_classes=5),
    "g_mlp_pytorch/vision": row(
        "g_mlp_pytorch:gMLPVision", _SMALL, image_size=32, patch_size=8, num_classes=5, dim=32,
        depth=4),
    "lambda_networks/network": row(_lambda_network, real(3, 8, 8)),
    "axial_attention/transformer": row(_axial, real(16, 8, 8)),
    "perceiver_pytorch/perceiver": row(
        "perceiver_pytorch:Perceiver", real(8, 8, 3), num_freq_bands=4, depth=3, max_freq=8.0,
        num_latents=8, latent_dim=32, latent_heads=4, cross_dim_head=8, latent_dim_head=8,
        num_classes=5, weight_tie_layers=True),
    "perceiver_pytorch/io": Row(
        "perceiver_pytorch:PerceiverIO", (real(16, 24),), {
            "depth": 3, "dim": 24, "queries_dim": 16, "logits_dim": 5, "num_latents": 8,
            "latent_dim": 32, "latent_heads": 4}, {"queries": real(6, 16)}),
    "slot_attention/slots": row(Slots, _SMALL),
    "lpips/squeeze": row(_perceptual, _IMAGE, _IMAGE),
    "dynamic_network_architectures/plain": row(_nnunet("PlainConvUNet"), real(1, 16, 16)),
    "dynamic_network_architectures/residual": row(
        _nnunet("ResidualEncoderUNet"), real(1, 16, 16)),
}  # fmt: skip

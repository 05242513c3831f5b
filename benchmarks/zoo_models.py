"""The models of the zoo: torchvision's, timm's, and those that other modules list."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import torchvision_cpu  # noqa: F401  (before torchvision and timm)
import zoo_einops
import zoo_package_tables
import zoo_torchaudio  # noqa: F401  (before torchaudio)
import zoo_transformers

IMAGE = 64
VIDEO_IMAGE, FRAMES = 56, 8

Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # positional, by keyword

# Image sizes other than the usual one: pattern of the model's name, pixels, why.
SIZES = (
    (
        r"torchvision/inception_v3",
        299,
        "the auxiliary head convolves what is left of 17 x 17 with 5 x 5",
    ),
    (r"torchvision/vit_h_14", 70, "patches of 14"),
    (r"torchvision/maxvit_t", 224, "windows of 7 after five halvings"),
    (r"torchvision/s3d", 224, "a last pooling over 2 x 7 x 7; 16 frames"),
    (
        r"timm/(eca_halonext|halonet|sehalonet|bat_resnext).*",
        256,
        "blocks of 8 pixels after five halvings",
    ),
    (r"timm/(halo2|lamhalo)botnet.*", 128, "blocks of 8 pixels after four halvings"),
    (r"timm/haloregnetz.*", 224, "blocks of 7 pixels after five halvings"),
    (r"timm/crossvit.*", 240, "patches of 12 and of 16 pixels must tile the image in two scales"),
    (r"timm/efficientformer_.*", 224, "a table of attention biases made for 7 x 7 positions"),
    (r"timm/inception_(v3|v4|resnet).*", 96, "convolutions without padding use up 64 pixels"),
)

# The smallest model, by parameters, of each family of timm 1.0.31 (see `family`).
TIMM = """
beit_base_patch16_224 beitv2_base_patch16_224 botnet26t_256 eca_botnext26ts_256 eca_halonext26ts
halo2botnet50ts_256 halonet_h1 haloregnetz_b lambda_resnet26t lamhalobotnet50ts_256 sebotnet33ts_256
sehalonet33ts bat_resnext26ts eca_resnet33ts eca_resnext26ts gcresnet33ts gcresnext26ts gernet_s
mobileone_s1 regnetz_b16 regnetz_b16_evos repvgg_a0 resnet32ts resnet50_clip_gap resnet50_mlp
resnext26ts seresnet33ts seresnext26ts cait_xxs24_224 coat_tiny coat_lite_tiny convit_tiny
convmixer_768_32 convnext_zepto_rms convnext_large_mlp convnextv2_atto cpubone_nano
crossvit_tiny_240 crossvit_9_dagger_240 csatv2 cs3darknet_s cs3darknet_focus_s cspdarknet53
cspresnet50 cspresnext50 darknet17 darknetaa53 sedarknet21 cspnext_tiny davit_tiny davit_base_fl
deepseek_vit_412m deit_tiny_patch16_224 deit3_small_patch16_224 deit_tiny_distilled_patch16_224
densenet121 densenetblur121d dla46x_c dpn48b edgenext_xx_small efficientformer_l1
efficientformerv2_s0 efficientnet_lite0 efficientnet_blur_b0 efficientnet_cc_b0_4e
efficientnet_b0_g16_evos efficientnet_b0_gn efficientnetv2_rw_t fbnetc_100 gc_efficientnetv2_rw_t
mixnet_s mnasnet_small mobilenet_edgetpu_100 mobilenetv1_100 mobilenetv2_035 semnasnet_050
spnasnet_100 tf_efficientnet_lite0 tf_efficientnet_cc_b0_4e tf_efficientnetv2_b0 tf_mixnet_s
tinynet_e efficientvim_m1 efficientvim_m1_dist efficientvit_b0 efficientvit_m0 eva_giant_patch14_224
eva02_base_patch16_clip_224 eva02_tiny_patch14_224 vit_small_patch16_lingbot
vit_tiny_patch16_dinov3_qkvb vit_pe_spatial_tiny_patch16_512 vit_small_patch16_rope_224 fasternet_t0
fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 ghostnetv2_100 ghostnetv3_050
hardcorenas_b hgnet_tiny hgnetv2_b0 hiera_tiny_224 hieradet_small sam2_hiera_tiny hrnet_w18_small
iformer_t iformer_m_distilled inception_next_atto inception_resnet_v2 inception_v3 inception_v4
lcnetv2_small levit_128s levit_conv_128s lowformer_b0 mambaout_femto coatnet_pico_rw_224
coatnet_bn_0_rw_224 coatnet_nano_cc_224 coatnet_rmlp_nano_rw_224 coatnext_nano_rw_224
maxvit_pico_rw_256 maxvit_rmlp_pico_rw_256 maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256
maxxvitv2_rmlp_base_rw_224 caformer_s18 convformer_s18 poolformer_s12 poolformerv2_s12 gmixer_12_224
gmlp_ti16_224 mixer_s16_224 resmlp_12_224 fbnetv3_b lcnet_035 mobilenetv3_small_050
mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium_075 tf_mobilenetv3_small_075
tf_mobilenetv3_small_minimal_100 mobilenetv5_base mobilevit_xxs mobilevitv2_050 mvitv2_tiny
mvitv2_small_cls naflexvit_base_patch16_parfac_gap naflexvit_base_patch16_par_gap
naflexvit_base_patch16_siglip nasnetalarge nest_tiny nextvit_small dm_nfnet_f0 eca_nfnet_l0
nf_ecaresnet26 nf_regnet_b0 nf_resnet26 nf_seresnet26 nfnet_l0 pit_ti_224 pit_ti_distilled_224
pnasnet5large pvt_v2_b0 pvt_v2_b2_li qwen3_vit_88m rdnet_tiny regnetv_040 regnetx_002 regnety_002
regnetz_005 repghostnet_050 repvit_m1 res2next50 resnest14d ecaresnet26t ecaresnetlight
ecaresnext26t_32x4d resnet10t resnet50_gn resnetaa34d resnetblur18 resnetrs50 resnext50_32x4d
senet154 seresnet18 seresnetaa50d seresnext26t_32x4d seresnextaa101d_32x8d wide_resnet50_2
resnetv2_18 resnetv2_50x1_bit resnetv2_50d_evos resnetv2_50d_frn resnetv2_50d_gn rexnet_100
rexnetr_100 selecsls42 legacy_senet154 legacy_seresnet18 legacy_seresnext26_32x4d sequencer2d_s
shvit_s1 skresnet18 skresnext50_32x4d starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
swinv2_tiny_window16_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m
twins_pcpvt_small twins_svt_small vgg11 vgg11_bn visformer_tiny aimv2_large_patch14_224
beit3_base_patch16_224 eva_large_patch14_196 flexivit_small vit_tiny_patch16_224
vit_xsmall_patch16_clip_224 vit_small_patch14_dinov2 vit_base_patch16_rpn_224
vit_base_patch16_siglip_gap_224 vit_base_patch16_xp_224 vit_tiny_r_s16_p8_224 vit_base_mci_224
vit_srelpos_small_patch16_224 vit_relpos_medium_patch16_cls_224 vit_relpos_small_patch16_rpn_224
samvit_base_patch16_224 vitamin_small_224 volo_d1_224 eca_vovnet39b ese_vovnet19b_slim_dw
ese_vovnet39b_evos vovnet39a legacy_xception xception41p xcit_nano_12_p8_224
""".split()  # noqa: SIM905

# Words that tell families of one timm module apart: those that must be read with the next word, and
# architectures.
PREFIXES = frozenset(("bat", "dm", "eca", "ese", "gc", "lambda", "legacy", "nf", "tf", "wide"))
ARCHITECTURES = """
gn evos frn cc conv clip cls dagger distilled dist fl focus hybrid li lite mci minimal pcpvt svt
rmlp rope rpn siglip dinov2 dinov3 pe par deit3 eva02 blur xp bn bit mlp
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Entry:
    """One model of the zoo, built without trained weights."""

    name: str
    group: str
    image: int
    frames: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    stages: int = 4
    typical: bool = False  # decoupled as a user does it: cuts found, self-check on

    def prepare(self) -> None:
        """Import what is slow to import, for the processes that fork from this one."""
        if self.name in zoo_package_tables.TABLE:
            zoo_package_tables.TABLE[self.name].prepare()

    def build(self) -> nn.Module:
        """The model, randomly initialised."""
        library, name = self.name.split("/")
        if library == "transformers":
            return zoo_transformers.build(name)
        if library in zoo_einops.NAMES:
            return zoo_einops.build(library, name)
        if self.name in zoo_package_tables.TABLE:
            return zoo_package_tables.TABLE[self.name].build()
        if library == "timm":
            import timm

            return timm.create_model(name, **self.options)
        from torchvision.models import get_model

        if name.startswith("mvit"):
            return _small_mvit(name, self.image, self.frames)
        return get_model(name, weights=None, **self.options)

    def example(self, batch: int, seed: int, dtype: torch.dtype) -> Inputs:
        """Random images ``(batch, 3, size, size)``, or clips ``(batch, 3, frames, size, size)``; or
        what its package wants.
        """
        library, name = self.name.split("/")
        if library == "transformers":
            return (), zoo_transformers.example(name, batch, seed, dtype)
        if library in zoo_einops.NAMES:
            return zoo_einops.example(library, name, batch, seed, dtype), {}
        if self.name in zoo_package_tables.TABLE:
            return zoo_package_tables.TABLE[self.name].example(batch, seed, dtype)
        frames = (self.frames,) if self.frames else ()
        generator = torch.Generator().manual_seed(seed)
        shape = batch, 3, *frames, self.image, self.image
        return (torch.randn(shape, generator=generator).to(dtype),), {}


def _small_mvit(name: str, image: int, frames: int) -> nn.Module:
    # Its builder fixes the size of the clips, for which position embeddings are made; the class
    # does not.
    from unittest import mock

    from torchvision.models import get_model
    from torchvision.models.video import mvit

    original = mvit.MViT
    sizes = {"spatial_size": (image, image), "temporal_size": frames}
    with mock.patch.object(mvit, "MViT", lambda **options: original(**{**options, **sizes})):
        return get_model(name, weights=None)


def catalogue() -> list[Entry]:
    """Every model of the sweep, in a fixed order."""
    entries = [*_torchvision(), *_timm()]
    entries += [Entry(f"transformers/{name}", "transformers", 0) for name in zoo_transformers.TABLE]
    for library, names in zoo_einops.NAMES.items():
        entries += [Entry(f"{library}/{name}", "einops", 0) for name in names]
    for name in zoo_package_tables.TABLE:
        entries.append(Entry(name, "packages", 0, stages=3, typical=True))
    return entries


def _torchvision() -> Iterator[Entry]:
    from torchvision import models

    modules = {"classification": models, "segmentation": models.segmentation, "video": models.video}
    for group, module in modules.items():
        for name in models.list_models(module=module):
            image = _image_size(f"torchvision/{name}", VIDEO_IMAGE if group == "video" else IMAGE)
            options: dict[str, Any] = {}
            if group == "segmentation":
                options["weights_backbone"] = None
                if not name.startswith("lraspp"):
                    options["aux_loss"] = True  # a second output, made early
            elif name.startswith("vit_"):
                options["image_size"] = image
            frames = 0 if group != "video" else 2 * FRAMES if name == "s3d" else FRAMES
            yield Entry(f"torchvision/{name}", group, image, frames, options)


def _timm() -> Iterator[Entry]:
    import timm

    for name in TIMM:
        image = _image_size(f"timm/{name}", IMAGE)
        fixed = timm.get_pretrained_cfg_value(name, "fixed_input_size")
        options = {"img_size": image} if fixed else {}
        yield Entry(f"timm/{name}", "timm", image, options=options)


def _image_size(name: str, usual: int) -> int:
    return next((image for pattern, image, _ in SIZES if re.fullmatch(pattern, name)), usual)


def family(name: str) -> str:
    """The family of a timm model: its module, its leading word without the size, and its
    architecture if named.
    """
    import timm

    words = name.split("_")
    count = 1 if words[0] in PREFIXES else 0
    stem = re.match(r"[a-z]+?(v\d)?(?=\d|$)", words[count])
    leading = "_".join([*words[:count], stem.group() if stem else words[count]])
    if name.startswith("swinv2_cr"):
        leading = "swinv2_cr"
    kind = next((word for word in ARCHITECTURES if word in words), "")
    module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    return f"{module}/{leading}{kind and '+' + kind}"


def families_without_member() -> list[str]:
    """Families of the installed timm that `TIMM` has no model of; its test miniatures (``test_*``)
    are no family.
    """
    import timm

    known = {family(name) for name in TIMM}
    return sorted(
        {family(name) for name in timm.list_models() if not name.startswith("test_")} - known
    )


def parameter_count(entry: Entry) -> int:
    """Number of parameters, counted without memory where the model can be built so. Not under a
    device of no data where that is the first import of a package, which may make tables.
    """
    if entry.typical:
        return sum(parameter.numel() for parameter in entry.build().parameters())
    try:
        with torch.device("meta"):
            model = entry.build()
    except Exception:  # some constructors read numbers off their tensors
        model = entry.build()
    return sum(parameter.numel() for parameter in model.parameters())

"""How many of the models that people use the transform covers, and whether exact mode equals
backprop on them.

    python benchmarks/zoo.py                              all models, then docs/coverage.md
    python benchmarks/zoo.py --group transformers         one group, then its part of the page
    python benchmarks/zoo.py --only 'resnet|vit' --list   which models a pattern names
    python benchmarks/zoo.py --resume out/zoo.jsonl       go on where a sweep stopped
    python benchmarks/zoo.py --resume out/zoo.jsonl --retry   the same; models that missed once more

Every torchvision model for classification, segmentation and video, one timm model of each family,
on small images, and the architectures of transformers that `zoo_transformers` lists: traced, cut
into four stages at equal node counts, then compared with the model itself, bit for bit, on one
thread. Then the search looks for four stages with measured costs, and its slowest stage is put
beside the bound. Each model has a process of its own; results are written as they come.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import re
import resource
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_structure

import torchvision_cpu  # noqa: F401  (before torchvision and timm)
import zoo_transformers

ROOT = Path(__file__).resolve().parent.parent
STAGES, STEPS, SEED, LEARNING_RATE = 4, 3, 0, 0.01
BATCH, IMAGE = 2, 64
VIDEO_IMAGE, FRAMES = 56, 8
LARGEST = 150_000_000  # parameters
EQUAL = "equal"

Row = dict[str, Any]
Snapshot = dict[str, Tensor | None]
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


# --- the models -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One model of the zoo, built without trained weights."""

    name: str
    group: str
    image: int
    frames: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The model, randomly initialised."""
        library, name = self.name.split("/")
        if library == "transformers":
            return zoo_transformers.build(name)
        if library == "timm":
            import timm

            return timm.create_model(name, **self.options)
        from torchvision.models import get_model

        if name.startswith("mvit"):
            return _small_mvit(name, self.image, self.frames)
        return get_model(name, weights=None, **self.options)

    def example(self, batch: int, seed: int, dtype: torch.dtype) -> Inputs:
        """Random images ``(batch, 3, size, size)``, or clips ``(batch, 3, frames, size, size)``; or
        keyword inputs.
        """
        if self.group == "transformers":
            return (), zoo_transformers.example(self.name.partition("/")[2], batch, seed, dtype)
        frames = (self.frames,) if self.frames else ()
        generator = torch.Generator().manual_seed(seed)
        return (
            torch.randn(batch, 3, *frames, self.image, self.image, generator=generator).to(dtype),
        ), {}


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
    import timm
    from torchvision import models

    entries = []
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
            entries.append(Entry(f"torchvision/{name}", group, image, frames, options))
    for name in TIMM:
        image = _image_size(f"timm/{name}", IMAGE)
        fixed = timm.get_pretrained_cfg_value(name, "fixed_input_size")
        entries.append(
            Entry(f"timm/{name}", "timm", image, options={"img_size": image} if fixed else {})
        )
    for name in zoo_transformers.TABLE:
        entries.append(Entry(f"transformers/{name}", "transformers", 0))
    return entries


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
    """Number of parameters, counted without memory where the model can be built on the meta
    device.
    """
    try:
        with torch.device("meta"):
            model = entry.build()
    except Exception:  # some constructors read numbers off their tensors
        model = entry.build()
    return sum(parameter.numel() for parameter in model.parameters())


def wake(model: nn.Module) -> None:
    """Add noise to every parameter that starts constant.

    A branch or head that starts at zero would multiply all gradients behind it by zero, and
    comparing zeros with zeros shows nothing.
    """
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(
                    0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                )


# --- comparing ------------------------------------------------------------------------------------


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a nested output, in order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def loss(output: Any, _target: object = None) -> Tensor:
    """Weighted mean squares of every float tensor of the output; the weights differ per element,
    nothing is drawn.
    """
    total = torch.zeros(())
    for index, value in enumerate(value for value in tensors(output) if value.is_floating_point()):
        weight = torch.linspace(0.5, 1.5, max(1, value.numel()), dtype=value.dtype).view(
            value.shape
        )
        total = total + (value * weight).square().mean() / (index + 1)
    return total


def seed_everything(seed: int) -> None:
    """The generators that models draw from."""
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 (what models draw from)
    torch.manual_seed(seed)


def snapshot(
    model: nn.Module, outputs: Any, gradients: dict[int, Tensor | None], parameters: bool
) -> Snapshot:
    """Copies of everything that must be equal after a step."""
    found: Snapshot = {f"output {index}": value for index, value in enumerate(tensors(outputs))}
    found |= {
        f"gradient of {name}": gradients.get(id(value)) for name, value in model.named_parameters()
    }
    found |= {f"buffer {name}": value for name, value in model.named_buffers()}
    if parameters:
        found |= {f"parameter {name}": value for name, value in model.named_parameters()}
    return {key: None if value is None else value.detach().clone() for key, value in found.items()}


def difference(expected: Snapshot, got: Snapshot) -> str:
    """The first thing that differs in any bit, and by how much; empty where nothing does."""
    if expected.keys() != got.keys():
        return f"{sorted(expected.keys() ^ got.keys())[0]} is in only one of them"
    for key, want in expected.items():
        have = got[key]
        if want is None or have is None:
            if want is not have:
                return f"{key}: " + (
                    "none in eager, one here" if want is None else "one in eager, none here"
                )
        elif want.shape != have.shape or want.dtype != have.dtype:
            eager = f"{want.dtype} {tuple(want.shape)} in eager"
            return f"{key}: {eager}, {have.dtype} {tuple(have.shape)} here"
        elif not torch.equal(_bits(want), _bits(have)):
            if torch.equal(want, have):
                return f"{key}: zeros of another sign"
            gap, size = (want.double() - have.double()).abs().max(), want.double().abs().max()
            return f"{key} differs by up to {gap:.1e}, its largest value is {size:.1e}"
    return ""


def _bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def first_difference(expected: Iterable[Snapshot], got: Iterable[Snapshot]) -> str:
    """`difference` over the steps of two runs."""
    for number, (one, other) in enumerate(zip(expected, got, strict=True), start=1):
        text = difference(one, other)
        if text:
            return f"step {number}, {text}"
    return ""


# --- one model ------------------------------------------------------------------------------------


class Subject:
    """A model, its start state, its batches, and backprop's results to compare with."""

    def __init__(self, entry: Entry, dtype: torch.dtype) -> None:
        self.entry, self.dtype = entry, dtype
        seed_everything(SEED)
        self.model = entry.build().to(dtype).train()
        wake(self.model)
        self.batches = [entry.example(BATCH, SEED + number, dtype) for number in range(STEPS)]
        self.start = {name: value.detach().clone() for name, value in self._state()}
        self.gradients: dict[int, Tensor | None] = {}
        self.seconds: list[float] = []

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    def restore(self) -> None:
        """Back to the start, without gradients; a buffer that the model has replaced by another
        size is put back.
        """
        with torch.no_grad():
            for name, value in list(self._state()):
                if value.shape == self.start[name].shape:
                    value.copy_(self.start[name])
                else:
                    owner, _, key = name.rpartition(".")
                    setattr(self.model.get_submodule(owner), key, self.start[name].clone())
        self.model.zero_grad(set_to_none=True)
        self.gradients.clear()

    def sgd(self, parameters: Any) -> torch.optim.Optimizer:
        """An optimiser that notes the gradients it is about to use."""
        optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9)

        def note(optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self.gradients[id(parameter)] = (
                        None if parameter.grad is None else parameter.grad.clone()
                    )

        optimizer.register_step_pre_hook(note)
        return optimizer

    def run(self, step: Callable[[Inputs], Any]) -> Iterator[Snapshot]:
        """Take `STEPS` steps from the start, each under its own seed."""
        self.seconds = []
        for number, x in enumerate(self.batches):
            seed_everything(SEED + 100 + number)
            begin = time.perf_counter()
            outputs = step(x)
            self.seconds.append(time.perf_counter() - begin)
            yield snapshot(self.model, outputs, self.gradients, parameters=number == STEPS - 1)

    def backprop(self) -> Iterator[Snapshot]:
        """Ordinary training."""
        self.restore()
        optimizer = self.sgd(self.model.parameters())

        def step(x: Inputs) -> Any:
            optimizer.zero_grad()
            outputs = self.model(*x[0], **x[1])
            loss(outputs).backward()
            optimizer.step()
            return outputs

        return self.run(step)

    def exact(self, decoupled: Any) -> Iterator[Snapshot]:
        """Training in exact mode."""
        import dni_fx

        self.restore()
        trainer = dni_fx.Trainer(decoupled, loss=loss, optimizer=self.sgd)
        return self.run(lambda x: trainer.step(*x[0], **x[1]).outputs)

    def call(self, module: nn.Module, x: Inputs) -> tuple[Snapshot, Any]:
        """Forward and backward of ``module`` from the start state; the structure of its outputs
        comes along.
        """
        self.restore()
        seed_everything(SEED + 100)
        outputs = module(*x[0], **x[1])
        loss(outputs).backward()
        gradients = {id(parameter): parameter.grad for parameter in self.model.parameters()}
        return snapshot(self.model, outputs, gradients, parameters=False), tree_structure(outputs)

    def compare_call(self, decoupled: nn.Module, training: bool, batch: int) -> str:
        """The composed stages against the model in one mode: outputs, gradients, buffers."""
        x = self.entry.example(batch, SEED, self.dtype)
        try:
            self.model.train(training)
            expected, structure = self.call(self.model, x)
            decoupled.train(training)
            got, got_structure = self.call(decoupled, x)
        finally:
            decoupled.train()
        if structure != got_structure:
            return f"the outputs are nested as {got_structure}, not as {structure}"[:300]
        return difference(expected, got)


def equal_cuts(points: Any, stages: int) -> list[str]:
    """Names of legal cuts nearest to equal numbers of nodes."""
    places = [p for i, p in enumerate(points) if i == 0 or p.crossing != points[i - 1].crossing]
    legal = [i for i, p in enumerate(places) if p.legal]
    chosen: list[int] = []
    for k in range(1, stages):
        left = [i for i in legal if not chosen or i > chosen[-1]]
        left = left[: len(left) - (stages - 1 - k)] or left
        if left:
            chosen.append(min(left, key=lambda i: abs(i + 1 - k * len(places) / stages)))
    return [places[i].name for i in chosen]


def examine(entry: Entry, dtype: torch.dtype, check: bool, report: Callable[[Row], None]) -> None:
    """Everything about one model; ``report`` is given the row again after every part, so that a
    crash loses little.
    """
    row: Row = {
        "name": entry.name,
        "group": entry.group,
        "image": entry.image,
        "dtype": str(dtype).rpartition(".")[2],
    }

    def guarded(part: str, action: Callable[[], None]) -> bool:
        row["status"] = part
        report(row)
        try:
            action()
        except Exception as error:
            row["reason"] = f"{type(error).__name__}: {str(error).strip()}"[:2000]
            frames = traceback.extract_tb(error.__traceback__)[-8:]
            row["where"] = [
                f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames
            ]
            report(row)
            return False
        report(row)
        return True

    def verdict(text: str) -> str:
        return text or EQUAL

    def build() -> None:
        row["parameters"] = parameter_count(entry)
        if row["parameters"] <= LARGEST:
            found.append(Subject(entry, dtype))

    def eager() -> None:
        reference.extend(subject.backprop())
        row["eager_seconds"] = min(subject.seconds)
        first = [value for key, value in reference[0].items() if key.startswith("gradient")]
        row["live"] = sum(value is not None and bool(value.any()) for value in first) / max(
            1, len(first)
        )
        row["finite"] = all(
            value is None or bool(value.isfinite().all()) for value in reference[-1].values()
        )
        row["repeatable"] = verdict(first_difference(reference, subject.backprop()))

    def transform() -> None:
        import dni_fx

        subject.restore()
        begin = time.perf_counter()
        args, kwargs = subject.batches[0]
        cuts = equal_cuts(dni_fx.list_cut_points(subject.model, args, kwargs), STAGES)
        decoupled = dni_fx.decouple(
            subject.model,
            cuts,
            gradients="exact",
            example_inputs=args,
            example_kwargs=kwargs,
            check=check,
        )
        row["transform_seconds"] = time.perf_counter() - begin
        facts = decoupled.plan.report
        assert facts is not None
        row["rung"], row["nodes"] = facts.rung, sum(stage.nodes for stage in facts.stages)
        row["notes"] = [str(note) for note in facts.notes]
        row["stages"], row["interfaces"] = len(decoupled.stages), len(decoupled.interfaces)
        row["implied"] = sum(interface.implied for interface in decoupled.interfaces)
        transformed.append(decoupled)

    def compare(part: str, action: Callable[[], str]) -> None:
        if guarded(part, lambda: row.__setitem__(part, verdict(action()))):
            return
        row[part] = row.pop("reason")
        row.setdefault("wheres", {})[part] = row.pop("where")

    def evaluation() -> str:
        text = subject.compare_call(transformed[0], training=False, batch=BATCH + 1)
        if text and not subject.compare_call(transformed[0], training=False, batch=BATCH):
            return f"only with another batch size than the example's: {text}"
        return text

    def search() -> None:
        import dni_fx

        subject.restore()
        begin = time.perf_counter()
        args, kwargs = subject.batches[0]
        plan = dni_fx.plan_cuts(subject.model, args, example_kwargs=kwargs, stages=STAGES)
        row["plan_seconds"] = time.perf_counter() - begin
        assert plan.report is not None
        found = plan.report.search
        assert found is not None
        row["slowest"], row["bound"], row["gap"] = found.slowest, found.bound, found.gap
        row["sure"], row["free"] = found.exact, bool(plan.assignment)
        row["share"] = found.slowest / sum(
            stage.cost.seconds for stage in plan.stages if stage.cost is not None
        )
        row["net"] = found.slowest / sum(
            s.cost.seconds - s.cost.sources for s in plan.stages if s.cost is not None
        )

    found: list[Subject] = []
    reference: list[Snapshot] = []
    transformed: list[Any] = []
    if not guarded("build", build):
        return
    if not found:
        row.update(status="left out", reason=f"{row['parameters'] / 1e6:.0f} M parameters")
        report(row)
        return
    subject = found[0]
    if not guarded("eager", eager) or not guarded("transform", transform):
        return
    compare("train", lambda: subject.compare_call(transformed[0], training=True, batch=BATCH))
    compare("eval", evaluation)
    compare("exact", lambda: first_difference(reference, subject.exact(transformed[0])))
    row["exact_seconds"] = min(subject.seconds, default=None)
    if not guarded("search", search):
        row["search"] = row.pop("reason")
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    row["status"] = "done"
    report(row)


# --- the sweep ------------------------------------------------------------------------------------


def _work(entry: Entry, dtype: torch.dtype, check: bool, memory: float, pipe: Connection) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    examine(entry, dtype, check, pipe.send)


@dataclass
class _Running:
    process: Any
    entry: Entry
    deadline: float
    row: Row = field(default_factory=dict)


def sweep(
    entries: list[Entry],
    *,
    dtype: torch.dtype,
    check: bool,
    workers: int,
    timeout: float,
    memory: float,
) -> Iterator[Row]:
    """Rows as they are finished; a process that hangs or dies gives the row that it had come to.

    Args:
        entries: what to examine.
        dtype: of parameters and inputs.
        check: run the transform's own self-check too, so that its ladder may choose another tracer.
        workers: processes at a time.
        timeout: seconds for one model.
        memory: GiB of address space for one process.
    """
    context = multiprocessing.get_context(
        "fork"
    )  # children share the imports; nothing has run here, so no threads
    queue, running = list(reversed(entries)), dict[Connection, _Running]()
    while queue or running:
        while queue and len(running) < workers:
            entry = queue.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(entry, dtype, check, memory, sender))
            process.start()
            sender.close()
            running[receiver] = _Running(process, entry, time.monotonic() + timeout)
        ready = wait(list(running), timeout=1.0)
        for pipe, job in list(running.items()):
            ended = ""
            if pipe in ready:
                try:
                    job.row = pipe.recv()
                    continue
                except EOFError:
                    job.process.join()
                    ended = f"the process ended with code {job.process.exitcode}"
            elif time.monotonic() > job.deadline:
                job.process.kill()
                job.process.join()
                ended = f"no result after {timeout:.0f} s"
            if ended:
                if job.row.get("status") not in ("done", "left out") and "reason" not in job.row:
                    part = job.row.setdefault("status", "build")
                    job.row[part if part in ("train", "eval", "exact") else "reason"] = ended
                pipe.close()
                del running[pipe]
                yield {"name": job.entry.name, "group": job.entry.group} | job.row


def is_miss(row: Row) -> bool:
    """Whether the library, not the model or the size limit, has something to answer for."""
    if row["status"] in ("build", "eager", "left out"):
        return False
    return any(row.get(part) != EQUAL for part in ("train", "eval", "exact")) or "search" in row


def progress(row: Row) -> str:
    """One line about one row."""
    if row["status"] in ("build", "eager", "left out", "transform"):
        return f"{row['name']}: {row['status']}: {row.get('reason', '').splitlines()[0][:160]}"
    parts = [
        f"{part} {'equal' if row.get(part) == EQUAL else 'NOT EQUAL'}"
        for part in ("train", "eval", "exact")
    ]
    size = f"{row['nodes']} nodes, {row['transform_seconds']:.1f} s"
    return f"{row['name']}: {row['rung']}, {size}, {', '.join(parts)}"


def read_rows(path: Path) -> dict[str, Row]:
    """The last row of each model in a file of results."""
    rows = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
    return {row["name"]: row for row in rows}


# --- the page -------------------------------------------------------------------------------------

# The parts of the page, each with a title of its own, and their groups.
PARTS = {
    "# Coverage": ("classification", "segmentation", "video", "timm"),
    "# transformers": ("transformers",),
}
GROUPS = tuple(group for groups in PARTS.values() for group in groups)


def replace_part(page: str, part: str) -> str:
    """The page with the part of that title written anew; the other parts stay as they are."""
    found = {text.partition("\n")[0]: text for text in [*re.split(r"(?m)^(?=# )", page), part]}
    return "\n".join(found[title].rstrip("\n") + "\n" for title in PARTS if title in found)


def page(title: str, rows: list[Row], command: str) -> str:
    """One part of the page of coverage as Markdown."""
    import timm
    import torchvision
    import transformers

    groups = PARTS[title] if len(PARTS[title]) > 1 else ()
    inputs, libraries = "", f"transformers {transformers.__version__}"
    if groups:
        inputs = (
            f", images of {IMAGE} and clips of {VIDEO_IMAGE} pixels unless the table says otherwise"
        )
        libraries = f"torchvision {torchvision.__version__}, timm {timm.__version__}"

    asked = [row for row in rows if row["status"] not in ("build", "eager", "left out")]
    traced = [row for row in asked if "rung" in row]
    measures: dict[str, list[Row]] = {"models": asked, "traced and split": traced}
    for rung, _ in Counter(row["rung"] for row in traced).most_common():
        measures[f"by {rung}"] = [row for row in traced if row["rung"] == rung]
    measures["exact mode equals backprop, bit for bit"] = [
        row for row in asked if row.get("exact") == EQUAL
    ]
    measures["composed stages equal the model, training"] = [
        row for row in asked if row.get("train") == EQUAL
    ]
    measures["composed stages equal the model, evaluation"] = [
        row for row in asked if row.get("eval") == EQUAL
    ]
    dtypes = sorted({row["dtype"] for row in asked if "dtype" in row})
    text = [
        title,
        "",
        f"Written by `{command}`. Do not edit.",
        "",
        f"Each model is traced, cut into {STAGES} stages at equal node counts, and compared with "
        "itself: the composed stages in training and in evaluation mode (outputs, every gradient, "
        f"buffers; evaluation with another batch size than the example's), and {STEPS} steps of "
        "SGD with momentum in exact mode against backprop (outputs, all gradients, buffers and, at "
        "the end, parameters). Equal means every bit. No trained weights; parameters that start "
        "constant get noise, so that no branch is multiplied by zero.",
        "",
        f"Seed {SEED}, {', '.join(dtypes)}, batch {BATCH}{inputs}, one thread. Python "
        f"{platform.python_version()}, torch {torch.__version__}, {libraries}.",
        "",
        *([] if groups else [zoo_transformers.INTRODUCTION, ""]),
        " | ".join(["| | all", *groups]) + " |",
        "| --- | ---: |" + " ---: |" * len(groups),
    ]
    for name, members in measures.items():
        counts = Counter(row["group"] for row in members)
        text.append(
            " | ".join([f"| {name}", str(len(members)), *(str(counts[group]) for group in groups)])
            + " |"
        )
    text += _search_summary([row for row in asked if "gap" in row])
    misses = [row for row in rows if is_miss(row)]
    text += ["", f"## Misses: {len(misses)}", ""]
    if misses:
        text += ["| model | what | why |", "| --- | --- | --- |"]
    for row in misses:
        reasons = {"traced and split": row["reason"]} if row["status"] == "transform" else {}
        reasons |= {"search": row["search"]} if "search" in row else {}
        reasons |= {
            part: row[part] for part in ("train", "eval", "exact") if row.get(part, EQUAL) != EQUAL
        }
        text += [
            f"| {row['name']} | {part} | {_cell(reason)} |" for part, reason in reasons.items()
        ]
    unsteady = [row for row in asked if row.get("repeatable", EQUAL) != EQUAL]
    if unsteady:
        text += [
            "",
            "## Eager differs from itself",
            "",
            "Two runs of backprop from one seed are not equal:",
            "",
        ]
        text += [f"* {row['name']}: {_cell(row['repeatable'])}" for row in unsteady]
    outside = [row for row in rows if row["status"] in ("build", "eager", "left out")]
    text += ["", f"## Not asked of the transform: {len(outside)}", ""]
    text += (
        [f"Over {LARGEST // 10**6} M parameters, or the model's own training step fails.", ""]
        if outside
        else []
    )
    text += [
        f"* {row['name']} ({row['status']}): {_cell(row.get('reason', ''))}" for row in outside
    ]
    if groups:
        text += ["", "## Image sizes", ""]
        text += [f"* {image} pixels for `{pattern}`: {reason}" for pattern, image, reason in SIZES]
    text += ["", "## Every model", ""]
    titles = (
        "model | pixels | nodes | rung | interfaces | implied | train | eval | exact | transform, s"
    )
    text += [
        f"| {titles} | slowest, ms | bound, ms | gap | of all | of the net | best of | notes |"
    ]
    text += [
        "| --- | ---: | ---: | --- | ---: | ---: | --- | --- | --- |"
        + " ---: |" * 6
        + " --- | --- |"
    ]
    text += [_table_row(row) for row in asked]
    return "\n".join(text) + "\n"


def _search_summary(rows: list[Row]) -> list[str]:
    """What the search found over all models."""
    if not rows:
        return []
    median = lambda name: statistics.median(row[name] for row in rows)  # noqa: E731
    sure = Counter(row["sure"] or "not sure" for row in rows)
    return [
        "", "## The cuts that the search finds", "",
        f"{STAGES} stages with measured costs, the sources that `gradients=\"auto\"` puts there "
        f"included. Over {len(rows)} models: median gap to the bound {median('gap'):.1%}, largest "
        f"{max(row['gap'] for row in rows):.1%}; the slowest stage has {median('share'):.1%} of "
        f"all work of the stages, sources included (median), or {median('net'):.0%} of what the "
        "network alone takes. The search was exact over "
        + ", ".join(f"{name} ({count} models)" for name, count in sure.most_common())
        + f". {sum(row['free'] for row in rows)} plans have stages that are not contiguous in "
        "program order. Tracing, measuring and search take "
        f"{median('plan_seconds'):.1f} s (median).",
    ]  # fmt: skip


def _cell(text: str) -> str:
    first = text.strip().splitlines()[0] if text.strip() else ""
    return (
        re.sub(r"/[^\s'\"(]*/site-packages/", "", first)
        .replace(f"{ROOT}/", "")
        .replace("|", "\\|")[:300]
    )


def _summary(notes: list[str]) -> list[str]:
    """The notes, with one line for all opaque modules."""
    opaque = [note for note in notes if "is one opaque node" in note]
    if len(opaque) > 1:
        opaque = [f"{opaque[0]} (and {len(opaque) - 1} more opaque)"]
    return opaque + [note for note in notes if "is one opaque node" not in note]


def _table_row(row: Row) -> str:
    marks = ["yes" if row.get(part) == EQUAL else "no" for part in ("train", "eval", "exact")]
    notes = _summary(row.get("notes", []))
    if not row.get("finite", True):
        notes.append("eager itself is not finite")
    if row.get("stages", STAGES) != STAGES:
        notes.append(f"{row['stages']} stages")
    seconds = f"{row['transform_seconds']:.1f}" if "transform_seconds" in row else ""
    cells = [row["name"], row.get("image") or "", row.get("nodes", ""), row.get("rung", "none")]
    cells += [row.get("interfaces", ""), row.get("implied", ""), *marks, seconds]
    if "gap" in row:
        cells += [f"{row['slowest'] * 1e3:.1f}", f"{row['bound'] * 1e3:.1f}", f"{row['gap']:.1%}"]
        cells += [f"{row['share']:.1%}", f"{row['net']:.0%}", row["sure"]]
    else:
        cells += [""] * 6
    cells.append(_cell("; ".join(notes).replace("\n", " ")))
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="models whose name contains a match"
    )
    parser.add_argument("--group", choices=GROUPS, help="models of one group")
    parser.add_argument(
        "--limit", type=int, help="at most so many models, evenly spread over the list"
    )
    parser.add_argument("--list", action="store_true", help="print the models and stop")
    parser.add_argument("--float64", action="store_true", help="double precision instead of single")
    parser.add_argument(
        "--check", action="store_true", help="with the self-check, which may change the rung"
    )
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds for one model")
    parser.add_argument(
        "--memory", type=float, default=12.0, help="GiB of address space for one process"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="keep the results in FILE and add what is missing",
    )
    parser.add_argument(
        "--retry", action="store_true", help="with --resume: examine models that missed once more"
    )
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="default: docs/coverage.md, after a full sweep"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    everything = catalogue()
    entries = [entry for entry in everything if re.search(arguments.only, entry.name)]
    entries = [entry for entry in entries if arguments.group in (None, entry.group)]
    if arguments.limit is not None:
        count = min(arguments.limit, len(entries))
        entries = [entries[index * len(entries) // count] for index in range(count)]
    if arguments.list:
        for entry in entries:
            print(f"{entry.name}  {entry.group}  {entry.image} px  {entry.options or ''}".rstrip())
        print(
            f"{len(entries)} models; families of timm without one: "
            f"{', '.join(families_without_member()) or 'none'}"
        )
        return

    path: Path = arguments.resume or ROOT / "out" / (
        "zoo64.jsonl" if arguments.float64 else "zoo.jsonl"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    known = read_rows(path) if arguments.resume and path.exists() else {}
    if not arguments.resume:
        path.write_text("")
    again = {name for name, row in known.items() if arguments.retry and is_miss(row)}
    missing = [entry for entry in entries if entry.name not in known or entry.name in again]
    import dni_fx  # noqa: F401  (children share it)

    rows = sweep(
        missing,
        dtype=torch.float64 if arguments.float64 else torch.float32,
        check=arguments.check,
        workers=arguments.workers,
        timeout=arguments.timeout,
        memory=arguments.memory,
    )
    with path.open("a") as file:
        for number, row in enumerate(rows, start=1):
            print(json.dumps(row), file=file, flush=True)
            print(f"[{number}/{len(missing)}] {progress(row)}", flush=True)
            known[row["name"]] = row
    ordered = [known[entry.name] for entry in everything if entry.name in known]
    misses = sum(is_miss(row) for row in ordered)
    print(f"{len(ordered)} models, {misses} misses")
    target: Path = arguments.write or ROOT / "docs" / "coverage.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = [
        flag for flag, on in (("--float64", arguments.float64), ("--check", arguments.check)) if on
    ]
    for title, groups in PARTS.items():
        part = [row for row in ordered if row["group"] in groups]
        whole = (
            len(part) == sum(entry.group in groups for entry in everything)
            and not arguments.float64
        )
        if whole or (part and arguments.write):
            command = " ".join(["python benchmarks/zoo.py", *flags])
            before = target.read_text() if target.exists() else ""
            target.write_text(replace_part(before, page(title, part, command)))


if __name__ == "__main__":
    main()

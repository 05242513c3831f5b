"""The zoo: small models, written as users write them, that nobody prepared for a graph transform.

Each ``Case`` holds one model, its inputs and the cuts to try. Inputs and parameters are drawn from
the global generator, so that whoever seeds it decides on them. The oracles
(``tests/helpers/oracles.py``) do the checking.
"""

from __future__ import annotations

from torch import nn

from .calls import (
    DataclassOutput,
    DictOutput,
    EarlyOutputs,
    NamedTupleOutput,
    NestedInput,
    OpenArguments,
    OptionalArguments,
    SeveralInputs,
    nested_input,
)
from .cases import Case, classify, floats, labels, rows, tokens, with_keyword
from .controls import (
    Factories,
    GroupNormNet,
    Routing,
    ShapeControl,
    SqueezeExcite,
    TensorAttribute,
    TrainingControl,
    channels_last_convnet,
    channels_last_rows,
    gated,
    hooked_chain,
    normed_chain,
)
from .feedforward import (
    ConvNet,
    DenseNet,
    FanOut,
    Inception,
    PreActivationNet,
    ResidualNet,
    TwoTowers,
    UNet,
    inplace_chain,
    mlp_chain,
    norm_dropout_chain,
)
from .sequences import (
    GPT,
    CrossAttention,
    GRUModel,
    LSTMModel,
    RotaryModel,
    TimeLoop,
    TransformerModel,
    UnbindLoop,
)
from .shared import (
    InplaceAfterCut,
    MutateThroughView,
    ReadAfterMutation,
    ReusedThrice,
    ReusedTwice,
    SetitemAfterCut,
    Siamese,
    SqueezeEinsum,
    TiedAutoencoder,
    TiedLanguageModel,
    Views,
)
from .special import (
    AutocastInside,
    BinaryNet,
    DetachedBranch,
    NoGradTeacher,
    RowDropNet,
    buffer_chain,
    checkpointed_chain,
    frozen_chain,
    frozen_norm_chain,
    rebinding_chain,
    stochastic_depth_chain,
)

_image = rows(3, 8, 8)


_weight_norm = nn.utils.parametrizations.weight_norm


_spectral_norm = nn.utils.parametrizations.spectral_norm


ZOO: tuple[Case, ...] = (
    Case("mlp_chain", mlp_chain, rows(6), ("1", "3", "5"), labels(3), classify),
    Case("norm_dropout_chain", norm_dropout_chain, rows(6), ("3", "6"), labels(3), classify),
    Case(
        "inplace_chain",
        inplace_chain,
        rows(6),
        ("0", "2"),
        notes="in-place ReLU right after each cut",
    ),
    Case("conv_norm_chain", ConvNet, _image, ("bn1", "conv2"), labels(4), classify),
    Case(
        "channels_last",
        channels_last_convnet,
        channels_last_rows,
        ("conv1", "bn2"),
        labels(4),
        classify,
    ),
    Case("residual", ResidualNet, rows(6), ("stem", "blocks.0", "blocks.1.fc1")),
    Case(
        "preactivation_inplace",
        PreActivationNet,
        _image,
        ("stem", "layer1", "layer2.conv1", "layer2"),
    ),
    Case("dense", DenseNet, rows(6), ("layers.0", "layers.1", "layers.2")),
    Case("unet", UNet, rows(2, 8, 8), ("down2", "middle", "up2")),
    Case("two_towers", TwoTowers, floats((6,), (5,)), ("left.1", "left", "right.1", "right")),
    Case(
        "fan_out",
        FanOut,
        rows(6),
        ("stem", "a", "b", "c"),
        notes="one value with uses in four stages",
    ),
    Case("inception", Inception, rows(2, 6, 6), ("stem", "branch3", "last")),
    Case(
        "tied_language_model",
        TiedLanguageModel,
        tokens(5, 11),
        ("embed", "block1"),
        labels(11, 5),
        classify,
    ),
    Case("reused_in_two", ReusedTwice, rows(6), ("norm",)),
    Case("reused_in_three", ReusedThrice, rows(8), ("norm1", "norm2")),
    Case(
        "siamese",
        Siamese,
        floats((6,), (6,)),
        ("tower.1",),
        notes="the cut falls inside the tower's second use",
    ),
    Case(
        "tied_autoencoder",
        TiedAutoencoder,
        rows(6),
        ("code",),
        notes="a weight read as an attribute, transposed",
    ),
    Case("views", Views, rows(6), ("inp", "mid", "late")),
    Case("inplace_after_cut", InplaceAfterCut, rows(6), ("a", "b")),
    Case("setitem_after_cut", SetitemAfterCut, rows(6), ("a", "b")),
    Case("read_after_mutation", ReadAfterMutation, rows(6), ("b", "c")),
    Case("mutate_through_view", MutateThroughView, rows(6), ("a", "c")),
    Case("squeeze_einsum", SqueezeEinsum, rows(6), ("query", "key")),
    Case("lstm", LSTMModel, tokens(4, 9), ("embed", "lstm", "norm"), labels(9, 4), classify),
    Case("gru", GRUModel, rows(4, 4), ("inp", "gru")),
    Case("transformer", TransformerModel, rows(4, 5), ("embed", "layers.0", "layers.1")),
    Case(
        "gpt",
        GPT,
        tokens(5, 11),
        ("blocks.0", "blocks.1.attn.qkv", "blocks.1"),
        labels(11, 5),
        classify,
    ),
    Case("rotary", RotaryModel, rows(4, 5), ("embed", "layers.0", "layers.1")),
    Case("cross_attention", CrossAttention, floats((3, 5), (4, 4)), ("memory", "attn")),
    Case("time_loop", TimeLoop, rows(3, 4), ("embed", "cell")),
    Case("unbind_loop", UnbindLoop, rows(3, 4), ("embed", "step")),
    Case("checkpoint", checkpointed_chain(False), rows(6), ("0", "1")),
    Case("checkpoint_reentrant", checkpointed_chain(True), rows(6), ("0", "1")),
    Case("custom_function", BinaryNet, rows(6), ("fc1", "fc2")),
    Case("no_grad_inside", NoGradTeacher, rows(6), ("student.0", "student")),
    Case("detached_branch", DetachedBranch, rows(6), ("fc1", "fc2")),
    Case("autocast_inside", AutocastInside, rows(6), ("inp", "norm")),
    Case("dict_output", DictOutput, rows(6), ("trunk", "mid")),
    Case("dataclass_output", DataclassOutput, rows(6), ("fc1", "fc2")),
    Case("namedtuple_output", NamedTupleOutput, rows(6), ("encoder", "log_var")),
    Case("nested_input", NestedInput, nested_input, ("image", "mix")),
    Case("optional_none", OptionalArguments, rows(6), ("fc1", "fc2")),
    Case("optional_given", OptionalArguments, with_keyword("bias", 8, scale=0.5), ("fc1", "fc2")),
    Case("several_inputs", SeveralInputs, gated, ("a", "c")),
    Case("early_outputs", EarlyOutputs, rows(6), ("exit1", "exit2")),
    Case(
        "open_arguments",
        OpenArguments,
        with_keyword("shift", 8, extra=1, negate=True),
        ("fc1", "fc2"),
    ),
    Case("frozen_first_half", frozen_chain(0, 1), rows(6), ("2", "3")),
    Case(
        "frozen_middle",
        frozen_chain(2),
        rows(6),
        ("1", "2"),
        notes="the middle stage has nothing to train",
    ),
    Case(
        "frozen_norm",
        frozen_norm_chain,
        rows(6),
        ("1", "4"),
        notes="BatchNorm in eval mode while training",
    ),
    Case(
        "stochastic_depth",
        stochastic_depth_chain,
        rows(6),
        ("1", "3"),
        notes="`if torch.rand([]) < p`",
    ),
    Case("row_drop", RowDropNet, rows(6), ("layers.0", "layers.1")),
    Case(
        "running_mean",
        buffer_chain,
        rows(6),
        ("1", "3"),
        notes="buffers updated in place in forward",
    ),
    Case(
        "rebound_buffer", rebinding_chain, rows(6), ("1", "3"), notes="buffers replaced in forward"
    ),
    Case("shape_control", ShapeControl, rows(6), ("fc1", "fc2")),
    Case("training_control", TrainingControl, rows(6), ("fc1", "fc2")),
    Case("weight_norm", normed_chain(_weight_norm), rows(6), ("1", "3")),
    Case("spectral_norm", normed_chain(_spectral_norm), rows(6), ("1", "3")),
    Case("weight_norm_hooks", normed_chain(nn.utils.weight_norm), rows(6), ("1", "3")),
    Case("spectral_norm_hooks", normed_chain(nn.utils.spectral_norm), rows(6), ("1", "3")),
    Case("squeeze_excite", SqueezeExcite, rows(2, 6, 6), ("norm", "squeeze")),
    Case("group_norm", GroupNormNet, rows(2, 7), ("gn1", "conv2")),
    Case("routing", Routing, rows(6), ("inp", "norm"), notes="integer and boolean tensors cross"),
    Case("tensor_attribute", TensorAttribute, rows(6), ("fc1", "fc2")),
    Case(
        "hooks",
        hooked_chain,
        rows(6),
        ("1", "3"),
        notes="a forward hook and a forward pre-hook on leaves",
    ),
    Case("factories", Factories, rows(3, 4), ("inp", "mid")),
)


BY_NAME = {case.name: case for case in ZOO}

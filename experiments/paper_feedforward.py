"""DNI at every layer of feed-forward nets of 3 to 6 layers: the table of Jaderberg et al. 2016, at
fewer steps.

Fully connected or convolutional nets on MNIST or CIFAR-10 (arXiv:1608.05343, section 3.1 and
appendix A.1), a cut after every hidden layer, trained by backprop, with synthetic gradients without
labels (``dni``) and with them (``cdni``), and by both controls. ``--synthesizers paper`` takes the
paper's synthesizers, scaled to the net, instead of the small ones. ``--ablate`` leaves out one part
of the recipe at a time. Finished runs are kept in a JSON file beside the figure, so the same
command goes on where it was:

    python experiments/paper_feedforward.py --net fcn --data-set mnist --layers 3 4 5 6
    --seeds 0 1 2 --jobs 2
    python experiments/paper_feedforward.py --net cnn --data-set cifar10 --layers 3 --filters 32
    --ablate
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from data import Digits
from digits import batches
from experiment import (
    CLASSES,
    HEAD,
    LARGE_HEAD,
    SETTINGS,
    Progress,
    Record,
    Settings,
    add_arguments,
    agreement_table,
    carry_out,
    check_arguments,
    draw,
    load_data,
    make_run,
    table,
    train,
)

# What a net trains with, and what each method changes. "times" is the width of a synthesizer's
# hidden layers over that of the net's layers.
NETS: dict[str, Settings] = {
    "fcn": {"batch": 256, "optimizer": {"name": "adam", "lr": 1e-3}, "decay": "cosine"},
    "cnn": {
        "batch": 128,
        "optimizer": {"name": "adam", "lr": 1e-3},
        "decay": "cosine",
        "channels_last": True,
    },
}
HEADS: Settings = {"labels": True, "synthesizer_optimizer": {"name": "adam", "lr": 5e-3}}
METHODS: dict[tuple[str, str], Settings] = {
    ("fcn", "backprop"): {"gradients": None},
    ("fcn", "dni"): {
        "gradients": {"source": "mlp", "hidden": 2, "times": 1, "norm": "batch"},
        "optimizer": {"name": "adam", "lr": 1e-4},
        # without labels, earlier layers must wait for the synthesizers behind them
        "earlier_rate": 0.6,
        "label_smoothing": 0.2,  # it helped here; the other methods go without
        "synthesizer_optimizer": {"name": "adam", "lr": 1e-2, "betas": [0.9, 0.99]},
    },
    ("fcn", "cdni"): {
        "gradients": {"source": "linear"},
        "labels": True,
        "synthesizer_optimizer": {"name": "adam", "lr": 3e-2},
    },
    ("fcn", "zero"): {"gradients": "zero"},
    ("fcn", "stale"): {"gradients": "stale"},
    ("cnn", "backprop"): {"gradients": None},
    ("cnn", "dni"): {
        "gradients": {"source": "conv", "hidden": 1, "kernel": 3, "times": 1, "norm": "batch"},
        # without labels they explain a hundredth of the gradient: early layers may hardly move
        "earlier_rate": 0.1,
        "synthesizer_optimizer": {"name": "adam", "lr": 5e-3},
    },
    ("cnn", "cdni"): {
        "gradients": {"source": "conv", "hidden": 1, "kernel": 3, "times": 1, "norm": "batch"},
        "labels": True,
        "earlier_rate": 0.6,
        "synthesizer_optimizer": {"name": "adam", "lr": 5e-3},
    },
    ("cnn", "local"): {"gradients": {"source": "local", **HEAD}, **HEADS},
    ("cnn", "distill"): {"gradients": {"source": "distill", **HEAD}, **HEADS},
    ("cnn", "distill, large head"): {"gradients": {"source": "distill", **LARGE_HEAD}, **HEADS},
    ("cnn", "zero"): {"gradients": "zero"},
    ("cnn", "stale"): {"gradients": "stale"},
}
# True gradients in the first tenth of the steps, faded into the source's in the second; "zero" is
# the control of that.
EXACT_START: Settings = {"schedule": {"schedule": "WarmUp", "steps": 0.1, "fade": 0.1}}
STARTED = [f"{base} + exact start" for base in ("cdni", "zero")]
METHODS |= {
    (net, name): {**METHODS[net, name.split()[0]], **EXACT_START}
    for net in NETS
    for name in STARTED
}
# Cheap forms of cdni's linear source, and what "auto" takes.
FORMS = {
    "cdni, rank 16": "linear(rank=16)",
    "cdni, 8 groups": "linear(groups=8)",
    "cdni, auto": "auto",
}
METHODS |= {
    ("fcn", name): {**METHODS["fcn", "cdni"], "gradients": source} for name, source in FORMS.items()
}
METHODS["cnn", "distill + exact start"] = {**METHODS["cnn", "distill"], **EXACT_START}
# Is it the size of the synthesizers' errors, or that they have a direction? This one's have none.
METHODS["cnn", "cdni, random error"] = {
    **METHODS["cnn", "cdni"],
    "gradients": {"source": "random-error", "by": METHODS["cnn", "cdni"]["gradients"]},
}
PAPER: dict[tuple[str, str, str], Any] = {  # appendix A.1, by net, data set and method
    ("fcn", "mnist", "dni"): {"source": "mlp", "hidden": 2, "times": 4, "norm": "batch"},
    ("fcn", "mnist", "cdni"): {"source": "linear"},
    ("fcn", "cifar10", "dni"): {"source": "mlp", "hidden": 1, "times": 4, "norm": "batch"},
    ("fcn", "cifar10", "cdni"): {"source": "linear"},
    ("cnn", "mnist", "dni"): {
        "source": "conv",
        "hidden": 2,
        "kernel": 5,
        "times": 1,
        "norm": "batch",
    },
    ("cnn", "mnist", "cdni"): {
        "source": "conv",
        "hidden": 2,
        "kernel": 5,
        "times": 1,
        "norm": "batch",
    },
    ("cnn", "cifar10", "dni"): {
        "source": "conv",
        "hidden": 2,
        "kernel": 5,
        "times": 1,
        "norm": "batch",
    },
    ("cnn", "cifar10", "cdni"): {
        "source": "conv",
        "hidden": 2,
        "kernel": 5,
        "times": 1,
        "norm": "batch",
    },
}
ABLATIONS: dict[
    str, Settings
] = {  # appended to "cdni" or "dni"; what each changes in the source's options
    "": {},
    "-raw": {"targets": "raw"},  # mean squared error of the gradients as they are
    "-raw-sum": {"targets": "raw sum"},  # the same, summed over a sample's features
    "-start": {"start": "default"},  # the last layer starts as PyTorch's do, not at zero
    "-raw-start": {"targets": "raw", "start": "default"},
    "-plain": {"norm": "none"},  # hidden layers without batch normalisation
    "-depth0": {"hidden": 0},
    "-depth1": {"hidden": 1},
    "-depth2": {"hidden": 2},
}
USUAL = ("backprop", "dni", "cdni", "zero", "stale")
CONVOLUTIONAL = [name for net, name in METHODS if net == "cnn" and ("fcn", name) not in METHODS]
VARIATIONS = [
    f"{base}{end}" for base in ("cdni", "dni") for end in ABLATIONS
]  # "dni": "cdni" without labels


class Variation(dni_fx.sources.Regression):
    """A regression with parts of its recipe left out.

    Args:
        specs: the values served.
        context: the context, or None.
        targets: ``"unit"``: of unit size; ``"raw"``, ``"raw sum"``: as they are, the error a mean
            over everything, or a sum over features and a mean over samples.
        start: ``"zero"`` or ``"default"``, of the last layer.
        **options: as for the source that is varied.
    """

    def __init__(
        self,
        specs: Sequence[dni_fx.plan.TensorSpec],
        context: dni_fx.plan.TensorSpec | None = None,
        *,
        targets: str = "unit",
        start: str = "zero",
        **options: Any,
    ) -> None:
        super().__init__(specs, context, **options)
        self.targets = targets
        if targets != "unit":
            self.scale.fill_(1.0)
        if start == "default":
            for network in self.networks:
                last = network.layers[-1]
                nn.init.kaiming_uniform_(last.weight, a=5**0.5)  # as nn.Linear and nn.Conv2d
                bound = last.weight[0].numel() ** -0.5
                nn.init.uniform_(last.bias, -bound, bound)

    def fit(self, prediction: Any, message: tuple[Tensor, ...]) -> Tensor:
        """The usual error, or that of raw targets."""
        if self.targets == "unit":
            return super().fit(prediction, message)
        errors = [
            F.mse_loss(out, target) for out, target in zip(prediction.state, message, strict=True)
        ]
        if self.targets == "raw sum":
            errors = [e * target[0].numel() for e, target in zip(errors, message, strict=True)]
        return torch.stack(errors).sum()


class VariedConv(Variation, dni_fx.sources.Conv):
    """Convolutions with parts of the recipe left out."""


class VariedMLP(Variation, dni_fx.sources.MLP):
    """Fully connected layers with parts of the recipe left out; a linear source has no hidden
    ones.
    """


class RandomError(dni_fx.sources.Mix):
    """The true gradient and a random error, as large as that of the source that is wrapped: a
    control, locked.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, share=1.0, **options)
        self.generator = torch.Generator().manual_seed(0)

    def complete(self, prediction: Any, awaited: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What arrives, with the error added."""
        found = []
        for true, guess in zip(awaited, prediction.state.gradients, strict=True):
            error = torch.randn(true.shape, generator=self.generator).to(true)
            found.append(true + error * ((guess - true).norm() / error.norm()))
        return tuple(found)


OWN_SOURCES = {"random-error": RandomError, "varied-conv": VariedConv, "varied-mlp": VariedMLP}
VARIED = {"conv": "varied-conv", "mlp": "varied-mlp", "linear": "varied-mlp"}


def fcn(shape: Sequence[int], layers: int, width: int) -> nn.Sequential:
    """Hidden layers of Linear, BatchNorm and ReLU, and a linear head."""
    sizes = [shape[0] * shape[1] * shape[2]] + [width] * layers
    hidden = [
        (
            f"layer{i}",
            nn.Sequential(nn.Linear(sizes[i - 1], width), nn.BatchNorm1d(width), nn.ReLU()),
        )
        for i in range(1, layers + 1)
    ]
    return nn.Sequential(
        OrderedDict([("flatten", nn.Flatten()), *hidden, ("head", nn.Linear(width, CLASSES))])
    )


def cnn(shape: Sequence[int], layers: int, filters: int, stride: int) -> nn.Sequential:
    """Hidden layers of convolution 5 x 5, BatchNorm, ReLU and pooling 3 x 3, and a linear head."""
    hidden = []
    channels, size = shape[0], shape[1]
    for i in range(1, layers + 1):
        pool = (nn.MaxPool2d if i == 1 else nn.AvgPool2d)(3, stride, padding=1)
        layer = nn.Sequential(
            nn.Conv2d(channels, filters, 5, padding=2), nn.BatchNorm2d(filters), nn.ReLU(), pool
        )  # fmt: skip
        hidden.append((f"layer{i}", layer))
        channels, size = filters, (size - 1) // stride + 1
    head = nn.Linear(filters * size * size, CLASSES)
    return nn.Sequential(OrderedDict([*hidden, ("flatten", nn.Flatten()), ("head", head)]))


def with_width(source: Settings, width: int) -> Settings:
    """A source's options with the width of hidden layers in place of ``times``."""
    options = {
        key: with_width(value, width) if key == "by" else value for key, value in source.items()
    }
    if "times" in options:
        options["width"] = round(options.pop("times") * width)
    return options


def make_settings(args: argparse.Namespace, method: str, layers: int) -> Settings:
    """Everything that decides a run, from the tables at the top and the command line."""
    ablated = args.ablate and method in VARIATIONS
    base, end = method.split("-", 1) if "-" in method else (method, "")
    # With --ablate, "dni" is "cdni" without labels, so that one thing changes at a time.
    chosen = METHODS[args.net, "cdni" if ablated else base]
    settings = {**SETTINGS, **NETS[args.net], **chosen}
    if ablated:
        settings["labels"] = base == "cdni"
    width = {"fcn": args.width, "cnn": args.filters}[args.net]
    if args.synthesizers == "paper":
        settings["gradients"] = PAPER.get(
            (args.net, args.data_set, base.split()[0]), settings["gradients"]
        )
    if isinstance(settings["gradients"], dict):
        source = dict(settings["gradients"])
        if ablated:
            source |= {
                "source": VARIED[source["source"]],
                **({"hidden": 0} if source["source"] == "linear" else {}),
            }
            source |= ABLATIONS[f"-{end}" if end else ""]
        settings["gradients"] = with_width(source, width)
    if args.lr is not None:
        settings["optimizer"] = {**settings["optimizer"], "lr": args.lr}
    if args.synthesizer_lr is not None:
        settings["synthesizer_optimizer"] = {
            **settings["synthesizer_optimizer"],
            "lr": args.synthesizer_lr,
        }
    settings["decay"] = args.decay or settings["decay"]
    settings["batch"] = args.batch or settings["batch"]
    settings |= {
        "steps": args.steps,
        "measure_every": args.measure_every or max(args.steps // 10, 1),
    }
    settings |= {
        "net": args.net,
        "data_set": args.data_set,
        "layers": layers,
        "width": width,
        "limit": args.limit,
    }
    settings |= {"stride": args.stride} if args.net == "cnn" else {}
    return settings


def make_runs(args: argparse.Namespace) -> list[Record]:
    """All runs asked for, seed by seed, so that an early look at the table compares all methods."""
    return [
        make_run(method, f"{args.net} {layers}", seed, make_settings(args, method, layers))
        for layers in args.layers
        for seed in args.seeds
        for method in args.methods
    ]


def run_one(run: Record, data: Digits, progress: Progress) -> Record:
    """Train a fresh net."""
    settings, seed = run["settings"], run["seed"]
    torch.manual_seed(seed)
    shape = data.train_x.shape[1:]
    if settings["net"] == "fcn":
        model = fcn(shape, settings["layers"], settings["width"])
    else:
        model = cnn(shape, settings["layers"], settings["width"], settings["stride"])
    cuts = [f"layer{i}" for i in range(1, settings["layers"] + 1)]
    drawn = batches(data, min(settings["batch"], len(data.train_x)), settings["steps"], seed)
    return train(
        model, cuts, data, drawn, settings, seed=seed, progress=progress, own_sources=OWN_SOURCES
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=("fcn", "cnn"), default="fcn")
    parser.add_argument("--data-set", choices=("mnist", "cifar10", "digits"), default="mnist")
    parser.add_argument(
        "--layers", nargs="+", type=int, help="hidden layers (default: 3 4 5 6; with --ablate: 3)"
    )
    parser.add_argument(
        "--width", type=int, help="of layers of fcn (default: 256; for CIFAR-10: 1000)"
    )
    parser.add_argument("--filters", type=int, default=128, help="of layers of cnn (default: 128)")
    parser.add_argument("--stride", type=int, default=2, help="of poolings (default: 2)")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--batch", type=int, help="images in one (default: as in the table at the top)"
    )
    parser.add_argument(
        "--lr", type=float, help="of the layers (default: as in the table at the top)"
    )
    parser.add_argument(
        "--synthesizer-lr", type=float, help="of the synthesizers (default: as in the table)"
    )
    parser.add_argument(
        "--decay",
        choices=("none", "cosine", "steps"),
        help="of all rates (default: as in the table)",
    )
    parser.add_argument("--synthesizers", choices=("small", "paper"), default="small")
    parser.add_argument(
        "--ablate", action="store_true", help="leave out parts of the recipe, one at a time"
    )
    names = list(dict.fromkeys([*USUAL, *FORMS, *STARTED, *CONVOLUTIONAL, *VARIATIONS]))
    add_arguments(parser, names, USUAL, "out/paper_feedforward.json")
    args = parser.parse_args(arguments)
    check_arguments(parser, args, "steps", "batch", "width", "filters", "stride")
    args.layers = args.layers or ([3] if args.ablate else [3, 4, 5, 6])
    args.width = args.width or (1000 if args.data_set == "cifar10" else 256)
    if min(args.layers) < 1:
        parser.error("--layers must be at least 1")
    if args.ablate and args.methods == list(USUAL):
        args.methods = ["backprop", *VARIATIONS, "zero"]
    if unknown := [
        m
        for m in args.methods
        if (args.net, m) not in METHODS and not (args.ablate and m in VARIATIONS)
    ]:
        needed = "--ablate"
        if unknown[0] in CONVOLUTIONAL or unknown[0] in FORMS:
            needed = f"--net {'cnn' if unknown[0] in CONVOLUTIONAL else 'fcn'}"
        parser.error(f"{', '.join(unknown)}: only with {needed}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not finished, then print the table and draw the curves."""
    args = parse_arguments(arguments)

    def report(records: list[Record]) -> None:
        errors = (
            args.data_set != "cifar10"
        )  # of the others they are small, and accuracies would look alike
        print(table(records, errors=errors))
        print(
            "\ncosine with backprop's gradient, of what is predicted at a cut / of the weights "
            "before it:"
        )
        print(agreement_table(records))
        picture: Path = args.out.with_suffix(".png")
        draw(records, picture, errors=errors)
        print(f"\nlearning curves: {picture}")

    load = partial(load_data, args.data_set, args.data, args.limit)
    return carry_out(args, make_runs(args), run_one, load, report)


if __name__ == "__main__":
    sys.exit(main())

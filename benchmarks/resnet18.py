"""Prints what docs/choosing-cuts.md shows of ResNet-18: a plan, and the cuts that the search finds
with what they promise; and the emitted training function of the middle stage.

    python benchmarks/resnet18.py
"""

from __future__ import annotations

import torch

import torchvision_cpu  # noqa: F401  (before torchvision)


def main() -> None:
    """Cut after ``layer2`` and ``layer3``, for 32 images of 64 x 64 and ten classes."""
    from torchvision.models import resnet18

    import dni_fx

    model = resnet18(num_classes=10)
    images = torch.randn(32, 3, 64, 64)
    decoupled = dni_fx.decouple(
        model, cuts=["layer2", "layer3"], example_inputs=(images,), context=dni_fx.one_hot(10)
    )
    print(decoupled.plan)
    print()
    print(decoupled.stages[1].code)
    torch.set_num_threads(1)
    plan = dni_fx.plan_cuts(
        model, (images,), stages=4, gradients="linear", context=dni_fx.one_hot(10)
    )
    print(plan)
    print()
    print(dni_fx.simulate(plan, micro_batches=8).sentence)


if __name__ == "__main__":
    main()

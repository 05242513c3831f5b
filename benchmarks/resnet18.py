"""Prints what the README shows of ResNet-18: the plan, and the emitted training function of the middle stage.

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


if __name__ == "__main__":
    main()

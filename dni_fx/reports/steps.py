"""What a training step tells: loss, outputs, and how near the predictions were."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import DecouplingError

NOTHING = 0.1  # a cosine below it explains less than 1 %, whatever the size of the prediction
# compared at once on the CPU: three buffers of 2 MB, which stay in the processor's cache
ELEMENTS = 2**18
_SHOWN = 6  # interfaces that a printed step names
REFERENCES = {
    "true": "the gradient",
    "bootstrapped": "the target that the next stage's predictions gave",
}


@dataclass(frozen=True)
class InterfaceReport:
    """A predicted gradient against its reference, over all elements of the batch.

    It judges the prediction, not the training: a source whose verdict is poor may still train a
    good model (a local loss points elsewhere on purpose), and one that explains much at the last
    cut may be of no use at the first.

    Attributes:
        cosine: cosine of the angle between them; nan where either is zero.
        relative_error: norm of the difference over the norm of the reference; nan where the
            reference is zero, infinite where an element of either is not finite.
        rms_ratio: size of the prediction over that of the reference; nan where the reference is
            zero.
        reference: ``"true"`` where the reference is the loss's own gradient, ``"bootstrapped"``
            where it comes from stages that are themselves trained on predictions.
        step: when it was measured, counted from 0.
        sign_agreement: share of the elements where both have the same sign, among those where the
            reference is not zero; 0.5 for a coin, nan where there are none.
        aims: whether the reference is what the source should say; a head says the slope of a loss
            of its own.
    """

    cosine: float
    relative_error: float
    rms_ratio: float
    reference: str
    step: int
    sign_agreement: float = math.nan
    aims: bool = True

    @property
    def explained(self) -> float:
        """Share of the reference's square that the prediction takes away, ``1 - |g - g^|^2 /
        |g|^2``.

        1 is perfect, 0 as good as no gradient at all (the control ``zero``), below 0 is worse than
        that; nan where the reference is zero.
        """
        return 1 - self.relative_error * self.relative_error

    @property
    def aligned(self) -> float:
        """What ``explained`` would be if the prediction were rescaled best: the square of a
        positive cosine, else 0.

        nan where the reference is zero or an element of either is not finite.
        """
        if not math.isfinite(self.relative_error):
            return math.nan
        return self.cosine * self.cosine if self.cosine > 0 else 0.0

    @property
    def verdict(self) -> str:
        """What that means for the cut, in words.

        "The frozen control would do as well" is said of the direction alone: the size matters less,
        the more the stage's optimiser chooses its own step size, as Adam does.
        """
        true = self.reference == "true"
        reference = REFERENCES.get(self.reference, f"the {self.reference} reference")
        cosine = f"cosine {self.cosine:.2f}"
        numbers = f"{cosine}, size {as_size(self.rms_ratio)}"
        if math.isinf(self.relative_error):
            return "not finite: a NaN or an infinity is predicted or arrives"
        if math.isnan(self.relative_error):
            return "no gradient arrives" + ("" if true else f": {reference} is zero")
        if self.rms_ratio == 0:
            return "predicts nothing yet"
        if not self.aims and self.aligned < NOTHING**2:  # which says nothing against it
            return (
                f"follows a loss of its own: {numbers}; diagnose_parameters tells more, and a run "
                "with 'zero' beside it most"
            )
        control = "the frozen control (`zero`) would do"
        if self.cosine <= -NOTHING:
            return f"points away from {reference}: {control} better ({numbers})"
        if self.aligned < NOTHING**2:
            what = "" if true else f" of {reference}"
            return f"explains nothing{what}: {control} as well ({cosine})"
        if self.explained < self.aligned / 2:
            could = f"rescaled it would explain {as_share(self.aligned)} of {reference}"
            return f"right direction, wrong size: {numbers}; {could}"
        return f"explains {as_share(self.explained)} of {reference} ({numbers})"


@dataclass(frozen=True)
class StepReport:
    """Result of one training step; prints as one line.

    Attributes:
        loss: the loss, a detached scalar tensor.
        outputs: the model's output, detached, in its own structure.
        interfaces: the last measured comparison of every interface, by name.
        step: number of steps made so far.
    """

    loss: torch.Tensor
    outputs: Any = field(repr=False)
    interfaces: dict[str, InterfaceReport] = field(default_factory=dict)
    step: int = 0

    def __str__(self) -> str:
        shown = [f"{name} {r.cosine:.2f}" for name, r in list(self.interfaces.items())[:_SHOWN]]
        shown += [f"{len(self.interfaces) - _SHOWN} more"] * (len(self.interfaces) > _SHOWN)
        cosines = f"; cosine at {', '.join(shown)}" if shown else ""
        return f"{self.step} steps: loss {float(self.loss):.4g}{cosines}"


def compare(
    prediction: torch.Tensor, reference: torch.Tensor, kind: str, step: int, aims: bool = True
) -> InterfaceReport:
    """Compare two gradients.

    Sums run in double precision over one part after the other, so no copy of a large map is made
    and half precision neither overflows nor vanishes; the host waits for the device once.

    Args:
        prediction: any shape, layout and dtype; complex numbers count as pairs of real ones.
        reference: the same shape; dtype, layout and device may differ.
        kind: of the reference, ``"true"`` or ``"bootstrapped"``.
        step: counted from 0.
        aims: as in the report.

    Raises:
        DecouplingError: the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise DecouplingError(
            f"cannot compare a predicted gradient of shape {tuple(prediction.shape)} with a "
            f"reference of shape {tuple(reference.shape)}: both must have the shape of the "
            "interface's value"
        )
    sums = _sums(*map(_as_real, (prediction.detach(), reference.detach())))
    ours, theirs, product, difference, both, same, some = sums
    nan, length, truth = math.nan, math.sqrt(ours), math.sqrt(theirs)
    finite = math.isfinite(ours) and math.isfinite(theirs)
    error = math.sqrt(difference) / truth if finite and truth else math.inf
    cosine = nan
    if finite and length and truth:
        cosine = min(1.0, max(-1.0, product / (length * truth)))
    return InterfaceReport(
        cosine=cosine,
        relative_error=error if truth else nan,
        rms_ratio=length / truth if truth else nan,
        reference=kind,
        step=step,
        sign_agreement=(both + same) / 2 / some if some else nan,
        aims=aims,
    )


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


@torch.no_grad()
def _sums(a: Tensor, b: Tensor) -> list[float]:
    """``[a a, b b, a b, (a - b)^2]`` summed, and of the signs ``[(s t)^2, s t, t^2]``."""
    # walk through memory as it lies
    order = sorted(range(a.dim()), key=a.stride().__getitem__, reverse=True)
    a, b = a.permute(order), b.permute(order)
    most = ELEMENTS if a.device.type == "cpu" else 16 * ELEMENTS  # elsewhere launches cost most
    size = min(a.numel(), most)
    dtype = torch.float32 if a.device.type == "mps" else torch.float64
    buffers = torch.empty(3, size, dtype=dtype, device=a.device)
    found = [torch.zeros(7, dtype=dtype, device=a.device)]
    for p, q in _parts(a, b, size):
        u, v, w = buffers[:, : p.numel()]
        u.view(p.shape).copy_(p)
        v.view(q.shape).copy_(q)
        torch.sub(u, v, out=w)
        numbers = [u.dot(u), v.dot(v), u.dot(v), w.dot(w)]
        torch.mul(u.sign_(), v.sign_(), out=w)
        found.append(torch.stack([*numbers, w.dot(w), w.sum(), v.dot(v)]))
    return torch.stack(found).sum(0).tolist()


def _parts(a: Tensor, b: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same parts of both, views of at most ``size`` elements."""
    if a.numel() <= size:
        yield a, b
    elif rows := size // (a.numel() // len(a)):
        yield from zip(a.split(rows), b.split(rows), strict=True)
    else:
        for p, q in zip(a, b, strict=True):
            yield from _parts(p, q, size)


def as_share(share: float) -> str:
    """``71 %``; what is far below zero in round numbers; ``-`` for nan."""
    if math.isnan(share):
        return "-"
    return f"{round(100 * share)} %" if share > -10 else "< -1000 %"


def as_size(ratio: float) -> str:
    """``0.98 x``, ``260 x``, ``0.034 x``, ``1.2e+07 x``; ``-`` for nan."""
    if math.isnan(ratio):
        return "-"
    if 10 <= ratio < 1e5:
        return f"{ratio:.0f} x"
    return f"{ratio:.2f} x" if 0.1 <= ratio < 10 else f"{ratio:.2g} x"

"""A stage learns to keep what it was given: its input is made again from its output, without labels
and without traffic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DecouplingError
from ..plan import TensorSpec
from .asks import SEEN, Asks
from .base import GradientSource, Prediction, like, wide_dtype
from .head_networks import HandedOver
from .regression import Shaped

LARGEST = 4096  # outputs of a decoder at one position; finer targets are averaged to that
CODE = 64  # cosines that tell integers apart


class Decoder(Shaped):
    r"""One input of a stage from one of its outputs: :math:`D(h) = W_2 \operatorname{GELU}(W_1
    \operatorname{LayerNorm}(h))` at every position.

    Where the input has more positions than the value, an output makes the block of them that it
    stands for; a value with another number of dimensions is averaged over its positions first.
    """

    def __init__(
        self, value: TensorSpec, target: TensorSpec, width: int | None, dtype: torch.dtype
    ) -> None:
        super().__init__(_batch_first(value))
        features = self.features
        there, here = positions_of(target), self._positions(self.shape)
        self.averages = len(there) != len(here)
        grid = (1,) * len(there) if self.averages else here
        blocks = [max(1, t // max(h, 1)) for t, h in zip(there, grid, strict=True)]
        made = code_features(target)
        while made * math.prod(blocks) > LARGEST and max(blocks) > 1:
            largest = blocks.index(max(blocks))
            blocks[largest] = -(-blocks[largest] // 2)
        self.blocks = tuple(blocks)
        width = max(features // 4, 1) if width is None else width
        self.norm = nn.LayerNorm(features, dtype=dtype)
        self.narrow = nn.Linear(features, width, dtype=dtype)
        self.widen = nn.Linear(width, made * math.prod(blocks), dtype=dtype)
        for layer in (self.narrow, self.widen):
            nn.init.xavier_uniform_(layer.weight, gain=0.1)
            nn.init.zeros_(layer.bias)

    def _positions(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        found = shape[2:] if self.space else shape[1:-1]
        return (*found[:2], math.prod(found[2:])) if len(found) > 2 else found

    def forward(self, value: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What is made of a value, and what it is compared with: both ``(batch, *grid,
        features)``; ``target`` is ``(batch, features, *positions)``.
        """
        full = self.check(tuple(value.shape))
        value = value.reshape(full)
        value = value.movedim(1, -1) if self.space else value
        here = self._positions(full)
        value = value.reshape(full[0], *here, self.features)
        if self.averages:
            if here:
                value = value.mean(tuple(range(1, value.dim() - 1)))
            value = value.reshape(full[0], *(1,) * len(self.blocks), self.features)
        grid = value.shape[1:-1]
        made = self.widen(F.gelu(self.narrow(self.norm(value))))
        return made, self._in_blocks(target, grid)

    def _in_blocks(self, target: Tensor, grid: Sequence[int]) -> Tensor:
        """A target as one vector for each position of a grid."""
        sizes = [g * b for g, b in zip(grid, self.blocks, strict=True)]
        if sizes and list(target.shape[2:]) != sizes:
            pools: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
            target = pools[len(sizes) - 1](target, sizes)
        batch, features, count = *target.shape[:2], len(sizes)
        pairs = [n for pair in zip(grid, self.blocks, strict=True) for n in pair]
        split = target.reshape(batch, features, *pairs)
        places = range(2, 2 + 2 * count)
        order = (0, *places[::2], 1, *places[1::2])
        return split.permute(order).reshape(batch, *grid, features * math.prod(self.blocks))


class Reconstruct(GradientSource):
    r"""The stage is asked to keep its input: a decoder makes it again from what the stage sends,
    and the error is pulled back.

    .. math::
        \hat g_i = \lambda\,\frac{\partial}{\partial h_i} \operatorname{mean}_{j}
        \operatorname{mean} (D_{ij}(h_i) - e_j)^2

    with :math:`h_i` the values served and :math:`e_j` the inputs. It needs no labels, and nothing
    comes back over the cut. The decoders learn by the same loss.

    An input counts if its batch has the size of the values' batch: those that hold floats, or where
    there are none those that hold integers, each as 64 fixed cosines of random frequency. So a
    first stage that begins with an embedding learns to tell its tokens apart; for the method as
    published cut after the embedding as well, and give that cut ``"zero"``.

    Args:
        specs: the values served.
        context: ignored.
        weight: λ. As published 10 beside a mean cross entropy, for one boundary; for K - 1 of them
            divide by that.
        target: ``"stage"`` for what the stage received (the first: the model's inputs that it
            takes), ``"model"`` for the model's inputs.
        width: of the decoders' hidden layer; a quarter of the value's features by default.

    Raises:
        DecouplingError: options that do not exist; a scalar; a stage without an input that could be
            made again.

    Source:
        LoPT, 2026, arXiv:2605.04913 (one boundary, the stage's input, λ = 10); the model's input as
        target: InfoPro, Wang et al. 2021, arXiv:2101.10832, eq. 6. Other shapes than a sequence's,
        integers and several inputs are ours.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        context: TensorSpec | None = None,
        *,
        weight: float = 10.0,
        target: str = "stage",
        width: int | None = None,
    ) -> None:
        super().__init__(specs)
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise DecouplingError(
                f"'reconstruct' needs a weight above 0, such as 10.0, not {weight!r}"
            )
        if target not in SEEN:
            known = ", ".join(map(repr, SEEN))
            raise DecouplingError(f"unknown target {target!r} of 'reconstruct'; known: {known}")
        if any(not spec.shape for spec in self.specs):
            raise DecouplingError("'reconstruct' needs values with a batch dimension, not a scalar")
        self.asks = Asks(learns_from=(), inputs=target)
        self.weight, self.width = float(weight), width
        self._targets: dict[int, TensorSpec] = {}
        self.decoders = nn.ModuleList()
        generator = torch.Generator().manual_seed(0)
        phases = torch.rand(2, CODE, generator=generator, device="cpu") * (2 * math.pi)
        self.register_buffer("phases", phases, persistent=False)
        self.see_inputs(self.specs)  # its values stand in until it has a stage

    def see_inputs(self, specs: Sequence[TensorSpec]) -> None:
        """Make a decoder for each input that can be made again, of each value.

        Raises:
            DecouplingError: there is no such input.
        """
        super().see_inputs(specs)
        batches = {spec.shape[spec.batch_dim] for spec in self.specs}
        fits = {k: _with_batch(spec, batches) for k, spec in enumerate(specs)}
        self._targets = _of_one_kind({k: spec for k, spec in fits.items() if spec is not None})
        if not self._targets:
            shapes = ", ".join(f"{tuple(s.shape)} {s.dtype}" for s in specs) or "none at all"
            whose = "the stage's" if self.asks.inputs == "stage" else "the model's"
            raise DecouplingError(
                f"'reconstruct' finds nothing to make again: {whose} inputs are {shapes}, and one "
                f"with numbers for each of the batch's {sorted(batches)} samples is needed. Use "
                "'local' or 'zero' here"
            )
        dtype = wide_dtype(self.specs)
        pairs = itertools.product(self.specs, self._targets.values())
        self.decoders = nn.ModuleList(Decoder(v, t, self.width, dtype) for v, t in pairs)

    def predict(
        self,
        values: tuple[Tensor, ...],
        context: Tensor | None = None,
        inputs: tuple[Tensor, ...] = (),
    ) -> Prediction:
        """Gradients of the weighted error; ``state`` is that, with the decoders' graph.

        Raises:
            DecouplingError: inputs of another number or kind than it was made for.
        """
        keep, dtype = torch.is_grad_enabled(), wide_dtype(self.specs)
        targets = self._encoded(values, inputs or values)
        learnt = [p for p in self.parameters() if p.requires_grad] if keep else []
        with torch.enable_grad():
            leaves = [value.detach().to(dtype).requires_grad_() for value in values]
            errors, decoders = [], iter(self.decoders)
            for leaf, spec in zip(leaves, self.specs, strict=True):
                value = leaf.view_as(leaf).movedim(spec.batch_dim, 0)
                for target in targets:
                    errors.append(F.mse_loss(*next(decoders)(value, target)))
            loss = self.weight * torch.stack(errors).mean()
            found = torch.autograd.grad(loss, (*leaves, *learnt))
            loss = loss.detach()
            if learnt:
                loss = HandedOver.apply(loss, found[len(leaves) :], *learnt)
        pairs = zip(found, values, strict=False)
        return Prediction(tuple(like(g * self.unit, value) for g, value in pairs), loss)

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor | None:
        """The weighted error; its gradients were found with those for the values."""
        loss: Tensor = prediction.state
        return loss if loss.requires_grad else None

    def _encoded(self, values: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """The targets, ``(batch, features, *positions)``."""
        if len(inputs) != len(self.input_specs):
            raise DecouplingError(
                f"'reconstruct' was made for {len(self.input_specs)} inputs, but got "
                f"{len(inputs)}: decouple on examples like this call, or use another source here"
            )
        batch, found = values[0].shape[self.specs[0].batch_dim], []
        for place, spec in self._targets.items():
            given = inputs[place]
            if given.dim() != len(spec.shape) or given.shape[spec.batch_dim] != batch:
                raise DecouplingError(
                    f"'reconstruct' was made for an input like {spec.shape} (batch in dimension "
                    f"{spec.batch_dim}), but got one of shape {tuple(given.shape)} with values of "
                    f"a batch of {batch}: decouple on examples like this call"
                )
            tensor = given.detach().movedim(spec.batch_dim, 0)
            if not spec.dtype.is_floating_point:
                frequency, phase = self.get_buffer("phases")
                code = tensor.to(frequency.dtype).unsqueeze(-1) * frequency + phase
                tensor = code.cos() * math.sqrt(2)
                tensor = tensor.movedim(-1, 1)
            elif tensor.dim() == 1:
                tensor = tensor[:, None]
            elif spec.feature_dim != 1:
                tensor = tensor.movedim(-1, 1)
            tensor = tensor.to(wide_dtype(self.specs))
            found.append(tensor.flatten(4) if tensor.dim() > 5 else tensor)
        return found


def _batch_first(spec: TensorSpec) -> TensorSpec:
    shape = list(spec.shape)
    shape.insert(0, shape.pop(spec.batch_dim))
    return replace(spec, shape=tuple(shape), batch_dim=0)


def _with_batch(spec: TensorSpec, batches: set[int]) -> TensorSpec | None:
    """An input with its batch where it has one of these sizes: in the dimension that it says, else
    in the second, where a window has it; None for another input.
    """
    for dim in (spec.batch_dim, 1):
        if dim < len(spec.shape) and spec.shape[dim] in batches:
            return replace(spec, batch_dim=dim, feature_dim=-1 if dim else spec.feature_dim)
    return None


def _of_one_kind(specs: dict[int, TensorSpec]) -> dict[int, TensorSpec]:
    """Those that hold floats, else those that hold integers."""
    floats = {k: s for k, s in specs.items() if s.dtype.is_floating_point}
    whole = {k: s for k, s in specs.items() if not s.dtype.is_complex and s.dtype is not torch.bool}
    return floats or whole


def code_features(spec: TensorSpec) -> int:
    """Features of a target; integers are told apart by a code."""
    if not spec.dtype.is_floating_point:
        return CODE
    return spec.shape[spec.feature_dim] if len(spec.shape) > 1 else 1


def positions_of(spec: TensorSpec) -> tuple[int, ...]:
    """The sizes of a target besides batch and features, from the fourth on in one."""
    rest = list(spec.shape)
    del rest[spec.batch_dim]
    if spec.dtype.is_floating_point and rest:
        del rest[0 if spec.feature_dim == 1 else -1]
    return (*rest[:2], math.prod(rest[2:])) if len(rest) > 2 else tuple(rest)

"""Stacked recurrent modules taken apart into their layers, so that cuts can fall between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import DecouplingError


class _Follows:
    """Mixed into a module that stands for a part of another one: trains when that does, and stays
    one graph node.
    """

    is_graph_leaf = True

    @property
    def training(self) -> bool:
        """The owner's."""
        return self.__dict__["_owner"][0].training if "_owner" in self.__dict__ else True

    @training.setter
    def training(self, value: bool) -> None:
        pass

    def follow(self, owner: nn.Module) -> Any:
        """Take over the owner's mode from now on."""
        self.__dict__["_owner"] = [owner]  # no submodule
        return self


class _Dropout(_Follows, nn.Dropout):
    pass


_KINDS: dict[type[nn.RNNBase], Any] = {
    kind: type(f"_{kind.__name__}", (_Follows, kind), {}) for kind in (nn.LSTM, nn.GRU, nn.RNN)
}


class Layers(nn.Module):
    """A stacked ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` as its layers, one after the other; the
    parameters are shared.

    Args:
        stacked: the module.
    """

    def __init__(self, stacked: nn.RNNBase) -> None:
        super().__init__()
        for k in range(stacked.num_layers):
            if k and stacked.dropout:
                self.add_module(f"dropout_{k - 1}", _Dropout(stacked.dropout).follow(stacked))
            self.add_module(f"layer_{k}", _single_layer(stacked, k))

    def forward(self, x: Tensor, states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Run all layers; a state for each goes in and comes out."""
        rest, found = iter(states), []
        for module in self.children():
            if isinstance(module, _Dropout):
                x = module(x)
            else:
                x, state = module(x, next(rest))
                found.append(state)
        return x, found


def _single_layer(stacked: nn.RNNBase, k: int) -> nn.RNNBase:
    kind = next((c for base, c in _KINDS.items() if isinstance(stacked, base)), None)
    ends = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] * stacked.bias)]
    ends += ["weight_hr"] * bool(stacked.proj_size)
    names = [n for n, _ in stacked.named_parameters() if n.endswith(f"_l{k}")]
    if kind is None or set(names) != {f"{end}_l{k}" for end in ends}:
        raise DecouplingError(
            f"a {type(stacked).__name__} with re-made weights cannot be cut between its layers; "
            "cut before or after it"
        )
    size = stacked.input_size if k == 0 else (stacked.proj_size or stacked.hidden_size)
    extra = {"nonlinearity": stacked.nonlinearity} if isinstance(stacked, nn.RNN) else {}
    if stacked.proj_size:
        extra["proj_size"] = stacked.proj_size
    layout = {"bias": stacked.bias, "batch_first": stacked.batch_first, "device": "meta"}
    layer: Any = kind(size, stacked.hidden_size, **layout, **extra)
    for name in names:
        setattr(layer, f"{name.removesuffix(f'_l{k}')}_l0", getattr(stacked, name))
    made: nn.RNNBase = layer.follow(stacked)
    return made

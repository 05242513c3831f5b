"""Models whose parameters FSDP has taken over, which no stage can train."""

from __future__ import annotations

from torch import nn

from ..errors import DecouplingError

# torch sets it on every module whose parameters FullyShardedDataParallel or fully_shard manages.
_MANAGED = "_is_fsdp_managed_module"


def check_unsharded(model: nn.Module) -> None:
    """Refuse a model that FSDP shards, as a whole or in parts.

    Its parameters are put together by hooks around a forward, and their gradients taken apart by
    hooks in a backward through all of it; a stage's backward runs within the forward, so that its
    parameters would stand still.

    Raises:
        DecouplingError: it does; which module, and what to do instead.
    """
    for path, module in model.named_modules():
        if vars(module).get(_MANAGED):
            what = f"submodule {path!r}" if path else f"{type(model).__name__} itself"
            raise DecouplingError(
                f"{what} is sharded by FSDP (fully_shard or FullyShardedDataParallel), so stages "
                "would get no gradients. Leave it unsharded: each process of dni_fx.distributed "
                "holds the optimiser states and activations of its own stages alone, and "
                "DistributedDataParallel goes around a drop-in; or shard a drop-in made with "
                "gradients='exact', or the plain model, decoupled.model"
            )

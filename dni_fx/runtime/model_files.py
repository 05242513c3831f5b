"""The model's weights as a plain checkpoint of one file, written stage by stage."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..decoupled import Decoupled
from ..errors import DecouplingError

Visit = Callable[[int], contextlib.AbstractContextManager[None]]
_DTYPES = {  # what the format of safetensors calls them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_model(path: Path, decoupled: Decoupled, visit: Visit) -> Path:
    """Write what ``model.state_dict()`` holds, without bringing all of it into memory.

    Args:
        path: ``.safetensors`` for that format, anything else for ``torch.load``; its file is
            replaced once the new one is whole.
        decoupled: the model.
        visit: a region in which a stage is in memory.

    Raises:
        DecouplingError: it cannot be written, or holds what the format cannot.
    """
    state: dict[str, Any] = decoupled.model.state_dict(keep_vars=True)  # which reads nothing
    begun = path.with_name(f"{path.name}.writing")
    write = _write_safetensors if path.suffix == ".safetensors" else _write_torch
    try:
        write(begun, state, decoupled, visit)
        os.replace(begun, path)
    except (OSError, RuntimeError) as error:  # torch's own, where a disk is full
        raise DecouplingError(
            f"the model was not saved to {path}: {error}; see that there are room and rights, and "
            "save again"
        ) from error
    finally:
        begun.unlink(missing_ok=True)
    return path


def _by_stage(
    state: dict[str, Any], decoupled: Decoupled, visit: Visit
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, while it is in memory; what no stage uses comes with the last one."""
    owner: dict[int, int] = {}
    for stage in decoupled.stages:
        for tensor in (*stage.parameters(), *stage.module.buffers()):
            owner.setdefault(id(tensor), stage.index)
    last = len(decoupled.stages) - 1
    for index in range(last + 1):
        with visit(index):
            for name, tensor in state.items():
                if isinstance(tensor, Tensor) and owner.get(id(tensor), last) == index:
                    yield name, tensor.detach()


def _write_torch(begun: Path, state: dict[str, Any], decoupled: Decoupled, visit: Visit) -> None:
    """By way of mapped files, which take no memory that the system cannot have back."""
    with tempfile.TemporaryDirectory(dir=begun.parent, prefix=f"{begun.name}.") as folder:
        found = {n: v for n, v in state.items() if not isinstance(v, Tensor)}
        for place, (name, tensor) in enumerate(_by_stage(state, decoupled, visit)):
            file, count = f"{folder}/{place}", tensor.numel()
            mapped = torch.empty(0, dtype=tensor.dtype)
            if count:
                mapped = torch.from_file(file, shared=True, size=count, dtype=tensor.dtype)
            found[name] = mapped.view(tensor.shape).copy_(tensor)
        torch.save({name: found[name] for name in state}, begun)


def _write_safetensors(
    begun: Path, state: dict[str, Any], decoupled: Decoupled, visit: Visit
) -> None:
    """A header with all places, then every tensor at its place. The package's own writer takes the
    bytes of all at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES:
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise DecouplingError(
                f"safetensors cannot hold {name!r}, which is {what}: name a file that does not end "
                "in .safetensors"
            )
        size = tensor.numel() * tensor.element_size()
        places[name], span = end, [end, end + size]
        end += size
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with begun.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in _by_stage(state, decoupled, visit):
            file.seek(8 + len(text) + places[name])
            if tensor.numel():
                flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
                file.write(flat.clone().numpy().tobytes())
        file.truncate(8 + len(text) + end)

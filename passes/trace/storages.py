"""Tensors as they were: the same memory, seen in the same way, with the same contents.

``p.data = ...``, ``set_`` and ``resize_`` give a tensor other memory, and no operator says so; what
is written through ``p.data`` or a view of a buffer changes memory whose tensor does not know. So
memory is what is kept. Small ones are copied at once, which costs less than to watch them; for the
rest, every operator that is about to write to one is seen by a dispatch mode, and makes the copy.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)

from .values import OperatorMode, tensors_in

AT_ONCE = 1 << 22  # bytes of memory, smallest first, that are copied before anything runs
_UNDECLARED = {"running_mean", "running_var"}  # written to, whatever the operator's schema says


class Tensors:
    """Some tensors, remembered.

    Args:
        tensors: which.
        whole: copy all memory at once, for code that no mode can watch.

    Attributes:
        waiting: memory that is not copied yet, by storage.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], whole: bool = False) -> None:
        self._kept = [_Kept(t) for t in tensors]
        self.waiting: dict[int, _Memory] = {}
        self._copied: list[_Memory] = []
        found: dict[int, _Memory] = {}
        for kept in self._kept:
            for memory in kept.memories():
                found.setdefault(memory.key, memory)
        left = AT_ONCE
        for memory in sorted(found.values(), key=lambda m: m.nbytes):
            left -= memory.nbytes
            if whole or left >= 0:
                self._copy(memory)
            else:
                self.waiting[memory.key] = memory

    def protect(self, tensor: torch.Tensor) -> None:
        """Copy the memory of a tensor that is about to be written to."""
        for part in _parts(tensor):
            memory = self.waiting.pop(part.untyped_storage()._cdata, None)
            if memory is not None:
                self._copy(memory)

    def _copy(self, memory: _Memory) -> None:
        with _disable_current_modes():
            memory.copy()
        self._copied.append(memory)

    def restore(self) -> list[tuple[torch.Tensor, bool]]:
        """Put everything back. What did not change is not touched, and what did has its old version
        number, so that graphs that hold it find what they saved.

        Returns:
            The tensors that were given other memory or were written to, and which were given it.
        """
        with torch.no_grad(), _disable_current_modes():
            moved = [kept.restore_place() for kept in self._kept]
            written = {memory.key for memory in self._copied if memory.restore()}
            changed = [kept.restore_history() for kept in self._kept]
        for at, kept in enumerate(self._kept if written else ()):
            changed[at] |= any(memory.key in written for memory in kept.memories())
        pairs = zip(self._kept, moved, changed, strict=True)
        return [(k.tensor, elsewhere) for k, elsewhere, wrote in pairs if elsewhere or wrote]


class _Memory:
    """What one storage holds.

    Args:
        tensor: that sees it, with a version number of its own.
        storage: where it is.
    """

    def __init__(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> None:
        self.key, self.nbytes = storage._cdata, storage.nbytes()
        self._storage = storage
        whole = tensor.is_contiguous() and tensor.nbytes == self.nbytes
        self._seen = tensor if whole else None  # else by bytes
        self._content: torch.Tensor | None = None

    def copy(self) -> None:
        self._content = (_bytes(self._storage) if self._seen is None else self._seen).clone()

    def restore(self) -> bool:
        """Whether it had changed."""
        content = self._content
        assert content is not None
        if self._storage.nbytes() != self.nbytes:
            self._storage.resize_(self.nbytes)
        now = _bytes(self._storage) if self._seen is None else self._seen
        changed = not torch.equal(now, content)
        if changed:
            now.copy_(content)
        return changed


class _Kept:
    """One tensor: its memory and how it sees it, and what autograd knows of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.wraps = hasattr(tensor, "__tensor_flatten__")
        self.alias = tensor if self.wraps else tensor.data
        self.version = None if tensor.is_inference() else tensor._version
        self.requires_grad, self.is_leaf = tensor.requires_grad, tensor.is_leaf
        self.grad = tensor.grad if self.is_leaf else None
        hooks = tensor._backward_hooks
        self.hooks = dict(hooks) if hooks else {}

    def memories(self) -> Iterator[_Memory]:
        """Where its values are."""
        for part in _parts(self.alias):
            yield _Memory(part, part.untyped_storage())

    def restore_place(self) -> bool:
        """See the memory again that it saw; whether it saw another."""
        tensor = self.tensor
        if self.wraps or _is_same_place(tensor, self.alias):
            return False
        tensor.grad = None  # of another type or shape, maybe
        tensor.data = self.alias
        return True

    def restore_history(self) -> bool:
        """Be a leaf again, with the gradient, hooks and version that it had; whether it was written
        to.
        """
        tensor = self.tensor
        if self.is_leaf and not tensor.is_leaf and not tensor._is_view():
            tensor.detach_()
        if tensor.is_leaf:
            if tensor.requires_grad != self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            if tensor.grad is not self.grad:
                tensor.grad = self.grad
        hooks: Any = tensor._backward_hooks
        if hooks and dict(hooks) != self.hooks:
            hooks.clear()
            hooks.update(self.hooks)
        if self.version is None or tensor._version == self.version:
            return False
        torch._C._autograd._unsafe_set_version_counter((tensor,), (self.version,))
        return True


class Watch(OperatorMode):
    """Copies memory before an operator writes to it."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self._tensors = tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._tensors.waiting and not _is_faked():
            positions, names = _written(func)
            found = [args[k] for k in positions if k < len(args)]
            found += [kwargs[name] for name in names if name in kwargs]
            for tensor in tensors_in(found):
                self._tensors.protect(tensor)
        return func(*args, **kwargs)


def _is_faked() -> bool:
    """Whether operators run on fake tensors, and write to no memory."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """For code that has been watched once, and is now timed."""
    if isinstance(_get_current_dispatch_mode(), Watch):
        with _pop_mode_temporarily():
            yield
    else:
        yield


@functools.cache
def _written(func: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Which arguments an operator writes to; all of one that does not say."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return tuple(range(16)), ()
    found = [
        (k, a.name)
        for k, a in enumerate(schema.arguments)
        if (a.alias_info is not None and a.alias_info.is_write) or a.name in _UNDECLARED
    ]
    return tuple(k for k, _ in found), tuple(name for _, name in found)


def _is_same_place(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both see the same memory in the same way."""
    same = (
        tensor.shape == other.shape
        and tensor.dtype == other.dtype
        and tensor.layout == other.layout
        and tensor.device == other.device
    )
    if not same or tensor.layout != torch.strided:
        return same and all(map(_is_same_place, _parts(tensor.detach()), _parts(other)))
    return tensor.stride() == other.stride() and _address(tensor) == _address(other)


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except (NotImplementedError, RuntimeError):  # of a kind without data
        return 0


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether there is some that can be copied; it may be empty, and grow."""
    try:
        return not tensor.untyped_storage().nbytes() or tensor.untyped_storage().data_ptr() != 0
    except (NotImplementedError, RuntimeError):
        return False


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Tensors with data that a tensor consists of: mostly itself."""
    if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
        return []
    names: Any = getattr(tensor, "__tensor_flatten__", None)
    if names is not None:
        inner = [getattr(tensor, name) for name in names()[0]]
    elif tensor.layout in _SPARSE:
        inner = _SPARSE[tensor.layout](tensor.detach())
    else:
        return [tensor] if _has_memory(tensor) else []
    return [part for t in inner for part in _parts(t)]


def _compressed_rows(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]


def _compressed_columns(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]


_SPARSE = {
    torch.sparse_coo: lambda t: [t._indices(), t._values()],
    torch.sparse_csr: _compressed_rows,
    torch.sparse_bsr: _compressed_rows,
    torch.sparse_csc: _compressed_columns,
    torch.sparse_bsc: _compressed_columns,
}


def _bytes(memory: torch.UntypedStorage) -> torch.Tensor:
    """Memory as a tensor with a version of its own."""
    empty = torch.empty(0, dtype=torch.uint8, device=memory.device)
    return empty.set_(memory)

"""Settings of torch for the whole process, and the devices that there are."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

FAKES = "torch._subclasses.fake_tensor"
"""The logger of what fake tensors refuse."""
_CUDNN = ("enabled", "benchmark", "deterministic", "allow_tf32")
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")


def kept_settings() -> Callable[[], None]:
    """Remember the settings; the result puts back those that changed."""
    before = _read()
    return partial(_put_back, before)


@contextlib.contextmanager
def unheard(*names: str) -> Iterator[None]:
    """Without what loggers of these names would say from this thread: an error tells it."""
    here = threading.get_ident()

    def is_heard(record: logging.LogRecord) -> bool:
        return record.thread != here

    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(is_heard)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_heard)


def _read() -> list[Any]:
    return [get() for get, _ in _settings()]


def _put_back(before: list[Any]) -> None:
    for (get, put), value in zip(_settings(), before, strict=True):
        if get() != value:
            put(value)


def _deterministic() -> tuple[bool, bool]:
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warn_only


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _default_device() -> Any:
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return getattr(context, "device", None)


def _anomaly() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _set_anomaly(value: tuple[bool, bool]) -> None:
    torch.set_anomaly_enabled(*value)


_Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def _autocast(device: str) -> list[_Setting]:
    return [
        (partial(torch.is_autocast_enabled, device), partial(torch.set_autocast_enabled, device)),
        (partial(torch.get_autocast_dtype, device), partial(torch.set_autocast_dtype, device)),
    ]


def _attribute(owner: Any, name: str) -> _Setting:
    return partial(getattr, owner, name), partial(setattr, owner, name)


def _attention(name: str) -> _Setting:
    cuda = torch.backends.cuda
    return getattr(cuda, f"{name}_sdp_enabled"), getattr(cuda, f"enable_{name}_sdp")


_OF_ALL: list[_Setting] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (_default_device, torch.set_default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (_deterministic, _set_deterministic),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (_anomaly, _set_anomaly),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    _attribute(torch.backends.mkldnn, "enabled"),
    *(_attribute(torch.backends.cudnn, name) for name in _CUDNN),
    *(_attention(name) for name in _ATTENTION),
]


def _settings() -> list[_Setting]:
    return [*_OF_ALL, *itertools.chain.from_iterable(map(_autocast, device_kinds()))]


def device_kinds() -> tuple[str, ...]:
    """The CPU, and the accelerator that torch was made for."""
    found = torch.accelerator.current_accelerator()
    return ("cpu",) if found is None else ("cpu", found.type)


def casts() -> tuple[tuple[str, torch.dtype, bool], ...]:
    """Autocast now: for each kind of device what it would cast to, and whether it does."""
    kinds = device_kinds()
    return tuple([(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in kinds])


def accelerator() -> tuple[str, Any, list[torch.device]]:
    """The accelerator's type, its module of torch, and its devices; none where there is none."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return "", None, []
    module: Any = torch.get_device_module(device)
    return device.type, module, [torch.device(device.type, k) for k in range(module.device_count())]


def drawing_devices() -> list[torch.device]:
    """Those of the accelerator, whose generators may be in use; to ask would start it up."""
    _, module, devices = accelerator()
    return devices if devices and getattr(module, "is_initialized", lambda: True)() else []


def wait_for(device: torch.device) -> None:
    """Until an accelerator has done what it was given; on the CPU nothing waits."""
    found = torch.accelerator.current_accelerator()
    if found is not None and device.type == found.type:
        torch.accelerator.synchronize(device)

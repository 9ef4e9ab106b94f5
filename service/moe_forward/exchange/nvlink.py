"""Which GPUs are connected by NVLink, asked from the driver's NVML (libnvidia-ml) through ctypes.

Source: NVML API reference, nvmlDeviceGetP2PStatus; the numbers below are of nvml.h and fixed there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

_NVLINK = 2  # NVML_P2P_CAPS_INDEX_NVLINK
_OK = 0  # NVML_SUCCESS and NVML_P2P_STATUS_OK


def without_nvlink(first: str, others: Sequence[str], nvml: ctypes.CDLL | None = None) -> list[str]:
    """Return those of `others` that `first` does not reach over NVLink.

    first, others: UUIDs as NVML writes them, GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx.
    nvml: the library, or None to load it.
    Raises: OSError when NVML cannot be loaded or does not answer.
    """
    nvml = nvml or ctypes.CDLL("libnvidia-ml.so.1")
    _ask(nvml, "nvmlInit_v2")
    try:
        mine = _handle(nvml, first)
        return [other for other in others if not _linked(nvml, mine, _handle(nvml, other))]
    finally:
        _ask(nvml, "nvmlShutdown")


def _handle(nvml: ctypes.CDLL, uuid: str) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    _ask(nvml, "nvmlDeviceGetHandleByUUID", ctypes.c_char_p(uuid.encode()), ctypes.byref(handle))
    return handle


def _linked(nvml: ctypes.CDLL, first: ctypes.c_void_p, second: ctypes.c_void_p) -> bool:
    status = ctypes.c_int(-1)
    _ask(nvml, "nvmlDeviceGetP2PStatus", first, second, ctypes.c_int(_NVLINK), ctypes.byref(status))
    return status.value == _OK


def _ask(nvml: ctypes.CDLL, call: str, *arguments: object) -> None:
    code = getattr(nvml, call)(*arguments)
    if code != _OK:
        raise OSError(f"{call} of libnvidia-ml failed with code {code}")

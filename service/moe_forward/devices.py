"""Whether ranks can compute on this machine's GPUs, and why not."""

from __future__ import annotations

import logging

import torch

from moe_forward.errors import ConfigError, StartError
from w4afp8.library import LibraryMismatch, LibraryNotBuilt, load

log = logging.getLogger(__name__)

CAPABILITY = (9, 0)
"""Compute capability that the kernels are written for (Hopper)."""

DEFAULT_CPU_RANKS = 2


def choose(device: str, kernels: bool) -> str:
    """Resolve the device that ranks compute on, and log why.

    device: auto, cpu or cuda. kernels: the experts need the kernel library.
    Returns: cpu or cuda.
    Raises: StartError where cuda was asked for and does not work.
    """
    if device == "cpu":
        return device
    missing = _missing_for_cuda(kernels)
    if device == "cuda" and missing:
        raise StartError(f"device cuda: {missing}")
    if missing:
        log.log(logging.WARNING if torch.cuda.device_count() else logging.INFO, "device cpu: %s", missing)
        return "cpu"
    log.info("device cuda: %d GPUs of compute capability %d.%d", torch.cuda.device_count(), *CAPABILITY)
    return "cuda"


def choose_ranks(ranks: int | None, device: str) -> int:
    """Resolve the number of ranks: on GPUs one each.

    ranks: as configured, or None. device: as `choose` resolved it.
    Raises: ConfigError where there are fewer GPUs.
    """
    if device == "cpu":
        return ranks or DEFAULT_CPU_RANKS
    gpus = torch.cuda.device_count()
    if ranks is not None and ranks > gpus:
        raise ConfigError(f"ranks: {ranks} ranks need a GPU each, {gpus} are visible")
    return ranks or gpus


def cuda_index(name: str, visible_devices: str | None) -> int:
    """Return the index by which CUDA knows a GPU in this process.

    name: as Ray names it: as CUDA_VISIBLE_DEVICES does where that is set, else its number.
    visible_devices: the value of CUDA_VISIBLE_DEVICES, or None.
    """
    return int(name) if visible_devices is None else visible_devices.split(",").index(name)


def _missing_for_cuda(kernels: bool) -> str:
    """Return what keeps ranks from computing on GPUs here, empty where nothing does."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if torch.cuda.device_count() == 0:
        return "no GPU is visible (nvidia-smi, CUDA_VISIBLE_DEVICES)"
    if not kernels:
        return ""
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_capability(index)
        if found != CAPABILITY:
            name, expected = torch.cuda.get_device_name(index), ".".join(map(str, CAPABILITY))
            return f"GPU {index} ({name}) has compute capability {found[0]}.{found[1]}, the kernels need {expected}"
    try:
        load()
    except (LibraryNotBuilt, LibraryMismatch) as error:
        return str(error)
    return ""

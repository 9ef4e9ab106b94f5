"""What must hold on a GPU host before ranks join: each failure names what is missing and what to do about it."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
from pathlib import Path

import torch

from moe_forward.errors import StartError
from moe_forward.exchange.nvlink import without_nvlink

log = logging.getLogger(__name__)

NCCL_FIRST, NCCL_BEYOND = 23004, 23100
"""Versions that DeepEP 2.1 works with, as ncclGetVersion counts: 2.30.4 up to, not including, 2.31.0."""

INFINIBAND = Path("/sys/class/infiniband")


def use_device(device: torch.device) -> None:
    """See that this process has the GPU that its rank was given, and make it the current one.

    Raises: StartError.
    """
    if not torch.cuda.is_available():
        raise StartError(
            f"this rank was given {device}, but torch {torch.__version__} finds no usable CUDA GPU: "
            "see nvidia-smi, the driver's version, and that this torch was built for CUDA"
        )
    visible = torch.cuda.device_count()
    if device.index is None or device.index >= visible:
        raise StartError(
            f"this rank was given {device}, but {visible} GPU(s) are visible to it "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}): start fewer ranks or show more"
        )
    # Before anything else touches CUDA, or every rank would leave a context on the first GPU.
    torch.cuda.set_device(device)


def check_peers(device: torch.device, ranks: int) -> str:
    """See that `device` reaches the memory of enough of the visible GPUs to be one of `ranks`.

    GPUs that this process cannot see, such as those of other hosts, are not looked at.
    Returns: empty, or a sentence that says which GPUs are out of reach and why that may be.
    """
    others = [index for index in range(torch.cuda.device_count()) if index != device.index]
    unreached = [index for index in others if not torch.cuda.can_device_access_peer(device.index, index)]
    if len(others) - len(unreached) >= min(ranks - 1, len(others)):
        return ""
    names = ", ".join(f"cuda:{index}" for index in unreached)
    return (
        f"{device} has no peer access to {names}: see `nvidia-smi topo -p2p rw`; a virtual machine, the IOMMU's or "
        "PCIe's access control (ACS), or GPUs without a common NVLink or PCIe root take it away"
    )


def warn_without_nvlink(device: torch.device) -> None:
    """Log a warning where a visible GPU is not connected to `device` by NVLink, or where that cannot be found out."""
    uuids = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(torch.cuda.device_count())]
    mine = uuids.pop(device.index or 0)
    try:
        unlinked = without_nvlink(mine, uuids)
    except OSError as error:
        log.warning("%s: cannot find out about NVLink: %s", device, error)
        return
    if unlinked:
        log.warning(
            "%s has no NVLink to %s: tokens to ranks there travel over PCIe, several times slower",
            *(device, ", ".join(unlinked)),
        )


def check_memory(needed_bytes: int, device: torch.device, what: str) -> None:
    """See that the GPU has the memory that `what` is about to take.

    Raises: StartError.
    """
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    if needed_bytes > free_bytes:
        raise StartError(
            f"{what} needs {needed_bytes / 2**20:.0f} MiB on {device}, where {free_bytes / 2**20:.0f} of "
            f"{total_bytes / 2**20:.0f} MiB are free: lower max_step_tokens, serve fewer layers or use more ranks"
        )


def check_nccl_version(library: ctypes.CDLL | None = None) -> None:
    """See that the NCCL that torch has loaded is one that DeepEP works with.

    torch.cuda.nccl.version() does not tell: it is the version torch was compiled with.
    library: the loaded NCCL, or None to look for it.
    Raises: StartError.
    """
    try:
        library = library or ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOLOAD)
    except OSError as error:
        raise StartError(f"exchange deepep: this torch {torch.__version__} has not loaded NCCL: {error}") from error
    version = ctypes.c_int()
    library.ncclGetVersion(ctypes.byref(version))
    if not NCCL_FIRST <= version.value < NCCL_BEYOND:
        raise StartError(
            f"exchange deepep needs NCCL {_dotted(NCCL_FIRST)} or newer, below {_dotted(NCCL_BEYOND)}, and the process "
            f"has loaded {_dotted(version.value)}: install nvidia-nccl-cu13=={_dotted(NCCL_FIRST)} where torch finds "
            "its libraries or put its folder first on LD_LIBRARY_PATH or PYTHONPATH; or use exchange nccl"
        )


def check_compiler() -> None:
    """See that DeepEP, which compiles its kernels at their first use, finds the CUDA tools it runs.

    Raises: StartError.
    """
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc")
    home = Path(given) if given else Path(found).parents[1] if found else Path("/usr/local/cuda")
    nvcc = Path(os.environ.get("EP_JIT_NVCC_COMPILER") or home / "bin" / "nvcc")
    missing = [str(tool) for tool in (nvcc, home / "bin" / "cuobjdump") if not tool.is_file()]
    if missing:
        raise StartError(
            f"exchange deepep compiles its kernels at their first use and does not find {' and '.join(missing)}: "
            "install the CUDA toolkit's nvcc and cuobjdump and set CUDA_HOME; or use exchange nccl"
        )


def disable_gin_without_nic() -> None:
    """Tell DeepEP to do without RDMA where the host has no card for it: it would refuse to start.

    DeepEP reads nothing but the environment variable EP_DISABLE_GIN; one that is set is left as it is.
    """
    cards = list(INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    if not cards and "EP_DISABLE_GIN" not in os.environ:
        log.info("no RDMA card in %s: EP_DISABLE_GIN=1, ranks reach each other over NVLink alone", INFINIBAND)
        os.environ["EP_DISABLE_GIN"] = "1"


def _dotted(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"

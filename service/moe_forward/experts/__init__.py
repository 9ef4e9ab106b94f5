"""Expert backends: what computes a rank's experts. One file a backend, one entry in `EXPERTS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from moe_forward.errors import StartError
from moe_forward.experts.base import Experts, LayerExperts, PhaseClock, Progress
from w4afp8 import Granularity

__all__ = ["EXPERTS", "Experts", "LayerExperts", "PhaseClock", "Progress", "check", "choose", "create"]

Layers = Mapping[int, LayerExperts]


def _reference(layers: Layers, granularity: Granularity, device: torch.device, on_progress: Progress | None) -> Experts:
    from moe_forward.experts.reference import ReferenceExperts
    from moe_forward.experts.staging import bring_layers

    on_cpu = device.type == "cpu"  # there, mapped weights are used where they are
    return ReferenceExperts(layers if on_cpu else dict(bring_layers(layers, device, on_progress)), granularity)


def _cutlass(layers: Layers, granularity: Granularity, device: torch.device, on_progress: Progress | None) -> Experts:
    from moe_forward.experts.cutlass import CutlassExperts

    return CutlassExperts(layers, granularity, device, on_progress)


EXPERTS: dict[str, Callable[[Layers, Granularity, torch.device, Progress | None], Experts]] = {
    "reference": _reference,
    "cutlass": _cutlass,
}
"""Name -> factory; a factory imports its module only when it is asked for."""


def choose(name: str, device: str) -> str:
    """Resolve `auto`: reference on CPU, cutlass on GPUs.

    device: cpu or cuda.
    Raises: StartError for a backend that this version does not have, or that cannot compute on such a device.
    """
    if name == "auto":
        name = "reference" if device == "cpu" else "cutlass"
    _require_known(name)
    if name == "cutlass" and device == "cpu":
        raise StartError("experts cutlass: computes on GPUs, and the device is cpu; set experts: reference")
    return name


def check(name: str, device: torch.device) -> None:
    """Find out whether a backend can compute on a device, before any weight is read.

    name: as `choose` resolved it.
    Raises: StartError saying what is missing: a GPU that fits, or the kernel library.
    """
    _require_known(name)
    if name == "cutlass":
        from moe_forward.experts.cutlass import check_start

        check_start(device)


def create(
    name: str,
    layers: Layers,
    granularity: Granularity,
    device: torch.device | None = None,
    on_progress: Progress | None = None,
) -> Experts:
    """Make a backend, with its weights where it computes.

    name: as `choose` resolved it. granularity: of the activation scales.
    layers: layer id -> this rank's weights, on the CPU (mapped from files) or on `device`.
    device: to compute on; default: for cutlass the current GPU, for reference the CPU.
    on_progress: told of the bytes brought to a GPU, in this thread.
    Raises: StartError for a backend that this version does not have or that cannot compute here; CheckpointError for
        weights that are none.
    """
    device = device or torch.device("cuda" if name == "cutlass" else "cpu")
    check(name, device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return EXPERTS[name](layers, granularity, device, on_progress)


def _require_known(name: str) -> None:
    if name not in EXPERTS:
        raise StartError(f"experts {name} is not part of this version; it has {', '.join(sorted(EXPERTS))}")

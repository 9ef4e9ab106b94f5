"""Expert backends: what computes a rank's experts. One file a backend, one entry in `EXPERTS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moe_forward.errors import StartError
from moe_forward.experts.base import Experts, LayerExperts, PhaseClock
from w4afp8 import Granularity

__all__ = ["EXPERTS", "Experts", "LayerExperts", "PhaseClock", "choose", "create"]


def _reference(layers: Mapping[int, LayerExperts], granularity: Granularity) -> Experts:
    from moe_forward.experts.reference import ReferenceExperts

    return ReferenceExperts(layers, granularity)


EXPERTS: dict[str, Callable[[Mapping[int, LayerExperts], Granularity], Experts]] = {"reference": _reference}
"""Name -> factory; a factory imports its module only when it is asked for."""


def choose(name: str, device: str) -> str:
    """Resolve `auto`: reference on CPU, cutlass on GPUs.

    Raises: StartError for a backend that this version does not have.
    """
    if name == "auto":
        name = "reference" if device == "cpu" else "cutlass"
    _factory(name)
    return name


def create(name: str, layers: Mapping[int, LayerExperts], granularity: Granularity) -> Experts:
    """Make a backend.

    name: as `choose` resolved it. granularity: of the activation scales.
    layers: layer id -> this rank's weights, on the device to compute on.
    Raises: StartError for a backend that this version does not have.
    """
    return _factory(name)(layers, granularity)


def _factory(name: str) -> Callable[[Mapping[int, LayerExperts], Granularity], Experts]:
    if name == "cutlass":
        raise StartError(
            "experts cutlass: ranks of this version do not use the sm_90a kernel library of w4afp8 yet; "
            f"they have {', '.join(sorted(EXPERTS))}"
        )
    if name not in EXPERTS:
        raise StartError(f"experts {name} is not part of this version; it has {', '.join(sorted(EXPERTS))}")
    return EXPERTS[name]

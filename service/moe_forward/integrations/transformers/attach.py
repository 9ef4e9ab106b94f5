"""Replace the MoE blocks of a model by calls of a service, and put them back."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal

from torch import nn

from moe_forward.client import Client
from moe_forward.integrations.transformers.agreement import check_agreement, shown
from moe_forward.integrations.transformers.families import Family, Slot, find_blocks, find_family, read_sizes
from moe_forward.integrations.transformers.remote import (
    REPLACEMENTS,
    AddedByService,
    RemoteBlock,
    RemoteExperts,
    RemoteLayer,
)

Gate = Literal["server", "local"]
GATES = ("server", "local")


class Attached:
    """What was taken out of a model, to put it back; a context manager that does so at its end.

    layers: ids that the service computes, ascending. Only this object refers to what was taken out: who drops it
    frees those weights, and cannot detach any more.
    """

    def __init__(self, layers: tuple[int, ...], taken: list[Slot], closing: ExitStack) -> None:
        self.layers = layers
        self._taken = taken
        self._closing = closing

    def detach(self) -> None:
        """Put the model's own modules back and close the connections that `attach` opened; once more does nothing."""
        for slot in self._taken:
            setattr(slot.parent, slot.name, slot.child)
        self._taken = []
        self._closing.close()

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def attach(
    model: nn.Module,
    url: str,
    layers: Iterable[int] | None = None,
    *,
    gate: Gate = "server",
    max_request_tokens: int = 4096,
    **client_options: Any,
) -> Attached:
    """Let a service compute the MoE layers of a model of `transformers`, until they are detached.

    model: of a family in `FAMILIES`, any float type and device; with a language-model head or without.
    url: address of the service.
    layers: ids to attach, so that several services can share a model; None: every MoE layer of the model.
    gate: whose gate chooses the experts: "server", or "local" for the model's own.
    max_request_tokens: rows of one request at most, the service's setting of this name; longer inputs go in several.
    client_options: further arguments of `Client`, such as api_key, timeout_seconds and retries.
    Returns: what detaches; also a context manager. Nothing in the model is changed when this raises.
    Raises: ValueError for a model, layer or size that does not fit the service; MoEForwardClientError.
    """
    if gate not in GATES:
        raise ValueError(f"gate: expected one of {', '.join(GATES)}, got {gate!r}")
    if max_request_tokens < 1:
        raise ValueError(f"max_request_tokens: expected 1 or more, got {max_request_tokens}")
    family = find_family(model)
    blocks = _choose(model, family, layers)
    config: Any = model.config
    if gate == "server" and getattr(config, "output_router_logits", False):
        raise ValueError('output_router_logits: the model has no router logits with gate="server"; use gate="local"')

    with ExitStack() as closing:
        client = closing.enter_context(Client(url, **client_options))
        placement = client.placement()
        metadata = client.metadata(placement.get("model"))
        check_agreement(read_sizes(model, family), list(blocks), placement, metadata, routes=gate == "server")
        taken: list[Slot] = []
        for layer, block in blocks.items():
            remote = RemoteLayer(client, layer, max_request_tokens)
            for slot, replacement in _replacements(block, family, gate, remote):
                setattr(slot.parent, slot.name, replacement.train(slot.child.training))
                taken.append(slot)
        return Attached(tuple(blocks), taken, closing.pop_all())


def _choose(model: nn.Module, family: Family, layers: Iterable[int] | None) -> dict[int, Slot]:
    found = find_blocks(model, (family.block, RemoteBlock.__name__))
    if not found:
        raise ValueError(f"model: expected decoder layers with a {family.block}, found none")
    wanted = sorted(found if layers is None else set(layers))
    unknown = [layer for layer in wanted if layer not in found]
    if unknown or not wanted:
        raise ValueError(f"layers: expected MoE layers of the model, which are {shown(found)}, got {shown(unknown)}")
    attached = [
        layer for layer in wanted if any(isinstance(part, REPLACEMENTS) for part in found[layer].child.modules())
    ]
    if attached:
        raise ValueError(f"layers: {shown(attached)} are attached already; detach them first")
    return {layer: found[layer] for layer in wanted}


def _is_attached(block: nn.Module) -> bool:
    return any(isinstance(part, REPLACEMENTS) for part in block.modules())


def _replacements(block: Slot, family: Family, gate: Gate, remote: RemoteLayer) -> list[tuple[Slot, nn.Module]]:
    """What to put where, so that the service computes one block."""
    if gate == "server":
        return [(block, RemoteBlock(remote))]
    inside: list[tuple[str, nn.Module]] = [("experts", RemoteExperts(remote))]
    if family.shared_experts is not None:
        inside.append((family.shared_experts, AddedByService()))
    return [(Slot(block.child, name, block.child.get_submodule(name)), module) for name, module in inside]

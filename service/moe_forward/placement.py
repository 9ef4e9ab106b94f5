"""Where ranks go: a place on a node of the Ray cluster for each, those of a node one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from moe_forward.errors import StartError

POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class RankPlace:
    """A rank's place.

    here: on the node of this process. address: of its node. bundle: number in the placement group.
    """

    here: bool
    address: str
    bundle: int


class Places:
    """Places for `ranks` ranks, kept until `close`: a node is filled before the next. device: cpu or cuda."""

    def __init__(self, ranks: int, device: str) -> None:
        self._bundle = {"CPU": 1.0, "GPU": 1.0} if device == "cuda" else {"CPU": 1.0}
        self._ranks = ranks
        self._group: Any = placement_group([self._bundle] * ranks, strategy="PACK")

    async def settled(self, bundles: Collection[int], deadline: float) -> list[RankPlace]:
        """Wait until every one of `bundles` has a place; returns them by rank, those of this node first.

        Places of a node that was lost are given on other nodes as soon as there is room.
        deadline: on the loop's clock.
        Raises: StartError saying what the cluster lacks.
        """
        loop = asyncio.get_running_loop()
        while True:
            nodes = await asyncio.to_thread(self._nodes)
            if nodes.keys() >= set(bundles):
                return await asyncio.to_thread(_ordered, {bundle: nodes[bundle] for bundle in bundles})
            if loop.time() >= deadline:
                raise StartError(await asyncio.to_thread(self._lacking))
            await asyncio.sleep(POLL_SECONDS)

    async def there(self) -> tuple[int, ...]:
        """Return the bundles that have a place now, ascending."""
        return tuple(sorted(await asyncio.to_thread(self._nodes)))

    def strategy(self, place: RankPlace) -> PlacementGroupSchedulingStrategy:
        """Return how Ray is told to start an actor at a place."""
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=place.bundle)

    def close(self) -> None:
        """Give the places back."""
        remove_placement_group(self._group)

    def _nodes(self) -> dict[int, str]:
        """Return the node of each bundle that has a place; one whose node was lost has none until it gets another."""
        table = placement_group_table(self._group)
        if table["state"] not in ("CREATED", "RESCHEDULING"):  # before, places are only prepared
            return {}
        return {bundle: node for bundle, node in table["bundles_to_node_id"].items() if node}

    def _lacking(self) -> str:
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        has = ", ".join(f"{free.get(name, 0):g} {name} free" for name in self._bundle)
        return f"no room for {self._ranks} ranks, each of {_shown(self._bundle)}: the Ray cluster has {has}"


def this_node() -> NodeAffinitySchedulingStrategy:
    """Return how Ray is told to start an actor on the node of this process."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def this_address() -> str:
    """Return the address that the cluster knows this host by."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _ordered(nodes: dict[int, str]) -> list[RankPlace]:
    """Return the places by rank. nodes: bundle -> id of its node."""
    here = ray.get_runtime_context().get_node_id()
    known = ray.nodes()  # type: ignore[no-untyped-call]
    addresses = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in known}
    by_node = sorted((node != here, addresses[node], node, bundle) for bundle, node in nodes.items())
    return [RankPlace(not elsewhere, address, bundle) for elsewhere, address, _, bundle in by_node]


def _shown(bundle: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())

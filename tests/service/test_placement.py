"""Ranks in the order of their nodes, from what Ray says about its nodes."""

from __future__ import annotations

import random

import pytest
import ray

from moe_forward import placement
from moe_forward.placement import RankPlace

NODES = {"aa": "10.0.0.9", "bb": "10.0.0.10", "cc": "10.0.0.2"}


class Context:
    def get_node_id(self) -> str:
        return "bb"


@pytest.fixture(autouse=True)
def _nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(
        ray, "nodes", lambda: [{"NodeID": node, "NodeManagerAddress": address} for node, address in NODES.items()]
    )


@pytest.mark.parametrize("seed", range(5))
def test_ranks_of_a_node_follow_each_other_and_this_nodes_come_first(seed: int) -> None:
    generator = random.Random(seed)
    bundles = {bundle: generator.choice(["aa", "bb", "cc"]) for bundle in range(12)} | {12: "bb"}
    places = placement._ordered(bundles)

    assert sorted(place.bundle for place in places) == list(range(13)), "each bundle is one rank's"
    assert all(NODES[bundles[place.bundle]] == place.address for place in places)
    addresses = [place.address for place in places]
    assert addresses == sorted(addresses, key=addresses.index), "a node's ranks are not consecutive"
    assert [place.here for place in places] == [address == NODES["bb"] for address in addresses]
    assert places[0].here


def test_the_order_is_the_same_whenever_it_is_asked_for() -> None:
    assert placement._ordered({0: "cc", 1: "aa", 2: "cc"}) == [
        RankPlace(False, "10.0.0.2", 0),
        RankPlace(False, "10.0.0.2", 2),
        RankPlace(False, "10.0.0.9", 1),
    ]

"""Addresses and interfaces of this host."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_forward import interfaces
from moe_forward.errors import StartError
from moe_forward.interfaces import interface_of


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1"])
def test_loopback_is_lo(address: str) -> None:
    assert interface_of(address) == "lo"


def test_every_ipv4_address_that_the_kernel_tells_is_found() -> None:
    found = interfaces._ipv4_interfaces()
    assert found, "a host has loopback at least"
    for address, name in found.items():
        assert interface_of(str(address)) == name


def test_an_ipv6_address_is_found_where_the_kernel_lists_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "if_inet6"
    table.write_text("fd00000000000000000000000000000a 02 40 00 80     eth7\n")
    monkeypatch.setattr(interfaces, "IF_INET6", table)
    assert interface_of("fd00::a") == "eth7"


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
def test_an_address_of_another_host_is_refused_with_what_there_is(address: str) -> None:
    with pytest.raises(StartError, match=rf"no network interface of this host has the address {address}.*IFNAME"):
        interface_of(address)

"""Which network interface has an address: gloo and NCCL are told interfaces, Ray knows nodes by addresses."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

from moe_forward.errors import StartError

_SIOCGIFADDR = 0x8915  # netdevice(7)
_IFNAME_BYTES = 16
_IFREQ_BYTES = 40
_ADDRESS = slice(20, 24)  # of struct ifreq: behind the name, the family and the port of a sockaddr_in

IF_INET6 = Path("/proc/net/if_inet6")


def interface_of(address: str) -> str:
    """Return the name of this host's interface with an IP address.

    Raises: StartError where there is none.
    """
    wanted = ipaddress.ip_address(address)
    if wanted.is_loopback:
        return "lo"
    found = _ipv4_interfaces() if wanted.version == 4 else _ipv6_interfaces()
    if wanted not in found:
        known = ", ".join(f"{name} {its}" for its, name in found.items())
        raise StartError(
            f"no network interface of this host has the address {address} (it has {known}): set GLOO_SOCKET_IFNAME "
            "and NCCL_SOCKET_IFNAME where Ray is started, or start Ray with another --node-ip-address"
        )
    return found[wanted]


def _ipv4_interfaces() -> dict[ipaddress.IPv4Address | ipaddress.IPv6Address, str]:
    found: dict[ipaddress.IPv4Address | ipaddress.IPv6Address, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            request = struct.pack(f"{_IFREQ_BYTES}s", name.encode()[: _IFNAME_BYTES - 1])
            try:
                answer = fcntl.ioctl(sock, _SIOCGIFADDR, request)
            except OSError:  # it has no IPv4 address
                continue
            found[ipaddress.IPv4Address(answer[_ADDRESS])] = name
    return found


def _ipv6_interfaces() -> dict[ipaddress.IPv4Address | ipaddress.IPv6Address, str]:
    lines = IF_INET6.read_text().splitlines() if IF_INET6.exists() else []
    return {ipaddress.IPv6Address(bytes.fromhex(line.split()[0])): line.split()[-1] for line in lines}

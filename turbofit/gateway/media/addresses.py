"""Which addresses the gateway may fetch from: public ones, and private networks that are named."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Any, Final, cast

from turbofit.core.errors import UsageError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(map(ipaddress.ip_network, texts))


#: The private networks, of which a person may name parts (RFC 1918, RFC 6598, RFC 4193).
PRIVATE: Final = _networks(
    "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"
)
#: Addresses in private networks at which clouds give out what identifies a machine: Alibaba's,
#: Amazon's, Google's and Scaleway's. Others are link-local, or in `_INNER`.
_METADATA: Final = _networks("100.100.100.200/32", "fd00:ec2::/32", "fd20:ce::/32", "fd00:42::/32")
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
#: Inner networks that Python calls global: NAT64 for local use (RFC 8215), the address of Azure's
#: host, which gives out a machine's certificates, and a network of the IETF with Oracle's metadata.
_INNER: Final = _networks("64:ff9b:1::/48", "168.63.129.16/32", "192.0.0.0/24")


def may_dial(address: str, networks: Sequence[Network] = ()) -> bool:
    """Return whether an IP address is public, or in one of these private networks.

    Of an IPv6 address with an embedded IPv4 address, the latter counts. A cloud's metadata is never
    dialled, nor is a name. ``networks`` are parts of `PRIVATE`, so that loopback and link-local
    addresses are never dialled, either.
    """
    try:
        ip = innermost(address)
    except ValueError:
        return False
    return _is_public(ip) or (_is_in(ip, networks) and not _is_in(ip, _METADATA))


def private_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Return the networks of ``--allowed-media-networks``.

    Raises:
        UsageError: a text is no network, or its network is not private as a whole.
    """
    return tuple(map(_private_network, texts))


def _private_network(text: str) -> Network:
    hint = "write an address or a network, as 10.1.2.3, 10.1.0.0/16 or fd12:3456::/48"
    try:
        network = ipaddress.ip_network(text)
    except ValueError as exc:
        raise UsageError(f"--allowed-media-networks: {exc}", hint=hint) from None
    same = (it for it in PRIVATE if it.version == network.version)
    if not any(network.subnet_of(cast("Any", it)) for it in same):
        raise UsageError(
            f"--allowed-media-networks: {text} is no private network;"
            f" private are {', '.join(map(str, PRIVATE))}",
            hint=f"{hint}; public addresses need no network, and loopback is never fetched",
        )
    return network


def _is_in(ip: Address, networks: Iterable[Network]) -> bool:
    return any(ip in network for network in networks)


def innermost(address: str) -> Address:
    """Return the IP address of a text without its zone, or the IPv4 address embedded in it.

    Raises:
        ValueError: the text is no IP address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1]) or ip


def _is_public(ip: Address) -> bool:
    if _is_in(ip, _INNER) or (isinstance(ip, ipaddress.IPv6Address) and ip.is_site_local):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved

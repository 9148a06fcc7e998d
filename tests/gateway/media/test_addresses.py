from __future__ import annotations

import pytest

from turbofit.core.errors import UsageError
from turbofit.gateway.media.addresses import PRIVATE, may_dial, private_networks


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.9", "169.254.169.254", "0.0.0.0", "::1",
        "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
        "224.0.0.1", "255.255.255.255", "100.64.0.1", "not an address", "", "ff02::1",
        "2001:db8::1", "fec0::1", "64:ff9b:1::7f00:1", "::127.0.0.1", "fd00:ec2::254",
        "168.63.129.16", "::ffff:168.63.129.16", "100.100.100.200", "192.0.0.192",
    ],
)  # fmt: skip
def test_inner_addresses_are_known_however_they_are_wrapped(address) -> None:
    assert not may_dial(address)
    assert all(map(may_dial, ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808")))


@pytest.mark.parametrize(
    ("address", "good"),
    [
        ("10.1.2.3", True), ("::ffff:10.1.2.3", True), ("64:ff9b::a01:203", True),
        ("10.2.0.1", False), ("fd12::7", True), ("fd13::7", False), ("192.168.1.7", True),
        ("192.168.1.8", False), ("8.8.8.8", True),
    ],
)  # fmt: skip
def test_a_named_network_opens_its_own_addresses_alone(address, good) -> None:
    assert may_dial(address, private_networks(["10.1.0.0/16", "fd12::/16", "192.168.1.7"])) is good


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "fe80::1", "::ffff:a9fe:a9fe",
        "100.100.100.200", "::ffff:100.100.100.200", "fd00:ec2::254", "fd20:ce::254", "0.0.0.0",
        "168.63.129.16", "192.0.0.192", "224.0.0.1", "64:ff9b::a9fe:a9fe", "2130706433",
    ],
)  # fmt: skip
def test_no_network_opens_loopback_link_local_or_metadata(address) -> None:
    assert not may_dial(address, PRIVATE)


@pytest.mark.parametrize(
    "network",
    ["0.0.0.0/0", "127.0.0.0/8", "169.254.0.0/16", "8.0.0.0/8", "::/0", "10.1.2.3/8", "minio.lan"],
)
def test_what_is_no_private_network_is_refused(network) -> None:
    with pytest.raises(UsageError, match="--allowed-media-networks"):
        private_networks([network])

"""Ports on loopback: which are free, and that nobody else gets them."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from turbofit.core.errors import LaunchError
from turbofit.core.process import network


def test_ports_are_different_free_and_not_the_gateways(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as holders:
        ports = network.free_ports(5, holders)
        # Nobody else gets one, and a server that reuses addresses listens.
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((network.LOOPBACK, ports[0]))
        socket.create_server((network.LOOPBACK, ports[0])).close()
    assert len(set(ports)) == 5
    assert all(port < 32768 for port in ports)
    with ExitStack() as holders, monkeypatch.context() as patched:
        patched.setattr(network, "port_problem", lambda *_: "no engine could listen there")
        (port,) = network.free_ports(1, holders)
        with socket.socket() as other:
            other.bind((network.LOOPBACK, port))  # nobody holds it
    monkeypatch.setattr("random.SystemRandom.sample", lambda _, ports, __: ports)
    with ExitStack() as holders:
        (first,) = network.free_ports(1, holders)
    with ExitStack() as holders:
        assert first not in network.free_ports(1, holders, besides=first)
        monkeypatch.setattr(network, "_PORTS", [first] * 65536)  # more than sockets may be open
        with pytest.raises(LaunchError, match="no port"):
            network.free_ports(2, holders)

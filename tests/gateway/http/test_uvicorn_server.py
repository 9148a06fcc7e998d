"""What a gateway's process is: its heap, and its event loop."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
from contextlib import closing

import pytest

from turbofit.gateway.http.uvicorn_server import loop_without_lookups

#: What a process holds after each of eight threads held 16 MiB, one after another.
THREADS = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from turbofit.gateway.http.uvicorn_server import keep_large_blocks

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

keep_large_blocks()
barrier, before = Barrier(8), held()
with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda _: barrier.wait(), range(8)))
    for _ in range(200):
        pool.submit(lambda: len(bytearray(16 << 20))).result()
    print(held() - before)
"""
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")


def printed(code: str) -> str:
    return subprocess.check_output([sys.executable, "-c", code], text=True)


@GLIBC
def test_threads_keep_the_largest_block_once() -> None:
    assert int(printed(THREADS)) < 40 << 20


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_an_engine_is_connected_to_by_its_address_without_a_thread(address: str) -> None:
    """As `sock_connect` asks, without a type; eight names that nobody resolves held all threads."""
    loop = loop_without_lookups(pytest.importorskip("uvloop").Loop)()
    with closing(loop), pytest.raises(StopIteration) as returned:
        loop.getaddrinfo(address, 80, family=0).send(None)
    ((_, kind, _, _, found),) = returned.value.value
    assert (kind, found[:2]) == (socket.SOCK_STREAM, (address, 80))

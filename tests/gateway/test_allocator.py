from __future__ import annotations

import platform
import subprocess
import sys
import textwrap

import pytest

from turbofit.gateway import allocator

#: Page faults of a large block that is made again and again, and what the settings are.
CODE = textwrap.dedent(
    """
    import resource, sys
    from turbofit.gateway.allocator import keep_large_blocks

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(50):
            bytearray(4 << 20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    plain = faults()
    print(keep_large_blocks(), plain, faults())
    """
)

#: What a process holds after each of eight threads held 16 MiB, one after another.
THREADS = textwrap.dedent(
    """
    import sys
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier
    from turbofit.gateway.allocator import keep_large_blocks

    def held():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    if sys.argv[1] == "kept":
        keep_large_blocks()
    barrier, before = Barrier(8), held()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: barrier.wait(), range(8)))
        for _ in range(200):
            pool.submit(lambda: len(bytearray(16 << 20))).result()
        print(held() - before)
    """
)
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")


@GLIBC
def test_a_block_that_was_freed_is_there_for_the_next_one() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    knows, plain, kept = done.stdout.split()
    assert knows == "True"
    assert int(kept) * 10 < int(plain)


@GLIBC
def test_threads_keep_the_largest_block_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", THREADS, "kept"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 40 << 20


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    assert not allocator.keep_large_blocks()

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_a_block_that_was_freed_is_there_for_the_next_one() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    knows, plain, kept = done.stdout.split()
    assert knows == "True"
    assert int(kept) * 10 < int(plain)


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    assert not allocator.keep_large_blocks()

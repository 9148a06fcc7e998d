"""What a rehearsal's child tells of itself."""

from __future__ import annotations

import subprocess
import sys


def test_the_peak_is_this_process_own_and_not_its_parents() -> None:
    held = bytearray(400 << 20)
    held[::4096] = b"1" * len(held[::4096])
    del held
    program = "from turbofit.rehearse.turbomind.notes import peak_rss; print(peak_rss())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert 1 << 20 < int(done.stdout) < 200 << 20

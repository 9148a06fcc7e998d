"""Holds memory of a GPU until stdin ends, so that a large card behaves like a smaller one.

MIB are left for others. This process makes its own context (some 560 MiB on a large card) before it
measures, so that the context does not reduce them. It prints ``held BYTES LEFT`` once it holds the
memory; LEFT is at most 2 MiB more than MIB. It imports nothing of turbofit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

_PAGE, _PIECE = 2 << 20, 256 << 20


def hold(left: int, free: int, take: Callable[[int], None]) -> int:
    """Take all free bytes but ``left``, in pieces of whole pages; returns the bytes taken."""
    wanted = max(0, free - left) // _PAGE * _PAGE
    held = 0
    while held < wanted:
        size = min(_PIECE, wanted - held)
        take(size)
        held += size
    return held


def main() -> int:
    """Hold the memory by plain allocations: torch does not round pieces of 2 MiB and more."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.ballast", description=__doc__)
    parser.add_argument("mib", type=int, help="what is left for others")
    left = parser.parse_args().mib << 20
    import torch

    kept = [torch.zeros(8, device="cuda")]  # the context, and the first kernel
    torch.cuda.synchronize()

    def take(size: int) -> None:
        kept.append(torch.empty(size, dtype=torch.uint8, device="cuda"))

    free = torch.cuda.mem_get_info()[0]
    if free < left:
        sys.exit(f"{left >> 20} MiB are not free on this GPU beside a context: {free >> 20} are")
    held = hold(left, free, take)
    sys.stdout.write(f"held {held} {torch.cuda.mem_get_info()[0]}\n")
    sys.stdout.flush()
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())

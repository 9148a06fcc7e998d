"""Holds memory, so that a large card is a smaller one: ``python ballast.py MIB``, till input ends.

It says ``held BYTES`` once it has them. It imports nothing of turbofit.
"""

from __future__ import annotations

import sys

_PIECE = 256 << 20


def main() -> int:
    """Plain allocations, in pieces."""
    import torch

    wanted = int(sys.argv[1]) << 20
    kept = []
    while wanted > 0:
        size = min(_PIECE, wanted)
        kept.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        wanted -= size
    sys.stdout.write(f"held {sum(piece.numel() for piece in kept)}\n")
    sys.stdout.flush()
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measures GPUs with torch: ``python speed_program.py [SECONDS]`` prints JSON, line by line.

It is a separate process, since it makes a context on every visible GPU, and a driver with broken
peer access may crash it. It imports nothing of turbofit. Indices are CUDA's, sizes are bytes, times
seconds. ``{"card"}``: bytes/s, read plus written, of a copy inside a card, and FLOP/s of a product
of 16-bit matrices. ``{"pair"}``: a copy from one card to another, whether it used peer access,
whether all bytes arrived; and the same through pinned host memory. ``{"reduce"}``: NCCL's
all-reduce of a group. Exit code 3: no torch with CUDA.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

_MIB = 1 << 20
_CARD_BYTES, _SIDE = 256 * _MIB, 4096
_PAIR_BYTES, _SMALL = 64 * _MIB, 4096
_REDUCES = (8192, _MIB, 32 * _MIB)
_SECONDS = 60.0


def say(**facts: Any) -> None:
    """Print one line at once, so that results survive a later crash."""
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def timed(torch: Any, devices: list[int], act: Any, least: float = 0.05) -> float:
    """Seconds of one call: the fastest of three rounds, each with calls for ``least`` seconds."""

    def wait() -> None:
        for device in devices:
            torch.cuda.synchronize(device)

    act()
    wait()
    begun = time.perf_counter()
    act()
    wait()
    count = max(1, min(200, int(least / max(time.perf_counter() - begun, 1e-7))))
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        for _ in range(count):
            act()
        wait()
        best = min(best, (time.perf_counter() - begun) / count)
    return best


def card(torch: Any, index: int) -> None:
    """Print a card's speeds: bytes/s (read plus written) of a copy, FLOP/s of a product."""
    device = f"cuda:{index}"
    source = torch.empty(_CARD_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = timed(torch, [index], lambda: target.copy_(source))
    left = torch.ones(_SIDE, _SIDE, dtype=torch.float16, device=device)
    product = torch.empty_like(left)
    multiplied = timed(torch, [index], lambda: torch.matmul(left, left, out=product))
    say(card=index, bandwidth=2 * _CARD_BYTES / copied, flops=2 * _SIDE**3 / multiplied)


def arrived(torch: Any, source: int, target: int) -> bool:
    """Whether a copy arrives unchanged, for several patterns and sizes."""
    for seed, count in ((1, _PAIR_BYTES // 4), (2, 1 << 16), (3, 1023)):
        factor = 1_000_003 * seed
        sent = torch.arange(count, dtype=torch.int32, device=f"cuda:{source}") * factor
        got = torch.zeros(count, dtype=torch.int32, device=f"cuda:{target}")
        got.copy_(sent)
        torch.cuda.synchronize(target)
        should = torch.arange(count, dtype=torch.int32) * factor
        if not torch.equal(got.cpu(), should):
            return False
    return True


def pair(torch: Any, source: int, target: int) -> None:
    """Measure a copy from one card to another."""
    sent = torch.ones(_PAIR_BYTES, dtype=torch.uint8, device=f"cuda:{source}")
    got = torch.empty(_PAIR_BYTES, dtype=torch.uint8, device=f"cuda:{target}")
    both = [source, target]
    copied = timed(torch, both, lambda: got.copy_(sent))
    small, landed = sent[:_SMALL], got[:_SMALL]
    quick = timed(torch, both, lambda: landed.copy_(small), least=0.01)
    host = torch.empty(_PAIR_BYTES, dtype=torch.uint8, pin_memory=True)

    def staged() -> None:
        host.copy_(sent)
        got.copy_(host)

    say(
        pair=both,
        peer=bool(torch.cuda.can_device_access_peer(source, target)),
        right=arrived(torch, source, target),
        bandwidth=_PAIR_BYTES / copied,
        latency=quick,
        host_bandwidth=_PAIR_BYTES / timed(torch, both, staged),
    )


def reduce(torch: Any, group: list[int]) -> None:
    """Measure NCCL's all-reduce of a group, and check its sums."""
    nccl: Any = torch.cuda.nccl
    for size in _REDUCES:
        tensors = [
            torch.full((size // 2,), 1 + rank, dtype=torch.float16, device=f"cuda:{index}")
            for rank, index in enumerate(group)
        ]
        sums = [torch.empty_like(tensor) for tensor in tensors]
        seconds = timed(torch, group, lambda t=tensors, s=sums: nccl.all_reduce(t, s))
        wanted = len(group) * (len(group) + 1) / 2
        right = all(bool((total == wanted).all()) for total in sums)
        say(reduce=group, size=size, seconds=seconds, right=right)


def groups(count: int) -> list[list[int]]:
    """Groups of GPUs: every pair, the first four, and the first eight."""
    pairs = [[a, b] for a in range(count) for b in range(a + 1, count)]
    return pairs + [list(range(size)) for size in (4, 8) if size <= count]


def main() -> int:
    """Measure every card, pair and group until the time is over."""
    try:
        import torch
    except ImportError:
        return 3
    if not torch.cuda.is_available():
        return 3
    end = time.monotonic() + (float(sys.argv[1]) if len(sys.argv) > 1 else _SECONDS)
    count = torch.cuda.device_count()
    say(torch=torch.__version__, gpus=count)
    tasks: list[tuple[str, Any, tuple[Any, ...]]] = [("card", card, (i,)) for i in range(count)]
    tasks += [("pair", pair, (a, b)) for a in range(count) for b in range(count) if a != b]
    tasks += [("reduce", reduce, (group,)) for group in groups(count)]
    for name, act, of in tasks:
        if time.monotonic() > end:
            say(left_out=name, of=of)
            continue
        try:
            act(torch, *of)
        except RuntimeError as exc:
            say(failed=name, of=of, why=str(exc).partition("\n")[0][:200])
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())

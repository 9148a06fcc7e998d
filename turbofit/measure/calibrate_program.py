"""Measures a host and its GPUs: ``python -I calibrate_program.py SECONDS INDEX...``.

The program runs as a process of its own: it makes a context on every visible GPU, and a driver with
broken peer access may crash or hang. It imports nothing of turbofit. Each printed line is a JSON
object with one field of ``core.machine.Measured``. ``INDEX``: a GPU's number on the machine, in the
order of CUDA's devices. Sizes are in bytes, times in seconds. No task begins after ``SECONDS``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from itertools import combinations, permutations
from typing import Any

_MIB = 1 << 20
_CARD_BYTES, _SIDE = 256 * _MIB, 4096
_PAIR_BYTES, _SMALL = 64 * _MIB, 4096
_REDUCES = (8192, _MIB, 32 * _MIB)
#: The photograph, the grid of its eight tiles, and its thumbnail, in pixels.
_PHOTOGRAPH, _GRID, _TILE = (1920, 1080), (4 * 448, 2 * 448), (448, 448)
#: Seconds of processor time for which the photograph is prepared again and again.
_IMAGE_SECONDS = 1.0


def say(**field: Any) -> None:
    """Print one field at once, so that results survive a later crash."""
    sys.stdout.write(json.dumps(field) + "\n")
    sys.stdout.flush()


def image() -> None:
    """Print the least processor time in which one core prepares a photograph, as engines do.

    The program decodes a JPEG, resizes the picture to eight tiles and a thumbnail, and converts its
    bytes by a table, one channel after the other.
    """
    try:
        import numpy as np
        from PIL import Image
    except ImportError as exc:
        say(left_out=f"an image: {exc}")
        return
    # Soft areas, with noise as from a camera's sensor.
    soft = Image.effect_noise((_PHOTOGRAPH[0] // 16, _PHOTOGRAPH[1] // 16), 90).resize(_PHOTOGRAPH)
    noise, file = Image.effect_noise(_PHOTOGRAPH, 20), BytesIO()
    Image.blend(soft, noise, 0.2).convert("RGB").save(file, "JPEG", quality=90)
    table: Any = np.arange(256, dtype=np.int16)
    rounds: list[float] = []
    while not rounds or sum(rounds) < _IMAGE_SECONDS:
        began = time.process_time()
        picture = Image.open(BytesIO(file.getvalue())).convert("RGB")
        for size in (_GRID, _TILE):
            pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
            values = np.empty((3, *pixels.shape[:2]), table.dtype)
            for channel in range(3):
                np.take(table, pixels[:, :, channel], out=values[channel], mode="clip")
        rounds.append(time.process_time() - began)
    say(image_seconds=min(rounds))


class Cards:
    """Measures GPUs with torch; ``indices`` has the machine's GPU number of each CUDA device."""

    def __init__(self, torch: Any, indices: list[int]) -> None:
        self._torch, self._indices = torch, indices

    def card(self, index: int) -> None:
        """Print a card's bytes/s in a copy (read and written), and FLOP/s in a matrix product."""
        torch, device = self._torch, f"cuda:{index}"
        source = torch.empty(_CARD_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copied = self._timed([index], lambda: target.copy_(source))
        left = torch.ones(_SIDE, _SIDE, dtype=torch.float16, device=device)
        product = torch.empty_like(left)
        multiplied = self._timed([index], lambda: torch.matmul(left, left, out=product))
        bandwidth, flops = 2 * _CARD_BYTES / copied, 2 * _SIDE**3 / multiplied
        say(cards={"index": self._indices[index], "bandwidth": bandwidth, "flops": flops})

    def pair(self, source: int, target: int) -> None:
        """Copy from one card to another; print whether the copy is right, and its speeds.

        The speeds are bytes/s directly and through the host, and the seconds of a small copy.
        """
        torch, both = self._torch, [source, target]
        sent = torch.ones(_PAIR_BYTES, dtype=torch.uint8, device=f"cuda:{source}")
        got = torch.empty(_PAIR_BYTES, dtype=torch.uint8, device=f"cuda:{target}")
        host = torch.empty(_PAIR_BYTES, dtype=torch.uint8, pin_memory=True)
        small, landed = sent[:_SMALL], got[:_SMALL]

        def staged() -> None:
            host.copy_(sent)
            got.copy_(host)

        right = self._arrived(source, target)
        facts = {
            "source": self._indices[source],
            "target": self._indices[target],
            "peer": right and bool(torch.cuda.can_device_access_peer(source, target)),
            "right": right,
            "bandwidth": _PAIR_BYTES / self._timed(both, lambda: got.copy_(sent)),
            "latency": self._timed(both, lambda: landed.copy_(small), least=0.01),
            "host_bandwidth": _PAIR_BYTES / self._timed(both, staged),
        }
        say(pairs=facts)

    def reduce(self, *group: int) -> None:
        """Print the seconds of NCCL's all-reduces in a group, and whether their sums are right."""
        torch, names = self._torch, [self._indices[index] for index in group]
        for size in _REDUCES:
            tensors = [
                torch.full((size // 2,), 1 + rank, dtype=torch.float16, device=f"cuda:{index}")
                for rank, index in enumerate(group)
            ]
            sums = [torch.empty_like(tensor) for tensor in tensors]
            act = partial(torch.cuda.nccl.all_reduce, tensors, sums)
            seconds = self._timed(list(group), act)
            wanted = len(group) * (len(group) + 1) / 2
            right = all(bool((total == wanted).all()) for total in sums)
            say(reduces={"gpus": names, "size": size, "seconds": seconds, "right": right})

    def _arrived(self, source: int, target: int) -> bool:
        """Return whether a copy arrives unchanged, for several patterns and sizes."""
        torch = self._torch
        for seed, count in ((1, _PAIR_BYTES // 4), (2, 1 << 16), (3, 1023)):
            factor = 1_000_003 * seed
            sent = torch.arange(count, dtype=torch.int32, device=f"cuda:{source}") * factor
            got = torch.zeros(count, dtype=torch.int32, device=f"cuda:{target}")
            got.copy_(sent)
            torch.cuda.synchronize(target)
            if not torch.equal(got.cpu(), torch.arange(count, dtype=torch.int32) * factor):
                return False
        return True

    def _timed(self, devices: list[int], act: Callable[[], Any], least: float = 0.05) -> float:
        """Return the seconds of one call in the fastest of three rounds.

        A round calls ``act`` up to 200 times, for about ``least`` seconds.
        """

        def spent(count: int) -> float:
            begun = time.perf_counter()
            for _ in range(count):
                act()
            for device in devices:
                self._torch.cuda.synchronize(device)
            return time.perf_counter() - begun

        spent(1)  # the first call may load kernels
        count = max(1, min(200, int(least / max(spent(1), 1e-7))))
        return min(spent(count) for _ in range(3)) / count


def main(seconds: float, indices: list[int]) -> None:
    """Measure an image, every card, pair and group until the time is over."""
    end = time.monotonic() + seconds
    image()
    try:
        import torch
    except ImportError:
        torch = None
    if torch is None or not torch.cuda.is_available():
        say(left_out="cards and links: there is no torch with CUDA beside turbofit")
        return
    say(torch=torch.__version__)
    cards, devices = Cards(torch, indices), range(torch.cuda.device_count())
    groups: list[tuple[int, ...]] = [*combinations(devices, 2)]
    groups += [tuple(devices[:size]) for size in (4, 8) if size <= len(devices)]
    tasks: list[tuple[str, Any, tuple[int, ...]]] = [("card", cards.card, (n,)) for n in devices]
    tasks += [("copy", cards.pair, pair) for pair in permutations(devices, 2)]
    tasks += [("all-reduce", cards.reduce, group) for group in groups]
    for name, act, group in tasks:
        what = f"{name} of GPU {'+'.join(str(indices[device]) for device in group)}"
        if time.monotonic() > end:
            say(left_out=f"{what}: no time left")
            continue
        try:
            act(*group)
        except RuntimeError as exc:
            reason = str(exc).partition("\n")[0][:200]
            say(left_out=f"{what}: {reason}")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(float(sys.argv[1]), [int(word) for word in sys.argv[2:]])

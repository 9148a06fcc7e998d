"""The clock of a pretend machine: the file through which the engine's forwards take their time.

csrc/clock.c reads the seconds from it and writes what passed; whoever serves turns it on.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from turbofit.core.machine import StepPoint

#: The variable that names the file for the C side.
CLOCK: Final = "TURBOFIT_PRETEND_CLOCK"
#: csrc/clock.c: the factor, five counters in nanoseconds, two seconds; then two tables.
_HEAD: Final = struct.Struct("<d5q2d")
_MOST: Final = 1 << 18
_SIZE: Final = _HEAD.size + 2 * 8 * _MOST
_SECOND: Final = 1e9
#: The largest share of the time by which the host may hold the cards up: beyond it, the host
#: decided what was measured.
HELD_UP: Final = 0.05


def held_up_share(late: float, idle: float, passed: float) -> float:
    """Return the share of ``passed`` seconds by which the host held a card up (`ClockReading`)."""
    return max(late, idle) / passed


class StepTable(NamedTuple):
    """Seconds of an engine's forwards on one rank, as the plan's own step has them.

    ``forward`` has those of a forward over N tokens at place N, ``image`` those of an image of N
    vision units; ``pair`` is for a token of a prompt and a token that it attends to, ``context``
    for a token whose keys and values an answer's step reads.
    """

    forward: Sequence[float]
    image: Sequence[float]
    pair: float
    context: float

    def seconds(self, point: StepPoint) -> float:
        """Return the table's seconds of one forward."""
        seconds = self.forward[point.sequences + point.prompt] + point.cached * self.context
        seconds += point.prompt**2 / 2 * self.pair
        return seconds + (self.image[point.units] if point.units else 0.0)


class ClockReading(NamedTuple):
    """What passed on the first card: seconds, and the number of forwards.

    ``until`` is the time of `time.monotonic` until which the cards work; ``busy`` are the table's
    seconds of all forwards; ``late`` is how much later than its time work was seen to be done, and
    ``idle`` how long the card waited for the host though requests were under way. Both are the
    host's fault, and not divided by any factor.
    """

    factor: float = 0.0
    until: float = 0.0
    busy: float = 0.0
    late: float = 0.0
    idle: float = 0.0
    forwards: int = 0


class ClockFile:
    """The file at ``path``; `write` makes it. Once it runs, all takes ``factor`` times as long."""

    def __init__(self, path: Path, factor: float = 1.0) -> None:
        self.path, self.factor = path, factor

    def write(self, table: StepTable) -> None:
        """Make the file for an engine that is about to start; no time passes before `run`.

        Work beyond the table's ends takes no time.

        Raises:
            OSError: the disk has no room for the file; an engine that maps it must not find a hole.
        """
        with self.path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, _SIZE)
            file.write(_HEAD.pack(0.0, 0, 0, 0, 0, 0, table.pair, table.context))
            for place, seconds in enumerate((table.forward, table.image)):
                file.seek(_HEAD.size + place * 8 * _MOST)
                file.write(array("d", seconds[:_MOST]).tobytes())

    def run(self) -> None:
        """Let forwards take their time from now on."""
        with self.path.open("r+b") as file, mmap.mmap(file.fileno(), _SIZE) as page:
            page[:8] = struct.pack("<d", self.factor)

    def read(self) -> ClockReading:
        """Return what passed so far; all 0 if the file cannot be read."""
        try:
            with self.path.open("rb") as file:
                factor, until, busy, late, idle, forwards, *_ = _HEAD.unpack(file.read(_HEAD.size))
        except (OSError, struct.error):
            return ClockReading()
        passed = (busy / _SECOND, late / _SECOND, idle / _SECOND)
        return ClockReading(factor, until / _SECOND, *passed, forwards)

"""The clock of a pretend machine: a file with the seconds that the engine's forwards take.

csrc/clock.c reads these seconds, and writes the time that passed. The clock stands until
`ClockFile.run` is called.
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
#: The head of the file, as in csrc/clock.c: the factor; until, busy, late and idle in nanoseconds;
#: the number of forwards; pair and context in seconds. Two tables follow.
_HEAD: Final = struct.Struct("<d5q2d")
_MOST: Final = 1 << 18
_SIZE: Final = _HEAD.size + 2 * 8 * _MOST
_SECOND: Final = 1e9
#: The largest share of the time that the host may delay the cards: with a larger share, the
#: measured speed is the host's.
HELD_UP: Final = 0.05


def held_up_share(late: float, idle: float, passed: float) -> float:
    """Return the share of ``passed`` seconds that the host delayed a card (see `ClockReading`)."""
    return max(late, idle) / passed


class StepTable(NamedTuple):
    """Seconds of an engine's forwards on one rank, by the plan's forecast of speed.

    ``forward[N]`` is for a forward over N tokens, ``image[N]`` for an image of N vision units.
    ``pair`` is for one token of a prompt and one token that it attends to. ``context`` is for one
    token whose keys and values a step of an answer reads.
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
    """The time that passed on the first card, in seconds, and the number of forwards.

    The cards work until ``until``, by `time.monotonic`. ``busy`` is the sum of the table's seconds
    of all forwards. ``late`` is the time from the end of the card's work to the moment in which the
    host noticed this end. ``idle`` is the time in which the card waited for the host although
    requests were running. The host causes ``late`` and ``idle``, so no factor divides them.
    """

    factor: float = 0.0
    until: float = 0.0
    busy: float = 0.0
    late: float = 0.0
    idle: float = 0.0
    forwards: int = 0


class ClockFile:
    """The clock's file at ``path``. Forwards take ``factor`` times the seconds of its table."""

    def __init__(self, path: Path, factor: float = 1.0) -> None:
        self.path, self.factor = path, factor

    def write(self, table: StepTable) -> None:
        """Make the file for an engine that is about to start; forwards take no time before `run`.

        A forward with more tokens than the table has takes no time.

        Raises:
            OSError: the disk has no room for the whole file.
        """
        with self.path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, _SIZE)
            file.write(_HEAD.pack(0.0, 0, 0, 0, 0, 0, table.pair, table.context))
            for place, seconds in enumerate((table.forward, table.image)):
                file.seek(_HEAD.size + place * 8 * _MOST)
                file.write(array("d", seconds[:_MOST]).tobytes())

    def run(self) -> None:
        """Start the clock: from now on, forwards take time."""
        with self.path.open("r+b") as file, mmap.mmap(file.fileno(), _SIZE) as page:
            page[:8] = struct.pack("<d", self.factor)

    def read(self) -> ClockReading:
        """Return the time that has passed so far; all figures are 0 if the file cannot be read."""
        try:
            with self.path.open("rb") as file:
                factor, until, busy, late, idle, forwards, *_ = _HEAD.unpack(file.read(_HEAD.size))
        except (OSError, struct.error):
            return ClockReading()
        passed = (busy / _SECOND, late / _SECOND, idle / _SECOND)
        return ClockReading(factor, until / _SECOND, *passed, forwards)

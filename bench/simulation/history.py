"""What happened in a simulated world, line by line; equal seeds have equal histories."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from bench.simulation.scheduler import Scheduler

__all__ = ["History", "Result"]


@dataclass
class Result:
    """What a history showed; ``processor`` are the seconds that it took, no part of it."""

    seed: int
    violations: list[str]
    counts: dict[str, int]
    digest: str
    steps: int
    log: list[str] = field(repr=False, default_factory=list)
    processor: float = 0.0


class History:
    """The time of a world and what happened in it; a base of worlds.

    Args:
        seed: decides everything.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.scheduler = Scheduler(lambda exc: self.violate(f"a thread ended with {exc!r}"))
        self.log: list[str] = []
        self.violations: list[str] = []
        self.counts: dict[str, int] = {}
        self._digest = hashlib.blake2b(digest_size=16)
        self._pid = 1000

    def trace(self, text: str) -> None:
        """A line of the history."""
        line = f"{self.scheduler.now:.6f} {text}"
        self._digest.update(line.encode())
        self.log.append(line)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def violate(self, what: str) -> None:
        """Note that something that must hold did not."""
        self.trace(f"VIOLATION {what}")
        self.violations.append(what)

    def new_pid(self) -> int:
        self._pid += 1
        return self._pid

    def result(self) -> Result:
        """What it showed until now."""
        return Result(
            self.seed, [*self.violations], dict(self.counts), self._digest.hexdigest(),
            self.scheduler.steps, [*self.log],
        )  # fmt: skip

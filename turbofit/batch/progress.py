"""How far a batch is, and its result."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Final

from turbofit.core.process.progress import Step
from turbofit.core.struct import Struct, const, doc

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BATCH_SCHEMA", "BatchProgress", "BatchResult"]

BATCH_SCHEMA: Final = "turbofit.batch/1"


class BatchResult(Struct):
    """A batch at its end. ``seconds`` and the rate are of this run alone."""

    schema: Annotated[str, const(BATCH_SCHEMA)] = BATCH_SCHEMA
    turbofit_version: str
    input: str
    output: str
    errors: Annotated[str | None, doc("The file of the failures; null where there are none.")]
    items: int
    answered: int
    failed: int
    left: Annotated[int, doc("Items without a line, where a signal ended the run.")]
    before: Annotated[int, doc("Items that had their line before this run.")]
    lowered: Annotated[int, doc("Answers to requests that the server says it lowered.")] = 0
    seconds: float
    items_per_second: float


class BatchProgress:
    """Counts of a run.

    Args:
        total: items of the input.
        answered: before this run.
        failed: before this run.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        total: int,
        answered: int,
        failed: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.answered, self.failed = total, answered, failed
        self.before, self._clock = answered + failed, clock
        self._began: float | None = None
        self.lowered = 0
        #: Why the batch waits at this moment; empty where it goes on.
        self.waiting = ""

    def begin(self) -> None:
        """Items are sent from now on."""
        self._began = self._clock()

    def count(self, *, failed: bool) -> None:
        """One item more has its line."""
        if failed:
            self.failed += 1
        else:
            self.answered += 1

    @property
    def left(self) -> int:
        """Items without a line."""
        return self.total - self.answered - self.failed

    @property
    def seconds(self) -> float:
        """Since items are sent; 0 before."""
        return 0.0 if self._began is None else self._clock() - self._began

    @property
    def rate(self) -> float:
        """Items a second of this run."""
        return (self.answered + self.failed - self.before) / max(self.seconds, 1e-9)

    @property
    def step(self) -> Step:
        """All of it for people."""
        what = self.waiting or (f"{self.rate:,.1f}/s" if self.rate else "")
        detail = f"{self.failed:,} failed{', ' * bool(what)}{what}"
        return Step("sending", self.answered + self.failed, self.total, detail=detail)

"""How far a batch is, and its result."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Final

from turbofit.core.process.progress import Step
from turbofit.core.struct import Struct, const, doc

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.batch.output_file import OutputFile

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
    """How far a run is.

    Args:
        total: items of the input.
        output: counts their lines; those that it has now are of earlier runs.
        clock: seconds that only grow.
    """

    def __init__(
        self, total: int, output: OutputFile, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._output, self._clock = output, clock
        self.resume(total)
        self._began: float | None = None
        #: Answers to requests that the server says it lowered.
        self.lowered = 0
        #: Why the batch waits at this moment; empty where it goes on.
        self.waiting = ""

    def resume(self, total: int) -> None:
        """The input is read, and the output."""
        self.total, self.before = total, self._lines

    def begin(self) -> None:
        """Items are sent from now on."""
        self._began = self._clock()

    def wait(self, why: str) -> None:
        """It waits, or goes on where ``why`` is empty."""
        self.waiting = why

    @property
    def _lines(self) -> int:
        return self._output.answered + self._output.failed

    @property
    def left(self) -> int:
        """Items without a line."""
        return self.total - self._lines

    @property
    def seconds(self) -> float:
        """Since items are sent; 0 before."""
        return 0.0 if self._began is None else self._clock() - self._began

    @property
    def rate(self) -> float:
        """Items a second of this run."""
        return (self._lines - self.before) / max(self.seconds, 1e-9)

    @property
    def step(self) -> Step:
        """All of it for people."""
        what = self.waiting or (f"{self.rate:,.1f}/s" if self.rate else "")
        detail = f"{self._output.failed:,} failed{', ' * bool(what)}{what}"
        return Step("sending", self._lines, self.total, detail=detail)

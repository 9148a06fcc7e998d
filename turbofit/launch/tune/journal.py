"""How far a tuning has come, on disk after every trial; of one model, promise, load and machine."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.process.files import write_atomic
from turbofit.core.process.state import state_dir
from turbofit.core.struct import Struct, const, to_json
from turbofit.core.tuning import TrialRecord

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Journal"]

_SCHEMA: Final = "turbofit.tuning/1"


class _Pages(Struct):
    schema: Annotated[str, const(_SCHEMA)] = _SCHEMA
    seconds: float = 0.0
    trials: tuple[TrialRecord, ...] = ()


class Journal:
    """The trials so far.

    Args:
        key: of what is tuned.
        pretend: whether the GPUs are; such tunings are kept apart.
    """

    def __init__(self, key: str, *, pretend: bool) -> None:
        self._room, self._name = "tuning-pretend" if pretend else "tuning", f"{key}.json"
        pages = _Pages()
        with suppress(OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            read = msgspec.json.decode(self._path(make=False).read_bytes(), type=_Pages)
            pages = read if read.schema == _SCHEMA else pages
        #: Seconds that earlier runs have spent.
        self.seconds, self.trials = pages.seconds, pages.trials

    def add(self, trial: TrialRecord) -> None:
        """Keep a trial."""
        self.trials = (*self.trials, trial)
        self.seconds += trial.seconds
        # A folder that cannot be written costs what could be resumed, never the run.
        with suppress(OSError, UsageError):
            pages = _Pages(seconds=self.seconds, trials=self.trials)
            write_atomic(self._path(), to_json(pages), mode=0o600)

    def forget(self) -> None:
        """Drop it."""
        with suppress(OSError):
            self._path(make=False).unlink()
        self.seconds, self.trials = 0.0, ()

    def _path(self, *, make: bool = True) -> Path:
        return state_dir(self._room, make=make) / self._name

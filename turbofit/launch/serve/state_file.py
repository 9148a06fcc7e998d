"""A document of the state folder that may be missing."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.process.files import state_dir, write_atomic
from turbofit.core.struct import Struct, to_json

if TYPE_CHECKING:
    from pathlib import Path


T = TypeVar("T", bound=Struct)


@dataclass(frozen=True)
class StateFile(Generic[T]):
    """A document of one type with a tag, readable by its user alone.

    What cannot be read, or is of another version, is not there; a folder that cannot be written
    costs the document, never the command.
    """

    room: str
    name: str
    type: type[T]

    def read(self) -> T | None:
        with suppress(OSError, ValueError, RecursionError):
            return msgspec.json.decode(self._path(make=False).read_bytes(), type=self.type)
        return None

    def write(self, document: T) -> None:
        with suppress(OSError, UsageError):
            write_atomic(self._path(make=True), to_json(document), mode=0o600)

    def forget(self) -> bool:
        try:
            self._path(make=False).unlink()
        except OSError:
            return False
        return True

    def _path(self, *, make: bool) -> Path:
        return state_dir(self.room, make=make) / f"{self.name}.json"

"""Keeps what `suspects` knows in a file of the state folder, for the next start and for people.

A file belongs to one model on one kind of cards with one version of the engine: another version may
well survive what this one died of. ``turbofit watch --forget`` edits the same file; who writes
merges what others have written since, under a lock. Where somebody keeps that lock, what is known
is written later: `QuarantineFile.unwritten`.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.process.files import write_atomic
from turbofit.core.process.locks import lock_soon
from turbofit.core.process.state import state_dir
from turbofit.core.struct import to_json
from turbofit.gateway.quarantine.fingerprints import KEY_BYTES
from turbofit.gateway.quarantine.quarantined import QUARANTINE_SCHEMA, Quarantined
from turbofit.gateway.quarantine.suspects import Suspects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from turbofit.core.plan import Plan

__all__ = [
    "QuarantineFile",
    "installation_key",
    "kept_time",
    "pardon",
    "quarantine_file",
    "quarantine_path",
]

_ROOM: Final = "quarantine"
_LARGEST: Final = 16 << 20
_NOTHING: Final = (0, 0)
#: What the wall's clock showed when the other one showed 0.
_SINCE: Final = time.time() - time.monotonic()


def kept_time() -> float:
    """Seconds by the wall's clock as it was at the start of this process.

    While the process runs nobody is let in, or kept out, because that clock is set. Under: what was
    written by a clock that was behind may be over at the next start.
    """
    return _SINCE + time.monotonic()


def quarantine_path(plan: Plan, engine_version: str, *, pretend: bool = False) -> Path:
    """The file of a plan's model, cards and engine.

    Raises:
        OSError: the state folder cannot be made.
    """
    model = plan.model.hub_id or plan.model.name
    # Their kinds, not their number: a card that is lost must not free who is convicted.
    cards = sorted({plan.machine.gpu(index).name for index in plan.machine.visible})
    facts = [model, plan.model.source.checkpoint or "", *cards]
    facts += [plan.engine.name, engine_version, str(pretend)]
    digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    return state_dir(_ROOM) / f"{digest}.json"


def quarantine_file(plan: Plan, engine_version: str, *, pretend: bool = False) -> str | None:
    """The file's name for a gateway's configuration; None where no folder can be made."""
    with suppress(OSError):
        return str(quarantine_path(plan, engine_version, pretend=pretend))
    return None


def installation_key() -> bytes:
    """The secret of this installation, made at its first use.

    Where no file can be written it is this process's alone: its fingerprints mean nothing later.
    """
    made = secrets.token_bytes(KEY_BYTES)
    with suppress(OSError):
        path = state_dir(_ROOM) / "key"
        temporary = path.with_name(f"key.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(made)
            with suppress(FileExistsError):
                os.link(temporary, path)  # whole, and only where there is none
        finally:
            with suppress(OSError):
                temporary.unlink()
        key = path.read_bytes()
        return key if len(key) == KEY_BYTES else made
    return made


class QuarantineFile:
    """One file.

    Args:
        path: see `quarantine_path`.
        clock: that of the `Suspects` which are kept.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = kept_time) -> None:
        self.path, self._clock = path, clock
        #: What was last to be kept is not: a full disk, or a lock. `write` it again.
        self.unwritten = False
        #: What the file was when it was last read or written here; and when it was first read, or
        #: written: a thread may write what was collected before the gateway's loop has read again.
        self._seen = self._kept = _NOTHING

    def read(self) -> Quarantined:
        """What is kept; nothing where there is no such file, or it is broken."""
        self._seen = self._stamp()
        if self._kept == _NOTHING:
            self._kept = self._seen
        try:
            with self.path.open("rb") as file:
                found = msgspec.json.decode(file.read(_LARGEST), type=Quarantined)
        except (OSError, msgspec.MsgspecError, ValueError):
            return Quarantined()
        return found if found.schema == QUARANTINE_SCHEMA else Quarantined()

    @property
    def changed(self) -> bool:
        """Whether somebody else has written it since it was read or written here."""
        return self._stamp() != self._seen

    def write(self, state: Quarantined) -> Quarantined | None:
        """Merge with what others wrote, and keep it; a full disk, or a lock, costs no answer.

        Returns:
            What others wrote since, if they did.
        """
        others, written = None, False
        with suppress(OSError, UsageError), _locked(self.path):
            if self._stamp() != self._kept:
                others = self.read()
                merged = Suspects(self._clock, state)
                merged.merge(others)
                state = merged.state()
            write_atomic(self.path, to_json(state), mode=0o600)
            self._seen = self._kept = self._stamp()
            written = True
        self.unwritten = not written
        return others

    def _stamp(self) -> tuple[int, int]:
        """Unlike that of the file before it, also within a clock's tick: the inode is another."""
        try:
            found = self.path.stat()
        except OSError:
            return _NOTHING
        return found.st_mtime_ns, found.st_ino


def pardon(fingerprint: str) -> int:
    """Let a request or a client in again, whatever it did; in how many files it was.

    A gateway that runs reads it before it refuses it the next time.

    Args:
        fingerprint: of the request, or the client's name, as the refusal says it.

    Raises:
        UsageError: a file cannot be written.
    """
    try:
        files = sorted(state_dir(_ROOM, make=False).glob("*.json"))
    except OSError:
        files = []
    return sum(_pardoned(path, fingerprint) for path in files)


def _pardoned(path: Path, fingerprint: str) -> bool:
    try:
        with _locked(path):
            kept = Suspects(kept_time, QuarantineFile(path).read())
            known = kept.forget(fingerprint)
            if known:
                write_atomic(path, to_json(kept.state()), mode=0o600)
    except TimeoutError as exc:
        raise UsageError(
            f"{path} cannot be written: {exc.strerror}",
            hint="end the process that `fuser` shows for the file beside it that ends in .lock, "
            "and run `turbofit watch --forget` again",
        ) from None
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be written: {exc.strerror or exc}",
            hint="run it as the user who runs the server",
        ) from None
    return known


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Nobody else writes the file meanwhile.

    Raises:
        OSError: the folder cannot be written, or somebody keeps the lock.
    """
    descriptor = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        lock_soon(descriptor)
        yield
    finally:
        os.close(descriptor)

"""The deny list's file on this machine: the refused names, and the key of all fingerprints.

A file belongs to one model with one version of the engine: another version may well survive what
killed this one. So may another engine or other cards (over), but a run whose next plan has others
must not forget. The file is the truth: a writer reads it first, under a lock, adds what is new, and
adopts the rest; where a person removes it, all are let in. An unreadable file is put aside.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from contextlib import contextmanager, suppress
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.process.files import digest_of_parts, lock_soon, state_dir, write_atomic
from turbofit.core.process.log import LazyLogger
from turbofit.core.struct import Struct, to_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from turbofit.core.plan import Plan

_LOG: Final = LazyLogger(__name__)

DAY_SECONDS: Final = 24 * 3600.0
_ROOM: Final = "denied"
_KEY_BYTES: Final = 32
_FINGERPRINT_BYTES: Final = 12
#: The most entries; the oldest are dropped.
_MOST: Final = 1024
_LARGEST: Final = 1 << 20
#: Bytes above which a body is hashed in a thread, while the engine already has it.
_INLINE: Final = 64 << 10
_NOTHING: Final = (0, 0)


class Denied(Struct):
    """A refused fingerprint or client: its times by the wall clock, its number of deaths."""

    name: str
    since: float
    until: float
    deaths: int
    client: bool = False

    @property
    def seconds_left(self) -> int:
        return max(1, ceil(self.until - time.time()))


class _Page(Struct):
    denied: tuple[Denied, ...] = ()
    schema: Literal["turbofit.denied/1"] = "turbofit.denied/1"


def fingerprint(key: bytes, path: str, body: bytes) -> asyncio.Future[str]:
    """24 hexadecimal digits that identify an engine's request; shield the future, it is shared.

    They reveal nothing, and nobody without this machine's key can test guesses against them.
    SHA-256, for which processors have instructions (1 ms per megabyte), hashes the body; keyed
    BLAKE2b hashes only the digest.
    """
    loop = asyncio.get_running_loop()
    if len(body) > _INLINE:
        return loop.run_in_executor(None, _hashed, key, path, body)
    known = loop.create_future()
    known.set_result(_hashed(key, path, body))
    return known


def _hashed(key: bytes, path: str, body: bytes) -> str:
    data = path.encode() + b"\n" + hashlib.sha256(body).digest()
    return hashlib.blake2b(data, key=key, digest_size=_FINGERPRINT_BYTES).hexdigest()


class DenyFile:
    """Refused fingerprints and clients, as the file ``path`` has them; None keeps nothing."""

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.key = secrets.token_bytes(_KEY_BYTES) if path is None else _installation_key()
        #: All refused requests and clients: those in the file, and those not yet in it.
        self.denied: dict[str, Denied] = {}
        #: Changes that are not yet in the file: new entries, and None for removed ones.
        self.unwritten: dict[str, Denied | None] = {}
        self._stamp = _NOTHING
        self.look_again()

    def of(self, name: str) -> Denied | None:
        """The entry of a refused name, or None; a clock that was set back adds at most a day."""
        denied, now = self.denied.get(name), time.time()
        if denied is None or denied.until <= now:
            return None
        return msgspec.structs.replace(denied, until=min(denied.until, now + DAY_SECONDS))

    def deny(self, name: str, deaths: int, seconds: float, *, client: bool) -> None:
        """Refuse a fingerprint or client for ``seconds``; `write` stores the entry in the file."""
        now = time.time()
        denied = Denied(name=name, since=now, until=now + seconds, deaths=deaths, client=client)
        self._set(name, denied)

    @property
    def number(self) -> tuple[int, int]:
        """The numbers of refused requests and of refused clients."""
        now = time.time()
        kinds = [denied.client for denied in self.denied.values() if denied.until > now]
        return kinds.count(False), kinds.count(True)

    def look_again(self) -> tuple[str, ...]:
        """Read what another process has written since; returns the names that it has let in."""
        if self.path is None or _stamp(self.path) == self._stamp:
            return ()
        before, self.denied = self.denied, _changed(self._read(), self.unwritten)
        return tuple(name for name in before if name not in self.denied)

    def pardon(self, name: str) -> None:
        """Let a name in again; `write` stores that."""
        if name in self.denied:
            self._set(name, None)

    def _set(self, name: str, denied: Denied | None) -> None:
        self.denied = _changed(self.denied, {name: denied})
        if self.path is not None:
            self.unwritten[name] = denied

    async def write(self) -> bool:
        """Write the changes to the file; returns whether the disk took them."""
        new = dict(self.unwritten)
        try:
            kept = await asyncio.get_running_loop().run_in_executor(None, self.change, new)
        except (OSError, UsageError):
            return False
        for name, denied in new.items():
            if self.unwritten.get(name, self) is denied:
                del self.unwritten[name]
        self.denied = _changed(kept, self.unwritten)
        return True

    def change(self, new: Mapping[str, Denied | None]) -> dict[str, Denied]:
        """Apply changes to the file; returns its new content.

        Raises:
            UsageError: the file cannot be written.
            OSError: its folder cannot be written, or another process keeps the lock.
        """
        assert self.path is not None
        with _locked(self.path):
            kept = _changed(self._read(), new)
            write_atomic(self.path, to_json(_Page(denied=tuple(kept.values()))), mode=0o600)
            self._stamp = _stamp(self.path)
        return kept

    def _read(self) -> dict[str, Denied]:
        """The file's content; empty if there is no file. A damaged file is put aside."""
        assert self.path is not None
        self._stamp = _stamp(self.path)
        try:
            with self.path.open("rb") as file:
                page = msgspec.json.decode(file.read(_LARGEST), type=_Page)
        except OSError:
            return {}
        except (msgspec.MsgspecError, ValueError) as exc:
            aside = self.path.with_suffix(".damaged")
            with suppress(OSError):
                os.replace(self.path, aside)
            _LOG.info("the list of refused requests is damaged (%s): it is %s now", exc, aside)
            return {}
        now = time.time()
        return {denied.name: denied for denied in page.denied if denied.until > now}


def _changed(kept: Mapping[str, Denied], new: Mapping[str, Denied | None]) -> dict[str, Denied]:
    """The entries with changes applied, the newest last; the oldest are dropped."""
    refused = [denied for denied in {**kept, **new}.values() if denied is not None]
    newest = sorted(refused, key=lambda denied: denied.since)[-_MOST:]
    return {denied.name: denied for denied in newest}


def deny_path(plan: Plan, engine_version: str, *, pretend: bool = False) -> str | None:
    """The file of a plan's model; None if no folder can be made.

    A checkpoint that was downloaded meanwhile, or made for pretend GPUs, counts as the same model.
    """
    source = plan.model.source
    folder = source.where if source.kind == "folder" else ""
    facts = [plan.model.hub_id or plan.model.name, folder, engine_version, str(pretend)]
    with suppress(OSError):
        return str(state_dir(_ROOM) / f"{digest_of_parts(*facts)[:16]}.json")
    return None


def _installation_key() -> bytes:
    """The secret of this installation, made at first use; without a disk one for this process."""
    fresh = secrets.token_bytes(_KEY_BYTES)
    with suppress(OSError, UsageError):
        path = state_dir(_ROOM) / "key"
        with _locked(path):
            if not path.exists():
                write_atomic(path, fresh, mode=0o600)
            key = path.read_bytes()
        return key if len(key) == _KEY_BYTES else fresh
    return fresh


def _stamp(path: Path) -> tuple[int, int]:
    """A stamp that differs for each new file, even within a clock's tick, by its inode."""
    try:
        state = path.stat()
    except OSError:
        return _NOTHING
    return state.st_mtime_ns, state.st_ino


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file's lock for writing; `OSError` if another process keeps it."""
    descriptor = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        lock_soon(descriptor)
        yield
    finally:
        os.close(descriptor)

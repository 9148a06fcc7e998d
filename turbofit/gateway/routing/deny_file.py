"""What the deny list keeps on this machine: who is refused, and the key of all fingerprints.

A file belongs to one model with one version of the engine: another version may well survive what
this one died of. So may another engine, or other cards (over): a run whose next plan has others
must not forget. The file is the truth: who writes reads it first, under a lock, adds what is new,
and takes over the rest; `turbofit watch --forget` takes out of it. A file that cannot be read is
put aside.
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
#: The oldest are dropped beyond so many.
_MOST: Final = 1024
_LARGEST: Final = 1 << 20
#: Larger bodies are hashed in a thread, beside the engine that has them already.
_INLINE: Final = 64 << 10
_NOTHING: Final = (0, 0)


class Denied(Struct):
    """A fingerprint or a client that is refused, by the wall's clock, and for how many deaths."""

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
    """24 hexadecimal digits for what an engine is given; shield them, several may wait for them.

    Nothing can be read from them, and nobody without this machine's key can test guesses against
    them. SHA-256, which processors have instructions for (1 ms a megabyte), hashes the body, and
    keyed BLAKE2b only the digest.
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
    """Who is refused, as the file of this path has it (see `deny_path`); None keeps nothing."""

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.key = secrets.token_bytes(_KEY_BYTES) if path is None else _installation_key()
        #: Who is refused: what the file has, with what it has not yet.
        self.denied: dict[str, Denied] = {}
        #: What the file has not yet: who is refused, and None for who is let in again.
        self.unwritten: dict[str, Denied | None] = {}
        self._stamp = _NOTHING
        self.look_again()

    def of(self, name: str) -> Denied | None:
        """Why and for how long it is refused, if it is; a clock that was set back adds no day."""
        denied, now = self.denied.get(name), time.time()
        if denied is None or denied.until <= now:
            return None
        return msgspec.structs.replace(denied, until=min(denied.until, now + DAY_SECONDS))

    def deny(self, name: str, deaths: int, seconds: float, *, client: bool) -> None:
        """Refuse it for so long; `write` writes that down."""
        now = time.time()
        denied = Denied(name=name, since=now, until=now + seconds, deaths=deaths, client=client)
        self._set(name, denied)

    @property
    def number(self) -> tuple[int, int]:
        """How many requests and how many clients are refused."""
        now = time.time()
        kinds = [denied.client for denied in self.denied.values() if denied.until > now]
        return kinds.count(False), kinds.count(True)

    def look_again(self) -> tuple[str, ...]:
        """Take over what another process has written since; those whom it has let in again."""
        if self.path is None or _stamp(self.path) == self._stamp:
            return ()
        before, self.denied = self.denied, _changed(self._read(), self.unwritten)
        return tuple(name for name in before if name not in self.denied)

    def pardon(self, name: str) -> None:
        """Let it in; `write` writes that down."""
        if name in self.denied:
            self._set(name, None)

    def _set(self, name: str, denied: Denied | None) -> None:
        self.denied = _changed(self.denied, {name: denied})
        if self.path is not None:
            self.unwritten[name] = denied

    async def write(self) -> bool:
        """Write down what is new; whether the disk took it."""
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
        """Add to the file, and take out of it who is let in; what it has then.

        Raises:
            UsageError: the file cannot be written.
            OSError: nor its folder, or somebody keeps the lock.
        """
        assert self.path is not None
        with _locked(self.path):
            kept = _changed(self._read(), new)
            write_atomic(self.path, to_json(_Page(denied=tuple(kept.values()))), mode=0o600)
            self._stamp = _stamp(self.path)
        return kept

    def _read(self) -> dict[str, Denied]:
        """What the file has; nothing where there is none. One that is damaged is put aside."""
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
    """Those who are refused, with what is new, the newest last; the oldest go."""
    refused = [denied for denied in {**kept, **new}.values() if denied is not None]
    newest = sorted(refused, key=lambda denied: denied.since)[-_MOST:]
    return {denied.name: denied for denied in newest}


def deny_path(plan: Plan, engine_version: str, *, pretend: bool = False) -> str | None:
    """The file of a plan's model; None where no folder can be made.

    A checkpoint that was downloaded since, or made for pretend GPUs, is of the same model.
    """
    source = plan.model.source
    folder = source.where if source.kind == "folder" else ""
    facts = [plan.model.hub_id or plan.model.name, folder, engine_version, str(pretend)]
    with suppress(OSError):
        return str(state_dir(_ROOM) / f"{digest_of_parts(*facts)[:16]}.json")
    return None


def pardon(name: str) -> int:
    """Let a request or a client in again, as the refusal names it; in how many files it was.

    Raises:
        UsageError: a file cannot be written.
    """
    path, number = Path(), 0
    try:
        for path in sorted(state_dir(_ROOM, make=False).glob("*.json")):
            path.open("rb").close()  # `DenyFile` takes one that it may not read for empty
            file = DenyFile(path)
            if name in file.denied:
                file.change({name: None})
                number += 1
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be written: {exc.strerror or exc}",
            hint="run `turbofit watch --forget` again, as the user who runs the server",
        ) from None
    return number


def _installation_key() -> bytes:
    """The secret of this installation, made at its first use; of this process without a disk."""
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
    """Unlike that of the file before it, also within a clock's tick: the inode is another."""
    try:
        state = path.stat()
    except OSError:
        return _NOTHING
    return state.st_mtime_ns, state.st_ino


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Nobody else writes the file meanwhile; `OSError` where somebody keeps the lock."""
    descriptor = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        lock_soon(descriptor)
        yield
    finally:
        os.close(descriptor)

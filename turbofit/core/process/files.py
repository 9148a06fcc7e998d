"""Writes files whole or not at all, locks files, and keeps turbofit's state between runs."""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, Final, Generic, TypeVar

import msgspec

from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.struct import Struct, to_json

T = TypeVar("T", bound=Struct)

WINDOWS = os.name == "nt"
#: Seconds to wait for a lock. Its holder only writes a small file, and needs longer only if
#: stopped.
_LOCK_SECONDS: Final = 2.0
_LOCK_PAUSE: Final = 0.02


def write_atomic(
    path: str | os.PathLike[str], data: str | bytes, *, mode: int | None = None
) -> None:
    """Write a file whole: even after a power cut the file has its old or its new content.

    A symbolic link stays, and its target is replaced. If ``mode`` is None, the new file gets the
    permissions of the old file (see `open_beside`).

    Raises:
        UsageError: the file cannot be written.
    """
    raw = data.encode() if isinstance(data, str) else data
    try:
        target = path if isinstance(path, Path) else Path(path)
        if os.path.islink(path):
            target = Path(os.path.realpath(path))
        _replace(target, raw, mode)
    except OSError as exc:
        raise _unwritable(path, exc) from None


def write_output(path: str, text: str) -> None:
    """Write to a path that a person named: a file as `write_atomic` does, a device directly.

    Do not call this for a path in a folder that other users can write to: with a named pipe at the
    path, the call would wait for a reader.

    Raises:
        UsageError: the path cannot be written.
    """
    # /dev/null and a shell's >(gzip) must not be replaced by a file.
    if not os.path.exists(path) or os.path.isfile(path) or os.path.isdir(path):
        write_atomic(path, text)
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as exc:
        raise _unwritable(path, exc) from None


def _unwritable(path: str | os.PathLike[str], exc: OSError) -> UsageError:
    return UsageError(
        f"{os.fspath(path)} cannot be written: {exc.strerror or exc}",
        hint="choose a file in a folder that you can write to",
    )


def open_beside(path: Path) -> tuple[int, str]:
    """Make an empty file that will replace ``path``; return the file's descriptor and name.

    The new file is in the folder of ``path``. It gets the permissions, owner and group of the file
    at ``path``; without such a file the umask decides. If this user may not set the group, the new
    file's group only gets the permissions of all other users.

    Raises:
        OSError: the file cannot be made.
    """
    try:
        before = path.stat()
    except FileNotFoundError:
        return _created(path, 0o666)
    descriptor, name = _created(path, 0o600)
    if hasattr(os, "fchown"):  # not on Windows, which knows no mode but read-only
        with suppress(OSError):
            os.fchown(descriptor, -1, before.st_gid)
        mode = stat.S_IMODE(before.st_mode)
        if os.fstat(descriptor).st_gid != before.st_gid:
            mode &= ~stat.S_IRWXG | (mode & stat.S_IRWXO) << 3
        with suppress(OSError):  # a file system without modes
            os.fchmod(descriptor, mode)
        with suppress(OSError):  # last: only root may change the mode of another user's file
            os.fchown(descriptor, before.st_uid, -1)
    return descriptor, name


def _created(path: Path, mode: int) -> tuple[int, str]:
    """Make a file with a new name beside ``path``; return the file's descriptor and name.

    The umask restricts ``mode``.
    """
    name = os.fspath(path.with_name(f".{path.name}.{token_hex(8)}"))
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.open(name, flags, mode), name


def _replace(target: Path, raw: bytes, mode: int | None) -> None:
    """Write a file beside ``target``, then rename it to ``target``."""
    if target.is_dir():
        raise IsADirectoryError(21, os.strerror(21))
    descriptor, temporary = open_beside(target) if mode is None else _created(target, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
            file.flush()
            # Windows has no fchmod before Python 3.13; a mode there only says whether a file is
            # read-only.
            if mode not in (None, 0o600) and hasattr(os, "fchmod"):
                os.fchmod(descriptor, mode)
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(target.parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames in a folder survive a power cut, if the file system supports this."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock_soon(descriptor: int, seconds: float = _LOCK_SECONDS) -> None:
    """Lock an open file against other processes until the file is closed.

    Raises:
        TimeoutError: another process holds the lock for ``seconds``.
        OSError: the file system has no locks.
    """
    import fcntl  # Windows has no such module

    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(0, "another process keeps its lock") from None
        else:
            return
        time.sleep(_LOCK_PAUSE)


def state_dir(folder: str, *, make: bool = True) -> Path:
    """Return the path of ``folder``, a subfolder of turbofit's state folder.

    ``state_dir("runs")`` is ~/.local/state/turbofit/runs. ``make``: a missing folder is made. Only
    this user can read the folder: a server's logs may hold texts of its clients.

    Raises:
        OSError: the folder cannot be made.
    """
    # By the XDG standard, a relative path in the variable is ignored.
    chosen, local = os.environ.get("XDG_STATE_HOME", ""), os.environ.get("LOCALAPPDATA")
    usual = (local or "~/AppData/Local") if WINDOWS else "~/.local/state"
    path = Path(chosen if os.path.isabs(chosen) else os.path.expanduser(usual))
    for name in ("turbofit", *Path(folder).parts):
        path /= name
        if make:  # mkdir would give its mode to the last folder only
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def needed_state_dir(folder: str) -> Path:
    """Return `state_dir(folder)`, for a caller that needs the folder.

    Raises:
        LaunchError: the folder cannot be made.
    """
    try:
        return state_dir(folder)
    except OSError as exc:
        raise unwritable_state(exc) from None


def unwritable_state(exc: OSError) -> LaunchError:
    """Return the error that says that turbofit's state folder cannot be written."""
    return LaunchError(
        f"the state folder cannot be written: {exc.strerror or exc}",
        hint="set XDG_STATE_HOME to a folder that can be written",
    )


def private_folder(folder: Path, *, make: bool = True) -> Path:
    """Return the path of a folder that only this user and root can change; refuse other folders.

    The returned path has no symbolic links. ``make``: missing folders of the path are made, for
    this user alone. Each folder of the path is opened within its parent, so that nobody can
    replace a folder after the check.

    Raises:
        PermissionError: others can change the folder, or put another folder in its place.
        OSError: the folder cannot be made, or the path is no folder.
    """
    path = Path(os.path.realpath(folder))
    inside = os.open(path.anchor, os.O_PATH | os.O_CLOEXEC)
    try:
        for above in (*reversed(path.parents[:-1]), path):
            if make:
                with suppress(FileExistsError):
                    os.mkdir(above.name, 0o700, dir_fd=inside)
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
            opened = os.open(above.name, flags, dir_fd=inside)
            os.close(inside)
            inside = opened
            facts = os.fstat(inside)
            shared = facts.st_mode & stat.S_IWOTH
            if facts.st_mode & stat.S_IWGRP:
                shared = shared or not _is_own_group(facts.st_gid)
            # In a folder with the sticky bit, such as /tmp, nobody can rename the files of others.
            sticky = above != path and facts.st_mode & stat.S_ISVTX
            if facts.st_uid not in (0, os.geteuid()) or (shared and not sticky):
                raise PermissionError(1, "others can write it", os.fspath(above))
    finally:
        os.close(inside)
    return path


def _is_own_group(group: int) -> bool:
    """Return whether a group has no members but root or this user.

    Debian, for example, makes such a group for each user.
    """
    import grp
    import pwd

    with suppress(KeyError):
        found, user = grp.getgrgid(group), pwd.getpwuid(os.geteuid()).pw_name
        return group == 0 or (found.gr_name == user and set(found.gr_mem) <= {user})
    return False


def digest_of_parts(*parts: str) -> str:
    """Return a hash of several texts, to be the file name of a document about all these texts."""
    from hashlib import sha256

    return sha256("\0".join(parts).encode()).hexdigest()[:24]


def new_path(folder: str, stem: str, suffix: str = "") -> Path:
    """Make an empty folder with a new name in ``folder``, a subfolder of turbofit's state folder.

    The name is the time and the ``stem``. With a ``suffix``, make an empty file instead.

    Raises:
        OSError: the folder or file cannot be made.
    """
    base = state_dir(folder) / f"{time.strftime('%Y%m%d-%H%M%S')}-{stem}"
    for attempt in range(1000):
        path = base.with_name(f"{base.name}{f'-{attempt}' if attempt else ''}{suffix}")
        with suppress(FileExistsError):
            if suffix:
                path.touch(0o600, exist_ok=False)
            else:
                path.mkdir(0o700)
            return path
    raise FileExistsError(f"{base}{suffix}")


class StateFile(Generic[T]):
    """A JSON document of one type in `state_dir`; only this user can read the document.

    An unreadable document, and a document of another version, count as missing. If the folder
    cannot be written, the document is lost, but the command goes on.
    """

    def __init__(self, folder: str, name: str, kind: type[T]) -> None:
        self.folder, self.name, self.kind = folder, name, kind

    def read(self) -> T | None:
        """Return the document; None for a missing or unreadable document."""
        with suppress(OSError, ValueError, RecursionError):
            return msgspec.json.decode(self.path.read_bytes(), type=self.kind)
        return None

    def write(self, document: T) -> None:
        """Write the document; ignore an error."""
        with suppress(OSError, UsageError):
            self.save(document)

    def save(self, document: Any) -> Path:
        """Write the document, and return its path.

        Raises:
            OSError: the folder cannot be made.
            UsageError: the file cannot be written.
        """
        path = state_dir(self.folder) / self.path.name
        write_atomic(path, to_json(document), mode=0o600)
        return path

    def forget(self) -> bool:
        """Remove the document; return whether the document existed."""
        try:
            self.path.unlink()
        except OSError:
            return False
        return True

    @property
    def path(self) -> Path:
        """The path of the document, which need not exist."""
        return state_dir(self.folder, make=False) / f"{self.name}.json"

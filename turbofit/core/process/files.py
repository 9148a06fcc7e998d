"""Writes files whole or not at all."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from turbofit.core.errors import UsageError


def write_atomic(
    path: str | os.PathLike[str], data: str | bytes, *, mode: int | None = None
) -> None:
    """Write a file so that a reader, or a power cut, finds the old content or the new, never half.

    A symbolic link is followed, so that its target is replaced and the link stays.

    Args:
        path: of the file.
        data: text is written as UTF-8.
        mode: its permissions, whatever the umask is; None: as `open_beside` has them.

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
    """Write what a person has named: a file as :func:`write_atomic`, a pipe or a device as it is.

    ``/dev/null``, a named pipe and a shell's ``>(gzip)`` are never replaced by a file. Not for
    files in a folder that others can write to: a pipe that nobody reads is waited for.

    Raises:
        UsageError: it cannot be written.
    """
    if not _is_stream(Path(path)):
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


def _is_stream(path: Path) -> bool:
    """Whether a pipe, a device or a socket has this name."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except OSError:
        return False
    return kind not in (stat.S_IFREG, stat.S_IFDIR)


def open_beside(path: Path) -> tuple[int, str]:
    """Open a new, empty file in the folder of another one, whose place it is to take.

    It has the other one's permissions, owner and group. Who may not give it that group gives
    the group only what others may do, too. Where there is no other, the umask decides.

    Returns:
        Its descriptor, and its name.

    Raises:
        OSError: it cannot be made.
    """
    try:
        before = path.stat()
    except FileNotFoundError:
        return _created(path, 0o666)
    descriptor, name = _created(path, 0o600)
    if hasattr(os, "fchown"):  # not on Windows, where a mode says only whether it is read-only
        with suppress(OSError):
            os.fchown(descriptor, -1, before.st_gid)
        mode = stat.S_IMODE(before.st_mode)
        if os.fstat(descriptor).st_gid != before.st_gid:
            mode &= ~stat.S_IRWXG | (mode & stat.S_IRWXO) << 3
        with suppress(OSError):  # a file system without modes, whose every file has the same one
            os.fchmod(descriptor, mode)
        with suppress(OSError):  # last: of another's file only root may change the mode
            os.fchown(descriptor, before.st_uid, -1)
    return descriptor, name


def _created(path: Path, mode: int) -> tuple[int, str]:
    """A new file beside this one; the kernel lowers the mode by the umask."""
    name = os.fspath(path.with_name(f".{path.name}.{token_hex(8)}"))
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.open(name, flags, mode), name


def _replace(target: Path, raw: bytes, mode: int | None) -> None:
    if target.is_dir():
        raise IsADirectoryError(21, os.strerror(21))
    descriptor, temporary = open_beside(target) if mode is None else _created(target, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
            file.flush()
            # Not on Windows before Python 3.13; there a mode says only whether a file is read-only.
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
    """Make the rename itself durable; some file systems refuse, and then it is only atomic."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

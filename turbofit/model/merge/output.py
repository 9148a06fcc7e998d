"""The folder that a merge writes: there as a whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from secrets import token_hex

from turbofit.core.errors import UsageError
from turbofit.core.process.files import sync_folder
from turbofit.core.units import format_bytes

__all__ = ["check_target", "copy_file", "staged", "write_text"]


def check_target(out: str, sources: tuple[str, ...], *, force: bool) -> str:
    """The real path of the folder to write.

    Raises:
        UsageError: it is a source, holds one or lies in one, is no folder, is a mount point, or is
            not empty and ``force`` is not given.
    """
    target = os.path.realpath(os.path.expanduser(out))
    for source in map(os.path.realpath, sources):
        if os.path.commonpath([target, source]) in (target, source):
            raise UsageError(
                f"{out} and {source} are, or hold, one another",
                hint="name a new folder beside the sources",
            )
    if os.path.lexists(target) and not os.path.isdir(target):
        raise UsageError(f"{out} is a file", hint="name a folder")
    if os.path.ismount(target):
        raise UsageError(
            f"{out} is a mount point, which cannot be replaced", hint="name a folder inside it"
        )
    parent = os.path.dirname(target)
    if not os.path.isdir(parent):
        raise UsageError(f"{parent} is not a folder", hint="make it first")
    if os.path.isdir(target) and os.listdir(target) and not force:
        raise UsageError(
            f"{out} is not empty", hint="name a new folder, or replace all that is in it: --force"
        )
    return target


@contextmanager
def staged(target: str, needed: int) -> Iterator[str]:
    """A folder beside ``target`` that takes its place at the end; on any other exit it is removed.

    Args:
        target: the folder to make or to replace.
        needed: bytes that will be written.

    Raises:
        UsageError: the disk is too small, or the folder cannot be written.
    """
    parent, name = os.path.split(target)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UsageError(
            f"the result needs {format_bytes(needed)}, {parent} has {format_bytes(free)} left",
            hint="free some space, or write to another disk",
        )
    temporary = os.path.join(parent, f".{name}.merge-{token_hex(8)}")
    try:
        os.mkdir(temporary)
    except OSError as exc:
        raise _unwritable(parent, exc) from None
    try:
        yield temporary
        sync_folder(temporary)
        _replace(temporary, target)
        sync_folder(parent)
    except OSError as exc:
        raise _unwritable(target, exc) from None
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str, text: str) -> None:
    """Write a small file, durably."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: str, path: str) -> None:
    """Copy a file's content, durably; a link is followed."""
    with open(source, "rb") as read, open(path, "wb") as file:
        shutil.copyfileobj(read, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())


def _replace(temporary: str, target: str) -> None:
    """Put the new folder in place; what was there is kept until it is."""
    if not os.path.isdir(target):
        os.rename(temporary, target)
        return
    old = tempfile.mkdtemp(prefix=f".{os.path.basename(target)}.old-", dir=os.path.dirname(target))
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _unwritable(path: str, exc: OSError) -> UsageError:
    return UsageError(
        f"{path} cannot be written: {exc.strerror or exc}",
        hint="choose a folder that you can write to, on a disk with room",
    )

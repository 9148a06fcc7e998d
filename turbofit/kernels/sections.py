"""The sections of a 64-bit little-endian ELF file: a host library, or a cubin."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Buffer", "ElfSection", "mapped", "sections"]

Buffer = bytes | mmap.mmap

_HEADER: Final = struct.Struct("<Q")  # Elf64_Shdr
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_OFFSET_OF_TABLE, _COUNT = 0x28, 0x3C


class ElfSection(NamedTuple):
    """One section: its name and type, where its bytes are in the file, ``sh_link``, ``sh_info``."""

    name: str
    kind: int
    offset: int
    size: int
    link: int
    info: int


@contextmanager
def mapped(file: Path) -> Iterator[mmap.mmap]:
    """The bytes of a file, read where they are looked at.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty.
    """
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        yield data


def sections(data: Buffer) -> Iterator[ElfSection]:
    """The sections of a file.

    Raises:
        ValueError: the data are not a 64-bit little-endian ELF file.
    """
    if bytes(data[:6]) != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    try:
        yield from _sections(data)
    except (struct.error, IndexError, OverflowError) as exc:
        raise ValueError(f"an ELF file is cut short: {exc}") from None


def _sections(data: Buffer) -> Iterator[ElfSection]:
    (table,) = _HEADER.unpack_from(data, _OFFSET_OF_TABLE)
    count, names = struct.unpack_from("<HH", data, _COUNT)
    found = [_SECTION.unpack_from(data, table + k * _SECTION.size) for k in range(count)]
    if not found:
        return
    _, _, _, _, start, size, *_ = found[names]
    letters = bytes(data[start : start + size])
    for start, kind, _, _, offset, size, link, info, *_ in found:
        name = letters[start : letters.index(b"\0", start)].decode()
        yield ElfSection(name, kind, offset, size, link, info)

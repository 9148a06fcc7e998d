"""Reads device code in a host library: its fat binaries, their cubins, the cubins' functions.

NVIDIA does not document the format of a fat binary; the layout agrees with the output of cuobjdump
from CUDA 12.8 for the wheels of LMDeploy 0.6 to 0.18 (`bench/census`). Cubins and host libraries
are 64-bit little-endian ELF files; any other file, or a broken file, raises ValueError.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from turbofit.core.errors import PackageError

Buffer = bytes | mmap.mmap

_HEADER: Final = struct.Struct("<Q")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")  # Elf64_Shdr
_OFFSET_OF_TABLE, _COUNT = 0x28, 0x3C

_FATBIN_SECTIONS: Final = (".nv_fatbin", "__nv_relfatbin")
_MAGIC: Final = 0xBA55ED50
_FATBIN: Final = struct.Struct("<IHHQ")
_ENTRY: Final = struct.Struct("<HHIQIIHHIIIQQQ")
_PTX: Final = 1
_LZ4, _ZSTD, _EXACT = 0x2000, 0x8000, 0x100000
_ALIGNMENT: Final = 8
#: The most bytes of one unpacked entry. All entries of any of LMDeploy's libraries have fewer bytes
#: together.
_LARGEST: Final = 1 << 30
#: The most bytes from one compressed byte; LZ4 makes at most 255.
_MOST_PACKED: Final = 1024

_TEXT: Final = ".text."
#: Bytes of one instruction, since Volta.
_INSTRUCTION: Final = 16
#: The low 12 bits of an instruction are its opcode, the next 4 its predicate; EXIT must have the
#: predicate that is always true.
_OPCODE, _PREDICATE, _ALWAYS = 0x0FFF, 0xF000, 0x7000
#: The opcode of EXIT.
_EXIT: Final = 0x94D
#: The opcodes before EXIT in an empty function: the stack pointer (MOV or LDC into R1), the SHFL
#: without effect at the beginning of functions of sm_70, NOP.
_PROLOGUE: Final = frozenset({0xA02, 0xB82, 0x389, 0x918})


class ElfSection(NamedTuple):
    """One section of an ELF file: name, type, its bytes' offset and size, ``link``, ``info``."""

    name: str
    kind: int
    offset: int
    size: int
    link: int
    info: int


class _Header(NamedTuple):
    """The header of a fat binary's entry.

    The entry's bytes begin at ``at`` in the library. ``size`` is the number of stored bytes,
    ``whole`` the number of bytes before compression.
    """

    architecture: str
    kind: int
    flags: int
    at: int
    size: int
    whole: int


@contextmanager
def mapped(file: Path) -> Iterator[mmap.mmap]:
    """Map the bytes of a file into memory; an empty file is a ValueError."""
    with file.open("rb") as it, mmap.mmap(it.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def sections(data: Buffer) -> Iterator[ElfSection]:
    """Yield the sections of an ELF file.

    Raises:
        ValueError: the file is not a 64-bit ELF file, or is cut short.
    """
    if bytes(data[:6]) != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    try:
        (table,) = _HEADER.unpack_from(data, _OFFSET_OF_TABLE)
        count, names = struct.unpack_from("<HH", data, _COUNT)
        headers = [_SECTION.unpack_from(data, table + k * _SECTION.size) for k in range(count)]
        _, _, _, _, start, size, *_ = headers[names] if headers else [0] * 6
        letters = bytes(data[start : start + size])
        for start, kind, _, _, offset, size, link, info, *_ in headers:
            name = letters[start : letters.index(b"\0", start)].decode()
            yield ElfSection(name, kind, offset, size, link, info)
    except (struct.error, IndexError, OverflowError) as exc:
        raise ValueError(f"an ELF file is cut short: {exc}") from None


def entries(library: Path) -> Iterator[tuple[str, bytes | None]]:
    """Yield the entries of all fat binaries of a host library, in the order of the file.

    An entry is the name of an architecture (``90a`` runs only on 9.0), and the bytes of a cubin. If
    the entry is PTX, None takes the place of the bytes.
    """
    with mapped(library) as data:
        for header in _headers(data):
            body = data[header.at : header.at + header.size]
            yield header.architecture, None if header.kind == _PTX else _unpacked(body, header)


def _headers(data: mmap.mmap) -> Iterator[_Header]:
    try:
        for section in sections(data):
            if section.name in _FATBIN_SECTIONS:
                yield from _headers_between(data, section.offset, section.offset + section.size)
    except (struct.error, OverflowError) as exc:
        raise ValueError(f"a fat binary is cut short: {exc}") from None


def _headers_between(data: mmap.mmap, offset: int, stop: int) -> Iterator[_Header]:
    """Yield the headers of the entries between two offsets of the library, in one ELF section."""
    while offset < stop:
        magic, _, header, size = _FATBIN.unpack_from(data, offset)
        if magic != _MAGIC:  # bytes between two fat binaries
            offset += _ALIGNMENT
            continue
        end = offset + _at_least(header, _FATBIN) + size
        offset += header
        while offset < end:
            kind, _, header, size, packed, _, _, _, number, _, _, flags, _, whole = (
                _ENTRY.unpack_from(data, offset)
            )
            body = offset + _at_least(header, _ENTRY)
            name = f"{number}{'a' if flags & _EXACT else ''}"
            yield _Header(name, kind, flags, body, packed or size, whole)
            offset = body + size


def _at_least(header: int, form: struct.Struct) -> int:
    if header < form.size:
        raise ValueError(f"a fat binary is broken: a header has {header} bytes")
    return header


def _unpacked(body: bytes, header: _Header) -> bytes:
    """Return an entry's bytes before compression."""
    if not header.flags & (_LZ4 | _ZSTD):
        return body
    try:
        import cramjam
    except ImportError:
        raise PackageError(
            "the kernels of the engine are compressed, and cramjam is missing",
            hint="pip install cramjam",
        ) from None
    if header.whole > min(_LARGEST, _MOST_PACKED * len(body)):
        # cramjam ends the process if it cannot allocate the memory.
        raise ValueError(f"a fat binary is broken: an entry has {header.whole} bytes unpacked")
    try:
        if header.flags & _LZ4:
            return bytes(cramjam.lz4.decompress_block(body, output_len=header.whole))
        return bytes(cramjam.zstd.decompress(body, output_len=header.whole))
    except cramjam.DecompressionError as exc:
        raise ValueError(f"a fat binary is broken: {exc}") from None


def functions(cubin: Buffer) -> Iterator[tuple[str, bool]]:
    """Yield the mangled name of each function of a cubin, and whether the function is empty.

    The compiler leaves an empty function if the source excludes an architecture (``if constexpr``):
    the host launches the kernel, but the kernel computes nothing.
    """
    for section in sections(cubin):
        if section.name.startswith(_TEXT):
            code = cubin[section.offset : section.offset + section.size]
            yield section.name[len(_TEXT) :], _is_empty(code)


def _is_empty(code: Buffer) -> bool:
    for at in range(0, len(code) - 1, _INSTRUCTION):
        (word,) = struct.unpack_from("<H", code, at)
        if word & _OPCODE == _EXIT:
            return bool(word & _PREDICATE == _ALWAYS)
        if word & _OPCODE not in _PROLOGUE:
            return False
    return False

"""Device code inside a host library: the entries of its fat binaries.

NVIDIA does not document the format; the layout is the one that cuobjdump lists (compared with that
of CUDA 12.8 on the wheels of LMDeploy 0.6 to 0.18, `bench/census`).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from turbofit.core.errors import PackageError
from turbofit.kernels.sections import mapped, sections

__all__ = ["Entry", "architectures", "entries"]

_SECTIONS: Final = (".nv_fatbin", "__nv_relfatbin")
_MAGIC: Final = 0xBA55ED50
_FATBIN: Final = struct.Struct("<IHHQ")
_ENTRY: Final = struct.Struct("<HHIQIIHHIIIQQQ")
_PTX: Final = 1
_LZ4, _ZSTD, _EXACT = 0x2000, 0x8000, 0x100000
_ALIGNMENT: Final = 8
#: Bytes of one entry unpacked: more than a whole library of LMDeploy's has.
_LARGEST: Final = 1 << 30
#: Bytes that one compressed byte becomes at most; LZ4 makes no more than 255 of one.
_MOST_PACKED: Final = 1024


class Entry(NamedTuple):
    """Code for one architecture: ``90a`` runs on 9.0 alone. ``cubin`` is None for PTX."""

    architecture: str
    cubin: bytes | None


class _Header(NamedTuple):
    """Where the body of an entry is; ``size`` as stored, ``whole`` before it was compressed."""

    architecture: str
    kind: int
    flags: int
    at: int
    size: int
    whole: int


def entries(library: Path, architecture: str | None = None) -> Iterator[Entry]:
    """The entries of all fat binaries of a host library, in the order of the file.

    Args:
        library: the file.
        architecture: entries for another one are passed over.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an ELF file, or a fat binary in it is broken.
        PackageError: cramjam is missing, which decompresses what the compiler compressed.
    """
    with mapped(library) as data:
        for header in _headers(data):
            if architecture in (None, header.architecture):
                body = data[header.at : header.at + header.size]
                code = None if header.kind == _PTX else _unpacked(body, header)
                yield Entry(header.architecture, code)


def architectures(library: Path) -> frozenset[str]:
    """The architectures that a host library has cubins for.

    Raises:
        OSError, ValueError: as :func:`entries`.
    """
    with mapped(library) as data:
        return frozenset(one.architecture for one in _headers(data) if one.kind != _PTX)


def _headers(data: mmap.mmap) -> Iterator[_Header]:
    for section in sections(data):
        if section.name in _SECTIONS:
            try:
                yield from _section_headers(data, section.offset, section.offset + section.size)
            except (struct.error, OverflowError) as exc:
                raise ValueError(f"a fat binary is cut short: {exc}") from None


def _section_headers(data: mmap.mmap, at: int, stop: int) -> Iterator[_Header]:
    while at < stop:
        magic, _, header, size = _FATBIN.unpack_from(data, at)
        if magic != _MAGIC:
            at += _ALIGNMENT
            continue
        if header < _FATBIN.size:
            raise ValueError(f"a fat binary is broken: its header has {header} bytes")
        end = at + header + size
        at += header
        while at < end:
            kind, _, header, size, packed, _, _, _, number, _, _, flags, _, whole = (
                _ENTRY.unpack_from(data, at)
            )
            if header < _ENTRY.size:
                raise ValueError(f"a fat binary is broken: an entry's header has {header} bytes")
            name = f"{number}{'a' if flags & _EXACT else ''}"
            yield _Header(name, kind, flags, at + header, packed or size, whole)
            at += header + size


def _unpacked(body: bytes, header: _Header) -> bytes:
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
        # cramjam ends the process where memory for it cannot be had.
        raise ValueError(f"a fat binary is broken: an entry has {header.whole} bytes unpacked")
    try:
        if header.flags & _LZ4:
            return bytes(cramjam.lz4.decompress_block(body, output_len=header.whole))
        return bytes(cramjam.zstd.decompress(body, output_len=header.whole))
    except cramjam.DecompressionError as exc:
        raise ValueError(f"a fat binary is broken: {exc}") from None

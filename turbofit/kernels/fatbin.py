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
from turbofit.kernels.sections import sections

__all__ = ["Entry", "entries"]

_SECTIONS: Final = (".nv_fatbin", "__nv_relfatbin")
_MAGIC: Final = 0xBA55ED50
_FATBIN: Final = struct.Struct("<IHHQ")
_ENTRY: Final = struct.Struct("<HHIQIIHHIIIQQQ")
_PTX: Final = 1
_LZ4, _ZSTD, _EXACT = 0x2000, 0x8000, 0x100000
_ALIGNMENT: Final = 8


class Entry(NamedTuple):
    """Code for one architecture: ``90a`` runs on 9.0 alone. ``cubin`` is None for PTX."""

    architecture: str
    cubin: bytes | None


def entries(library: Path) -> Iterator[Entry]:
    """The entries of all fat binaries of a host library, in the order of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an ELF file, or a fat binary in it is broken.
        PackageError: cramjam is missing, which decompresses what the compiler compressed.
    """
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for section in sections(data):
            if section.name in _SECTIONS:
                yield from _entries(data, section.offset, section.offset + section.size)


def _entries(data: mmap.mmap, at: int, stop: int) -> Iterator[Entry]:
    try:
        while at < stop:
            magic, _, header, size = _FATBIN.unpack_from(data, at)
            if magic != _MAGIC:
                at += _ALIGNMENT
                continue
            end = at + header + size
            at += header
            while at < end:
                kind, _, header, size, packed, _, _, _, number, _, _, flags, _, whole = (
                    _ENTRY.unpack_from(data, at)
                )
                if header + size <= 0:
                    raise ValueError("a fat binary is broken: an entry has no size")
                body = data[at + header : at + header + (packed or size)]
                architecture = f"{number}{'a' if flags & _EXACT else ''}"
                yield Entry(architecture, None if kind == _PTX else _unpacked(body, flags, whole))
                at += header + size
    except struct.error as exc:
        raise ValueError(f"a fat binary is cut short: {exc}") from None


def _unpacked(body: bytes, flags: int, size: int) -> bytes:
    if not flags & (_LZ4 | _ZSTD):
        return body
    try:
        import cramjam
    except ImportError:
        raise PackageError(
            "the kernels of the engine are compressed, and cramjam is missing",
            hint="pip install cramjam",
        ) from None
    if flags & _LZ4:
        return bytes(cramjam.lz4.decompress_block(body, output_len=size))
    return bytes(cramjam.zstd.decompress(body, output_len=size))

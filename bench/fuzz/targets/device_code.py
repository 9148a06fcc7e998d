"""A library's ELF sections, fat binaries, cubins and dynamic symbols."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final

from bench.fuzz.scratch import scratch
from turbofit.core.errors import PackageError
from turbofit.kernels.census import empty_kernels, take_census
from turbofit.kernels.cubin import functions
from turbofit.kernels.fatbin import architectures, entries
from turbofit.pretend.elf import dynamic_symbols, needed, needed_versions

WORDS: Final = (
    "\\x7fELF\\x02\\x01\\x01", ".nv_fatbin\\x00", "__nv_relfatbin\\x00", ".text._Z4kernv\\x00",
    ".dynsym\\x00",
    "\\x50\\xed\\x55\\xba", "\\x01\\x00", "\\x02\\x00", "\\x56\\x00\\x00\\x00",
    "\\x00\\x20\\x00\\x00",
    "\\x00\\x80\\x00\\x00", "\\x28\\xb5\\x2f\\xfd", "\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xff",
    "\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\x7f", "\\xfe\\xff\\xff\\x6f",
)  # fmt: skip


def one(data: bytes) -> None:
    """A library is read, or is a ValueError (broken) or a PackageError (no decompressor)."""
    path = scratch("libraries") / "library.so"
    path.write_bytes(data)
    with suppress(ValueError):
        list(functions(data))
    for read in (architectures, take_census, lambda it: empty_kernels(it, (8, 6))):
        with suppress(ValueError, PackageError):
            read(path)
    with suppress(ValueError, PackageError):
        list(entries(path, "86"))
    for read in (needed, needed_versions, lambda it: list(dynamic_symbols(it))):
        with suppress(ValueError):
            read(path)


def seeds() -> list[bytes]:
    """Cubins, and libraries that hold them plain and compressed, with PTX and symbols beside."""
    import cramjam

    cubin = _elf([(".text._Z4kernv", 1, b"\x4d\x79" + bytes(14), 0, 0)])
    lz4 = bytes(cramjam.lz4.compress_block(cubin, store_size=False))
    zstd = bytes(cramjam.zstd.compress(cubin))
    made = [
        (2, cubin, 0),
        (2, lz4, 0x2000),
        (2, zstd, 0x8000),
        (2, cubin, 0x100000),
        (1, b"ptx", 0),
    ]
    found = [cubin, *(_elf([(".nv_fatbin", 1, _fatbin([one], cubin), 0, 0)]) for one in made)]
    found.append(_elf([("__nv_relfatbin", 1, _fatbin(made, cubin), 0, 0)]))
    return [*found, _elf(list(_dynamic()))]


def _fatbin(made: Sequence[tuple[int, bytes, int]], whole: bytes) -> bytes:
    body = b""
    for kind, code, flags in made:
        padded = code + bytes(-len(code) % 8)
        packed = len(code) if flags & 0xA000 else 0
        body += struct.pack(
            "<HHIQIIHHIIIQQQ", kind, 0x101, 64, len(padded), packed, 0, 0, 0, 86, 0, 0, flags, 0,
            len(whole) if packed else 0,
        )[:64] + padded  # fmt: skip
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def _dynamic() -> Iterator[tuple[str, int, bytes, int, int]]:
    """Sections of a linked library; their strings are the first section."""
    yield ".dynstr", 3, b"\0libc.so.6\0GLIBC_2.2.5\0malloc\0", 0, 0
    yield ".dynsym", 11, struct.pack("<IBBHQQ", 23, 0x12, 0, 0, 0, 0), 1, 0
    yield ".dynamic", 6, struct.pack("<qQ", 1, 1), 1, 0
    version = struct.pack("<HHIII", 1, 1, 1, 16, 0) + struct.pack("<IHHII", 0, 0, 2, 11, 0)
    yield ".gnu.version_r", 0x6FFFFFFE, version, 1, 1


def _elf(sections: Sequence[tuple[str, int, bytes, int, int]]) -> bytes:
    """A 64-bit ELF file of these sections (name, type, bytes, link, info) after an empty one."""
    names, rows, body, at = b"\0", [bytes(64)], b"", 64
    for name, kind, data, link, info in [*sections, (".shstrtab", 3, b"", 0, 0)]:
        place = len(names)
        names += name.encode() + b"\0"
        content = names if name == ".shstrtab" else data
        rows.append(
            struct.pack("<IIQQQQIIQQ", place, kind, 0, 0, at, len(content), link, info, 1, 0)
        )
        body += content + bytes(-len(content) % 8)
        at = 64 + len(body)
    head = struct.pack("<6s10x2HI3QI6H", b"\x7fELF\x02\x01", 3, 62, 1, 0, 0, at, 0, 64, 0, 0, 64,
                       len(rows), len(rows) - 1)  # fmt: skip
    return head + body + b"".join(rows)

"""Libraries with device code, made by hand: an ELF file with fat binaries of small cubins in it."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence

#: Instructions by their first two bytes: opcode, and a predicate that is always true.
EXIT, BRA, NOP, MOV, LDC, SHFL, FFMA = 0x794D, 0x7947, 0x7918, 0x7A02, 0x7B82, 0x7389, 0x7223
#: `@P0 EXIT`: leaves only where the predicate is true.
EXIT_IF = 0x094D

EMPTY = (LDC, EXIT, BRA, NOP)
CODE = (LDC, FFMA, EXIT, BRA)


def elf(sections: Mapping[str, bytes]) -> bytes:
    """A 64-bit little-endian ELF file with these sections, and one of names."""
    names, starts = b"\0", []
    for name in (*sections, ".shstrtab"):
        starts.append(len(names))
        names += name.encode() + b"\0"
    bodies = [*sections.values(), names]
    at, offsets = 64, []
    for body in bodies:
        at += -at % 8  # fat binaries stand at multiples of eight
        offsets.append(at)
        at += len(body)
    head = b"\x7fELF\x02\x01".ljust(0x28, b"\0") + struct.pack("<Q", at) + bytes(10)
    file = bytearray(head + struct.pack("<HHH", 64, len(bodies), len(bodies) - 1))
    for offset, body in zip(offsets, bodies, strict=True):
        file += bytes(offset - len(file)) + body
    for start, offset, body in zip(starts, offsets, bodies, strict=True):
        file += struct.pack("<IIQQQQIIQQ", start, 1, 0, 0, offset, len(body), 0, 0, 1, 0)
    return bytes(file)


def cubin(functions: Mapping[str, Sequence[int]]) -> bytes:
    """A cubin with these functions, whose instructions are of 16 bytes each."""
    return elf(
        {
            f".text.{name}": b"".join(struct.pack("<H14x", word) for word in body)
            for name, body in functions.items()
        }
    )


def fatbin(entries: Iterable[tuple[int, bytes, int]], *, ptx: bool = False) -> bytes:
    """A fat binary: architecture, body and flags of each entry."""
    body = b""
    for number, data, flags in entries:
        stored, whole = data, 0
        if flags & 0xA000:
            import cramjam

            if flags & 0x2000:
                stored = bytes(cramjam.lz4.compress_block(data, store_size=False))
            else:
                stored = bytes(cramjam.zstd.compress(data))
            whole = len(data)
        padded = stored + bytes(-len(stored) % 8)
        body += struct.pack(
            "<HHIQIIHHIIIQQQ", 1 if ptx else 2, 0x101, 64, len(padded), len(stored) if whole else 0,
            0, 0, 0, number, 0, 0, flags, 0, whole,
        ) + padded  # fmt: skip
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def library(*fatbins: bytes) -> bytes:
    """A host library with fat binaries, a gap of eight bytes between them."""
    return elf({".text": b"\x90" * 8, ".nv_fatbin": bytes(8).join(fatbins)})

"""The functions of a cubin, and whether one is empty.

The compiler leaves an empty function where the source rules an architecture out (``if constexpr``):
the host launches the kernel, and nothing is computed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from turbofit.kernels.sections import Buffer, sections

__all__ = ["Function", "functions"]

_TEXT: Final = ".text."
#: Bytes of one instruction, from Volta on.
_INSTRUCTION: Final = 16
#: The low 12 bits of an instruction are its opcode, the next 4 its predicate.
_OPCODE, _PREDICATE, _ALWAYS = 0x0FFF, 0xF000, 0x7000
#: EXIT, and what stands before it in an empty function: the stack pointer (MOV or LDC into R1), the
#: SHFL without effect with which functions of sm_70 begin, NOP.
_EXIT: Final = 0x94D
_PROLOGUE: Final = frozenset({0xA02, 0xB82, 0x389, 0x918})


class Function(NamedTuple):
    """A function by its mangled name."""

    name: str
    empty: bool


def functions(cubin: Buffer) -> Iterator[Function]:
    """The functions of a cubin, kernels and what they call.

    Raises:
        ValueError: the data are no cubin.
    """
    for section in sections(cubin):
        if section.name.startswith(_TEXT):
            code = cubin[section.offset : section.offset + section.size]
            yield Function(section.name[len(_TEXT) :], _is_empty(code))


def _is_empty(code: Buffer) -> bool:
    for at in range(0, len(code) - 1, _INSTRUCTION):
        (word,) = struct.unpack_from("<H", code, at)
        if word & _OPCODE == _EXIT:
            return bool(word & _PREDICATE == _ALWAYS)
        if word & _OPCODE not in _PROLOGUE:
            return False
    return False

"""Headers of safetensors files: names, dtypes and shapes, without the tensors' data.

A file has eight bytes with the header's length (little-endian), a JSON header, and the tensors. The
tensors fill the rest of the file without gap or overlap.
"""

from __future__ import annotations

import re
from math import prod
from typing import Final, NamedTuple

import msgspec

from turbofit.core.errors import UsageError

#: Bytes before the header, which contain the header's length.
PREFIX: Final = 8
#: The format's own limit on the header, in bytes.
LARGEST_HEADER: Final = 100_000_000
#: The most bytes of an index that are read.
LARGEST_INDEX: Final = 64 << 20
#: Bits of one element, by dtype.
BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_PLAIN_FILE: Final = re.compile(r"[\w-][\w.+-]{0,200}", re.ASCII)
_HINT: Final = "download the checkpoint again: the file is damaged or not finished"


class Tensor(NamedTuple):
    """One tensor in a file; its data begin at byte ``begin``."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str
    begin: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


class _Entry(msgspec.Struct):
    """A header entry; the entry ``__metadata__`` has None in all fields."""

    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    data_offsets: tuple[int, int] | None = None


class _Index(msgspec.Struct):
    """The content of ``model.safetensors.index.json``, without its metadata."""

    weight_map: dict[str, str]


def header_length(prefix: bytes, file_size: int | None, what: str) -> int:
    """Read the length of the header, and check it against the file's size.

    Raises:
        UsageError: the file is not a safetensors file, or ends too early.
    """
    length = int.from_bytes(prefix[:PREFIX], "little")
    if len(prefix) < PREFIX or not 2 <= length <= LARGEST_HEADER:
        raise UsageError(f"{what} is not a safetensors file", hint=_HINT)
    if file_size is not None and PREFIX + length > file_size:
        raise UsageError(f"{what} ends before its header does", hint=_HINT)
    return length


def parse_header(header: bytes, file_size: int | None, what: str) -> dict[str, Tensor]:
    """Return the tensors of one file by name; an invalid header is refused.

    Args:
        header: the JSON header.
        file_size: bytes of the whole file, or None if unknown; the tensors must end there.
        what: the file's name.

    Raises:
        UsageError: the header is damaged, or does not describe the file.
    """
    try:
        entries = msgspec.json.decode(header, type=dict[str, _Entry])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise UsageError(f"{what} has a damaged header: {exc}", hint=_HINT) from None
    entries.pop("__metadata__", None)
    end = start = PREFIX + len(header)
    tensors = {name: _tensor(name, entry, what, start) for name, entry in entries.items()}
    for begin, size in sorted((tensor.begin, tensor.bytes) for tensor in tensors.values()):
        if size and begin != end:
            raise UsageError(
                f"{what} has a gap or an overlap before byte {begin - start} of its data",
                hint=_HINT,
            )
        end += size
    if file_size not in (None, end):
        raise UsageError(f"{what} holds {file_size} bytes, its header describes {end}", hint=_HINT)
    return tensors


def parse_index(data: bytes, what: str, suffix: str = ".safetensors") -> dict[str, str]:
    """Return the ``weight_map`` of a sharded checkpoint: the name of each tensor's file.

    Raises:
        UsageError: the index cannot be read or is empty, or the name of a file is invalid or does
            not end in ``suffix``.
    """
    try:
        files = msgspec.json.decode(data, type=_Index).weight_map
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise UsageError(f"{what} cannot be read: {exc}", hint=_HINT) from None
    if not files:
        raise UsageError(f"{what} names no tensors", hint=_HINT)
    for file in set(files.values()):
        if not (file.endswith(suffix) and _PLAIN_FILE.fullmatch(file.removesuffix(suffix))):
            raise UsageError(
                f"{what} names {file[:60]!r}, which is no name of a weight file", hint=_HINT
            )
    return files


def _tensor(name: str, entry: _Entry, what: str, start: int) -> Tensor:
    """Return the tensor of a header's entry; refuse a size that contradicts dtype and shape."""
    shape, offsets, bits = entry.shape, entry.data_offsets, BITS.get(entry.dtype or "")
    if shape is None or offsets is None or entry.dtype is None or bits is None:
        problem = f"the unknown dtype {entry.dtype[:20]!r}" if entry.dtype else "no dtype or shape"
        raise UsageError(f"{what}: {name[:80]!r} has {problem}", hint=_HINT)
    if len(shape) > 16 or any(not 0 <= size < 1 << 48 for size in shape):
        raise UsageError(f"{what}: {name[:80]!r} has an absurd shape", hint=_HINT)
    begin, end = offsets
    tensor = Tensor(entry.dtype, shape, end - begin, what, start + begin)
    if not 0 <= begin <= end or tensor.elements * bits != 8 * tensor.bytes:
        raise UsageError(f"{what}: {name[:80]!r} does not fit its shape", hint=_HINT)
    return tensor

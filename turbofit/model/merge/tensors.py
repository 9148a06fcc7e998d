"""Files of tensors, read one tensor at a time: safetensors, and torch's own ``.bin``.

Dtypes are safetensors' names (``BF16``); shapes are tuples of elements; sizes are bytes.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import os
from collections.abc import Mapping
from typing import Any, BinaryIO, Final, NamedTuple, Protocol

import msgspec

from turbofit.core.errors import PackageError, UsageError
from turbofit.model.safetensors import PREFIX, header_length, parse_header

__all__ = [
    "CHUNK",
    "DTYPES",
    "FLOATS",
    "SafeFile",
    "StoredTensor",
    "TensorFile",
    "TorchFile",
    "as_torch",
    "open_store",
    "torch_library",
    "write_tensor",
]  # fmt: skip

#: Bytes that are copied at once.
CHUNK: Final = 16 << 20
#: safetensors' dtype → torch's.
DTYPES: Final = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip
#: What counts as a weight, and may be merged into or cast.
FLOATS: Final = frozenset({"F16", "BF16", "F32", "F64"})

_BYTES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8,
    "F64": 8,
}  # fmt: skip
_HINT: Final = "download the file again, or check who made it"


class StoredTensor(NamedTuple):
    """One tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * _BYTES[self.dtype]


class TensorFile(Protocol):
    """A file of tensors."""

    path: str
    entries: Mapping[str, StoredTensor]

    def read(self, name: str) -> Any:
        """One tensor (torch, CPU, contiguous) that the caller may change."""

    def copy(self, name: str, out: BinaryIO) -> None:
        """Write a tensor's bytes, unchanged."""

    def close(self) -> None:
        """Give back what reading has opened; it may be read again."""


def torch_library() -> Any:
    """Torch, which planning does without.

    Raises:
        PackageError: it is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise PackageError(
            "merging and converting weights needs torch, which is not installed",
            hint="pip install torch (the CPU build is enough)",
        ) from None


def as_torch(dtype: str) -> Any:
    """Torch's dtype of a safetensors dtype."""
    return getattr(torch_library(), DTYPES[dtype])


def write_tensor(tensor: Any, out: BinaryIO) -> None:
    """Write a tensor's bytes, without a copy where it is contiguous."""
    whole = tensor.contiguous()
    size = whole.numel() * whole.element_size()
    if size:
        # Torch shares its memory only through numpy, which may not be installed.
        out.write((ctypes.c_char * size).from_address(whole.data_ptr()))


def open_store(path: str) -> TensorFile:
    """The file at a path, by its suffix.

    Raises:
        UsageError: it cannot be read, or is damaged.
        PackageError: torch is missing and the file is in torch's format.
    """
    return SafeFile(path) if path.endswith(".safetensors") else TorchFile(path)


class _Entry(msgspec.Struct):
    """Where a tensor lies; its dtype and shape come checked from `parse_header`."""

    data_offsets: tuple[int, int] = (0, 0)


class SafeFile:
    """A safetensors file. Nothing of it stays in memory but its header."""

    def __init__(self, path: str) -> None:
        self.path = path
        name = os.path.basename(path)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = header_length(file.read(PREFIX), size, name)
                header = file.read(length)
        except OSError as exc:
            raise UsageError(f"{name} cannot be read: {exc.strerror}", hint=_HINT) from None
        tensors = parse_header(header, size, name)
        places = msgspec.json.decode(header, type=dict[str, _Entry])
        data = PREFIX + length
        self._start = {key: data + places[key].data_offsets[0] for key in tensors}
        for key, tensor in tensors.items():
            if tensor.dtype not in _BYTES:
                raise _quantised(name, key, tensor.dtype)
        order = sorted(tensors, key=self._start.__getitem__)
        self.entries: Mapping[str, StoredTensor] = {
            key: StoredTensor(tensors[key].dtype, tensors[key].shape) for key in order
        }

    def read(self, name: str) -> Any:
        """See `TensorFile`."""
        stored = self.entries[name]
        torch, dtype = torch_library(), as_torch(stored.dtype)
        if not stored.bytes:
            return torch.empty(stored.shape, dtype=dtype)
        buffer = bytearray(stored.bytes)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self._start[name])
                view = memoryview(buffer)
                while view:
                    got = file.readinto(view)
                    if not got:
                        raise OSError(5, "it ends too early")
                    view = view[got:]
        except OSError as exc:
            raise self._failed(exc) from None
        return torch.frombuffer(buffer, dtype=dtype).reshape(stored.shape)

    def copy(self, name: str, out: BinaryIO) -> None:
        """See `TensorFile`."""
        left = self.entries[name].bytes
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._start[name])
            while left:
                try:
                    chunk = file.read(min(CHUNK, left))
                    if not chunk:
                        raise OSError(5, "it ends too early")
                except OSError as exc:
                    raise self._failed(exc) from None
                out.write(chunk)
                left -= len(chunk)

    def close(self) -> None:
        """Nothing stays open."""

    def _failed(self, exc: OSError) -> UsageError:
        return UsageError(f"{self.path} cannot be read: {exc.strerror or exc}", hint=_HINT)


class TorchFile:
    """A ``.bin`` of torch: a pickle, read with ``weights_only`` so that it can run nothing.

    The tensors are mapped from the file where its format allows (torch ≥ 1.6 wrote it), so what is
    resident is page cache that the kernel takes back; an older file is held in RAM as a whole.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._tensors: dict[str, Any] | None = None
        names = {dtype: key for key in DTYPES for dtype in (as_torch(key),)}
        entries: dict[str, StoredTensor] = {}
        for key, tensor in self._load().items():
            if tensor.dtype not in names:
                raise _quantised(os.path.basename(path), key, str(tensor.dtype))
            entries[key] = StoredTensor(names[tensor.dtype], tuple(tensor.shape))
        self.entries: Mapping[str, StoredTensor] = entries
        self.close()

    def read(self, name: str) -> Any:
        """See `TensorFile`."""
        return self._load()[name].clone(memory_format=torch_library().contiguous_format)

    def copy(self, name: str, out: BinaryIO) -> None:
        """See `TensorFile`."""
        write_tensor(self._load()[name], out)

    def close(self) -> None:
        """Unmap the file."""
        self._tensors = None

    def _load(self) -> dict[str, Any]:
        if self._tensors is None:
            self._tensors = _unpickled(self.path)
        return self._tensors


def _unpickled(path: str) -> dict[str, Any]:
    """The tensors of a ``.bin`` by name."""
    torch = torch_library()
    name = os.path.basename(path)
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # a file of torch < 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # noqa: BLE001 - torch and pickle raise any type for a damaged file
        raise UsageError(
            f"{name} cannot be read as weights alone: {str(exc)[:160]}", hint=_HINT
        ) from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in found.items()
    ):
        raise UsageError(f"{name} holds something else than named tensors", hint=_HINT)
    return found


def _quantised(file: str, name: str, dtype: str) -> UsageError:
    return UsageError(
        f"{file}: {name[:80]!r} is {dtype[:30]}: a quantised checkpoint cannot be merged into",
        hint="merge into the 16-bit checkpoint that it was made from, and quantise the result",
    )

"""A compiled library that works on Pillow's pixels in place.

``pixels.c`` is compiled once for each user, when an engine starts whose model needs it. It copies
no pixels, and releases Python's lock while it runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import Any, Final

from turbofit.core.process.compiler import cache_folder, compile_c, find_compiler, make_folder

_SOURCE: Final = Path(__file__).with_suffix(".c")
#: Flags without fused multiplications, which round differently: Pillow's wheels have none.
_FLAGS: Final = (
    "-std=gnu11", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"
)  # fmt: skip
_LIBRARY: Final = "libpixels.so"
_PIXEL: Final = 4  # bytes


class NotUsableError(Exception):
    """The library cannot be used: Pillow and NumPy do the work themselves."""


def open_library() -> ctypes.CDLL:
    """The library, compiled if it is missing, from a folder that only this user can write.

    Raises:
        NotUsableError: this machine cannot run it, or cannot compile it.
        OSError: the cache folder cannot be used.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise NotUsableError("this is no Linux on x86-64")
    text = "\0".join(_FLAGS).encode() + _SOURCE.read_bytes()
    folder = cache_folder("images")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / hashlib.sha256(text).hexdigest()[:20] / _LIBRARY
    if not path.exists():
        make_folder(path.parent, _compile)
    for part in (folder, path.parent, path):
        found = part.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise NotUsableError(f"others can write {part}")
    library = _load(path)
    if not library.usable():
        raise NotUsableError("this processor has no AVX2")
    address, size = ctypes.c_void_p, ctypes.c_int
    library.resize.argtypes = (address, size, size, address, size, size, size)
    for look_up in (library.look_up_2, library.look_up_4):
        look_up.argtypes = (address, ctypes.c_size_t, address, address)
    return library


def _compile(folder: Path) -> None:
    command = find_compiler()
    if command is None:
        raise NotUsableError("there is no C compiler")
    path = folder / _LIBRARY
    why = compile_c([*command, *_FLAGS, str(_SOURCE), "-lm", "-o", str(path)])
    if why is not None:
        raise NotUsableError(f"the C compiler failed: {why}")
    path.chmod(0o500)


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as exc:
        raise NotUsableError(f"{path} cannot be loaded: {exc}") from None


class _Array(ctypes.Structure):
    """Arrow's description of an array in memory, which Pillow returns.

    Source: Apache Arrow, The Arrow C data interface: struct ArrowArray
    """


_Array._fields_ = (
    *((name, ctypes.c_int64) for name in ("length", "nulls", "offset", "buffers", "children")),
    ("buffer", ctypes.POINTER(ctypes.c_void_p)),
    ("child", ctypes.POINTER(ctypes.POINTER(_Array))),
)
_described: Any = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class Pixels:
    """A picture's pixels in RGB, which stay in place while this object lives.

    ``address`` is that of the first pixel, row after row; None if they are not in one piece.
    """

    def __init__(self, core: Any) -> None:
        self.address: int | None = None
        try:
            self._capsule = core.__arrow_c_array__()
        except ValueError:
            return
        array = _Array.from_address(_described(self._capsule, b"arrow_array"))
        if array.children == 1:
            values = array.child[0][0]
            width, height = core.size
            if values.length == width * height * _PIXEL and values.buffers == 2:
                self.address = values.buffer[1]

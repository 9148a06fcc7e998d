"""A compiled library that works on Pillow's pixels in place.

`turbofit.core.installation` says where the installation put it. It copies no pixels, and releases
Python's lock while it runs.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from turbofit.core.errors import PackageError
from turbofit.core.installation import image_library

_PIXEL: Final = 4  # bytes


class NotUsableError(Exception):
    """The library cannot be used: Pillow and NumPy do the work themselves."""


def open_library() -> ctypes.CDLL:
    """The library that the installation compiled.

    Raises:
        NotUsableError: it is missing or damaged, or this machine cannot run it.
    """
    try:
        library = ctypes.CDLL(str(image_library()))
    except PackageError as exc:
        raise NotUsableError(f"{exc.message} ({exc.hint})" if exc.hint else exc.message) from None
    except OSError as exc:
        raise NotUsableError(f"it cannot be loaded: {exc}") from None
    if not library.usable():
        raise NotUsableError("this processor has no AVX2")
    address, size = ctypes.c_void_p, ctypes.c_int
    library.resize.argtypes = (address, size, size, address, size, size, size)
    for look_up in (library.look_up_2, library.look_up_4):
        look_up.argtypes = (address, ctypes.c_size_t, address, address)
    return library


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

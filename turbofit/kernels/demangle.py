"""C++ names as a person reads them, by the C++ library that the engine itself is linked with."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Final

__all__ = ["demangle"]

_LIBRARIES: Final = ("libstdc++.so.6", "libc++abi.so.1")


def demangle(name: str) -> str:
    """The name that is mangled here, and the same name where it is none.

    Raises:
        OSError: this machine has no C++ library.
    """
    function, free = _library()
    status = ctypes.c_int()
    found = function(name.encode(), None, None, ctypes.byref(status))
    if status.value or not found:
        return name
    try:
        return ctypes.string_at(found).decode()
    finally:
        free(found)


@cache
def _library() -> tuple[ctypes._NamedFuncPointer, ctypes._NamedFuncPointer]:
    for name in _LIBRARIES:
        try:
            function = ctypes.CDLL(name).__cxa_demangle
        except OSError:
            continue
        function.restype = ctypes.c_void_p
        function.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        free = ctypes.CDLL(None).free
        free.argtypes = (ctypes.c_void_p,)
        return function, free
    raise OSError("no C++ library, which demangles names")

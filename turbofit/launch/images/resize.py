"""Pillow's resizing with vector instructions: the same bytes in a fifth of the time.

LMDeploy resizes the images of models with tiles by Pillow, which takes half of the processor time
of such an image. ``resize.c`` makes the same bytes. It is compiled once for each user, and is used
where it makes of trial images what the installed Pillow makes of them, to the byte.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sys
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.process.compiler import cache_folder, compile_c, find_compiler, make_folder

if TYPE_CHECKING:
    from collections.abc import Callable

_SOURCE: Final = Path(__file__).with_suffix(".c")
#: No fused multiplications: Pillow's wheels have none, and they round differently.
_FLAGS: Final = (
    "-std=gnu11", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"
)  # fmt: skip
_LIBRARY: Final = "libresize.so"
#: Releases of Pillow whose resizing was read: from the first that tells where its pixels are, and
#: that from which on a picture that loses much height is resized along its columns first.
#: Source: Pillow 13.0.0 libImaging/Resample.c::ImagingResampleInner `int horizontal_first =`
_FIRST, _COLUMNS_FIRST, _UNREAD = (11, 3), (13, 0), (13, 1)
_PIXEL: Final = 4  # bytes
#: Trial images: larger and smaller, one side alone, either pass first, and as near to that as can be.
_TRIED: Final = (
    ((61, 47), (448, 96)), ((131, 53), (61, 97)), ((97, 61), (97, 40)), ((40, 90), (33, 90)),
    ((64, 300), (56, 284)), ((64, 300), (56, 283)), ((37, 211), (90, 16)), ((300, 41), (16, 33)),
)  # fmt: skip


class NotUsableError(Exception):
    """Pillow's own resizing stays, for this reason."""


def quicken_resizing() -> str | None:
    """Have our library resize Pillow's pictures; why not, where Pillow's own way stays."""
    from PIL import Image

    core, own = Image.core, Image.Image.resize
    if hasattr(own, "__wrapped__"):
        return None
    try:
        columns_first = _order(Image.__version__)
        core.set_use_block_allocator(1)  # pixels of large pictures lie in one piece, too
        resizer = Resizer(_library(), columns_first=columns_first)
        resizer.check(own)
    except Exception as exc:  # noqa: BLE001 - no server stays down because it would be slower
        if hasattr(core, "set_use_block_allocator"):
            core.set_use_block_allocator(0)
        return " ".join(f"{_named(exc)}{exc}".split())
    Image.Image.resize = resizer.instead_of(own)
    return None


def _named(exc: Exception) -> str:
    return "" if isinstance(exc, NotUsableError) else f"{type(exc).__name__}: "


def _order(version: str) -> bool:
    """Whether this Pillow resizes some pictures along their columns first."""
    release = tuple(map(int, version.split(".")[:2]))
    if not _FIRST <= release < _UNREAD:
        raise NotUsableError(f"Pillow {version} is not as known")
    return release >= _COLUMNS_FIRST


def _library() -> ctypes.CDLL:
    """The compiled library, which nobody but this user could have written."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise NotUsableError("this is no Linux on x86-64")
    text = "\0".join(_FLAGS).encode() + _SOURCE.read_bytes()
    path = cache_folder("images") / hashlib.sha256(text).hexdigest()[:20] / _LIBRARY
    if not path.exists():
        make_folder(path.parent, _compile)
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(opened)
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise NotUsableError(f"somebody else could have written {path}")
        library = ctypes.CDLL(f"/proc/self/fd/{opened}")  # what was looked at, whatever comes
    except OSError as exc:
        raise NotUsableError(f"{path} cannot be loaded: {exc}") from None
    finally:
        os.close(opened)
    if not library.usable():
        raise NotUsableError("this processor has no AVX2")
    sizes = (ctypes.c_int, ctypes.c_int)
    library.resize.argtypes = (ctypes.c_void_p, *sizes, ctypes.c_void_p, *sizes, ctypes.c_int)
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


class Resizer:
    """Resizes pictures in RGB as Pillow's bicubic filter does it."""

    def __init__(self, library: ctypes.CDLL, *, columns_first: bool) -> None:
        self._library, self._columns_first = library, columns_first

    def check(self, own: Callable[..., Any]) -> None:
        """Resize trial images in both ways.

        Raises:
            NotUsableError: the results differ.
        """
        import numpy as np
        from PIL import Image

        rng = np.random.default_rng(0)
        for (width, height), size in _TRIED:
            noise = rng.integers(-128, 384, (height, width, 3)).clip(0, 255)
            image = Image.fromarray(noise.astype(np.uint8))
            made = self.resized(image, size)
            if made is None or made.tobytes() != own(image, size).tobytes():
                raise NotUsableError("it makes other bytes than Pillow")

    def instead_of(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """Pillow's method, which does itself what the library does not."""
        from PIL import Image

        bicubic = (None, Image.Resampling.BICUBIC)

        @wraps(own)
        def resize(
            image: Any, size: Any, resample: Any = None, box: Any = None, reducing_gap: Any = None
        ) -> Any:
            made = None
            if resample in bicubic and box is None and reducing_gap is None:
                made = self.resized(image, size)
            return own(image, size, resample, box, reducing_gap) if made is None else made

        return resize

    def resized(self, image: Any, size: Any) -> Any:
        """The picture in another size; None where the library does not resize it."""
        from PIL import Image

        if image.mode != "RGB" or not isinstance(size, tuple) or size == image.size:
            return None
        if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
            return None
        image.load()
        (width, height), (new_width, new_height) = image.size, size
        made = Image.core.new("RGB", size)
        source, target = _Pixels(image.im, width * height), _Pixels(made, new_width * new_height)
        if not source.address or not target.address:
            return None
        lost = height - new_height
        columns = self._columns_first and lost > 0 and lost > 2 * (width - new_width)
        words = (source.address, width, height, target.address, new_width, new_height, columns)
        return image._new(made) if self._library.resize(*words) else None


class _Array(ctypes.Structure):
    """Arrow's description of an array in memory, as Pillow gives it.

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


class _Pixels:
    """Where a picture's pixels are while this is kept; ``address`` 0: not in one piece."""

    def __init__(self, core: Any, count: int) -> None:
        self.address = 0
        try:
            self._capsule = core.__arrow_c_array__()
        except ValueError:
            return
        array = _Array.from_address(_described(self._capsule, b"arrow_array"))
        if array.children == 1:
            values = array.child[0][0]
            if values.length == count * _PIXEL and values.buffers == 2:
                self.address = values.buffer[1]

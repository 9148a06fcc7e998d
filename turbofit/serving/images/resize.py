"""Resizes images and looks values up by vector instructions, with the same bits as Pillow.

For models with tiles, LMDeploy resizes images by Pillow, which takes half of an image's processor
time. ``pixels.c`` computes the same bytes in a fifth of the time. This code is used only if its
bytes for trial images equal the bytes of the installed Pillow.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, Final

from turbofit.serving.images.values import NotUsableError, Pixels, TableTransform, open_library

#: Attributes with a transform of torchvision, in models that resize by Pillow.
_TRANSFORMS: Final = ("transform", "image_transform")
_OURS: Final = "turbofit_resizes"
#: Three releases of Pillow: the first that gives the address of pixels; the first that resizes
#: columns before rows if a picture loses much height; the first whose code is unknown.
#: Source: Pillow 13.0.0 libImaging/Resample.c::ImagingResampleInner `int horizontal_first =`
_FIRST, _COLUMNS_FIRST, _UNREAD = (11, 3), (13, 0), (13, 1)
#: Sizes of trial images and their new sizes. Pillow resizes some of them columns before rows.
_TRIED: Final = (
    ((61, 47), (448, 96)), ((131, 53), (61, 97)), ((97, 61), (97, 40)), ((40, 90), (33, 90)),
    ((64, 300), (56, 284)), ((64, 300), (56, 283)), ((37, 211), (90, 16)), ((300, 41), (16, 33)),
)  # fmt: skip


def quicken(model: Any) -> str | None:
    """Let the compiled library resize a model's images and look values up, instead of Pillow.

    Return a message for the engine's log, also if Pillow does all the work. None if the model does
    not resize by Pillow.
    """
    transforms = [getattr(model, name) for name in _TRANSFORMS if hasattr(model, name)]
    if not transforms:
        return None
    try:
        library = open_library()
        replace_resize(library)
    except Exception as exc:  # noqa: BLE001 - a slower server is better than none
        named = "" if isinstance(exc, NotUsableError) else f"{type(exc).__name__}: "
        return " ".join(f"resized by Pillow alone: {named}{exc}".split())
    for transform in transforms:
        if isinstance(transform, TableTransform):
            transform.use_library(library)
    return "resized with AVX2"


def replace_resize(library: ctypes.CDLL) -> None:
    """Have the library resize the pictures of this process, except kinds that it cannot resize.

    Raises:
        NotUsableError: this Pillow is unknown, or makes other bytes.
    """
    pillow: Any = import_module("PIL.Image")
    original = pillow.Image.resize
    if hasattr(original, _OURS):
        return
    resizer = Resizer(library, pillow.__version__)
    resizer.check(original)
    # With this allocator, Pillow keeps also the pixels of large pictures in one piece.
    pillow.core.set_use_block_allocator(1)
    pillow.Image.resize = resizer.instead_of(original)


class Resizer:
    """Resizes RGB pictures to the same bytes as Pillow's bicubic filter.

    Raises:
        NotUsableError: the code of this version of Pillow is not known.
    """

    def __init__(self, library: ctypes.CDLL, version: str) -> None:
        release = tuple(map(int, version.split(".")[:2]))
        if not _FIRST <= release < _UNREAD:
            raise NotUsableError(f"the code of Pillow {version} is unknown")
        self._library, self._columns_first = library, release >= _COLUMNS_FIRST

    def check(self, original: Callable[..., Any]) -> None:
        """Check that the library and Pillow resize trial images to the same bytes.

        Raises:
            NotUsableError: some bytes differ.
        """
        import numpy as np
        from PIL import Image

        rng = np.random.default_rng(0)
        for (width, height), size in _TRIED:
            noise = rng.integers(-128, 384, (height, width, 3)).clip(0, 255)
            image = Image.fromarray(noise.astype(np.uint8))
            made = self.resized(image, size)
            if made is None or made.tobytes() != original(image, size).tobytes():
                raise NotUsableError("the library makes other bytes than Pillow")

    def instead_of(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that resizes images by the library, in place of Pillow's method.

        ``original``, Pillow's method, resizes the images that the library cannot resize.
        """
        from PIL import Image

        bicubic = (None, Image.Resampling.BICUBIC)

        @wraps(original)
        def resize(
            image: Any, size: Any, resample: Any = None, box: Any = None, reducing_gap: Any = None
        ) -> Any:
            """Resize by the library if it can, else by Pillow."""
            made = None
            if resample in bicubic and box is None and reducing_gap is None:
                made = self.resized(image, size)
            return original(image, size, resample, box, reducing_gap) if made is None else made

        setattr(resize, _OURS, True)
        return resize

    def resized(self, image: Any, size: Any) -> Any:
        """Return the picture in another size; None if the library cannot resize it."""
        pillow: Any = import_module("PIL.Image")
        is_pair = isinstance(size, tuple) and len(size) == 2
        if not is_pair or not all(type(side) is int and side > 0 for side in size):
            return None
        if image.mode != "RGB" or size == image.size:
            return None
        image.load()
        (width, height), (new_width, new_height) = image.size, size
        made = pillow.core.new("RGB", size)
        source, target = Pixels(image.im), Pixels(made)
        if source.address is None or target.address is None:
            return None
        lost = height - new_height
        columns = self._columns_first and lost > max(0, 2 * (width - new_width))
        sizes = (source.address, width, height, target.address, new_width, new_height)
        return image._new(made) if self._library.resize(*sizes, columns) else None

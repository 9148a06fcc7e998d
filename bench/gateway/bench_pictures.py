"""JPEG files of about so many bytes: noise, which does not compress."""

from __future__ import annotations

import random
from functools import lru_cache
from io import BytesIO


@lru_cache(maxsize=16)
def noise_jpeg(size: int, seed: int = 0) -> bytes:
    """A JPEG of about ``size`` bytes, of ordinary sides."""
    from PIL import Image

    side = max(16, int((size * 0.95) ** 0.5))
    pixels = random.Random(seed).randbytes(side * side)
    image = Image.frombytes("L", (side, side), pixels)
    file = BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()

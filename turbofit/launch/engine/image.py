"""A worst-case image, made without an imaging library."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

from turbofit.core.images.rule import DummyImage

if TYPE_CHECKING:
    from turbofit.core.plan import Plan

__all__ = ["flat_png", "worst_image"]


def worst_image(plan: Plan) -> DummyImage | None:
    """An image that takes the units the plan allows for one; None for a model without images.

    Its fields hold LMDeploy to the plan's limit, whatever its default.
    """
    rule, limit = plan.model.image_rule, plan.limits.image_limit
    if rule is None or limit is None:
        return None
    size = plan.workload.image_size or rule.with_limit(limit).worst_size()
    return DummyImage(size, rule.knobs(limit) if rule.client_knobs else {})


def flat_png(width: int, height: int) -> bytes:
    """A black PNG of one bit a pixel, so that the largest image is a few kilobytes."""
    row = b"\0" + b"\0" * (-(-width // 8))
    data = zlib.compress(row * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )

"""Held to two plans at once: while engines of an old plan and of a new one serve together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.plan import Limits
from turbofit.gateway.limits.gate import KvCache
from turbofit.gateway.limits.request_limits import Bounds, model_default, planned_limit

if TYPE_CHECKING:
    from turbofit.core.images import ImageRule

__all__ = ["intersect"]

_OF_IMAGES: Final = frozenset({"vision_unit", "max_dynamic_patch", "max_pixels_per_image"})


def intersect(a: Bounds, b: Bounds) -> Bounds:
    """Bounds that admit only what both admit: of each limit the lower.

    Images that can carry no limit of their own are counted at the higher of the two defaults, which
    is what one of the engines will make of them. Over-counted for the other: such images are
    refused more often than by either plan alone, and neither engine gets more than it paid for.

    Raises:
        UsageError: they are of different models.
    """
    if a.rule is not None and b.rule is not None and a.rule != b.rule:
        raise UsageError(
            "two plans of different models cannot be served together",
            hint="stop the one before the other is started",
        )
    rule = a.rule if b.rule is not None else None
    gates = [gate for gate in (a.gate, b.gate) if gate is not None]
    limits = _limits(a, b, rule)
    # What a body may hold beside its images follows from three limits, and may be no more either.
    beside = min(a.room_beside_images, b.room_beside_images)
    images = int(limits.images_per_request * limits.bytes_per_image * 4 / 3)
    body = min(limits.bytes_per_body, beside + images)
    return Bounds(
        rule=rule,
        limits=msgspec.structs.replace(limits, bytes_per_body=body),
        longest_request_tokens=min(a.longest_request_tokens, b.longest_request_tokens),
        overlay=a.overlay and b.overlay,
        gate=min(gates, default=None),
        kv=_kv(a, b),
        bytes_per_unit=max(a.bytes_per_unit, b.bytes_per_unit),
        watches=a.watches and b.watches,
        default=max(model_default(a), model_default(b)) if rule is not None else None,
        heeds=a.heeds and b.heeds,
        engines=tuple(sorted({*a.engines, *b.engines})),
        vocabulary=min(a.vocabulary, b.vocabulary) or max(a.vocabulary, b.vocabulary),
    )


def _kv(a: Bounds, b: Bounds) -> KvCache:
    """The smaller cache and the longer requests, of those that have a gate."""
    gated = [one.kv for one in (a, b) if one.gate is not None]
    return KvCache(
        tokens=min((kv.tokens for kv in gated), default=0),
        longest=max((kv.longest for kv in gated), default=0),
        block=max((kv.block for kv in gated), default=1),
    )


def _limits(a: Bounds, b: Bounds, rule: ImageRule | None) -> Limits:
    lower: dict[str, Any] = dict.fromkeys(_OF_IMAGES)
    if rule is not None:
        most = min(planned_limit(a), planned_limit(b))
        lower = {"vision_unit": rule.unit_name, rule.plan_limit_name: most}
    for name in set(Limits.__struct_fields__) - _OF_IMAGES:
        lower[name] = min(getattr(a.limits, name), getattr(b.limits, name))
    return msgspec.structs.replace(a.limits, **lower)

"""The image rules' answers as functions, until every caller asks the rule itself."""

from __future__ import annotations

from typing import Any

from turbofit.core.images import ImageRule
from turbofit.core.model import Model


def _limit(rule: ImageRule, bounds: dict[str, Any]) -> tuple[ImageRule, int | None]:
    limit, least = bounds.get(rule.limit_name), bounds.get("min_pixels")
    if least is not None and rule.limit_name == "max_pixels":
        from msgspec.structs import replace

        rule = replace(rule, min_pixels=least)
    return rule, limit


def units(rule: ImageRule, width: int, height: int, **bounds: Any) -> int:
    """See :class:`ImageRule`."""
    rule, limit = _limit(rule, bounds)
    return rule.units(width, height, limit)


def worst_units(rule: ImageRule, **bounds: Any) -> int:
    """See :class:`ImageRule`."""
    rule, limit = _limit(rule, bounds)
    return rule.worst_units(limit)


def limit_bounds(rule: ImageRule, limit: int) -> dict[str, int]:
    """See :class:`ImageRule`."""
    return rule.knobs(limit)


def least_units(rule: ImageRule) -> int:
    """See :class:`ImageRule`."""
    return rule.least_units


def unit_tokens(rule: ImageRule, units: int) -> int:
    """See :class:`ImageRule`."""
    return rule.unit_tokens(units)


def pixel_bytes(model: Model, units: int) -> int:
    """Bytes of the preprocessed pixels of so many units at 16 bits."""
    return model.unit_values * units * 2


def image_tokens(rule: ImageRule, width: int, height: int, **bounds: Any) -> int:
    """See :class:`ImageRule`."""
    rule, limit = _limit(rule, bounds)
    return rule.tokens(width, height, limit)


def units_within(rule: ImageRule, tokens: int, *, padded: int | None = None) -> int:
    """See :class:`ImageRule`."""
    return rule.units_within(tokens, padded=padded)


def exposed_limit(rule: ImageRule) -> int:
    """See :class:`ImageRule`."""
    return rule.exposed_limit


def largest_limit(rule: ImageRule, units: int) -> int | None:
    """See :class:`ImageRule`."""
    return rule.largest_limit(units)


def limits_down(rule: ImageRule, steps: int = 16) -> tuple[int, ...]:
    """See :class:`ImageRule`."""
    return rule.lower_limits(steps)

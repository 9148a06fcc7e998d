"""`ImageRule.size_within` as a function, until every caller asks the rule itself."""

from __future__ import annotations

from turbofit.core.images import ImageRule

__all__ = ["size_within"]


def size_within(
    rule: ImageRule, size: tuple[int, int], limit: int, default: int
) -> tuple[int, int] | None:
    """See :class:`ImageRule`."""
    return rule.with_limit(default).size_within(size, limit)

"""The answers of `Videos` as functions, until every caller asks the rule itself."""

from __future__ import annotations

from typing import Any

from turbofit.core.images import ImageRule
from turbofit.core.images.video import GRID_TEXT_TOKENS, LONGEST_SECONDS

__all__ = [
    "GRID_TEXT_TOKENS", "LONGEST_SECONDS", "fitting_pixels", "grids", "least_pixels",
    "most_video_units", "takes_videos", "video_units",
]  # fmt: skip


def takes_videos(engine: str, rule: ImageRule | None) -> bool:
    """Whether LMDeploy takes videos of such a model on this engine, and turbofit counts them."""
    return engine == "pytorch" and rule is not None and rule.takes_videos


def grids(rule: ImageRule, frames: int) -> int:
    """See :class:`Videos`."""
    return rule.videos.grids(frames)


def video_units(rule: ImageRule, *arguments: Any, **bounds: Any) -> int:
    """See :class:`Videos`."""
    return rule.videos.units(*arguments, **bounds)


def fitting_pixels(rule: ImageRule, *arguments: Any, **bounds: Any) -> int | None:
    """See :class:`Videos`."""
    return rule.videos.fitting_pixels(*arguments, **bounds)


def most_video_units(rule: ImageRule, *arguments: Any) -> int:
    """See :class:`Videos`."""
    return rule.videos.most_units(*arguments)


def least_pixels(rule: ImageRule, frames: int, largest: int) -> int:
    """See :class:`Videos`."""
    return rule.videos.least_pixels(frames, largest)

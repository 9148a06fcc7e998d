"""What LMDeploy 0.18 makes of an image's parameters; written apart from the gateway."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace


def units_reaching(rule, default: int, size: tuple[int, int], params: dict[str, Any]) -> int:
    """Units as LMDeploy and Transformers would make them of this image."""
    if rule.limit_name == "max_dynamic_patch":
        patch = params.get("max_dynamic_patch")
        if patch is None or not isinstance(patch, int):
            table = {"low": 6, "medium": 12, "high": 24}
            patch = table.get(params.get("detail", "default"), default)
        return rule.units(*size, patch)
    low, high = params.get("min_pixels"), params.get("max_pixels")
    if low is None or high is None:  # one alone is ignored
        low, high = min(rule.min_pixels, default), default
    return replace(rule, min_pixels=low, max_pixels=high).units(*size)

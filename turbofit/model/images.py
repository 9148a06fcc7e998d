"""Images in units of the vision tower, and in tokens of the language model.

Image tokens only: a chat template wraps each image in two text tokens more (``<img>``/``</img>`` or
``<|vision_start|>``/``<|vision_end|>``; InternVL's adds a line feed), which belong to the prompt. A
448 x 448 image of InternVL2 is 256 tokens here.
"""

from __future__ import annotations

from turbofit.core.errors import UsageError
from turbofit.core.model import (
    AnyresRule,
    CanvasRule,
    CrossRule,
    HdRule,
    ImageRule,
    Model,
    PatchRule,
    TileRule,
)
from turbofit.model.families import anyres, internvl, llama4, phi3_v, qwen_vl

__all__ = [
    "client_limit",
    "exposed_limit",
    "image_tokens",
    "largest_limit",
    "least_units",
    "limit_bounds",
    "limits_down",
    "pixel_bytes",
    "unit_tokens",
    "units",
    "units_within",
    "worst_units",
]


def units(
    rule: ImageRule,
    width: int,
    height: int,
    *,
    max_dynamic_patch: int | None = None,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
) -> int:
    """Units (tiles or patches) of one image of this size, exactly as the preprocessor makes them.

    Args:
        rule: the model's rule.
        width: pixels.
        height: pixels.
        max_dynamic_patch: tile limit; None is the checkpoint's own. Ignored by patch rules.
        max_pixels: pixel bound; None is the checkpoint's own. Ignored by tile rules.
        min_pixels: lower pixel bound; None is the checkpoint's own. Ignored by tile rules.

    Raises:
        UsageError: not a size, or one that the preprocessor refuses.
    """
    if width < 1 or height < 1:
        raise UsageError(f"an image of {width}x{height} has no pixels", hint="give WIDTHxHEIGHT")
    if isinstance(rule, TileRule):
        return _tiles(rule, width, height, _own(max_dynamic_patch, rule.max_dynamic_patch))
    largest, smallest = _pixel_bounds(rule, max_pixels, min_pixels)
    return qwen_vl.patches(rule, width, height, largest, smallest)


def worst_units(
    rule: ImageRule,
    *,
    max_dynamic_patch: int | None = None,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
) -> int:
    """The most units that any single image gives under the limit; None is the checkpoint's own.

    Exact for tiles. An upper bound for patches: exact for the published bounds, else at most a
    fraction of a percent high (see ``families.qwen_vl.worst_patches``).
    """
    if isinstance(rule, TileRule):
        return _worst_tiles(rule, _own(max_dynamic_patch, rule.max_dynamic_patch))
    return qwen_vl.worst_patches(rule, *_pixel_bounds(rule, max_pixels, min_pixels))


def limit_bounds(rule: ImageRule, limit: int) -> dict[str, int]:
    """A limit in tiles or pixels as the keywords of :func:`units` and :func:`image_tokens`."""
    if isinstance(rule, TileRule):
        return {"max_dynamic_patch": limit}
    return {"max_pixels": limit, "min_pixels": min(rule.min_pixels, limit)}


def least_units(rule: ImageRule) -> int:
    """Units that no image has fewer of, whatever its size and limit."""
    if isinstance(rule, AnyresRule | CrossRule | HdRule):
        return _worst_tiles(rule, limits_down(rule)[-1])
    return 1 if isinstance(rule, TileRule) else rule.merge**2


def unit_tokens(rule: ImageRule, units: int) -> int:
    """Tokens of the language model that an image of so many units takes.

    Exact where tokens go by units alone. For grids (:class:`AnyresRule`) and pages
    (:class:`HdRule`) never under: what an image does not cover gives none, and
    :func:`image_tokens` is exact.
    """
    if isinstance(rule, AnyresRule):
        return anyres.most_tokens(rule, units)
    if isinstance(rule, HdRule):
        return phi3_v.most_tokens(rule, units)
    if isinstance(rule, CrossRule):
        return -(-units // rule.max_dynamic_patch)
    if isinstance(rule, TileRule):
        return units * rule.tokens_per_tile
    return units // rule.merge**2


def pixel_bytes(model: Model, units: int) -> int:
    """Bytes of the preprocessed pixels of so many units at 16 bits."""
    rule, vision = model.image_rule, model.vision
    if vision is None:
        return 0
    if isinstance(rule, TileRule):
        return units * vision.channels * rule.tile_size**2 * 2
    if isinstance(rule, PatchRule):
        patch = vision.channels * vision.temporal_patch * rule.patch_size**2
        return units * patch * 2
    return 0


def image_tokens(
    rule: ImageRule,
    width: int,
    height: int,
    *,
    max_dynamic_patch: int | None = None,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
) -> int:
    """Tokens of the language model that one image of this size takes, exactly.

    The arguments are those of :func:`units`.

    Raises:
        UsageError: not a size, or one that the preprocessor refuses.
    """
    count = units(
        rule,
        width,
        height,
        max_dynamic_patch=max_dynamic_patch,
        max_pixels=max_pixels,
        min_pixels=min_pixels,
    )
    if isinstance(rule, AnyresRule):
        limit = _own(max_dynamic_patch, rule.max_dynamic_patch)
        return anyres.tokens(rule, width, height, limit)
    if isinstance(rule, HdRule):
        limit = _own(max_dynamic_patch, rule.max_dynamic_patch)
        return phi3_v.tokens(rule, width, height, limit)
    return unit_tokens(rule, count)


def units_within(rule: ImageRule, tokens: int, *, padded: int | None = None) -> int:
    """The most units of any images whose tokens are at most so many in all.

    Never under. For grids and pages far over: an image that covers little has many tiles and few
    tokens, never fewer than the whole image's tile.

    Args:
        rule: the model's rule.
        tokens: of all images together.
        padded: units that a page (:class:`HdRule`) is padded to; None is the checkpoint's own.
    """
    if isinstance(rule, AnyresRule):
        most = anyres.worst_tiles(rule, rule.max_dynamic_patch)
        return tokens // anyres.least_tokens(rule) * most
    if isinstance(rule, HdRule):
        return tokens // phi3_v.least_tokens(rule) * (padded or rule.max_dynamic_patch + 1)
    if isinstance(rule, CrossRule):
        return tokens * rule.max_dynamic_patch
    if isinstance(rule, TileRule):
        return tokens // max(1, rule.tokens_per_tile)
    return tokens * rule.merge**2


def client_limit(
    rule: TileRule, *, max_dynamic_patch: int | None = None, detail: str | None = None
) -> int:
    """The tile limit that one request's own knobs give: an integer wins, then ``detail``.

    The Transformers format of InternVL has no such knobs: its checkpoint's limit stays.
    """
    if not rule.client_knobs:
        return rule.max_dynamic_patch
    if max_dynamic_patch is not None:
        return max_dynamic_patch
    return internvl.DETAIL_PATCHES.get(detail or "", rule.max_dynamic_patch)


def exposed_limit(rule: ImageRule) -> int:
    """The limit that ordinary OpenAI clients can reach on a server that enforces none.

    Tiles: what ``detail: high`` asks for, where the model reads it. Patches: the checkpoint's own
    ``max_pixels`` (no field of that API raises it).
    """
    if isinstance(rule, PatchRule):
        return rule.max_pixels
    if not rule.dynamic or not rule.client_knobs:
        return rule.max_dynamic_patch
    return max(rule.max_dynamic_patch, *internvl.DETAIL_PATCHES.values())


def largest_limit(rule: ImageRule, units: int) -> int | None:
    """The largest limit, no more than the checkpoint's own, whose worst image is within ``units``.

    Returns:
        ``max_dynamic_patch`` for tiles, ``max_pixels`` (whole windows) for patches; None where not
        even the smallest limit keeps within ``units``.
    """
    if isinstance(rule, AnyresRule | CrossRule | HdRule):
        fitting = (limit for limit in limits_down(rule) if _worst_tiles(rule, limit) <= units)
        return next(fitting, None)
    if isinstance(rule, TileRule):
        limit = units - 1 if rule.thumbnail and units > 1 else units
        limit = min(limit, rule.max_dynamic_patch)
        return limit if limit >= 1 and internvl.worst_tiles(rule, limit) <= units else None
    area = (rule.patch_size * rule.merge) ** 2
    low, high = 0, min(units // rule.merge**2, rule.max_pixels // area)
    while low < high:
        middle = (low + high + 1) // 2
        if worst_units(rule, max_pixels=middle * area) <= units:
            low = middle
        else:
            high = middle - 1
    return low * area if low else None


def limits_down(rule: ImageRule, steps: int = 16) -> tuple[int, ...]:
    """Limits worth trying, the checkpoint's own first: every tile count, or pixels by halves.

    A limit on grids leaves those of at most so many tiles, so only the counts that occur are named.

    Args:
        rule: the model's rule.
        steps: pixel bounds only: how many steps each half the one before.
    """
    if isinstance(rule, CrossRule):
        return (rule.max_dynamic_patch,)
    if isinstance(rule, AnyresRule):
        counts = {rows * columns // rule.tile_size**2 for rows, columns in rule.grids}
        return tuple(sorted({1} | counts, reverse=True))
    if isinstance(rule, TileRule):
        return tuple(range(rule.max_dynamic_patch, 0, -1)) if rule.dynamic else (1,)
    area = (rule.patch_size * rule.merge) ** 2
    found = [rule.max_pixels]
    for _ in range(steps):
        smaller = found[-1] // 2 // area * area
        if smaller < max(rule.min_pixels, area):
            break
        found.append(smaller)
    return tuple(found)


def _tiles(rule: TileRule, width: int, height: int, limit: int) -> int:
    if isinstance(rule, AnyresRule):
        return anyres.tiles(rule, width, height, limit)
    if isinstance(rule, CanvasRule):
        return llama4.tiles(rule, width, height, limit)
    if isinstance(rule, CrossRule | HdRule):
        return _worst_tiles(rule, limit)
    return internvl.tiles(rule, width, height, limit)


def _worst_tiles(rule: TileRule, limit: int) -> int:
    if isinstance(rule, AnyresRule):
        return anyres.worst_tiles(rule, limit)
    if isinstance(rule, HdRule):
        return limit + 1
    if isinstance(rule, CrossRule):
        return rule.max_dynamic_patch
    return internvl.worst_tiles(rule, limit)


def _own(limit: int | None, default: int) -> int:
    return default if limit is None else limit


def _pixel_bounds(
    rule: PatchRule, max_pixels: int | None, min_pixels: int | None
) -> tuple[int, int]:
    """Checked (largest, smallest)."""
    largest, smallest = _own(max_pixels, rule.max_pixels), _own(min_pixels, rule.min_pixels)
    if largest < 1 or smallest < 1:
        raise UsageError(
            f"pixel bounds {smallest}..{largest} leave no image", hint="give them in pixels"
        )
    return largest, smallest

"""Llama 3.2 Vision: every image is padded to the largest number of tiles, for cross-attention."""

from __future__ import annotations

from turbofit.core.images.base_tile import BaseTileRule


class CrossRule(BaseTileRule, tag="cross"):
    """Llama 3.2 Vision: every image is padded to ``max_dynamic_patch`` tiles.

    An image has one token in the prompt. In the caches of the cross-attention layers, each tile has
    ``tokens_per_tile`` tokens.
    """

    varies_by_size = False
    varies_by_limit = False
    client_knobs: bool = False

    def _worst_units(self, limit: int) -> int:
        return self.max_dynamic_patch

    def unit_tokens(self, units: int) -> int:
        return -(-units // self.max_dynamic_patch)

    def units_within(self, tokens: int, *, padded: int | None = None) -> int:
        return tokens * self.max_dynamic_patch

    def lower_limits(self, steps: int = 16) -> tuple[int, ...]:
        return (self.max_dynamic_patch,)

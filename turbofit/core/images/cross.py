"""Llama 3.2 Vision: every image is padded to the most tiles, for the cross-attention layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.images.base_tile import BaseTileRule

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CrossRule"]


class CrossRule(BaseTileRule, tag="cross"):
    """Llama 3.2 Vision: every image is padded to ``max_dynamic_patch`` tiles.

    It takes one token of the prompt, and ``tokens_per_tile`` tokens a tile of the caches of the
    cross-attention layers.
    """

    client_knobs: bool = False

    @property
    def varies_by_size(self) -> bool:
        """See :class:`ImageRule`."""
        return False

    @property
    def varies_by_limit(self) -> bool:
        """See :class:`ImageRule`."""
        return False

    def _units(self, width: int, height: int, limit: int) -> int:  # noqa: ARG002
        return self.max_dynamic_patch

    def _worst_units(self, limit: int) -> int:  # noqa: ARG002
        return self.max_dynamic_patch

    def unit_tokens(self, units: int) -> int:
        """See :class:`ImageRule`."""
        return -(-units // self.max_dynamic_patch)

    def units_within(self, tokens: int, *, padded: int | None = None) -> int:  # noqa: ARG002
        """See :class:`ImageRule`."""
        return tokens * self.max_dynamic_patch

    def lower_limits(self, steps: int = 16) -> tuple[int, ...]:  # noqa: ARG002
        """See :class:`ImageRule`."""
        return (self.max_dynamic_patch,)

    def with_limit(self, limit: int) -> Self:  # noqa: ARG002
        """See :class:`ImageRule`: no folder has another."""
        return self

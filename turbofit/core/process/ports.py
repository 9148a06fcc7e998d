"""TCP ports."""

from __future__ import annotations

from typing import Final

__all__ = ["DEFAULT_PORT", "LAST_PORT"]

#: LMDeploy's own default.
DEFAULT_PORT: Final = 23333
LAST_PORT: Final = 65535

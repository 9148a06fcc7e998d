"""Pages are opened in a real Chromium, where there is one."""

from __future__ import annotations

from tests.support.browser import browser

__all__ = ["browser"]

"""``python -m turbofit``."""

from __future__ import annotations

from turbofit.cli.main import entry

entry()

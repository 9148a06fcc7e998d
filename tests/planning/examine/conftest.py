"""The fixtures of checks, over an environment in order."""

from __future__ import annotations

from tests.support.checkup import checkup, find, port, roomy_host, sources

__all__ = ["checkup", "find", "port", "roomy_host", "sources"]

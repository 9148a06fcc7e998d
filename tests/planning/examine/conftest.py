"""The fixtures of checks, over an environment in order."""

from __future__ import annotations

from tests.support.checkup import checkup, find, port, roomy_host, sources
from tests.support.nvml import nvml_library

__all__ = ["checkup", "find", "nvml_library", "port", "roomy_host", "sources"]

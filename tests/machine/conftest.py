"""The stand-in NVML for this folder."""

from __future__ import annotations

from tests.support.nvml import nvml_library, nvml_machine

__all__ = ["nvml_library", "nvml_machine"]

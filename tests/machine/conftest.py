"""The stand-in NVML for this folder."""

from __future__ import annotations

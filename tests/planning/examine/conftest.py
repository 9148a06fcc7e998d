"""The fixtures of checks, over an environment in order."""

from __future__ import annotations

"""turbofit: GPU-memory plans for LMDeploy that hold."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"

"""Errors of the pretend machine."""

from __future__ import annotations

from turbofit.core.errors import PackageError

__all__ = ["PretendError"]


class PretendError(PackageError):
    """Something that the pretend machine needs is missing or unsupported (exit code 7)."""

    kind = "pretend"

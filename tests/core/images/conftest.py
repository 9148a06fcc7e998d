"""Transformers' own preprocessors as oracles."""

from __future__ import annotations

from tests.model.conftest import transformers

__all__ = ["transformers"]

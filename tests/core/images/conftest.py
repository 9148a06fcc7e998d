"""Transformers' own preprocessors as oracles."""

from __future__ import annotations

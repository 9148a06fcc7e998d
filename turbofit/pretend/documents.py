"""JSON that turbofit hands to the processes that it starts: dataclasses, with paths in them."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

__all__ = ["dumped", "loaded"]

T = TypeVar("T")


def dumped(value: Any) -> str:
    """The JSON text of a dataclass."""
    return msgspec.json.encode(value, enc_hook=str).decode()


def loaded(text: str | bytes, kind: type[T]) -> T:
    """The dataclass of `dumped`'s text.

    Raises:
        msgspec.DecodeError: it is not JSON, or not of this kind.
    """
    return msgspec.json.decode(text, type=kind, dec_hook=lambda kind, value: kind(value))

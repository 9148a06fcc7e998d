"""The base of all contract types, and their JSON.

A struct is immutable, is built by keywords, and survives JSON both ways (msgspec does the work and
validates every type on the way in).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import msgspec

from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Any:
        """Only type checkers read it: the arguments below do not reach them through a base."""
        return lambda cls: cls


__all__ = ["NA", "NaType", "Struct", "decode", "known", "to_builtins", "to_json"]

NaType = Literal["NA"]
#: What could not be read. It is never 0, and prints and serialises as itself.
NA: Final[NaType] = "NA"

T = TypeVar("T")


class _StructMeta(msgspec.StructMeta):
    """Makes every subclass keyword-only: msgspec inherits ``frozen`` but not ``kw_only``."""

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any], **kw: Any) -> Any:
        return super().__new__(cls, name, bases, body, **{"kw_only": True, **kw})


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Struct(msgspec.Struct, metaclass=_StructMeta, frozen=True):
    """Base class of the contract's types."""


def to_builtins(value: Any) -> Any:
    """Structs as plain dicts, lists and scalars."""
    return msgspec.to_builtins(value)


def to_json(value: Any) -> str:
    """Indented JSON of a struct, fields in their declared order, ending in a newline."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"


def decode(data: bytes | str, type_: type[T], *, what: str) -> T:
    """Read JSON into a struct.

    Args:
        data: the JSON text.
        type_: the struct expected.
        what: how messages name the document, e.g. ``snapshot machine.json``.

    Raises:
        UsageError: not JSON, or not of this type; the message names the field.
    """
    try:
        return msgspec.json.decode(data, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise UsageError(
            f"{what} cannot be read: {exc}",
            hint="check that the file was written by this version of turbofit and is complete",
        ) from None


def known(value: int | NaType, default: int) -> int:
    """The value where it was read, else ``default``."""
    return default if value == NA else value

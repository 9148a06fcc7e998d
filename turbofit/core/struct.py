"""The base class of the contract's types, immutable and keyword-only, and their JSON."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any, ClassVar, Final, Literal, TypeAlias, TypeVar

import msgspec
from typing_extensions import Self, dataclass_transform

from turbofit.core.errors import UsageError

#: A JSON object of another program, such as a request of OpenAI's API or a checkpoint's config. The
#: code must check every field.
JsonObject: TypeAlias = dict[str, Any]
#: Options by their names, as people, files and engines write them; `PlanRequest` checks values.
Options: TypeAlias = dict[str, Any]
#: A document of turbofit without a type: of a rehearsal, a calibration or a run of `pretend`.
Document: TypeAlias = dict[str, Any]

NaType = Literal["NA"]
#: A value that was not readable: never 0, and "NA" in texts and in JSON.
NA: Final[NaType] = "NA"

T = TypeVar("T")

#: Converts structs to plain dicts, lists and scalars.
to_builtins = msgspec.to_builtins


class _StructMeta(msgspec.StructMeta):
    """Makes every subclass keyword-only: msgspec inherits ``frozen`` but not ``kw_only``."""

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any], **kw: Any) -> Any:
        return super().__new__(cls, name, bases, body, **{"kw_only": True, **kw})


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Struct(msgspec.Struct, metaclass=_StructMeta, frozen=True):
    """Base class of immutable types that may be fields of other people's pydantic models.

    The JSON Schema of these models allows any value; ``turbofit report --schema`` has the details.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Let pydantic accept an instance or its JSON, and write an instance as plain data."""
        from pydantic_core import core_schema

        def read(value: Any) -> Any:
            if isinstance(value, cls):
                return value
            try:
                return msgspec.convert(value, cls)
            except msgspec.ValidationError as exc:
                raise ValueError(str(exc)) from None

        return core_schema.no_info_after_validator_function(
            read,
            core_schema.any_schema(),
            serialization=core_schema.plain_serializer_function_ser_schema(to_builtins),
        )


class Printed:
    """What is printed in Python, and shown in a notebook, as the command line prints it."""

    __slots__ = ()
    #: Writes a document as text; `turbofit.api` sets the painter, which this room does not know.
    painter: ClassVar[Callable[[Any], str]] = repr

    def __str__(self) -> str:
        return Printed.painter(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


class JsonDocument(Printed, Struct):
    """A struct that is a whole document; ``what`` is its name in messages."""

    what: ClassVar[str]

    def to_dict(self) -> Document:
        """Return the document as dicts, lists and scalars, equal to the result of `to_json`."""
        document: Document = msgspec.json.decode(self.to_json())
        return document

    def to_json(self) -> str:
        """Return the document as JSON."""
        return to_json(self)

    @classmethod
    def from_json(cls, data: bytes | str, *, what: str = "") -> Self:
        """Read a document from JSON.

        Raises:
            UsageError: the data is no document of this schema.
        """
        return decode(data, cls, what=what or cls.what)


def doc(text: str) -> msgspec.Meta:
    """Return a description of a field for the JSON Schemas, to put in the field's ``Annotated``."""
    return msgspec.Meta(description=text)


def const(text: str) -> msgspec.Meta:
    """Return a mark for a field's ``Annotated``: the JSON Schemas allow only the value ``text``.

    Decoding does not check the value.
    """
    return msgspec.Meta(extra_json_schema={"const": text})


def to_json(value: Any) -> str:
    """Write a value as indented JSON that ends in a newline; fields keep their order."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"


def decode(data: bytes | str, type_: type[T], *, what: str) -> T:
    """Read JSON into a struct; messages call the document ``what``.

    Raises:
        UsageError: the data is no JSON, or not of this type; the message names the field.
    """
    try:
        return msgspec.json.decode(data, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        is_json = isinstance(exc, msgspec.ValidationError)
        raise UsageError(
            f"{what} cannot be read: {exc if is_json else f'it is not JSON, or not whole ({exc})'}",
            hint="check that the file was written by this version of turbofit and is complete",
        ) from None


def known(value: int | NaType, default: int) -> int:
    """Return a value, or ``default`` if the value is `NA` (not readable)."""
    return default if value == NA else value

"""Validation of people's input by pydantic, with errors in turbofit's form."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from inspect import Parameter, Signature
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Any, Final, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
)
from pydantic.fields import FieldInfo
from typing_extensions import Self

from turbofit.core.errors import UsageError, option_of
from turbofit.core.struct import Options
from turbofit.core.units import parse_seconds, plain_number

_SHOWN = 80
#: The largest number that an option takes.
LARGEST: Final = 1 << 40
#: The expected value in words, by the type of pydantic's error; pydantic's words are for
#: programmers.
_SHOULD = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "greater_than_equal": "{ge} or more",
    "less_than_equal": "{le} or less",
    "greater_than": "more than {gt:g}",
    "less_than": "less than {lt:g}",
    "bool_type": "True or False",
    "string_type": "a text",
    "tuple_type": "a list, as [{input!r}]",
    "dict_type": "a dict",
    "is_instance_of": "a {class}",
}


class Metavar:
    """The name of an option's value in help pages, such as ``BYTES``.

    ``repeatable``: the field is a tuple; its option takes one item, and may be given several times.
    """

    def __init__(self, text: str, *, repeatable: bool = False) -> None:
        self.text, self.repeatable = text, repeatable


def parsed(parse: Callable[[str, str], Any], *, numbers: bool = False) -> BeforeValidator:
    """Make a validator that parses a text, and passes other values on to the field's type.

    ``parse`` takes the text and the field's name. A UsageError of ``parse`` is passed on inside
    pydantic's own error; :meth:`Validated.of` raises the UsageError again. ``numbers``: a number in
    Python is parsed as its text, so that it has the same meaning as on the command line. A number
    that was checked before is bytes: ``10KiB`` became 10240.
    """

    def validate(value: Any, info: ValidationInfo) -> Any:
        context = info.context or {}
        is_number = numbers and type(value) in (int, float)
        if is_number and info.field_name not in context.get("checked", ()):
            value = str(value)
        return _called(parse, value, info) if isinstance(value, str) else value

    return BeforeValidator(validate)


def checked(check: Callable[[Any, str], Any]) -> AfterValidator:
    """Make a validator of a value that has its field's type already.

    ``check`` takes the value and the field's name, as the parser of :func:`parsed`.
    """
    return AfterValidator(partial(_called, check))


def _called(function: Callable[[Any, str], Any], value: Any, info: ValidationInfo) -> Any:
    """Call ``function`` with the field's name in messages; pydantic wants a ValueError."""
    spelled = (info.context or {}).get("spelled", str)
    try:
        return function(value, spelled(info.field_name or "value"))
    except UsageError as exc:
        raise ValueError(f"{exc.message}; {exc.hint}") from exc


def whole(text: str, name: str) -> str | int:
    """Parse ``1,000`` and ``1k`` as 1000, and refuse 4.0.

    Other texts are returned unchanged, and the field's type checks them.
    """
    plain = re.sub(r"^(\d+)[kK]$", r"\g<1>000", plain_number(text.strip()))
    before, point, rest = plain.partition(".")
    if point and before.isdigit() and rest.isdigit() and (not rest.strip("0") or len(rest) == 3):
        several = f" or {before}{rest}" if len(rest) == 3 else ""
        raise UsageError(
            f"{name} {text!r} is not a whole number", hint=f"write it as {before}{several}"
        )
    return int(plain) if plain != text.strip() and plain.isdigit() else plain


def _seconds(text: str, name: str) -> str | float:
    return text if re.fullmatch(r"[-+\d.eE\s]+", text) else parse_seconds(text, name)


#: The validator of a field in seconds, which may be a number, or 500ms, 2s, 20m, 1h30m.
SECONDS: Final = parsed(_seconds)
#: A whole number of 1 or more.
Positive = Annotated[int, Field(ge=1, le=LARGEST), parsed(whole), Metavar("N")]
#: A path. ~ is expanded here: a shell does not expand it in quotes or in variables, and does not
#: read a file of options.
FilePath = Annotated[str, parsed(lambda text, _: os.path.expanduser(text)), Metavar("FILE")]


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _Door(ModelMetaclass):
    """Makes ``Class(...)`` raise turbofit's error; pydantic calls no class when it validates."""

    if not TYPE_CHECKING:

        def __call__(self, **values: Any) -> Any:
            return self.of(**values)


class Validated(BaseModel, metaclass=_Door):
    """Base class of people's input: immutable, and unknown fields are errors.

    ``Class(...)`` is :meth:`of`. It accepts only a field's own type: ``"4"``, ``1.5`` and ``True``
    are not whole numbers. Only the texts of a command line are converted (:meth:`of_options`).
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Make the signature that `help` shows: only the names and defaults of the fields."""
        cls.__signature__ = Signature([
            Parameter(
                name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if field.is_required() else field.default,
            )
            for name, field in cls.model_fields.items()
        ])  # fmt: skip

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Build an instance from values in Python.

        Raises:
            UsageError: a value is wrong or has no field; the message names the value and the field.
        """
        return cls._validated(values, str)

    @classmethod
    def of_options(cls, values: Options, spelled: Callable[[str], str]) -> Self:
        """Build an instance from the texts of a command line.

        ``spelled`` turns a field's name into the name that messages use.

        Raises:
            UsageError: a value is wrong or has no field, as in :meth:`of`.
        """
        return cls._validated(values, spelled, strict=False)

    @classmethod
    def again(cls, checked: Mapping[str, Any], **values: Any) -> Self:
        """Build an instance from values that were checked before, and ``values`` in their place.

        Raises:
            UsageError: a value is wrong or has no field, as in :meth:`of`.
        """
        kept = {name: value for name, value in checked.items() if name not in values}
        return cls._validated({**kept, **values}, str, checked=kept)

    @classmethod
    def _validated(
        cls,
        values: Mapping[str, Any],
        spelled: Callable[[str], str],
        *,
        strict: bool | None = None,
        checked: Collection[str] = (),
    ) -> Self:
        """Build an instance; raise a UsageError for the first wrong value."""
        for name, value in values.items():
            if isinstance(value, str):
                _check_utf8(value, spelled(name))
        plain = {name: _without_numpy(value) for name, value in values.items()}
        try:
            context = {"spelled": spelled, "checked": checked}
            return cls.model_validate(plain, strict=strict, context=context)
        except ValidationError as exc:
            raise _field_error(exc.errors(include_url=False)[0], cls, spelled) from None

    def given(self) -> Options:
        """Return the fields that were given and are not None, in the order of the class."""
        given = self.model_fields_set
        return {
            name: value
            for name in type(self).model_fields
            if name in given and (value := getattr(self, name)) is not None
        }

    def option_arguments(self, without: Collection[str] = ()) -> list[str]:
        """Return the given fields, except those in ``without``, as words of a command line.

        Raises:
            UsageError: a value, such as a measured machine, cannot be written as words.
        """
        return [
            word
            for name, value in self.given().items()
            if name not in without
            for word in _option_arguments(type(self).model_fields[name], name, value)
        ]

    def changed(self, **values: Any) -> Self:
        """Return a copy with other values; a value of None removes the field.

        Raises:
            UsageError: a value is wrong or has no field, as in :meth:`of`.
        """
        return self.again(self.given(), **values)


def _without_numpy(value: Any) -> Any:
    """Return a number of another type, such as ``numpy.int64``, as Python's own."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_without_numpy, value)) if type(value) in (tuple, list) else value
    if type(value) in (bool, int, float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _check_utf8(text: str, name: str) -> None:
    """Refuse a text with bytes that are not UTF-8, which no JSON document can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = text.encode(errors="backslashreplace").decode()
        raise UsageError(
            f"{name} {shown[:_SHOWN]} is no text in UTF-8",
            hint="give it another name, or make a symbolic link to it",
        ) from None


def _option_arguments(field: FieldInfo, name: str, value: Any) -> list[str]:
    """Return the words of a command line that set an option to ``value``."""
    option = option_of(name)
    if isinstance(value, bool):
        off = [f"--no-{option[2:]}"] if field.default is None else []
        return [option] if value else off
    if isinstance(value, dict):
        return [option, json.dumps(value)]
    if isinstance(value, tuple):
        several = _has_ellipsis(field.annotation)
        return [option, *map(_option_text, value)] if several else [option, _option_text(value)]
    if not isinstance(value, str | int | float):
        raise UsageError(f"{name} is no text", hint=f"give {name} as on the command line")
    return [option, str(value)]


def _option_text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _has_ellipsis(annotation: Any) -> bool:
    """Return whether a type is a tuple of any length, ``tuple[X, ...]``, or contains one."""
    arguments = get_args(annotation)
    return Ellipsis in arguments or any(map(_has_ellipsis, arguments))


def _field_error(
    error: Mapping[str, Any], kind: type[BaseModel], spelled: Callable[[str], str]
) -> UsageError:
    """Make a UsageError of one of pydantic's errors for an instance of ``kind``."""
    # `parsed` raises a ValueError whose cause is the parser's own UsageError, which says more.
    cause = getattr(error.get("ctx", {}).get("error"), "__cause__", None)
    place = error["loc"]
    field = str(place[0]) if place else ""
    if isinstance(cause, UsageError):
        cause.options = cause.options or (field,)
        return cause
    from turbofit.core.messages import guess, meant, neighbour, of_other_server

    if error["type"] == "extra_forbidden":
        near = neighbour(field, kind.model_fields, str) or of_other_server(field, str)
        hint = near or meant(field, sorted(kind.model_fields))
        wrong = f"{kind.__name__} has no field {field}"
        return UsageError(wrong, hint=hint, options=[field])
    name = spelled(field)
    if error["type"] == "missing" and len(place) == 1:
        return UsageError(f"{name} is not given", hint=f"give {name}", options=[field])
    value = repr(error["input"])
    # In pydantic's message the allowed words are in quotes.
    choices = re.findall("'([^']*)'", error["msg"]) if error["type"] == "literal_error" else []
    near = guess(str(error["input"]), choices)
    known = kind.model_fields.get(field)
    text = getattr(known, "description", None) or ""
    text = re.sub(r"--([a-z][a-z-]+)", lambda option: spelled(option[1].replace("-", "_")), text)
    return UsageError(
        f"{name} {value if len(value) <= _SHOWN else value[:_SHOWN] + '…'}: {_should(error)}",
        hint=near or (f"{name}: {text}" if text else f"give another {name}, or leave it out"),
        options=[field],
    )


def _should(error: Mapping[str, Any]) -> str:
    """Return what a value should be, in words, from one of pydantic's errors."""
    limits = error.get("ctx", {})
    if expected := _SHOULD.get(error["type"]):
        return f"it should be {expected.format_map({**error, **limits})}"
    if error["type"] in ("missing", "too_long"):  # of a list
        return f"it should have {limits.get('max_length') or error['loc'][-1] + 1} items"
    return str(error["msg"]).replace("Input should", "it should")

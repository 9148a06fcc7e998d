"""Options of the command line, made from the fields of what they fill."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import click

from turbofit.cli.command import Option, option_name
from turbofit.core.validation import Metavar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pydantic.fields import FieldInfo

    from turbofit.core.json_types import Options
    from turbofit.core.validation import Validated

__all__ = ["filled", "form_of", "grouped_options", "options_of"]

T = TypeVar("T", bound="Validated")


class _Text(click.ParamType):  # type: ignore[type-arg] # generic in newer clicks only
    """A text that the field's own type reads; ``choices``, or files, are offered at a TAB."""

    name = "text"

    def __init__(self, choices: tuple[str, ...], *, path: bool) -> None:
        self.choices, self.path = choices, path

    def shell_complete(
        self, _ctx: click.Context, _param: click.Parameter, incomplete: str
    ) -> list[Any]:
        from click.shell_completion import CompletionItem

        if self.path:
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(word) for word in self.choices if word.startswith(incomplete)]


class _Form(NamedTuple):
    """What an annotation says of the words that an option takes."""

    metavar: str = "TEXT"
    choices: tuple[str, ...] = ()
    flag: bool = False
    optional: bool = False
    several: bool = False
    repeatable: bool = False


def options_of(
    kind: type[Validated], fields: Iterable[str] = (), *, group: str = "", **attributes: Any
) -> Iterator[Option]:
    """Options of these fields, or of all, in the order of the help page, in a group of it.

    What is not given stays with the field's own default.
    """
    for name in fields or kind.model_fields:
        yield _option(name, kind.model_fields[name], group, attributes)


def grouped_options(kind: type[Validated], groups: Mapping[str, Iterable[str]]) -> Iterator[Option]:
    """Options of the fields of each group."""
    for group, fields in groups.items():
        yield from options_of(kind, fields, group=group)


def filled(kind: type[T], given: Options) -> T:
    """The class filled with those of the options given that are its fields.

    Raises:
        UsageError: a value is wrong; the message names its option.
    """
    values = {
        name: value
        for name in kind.model_fields
        if (value := given.get(name)) is not None and value != ()
    }
    return kind.of_options(values, option_name)


def form_of(field: FieldInfo) -> _Form:
    """What an option of this field takes."""
    return _form(field.annotation, field.metadata)


def _option(name: str, field: FieldInfo, group: str, attributes: dict[str, Any]) -> Option:
    form = form_of(field)
    text = field.description or ""
    if field.default not in (None, False, ()) and not field.is_required():
        text = f"{text} (default {_typed(field.default)})"
    if form.flag:
        option = option_name(name)
        if form.optional:
            option += f"/--no-{option.removeprefix('--')}"
        return Option(
            option, name, is_flag=True, default=None, help=text, group=group, **attributes
        )
    several = form.several and not form.repeatable
    return Option(
        option_name(name), name, default=None, help=text, group=group,
        type=_Text(form.choices, path=form.metavar == "FILE"),
        metavar=f"{form.metavar}..." if several else form.metavar, several=several,
        multiple=form.several, **attributes,
    )  # fmt: skip


def _typed(default: Any) -> str:
    """A default as a person types it: ``1024x768`` of a size, or of several."""
    if not isinstance(default, tuple):
        return str(default)
    nested = default and isinstance(default[0], tuple)
    return " ".join(map(_typed, default)) if nested else "x".join(map(str, default))


def _form(annotation: Any, metadata: Iterable[Any] = ()) -> _Form:
    for one in metadata:
        if isinstance(one, Metavar):
            return _form(annotation)._replace(metavar=one.text, repeatable=one.repeatable)
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _form(parts[0], parts[1:])
    if origin in (Union, UnionType):
        inner = next(one for one in parts if one is not NoneType)
        return _form(inner)._replace(optional=NoneType in parts)
    if origin is Literal:
        choices = tuple(map(str, parts))
        return _Form(f"[{'|'.join(choices)}]", choices)
    if origin is tuple:
        inner = _form(parts[0])
        return inner._replace(several=len(parts) == 2 and parts[1] is Ellipsis)
    return _Form(flag=annotation is bool)

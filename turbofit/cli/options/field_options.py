"""Makes options from the fields that they fill, and completes their values at a TAB."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import click
from pydantic.fields import FieldInfo

from turbofit.cli.command import Option
from turbofit.core.errors import UsageError, option_of
from turbofit.core.struct import Options
from turbofit.core.validation import Metavar, Validated

T = TypeVar("T", bound="Validated")
#: Numbers of cards that a TAB offers for `--on`.
_COUNTS: Final = (1, 2, 4, 8)


class _Text(click.ParamType):  # type: ignore[type-arg] # generic in newer clicks only
    """A text that the field's type checks later.

    At a TAB a shell offers ``choices``, or files if ``path``.
    """

    name = "text"

    def __init__(self, choices: tuple[str, ...], *, path: bool) -> None:
        self.choices, self.path = choices, path

    def shell_complete(
        self, _ctx: click.Context, _param: click.Parameter, incomplete: str
    ) -> list[Any]:
        return candidates_or_files(self.choices, incomplete) if self.choices or self.path else []


class _Syntax(NamedTuple):
    """What a person types for an option, as the annotation of its field says.

    ``metavar`` is the name of the value in help pages. ``flag``: the option has no value.
    ``optional``: the field may be None; a flag then also has a ``--no-`` form. ``several``: the
    field is a tuple of any length. ``repeatable``: each item of the tuple has the option before it.
    """

    metavar: str = "TEXT"
    choices: tuple[str, ...] = ()
    flag: bool = False
    optional: bool = False
    several: bool = False
    repeatable: bool = False


def options_of(
    kind: type[Validated], fields: Iterable[str] = (), *, group: str = "", **attributes: Any
) -> Iterator[Option]:
    """Yield an option for each of ``fields``, by default for all fields of ``kind``.

    The options stand in a ``group`` of the help page.
    """
    for name in fields or kind.model_fields:
        yield _option(name, kind.model_fields[name], group, attributes)


def grouped_options(kind: type[Validated], groups: Mapping[str, Iterable[str]]) -> Iterator[Option]:
    for group, fields in groups.items():
        yield from options_of(kind, fields, group=group)


def filled(kind: type[T], given: Options) -> T:
    """Make an instance of ``kind`` from the given options that are fields of ``kind``.

    Error messages name the options instead of the fields.
    """
    values = {
        name: value
        for name in kind.model_fields
        if (value := given.get(name.rstrip("_"))) is not None and value != ()
    }
    try:
        return kind.of_options(values, option_of)
    except UsageError:  # help texts are read from a file only now: most lines need none
        ctx = click.get_current_context(silent=True)
        explain_fields(kind, (ctx and ctx.info_name) or "serve")
        return kind.of_options(values, option_of)  # raises again, with the help text as hint


def explain_fields(kind: type[Validated], command: str) -> None:
    """Give each field without a description the help text of its option.

    Errors of a field have its description in their hint.
    """
    from turbofit.cli.manual import option_texts

    texts = option_texts(command)
    for name, field in kind.model_fields.items():
        field.description = field.description or texts.get(option_of(name))


def complete_model(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[Any]:
    from turbofit.core.presets import load_yaml, preset_path

    return candidates_or_files(sorted(load_yaml(preset_path("models", "aliases"))), incomplete)


def complete_spec(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[Any]:
    from turbofit.machine.presets import preset_names

    names = [f"{n}x{name}" for name in preset_names() for n in _COUNTS]
    return candidates_or_files(names, incomplete)


def candidates_or_files(candidates: Iterable[str], incomplete: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    items = [CompletionItem(word) for word in candidates if word.startswith(incomplete)]
    return items or [CompletionItem(incomplete, type="file")]


def _option(name: str, field: FieldInfo, group: str, attributes: dict[str, Any]) -> Option:
    """Make the option that fills a field; the field's annotation says what people type for it."""
    syntax = _syntax(field.annotation, field.metadata)
    option, name = option_of(name), name.rstrip("_")
    attributes = {"default": None, "help": field.description, "group": group, **attributes}
    if field.default not in (None, False, ()) and not field.is_required():
        attributes["usual"] = f" (default {_as_typed(field.default)})"
    if syntax.flag:
        if syntax.optional:
            option += f"/--no-{option.removeprefix('--')}"
        return Option(option, name, is_flag=True, **attributes)
    several = syntax.several and not syntax.repeatable
    return Option(
        option, name, type=_Text(syntax.choices, path=syntax.metavar == "FILE"),
        metavar=f"{syntax.metavar}..." if several else syntax.metavar, several=several,
        multiple=syntax.several, **attributes,
    )  # fmt: skip


def _as_typed(default: Any) -> str:
    """Write a default as a person types it: ``1024x768`` for a size, or several sizes."""
    if not isinstance(default, tuple):
        return str(default)
    nested = default and isinstance(default[0], tuple)
    return " ".join(map(_as_typed, default)) if nested else "x".join(map(str, default))


def _syntax(annotation: Any, metadata: Iterable[Any] = ()) -> _Syntax:
    """Read from a field's annotation what a person types for the field's option."""
    for item in metadata:
        if isinstance(item, Metavar):
            return _syntax(annotation)._replace(metavar=item.text, repeatable=item.repeatable)
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _syntax(parts[0], parts[1:])
    if origin in (Union, UnionType):
        inner = next(part for part in parts if part is not NoneType)
        return _syntax(inner)._replace(optional=NoneType in parts)
    if origin is Literal:
        choices = tuple(map(str, parts))
        return _Syntax(f"[{'|'.join(choices)}]", choices)
    if origin is tuple:
        inner = _syntax(parts[0])
        return inner._replace(several=len(parts) == 2 and parts[1] is Ellipsis)
    return _Syntax(flag=annotation is bool)

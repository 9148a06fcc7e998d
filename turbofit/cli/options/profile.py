"""A profile: a YAML file with sections, whose keys are fields of the command line's options."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from turbofit.core.errors import UsageError
from turbofit.core.json_types import Options
from turbofit.core.synonyms import meant, near, synonym
from turbofit.core.validation import Validated

#: The key whose value may be a name alone.
_MODEL: Final = "model"
#: The beginnings of a secret's reference.
_REFERENCES: Final = ("env:", "file:")
_LARGEST: Final = 1 << 20
#: The hint if a file is not a profile.
_HINT: Final = "docs/environment.md#a-profile has its form"


class ProfileSection(NamedTuple):
    """The content below one heading: fields of a class.

    ``secret`` are fields that may only refer to a variable or a file, ``lists`` are fields that
    take several values.
    """

    kind: type[Validated]
    fields: tuple[str, ...]
    secret: frozenset[str] = frozenset()
    lists: frozenset[str] = frozenset()


class Profile(NamedTuple):
    """Its values, by field."""

    path: Path
    values: Options


class _Loader(yaml.SafeLoader):
    """Reads scalars as texts, like on a command line, or as None; a key may stand only once."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return None if node.tag == "tag:yaml.org,2002:null" else node.value
        return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [str(key.value) for key, _ in node.value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            problem = f"{twice} stands twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def read_profile(path: Path, sections: Mapping[str, ProfileSection]) -> Profile:
    """Read a profile, and check its values against the fields of its sections, by heading.

    Raises:
        UsageError: the file cannot be read, or has a key or a value that no section takes.
    """
    try:
        return _read(_loaded(path), path, sections)
    except UsageError as exc:
        raise UsageError(f"{path}: {exc.message}", hint=exc.hint) from None


def _loaded(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1)
        root = yaml.load(text, Loader=_Loader) if len(text) <= _LARGEST else None
    except OSError as exc:
        raise UsageError(f"it cannot be read: {exc.strerror or exc}", hint=_HINT) from None
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        mark = getattr(exc, "problem_mark", None)
        line = "" if mark is None else f"line {mark.line + 1}: "
        problem = getattr(exc, "problem", None) or str(exc).partition("\n")[0]
        raise UsageError(f"{line}no YAML: {problem}", hint=_HINT) from None
    if not isinstance(root, dict):
        raise UsageError("no profile: it has no keys, or is too large", hint=_HINT)
    return root


def _read(root: dict[str, Any], path: Path, sections: Mapping[str, ProfileSection]) -> Profile:
    values: Options = {}
    for heading, below in root.items():
        if heading not in sections:
            raise _unknown(heading, sections, "a profile", sections)
        named = heading == _MODEL and not isinstance(below, dict)
        values |= _section(heading, {_MODEL: below} if named else below, sections)
    return Profile(path, values)


def _section(heading: str, below: Any, sections: Mapping[str, ProfileSection]) -> Options:
    """The values below a heading, checked by their fields; null gives no value."""
    section, given = sections[heading], dict[str, Any]()
    if not isinstance(below, (dict, type(None))):
        raise UsageError(f"{heading} should be keys with values", hint="write key: value")
    for key, value in (below or {}).items():
        name = _field_below(heading, key, sections)
        texts = value if isinstance(value, list) else [value]
        _check_value(f"{heading}.{name}", name, value, texts)
        if value is None:
            continue
        if name in section.secret:
            _check_references(f"{heading}.{name}", name, texts)
        several = isinstance(value, list) or name in section.lists
        given[name] = tuple(texts) if several else value
    needed = {name: "-" for name, field in section.kind.model_fields.items() if field.is_required()}
    options = section.kind.of_options(
        {**needed, **given}, lambda name: name if name == heading else f"{heading}.{name}"
    )
    return {name: value for name, value in options.given().items() if name in given}


def _field_below(heading: str, key: object, sections: Mapping[str, ProfileSection]) -> str:
    """The field of a key below this heading; a `UsageError` that says where the key belongs."""
    name, fields = _field(key), sections[heading].fields
    if name in fields:
        return name
    home = next((other for other, its in sections.items() if name in its.fields), None)
    if home is None:
        raise _unknown(str(key), fields, heading, sections)
    raise UsageError(f"{key} does not belong to {heading}", hint=f"write it below {home}:")


def _check_value(place: str, name: str, value: Any, texts: list[Any]) -> None:
    """Refuse a value that is neither a text nor a list of texts, such as a mapping."""
    if all(isinstance(text, (str, type(None))) for text in texts):
        return
    hint = f"write {name}: VALUE"
    if isinstance(value, dict):
        hint += f""" (a JSON object stands in quotes: {name}: '{{"NAME": VALUE}}')"""
    raise UsageError(f"{place} should be a value, or a list of them", hint=hint)


def _check_references(place: str, name: str, texts: list[Any]) -> None:
    """Refuse a secret that is in the file itself."""
    for text in texts:
        if not str(text).startswith(_REFERENCES) or text in _REFERENCES:
            raise UsageError(
                f"{place} should refer to a key, not hold it",
                hint=f"write {name}: env:NAME or file:PATH",
            )


def _unknown(
    key: str, known: Iterable[str], what: str, sections: Mapping[str, ProfileSection]
) -> UsageError:
    meaning = synonym(str(key))
    field = _field(meaning.to if meaning else key)
    homes = (name for name, section in sections.items() if field in section.fields)
    home = next(homes, "")
    if home and meaning is None:
        return UsageError(f"{key} does not belong to {what}", hint=f"write it below {home}:")
    form = f"{{field}}, below {home}" if home else "{field}"
    every = [*sections, *(name for section in sections.values() for name in section.fields)]
    here = known if near(_field(key), known) or not near(_field(key), every) else every
    hint = meant(_field(key), (name.rstrip("_") for name in here), form)
    return UsageError(f"{key} is nothing that {what} knows", hint=hint)


def _field(key: object) -> str:
    """A key as a field's name: ``max-batch-size`` becomes ``max_batch_size``."""
    name = str(key).replace("-", "_")
    return "async_" if name == "async" else name


def secret_of(reference: str, folder: Path, where: str) -> str:
    """The key to which ``env:NAME`` or ``file:PATH`` refers; paths begin in the profile's folder.

    ``where`` is the place in the profile, for messages.

    Raises:
        UsageError: there is no text, or several lines.
    """
    kind, _, name = reference.partition(":")
    if kind == "env":
        environment = os.environ  # the profile's author names a variable of it
        secret, lacking = environment.get(name, "").strip(), f"the environment has no {name}"
    else:
        file, secret = folder / name, ""
        with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: ~ of an unknown user
            file = folder / Path(name).expanduser()
            secret = file.read_text(encoding="utf-8").strip()
        lacking = f"{file} cannot be read, or holds nothing"
    if not secret or "\n" in secret:
        cause = f"{reference} has several lines" if secret else lacking
        raise UsageError(f"{where}: {cause}", hint="one key should be there")
    return secret

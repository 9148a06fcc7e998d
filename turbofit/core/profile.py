"""A profile: a YAML file of sections, each value held to the field of a model, with its line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import yaml

from turbofit.core.errors import UsageError
from turbofit.core.synonyms import near, synonym
from turbofit.core.validation import Validated

__all__ = ["ModelEntry", "Profile", "ProfileSection", "ProfileValue", "read_profile", "secret_of"]

#: The list of models, and the name of the only one.
_MODELS: Final = "models"
_MODEL: Final = "model"
#: What a secret may refer to.
_REFERENCES: Final = ("env:", "file:")
_LARGEST: Final = 1 << 20


class ProfileSection(NamedTuple):
    """What stands below one heading: fields of a model.

    ``of_model``: each model of a list may have its own. ``secret`` are fields that only refer to
    a variable or to a file, ``lists`` those of which there may be several.
    """

    kind: type[Validated]
    fields: tuple[str, ...]
    of_model: bool = False
    secret: frozenset[str] = frozenset()
    lists: frozenset[str] = frozenset()


class ProfileValue(NamedTuple):
    """One value as a command line would have it, and where it stands."""

    section: str
    name: str
    value: str | tuple[str, ...]
    where: str


class ModelEntry(NamedTuple):
    """One model, and what is promised of it."""

    values: dict[str, ProfileValue]


class Profile(NamedTuple):
    """A file that was read: its models, and what holds for all of them."""

    path: Path
    models: tuple[ModelEntry, ...]
    values: dict[str, ProfileValue]

    def of_model(self, number: int) -> dict[str, ProfileValue]:
        """What holds for one model: the sections of the file, and its own above them."""
        return {**self.values, **self.models[number].values}


def read_profile(path: Path, sections: Mapping[str, ProfileSection]) -> Profile:
    """Read a profile, and hold each value to its field.

    Args:
        path: the file.
        sections: what may stand in it, by heading.

    Raises:
        UsageError: it cannot be read, or something in it is wrong; the message has its line.
    """
    return _Reader(path, sections).read()


class _Reader:
    """One file."""

    def __init__(self, path: Path, sections: Mapping[str, ProfileSection]) -> None:
        self.path, self.sections = path, sections

    def read(self) -> Profile:
        root = self._root()
        values: dict[str, ProfileValue] = {}
        models: list[ModelEntry] = []
        for key, node in self._pairs(root, "the profile"):
            name = str(key.value)
            if name == _MODELS:
                models += [self._model(item) for item in self._items(node)]
            elif name == _MODEL:
                models.append(self._model(node))
            elif name in self.sections:
                self._section(name, node, values)
            else:
                raise self._unknown(key, [_MODEL, _MODELS, *self.sections], "a profile")
        if sum(str(key.value) in (_MODEL, _MODELS) for key, _ in root.value) > 1:
            raise UsageError(
                f"{self.path}: model and models are both given", hint="give one of the two"
            )
        return Profile(self.path, tuple(models), values)

    def _root(self) -> yaml.MappingNode:
        try:
            with self.path.open("rb") as file:
                text = file.read(_LARGEST + 1)
            if len(text) > _LARGEST:
                raise UsageError(f"{self.path} is no profile: it is too large", hint=_HINT)
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except OSError as exc:
            raise UsageError(
                f"{self.path} cannot be read: {exc.strerror or exc}", hint=_HINT
            ) from None
        except (yaml.YAMLError, ValueError, RecursionError) as exc:
            mark = getattr(exc, "problem_mark", None)
            line = "" if mark is None else f":{mark.line + 1}"
            problem = getattr(exc, "problem", None) or str(exc).partition("\n")[0]
            raise UsageError(f"{self.path}{line}: no YAML: {problem}", hint=_HINT) from None
        if not isinstance(root, yaml.MappingNode):
            raise UsageError(f"{self.path} is no profile: it has no keys", hint=_HINT)
        return root

    def _where(self, node: yaml.Node) -> str:
        return f"{self.path}:{node.start_mark.line + 1}"

    def _pairs(self, node: yaml.Node, what: str) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        """The keys of a mapping, each once, with their values."""
        if isinstance(node, yaml.ScalarNode) and not node.value:
            return  # a heading with nothing, or only comments, below it
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(
                f"{self._where(node)}: {what} should be keys with values", hint="write key: value"
            )
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UsageError(f"{self._where(key)}: a key should be a name", hint=_HINT)
            if key.value in seen:
                raise UsageError(
                    f"{self._where(key)}: {key.value} stands twice", hint="leave one of them out"
                )
            seen.add(key.value)
            yield key, value

    def _items(self, node: yaml.Node) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise UsageError(
                f"{self._where(node)}: models should be a list", hint="write - model: NAME below it"
            )
        return list(node.value)

    def _model(self, node: yaml.Node) -> ModelEntry:
        """A name alone, or a mapping with the model's own sections."""
        values: dict[str, ProfileValue] = {}
        if isinstance(node, yaml.ScalarNode):
            self._value(_MODEL, _MODEL, node, values)
            return self._named(node, values)
        of_models = {name: one for name, one in self.sections.items() if one.of_model}
        beside = of_models[_MODEL].fields
        for key, value in self._pairs(node, "a model"):
            name = _field(key.value)
            if name in beside:
                self._value(_MODEL, name, value, values)
            elif key.value in of_models:
                self._section(key.value, value, values)
            else:
                raise self._unknown(key, [*beside, *of_models], "a model")
        return self._named(node, values)

    def _named(self, node: yaml.Node, values: dict[str, ProfileValue]) -> ModelEntry:
        if _MODEL not in values:
            raise UsageError(f"{self._where(node)}: a model has no name", hint="write model: NAME")
        return ModelEntry(values)

    def _section(self, heading: str, node: yaml.Node, into: dict[str, ProfileValue]) -> None:
        section = self.sections[heading]
        for key, value in self._pairs(node, heading):
            name = _field(key.value)
            if name not in section.fields:
                raise self._misplaced(key, heading)
            self._value(heading, name, value, into)

    def _value(
        self, heading: str, name: str, node: yaml.Node, into: dict[str, ProfileValue]
    ) -> None:
        """Hold one value to its field; nothing is given by null."""
        where, spelled = self._where(node), f"{heading}.{name}"
        if heading == name:
            spelled = name
        if node.tag == "tag:yaml.org,2002:null":
            return
        value, section = self._text(node, spelled), self.sections[heading]
        if name in section.lists and isinstance(value, str):
            value = (value,)
        for text in value if name in section.secret else ():
            if not text.startswith(_REFERENCES) or text in _REFERENCES:
                raise UsageError(
                    f"{where}: {spelled} should refer to a key, not hold it",
                    hint=f"write {name}: env:NAME or file:PATH",
                )
        fields = section.kind.model_fields.items()
        needed = {field: "-" for field, one in fields if one.is_required()}
        try:
            section.kind.of_options(
                {**needed, name: value}, lambda field: spelled if field == name else field
            )
        except UsageError as exc:
            raise UsageError(f"{where}: {exc.message}", hint=exc.hint) from None
        into[name] = ProfileValue(heading, name, value, where)

    def _text(self, node: yaml.Node, spelled: str) -> str | tuple[str, ...]:
        if isinstance(node, yaml.ScalarNode):
            return str(node.value)
        plain = isinstance(node, yaml.SequenceNode)
        if plain and all(isinstance(one, yaml.ScalarNode) for one in node.value):
            return tuple(str(one.value) for one in node.value)
        raise UsageError(
            f"{self._where(node)}: {spelled} should be a value, or a list of them",
            hint=f"write {spelled.rpartition('.')[2]}: VALUE",
        )

    def _misplaced(self, key: yaml.ScalarNode, heading: str) -> UsageError:
        """A key that another section has, or none."""
        name = _field(key.value)
        homes = [other for other, one in self.sections.items() if name in one.fields]
        if homes:
            return UsageError(
                f"{self._where(key)}: {key.value} does not belong to {heading}",
                hint=f"write it below {homes[0]}:",
            )
        return self._unknown(key, list(self.sections[heading].fields), heading)

    def _unknown(self, key: yaml.ScalarNode, known: list[str], what: str) -> UsageError:
        wrong = f"{self._where(key)}: {key.value} is nothing that {what} knows"
        if found := synonym(key.value):
            homes = (name for name, one in self.sections.items() if _field(found.to) in one.fields)
            form = f"{{field}}, below {home}" if (home := next(homes, "")) else "{field}"
            return UsageError(wrong, hint=found.here(None, form))
        every = [*self.sections, *(name for one in self.sections.values() for name in one.fields)]
        alike = near(_field(key.value), known) or near(_field(key.value), every)
        hint = (
            f"did you mean {alike[0].rstrip('_')}?"
            if alike
            else f"it knows {', '.join(dict.fromkeys(known))}"
        )
        return UsageError(wrong, hint=hint)


#: What to look at where a file is none.
_HINT: Final = "turbofit init writes one; docs/profile.md has its form"


def _field(key: str) -> str:
    """A key as a field is called: ``max-batch-size`` is ``max_batch_size``."""
    name = key.replace("-", "_")
    return "async_" if name == "async" else name


def secret_of(reference: str, folder: Path, where: str) -> str:
    """The key that a profile refers to.

    Args:
        reference: ``env:NAME`` or ``file:PATH``.
        folder: the profile's; a path is below it.
        where: the place in the profile, for messages.

    Raises:
        UsageError: there is none.
    """
    kind, _, name = reference.partition(":")
    if kind == "env":
        held = os.environ  # of which the profile's author names one
        found, lacking = held.get(name, "").strip(), f"the environment has no {name}"
    else:
        file, found = folder / name, ""
        with suppress(OSError, ValueError, RuntimeError):  # the last: ~ of nobody
            file = folder / Path(name).expanduser()
            found = file.read_text(encoding="utf-8").strip()
        lacking = f"{file} cannot be read, or holds nothing"
    if not found or "\n" in found:
        cause = f"{reference} has several lines" if found else lacking
        raise UsageError(f"{where}: {cause}", hint="one key should be there")
    return found

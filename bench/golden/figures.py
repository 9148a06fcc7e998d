"""Finds the figures of documents that differ between two sides.

A figure is an exit code, a value of a JSON document that is no sentence (a number, a truth, null,
or a string without a space: a setting, a name), or a word with a digit in a sentence or a text,
with its unit or its option. Sentences may be said differently, in another order and more than once.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

#: Kinds of difference; the kinds that need the closest look come first.
_ORDER = CHANGED, GONE, SAID, ADDED = "changed", "gone", "said", "added"
#: An option with its value, a number with its unit, and any other word with a digit.
FIGURE = re.compile(
    r"--[a-z][\w-]*[ =][\w./-]*\d[\w./-]*"
    r"|(?<![\w.,/+@-])\d+(?:[.,]\d+)*(?: ?(?:[KMGT]i?B|%|[mu]?s|tokens?)(?!\w))?(?![\w/+@-])"
    r"|[\w.,/+@-]*\d(?:[\w.,/+@-]*\w)?"
)
_TAGS = re.compile(r"<script.*?</script>|<style.*?</style>|<[^>]*>", re.DOTALL)
#: Stands for a sentence among the values of a JSON document.
_SENTENCE = "…"
#: Characters of a value that are shown.
_WIDTH = 120


class Moved(NamedTuple):
    """A figure that differs between two sides: its place in the document, and both values."""

    kind: str
    place: str
    before: str
    now: str

    def __str__(self) -> str:
        sides = [side[:_WIDTH] for side in (self.before, self.now) if side]
        return f"{self.kind} {self.place}: {' -> '.join(sides)}"

    @property
    def alike(self) -> tuple[str, str]:
        """The kind and the place without indices, equal for the same difference elsewhere."""
        return self.kind, re.sub(r"\[[^]]*\]", "[]", self.place)


class Figures(NamedTuple):
    """The figures of one document.

    ``values`` is its JSON without sentences, or None. ``said`` has the figures in words, in their
    order, each with the sentence in which it stands first, or "" where only figures were kept.
    """

    code: str
    values: Any
    said: Mapping[str, str]


def figures_of(document: str) -> Figures:
    """Return the figures of a document."""
    code, values, _ = _parts(document)
    said: dict[str, str] = {}
    for text in texts_of(document):
        words = " ".join(text.split())
        for figure in FIGURE.findall(words):
            said.setdefault(figure, words)
    return Figures(code, _without_sentences(values), said)


def texts_of(document: str) -> list[str]:
    """Return the sentences of a document's JSON and its text, without the tags of HTML."""
    _, values, text = _parts(document)
    return [_TAGS.sub("\n", one) for one in (*_sentences(values), text)]


def moved(before: Figures, now: Figures) -> list[Moved]:
    """Return how the figures of two documents of one case differ, the gravest first."""
    found = [*_compared(before.code, now.code, "exit code")]
    found += _compared(before.values, now.values, "")
    gone = [figure for figure in before.said if figure not in now.said]
    come = [figure for figure in now.said if figure not in before.said]
    if gone or come:
        sentence = _around(come[0], now.said[come[0]]) if come else ""
        place = f"in “{sentence}”" if sentence.strip("# ") else "in words"
        sides = ["; ".join(side) or "(none)" for side in (gone, come)]
        found.append(Moved(SAID, place, *sides))
    return sorted(found, key=lambda one: _ORDER.index(one.kind))


def summarised(found: Mapping[str, Sequence[Moved]], *, diffs: int, lines: int) -> Iterator[str]:
    """Yield lines on differences by case, with cases of equal kinds together, then all kinds.

    Of cases that only have new keys, one of each kind is shown.
    """
    together: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, figures in found.items():
        together.setdefault(tuple(dict.fromkeys(one.alike for one in figures)), []).append(name)
    ordered = sorted(together.items(), key=lambda item: _only_added(item[0]))
    for kinds, names in ordered[:diffs]:
        listed = names[: 1 if _only_added(kinds) else lines]
        for name in listed:
            yield f"\n{name}"
            yield from (f"  {one}" for one in found[name][:lines])
            if len(found[name]) > lines:
                yield f"  … {len(found[name]) - lines} more figures"
        if len(names) > len(listed):
            yield f"({len(names) - len(listed):,} more documents of this kind)"
    if len(ordered) > diffs:
        yield f"\n… and {len(ordered) - diffs} other kinds of documents"
    counts = Counter(kind for kinds, names in together.items() for kind in kinds for _ in names)
    yield ""
    for kind, count in sorted(counts.items(), key=lambda item: _ORDER.index(item[0][0])):
        yield f"{count:,} documents: {' '.join(kind)}"


def _only_added(kinds: Iterable[tuple[str, str]]) -> bool:
    return all(kind == ADDED for kind, _ in kinds)


def _parts(document: str) -> tuple[str, Any, str]:
    """Split a document: exit code, JSON or None, and text (stderr, and stdout that is no JSON)."""
    head, _, rest = document.partition("--- stdout\n")
    out, _, err = rest.rpartition("--- stderr\n")
    code = head.rpartition("exit code: ")[2].strip()
    try:
        return code, json.loads(out), err
    except ValueError:
        return code, None, f"{out}\n{err}"


def _compared(old: Any, new: Any, place: str) -> Iterator[Moved]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            here = f"{place}.{key}" if place else key
            if key not in new:
                yield Moved(GONE, here, _value(old[key]), "")
            elif key not in old:
                yield Moved(ADDED, here, "", _value(new[key]))
            else:
                yield from _compared(old[key], new[key], here)
    elif isinstance(old, list) and isinstance(new, list):
        yield from _lists(old, new, place)
    elif old != new:
        yield Moved(CHANGED, place, _value(old), _value(new))


def _lists(old: list[Any], new: list[Any], place: str) -> Iterator[Moved]:
    """Compare lists by their elements' names, else by values, else by places."""
    name = _name([*old, *new], old, new)
    if name is not None:
        sides = [{f"[{one[name]}]": one for one in side} for side in (old, new)]
    elif any(isinstance(one, (dict, list)) for one in (*old, *new)):
        sides = [{f"[{at}]": one for at, one in enumerate(side)} for side in (old, new)]
    else:
        figures = [[_value(one) for one in side if one != _SENTENCE] for side in (old, new)]
        if figures[0] != figures[1]:
            gone, come = (Counter(figures[at]) - Counter(figures[1 - at]) for at in (0, 1))
            words = [" ".join(side.elements()) or "(none)" for side in (gone, come)]
            yield Moved(CHANGED, place, *(words if gone or come else map(" ".join, figures)))
        return
    for moved in _compared(*sides, ""):
        yield moved._replace(place=place + moved.place)


def _name(every: list[Any], *sides: list[Any]) -> str | None:
    """Return the first field whose values name the elements of each side, or None."""
    if not every or not all(isinstance(one, dict) for one in every):
        return None
    for key in every[0]:
        values = [[one.get(key) for one in side] for side in sides]
        if all(_names(side, key) for side in values):
            return str(key)
    return None


def _names(values: list[Any], key: str) -> bool:
    kind = int if key == "index" else str
    named = all(isinstance(one, kind) and one != _SENTENCE for one in values)
    return named and len(set(values)) == len(values)


def _around(figure: str, sentence: str) -> str:
    """Return the part of a sentence in which a figure stands, without its figures."""
    place = sentence.find(figure)
    begin = sentence.rfind(" ", 0, max(0, place - _WIDTH // 3)) + 1
    return FIGURE.sub("#", sentence[begin : begin + _WIDTH])


def _sentences(value: Any) -> Iterator[str]:
    """Yield all sentences in the values of a JSON document."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for held in value:
            yield from _sentences(held)
    elif _is_sentence(value):
        yield value


def _without_sentences(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_sentences(held) for key, held in value.items()}
    if isinstance(value, list):
        return [_without_sentences(held) for held in value]
    return _SENTENCE if _is_sentence(value) else value


def _is_sentence(value: Any) -> bool:
    return isinstance(value, str) and (" " in value or "\n" in value or not value)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

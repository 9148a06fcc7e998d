"""Finds the sentences of documents, without their figures, and compares them with those of before.

A sentence of a JSON document is a line of a string with a space. A text's sentences are its lines;
lines that were wrapped to a terminal's width are joined again. Order and layout do not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher

from bench.golden.figures import FIGURE, texts_of

#: Columns that wrapped lines fill, of a terminal of 80.
_COLUMNS = 78
#: Lines that are no continuation of the line before: of lists, of tables, with a word in front.
_BEGINS = re.compile(r"\s*([|•·*`$-]|[a-z]+:|\S+  )")
#: What begins lines, while the same sentence in JSON begins without.
_FRONT = re.compile(r"^([-*•·] |error: |hint: |warning: |note: )+")
#: A drawn bar of a GPU's memory, and what sets words in bold.
_NO_WORDS = re.compile(r"\[\S{40,}\]|\*\*")
_LETTERS = re.compile(r"[a-z]{2}")
#: Characters of a sentence that are shown beside what changed in it.
_WIDTH = 160
#: The least likeness of a sentence and its new wording.
_ALIKE = 0.6


def sentences_of(document: str) -> set[str]:
    """Return the sentences of a document, each figure replaced by ``#``."""
    lines = (line for text in texts_of(document) for line in _unwrapped(text))
    plain = (_FRONT.sub("", " ".join(_NO_WORDS.sub("", line).split())) for line in lines)
    return {FIGURE.sub("#", line) for line in plain if _LETTERS.search(line)}


def where(documents: Mapping[str, str]) -> dict[str, set[str]]:
    """Return each sentence of the documents with the names of the documents that have it."""
    found: dict[str, set[str]] = {}
    for name, document in documents.items():
        for sentence in sentences_of(document):
            found.setdefault(sentence, set()).add(name)
    return found


def reworded(
    before: Mapping[str, int], now: Mapping[str, set[str]], *, whole: bool
) -> Iterator[str]:
    """Yield lines on sentences that differ: one for each change of words, however many have it.

    Of a part of the documents (not ``whole``) only sentences are known that are new.
    """
    new = [sentence for sentence in now if sentence not in before]
    gone = [sentence for sentence in before if sentence not in now]
    older = _older(new, gone)
    changes: dict[str, list[str]] = {}
    for sentence, before_it in older.items():
        changes.setdefault(_change(before_it, sentence), []).append(sentence)
    lines = []
    for change, sentences in changes.items():
        names = set[str]().union(*(now[sentence] for sentence in sentences))
        many = f"{_many(len(sentences), 'sentence')}, {_many(len(names), 'document')}"
        line = f"changed in {many}: {change}, as in “{sentences[0][:_WIDTH]}”"
        lines.append((len(names), line))
    yield from (line for _, line in sorted(lines, reverse=True))
    for sentence in new:
        if sentence not in older:
            yield f"new in {_many(len(now[sentence]), 'document')}: {sentence}"
    if not whole:
        return
    for sentence in gone:
        if sentence not in older.values():
            yield f"gone from {_many(before[sentence], 'document')}: {sentence}"
    for sentence, names in now.items():
        more = len(names) - before.get(sentence, len(names))
        if more:
            side = "more" if more > 0 else "fewer"
            yield f"in {_many(abs(more), 'document')} {side}: {sentence}"


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _change(before: str, now: str) -> str:
    """Return which words of a sentence changed, before and after."""
    old, new = before.split(), now.split()
    steps = SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes()
    changed = [step for step in steps if step[0] != "equal"]
    pairs = ((" ".join(old[a:b]), " ".join(new[c:d])) for _, a, b, c, d in changed)
    return "; ".join(f"{one or '(nothing)'} -> {other or '(nothing)'}" for one, other in pairs)


def _unwrapped(text: str) -> Iterator[str]:
    """Yield a text's lines; lines that were broken at the terminal's width are joined."""
    joined = last = ""
    for line in text.split("\n"):
        first = line.split()[:1]
        is_full = bool(first) and len(last) + 1 + len("".join(first)) > _COLUMNS
        if is_full and last and not _BEGINS.match(line):
            joined = f"{joined} {line.strip()}"
        else:
            yield joined
            joined = line
        last = line
    yield joined


def _older(new: Iterable[str], gone: Iterable[str]) -> dict[str, str]:
    """Return for new sentences what they were before: pairs of the most equal words first."""
    others = [(sentence, sentence.split()) for sentence in gone]
    pairs = []
    for sentence in new:
        matcher = SequenceMatcher(b=sentence.split(), autojunk=False)
        for other, words in others:
            matcher.set_seq1(words)
            if min(matcher.real_quick_ratio(), matcher.quick_ratio()) > _ALIKE:
                pairs.append((matcher.ratio(), sentence, other))
    found: dict[str, str] = {}
    taken = set()
    for ratio, sentence, other in sorted(pairs, reverse=True):
        if ratio > _ALIKE and sentence not in found and other not in taken:
            found[sentence] = other
            taken.add(other)
    return found

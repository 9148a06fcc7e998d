"""Reads and writes the committed parts of all documents: their figures, and each sentence once.

``figures/GROUP.xz`` has a line of JSON for each document of a group: its name, exit code, values
without sentences, and the figures in words. ``sentences.txt`` has a line for each sentence: the
number of documents that have it, and the sentence with ``#`` for figures.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Mapping
from pathlib import Path

from bench.golden.cases import Case
from bench.golden.figures import Figures, figures_of
from bench.golden.words import where

_HERE = Path(__file__).parent
#: Of LZMA: its dictionary of 16 MiB holds the largest group.
_PRESET = 7


def read_figures(groups: Iterable[str], folder: Path = _HERE) -> dict[str, Figures]:
    """Read the figures of the documents of these groups, by the documents' names."""
    found = {}
    for group in groups:
        for line in _lines(folder / "figures" / f"{group}.xz"):
            name, code, values, said = json.loads(line)
            found[name] = Figures(code, values, dict.fromkeys(said, ""))
    return found


def read_sentences(folder: Path = _HERE) -> dict[str, int]:
    """Read the sentences, and how many documents have each."""
    path = folder / "sentences.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    pairs = (line.split(" ", 1) for line in lines)
    return {sentence: int(count) for count, sentence in pairs}


def keep(cases: Iterable[Case], documents: Mapping[str, str], folder: Path = _HERE) -> None:
    """Write the figures and sentences of all documents; the file of a group only if it changed."""
    groups: dict[str, list[str]] = {}
    for case in cases:
        code, values, said = figures_of(documents[case.name])
        line = json.dumps(
            [case.name, code, values, list(said)], ensure_ascii=False, separators=(",", ":")
        )
        groups.setdefault(case.group, []).append(line)
    (folder / "figures").mkdir(exist_ok=True)
    for group, lines in groups.items():
        path = folder / "figures" / f"{group}.xz"
        if _lines(path) != lines:
            path.write_bytes(lzma.compress("\n".join(lines).encode(), preset=_PRESET))
    sentences = sorted(where(documents).items())
    text = "".join(f"{len(names)} {sentence}\n" for sentence, names in sentences)
    (folder / "sentences.txt").write_text(text, encoding="utf-8")


def _lines(path: Path) -> list[str]:
    return lzma.decompress(path.read_bytes()).decode().split("\n") if path.exists() else []

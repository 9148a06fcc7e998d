"""Finds the names of GPU cards in other text: a log, an article, a note about a machine.

A SPEC (`machine.spec`) contains a machine and nothing else. In other text, a name counts as a card
only beside the maker's words, or beside a count; counts in Chinese are read, too.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from turbofit.core.synonyms import plain
from turbofit.core.units import MIB
from turbofit.machine.presets import (
    assumed_note,
    find_preset,
    load_preset,
    nominal_gigabytes,
    presets_with,
)
from turbofit.machine.unlisted import other_card

#: Substrings, one of which is in each card's name; lines without any are skipped quickly.
_WORDS: Final = (
    "RTX", "Tesla", "NVIDIA", "V100", "A100", "H100", "H200", "L4", "T4", "A10",
    "050", "060", "070", "080", "090",
)  # fmt: skip
#: A counter word after a number in Chinese, such as "four pieces" or "two cards".
_CHINESE_COUNT: Final = re.compile("[张块片卡颗路]")
#: The size after a card's name ("A100 80G", "RTX 4090 (24 GB)"), but not that of a machine.
_GB: Final = r"\d{1,3}(?:\.\d+)? ?[Gg](?:i?[Bb])?"
_SIZE: Final = (
    rf"(?P<size>s?,?(?: with| of| GPUs?| cards?)?[ _:/-]{{0,2}}[(\[]? ?(?:{_GB}|\d{{4,6}} ?MiB)\b"
    r"[)\]]?(?! *(?:of |system |host |CPU )?(?:RAM|DDR|free|used|swap|disk|SSD)))?"
)
#: Excludes a number that is a card's index, not a count.
_NO_INDEX: Final = r"(?<![.:|] )(?<!GPU )(?<!evice )(?<!ank )(?<!ode )(?<!CUDA )(?<![.\d])"
_MANY: Final = {"two": 2, "four": 4, "eight": 8}
_TIMES: Final = r"[x×*]"
#: The begin of a name: a word boundary, or the place after a count.
_AT: Final = rf"(?:\b|(?<=\d{_TIMES}))"
#: A bare number names a card only beside a count: 4x3090, 3090 x 4.
_NUMBER: Final = r"\d0[5-9]0(?:\s?Ti)?(?:\s?SUPER)?(?![\w.-])"
_CARD: Final = re.compile(
    rf"(?:\b(?P<count>\d{{1,2}})\s*{_TIMES}\s*|{_NO_INDEX}\b(?P<many>[2-8]|two|four|eight) )?"
    rf"(?:{_AT}(?P<before>\d{{2,3}} ?[Gg][Bb]?)[ -])?"
    rf"(?P<name>{_AT}(?:(?:NVIDIA\s+)?(?:GeForce\s+)?RTX\s?\d{{4}}(?:\s?D\b)?(?:\s?Ti)?(?:\s?SUPER)?"
    r"(?:\sLaptop)?"
    r"|Tesla\s+[A-Z]\d{1,3}(?:-\w+)*|V100(?:-\w+)*(?:[ -]\d\dGB?)?"
    r"|NVIDIA\s+[A-Z]{1,2}\d{1,4}(?:[ -](?:SXM\d?|PCIe|PCIE|\d\dGB|HBM3))*"
    r"|[AH]100(?!\d)(?:-\w+)*|H200|L4\b|L40S|T4\b|A10\b)"
    rf"|(?:(?<={_TIMES})|(?<={_TIMES} )){_NUMBER}|\b{_NUMBER}(?=\s?{_TIMES}\s?\d\b))"
    rf"{_SIZE}(?:\s?{_TIMES}\s?(?P<times>\d)\b)?",
)
_CHIP: Final = re.compile(r"RTX ?\d{4}|[A-Z]{1,2}\d{1,4}|\d{4}")
#: The relative difference of a rounded size, or of one that counts only what CUDA can use.
_ROUNDED: Final = 0.1
#: The relative difference of two figures for one card's memory: the driver's part, and ECC.
_SAME_TOTAL: Final = 0.07


class NamedCards(NamedTuple):
    """Cards of one kind in a text: their number (0: the text does not say it) and the line."""

    number: int
    line: int


class CardWords:
    """Collects the cards of a text, line by line; ``found`` has them under their SPEC name.

    A name with a size, or of a card with only one size, replaces the same chip without a size.
    """

    def __init__(self) -> None:
        self.found: dict[str, NamedCards] = {}
        #: Chips that the text names with a size, and the cards of chips named without one.
        self._sized = set[str]()
        self._unsized: dict[str, str] = {}

    def assumed(self, key: str) -> str | None:
        """The note on an assumed size, if the card has several sizes and the text names none."""
        chip = next((chip for chip, found in self._unsized.items() if found == key), None)
        return assumed_note(chip.lower(), 1) if chip and re.search(r"-\d+g$", key) else None

    def read(self, line: int, text: str) -> None:
        if not any(map(text.__contains__, _WORDS)):
            return
        if not text.isascii() and _CHINESE_COUNT.search(text):
            text = plain(text)
        for match in _CARD.finditer(text):
            self._take(match, line)

    def _take(self, match: re.Match[str], line: int) -> None:
        many = match["many"] or match["count"] or match["times"] or 0
        count = _MANY.get(str(many)) or int(many)
        name = re.sub(r"\s+", " ", match["name"])
        size, key = _card(name, match["size"] or match["before"] or "", count)
        if key is None:
            return
        chip = _CHIP.findall(name)[0]
        if size or re.search(r"\d\dG", name):
            self._sized.add(chip)
            self.found.pop(self._unsized.pop(chip, ""), None)
        elif chip in self._sized:
            return
        else:
            self._unsized[chip] = key
        if key not in self.found or count:
            self.found[key] = NamedCards(count, line)


def _card(name: str, written: str, count: int) -> tuple[int, str | None]:
    """The size that stands beside a card's name, and the card's name in a SPEC.

    If only the card's memory and compute capability are known, its own name is kept; the name is
    None if it names no card. The size is 0 if it is not the card's.
    """
    known = find_preset(name.removesuffix(" Laptop"))
    if known is None:
        return 0, name if other_card(name) else None
    size, nominal = _gigabytes(written), nominal_gigabytes(known)
    sized = f"{name} {size}GB" if size else name
    # A size after a comma may be the machine's; another may be the sum of all cards.
    if find_preset(sized) is None and ("," in written or size == count * nominal):
        size, sized = 0, name
    same = size and abs(size - nominal) <= nominal * _ROUNDED
    return size, find_preset(sized) or (known if same else sized)


def _gigabytes(text: str) -> int:
    """The size of a card in GB, from its text; 0 if there is none."""
    number = re.search(r"[\d.]+", text)
    if number is None:
        return 0
    return round(float(number[0]) / (1024 if "M" in text else 1))


def as_large(name: str, total: int) -> str:
    """The SPEC name of the card of this name with ``total`` bytes; the name itself if it is 0."""
    known = find_preset(name)
    if not total or known is None:
        return name
    chip = known.partition("-")[0]
    same = (key for key in presets_with([chip]) if key.partition("-")[0] == chip)
    for key in (known, *same):
        preset = load_preset(key)
        if abs(preset.total - preset.reserved - total) <= total * _SAME_TOTAL:
            return key
    return f"{known}:total={total // MIB}MiB"

"""Cards that a text names between other words: a log, an article, a note about a machine.

A SPEC (`machine.spec`) is a machine and nothing else. In a text a card counts where its name stands
with its maker's words, or with a count before or behind it; counts in Chinese are read too.
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

#: Substrings of which each card's name has one: most lines are passed over by them.
_WORDS: Final = (
    "RTX", "Tesla", "NVIDIA", "V100", "A100", "H100", "H200", "L4", "T4", "A10",
    "050", "060", "070", "080", "090",
)  # fmt: skip
#: A count in Chinese: four pieces, double card.
_CHINESE_COUNT: Final = re.compile("[张块片卡颗路]")
#: A card's size after its name, and no machine's: "A100 80G", "RTX 4090 (24 GB)".
_GB: Final = r"\d{1,3}(?:\.\d+)? ?[Gg](?:i?[Bb])?"
_SIZE: Final = (
    rf"(?P<size>s?,?(?: with| of| GPUs?| cards?)?[ _:/-]{{0,2}}[(\[]? ?(?:{_GB}|\d{{4,6}} ?MiB)\b"
    r"[)\]]?(?! *(?:of |system |host |CPU )?(?:RAM|DDR|free|used|swap|disk|SSD)))?"
)
#: Before a number that says which card, and not how many.
_NO_INDEX: Final = r"(?<![.:|] )(?<!GPU )(?<!evice )(?<!ank )(?<!ode )(?<!CUDA )(?<![.\d])"
_MANY: Final = {"two": 2, "four": 4, "eight": 8}
_TIMES: Final = r"[x×*]"
#: Where a name begins: at a word's beginning, or behind a count.
_AT: Final = rf"(?:\b|(?<=\d{_TIMES}))"
#: A number alone is a card's beside a count only: 4x3090, 3090 x 4.
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
#: People round what a card has, or name what CUDA can use of it.
_ROUNDED: Final = 0.1
#: Two figures of one card's memory differ by less: what a driver keeps, and ECC.
_SAME_TOTAL: Final = 0.07


class NamedCards(NamedTuple):
    """Cards of one kind that a text names: how many (0: it does not say), and its line."""

    number: int
    line: int


class CardWords:
    """Collects a text's cards, line by line. ``found`` has them by a SPEC's name for each.

    A name with a size, or in a form of one size, goes before the same chip's without.
    """

    def __init__(self) -> None:
        self.found: dict[str, NamedCards] = {}
        #: Chips that the text names with a size, and cards of others: a name leaves its size open.
        self._sized = set[str]()
        self._unsized: dict[str, str] = {}

    def assumed(self, key: str) -> str | None:
        """What was assumed of a card sold in several sizes, where the text names none of them."""
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
    """The size that stands beside a name, if it is the card's, and the card's name in a SPEC.

    A card of which only memory and compute capability are known keeps its words; None: no card's.
    """
    known = find_preset(name.removesuffix(" Laptop"))
    if known is None:
        return 0, name if other_card(name) else None
    size, nominal = _gigabytes(written), nominal_gigabytes(known)
    sized = f"{name} {size}GB" if size else name
    # Behind a comma it may be the machine's; else it may be of all cards together.
    if find_preset(sized) is None and ("," in written or size == count * nominal):
        size, sized = 0, name
    same = size and abs(size - nominal) <= nominal * _ROUNDED
    return size, find_preset(sized) or (known if same else sized)


def _gigabytes(text: str) -> int:
    """The size of a card as it is written, in GB; 0: none is."""
    number = re.search(r"[\d.]+", text)
    if number is None:
        return 0
    return round(float(number[0]) / (1024 if "M" in text else 1))


def as_large(name: str, total: int) -> str:
    """The card of this name that has so many bytes, as a SPEC writes it; 0: it is as named."""
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

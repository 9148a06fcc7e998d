"""Cards that a text names, in English or Chinese, with their number and their size."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.machine.presets import find_preset, nominal_gigabytes

if TYPE_CHECKING:
    from collections.abc import Iterator

_COUNTS: Final = {"一": 1, "单": 1, "two": 2, "两": 2, "二": 2, "双": 2, "三": 3, "four": 4,
                  "四": 4, "eight": 8, "八": 8}  # fmt: skip
#: A card by name, with its count before or behind it, and its size. A bare number needs a count.
_CARD: Final = re.compile(
    r"(?:(?<![A-Za-z0-9_.:])(?<!GPU )(?<!evice )(?<!ank )(?P<count>\d{1,2})"
    r"(?:\s*[x×*]\s*|\s*[张块片卡颗]\s*|(?<=[248]) )"
    rf"|(?P<word>{'|'.join(_COUNTS)})\s?[张块片卡颗]?\s*)?"
    r"(?P<name>(?<![A-Za-z0-9_])"
    r"(?:(?:NVIDIA |GeForce |Tesla )*(?:RTX|GTX|TITAN|Quadro) ?[A-Z]?\d{3,4}"
    r"(?: ?D\b)?(?: ?Ti)?(?: ?SUPER)?(?: Ada)?(?: Laptop)?"
    r"|(?:NVIDIA |Tesla )*[ABHLPTV]\d{1,4}S?(?![A-Za-z0-9])(?:-(?:SXM\d?|PCI[Ee]))?)"
    r"|(?<=[x×*张块片卡颗 ])\d0[5-9]0(?: ?Ti)?(?: ?SUPER)?(?![\w.-]))"
    r"(?:(?:[ -]{0,2}\(?| of )(?P<size>\d{2,3} ?(?:G|GB|GiB)|\d{4,6} ?MiB)\b\)?"
    r"(?! *(?:of |system |host |CPU )?"
    r"(?:RAM|DDR|free|used|swap|disk|SSD|together|in (?:all|total))))?"
    r"(?:\s?[x×*]\s?(?P<times>\d)\b)?"
)
_BRAND: Final = re.compile("NVIDIA|GeForce|Tesla|RTX|GTX|TITAN|Quadro")
MAY_BE_CARD: Final = re.compile(
    r"RTX|GTX|TITAN|Tesla|NVIDIA|(?<![a-z])[ABHLPTV]\d|(?<=[x×*张块片卡颗 ])\d0\d0(?![\w.-])"
).search


class NamedCards(NamedTuple):
    """Cards of one kind: their chip, SPEC name, number (0: not said), and whether with a size."""

    chip: str
    name: str
    number: int
    sized: bool


def cards_in(text: str) -> Iterator[NamedCards]:
    """Yields the cards that a line names, which a SPEC can name too."""
    for match in _CARD.finditer(text):
        name, number = match["name"].removesuffix(" Laptop"), _COUNTS.get(match["word"] or "", 0)
        number = int(match["count"] or match["times"] or number)
        key = find_preset(match["name"]) or (match["name"] if _BRAND.match(name) else None)
        if key is None:
            continue
        chip = key.partition("-")[0]
        said = match["size"] or "0"
        size = round(int(re.sub(r"\D", "", said)) / (1024 if "MiB" in said else 1))
        if size and find_preset(f"{name} {size}GB"):
            key = str(find_preset(f"{name} {size}GB"))
        elif size and find_preset(key) and abs(size - nominal_gigabytes(key)) > size / 10:
            key = f"{name} {size}GB"
        yield NamedCards(chip, key, number, size > 0)

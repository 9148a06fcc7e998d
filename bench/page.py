"""What pages of results share: a table, a row of it, and what ran where and when."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def row(cells: Iterable[object]) -> str:
    """A line of a table; what would break it is kept out."""
    texts = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(texts)} |"


def table(head: str, rows: Iterable[Sequence[object]], *, right: str = "") -> str:
    """A table with these columns, separated by ``|``; those in ``right`` by their numbers.

    Args:
        head: the names of the columns.
        rows: their cells.
        right: digits of the columns, from 0, whose cells stand at the right.
    """
    count = head.count("|") + 1
    rules = ("--:" if str(number) in right else "---" for number in range(count))
    return "\n".join((f"| {head} |", f"|{'|'.join(rules)}|", *map(row, rows)))


def ran_on(*packages: str) -> str:
    """Today, the machine, Python, and the versions of these packages that are installed."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    said = [
        time.strftime("%Y-%m-%d"), f"{os.cpu_count()} cores of {model[1] if model else 'unknown'}",
        f"Python {platform.python_version()}",
    ]  # fmt: skip
    for name in packages:
        with suppress(PackageNotFoundError):
            said.append(f"{name} {version(name)}")
    return ", ".join(said)

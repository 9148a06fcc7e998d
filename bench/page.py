"""Writes the common parts of pages of results: tables, and where and when they were made."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def row(cells: Iterable[object]) -> str:
    """Return a row of a Markdown table, with line breaks and bars in cells made harmless."""
    texts = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(texts)} |"


def table(head: str, rows: Iterable[Sequence[object]], *, right: str = "") -> str:
    """Return a Markdown table.

    Args:
        head: the names of the columns, separated by ``|``.
        rows: their cells.
        right: the numbers (digits from 0) of the columns that are aligned to the right.
    """
    count = head.count("|") + 1
    rules = ("--:" if str(number) in right else "---" for number in range(count))
    return "\n".join((f"| {head} |", f"|{'|'.join(rules)}|", *map(row, rows)))


def command() -> str:
    """Return the command that started this program."""
    spec = sys.modules["__main__"].__spec__
    name = "bench" if spec is None else spec.name.removesuffix(".__main__")
    return shlex.join(["python", "-m", name, *sys.argv[1:]])


def ran_on(*packages: str) -> str:
    """Return the command, today, the machine, Python, and the versions of installed packages."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    said = [
        f"`{command()}`",
        time.strftime("%Y-%m-%d"), f"{os.cpu_count()} cores of {model[1] if model else 'unknown'}",
        f"Python {platform.python_version()}",
    ]  # fmt: skip
    for name in packages:
        with suppress(PackageNotFoundError):
            said.append(f"{name} {version(name)}")
    return ", ".join(said)

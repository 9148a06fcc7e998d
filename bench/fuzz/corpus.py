"""Inputs that are kept: a text file a target, one input a line in base64, comments between them."""

from __future__ import annotations

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["FOLDER", "Kept", "inputs", "name_of", "read", "unpack", "write"]

FOLDER: Final = Path(__file__).with_name("corpus")


class Kept(NamedTuple):
    """One input; ``note`` says what it once broke, and is empty where it only covers code."""

    data: bytes
    note: str = ""


def read(path: Path) -> list[Kept]:
    """The inputs of a file; a comment belongs to the line after it."""
    found, note = [], ""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        if line.startswith("#"):
            note = line[1:].strip()
        else:
            found.append(Kept(b64decode(line, validate=True), note))
            note = ""
    return found


def write(path: Path, kept: Iterable[Kept]) -> None:
    """Those that broke something come first, then the others, each once and in a fixed order."""
    lines: list[str] = []
    for one in sorted(dict.fromkeys(kept), key=lambda one: (not one.note, one.note, one.data)):
        lines += [f"# {one.note}"] if one.note else []
        lines.append(b64encode(one.data).decode())
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def inputs(target: str) -> list[Kept]:
    """What is kept of a target."""
    return read(FOLDER / f"{target}.txt")


def unpack(data: Iterable[bytes], folder: Path) -> None:
    """One file an input, as libFuzzer wants them."""
    folder.mkdir(parents=True, exist_ok=True)
    for one in data:
        path = folder / name_of(one)
        if not path.exists():
            path.write_bytes(one)


def name_of(data: bytes) -> str:
    """An input's file name, which is libFuzzer's."""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()

"""A command on a pseudo-terminal, and what a person would see there."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from tests.support.waiting import HANG

_PIECE: Final = re.compile(r"\x1b\[(\d*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


def screen_of(text: str) -> list[str]:
    """The lines that a terminal shows after this text, without empty ones at its end."""
    lines, row, column = [""], 0, 0
    for match in _PIECE.finditer(text):
        _, letter, back, down, plain = match.groups()
        if back:
            column = 0
        elif down:
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif letter == "K":
            lines[row] = lines[row][:column]
        elif plain:
            old = lines[row].ljust(column)
            lines[row] = old[:column] + plain + old[column + len(plain) :]
            column += len(plain)
        else:
            assert letter == "m", f"this screen knows no {match[0]!r}"
    while lines and not lines[-1].strip():
        lines.pop()
    return [line.rstrip() for line in lines]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


class Screen:
    """A Python program whose output goes to a terminal."""

    def __init__(
        self, code: str, words: Sequence[str], *, environ: Mapping[str, str] | None = None,
        columns: int = 80,
    ) -> None:  # fmt: skip
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        base = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdin=subprocess.PIPE,
            stdout=slave,
            stderr=slave,
            env={**base, "TERM": "xterm", **(environ or {})},
            start_new_session=True,
        )
        os.close(slave)
        self.text = ""

    def until(self, seen: Callable[[str], object]) -> None:
        """Read on until the text so far is as it is waited for."""
        while not seen(self.text):
            assert self._read(), f"the program has ended: {self.text!r}"

    def say(self, line: str) -> None:
        """Write a line to the program's stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def end(self) -> int:
        """Read to the end; the exit code."""
        while self._read():
            pass
        os.close(self._master)
        code = self.process.wait(HANG)
        if self.process.stdin is not None:
            self.process.stdin.close()
        return code

    def _read(self) -> bool:
        ready, _, _ = select.select([self._master], [], [], HANG)
        assert ready, f"nothing more came: {self.text!r}"
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # the other end is closed
            return False
        self.text += data.decode("utf-8", "replace")
        return bool(data)

"""An engine's log: what is a line, what is counted, and how large the files become."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import waiting
from turbofit.serving.engine.log_file import LogFile

WAITS = b"[TM][INFO][1120.08:30:00.%06d][scheduler.cc:1186] out of memory at 0/1\n"


def test_the_size_is_capped(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log", cap=1000)
    for i in range(200):
        log.feed(b"line %04d of different text\n" % i)
        log.kept.settle(waiting.HANG)
    log.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"log", "log.1"}
    assert max(sizes.values()) <= 1000
    assert "line 0199" in (tmp_path / "log").read_text()


def test_repeats_become_a_count_whatever_their_time(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log")
    runs = log.feed(b"first\n" + b"".join(WAITS % i for i in range(500)))
    runs += log.feed(b"".join(WAITS % i for i in range(500)) + b"last\n")
    log.close()
    text = "[TM][INFO][scheduler.cc:1186] out of memory at 0/1"
    assert runs == [("first", 1), (text, 500), (text, 500), ("last", 1)]
    lines = (tmp_path / "log").read_text().splitlines()
    count = "    (the line above came 999 more times)"
    assert lines == ["first", (WAITS % 0).decode().rstrip(), count, "last"]


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ((b"ab", b"c\nd"), [("abc", 1), ("d", 1)]),
        ((b"x" * 70_000,), [("x" * 70_000, 1)]),
        # Of a progress bar the last state counts.
        ((b"Loading:  1%\rLoading: 50%\rdone\n",), [("done", 1)]),
        ((b"windows\r\n",), [("windows", 1)]),
        (
            (b"".join(b"2026-11-20 08:00:0%d,123 - lmdeploy - WARNING - x\n" % i for i in (1, 2)),),
            [(" - lmdeploy - WARNING - x", 2)],
        ),
    ],
)
def test_what_is_a_line(chunks, lines, tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log")
    assert [run for chunk in chunks for run in log.feed(chunk)] + log.close() == lines

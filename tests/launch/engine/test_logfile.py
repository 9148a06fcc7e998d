from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import waiting
from turbofit.core.errors import LaunchError
from turbofit.launch.engine import process
from turbofit.launch.engine.process import _TIME, EngineProcess, LogFile, command_text, repeats

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
    assert (tmp_path / "log").read_text().splitlines() == [
        "first",
        (WAITS % 0).decode().rstrip(),
        "    (the line above came 999 more times)",
        "last",
    ]


def test_the_count_is_read_back(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log")
    log.feed(b"first\n" + b"".join(WAITS % i for i in range(12)))
    log.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert [repeats(line) for line in lines] == [None, None, 11]
    assert repeats(" " + lines[-1].lstrip()) == 11  # as a terminal that strips shows it


def test_python_times_are_taken_out_too(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log")
    line = b"2026-11-20 08:00:0%d,123 - lmdeploy - WARNING - x\n"
    assert log.feed(line % 1 + line % 2) == [(" - lmdeploy - WARNING - x", 2)]


def test_a_flood_costs_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine prints in one second: a pass and a run for each chunk, hardly a write."""
    log = LogFile(tmp_path / "log")
    flood = b"".join(WAITS % i for i in range(36_000))
    passes: list[int] = []
    writes: list[int] = []

    def passed(new: bytes, text: bytes) -> bytes:
        passes.append(len(text))
        return _TIME.sub(new, text)

    keep = log.kept.put

    def put(data: bytes) -> None:
        writes.append(len(data))
        keep(data)

    monkeypatch.setattr(process, "_TIME", SimpleNamespace(sub=passed))
    monkeypatch.setattr(log.kept, "put", put)
    chunks = range(0, len(flood), 1 << 16)
    runs = [log.feed(flood[at : at + (1 << 16)]) for at in chunks]
    log.close()
    assert len(passes) == len(chunks)
    assert all(len(run) == 1 for run in runs)
    assert len(writes) == 2  # the first line, and how often it came
    assert (tmp_path / "log").stat().st_size < 300


def test_lines_cut_by_chunks_and_lines_without_end(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log")
    assert log.feed(b"ab") == []
    assert log.feed(b"c\nd") == [("abc", 1)]
    assert log.close() == [("d", 1)]
    log = LogFile(tmp_path / "long")
    assert log.feed(b"x" * 70_000) == [("x" * 70_000, 1)]


def test_of_a_progress_bar_the_last_state_counts(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log")
    assert log.feed(b"Loading:  1%\rLoading: 50%\rdone\n") == [("done", 1)]
    assert log.feed(b"windows\r\n") == [("windows", 1)]


@given(st.lists(st.binary(max_size=80), max_size=30))
def test_any_bytes_in_any_cuts(chunks: list[bytes]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        log = LogFile(Path(folder) / "log")
        runs = [run for chunk in chunks for run in log.feed(chunk)] + log.close()
    data = b"".join(chunks)
    lines = data.split(b"\n")
    expected = len(lines) - (1 if lines[-1] == b"" else 0)
    assert sum(count for _, count in runs) == expected


def test_a_disk_that_is_full_for_a_while_costs_only_its_lines(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log", cap=1000)
    log.feed(b"first\n")
    log.kept.settle(waiting.HANG)
    real = log.kept._file
    with Path("/dev/full").open("ab", buffering=0) as log.kept._file:
        for number in range(100):
            log.feed(b"lost %d\n" % number)
        log.kept.settle(waiting.HANG)
    log.kept._file = real
    log.feed(b"last\n")
    log.close()
    missing = "    (lines missing here: 100; the disk was full or slow)\n"
    assert (tmp_path / "log").read_text() == f"first\n{missing}last\n"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_what_cannot_be_opened_is_opened_once_it_can(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "log"
    with pytest.raises(FileNotFoundError):
        LogFile(path)
    log = LogFile(path, required=False)
    assert log.kept.error == "No such file or directory"
    assert log.feed(b"lost\n") == [("lost", 1)]
    log.kept.settle(waiting.HANG)
    path.parent.mkdir()
    assert log.feed(b"kept\n") == [("kept", 1)]
    log.close()
    assert path.read_text().endswith(")\nkept\n")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["lmdeploy", "serve", "a model", "--tp", "2"], "lmdeploy serve 'a model' --tp 2"),
        (["x", "--api-keys", "k1", "k2", "--tp", "2"], "x --api-keys ... --tp 2"),
        (["x", "--api-keys=k1", "--api-key", "k2"], "x --api-keys --api-key ..."),
    ],
)
def test_a_command_is_shown_without_keys(words: list[str], text: str) -> None:
    assert command_text(words) == text


def test_no_engine_is_started_whose_log_cannot_be_written(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    with pytest.raises(LaunchError, match="log cannot be written"):
        EngineProcess(["touch", str(begun)], {}, tmp_path / "nothing" / "engine-0.log")
    assert not begun.exists()


def test_a_restart_goes_on_without_its_log_and_says_so(tmp_path: Path) -> None:
    log = tmp_path / "nothing" / "engine-0.log"
    process = EngineProcess(["echo", "hello"], {}, log, log_required=False)
    process.wait(waiting.HANG)
    assert process.poll() == 0
    assert process.finish(waiting.HANG) == [("hello", 1)]
    assert process.log_error == "No such file or directory"
    assert not log.parent.exists()

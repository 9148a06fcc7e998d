"""Lines that a thread writes: nobody waits, and what is missing is counted and said there."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.waiting import HANG, until
from turbofit.core.process import files
from turbofit.core.process.files import lock_soon
from turbofit.core.process.log_queue import CappedLog, LogQueue, dropped_lines, queued_stderr


def notice(missing: int) -> bytes:
    return b"(%d missing)\n" % missing


def test_what_finds_no_room_is_counted_and_said_in_its_place() -> None:
    reads, waits, written, before = threading.Event(), threading.Event(), [], dropped_lines()

    def write(data: bytes) -> None:
        """Waits until somebody reads."""
        waits.set()
        assert reads.wait(HANG)
        written.append(data)

    lines = LogQueue(write, notice, room=30)
    lines.put(b"first\n")
    assert waits.wait(HANG)
    for number in range(10):
        lines.put(b"%d next\n" % number)
    assert dropped_lines() - before >= 7  # threads of other tests may drop lines, too
    assert not lines.settle(0.0)
    reads.set()
    until(lambda: b"missing" in b"".join(written), "the word that lines are missing")
    lines.put(b"last\n")
    assert lines.close()
    kept = b"first\n0 next\n1 next\n2 next\n"
    assert b"".join(written) == kept + b"(7 missing)\nlast\n"


def test_a_full_disk_leaves_no_half_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = CappedLog(tmp_path / "log", 1 << 20, notice)
    log.put(b"first\n")
    assert log.settle(HANG)
    write, full = os.write, [True]

    def half(descriptor: int, data: memoryview) -> int:
        if not full[0]:
            return write(descriptor, data)
        if len(data) < 12:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:4])

    monkeypatch.setattr(os, "write", half)
    log.put(b"second line\n")
    assert log.settle(HANG)
    full[0] = False
    log.put(b"third\n")
    assert log.close()
    assert (tmp_path / "log").read_text() == "first\n(1 missing)\nthird\n"


def test_a_notice_that_is_not_written_loses_no_count() -> None:
    """A disk that is full for several writes: the word of the first loss is lost with the next."""
    written: list[bytes] = []
    full, before = [True], dropped_lines()

    def write(data: bytes) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        written.append(data)

    lines = LogQueue(write, notice)
    for _ in range(3):
        lines.put(b"one\ntwo\n")
        assert lines.settle(HANG)
    assert dropped_lines() - before >= 6  # threads of other tests may drop lines, too
    full[0] = False
    lines.put(b"last\n")
    assert lines.close()
    assert written == [b"(6 missing)\nlast\n"]


@contextmanager
def piped() -> Iterator[int]:
    """Standard error is a pipe, and goes through a queue: the pipe's end to read from."""
    out, into = os.pipe()
    with os.fdopen(into, "w", buffering=1) as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        with queued_stderr():
            yield out
        for _ in range(30_000):  # where nobody has read, nobody waits after the end, either
            sys.stderr.write("x" * 99 + "\n")
        sys.stderr.flush()
        os.close(out)  # whoever waits for a reader does so no longer


EVERYBODY = """
import logging, sys, threading, traceback, warnings
from turbofit.core.process.log_queue import queued_stderr

before = sys.stderr
with queued_stderr():
    queued = sys.stderr
    before.write = None
    print("printed", file=sys.stderr)
    sys.stderr.writelines(["two\\n", "lines\\n"])
    warnings.warn("warned")
    logging.getLogger("uvicorn.error").error("logged")
    thread = threading.Thread(target=lambda: 1 // 0)
    thread.start()
    thread.join()
    traceback.print_exception(ValueError("shown"))
    assert sys.stderr.fileno() == 2 and queued is not before
assert sys.stderr is before
"""


def test_whoever_writes_to_standard_error_goes_through_the_queue() -> None:
    """Neither prints, warnings, logs without a handler nor tracebacks ask the stream itself."""
    ended = subprocess.run(
        [sys.executable, "-c", EVERYBODY], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    for word in ("printed", "two\nlines\n", "warned", "logged", "ZeroDivisionError", "shown"):
        assert word in ended.stderr


def test_nobody_waits_for_a_pipe_that_is_not_read() -> None:
    line, count, text = "x" * 99 + "\n", 30_000, ""
    with piped() as out:
        for _ in range(count):
            sys.stderr.write(line)
        assert (missing := sys.stderr._lines._missing) > count // 2
        while "nobody read" not in text:
            text += os.read(out, 1 << 16).decode()
        sys.stderr.write("on it goes\n")
        while not text.endswith("on it goes\n"):
            text += os.read(out, 1 << 16).decode()
        sys.stderr.write(line * 1000)  # more than a pipe holds
    kept = text.split(line)
    assert len(kept) - 1 == count - missing
    assert kept[-1] == f"warning: lines missing here: {missing:,}; nobody read them\non it goes\n"


def test_a_reader_that_went_away_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    out, into = os.pipe()
    os.close(out)
    before = dropped_lines()
    with os.fdopen(into, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        with queued_stderr():
            sys.stderr.write("x\n")
        assert sys.stderr is stream
    assert dropped_lines() > before


def test_a_stream_without_a_descriptor_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with queued_stderr():
        sys.stderr.write("x\n")
        assert capsys.readouterr().err == "x\n"


def test_a_lock_is_waited_for_until_its_owner_lets_it_go_or_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, other = (os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR) for _ in range(2))
    fcntl.flock(owner, fcntl.LOCK_EX)
    pauses: list[float] = []
    monkeypatch.setattr(files.time, "monotonic", lambda: sum(pauses))
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    with pytest.raises(TimeoutError, match="keeps its lock"):
        lock_soon(other)
    assert sum(pauses) == pytest.approx(2.0, abs=0.1)
    pauses.clear()

    def paused(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            fcntl.flock(owner, fcntl.LOCK_UN)

    monkeypatch.setattr(files.time, "sleep", paused)
    lock_soon(other)
    assert len(pauses) == 3
    with pytest.raises(BlockingIOError):
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(owner)
    os.close(other)


def fresh(code: str) -> str:
    """What a Python that has imported nothing yet prints, and nothing else."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_a_program_that_sets_a_handler_hears_a_plan_and_no_other_is_set() -> None:
    code = (
        "import logging, sys, turbofit\n"
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout, format='%(name)s')\n"
        "turbofit.plan('internvl2-8b', on='1xrtx3090')\n"
        "loggers = [one for name, one in logging.Logger.manager.loggerDict.items()\n"
        "           if name.startswith('turbofit') and isinstance(one, logging.Logger)]\n"
        "print(len(loggers) > 2, [one.handlers for one in loggers if one.handlers])"
    )
    *names, last = fresh(code).splitlines()
    assert {"turbofit.machine.source", "turbofit.tuner.search.search"} <= {*names}
    assert last == "True []"


def test_another_thread_that_imports_logging_is_waited_for() -> None:
    code = (
        "import importlib.machinery as machinery, sys, threading\n"
        "from turbofit.core.process.log import LazyLogger\n"
        "begun, go = threading.Event(), threading.Event()\n"
        "class Slow(machinery.SourceFileLoader):\n"
        "    def exec_module(self, module):\n"
        "        begun.set(), go.wait()\n"
        "        super().exec_module(module)\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'logging':\n"
        "            spec = machinery.PathFinder.find_spec(name)\n"
        "            spec.loader = Slow(name, spec.origin)\n"
        "            return spec\n"
        "sys.meta_path.insert(0, Finder())\n"
        "importing = threading.Thread(target=__import__, args=('logging',))\n"
        "importing.start(), begun.wait()\n"
        "speaking = threading.Thread(target=LazyLogger('x').info, args=('said',))\n"
        "speaking.start(), go.set(), speaking.join()\n"
        "print('ended')"
    )
    assert fresh(code) == "ended"

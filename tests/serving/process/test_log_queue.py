"""Lines that a thread writes: nobody waits, and what is missing is counted and said there."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.waiting import HANG
from turbofit.core.process import files
from turbofit.core.process.files import lock_soon
from turbofit.serving.process.log_queue import FileLog, QueuedLog, queued_stderr

LOST = "(lost)\n"


def test_what_finds_no_room_is_said_in_its_place_once() -> None:
    reads, waits, written = threading.Event(), threading.Event(), []

    def emit(record: logging.LogRecord) -> None:
        """Waits until somebody reads."""
        waits.set()
        assert reads.wait(HANG)
        written.append(record.msg)

    log = QueuedLog(emit, LOST, most=3)
    log.put("first\n")
    assert waits.wait(HANG)
    for number in range(10):
        log.put(f"{number} next\n")
    assert not log.settle(0.0)
    reads.set()
    assert log.settle(HANG)
    log.put("last\n")
    assert log.close()
    assert "".join(written) == "first\n0 next\n1 next\n2 next\n(lost)\nlast\n"


def test_a_disk_that_is_full_costs_lines_and_says_so_once(tmp_path: Path) -> None:
    log = FileLog(tmp_path / "log", 1 << 20, LOST)
    log.put("first\n")
    assert log.settle(HANG)
    real = log._file.stream
    with Path("/dev/full").open("ab", buffering=0) as log._file.stream:
        for number in range(3):  # the word of the first loss is lost with the next
            log.put(f"{number}\n")
            assert log.settle(HANG)
    log._file.stream = real
    log.put("last \udcff\n")
    assert log.close()
    assert (tmp_path / "log").read_bytes() == b"first\n(lost)\nlast \xff\n"


EVERYBODY = """
import logging, sys, threading, traceback, warnings
from turbofit.serving.process.log_queue import queued_stderr

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


def test_a_reader_that_went_away_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    out, into = os.pipe()
    os.close(out)
    with os.fdopen(into, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        with queued_stderr():
            sys.stderr.write("x\n")
        assert sys.stderr is stream


def test_a_stream_without_a_descriptor_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with queued_stderr():
        sys.stderr.write("x\n")
        assert capsys.readouterr().err == "x\n"


def test_a_lock_that_its_owner_keeps_is_given_up(
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
    assert {"turbofit.machine.source", "turbofit.planning.search.search"} <= {*names}
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

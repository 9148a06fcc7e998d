from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import REPO
from turbofit.core.run_report import RunReport
from turbofit.core.struct import decode
from turbofit.launch.serve import runs as module
from turbofit.launch.serve.runs import Record, RunRecord


def test_it_is_whole_after_every_change(tmp_path: Path) -> None:
    record = Record(tmp_path, model="m", pretend=True)
    path = tmp_path / "run.json"
    assert json.loads(path.read_text())["state"] == "starting"
    record.begin(number=0)
    record.attempt(memory_back=True)
    record.event("grown", "somebody")
    record.state("ended", ended="SIGTERM")
    document = json.loads(path.read_text())
    assert document["attempts"][0]["memory_back"] is True
    assert document["events"][0]["kind"] == "grown"
    assert (document["state"], document["ended"], document["pretend"]) == ("ended", "SIGTERM", True)
    assert path.stat().st_mode & 0o077 == 0
    assert decode(path.read_bytes(), RunRecord, what="run") == record.run
    report = decode(path.read_bytes(), RunReport, what="run")
    assert report.last is not None
    assert report.last.memory_back is True


def test_a_field_that_no_reader_knows_is_not_written(tmp_path: Path) -> None:
    record = Record(tmp_path, model="m")
    record.attempt(memory_back=True)  # before the first start there is nothing to say it of
    record.begin()
    with pytest.raises(TypeError):
        record.attempt(memory=True)
    for number in range(1100):
        record.event("n", str(number))
    assert [one.text for one in record.run.events] == [str(n) for n in range(100, 1100)]


def test_a_disk_that_refuses_costs_the_record_only(tmp_path: Path) -> None:
    record = Record(tmp_path / "gone", model="m")
    record.begin()
    record.state("ready")
    assert not (tmp_path / "gone").exists()
    assert record.unwritten
    (tmp_path / "gone").mkdir()
    record.keep()
    assert not record.unwritten
    kept = (tmp_path / "gone" / "run.json").read_bytes()
    assert decode(kept, RunRecord, what="run") == record.run


def test_what_two_threads_write_is_all_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(tmp_path, model="m")
    real, writing, goes_on = module.write_atomic, threading.Event(), threading.Event()

    def slow(path: Path, data: bytes, **options: Any) -> None:
        if threading.current_thread() is watching:
            writing.set()
            goes_on.wait(30)
        real(path, data, **options)

    watching = threading.Thread(target=lambda: record.event("grown", "somebody takes memory"))
    ending = threading.Thread(target=lambda: record.state("ended", ended="SIGTERM"))
    monkeypatch.setattr(module, "write_atomic", slow)
    watching.start()
    writing.wait(30)
    ending.start()
    goes_on.set()
    for thread in (watching, ending):
        thread.join(30)
    kept = decode((tmp_path / "run.json").read_bytes(), RunRecord, what="run")
    assert kept == record.run
    assert (kept.state, len(kept.events)) == ("ended", 1)


def test_a_kill_at_any_write_leaves_a_whole_document(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom turbofit.launch.serve.runs import Record\n"
        "record = Record(Path(sys.argv[1]), model='m')\nprint('x', flush=True)\n"
        "for number in range(10**9):\n    record.event('n', 'x' * (number % 5000))\n"
        "    print('x', flush=True)\n"
    )
    rng = random.Random(5)
    for _ in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], cwd=REPO, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        for _ in range(rng.randrange(1, 60)):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert json.loads((tmp_path / "run.json").read_text())["schema"] == "turbofit.run/1"

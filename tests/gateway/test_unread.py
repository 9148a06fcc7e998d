"""``turbofit gateway`` whose logs nobody reads: clients are answered, and it ends, all the same."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("uvicorn")

from tests.support.gateway import CHAT, chat, plan_for
from tests.support.open_clients import EndlessEngine
from tests.support.processes import REPO, free_port
from tests.support.waiting import HANG

pytestmark = pytest.mark.slow

#: Their lines are more than a pipe and the queue of a log hold, of which a test makes small ones.
CLIENTS, EACH = 4, 120
PROGRAM = """
from turbofit.cli.main import entry
from turbofit.core.process.log_queue import CappedLog, LogQueue

for log in (CappedLog, LogQueue):
    log.__init__.__defaults__ = (None, 1 << 16)
entry()
"""
BODY = json.dumps(chat(max_tokens=1)).encode()


@contextmanager
def unread(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, whose standard error is a pipe that nobody reads, and its address."""
    with EndlessEngine() as engine:
        (folder / "plan.json").write_text(plan_for().to_json())
        url = f"http://127.0.0.1:{(port := free_port())}"
        process = subprocess.Popen(
            [
                sys.executable, "-c", PROGRAM, "gateway", "--plan", str(folder / "plan.json"),
                "--upstream", engine.url, "--port", str(port), *words,
            ],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(REPO), "XDG_STATE_HOME": str(folder)},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == url
            yield process, url
        finally:
            process.kill()
            process.communicate()


def answered(url: str, requests: int = EACH) -> int:
    """How many requests are answered, over one connection."""
    connection = http.client.HTTPConnection(url.rpartition("//")[2], timeout=HANG)
    count = 0
    for _ in range(requests):
        connection.request("POST", CHAT, BODY, {"content-type": "application/json"})
        response = connection.getresponse()
        response.read()
        count += response.status == 200
    connection.close()
    return count


def ask_all(url: str) -> None:
    with ThreadPoolExecutor() as pool:
        assert sum(pool.map(answered, [url] * CLIENTS)) == CLIENTS * EACH
    assert urlopen(f"{url}/health", timeout=HANG).status == 200


def dropped(url: str) -> int:
    page = urlopen(f"{url}/metrics", timeout=HANG).read().decode()
    assert page.count("# TYPE turbofit_log_lines_dropped_total counter\n") == 1
    return int(page.rpartition("\nturbofit_log_lines_dropped_total ")[2])


def test_nobody_reads_its_standard_error(tmp_path: Path) -> None:
    """What was dropped is counted, and said in its place once somebody reads."""
    with unread(tmp_path) as (process, url):
        ask_all(url)
        missing = dropped(url)
        assert missing > 0
        lines = []
        assert process.stderr is not None
        while "lines missing here" not in (line := process.stderr.readline()):
            lines.append(line)
        told = int(line.partition(": ")[2].partition(": ")[2].partition(";")[0].replace(",", ""))
        assert line == f"warning: lines missing here: {told:,}; nobody read them\n"
        assert told >= missing
        records = [json.loads(line) for line in lines if line.startswith("{")]
        assert len(records) + told == CLIENTS * EACH + 1  # and the page of the metrics
        assert answered(url, 1) == 1
        while '"status": 200' not in process.stderr.readline():
            pass


def test_it_says_all_that_it_does_and_ends_though_nobody_reads(tmp_path: Path) -> None:
    with unread(tmp_path, "-vv") as (process, url):
        ask_all(url)
        assert dropped(url) > 0
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG) == 0


@pytest.mark.parametrize(
    "option", ["--access-log", pytest.param("--record-trace", marks=pytest.mark.exhaustive)]
)
def test_a_disk_that_takes_nothing_costs_its_lines_only(option: str, tmp_path: Path) -> None:
    """A pipe in the place of the file waits as a disk does that hangs."""
    path = tmp_path / "log"
    os.mkfifo(path)
    held = os.open(path, os.O_RDWR)
    other = ("--access-log", "none") if option == "--record-trace" else ()
    with unread(tmp_path, option, str(path), *other) as (process, url):
        ask_all(url)
        assert other or dropped(url) > 0  # a trace's lines are short: all of them find room
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG) == 0
    os.close(held)


def test_a_full_disk_costs_the_lines_only(tmp_path: Path) -> None:
    with unread(tmp_path, "--access-log", "/dev/full") as (_, url):
        assert answered(url, 3) == 3
        while dropped(url) < 3:
            pass

"""``turbofit gateway`` seen from outside: its end, and logs that nobody reads."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.support.gateway import CHAT, chat, image_part, plan_for
from tests.support.open_clients import EndlessEngine, OpenClient, refuses
from tests.support.processes import REPO, Child, free_port
from tests.support.waiting import HANG, until

pytestmark = pytest.mark.slow

SIZED = image_part(448, 5376)  # 13 tiles: one at a time
STREAMS = {
    CHAT: chat(stream=True),
    "/v1/completions": {"model": "m", "prompt": "x", "stream": True},
    "/v1/responses": {"model": "m", "input": "x", "stream": True},
    "/v1/messages": {
        "model": "m", "max_tokens": 9, "stream": True,
        "messages": [{"role": "user", "content": "x"}],
    },
    "/generate": {"prompt": "x", "stream": True},
}  # fmt: skip


@pytest.fixture
def engine() -> Iterator[EndlessEngine]:
    with EndlessEngine() as endless:
        yield endless


@pytest.fixture
def served(engine: EndlessEngine, tmp_path: Path) -> Iterator[tuple[Child, str]]:
    """``turbofit gateway`` before it, which would drain for longer than any test lasts."""
    (tmp_path / "plan.json").write_text(plan_for(units_per_forward=13).to_json())
    port = free_port()
    child = Child(
        [
            sys.executable, "-m", "turbofit", "gateway", "--plan", str(tmp_path / "plan.json"),
            "--upstream", engine.url, "--port", str(port), "--overlay",
        ],
        standin=False, XDG_STATE_HOME=str(tmp_path),
    )  # fmt: skip
    assert child.process.stdout is not None
    assert child.process.stdout.readline().strip() == f"http://127.0.0.1:{port}"
    yield child, f"http://127.0.0.1:{port}"
    child.kill()


def ended(served: tuple[Child, str], *numbers: signal.Signals) -> list[str]:
    """Send signals, the second while it drains, and wait for the end; what it said."""
    child, url = served
    for number in numbers:
        child.process.send_signal(number)
        until(lambda: refuses(url), "the drain")
    assert child.finish() == 0, child.stderr
    assert not re.search("Traceback|Error", child.stderr)
    return child.lines


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGTERM, signal.SIGINT),
        pytest.param((signal.SIGINT, signal.SIGINT), marks=pytest.mark.exhaustive),
    ],
)
def test_whoever_is_cut_off_is_told_in_the_form_of_its_api(
    numbers: tuple[signal.Signals, ...], served: tuple[Child, str], engine: EndlessEngine
) -> None:
    _, url = served
    streams = {path: OpenClient(url, path, body) for path, body in STREAMS.items()}
    for client in streams.values():
        client.wait_for(b"data: {}\n\n")
    answers = {path: {**body, "stream": False} for path, body in STREAMS.items()}
    whole = {path: OpenClient(url, path, body) for path, body in answers.items()}
    image = OpenClient(url, CHAT, chat(SIZED))
    for _ in (*streams, *whole, image):
        engine.began.acquire()
    queued = OpenClient(url, CHAT, chat(SIZED))
    half = [OpenClient(url, path, body, sent=0.5) for path, body in STREAMS.items()]
    drips = OpenClient(url, CHAT, chat(SIZED), sent=0.5, drips=True)
    deaf = OpenClient(url, CHAT, chat(stream=True, seed=1), reads=False)
    engine.began.acquire()
    OpenClient(url, "/v1/nowhere", {}).wait_for(b"404")
    host, _, port = url.rpartition("//")[2].partition(":")
    with socket.create_connection((host, int(port))) as headers:
        headers.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n")
        lines = ended(served, *numbers)
    for path, client in streams.items():
        status, _, body = client.answer()
        event = json.loads(body.removesuffix(b"data: [DONE]\n\n").rpartition(b"data: ")[2])
        assert status == 200
        if path in ("/v1/messages", "/v1/responses"):
            assert b"event: error\n" in body
            assert event["type"] == "error"
            assert event.get("code") == "ending" or event["error"]["type"] == "overloaded_error"
        else:
            assert event["error"]["code"] == "ending"
            assert body.endswith(b"data: [DONE]\n\n")
    for client in (*whole.values(), image, queued, *half, drips):
        status, sent, body = client.answer()
        assert (status, sent["retry-after"]) == (503, "10")
        assert b"the server is stopping" in body
    assert json.loads(whole["/v1/messages"].answer()[2])["error"]["type"] == "overloaded_error"
    assert lines[-1] == "ended: 19 open requests were cut off"
    records = [json.loads(line) for line in lines if line.startswith("{")]
    cut_off = [record["status"] for record in records if record["refused"] == "ending"]
    assert sorted(cut_off) == [200] * 6 + [503] * 13
    deaf.close()


def test_what_ends_while_it_drains_is_answered(served: tuple[Child, str]) -> None:
    body = chat(max_tokens=1, user="x" * 2000)
    upload = OpenClient(served[1], CHAT, body, sent=0.5, drips=True)
    lines = ended(served, signal.SIGTERM)
    assert (upload.answer()[0], lines[-1]) == (200, "ended: 0 open requests were cut off")


#: Their lines are more than a pipe and the queue of a log hold, of which a test makes small ones.
CLIENTS, EACH = 4, 120
PROGRAM = """
from turbofit.cli.main import entry
from turbofit.serving.process.log_queue import FileLog, QueuedLog

for log in (FileLog, QueuedLog):
    log.__init__.__defaults__ = (100,)
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


def answered(url: str) -> int:
    """How many requests are answered, over one connection."""
    count = 0
    with closing(http.client.HTTPConnection(url.rpartition("//")[2], timeout=HANG)) as client:
        for _ in range(EACH):
            client.request("POST", CHAT, BODY, {"content-type": "application/json"})
            response = client.getresponse()
            response.read()
            count += response.status == 200
    return count


def ask_all(url: str) -> None:
    with ThreadPoolExecutor() as pool:
        assert sum(pool.map(answered, [url] * CLIENTS)) == CLIENTS * EACH
    assert urlopen(f"{url}/health", timeout=HANG).status == 200


@pytest.mark.parametrize(
    "words",
    [
        ["-vv"],
        ["--access-log", "FIFO"],
        pytest.param(["--access-log", "/dev/full"], marks=pytest.mark.exhaustive),
    ],
)
def test_it_serves_and_ends_though_nobody_reads_what_it_writes(
    words: list[str], tmp_path: Path
) -> None:
    """A pipe in the place of a file waits as a disk does that hangs; a full one costs the lines."""
    os.mkfifo(tmp_path / "FIFO")
    reader = os.open(tmp_path / "FIFO", os.O_RDWR)
    words = [str(tmp_path / word) if word == "FIFO" else word for word in words]
    with unread(tmp_path, *words) as (process, url):
        ask_all(url)
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG) == 0
    os.close(reader)

"""How `serve` and `tune` end with requests under way: LMDeploy's real servers, from outside."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.gateway.open_clients import OpenClient, refuses
from tests.support.processes import REPO, Child, free_port
from tests.support.serving import Served, serve_pretend, start_turbofit
from tests.waiting import HANG, until

pytestmark = [pytest.mark.lmdeploy, pytest.mark.slow]
for needed in ("lmdeploy", "fastapi", "torchvision"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"no {needed}", allow_module_level=True)

ON = ("--on", "1xrtx3060", "--context", "8192")
LONG = 8000
MESSAGES = [{"role": "user", "content": "x"}]


def streams(served: Served, model: str) -> dict[str, OpenClient]:
    """A stream of each API, which would go on for minutes."""
    url = f"http://127.0.0.1:{served.port}"
    fields = {"model": model, "stream": True}
    bodies = {
        "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": LONG, "ignore_eos": True},
        "/v1/messages": {"messages": MESSAGES, "max_tokens": LONG},
        "/v1/responses": {"input": "x", "max_output_tokens": LONG},
    }
    opened = {path: OpenClient(url, path, {**fields, **body}) for path, body in bodies.items()}
    for client in opened.values():
        client.wait_for(b"delta")
    return opened


def told(path: str, client: OpenClient) -> bool:
    """Whether a stream ended with its API's own word for that."""
    status, _, body = client.answer()
    assert status == 200
    if path == "/v1/chat/completions":
        return b'"code":"ending"' in body and body.endswith(b"\n\ndata: [DONE]\n\n")
    return b"event: error\n" in body.rpartition(b"the server is ending")[0][-200:]


def clean(served: Served) -> None:
    """No traceback anywhere."""
    logs = list((served.state / "turbofit" / "runs").glob("*/*.log*"))
    assert logs
    for text in (served.child.stderr, *(log.read_text(errors="replace") for log in logs)):
        assert "Traceback" not in text, text
        assert "Exception" not in text, text


def test_the_drain_ends_with_a_word_to_everybody(
    children: list[Child], tmp_path: Path, internvl2: Path
) -> None:
    served = serve_pretend(children, tmp_path, str(internvl2), *ON, "--drain", "1")
    served.wait()
    opened = streams(served, internvl2.name)
    url = f"http://127.0.0.1:{served.port}"
    body = {"model": internvl2.name, "messages": MESSAGES, "max_tokens": LONG, "ignore_eos": True}
    whole = OpenClient(url, "/v1/chat/completions", body)
    half = OpenClient(url, "/v1/chat/completions", body, sent=0.5)
    for _ in range(2):  # connections are taken in turn: both are the gateway's by then
        with urlopen(f"{url}/health") as answer:
            answer.read()
    served.child.process.send_signal(signal.SIGTERM)
    assert served.child.finish() == 0
    assert all(told(path, client) for path, client in opened.items())
    assert whole.answer()[0] in (200, 503)
    assert half.answer()[0] == 503
    cut = int(served.child.lines[-1].removeprefix("ended: ").partition(" ")[0])
    assert 4 <= cut <= 5
    clean(served)
    records = [json.loads(line) for line in (served.run / "access.log").read_text().splitlines()]
    assert sum(record["refused"] == "ending" for record in records) == cut


@pytest.mark.exhaustive
def test_a_second_signal_ends_several_models_at_once(
    children: list[Child], tmp_path: Path, internvl2: Path, qwen2_vl: Path
) -> None:
    """Nothing is started again meanwhile."""
    served = serve_pretend(
        children, tmp_path, str(internvl2), str(qwen2_vl), *ON, "--drain", f"{HANG:.0f}"
    )
    served.wait()
    models = (internvl2.name, qwen2_vl.name)
    opened = [pair for model in models for pair in streams(served, model).items()]
    served.child.process.send_signal(signal.SIGINT)
    url = f"http://127.0.0.1:{served.port}"
    until(lambda: refuses(url), "the drain")
    served.child.process.send_signal(signal.SIGINT)
    assert served.child.finish() == 130
    assert all(told(path, client) for path, client in opened)
    assert served.child.lines[-1] == "ended: 6 open requests were cut off"
    assert "starting again" not in served.child.stderr
    clean(served)


def test_it_serves_and_ends_though_nobody_reads_what_it_says(
    tmp_path: Path, internvl2: Path
) -> None:
    """Its pipe is full before its first line."""
    out, into = os.pipe()
    os.set_blocking(into, False)
    for size in (4096, 1):
        with suppress(BlockingIOError):
            while True:
                os.write(into, b"x" * size)
    os.set_blocking(into, True)
    state = {"XDG_STATE_HOME": str(tmp_path), "TURBOFIT_LEASES": str(tmp_path / "leases")}
    process = subprocess.Popen(
        [
            sys.executable, "-m", "turbofit", "serve", str(internvl2), *ON, "--pretend", "-vv",
            "--port", str(port := free_port()),
        ],
        stdout=subprocess.PIPE, stderr=into, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPO), **state},
    )  # fmt: skip
    os.close(into)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == f"http://127.0.0.1:{port}"
        body = {"model": internvl2.name, "messages": MESSAGES, "max_tokens": LONG, "stream": True}
        client = OpenClient(f"http://127.0.0.1:{port}", "/v1/chat/completions", body)
        client.wait_for(b"delta")
        client.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG) == 130
    finally:
        process.kill()
        process.communicate()
        os.close(out)


@pytest.mark.exhaustive
def test_tune_ends_its_own_load_without_a_traceback(
    children: list[Child], tmp_path: Path, internvl2: Path
) -> None:
    child = start_turbofit(
        children, tmp_path, "tune", str(internvl2), *ON, "--pretend", "--requests", "100000",
        "--output-tokens", "2000", "--prompt-tokens", "16", "--starts", "1", "--images", "0",
    )  # fmt: skip
    child.wait_for("phase: ready")
    (log,) = (tmp_path / "turbofit" / "runs").glob("*/engine-0.log")
    checks = log.read_text().count(" resume ")
    until(lambda: log.read_text().count(" resume ") > checks + 8, "the load")
    child.process.send_signal(signal.SIGTERM)
    assert child.finish() == 0
    assert "goes on from there" in child.lines[-1]
    assert "Traceback" not in child.stderr
    assert "Traceback" not in log.read_text()

"""``turbofit serve --pretend`` end to end: LMDeploy's real server and engine, real deaths."""
from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE
from __future__ import annotations
from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE
import http.client
from turbofit.rehearse.no_answer import SENTENCE
import json
from turbofit.rehearse.no_answer import SENTENCE
import os
from turbofit.rehearse.no_answer import SENTENCE
import signal
from turbofit.rehearse.no_answer import SENTENCE
import subprocess
from turbofit.rehearse.no_answer import SENTENCE
import sys
from turbofit.rehearse.no_answer import SENTENCE
from collections.abc import Iterator
from turbofit.rehearse.no_answer import SENTENCE
from contextlib import suppress
from turbofit.rehearse.no_answer import SENTENCE
from pathlib import Path
from turbofit.rehearse.no_answer import SENTENCE
from urllib.request import urlopen
from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE
import pytest
from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE
from tests.support.open_clients import OpenClient
from turbofit.rehearse.no_answer import SENTENCE
from tests.support.processes import HANG, REPO, Child, free_port, gone, pids
from turbofit.rehearse.no_answer import SENTENCE
from tests.support.serving import LONG, MESSAGES, Served, image, needs, serve_pretend, told
from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE
pytestmark = [pytest.mark.lmdeploy]
from turbofit.rehearse.no_answer import SENTENCE
needs("lmdeploy", "fastapi", "torchvision")
from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE
EIGHT = ("internvl2-8b", "--on", "1xrtx3090")
from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE
def test_internvl2_as_two_replicas(children: list[Child], tmp_path: Path) -> None:
from turbofit.rehearse.no_answer import SENTENCE
    """Said everywhere, brought to its planned peak before it opens, and not past it by a client.
from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE
    One is killed: the other answers while it starts again. The drain ends with a word to all.
from turbofit.rehearse.no_answer import SENTENCE
    """
from turbofit.rehearse.no_answer import SENTENCE
    words = ("internvl2-8b", "--on", "2xrtx3090", "--replicas", "2", "--drain", "1")
from turbofit.rehearse.no_answer import SENTENCE
    served = serve_pretend(children, tmp_path, *words)
from turbofit.rehearse.no_answer import SENTENCE
    served.wait()
from turbofit.rehearse.no_answer import SENTENCE
    served.child.wait_for("phase: ready", 2)
from turbofit.rehearse.no_answer import SENTENCE
    served.child.wait_for("images: prepared on ", 2)
from turbofit.rehearse.no_answer import SENTENCE
    assert "PRETEND GPUs" in served.child.lines[0]
from turbofit.rehearse.no_answer import SENTENCE
    status, headers, health = served.ask("/health")
from turbofit.rehearse.no_answer import SENTENCE
    assert (status, headers["x-turbofit-pretend"], health["pretend"]) == (200, "1", True)
from turbofit.rehearse.no_answer import SENTENCE
    record = served.record
from turbofit.rehearse.no_answer import SENTENCE
    assert record["pretend"] is True
from turbofit.rehearse.no_answer import SENTENCE
    assert record["state"] == "ready"
from turbofit.rehearse.no_answer import SENTENCE
    engines = record["attempts"][0]["engines"]
from turbofit.rehearse.no_answer import SENTENCE
    assert len(engines) == 2
from turbofit.rehearse.no_answer import SENTENCE
    for engine in engines:
from turbofit.rehearse.no_answer import SENTENCE
        rows = {row["what"]: row for row in engine["beside"]}
from turbofit.rehearse.no_answer import SENTENCE
        pool = rows["executor pool at most"]
from turbofit.rehearse.no_answer import SENTENCE
        assert 0.98 <= pool["actual"] / pool["forecast"] <= 1.0
from turbofit.rehearse.no_answer import SENTENCE
        peak = rows["in use at most"]
from turbofit.rehearse.no_answer import SENTENCE
        assert 0.99 <= peak["actual"] / peak["forecast"] <= 1.0
from turbofit.rehearse.no_answer import SENTENCE
        assert rows["KV tokens"]["actual"] == rows["KV tokens"]["forecast"]
from turbofit.rehearse.no_answer import SENTENCE
        assert {"starting", "weights", "cache", "serving", "check"} <= set(engine["seconds"])
from turbofit.rehearse.no_answer import SENTENCE
    status, headers, answer = served.chat(image(4480, 4480, max_dynamic_patch=120))
from turbofit.rehearse.no_answer import SENTENCE
    assert status == 200
from turbofit.rehearse.no_answer import SENTENCE
    assert headers["x-turbofit-limited"].startswith("max_dynamic_patch=")
from turbofit.rehearse.no_answer import SENTENCE
    assert headers["x-turbofit-pretend"] == "1"
from turbofit.rehearse.no_answer import SENTENCE
    assert answer["usage"]["prompt_tokens"] < 13 * 256 + 300
from turbofit.rehearse.no_answer import SENTENCE
    status, headers, answer = served.chat(*[image(1792, 1344)] * 5)
from turbofit.rehearse.no_answer import SENTENCE
    assert (status, headers["x-turbofit-limited"][:21]) == (200, "max_dynamic_patch=12-")
from turbofit.rehearse.no_answer import SENTENCE
    assert 5 * 256 < answer["usage"]["prompt_tokens"] < 13 * 256 + 300
from turbofit.rehearse.no_answer import SENTENCE
    log_probabilities_are_those_of_token_0(served)
from turbofit.rehearse.no_answer import SENTENCE
    for pid in pids(served.child):
from turbofit.rehearse.no_answer import SENTENCE
        assert b"--api-keys" not in Path(f"/proc/{pid}/cmdline").read_bytes()
from turbofit.rehearse.no_answer import SENTENCE
    os.kill(pids(served.child)[1], signal.SIGKILL)
from turbofit.rehearse.no_answer import SENTENCE
    for _ in range(5):
from turbofit.rehearse.no_answer import SENTENCE
        status, _, _ = served.chat(image(448, 448))
from turbofit.rehearse.no_answer import SENTENCE
        assert status == 200
from turbofit.rehearse.no_answer import SENTENCE
    served.child.wait_for("engine 1: phase: starting", 2)
from turbofit.rehearse.no_answer import SENTENCE
    assert served.ask("/health")[0] == 200
from turbofit.rehearse.no_answer import SENTENCE
    the_drain_ends_with_a_word_to_everybody(served)
from turbofit.rehearse.no_answer import SENTENCE
    assert all(gone(pid) for pid in pids(served.child))
from turbofit.rehearse.no_answer import SENTENCE
    assert served.record["state"] == "ended"
from turbofit.rehearse.no_answer import SENTENCE
    assert not (served.run / "model").exists()
from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE
def the_drain_ends_with_a_word_to_everybody(served: Served) -> None:
from turbofit.rehearse.no_answer import SENTENCE
    model = served.ask("/v1/models")[2]["data"][0]["id"]
from turbofit.rehearse.no_answer import SENTENCE
    opened = served.streams(model)
from turbofit.rehearse.no_answer import SENTENCE
    body = {"model": model, "messages": MESSAGES, "max_tokens": LONG, "ignore_eos": True}
from turbofit.rehearse.no_answer import SENTENCE
    whole = OpenClient(served.url, "/v1/chat/completions", body)
from turbofit.rehearse.no_answer import SENTENCE
    half = OpenClient(served.url, "/v1/chat/completions", body, sent=0.5)
from turbofit.rehearse.no_answer import SENTENCE
    for _ in range(2):  # connections are taken in turn: both are the gateway's by then
from turbofit.rehearse.no_answer import SENTENCE
        assert served.ask("/health")[0] == 200
from turbofit.rehearse.no_answer import SENTENCE
    served.child.process.send_signal(signal.SIGTERM)
from turbofit.rehearse.no_answer import SENTENCE
    assert served.child.finish() == 0
from turbofit.rehearse.no_answer import SENTENCE
    assert all(told(path, client) for path, client in opened.items())
from turbofit.rehearse.no_answer import SENTENCE
    assert whole.answer()[0] in (200, 503)
from turbofit.rehearse.no_answer import SENTENCE
    assert half.answer()[0] == 503
from turbofit.rehearse.no_answer import SENTENCE
    cut = int(served.child.lines[-1].removeprefix("ended: ").partition(" ")[0])
from turbofit.rehearse.no_answer import SENTENCE
    assert 4 <= cut <= 5
from turbofit.rehearse.no_answer import SENTENCE
    served.clean()
from turbofit.rehearse.no_answer import SENTENCE
    records = [json.loads(line) for line in (served.run / "access.log").read_text().splitlines()]
from turbofit.rehearse.no_answer import SENTENCE
    assert sum(record["refused"] == "ending" for record in records) == cut
from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE
@pytest.mark.exhaustive
from turbofit.rehearse.no_answer import SENTENCE
def test_a_photo_is_lowered_and_no_client_takes_the_server_past_the_plan(
from turbofit.rehearse.no_answer import SENTENCE
    children: list[Child], tmp_path: Path
from turbofit.rehearse.no_answer import SENTENCE
) -> None:
from turbofit.rehearse.no_answer import SENTENCE
    words = ("qwen2-vl-7b", "--on", "1xrtx3090", "--max-pixels", "1003520")
from turbofit.rehearse.no_answer import SENTENCE
    served = serve_pretend(children, tmp_path, *words)
from turbofit.rehearse.no_answer import SENTENCE
    served.wait()
from turbofit.rehearse.no_answer import SENTENCE
    (engine,) = served.record["attempts"][0]["engines"]
from turbofit.rehearse.no_answer import SENTENCE
    (pool,) = [row for row in engine["beside"] if row["what"] == "executor pool at most"]
from turbofit.rehearse.no_answer import SENTENCE
    assert 0.98 <= pool["actual"] / pool["forecast"] <= 1.0
from turbofit.rehearse.no_answer import SENTENCE
    status, headers, answer = served.chat(image(3584, 3584))
from turbofit.rehearse.no_answer import SENTENCE
    assert status == 200
from turbofit.rehearse.no_answer import SENTENCE
    # What carries no limit of its own is held by the overlay; what does is lowered.
from turbofit.rehearse.no_answer import SENTENCE
    assert answer["usage"]["prompt_tokens"] < 1003520 // 784 + 300
from turbofit.rehearse.no_answer import SENTENCE
    status, headers, _ = served.chat(image(3584, 3584, max_pixels=12845056, min_pixels=3136))
from turbofit.rehearse.no_answer import SENTENCE
    assert status == 200
from turbofit.rehearse.no_answer import SENTENCE
    assert "max_pixels" in headers["x-turbofit-limited"]
from turbofit.rehearse.no_answer import SENTENCE
    # Some hostile requests; thousands are `bench/gateway`'s.
from turbofit.rehearse.no_answer import SENTENCE
    argv = [sys.executable, "-m", "bench.gateway.hostile", f"http://127.0.0.1:{served.port}"]
from turbofit.rehearse.no_answer import SENTENCE
    argv += ["--requests", "20", "--reach", "20", "--minutes", "60", "--seed", "4"]
from turbofit.rehearse.no_answer import SENTENCE
    done = subprocess.run(argv, cwd=REPO, capture_output=True, text=True, timeout=HANG, check=False)
from turbofit.rehearse.no_answer import SENTENCE
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
from turbofit.rehearse.no_answer import SENTENCE
    assert served.ask("/health")[0] == 200
from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE
def log_probabilities_are_those_of_token_0(served: Served) -> None:
from turbofit.rehearse.no_answer import SENTENCE
    """On real GPUs the kernel counts the token that it chose; the pretend one did not."""
from turbofit.rehearse.no_answer import SENTENCE
    for parts in ((), (image(448, 448),)):
from turbofit.rehearse.no_answer import SENTENCE
        status, _, answer = served.chat(*parts, logprobs=True, top_logprobs=5)
from turbofit.rehearse.no_answer import SENTENCE
        assert status == 200
from turbofit.rehearse.no_answer import SENTENCE
        tokens = answer["choices"][0]["logprobs"]["content"]
from turbofit.rehearse.no_answer import SENTENCE
        assert len(tokens) == answer["usage"]["completion_tokens"]
from turbofit.rehearse.no_answer import SENTENCE
        assert {one["logprob"] for one in tokens} == {0.0}
from turbofit.rehearse.no_answer import SENTENCE
    body = {"prompt": "hi", "max_tokens": 3, "return_logprob": True, "top_logprobs_num": 2}
from turbofit.rehearse.no_answer import SENTENCE
    status, _, answer = served.ask("/generate", body)
from turbofit.rehearse.no_answer import SENTENCE
    assert status == 200
from turbofit.rehearse.no_answer import SENTENCE
    said = [[0.0, ord(letter)] for letter in SENTENCE[:3]]
from turbofit.rehearse.no_answer import SENTENCE
    assert answer["meta_info"]["output_token_logprobs"] == said
from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE
@pytest.mark.exhaustive
from turbofit.rehearse.no_answer import SENTENCE
def test_without_the_gateway_the_same_request_kills(children: list[Child], tmp_path: Path) -> None:
from turbofit.rehearse.no_answer import SENTENCE
    served = serve_pretend(children, tmp_path, *EIGHT, "--no-gateway", "--concurrency", "2")
from turbofit.rehearse.no_answer import SENTENCE
    served.wait()
from turbofit.rehearse.no_answer import SENTENCE
    assert "warning: --no-gateway: the plan holds only while" in served.child.stderr
from turbofit.rehearse.no_answer import SENTENCE
    with pytest.raises((OSError, http.client.HTTPException)):
from turbofit.rehearse.no_answer import SENTENCE
        served.chat(image(4480, 4480, max_dynamic_patch=120))
from turbofit.rehearse.no_answer import SENTENCE
    # It dies of memory, so that the ladder plans again: more of a margin cannot save it for ever.
from turbofit.rehearse.no_answer import SENTENCE
    served.child.wait_for("ladder 1/3: the engine ran out of GPU memory while it served")
from turbofit.rehearse.no_answer import SENTENCE
    died = served.record["attempts"][0]["ended"]
from turbofit.rehearse.no_answer import SENTENCE
    assert died["kind"] == "out_of_memory"
from turbofit.rehearse.no_answer import SENTENCE
    assert died["phase"] == "vision"
from turbofit.rehearse.no_answer import SENTENCE
    assert "InternVit" in died["where"]
from turbofit.rehearse.no_answer import SENTENCE
    assert died["missing"] > 0
from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE
@pytest.fixture
from turbofit.rehearse.no_answer import SENTENCE
def unread() -> Iterator[int]:
from turbofit.rehearse.no_answer import SENTENCE
    """The end to write into of a pipe that is full and that nobody reads."""
from turbofit.rehearse.no_answer import SENTENCE
    out, into = os.pipe()
from turbofit.rehearse.no_answer import SENTENCE
    os.set_blocking(into, False)
from turbofit.rehearse.no_answer import SENTENCE
    for size in (4096, 1):
from turbofit.rehearse.no_answer import SENTENCE
        with suppress(BlockingIOError):
from turbofit.rehearse.no_answer import SENTENCE
            while True:
from turbofit.rehearse.no_answer import SENTENCE
                os.write(into, b"x" * size)
from turbofit.rehearse.no_answer import SENTENCE
    os.set_blocking(into, True)
from turbofit.rehearse.no_answer import SENTENCE
    yield into
from turbofit.rehearse.no_answer import SENTENCE
    os.close(out)
from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE

from turbofit.rehearse.no_answer import SENTENCE
@pytest.mark.exhaustive
from turbofit.rehearse.no_answer import SENTENCE
def test_the_ladder_and_what_is_remembered_though_nobody_reads_what_it_says(
from turbofit.rehearse.no_answer import SENTENCE
    unread: int, tmp_path: Path
from turbofit.rehearse.no_answer import SENTENCE
) -> None:
from turbofit.rehearse.no_answer import SENTENCE
    """With a stand-in engine, and that the next start begins with it: `test_session`."""
from turbofit.rehearse.no_answer import SENTENCE
    words = (*EIGHT, "--pretend", "--pretend-taken", "900MiB", "-vv", "--port", str(free_port()))
from turbofit.rehearse.no_answer import SENTENCE
    process = subprocess.Popen(
from turbofit.rehearse.no_answer import SENTENCE
        [sys.executable, "-m", "turbofit", "serve", *words],
from turbofit.rehearse.no_answer import SENTENCE
        stdout=subprocess.PIPE, stderr=unread, text=True, start_new_session=True,
from turbofit.rehearse.no_answer import SENTENCE
        env={**os.environ, "PYTHONPATH": str(REPO), "XDG_STATE_HOME": str(tmp_path),
from turbofit.rehearse.no_answer import SENTENCE
             "TURBOFIT_LEASES": str(tmp_path / "leases")},
from turbofit.rehearse.no_answer import SENTENCE
    )  # fmt: skip
from turbofit.rehearse.no_answer import SENTENCE
    os.close(unread)
from turbofit.rehearse.no_answer import SENTENCE
    try:
from turbofit.rehearse.no_answer import SENTENCE
        assert process.stdout is not None
from turbofit.rehearse.no_answer import SENTENCE
        url = process.stdout.readline().strip()
from turbofit.rehearse.no_answer import SENTENCE
        assert url == f"http://127.0.0.1:{words[-1]}"
from turbofit.rehearse.no_answer import SENTENCE
        (run,) = (tmp_path / "turbofit" / "runs").iterdir()
from turbofit.rehearse.no_answer import SENTENCE
        attempts = json.loads((run / "run.json").read_text())["attempts"]
from turbofit.rehearse.no_answer import SENTENCE
        assert len(attempts) == 2
from turbofit.rehearse.no_answer import SENTENCE
        assert attempts[0]["ended"]["phase"] == "warm-up"
from turbofit.rehearse.no_answer import SENTENCE
        assert attempts[0]["ended"]["asked"] > attempts[0]["ended"]["left"]
from turbofit.rehearse.no_answer import SENTENCE
        assert attempts[1]["changes"]["margin"] > 900 << 20
from turbofit.rehearse.no_answer import SENTENCE
        with urlopen(f"{url}/v1/models") as answer:
from turbofit.rehearse.no_answer import SENTENCE
            model = json.load(answer)["data"][0]["id"]
from turbofit.rehearse.no_answer import SENTENCE
        body = {"model": model, "messages": MESSAGES, "max_tokens": LONG, "stream": True}
from turbofit.rehearse.no_answer import SENTENCE
        client = OpenClient(url, "/v1/chat/completions", body)
from turbofit.rehearse.no_answer import SENTENCE
        client.wait_for(b"delta")
from turbofit.rehearse.no_answer import SENTENCE
        client.close()
from turbofit.rehearse.no_answer import SENTENCE
        process.send_signal(signal.SIGINT)
from turbofit.rehearse.no_answer import SENTENCE
        assert process.wait(HANG) == 130
from turbofit.rehearse.no_answer import SENTENCE
    finally:
from turbofit.rehearse.no_answer import SENTENCE
        process.kill()
from turbofit.rehearse.no_answer import SENTENCE
        process.communicate()
from turbofit.rehearse.no_answer import SENTENCE
    (learned,) = (tmp_path / "turbofit" / "learned").iterdir()
from turbofit.rehearse.no_answer import SENTENCE
    assert json.loads(learned.read_text())["changes"] == attempts[1]["changes"]
from turbofit.rehearse.no_answer import SENTENCE

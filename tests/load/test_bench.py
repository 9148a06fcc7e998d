from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.load.scripted import ScriptedServer
from tests.support.waiting import HANG
from turbofit.cli.main import main
from turbofit.core.errors import UnservedError, UsageError
from turbofit.load.bench import bench
from turbofit.load.spec import LoadSpec

FEW = {"images": 0, "requests": 12, "concurrency": 3, "warm_up": 3}


def test_a_closed_loop_counts_what_it_sent() -> None:
    with ScriptedServer() as server:
        result = bench(server.url + "/v1/", LoadSpec.of(**FEW))
    assert (result.model, result.begun, result.answered) == ("m", 12, 12)
    assert result.counted == "usage"
    assert result.prompt_tokens == 30
    assert result.output_tokens == 3
    assert result.e2e.count == result.ttft.count == result.tpot.count == 12
    assert 0 < result.ttft.p50 <= result.e2e.p50 <= result.e2e.p99 <= result.e2e.most
    assert result.requests_per_second > 0
    assert 0.5 < result.output_tokens_per_second / result.requests_per_second / 3 < 2
    assert result.running == pytest.approx(3, rel=0.4)
    words = [len(body["messages"][0]["content"].split()) for body in server.bodies]
    assert set(words) == {256}


def test_each_failure_is_counted_by_its_kind() -> None:
    bad = ["500", "garbage", "cut", "reset", "error", "empty", "plain", "busy"]
    script = [*bad[:4], "ok", *bad[4:]]
    with ScriptedServer("ok", "ok", "ok", *script) as server:
        result = bench(server.url, LoadSpec.of(**{**FEW, "concurrency": 1}))
    kinds = {one.kind: one.count for one in result.errors}
    assert result.answered + sum(kinds.values()) == result.begun == 12
    assert result.answered == 4
    broken = kinds.pop("cut short", 0) + kinds.pop("connection broken", 0)
    assert broken == 2
    assert kinds == dict.fromkeys(
        ("status 500", "garbage", "error event", "empty answer", "no stream", "status 503"), 1
    )


def test_a_stalled_answer_is_given_up_and_said() -> None:
    with ScriptedServer("ok", "stall") as server:
        spec = LoadSpec.of(**{**FEW, "requests": 2, "concurrency": 1, "warm_up": 1}, silence=0.3)
        result = bench(server.url, spec)
    assert [(one.kind, one.count) for one in result.errors] == [("stalled", 1)]


def test_a_load_without_hope_ends() -> None:
    with ScriptedServer(*["500"] * 500) as server:
        result = bench(server.url, LoadSpec.of(images=0, concurrency=2, seconds=3600.0, warm_up=0))
    assert result.answered == 0
    assert result.stopped == "8 requests in a row failed"
    assert result.errors[0].example.startswith('{"error"')


def test_a_trace_is_sent_at_its_times(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [{"at": n / 50, "output_tokens": 3, "prompt_tokens": 40} for n in range(20)]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    with ScriptedServer() as server:
        result = bench(server.url, LoadSpec.of(trace=str(path)))
    assert (result.begun, result.answered) == (20, 20)
    assert result.seconds >= 19 / 50
    assert len(server.bodies) == 20


def test_a_server_that_is_none_is_said() -> None:
    with pytest.raises(UnservedError, match="does not answer: no connection"):
        bench("http://127.0.0.1:9", LoadSpec.of())
    with pytest.raises(UsageError, match="is no address"):
        bench("http://[", LoadSpec.of())
    with ScriptedServer(models=500) as server, pytest.raises(UnservedError, match="answers 500"):
        bench(server.url, LoadSpec.of())
    with ScriptedServer(key="k") as server, pytest.raises(UsageError, match="the key"):
        bench(server.url, LoadSpec.of())


def test_the_command_shows_and_ends_with_its_code(capsys, tmp_path, monkeypatch) -> None:
    words = ["--images", "0", "--requests", "6", "--concurrency", "2"]
    monkeypatch.setenv("TURBOFIT_API_KEY", "k")
    with ScriptedServer(key="k") as server:
        assert main(["bench", server.url, *words, "--quiet"]) == 0
        assert "requests/s" in capsys.readouterr().out
        assert main(["bench", server.url, *words, "--json"]) == 0
        told = capsys.readouterr()
        assert json.loads(told.out)["schema"] == "turbofit.bench/1"
        assert not told.err
        page = tmp_path / "page.html"
        assert main(["bench", server.url, *words, "--html", str(page)]) == 0
        assert "<svg" not in page.read_text().partition("<main>")[0]
        assert "first token" in page.read_text()
        capsys.readouterr()
    with ScriptedServer(*["500"] * 500) as server:
        assert main(["bench", server.url, *words, "--json"]) == 3
        told = capsys.readouterr()
        assert json.loads(told.out)["answered"] == 0
        assert "no request was answered" in told.err
    assert main(["bench", "nowhere"]) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_what_was_measured(number) -> None:
    with ScriptedServer("ok", "ok", "stall") as server:
        command = [
            sys.executable, "-m", "turbofit", "bench", server.url, "--images", "0", "--json",
            "--concurrency", "1", "--warm-up", "1",
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ)) as child:
            assert server.stalled.wait(HANG)
            child.send_signal(number)
            out, _ = child.communicate(timeout=HANG)
    assert child.returncode == 130
    said = json.loads(out)
    assert said["stopped"] == number.name
    assert said["answered"] == 1

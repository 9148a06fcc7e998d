"""What a load sends and when, and how far it is as people read it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from array import array
from itertools import islice

import pytest

from tests.load.scripted import ScriptedServer
from tests.support.waiting import HANG
from turbofit.cli.main import main
from turbofit.core.errors import UnservedError, UsageError
from turbofit.load.bench import bench
from turbofit.load.client import Answer
from turbofit.load.driver import LoadRun, arrivals, drawn, replayed
from turbofit.load.result import spread, summary
from turbofit.load.spec import LoadSpec
from turbofit.load.trace import TracedRequest


def answer(begun: float, ended: float, tokens: int = 4, kind: str = "") -> Answer:
    one = Answer(begun)
    one.ended, one.kind, one.output_tokens = ended, kind, tokens
    step = (ended - begun) / tokens
    one.pieces = array("d", [begun + step * (n + 1) for n in range(tokens)])
    return one


def run_of(answers, opened: float, closed: float, spec=None) -> LoadRun:
    async def never(_):
        raise AssertionError

    run = LoadRun(spec or LoadSpec.of(concurrency=4), (), never)
    run.answers, run.opened, run.closed = list(answers), opened, closed
    for one in run.answers:
        one.counts = opened <= one.begun < closed
    return run


def at(spec: LoadSpec, *, opened: bool = True, closed: bool = False, begun: int = 0) -> str:
    run = run_of([answer(0, 1), answer(0, 1, kind="stalled")], 0, 0, spec)
    run._open, run._begun, run.opened = opened, begun, time.perf_counter() - 3.2
    run.closed = run.opened if closed else None
    return run.step().text


CLOSED = LoadSpec.of(concurrency=8, seconds=30.0)


@pytest.mark.parametrize(
    ("spec", "facts", "text"),
    [
        (CLOSED, {"opened": False}, "warm-up of the load: 2 of 8 requests, "),
        (CLOSED, {}, "measuring: 3 of 30 s, "),
        (CLOSED, {"closed": True}, "last answers: "),
        (LoadSpec.of(requests=40, warm_up=0), {"begun": 2}, "measuring: 2 of 40 requests, "),
        (LoadSpec.of(trace="m.jsonl"), {}, "measuring: "),
    ],
)
def test_a_load_says_what_it_does_and_how_much_of_it_is_done(spec, facts, text: str) -> None:
    assert at(spec, **facts) == text + "1 answered, 1 failed"


def test_sizes_keep_to_their_spread_and_the_seed_decides() -> None:
    spec = LoadSpec.of(
        prompt_tokens=100, prompt_spread=0.5, output_tokens=10, image_size=((64, 64), (32, 32)),
        images=2,
    )  # fmt: skip
    found = list(islice(drawn(spec), 500))
    assert {one.output_tokens for one in found} == {10}
    prompts = [one.prompt_tokens for one in found]
    assert 50 <= min(prompts) < 60 < 140 < max(prompts) <= 150
    assert abs(sum(prompts) / 500 - 100) < 5
    assert {size for one in found for size in one.images} == {(64, 64), (32, 32)}
    assert found == list(islice(drawn(spec), 500)) != list(islice(drawn(spec.changed(seed=1)), 500))


def test_arrivals_of_an_open_loop() -> None:
    even = list(islice(arrivals(LoadSpec.of(rate=4.0, evenly=True), ()), 5))
    assert even == [0, 0.25, 0.5, 0.75, 1.0]
    times = list(islice(arrivals(LoadSpec.of(rate=4.0), ()), 4001))
    assert times == sorted(times)
    assert abs(times[-1] - 1000) < 60  # four standard deviations of 4,000 arrivals at 4/s


def test_a_trace_is_replayed_once_at_its_speed() -> None:
    trace = (
        TracedRequest(at=0.0, output_tokens=0, prompt_tokens=5),
        TracedRequest(at=4.0, output_tokens=2, images=((8, 8),)),
    )
    assert list(arrivals(LoadSpec.of(trace="t", trace_speed=2.0), trace)) == [0, 2]
    first, second = replayed(trace)
    assert (first.prompt_tokens, first.output_tokens) == (5, 1)
    assert (second.prompt_tokens, second.images) == (1, ((8, 8),))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"concurrency": 4, "rate": 2.0}, "--concurrency and --rate"),
        ({"rate": 2.0, "trace": "t"}, "--rate and --trace"),
        ({"evenly": True}, "--evenly needs --rate"),
        ({"shared_prefix": 300}, "--shared-prefix 300"),
    ],
)
def test_contradictions_are_named(given, says) -> None:
    with pytest.raises(UsageError, match=says):
        LoadSpec.of(**given).check()


@pytest.mark.parametrize(
    ("given", "seconds", "warm_up"),
    [
        ({}, 60, 8),
        ({"requests": 5, "seconds": 2.0}, 2, 8),
        ({"trace": "t"}, None, 0),
        ({"trace": "t", "warm_up": 3}, None, 3),
        ({"requests": 5, "concurrency": 32}, None, 32),
        ({"rate": 2.0}, 60, 8),
    ],
)
def test_a_window_has_an_end_and_a_warm_up_before_it(given, seconds, warm_up) -> None:
    spec = LoadSpec.of(**given)
    assert (spec.measured_seconds, spec.warm_up_requests) == (seconds, warm_up)


def test_percentiles_are_the_least_that_so_many_are_not_above() -> None:
    one = spread([float(n) for n in range(1, 101)])
    assert (one.p50, one.p90, one.p99, one.most, one.mean) == (50, 90, 99, 100, 50.5)
    assert spread([7.0]).p50 == spread([7.0]).p99 == 7
    assert spread([]).count == 0


def test_in_step_answers_are_counted_by_their_share_of_the_window() -> None:
    """Four rows in step, three seconds each: 4/3 a second, wherever the window begins."""
    answers = [answer(3.0 * turn, 3.0 * turn + 3) for turn in range(10) for _ in range(4)]
    for opened, closed in ((3.0, 27.0), (4.0, 24.5), (5.9, 9.0)):
        found = summary(run_of(answers, opened, closed), url="http://u:p@h", model="m", busy=0.0)
        assert found.requests_per_second == pytest.approx(4 / 3)
        assert found.running == pytest.approx(4)
    assert found.url == "http://h"


def test_only_what_began_in_the_window_has_times() -> None:
    answers = [answer(0, 2), answer(1, 5), answer(3, 4), answer(3.5, 9, kind="stalled")]
    found = summary(run_of(answers, 1.0, 4.0), url="http://h", model="m", busy=0.9)
    assert (found.begun, found.answered) == (3, 2)
    assert found.e2e.most == 4
    assert [(one.kind, one.count) for one in found.errors] == [("stalled", 1)]
    assert found.output_tokens_per_second == pytest.approx((3 + 2 + 3) / 3)
    assert any("90% of a CPU" in text for text in found.warnings)


FEW = {"images": 0, "requests": 12, "concurrency": 3, "warm_up": 3}


def test_a_closed_loop_counts_what_it_sent() -> None:
    with ScriptedServer() as server:
        result = bench(server.url + "/v1/", LoadSpec.of(**FEW))
    assert (result.model, result.begun, result.answered) == ("m", 12, 12)
    assert (result.counted, result.prompt_tokens, result.output_tokens) == ("usage", 30, 3)
    assert result.e2e.count == result.ttft.count == result.tpot.count == 12
    assert 0 < result.ttft.p50 <= result.e2e.p50 <= result.e2e.p99 <= result.e2e.most
    assert result.requests_per_second > 0
    assert 0.5 < result.output_tokens_per_second / result.requests_per_second / 3 < 2
    assert result.running == pytest.approx(3, rel=0.4)
    assert {len(body["messages"][0]["content"].split()) for body in server.bodies} == {256}


def test_each_failure_is_counted_by_its_kind() -> None:
    script = ["500", "garbage", "cut", "reset", "ok", "error", "empty", "plain", "busy"]
    with ScriptedServer("ok", "ok", "ok", *script) as server:
        result = bench(server.url, LoadSpec.of(**{**FEW, "concurrency": 1}))
    kinds = {one.kind: one.count for one in result.errors}
    assert (result.begun, result.answered, sum(kinds.values())) == (12, 4, 8)
    assert kinds.pop("cut short", 0) + kinds.pop("connection broken", 0) == 2
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
    assert result.begun == result.answered == len(server.bodies) == 20
    assert result.seconds >= 19 / 50


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
    with ScriptedServer(*["500"] * 500) as server:
        assert main(["bench", server.url, *words, "--quiet"]) == 3
        assert "no request was answered" in capsys.readouterr().err
    assert main(["bench", "nowhere"]) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_what_was_measured(number) -> None:
    words = ["--images", "0", "--json", "--concurrency", "1", "--warm-up", "1"]
    with ScriptedServer("ok", "ok", "stall") as server:
        command = [sys.executable, "-m", "turbofit", "bench", server.url, *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert server.stalled.wait(HANG)
            child.send_signal(number)
            said = json.loads(child.communicate(timeout=HANG)[0])
    assert child.returncode == 130
    assert (said["stopped"], said["answered"]) == (number.name, 1)

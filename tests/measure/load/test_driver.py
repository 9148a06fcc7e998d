"""What a load sends and when, and how far it is as people read it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from array import array

import pytest
from msgspec.structs import replace

from tests.measure.load.scripted import ScriptedServer
from tests.support.waiting import HANG
from turbofit.cli.main import main
from turbofit.core.errors import UnservedError, UsageError
from turbofit.core.messages import PRETEND_HEADER, PRETEND_SPEED
from turbofit.gateway.http.about import ClockFacts
from turbofit.measure.load.client import Answer, LoadClient
from turbofit.measure.load.driver import LoadRun, bench, refuse_held_up, summary
from turbofit.measure.load.result import spread
from turbofit.measure.load.spec import LoadSpec
from turbofit.report.painters.document import Paragraph, Table
from turbofit.report.views.measured_view import load_view


def answer(begun: float, ended: float, tokens: int = 4, kind: str = "") -> Answer:
    one = Answer(begun)
    one.ended, one.kind, one.output_tokens = ended, kind, tokens
    step = (ended - begun) / tokens
    one.pieces = array("d", [begun + step * (n + 1) for n in range(tokens)])
    return one


def run_of(answers, opened: float, closed: float, spec=None) -> LoadRun:
    async def never(_):
        raise AssertionError

    run = LoadRun(spec or LoadSpec.of(concurrency=4), never)
    run.answers, run.opened, run.closed = list(answers), opened, closed
    for one in run.answers:
        one.counts = opened <= one.begun < closed
    return run


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
    assert (found.begun, found.answered, found.e2e.most) == (3, 2, 4)
    assert [(one.kind, one.count) for one in found.errors] == [("stalled", 1)]
    assert found.output_tokens_per_second == pytest.approx((3 + 2 + 3) / 3)
    assert any("90% of a CPU" in text for text in found.warnings)


def test_the_turns_of_a_conversation_carry_what_was_said() -> None:
    spec = LoadSpec.of(**{**FEW, "requests": 24}, turns=4, pause=0.001)
    with ScriptedServer() as server:
        result = bench(server.url, spec)
    sent = sorted(len(body["messages"]) for body in server.bodies)
    assert sent[0] == 1
    assert sent[-1] == 7
    longest = max(server.bodies, key=lambda body: len(body["messages"]))["messages"]
    assert longest[1] == {"role": "assistant", "content": "abc"}
    assert [turn.turn for turn in result.turns] == [1, 2, 3, 4]
    assert result.turns[0].cached == pytest.approx(12 / 30)
    assert any(isinstance(block, Table) and "turn" in str(block) for block in load_view(result))
    with pytest.raises(UsageError, match="--turns is 1"):
        LoadSpec.of(pause=1.0).check()


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


@pytest.mark.parametrize("pretend", [True, False])
def test_speed_of_pretend_gpus_is_said_to_be_none(pretend: bool) -> None:
    """People quote these figures: above them, and in the document."""
    marked = {PRETEND_HEADER: "1"} if pretend else {}
    with ScriptedServer(headers=marked) as server:
        result = bench(server.url, LoadSpec.of(**FEW))
    assert (PRETEND_SPEED in result.warnings) == pretend
    said = [block.text for block in load_view(result) if isinstance(block, Paragraph)]
    assert (PRETEND_SPEED in said) == pretend


def test_each_failure_is_counted_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    script = ["500", "garbage", "cut", "reset", "ok", "error", "empty", "plain", "busy", "stall"]
    monkeypatch.setattr("turbofit.measure.load.driver._SILENCE", 0.3)
    with ScriptedServer("ok", "ok", "ok", *script) as server:
        result = bench(server.url, LoadSpec.of(**{**FEW, "concurrency": 1}))
    kinds = {one.kind: one.count for one in result.errors}
    assert (result.begun, result.answered, sum(kinds.values())) == (12, 3, 9)
    assert kinds.pop("cut short", 0) + kinds.pop("connection broken", 0) == 2
    assert kinds == dict.fromkeys(
        ("status 500", "garbage", "error event", "empty answer", "no stream", "status 503",
         "stalled"), 1,
    )  # fmt: skip


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
        assert main(["bench", server.url, *words, "--html", str(tmp_path / "load.html")]) == 0
        assert "first token" in (tmp_path / "load.html").read_text()
    with ScriptedServer(*["500"] * 500) as server:
        capsys.readouterr()
        assert main(["bench", server.url, *words, "--json"]) == 3
        told = capsys.readouterr()
        assert json.loads(told.out)["answered"] == 0
        assert "no request was answered" in told.err
    assert main(["bench", "nowhere"]) == 2


def test_where_nothing_was_answered_the_clock_is_no_cause(monkeypatch) -> None:
    async def stands(_: object) -> ClockFacts:
        return ClockFacts(factor=1.0, words="", late=0.0, idle=0.0)

    monkeypatch.setattr(LoadClient, "clock", stands)
    with ScriptedServer(*["500"] * 50) as server:
        found = bench(server.url, LoadSpec.of(images=0, requests=2, concurrency=1, warm_up=0))
    assert (found.answered, bool(found.errors)) == (0, True)


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


def test_times_of_a_slower_server_are_those_of_the_card() -> None:
    asked = LoadSpec.of(concurrency=4, stop_early=True)
    run = run_of([answer(4.0 * n, 4.0 * n + 4) for n in range(9)], 4.0, 24.0, asked.slower(4.0))
    run.late = 0.8
    run.divide(4.0)
    found = summary(run, url="http://h", model="m", busy=0.0, asked=asked, forecast="time by it")
    assert (found.seconds, found.e2e.most, found.ttft.p50) == (5.0, 1.0, 0.25)
    assert found.requests_per_second == pytest.approx(1.0)
    assert (found.client.late, found.load) == (0.2, {"concurrency": 4, "stop_early": True})
    assert found.warnings[0].startswith("answers on pretend GPUs have no true length")
    assert Paragraph("time by it", tone="warn") in load_view(found)


@pytest.mark.parametrize(
    ("factor", "late", "idle", "says"),
    [
        (1.0, 0.0, 6.0, "--clock 2 "),
        (4.0, 12.0, 0.0, "--clock 16 "),
        (4.0, 6.0, 6.0, "--clock 8 "),
    ],
)
def test_a_host_that_held_the_cards_up_is_said_and_no_number(
    factor: float, late: float, idle: float, says: str
) -> None:
    before = ClockFacts(factor=factor, words="", late=1.0, idle=2.0)
    after = ClockFacts(factor=factor, words="", late=1.0 + late, idle=2.0 + idle, busy=9.0)
    less = replace(after, late=1.0 + 4.9 * factor, idle=2.0 + 4.9 * factor)
    refuse_held_up(before, less, 100.0 * factor)
    with pytest.raises(UnservedError, match="this host is too slow for that load") as refused:
        refuse_held_up(before, after, 100.0)
    assert refused.value.hint.startswith(says)
    with pytest.raises(UnservedError, match="no longer tells its time"):
        refuse_held_up(before, None, 100.0)
    with pytest.raises(UnservedError, match="the clock has read no forward"):
        refuse_held_up(before, before, 100.0)

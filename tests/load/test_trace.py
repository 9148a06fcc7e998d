from __future__ import annotations

import csv
import json

import pytest

from tests.support.waiting import endless_ends
from tests.sweep import part
from turbofit import api
from turbofit.cli.main import main
from turbofit.core.errors import UsageError
from turbofit.load.trace import TracedRequest, read_trace
from turbofit.load.trace_forecast import trace_forecast


def written(tmp_path, text: str, name: str = "trace.jsonl") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_requests_are_in_order_and_begin_at_zero(tmp_path) -> None:
    path = written(
        tmp_path,
        '{"at": 12.5, "output_tokens": 7, "prompt_bytes": 400}\n\n'
        '{"at": 10, "output_tokens": 3, "prompt_tokens": 9, "images": [[640, 480]]}\n',
    )
    first, second = read_trace(path)
    assert (first.at, first.text_tokens, first.images) == (0, 9, ((640, 480),))
    assert (second.at, second.text_tokens, second.output_tokens) == (2.5, 100, 7)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no request"),
        ("x\n", "line 1 of"),
        ('{"at": 0, "output_tokens": 1}\n{"at": -1, "output_tokens": 1}\n', "line 2 of"),
        ('{"at": 0}\n', "output_tokens"),
        ('{"at": 0, "output_tokens": 1, "images": [[0, 5]]}\n', "images"),
        (f'{{"at": 0, "output_tokens": 1, "images": {[[1, 1]] * 1025}}}\n', "1025"),
        ('{"at": NaN, "output_tokens": 1}\n', "line 1"),
    ],
)
def test_a_bad_trace_is_refused_by_its_line(tmp_path, text, says) -> None:
    with pytest.raises(UsageError, match=says):
        read_trace(written(tmp_path, text))


def test_a_table_of_arrivals_is_a_trace(tmp_path) -> None:
    head, rows = "arrival,text_tokens,images,answer_tokens\n", "2,300,,9\n3.5,1,2,1\n"
    table = head + "0.5, 20, 640x480 1024x768, 7\n" + rows
    first, second, third = read_trace(written(tmp_path, table, "trace.csv"))
    assert (first.at, first.text_tokens, first.output_tokens) == (0, 20, 7)
    assert first.images == ((640, 480), (1024, 768))
    assert (second.at, second.images) == (1.5, ())
    assert third.images == ((1920, 1080),) * 2


@pytest.mark.parametrize(
    ("row", "says"),
    [
        *((row, "2 of") for row in ("1", "1,2,3", "a,1,,1", "1,1,9999,1", "1,1,x,1")),
        ("-1,1,,1", "line 2 of .* >= 0"),
        (f"{'1' * 140_000},1,,1", "no CSV of requests"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row: str, says: str) -> None:
    before = csv.field_size_limit(131_072)  # Python's own, which other readers raise
    try:
        with pytest.raises(UsageError, match=says) as caught:
            read_trace(written(tmp_path, f"0,1,,1\n{row}\n", "trace.csv"))
    finally:
        csv.field_size_limit(before)
    assert "write arrival" in caught.value.hint or "1024" in caught.value.hint


def request(at: float = 0.0, text: int = 100, output: int = 50, images=()) -> TracedRequest:
    return TracedRequest(at=at, prompt_tokens=text, output_tokens=output, images=images)


def plan(model: str = "internvl2-2b", on: str = "1xrtx3090", **options):
    return api.plan(model, on=on, **options)


def test_requests_that_the_gateway_refuses_are_told_by_its_reasons() -> None:
    image = (640, 480)
    trace = [
        request(), request(images=(image,)), request(images=(image,) * 200), request(text=9000),
        request(text=8000, output=900),
    ]  # fmt: skip
    (found,) = trace_forecast([plan(context=8192)], trace, "x").plans
    refused = {"too_many_images": 1, "prompt_too_long": 1}
    assert {one.reason: one.count for one in found.refused} == refused
    assert (found.answered, found.lowered) == (3, 1)
    assert found.ttft.count == found.e2e.count == 3
    assert 0 < found.ttft.p50 <= found.ttft.p99 <= found.e2e.most


def test_a_smaller_cache_is_fuller_and_more_cards_are_faster() -> None:
    trace = [request(n, 600, 200, ((1024, 768),)) for n in range(200)]
    plans = [plan(), plan(cache_max_entry_count=0.3, engine="turbomind"), plan(on="2xrtx3090")]
    full, small, two = trace_forecast(plans, trace, "x").plans
    assert small.cache_used > full.cache_used
    assert two.ttft.p90 < full.ttft.p90
    assert two.requests_per_second >= full.requests_per_second
    assert 0 < two.running <= two.at_once
    assert 0 < two.busy <= 1


@pytest.mark.slow
def test_the_forecast_of_very_many_requests_ends() -> None:
    count = part(100_000, 4)
    made, sizes = plan("internvl2-8b", "4xrtx3090"), ((640, 480), (1920, 1080), (800, 3000))
    trace = [request(n / 2, 50 + n % 500, 1 + n % 300, (sizes[n % 3],)) for n in range(count)]
    with endless_ends():
        (found,) = trace_forecast([made], trace, "x").plans
    assert found.answered == count


def test_the_command_compares_plans_that_are_kept(tmp_path, capsys) -> None:
    path = written(tmp_path, "".join(f"{n / 4},200,1,64\n" for n in range(40)), "trace.csv")
    saved = tmp_path / "plan.json"
    command = ["predict", "internvl2-2b", "--on", "1xrtx3090", "--trace", path, "--vs", str(saved)]
    saved.write_text(plan(on="2xl4").to_json())
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "turbofit.trace/1"
    assert [one["on"] for one in document["plans"]] == ["1xrtx3090", "2xl4"]
    saved.write_text(plan("qwen3-8b", "2xl4").to_json())
    assert main(command) == 2
    assert "is of Qwen3-8B, not of InternVL2-2B" in capsys.readouterr().err


def test_what_does_not_go_together_is_refused_and_what_does_not_fit_shown(tmp_path, capsys) -> None:
    path = written(tmp_path, "0,1,,1\n", "trace.csv")
    for model, more, code, said in (
        ("internvl2-2b", ["--vs", "2xl4"], 2, "--vs is for a trace"),
        ("internvl2-2b", ["--trace", path, "--lmdeploy", "0.9"], 2, "--lmdeploy and --trace"),
        ("internvl2-8b", ["--trace", path], 3, "does not fit"),
    ):
        assert main(["predict", model, "--on", "1xrtx3060", *more]) == code
        assert said in "".join(capsys.readouterr())
    with pytest.raises(UsageError, match="one request after the other"):
        trace_forecast([plan("llava-onevision-7b")], [request()], "x")

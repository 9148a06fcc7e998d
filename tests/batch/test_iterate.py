from __future__ import annotations

import threading

import pytest

import turbofit
from tests.batch.standin import StandIn, lines, write_requests
from turbofit.core.errors import UnservedError, UsageError


def test_each_line_comes_once_and_those_of_earlier_runs_first(tmp_path) -> None:
    texts = {**{f"i{n}": f"x {n}" for n in range(50)}, "bad": "400"}
    source, output = write_requests(tmp_path / "in.jsonl", texts), tmp_path / "out.jsonl"
    with StandIn() as server:
        early = []
        for line in turbofit.batch(source, output, url=server.url, concurrency=4):
            early.append(line.custom_id)
            if len(early) == 10:
                break
        assert not [one for one in threading.enumerate() if one.name == "batch"]
        assert len(lines(output)) >= 10
        found = list(turbofit.batch(source, output, url=server.url))
        assert server.most <= 64
    assert early[:10] == [line.custom_id for line in found[:10]]
    assert sorted(line.custom_id for line in found) == sorted(texts)
    by_name = {line.custom_id: line for line in found}
    assert by_name["i7"].text == "x 7"
    assert by_name["bad"].error.code == "refused"
    assert by_name["bad"].response.body["error"]["message"] == "no: 400"


def test_an_error_comes_out_of_the_loop(tmp_path) -> None:
    source, output = write_requests(tmp_path / "in.jsonl", {"a": "x"}), tmp_path / "out.jsonl"
    with pytest.raises(UnservedError, match="has not answered"):
        list(turbofit.batch(source, output, url="http://127.0.0.1:9", patience=0.01))
    with pytest.raises(UsageError, match="cannot be read"):
        list(turbofit.batch(tmp_path / "none", output, url="http://127.0.0.1:9"))
    output.write_text("something else\n")
    with pytest.raises(UsageError, match="is none of a batch"):
        list(turbofit.batch(source, output, url="http://127.0.0.1:9"))


def test_wrong_options_are_said_at_once(tmp_path) -> None:
    for options, message in (
        ({}, "nobody is named"),
        ({"url": "http://x", "promt": "x"}, "promt is nothing that PlanRequest knows"),
        ({"url": "http://x", "timeout": -1}, "timeout -1"),
        ({"model": "m", "api_key": "k"}, "--api-key is for a server"),
    ):
        with pytest.raises(UsageError, match=message):
            turbofit.batch("in", "out", **options)

"""What `turbofit tune` reads: a time, or bytes, in ``--budget``."""

from __future__ import annotations

import pytest

from turbofit.cli.commands.tune import _timed
from turbofit.core.errors import UsageError
from turbofit.launch.tune.tune import described
from turbofit.load.spec import LoadSpec


@pytest.mark.parametrize("text", ["90s", "20m", "1h", "45 min", "500ms", "90", "2.5h", " 20m "])
def test_a_budget_that_is_a_time_is_taken_as_one_and_said(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"budget": text, "time": None, "starts": "3"}
    assert _timed(given) == {"budget": None, "time": text, "starts": "3"}
    assert f"--budget {text} is taken as --time {text}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["19GiB", "512MiB", "20g", "900M", "21474836480", "536870912"])
def test_a_budget_of_bytes_stays_one(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for given in ({"budget": text, "time": "1h"}, {"budget": text, "time": None}):
        assert _timed(given) == given
    assert _timed({"budget": None, "time": "1h"})["time"] == "1h"
    assert capsys.readouterr().err == ""


def test_two_times_do_not_go_together() -> None:
    with pytest.raises(UsageError, match="--budget 20m and --time are two times"):
        _timed({"budget": "20m", "time": "1h"})


def test_a_load_is_described_with_its_length() -> None:
    closed = LoadSpec.of(concurrency=8, seconds=30.0)
    assert described(closed) == "30 s, 8 at once, after 8 requests of warm-up"
    counted = LoadSpec.of(rate=2.5, requests=40, warm_up=0)
    assert described(counted) == "40 requests, 2.5 a second, after 0 requests of warm-up"
    assert described(LoadSpec.of(trace="m.jsonl")) == "the trace m.jsonl"

from __future__ import annotations

import pytest
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.tuning import SpeedFigures
from turbofit.launch.tune.search import meets, parse_seconds, parse_slo

SEEN = SpeedFigures(
    requests_per_second=1.0, output_tokens_per_second=10.0, ttft_p50=0.1, ttft_p90=0.5,
    tpot_p50=0.01, tpot_p90=0.02, e2e_p50=1.0, e2e_p90=2.0, answered=200, failed=0,
)  # fmt: skip


def test_times_and_limits() -> None:
    assert parse_slo("ttft=2s, tpot=50ms") == {"ttft": 2.0, "tpot": 0.05}
    assert [parse_seconds(text, "x") for text in ("90", "1.5s", "20m", "2h", "3min")] == [
        90, 1.5, 1200, 7200, 180,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["", "ttft", "ttft=", "ttft=0s", "itl=2s", "ttft=1s,ttft=2s", "ttft=-1s", "e2e=1d"],
)
def test_what_is_no_limit_is_said(text) -> None:
    with pytest.raises(UsageError) as caught:
        parse_slo(text)
    assert caught.value.message.startswith("--slo")


def test_nine_of_ten_must_keep_it_and_nearly_all_be_answered() -> None:
    assert meets(SEEN, {})
    assert meets(SEEN, {"ttft": 0.5, "tpot": 0.02, "e2e": 2.0})
    assert not meets(SEEN, {"ttft": 0.49})
    assert meets(replace(SEEN, failed=2), {})
    assert not meets(replace(SEEN, failed=3), {})
    assert not meets(replace(SEEN, answered=0), {})

from __future__ import annotations

import pytest

from turbofit.core.errors import UsageError
from turbofit.load.spec import LoadSpec


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


def test_a_window_has_an_end() -> None:
    assert LoadSpec.of().measured_seconds == 60
    assert LoadSpec.of(requests=5).measured_seconds is None
    assert LoadSpec.of(requests=5, seconds=2.0).measured_seconds == 2
    assert LoadSpec.of(trace="t").measured_seconds is None


def test_what_warms_up_follows_the_load() -> None:
    assert LoadSpec.of(concurrency=32).warm_up_requests == 32
    assert LoadSpec.of(rate=2.0).warm_up_requests == 8
    assert LoadSpec.of(trace="t").warm_up_requests == 0
    assert LoadSpec.of(trace="t", warm_up=3).warm_up_requests == 3

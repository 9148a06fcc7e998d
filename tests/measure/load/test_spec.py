"""The options of a load: their defaults, and what contradicts."""

from __future__ import annotations

import pytest

from turbofit.core.errors import UsageError
from turbofit.measure.load.spec import LoadSpec


def test_contradictions_are_named() -> None:
    for given, says in (
        ({"concurrency": 4, "rate": 2.0}, "--concurrency and --rate"),
        ({"shared_prefix": 300}, "--shared-prefix 300"),
    ):
        with pytest.raises(UsageError, match=says):
            LoadSpec.of(**given).check()


def test_a_window_has_an_end_and_a_warm_up_before_it() -> None:
    for given, window in (
        ({}, (60, 8)),
        ({"requests": 5, "seconds": 2.0}, (2, 8)),
        ({"rate": 2.0, "warm_up": 3}, (60, 3)),
        ({"requests": 5, "concurrency": 32}, (None, 32)),
        ({"rate": 2.0}, (60, 8)),
    ):
        spec = LoadSpec.of(**given)
        assert (spec.measured_seconds, spec.warm_up_requests) == window, given


def test_a_slower_server_gets_the_same_load_slower() -> None:
    load = LoadSpec.of(rate=2.0, seconds=30.0, timeout=10.0).slower(4.0)
    assert (load.rate, load.seconds, load.timeout) == (0.5, 120.0, 40.0)
    load = LoadSpec.of(concurrency=3, requests=5).slower(4.0)
    assert (load.concurrency, load.requests, load.measured_seconds) == (3, 5, None)
    assert LoadSpec.of(concurrency=3).slower(2.0).measured_seconds == 120

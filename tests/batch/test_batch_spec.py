from __future__ import annotations

from contextlib import nullcontext

import pytest

from turbofit.batch.batch_spec import BatchSpec, target_of
from turbofit.core.errors import UsageError
from turbofit.planning.request import PlanRequest


@pytest.mark.parametrize(
    ("given", "url", "message"),
    [
        ({"prompt": "a", "prompt_file": "b"}, "http://x", "--prompt and --prompt-file"),
        ({"patience": 5.0}, None, "--patience is for a server"),
        ({"shrink": True}, "http://x", "--shrink is for a server that is started"),
        ({"allowed_media_domains": ("x",)}, "http://x", "--allowed-media-domains is for a server"),
        ({"pretend": True}, "http://x", "--pretend is for a server that is started"),
        ({"no_rehearse": True}, "http://x", "--no-rehearse is for a server that is started"),
        ({"prompt": "a", "shrink": True, "pretend": True, "no_rehearse": True}, None, None),
        ({"prompt_file": "a", "patience": 1.0, "in_order": True}, "http://x", None),
    ],
)
def test_what_does_not_go_together_is_said(given, url, message) -> None:
    with pytest.raises(UsageError, match=message) if message else nullcontext():
        BatchSpec.of(**given).check(url=url)


def test_a_server_that_runs(monkeypatch) -> None:
    monkeypatch.delenv("TURBOFIT_API_KEY", raising=False)
    assert target_of("http://x", None, None) == ("http://x", None, None, 64, None)
    request = PlanRequest.of(model="m", concurrency=9)
    assert target_of("http://x", "k", request) == ("http://x", "k", "m", 9, None)
    assert target_of(None, None, request).request is request
    monkeypatch.setenv("TURBOFIT_API_KEY", "e")
    assert target_of("http://x", None, PlanRequest.of(model="")).key == "e"


@pytest.mark.parametrize(
    ("url", "key", "given", "message"),
    [
        (None, None, None, "nobody is named who answers"),
        (None, None, {"model": ""}, "nobody is named who answers"),
        (None, "k", {"model": "m"}, "--api-key is for a server"),
        ("x:80", None, None, "x:80 is no address"),
        ("http://x", None, {"model": "m", "max_batch_size": 4}, "--max-batch-size is of a plan"),
    ],
)
def test_what_contradicts_itself_is_said(url, key, given, message) -> None:
    with pytest.raises(UsageError, match=message):
        target_of(url, key, PlanRequest.of(**given) if given else None)

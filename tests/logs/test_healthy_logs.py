"""Healthy logs of every engine: nothing failed in them, whatever they warn of.

Those of 0.18 were printed here or on an H200; those of other releases have the forms that public
threads show (`rules/healthy.txt` names them), with made-up details: only 0.18 can be run here.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.logs.conftest import explain

HERE = Path(__file__).parent
UP = "INFO:     Uvicorn running on http://0.0.0.0:23333 (Press CTRL+C to quit)\n"
COUNTED = (
    "[2026-11-27 21:44:15 DP0] Avg thr (in/out): 9319.6 / 86.3 tokens/s, Server (succeeded/failed/"
    "routed/waiting): 36 / 0 / 1 / 0, Engine (running/waiting): 1 / 0, KV cache: 7.0%, \n"
)


def logs(name: str) -> dict[str, str]:
    """Logs of a file by their headings."""
    parts = (HERE / "rules" / name).read_text(encoding="utf-8").split("=== ")[1:]
    return {head: body for head, _, body in (part.partition("\n") for part in parts)}


LMDEPLOY = {name: log for name, log in logs("healthy.txt").items() if "LMDeploy" in name}


@pytest.mark.parametrize("log", LMDEPLOY.values(), ids=LMDEPLOY)
def test_nothing_failed_in_a_healthy_log(log: str) -> None:
    found = explain(log)
    assert (found.kind, found.phase, found.also) == ("healthy", "none", ())


NCCL = "h:1:1 [0] misc/cudawrap.cc:36 NCCL WARN Cuda failure 3 'initialization error'"


@pytest.mark.parametrize(
    "line",
    [
        "2026-11-27 21:42:14,187 - lmdeploy - WARNING - parser.py:42 - Tokenizer kwarg failed",
        "/v/torch/nn/modules/x.py:9: FutureWarning: the moon is deprecated and will be an error",
        "Loading checkpoint shards:  50%|#####     | 1/2 [00:01<00:01,  1.00s/it]",
        "Retrying (Retry(total=4)) after connection broken by 'ReadTimeoutError': /api/models",
        "2026-11-27 - lmdeploy - WARNING - fallback to eager: flash_attn is not installed",
        "Failed requests: 0",
    ],
)
def test_what_a_server_outlives_is_no_error(line: str) -> None:
    """Before it is up, whatever it says; after it, what has no error's form."""
    for log in (
        f"{UP}{COUNTED}{line}\n{COUNTED}",
        f"{line}\n{UP}{COUNTED}",
        f"{NCCL}\n{UP}{COUNTED}",
    ):
        found = explain(log)
        assert (found.kind, found.also) == ("healthy", ()), found.what


@pytest.mark.parametrize(
    "title",
    [
        "448x448 tiles with lmdeploy",
        "lmdeploy with 512 tokens",
        "lmdeploy 500 requests",
        "没有问题",
    ],
)
def test_a_title_with_a_number_is_no_failure(title: str) -> None:
    assert explain(f"# {title}\n\n```\n{UP}{COUNTED}```\n").kind == "healthy"


@pytest.mark.parametrize(
    "line",
    [
        '2026-01-01 12:00:00,123 INFO:     192.0.2.1:4 - "POST /v1/chat/completions HTTP/1.1" 400',
        '0|lmdeploy | INFO:  192.0.2.1:4 - "POST /v1/chat/completions HTTP/1.1" 500 Internal',
        "< HTTP/1.1 400 Bad Request",
    ],
)
def test_a_request_that_was_refused_is_no_healthy_log(line: str) -> None:
    assert explain(f"{UP}{line}\n").kind == "unknown"

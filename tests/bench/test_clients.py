from __future__ import annotations

import json

from bench.clients.report import Run, report, unexplained
from bench.clients.suites import Seen


def run(plain: dict, gateway: dict) -> Run:
    made = Run(plain=plain, gateway=gateway, when="2026-01-01", seconds=2.0, on="m, g")
    return Run(**json.loads(json.dumps(made.document())))  # as the file keeps it


def test_what_differs_without_a_reason_is_named() -> None:
    runs = {
        "sdk": run(
            {"a | b": Seen("200"), "HEAD /health": Seen("405"), "c": Seen("1")},
            {"a | b": Seen("200"), "HEAD /health": Seen("200"), "c": Seen("X 400", "no c here")},
        )
    }
    assert unexplained(runs) == [("sdk", "c")]
    text = report(runs, ["openai 1"])
    assert "3 checks: 1 alike, 1 different on purpose, 1 different and not\nexplained" in text
    assert "| a \\| b | 200 | 200 |  |" in text
    assert "| c | 1 | X 400 | **not explained**: no c here |" in text
    assert "load balancers" in text


def test_a_check_that_one_server_never_saw_differs() -> None:
    assert run({"a": Seen("1")}, {}).different() == ["a"]

"""Several models on one pretend card: LMDeploy's real servers and engines, real memory."""

from __future__ import annotations

import os
import re
import signal

import pytest

from tests.support.processes import pids
from tests.support.serving import Served, needs, serve_pretend
from tests.support.waiting import until

#: With a stand-in for the engine: `test_serve_models`, `test_run`.
pytestmark = [pytest.mark.lmdeploy, pytest.mark.exhaustive]
needs("lmdeploy", "fastapi", "torchvision")


def ask(served: Served, model: str) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    return served.ask("/v1/chat/completions", body)[0]


@pytest.mark.parametrize("killed", [False, True])
def test_two_share_a_card(killed, children, tmp_path, internvl2, qwen2_vl) -> None:
    """Also where one of them is killed, and starts again."""
    served = serve_pretend(
        children, tmp_path, str(internvl2), str(qwen2_vl), "--on", "1xrtx3060",
        "--context", "4096", "--no-check", TMPDIR=str(tmp_path),
    )  # fmt: skip
    served.wait()
    names = [internvl2.name, qwen2_vl.name]
    listed = served.ask("/v1/models")[2]["data"]
    assert [card["id"] for card in listed if card["id"] == card["root"]] == names
    if killed:
        os.kill(pids(served.child)[0], signal.SIGKILL)
    starts = 2 + killed
    served.child.wait_for("phase: ready", starts)
    tokens = [
        re.search(r"KV tokens: ([\d,]*\d) \(forecast ([\d,]*\d)", line)
        for line in served.child.lines
    ]
    found = [match.groups() for match in tokens if match is not None]
    assert len(found) == starts
    assert [actual for actual, _ in found] == [forecast for _, forecast in found]
    for name in names:  # the gateway hears of a start that is ready a moment later
        until(lambda name=name: ask(served, name) == 200, name)
    assert ask(served, "other") == 404
    served.child.process.send_signal(signal.SIGTERM)
    assert served.child.finish() == 0

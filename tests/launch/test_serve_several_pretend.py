"""Several models on one pretend card: LMDeploy's real servers and engines, real memory."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
from pathlib import Path

import pytest

from tests.support.open_clients import refuses
from tests.support.processes import Child
from tests.support.serving import Served, serve_pretend, told
from tests.support.waiting import HANG, until
from turbofit.core.units import GIB, MIB
from turbofit.pretend.shared import read_shared

pytestmark = [pytest.mark.lmdeploy]
for needed in ("lmdeploy", "fastapi", "torchvision"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"no {needed}", allow_module_level=True)


def ask(served: Served, model: str) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    return served.ask("/v1/chat/completions", body)[0]


def test_two_share_a_card_and_one_starts_again(
    children: list[Child], tmp_path: Path, internvl2: Path, qwen2_vl: Path
) -> None:
    """The second finds the first one's memory taken; a dead one gets its cache again."""
    served = serve_pretend(
        children, tmp_path, str(internvl2), str(qwen2_vl), "--on", "1xrtx3060",
        "--context", "4096", TMPDIR=str(tmp_path),
    )  # fmt: skip
    served.wait()
    names = [internvl2.name, qwen2_vl.name]
    listed = served.ask("/v1/models")[2]["data"]
    assert [card["id"] for card in listed if card["id"] == card["root"]] == names
    (cards,) = tmp_path.glob("turbofit-cards-*/cards")
    record = read_shared(cards)
    alive = [process for process in record.processes if process.alive]
    held = [one.allocated[0] + one.context[0] + one.late[0] for one in alive]
    assert len(alive) == 2
    assert min(held) > GIB
    assert sum(held) <= record.peak[0] + MIB <= 12 * GIB
    os.kill(alive[0].pid, signal.SIGKILL)
    served.child.wait_for("phase: ready", 3)
    tokens = [
        re.search(r"KV tokens: ([\d,]*\d) \(forecast ([\d,]*\d)", line)
        for line in served.child.lines
    ]
    found = [match.groups() for match in tokens if match is not None]
    assert len(found) == 3
    assert [actual for actual, _ in found] == [forecast for _, forecast in found]
    for name in names:  # the gateway hears of a start that is ready a moment later
        until(lambda name=name: ask(served, name) == 200, name)
    assert ask(served, "other") == 404
    served.child.process.send_signal(signal.SIGTERM)
    assert served.child.finish() == 0


@pytest.mark.exhaustive
def test_two_take_turns(
    children: list[Child], tmp_path: Path, internvl2: Path, qwen2_vl: Path
) -> None:
    served = serve_pretend(
        children, tmp_path, str(internvl2), str(qwen2_vl), "--on", "1xrtx3060", "--swap",
        "--idle", "5s",
    )  # fmt: skip
    served.wait()
    assert ask(served, qwen2_vl.name) == 200
    assert any("makes way" in line or "nobody asked" in line for line in served.child.lines)

    def states() -> set[str]:
        return {one["state"] for one in served.ask("/health")[2]["models"].values()}

    until(lambda: states() == {"asleep"}, "both asleep")
    served.child.process.send_signal(signal.SIGTERM)
    assert served.child.finish() == 0


@pytest.mark.exhaustive
def test_a_second_signal_ends_several_models_at_once(
    children: list[Child], tmp_path: Path, internvl2: Path, qwen2_vl: Path
) -> None:
    """Nothing is started again meanwhile."""
    served = serve_pretend(
        children, tmp_path, str(internvl2), str(qwen2_vl), "--on", "1xrtx3060",
        "--context", "8192", "--drain", f"{HANG:.0f}",
    )  # fmt: skip
    served.wait()
    models = (internvl2.name, qwen2_vl.name)
    opened = [pair for model in models for pair in served.streams(model).items()]
    served.child.process.send_signal(signal.SIGINT)
    until(lambda: refuses(served.url), "the drain")
    served.child.process.send_signal(signal.SIGINT)
    assert served.child.finish() == 130
    assert all(told(path, client) for path, client in opened)
    assert served.child.lines[-1] == "ended: 6 open requests were cut off"
    assert "starting again" not in served.child.stderr
    served.clean()

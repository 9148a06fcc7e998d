"""``turbofit serve --pretend`` end to end: LMDeploy's real server and engine, real deaths."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest

from tests.launch.conftest import Child, gone, pids
from tests.launch.pretend import image, serve_pretend

pytestmark = [pytest.mark.lmdeploy]
for needed in ("lmdeploy", "fastapi", "torchvision"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"no {needed}", allow_module_level=True)

EIGHT = ("internvl2-8b", "--on", "1xrtx3090")
QWEN = ("qwen2-vl-7b", "--on", "1xrtx3090", "--max-pixels", "1003520")


def test_internvl2_on_one_card(children: list[Child], tmp_path: Path) -> None:
    """Said everywhere, brought to its planned peak before it opens, and not past it by a client."""
    served = serve_pretend(children, tmp_path, *EIGHT)
    served.wait()
    assert "PRETEND GPUs" in served.child.lines[0]
    status, headers, health = served.ask("/health")
    assert (status, headers["x-turbofit-pretend"], health["pretend"]) == (200, "1", True)
    record = served.record
    assert record["pretend"] is True
    assert record["state"] == "ready"
    (engine,) = record["attempts"][0]["engines"]
    rows = {row["what"]: row for row in engine["beside"]}
    pool = rows["executor pool at most"]
    assert 0.98 <= pool["actual"] / pool["forecast"] <= 1.0
    peak = rows["in use at most"]
    assert 0.99 <= peak["actual"] / peak["forecast"] <= 1.0
    assert rows["KV tokens"]["actual"] == rows["KV tokens"]["forecast"]
    assert {"starting", "weights", "cache", "serving", "check"} <= set(engine["seconds"])
    status, headers, answer = served.chat(image(4480, 4480, max_dynamic_patch=120))
    assert status == 200
    assert headers["x-turbofit-limited"].startswith("max_dynamic_patch=")
    assert headers["x-turbofit-pretend"] == "1"
    assert answer["usage"]["prompt_tokens"] < 13 * 256 + 300
    (engine_pid,) = pids(served.child)
    with open(f"/proc/{engine_pid}/cmdline", "rb") as file:
        assert b"--api-keys" not in file.read()
    served.child.process.send_signal(signal.SIGTERM)
    assert served.child.finish() == 0
    assert gone(engine_pid)
    assert served.record["state"] == "ended"
    assert not (served.run / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "least"),
    [
        (("qwen2.5-0.5b", "--on", "1xrtx3090"), 0.98),
        (("qwen2.5-7b", "--on", "2xl4", "--tp", "2"), 0.98),
        (QWEN, 0.98),
        # Its last tile takes an alignment to one token.
        (("internvl3-8b-hf", "--on", "1xrtx3090"), 0.975),
    ],
)
def test_ready_means_the_planned_peak(
    words: tuple[str, ...], least: float, children: list[Child], tmp_path: Path
) -> None:
    served = serve_pretend(children, tmp_path, *words)
    served.wait()
    (engine,) = served.record["attempts"][0]["engines"]
    pools = [row for row in engine["beside"] if row["what"] == "executor pool at most"]
    assert len(pools) == (2 if "2xl4" in words else 1)
    for pool in pools:
        assert least <= pool["actual"] / pool["forecast"] <= 1.0


@pytest.mark.slow
def test_a_photo_is_lowered_and_answered(children: list[Child], tmp_path: Path) -> None:
    served = serve_pretend(children, tmp_path, *QWEN)
    served.wait()
    status, headers, answer = served.chat(image(3584, 3584))
    assert status == 200
    # What carries no limit of its own is held by the overlay; what does is lowered.
    assert answer["usage"]["prompt_tokens"] < 1003520 // 784 + 300
    status, headers, _ = served.chat(image(3584, 3584, max_pixels=12845056, min_pixels=3136))
    assert status == 200
    assert "max_pixels" in headers["x-turbofit-limited"]
    assert served.ask("/health")[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "part", "call"),
    [
        (EIGHT, image(4480, 4480, max_dynamic_patch=120), "InternVit"),
        (QWEN, image(3584, 3584), "Qwen"),
    ],
)
def test_without_the_gateway_the_same_requests_kill(
    words: tuple[str, ...], part: dict, call: str, children: list[Child], tmp_path: Path
) -> None:
    served = serve_pretend(children, tmp_path, *words, "--no-gateway", "--concurrency", "2")
    served.wait()
    assert "warning: --no-gateway: the plan holds only while" in served.child.stderr
    with pytest.raises((OSError, http.client.HTTPException)):
        served.chat(part)
    # It dies of memory, so that the ladder plans again: more of a margin cannot save it for ever.
    served.child.wait_for("ladder 1/3: the engine ran out of GPU memory while it served", 60)
    died = served.record["attempts"][0]["ended"]
    assert died["kind"] == "out_of_memory"
    assert died["phase"] == "vision"
    assert call in died["where"]
    assert died["missing"] > 0


@pytest.mark.slow
def test_the_ladder_and_what_is_remembered(children: list[Child], tmp_path: Path) -> None:
    taken = ("--pretend-taken", "900MiB")
    first = serve_pretend(children, tmp_path / "a", *EIGHT, *taken)
    first.wait()
    attempts = first.record["attempts"]
    assert len(attempts) == 2
    assert attempts[0]["ended"]["phase"] == "warm-up"
    assert attempts[0]["ended"]["asked"] > attempts[0]["ended"]["left"]
    assert attempts[1]["changes"]["margin"] > 900 << 20
    first.child.process.send_signal(signal.SIGTERM)
    assert first.child.finish() == 0
    (learned,) = (tmp_path / "a" / "turbofit" / "learned").iterdir()
    assert json.loads(learned.read_text())["changes"] == attempts[1]["changes"]
    second = serve_pretend(children, tmp_path / "a", *EIGHT, *taken)
    second.wait()
    assert "beginning with what an earlier launch learned: margin" in second.child.stderr
    assert "ladder 1/3" not in second.child.stderr


@pytest.mark.slow
def test_the_last_rung(children: list[Child], tmp_path: Path) -> None:
    """What the user fixed is not changed: nothing is left but to say how it went."""
    words = ("--cache-max-entry-count", "0.85", "--tp", "1", "--max-prefill-token-num", "4096")
    served = serve_pretend(children, tmp_path, *EIGHT, *words, "--pretend-taken", "900MiB")
    assert served.child.finish(90) == 6
    assert "start  ratio" in served.child.stderr
    assert "0.850" in served.child.stderr
    assert served.record["state"] == "failed"


@pytest.mark.slow
def test_one_of_two_replicas_is_killed(children: list[Child], tmp_path: Path) -> None:
    served = serve_pretend(
        children, tmp_path, "internvl2-8b", "--on", "2xrtx3090", "--replicas", "2"
    )
    served.wait(120)
    served.child.wait_for_more("phase: ready", 2, 120)
    os.kill(pids(served.child)[1], signal.SIGKILL)
    for _ in range(5):
        status, _, _ = served.chat(image(448, 448))
        assert status == 200
    served.child.wait_for_more("engine 1: phase: ready", 2, 60)
    assert served.ask("/health")[0] == 200
    served.child.process.send_signal(signal.SIGTERM)
    assert served.child.finish() == 0
    assert all(gone(pid) for pid in pids(served.child))

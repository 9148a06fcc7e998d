"""``turbofit serve --pretend`` with LMDeploy's PyTorch engine: its server outlives its engine."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.rehearsal.pretend.cuda_torch import CUDA_PATH, ROOT
from tests.support.processes import Child, gone, pids
from tests.support.serving import Served, image, needs, serve_pretend
from tests.support.waiting import until
from turbofit.core.units import MIB

pytestmark = [
    pytest.mark.lmdeploy,
    pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch"),
]
needs("lmdeploy", "fastapi", "torchvision")

MAX_PIXELS = 1003520
QWEN = ("qwen2-vl-2b", "--on", "1xrtx3060", "--engine", "pytorch")
#: The processor computes an image of the checkpoint's own limit for half a minute.
SMALL = (*QWEN, "--max-pixels", f"{MAX_PIXELS}", "--max-batch-size", "8")


def serve(children: list[Child], state: Path, *words: str) -> Served:
    return serve_pretend(children, state, *words, PYTHONPATH=f"{CUDA_PATH}:{ROOT}")


def in_group(group: int) -> bool:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, found, *_ = path.read_text().rpartition(")")[2].split()
            if int(found) == group and state != "Z":
                return True
    return False


def test_qwen2_vl_is_served_as_planned_and_started_again_when_killed(children, tmp_path) -> None:
    served = serve(children, tmp_path, *SMALL)
    served.wait()
    assert "PRETEND GPUs" in served.child.lines[0]
    (engine,) = served.record["attempts"][0]["engines"]
    assert {"starting", "check"} <= set(engine["seconds"])
    (peak,) = [row for row in engine["beside"] if row["what"] == "in use at most"]
    # Torch keeps what it reserved: more than the forecast by half of the margin at most.
    assert 0.95 * peak["forecast"] <= peak["actual"] <= peak["forecast"] + 128 * MIB
    status, headers, answer = served.chat(image(3584, 3584, max_pixels=MAX_PIXELS * 4))
    assert (status, headers["x-turbofit-pretend"]) == (200, "1")
    assert 1200 < answer["usage"]["prompt_tokens"] < 1280 + 64
    assert "max_pixels=" in headers["x-turbofit-limited"]
    *_, server = started = pids(served.child)
    os.kill(server, signal.SIGKILL)
    until(lambda: not in_group(server), "the end of its engine, which is a process of its own")
    served.child.wait_for("phase: starting", len(started) + 1)
    status, headers, _ = served.chat(image(448, 448))
    assert status == 503
    assert int(headers["retry-after"]) > 0
    engine_pid = pids(served.child)[-1]
    served.child.process.send_signal(signal.SIGTERM)
    assert served.child.finish() == 0
    assert gone(engine_pid)

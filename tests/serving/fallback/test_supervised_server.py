"""The fallback engine under the supervisor, behind the gateway: started, asked, killed, stopped."""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from tests.serving.fallback.support import tiny_qwen2_vl
from tests.support.plans import changed
from tests.support.processes import Child, free_port, pids
from tests.support.serving import Served, image
from turbofit.core.errors import UsageError
from turbofit.core.plan import Workload
from turbofit.logs.death import Exit
from turbofit.machine.source import machine_from
from turbofit.memory.transformers.account import Transformers
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.planning.commands import commands, private_commands, read_map
from turbofit.planning.fallback import plan_fallback
from turbofit.planning.resolved_request import ResolvedRequest
from turbofit.serving.engine.engine_log import StartupTracker
from turbofit.serving.engine.launches import port_of
from turbofit.serving.engine.worst_requests import longest_request, worst_request

DRIVER = Path(__file__).with_name("driver.py")


def planned():
    resolved = ResolvedRequest(
        model=preset_model("qwen2-vl-7b"), machine=machine_from("2xrtx3060"), workload=Workload()
    )
    return plan_fallback(resolved, Transformers(), "as asked").document


def test_commands():
    plan = planned()
    (command,) = commands(plan, port=4000)
    assert command.env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert port_of(command) == 4000
    values = dict(pairwise(command.argv))
    assert read_map(values["--device-map"]) == plan.engines[0].device_map
    assert values["--served-name"] == "Qwen/Qwen2-VL-7B-Instruct"
    (private,) = private_commands(plan, [5000], "/models/x", "name")
    assert "/models/x" in private.argv
    assert port_of(private) == 5000
    with pytest.raises(UsageError, match="no device map"):
        commands(changed(plan, device_map=None))
    with pytest.raises(UsageError, match="--x"):
        commands(plan, options=["--x"])


@pytest.mark.parametrize(
    ("lines", "phase"), [([], "weights"), (["INFO:     Uvicorn running on http://x"], "text")]
)
def test_endings_of_torch(lines, phase, tmp_path):
    plan = planned()
    tracker = StartupTracker(plan, plan.engines[0], tmp_path / "log")
    error = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    for line in ["turbofit-fallback: loading weights", *lines, error]:
        tracker.see(line, 1, 0.0)
    end = tracker.death(Exit(1))
    assert (end.kind, end.phase, end.asked) == ("out_of_memory", phase, 2 << 30)
    assert "LMDeploy" not in end.error.message + end.error.hint


@pytest.mark.parametrize(("each", "template"), [(1, 3), (2, 0), (1.25, 10)])
def test_the_longest_request_fills_the_context(each, template):
    plan = planned()
    session = plan.engines[0].settings.session_len

    def count(question):
        return int(len(question.body["prompt"]) // 2 * each) + template

    assert 0.97 * session < count(longest_request(plan.engines[0], "m", None, 0, count)) < session
    worst = worst_request(plan, "m")
    before = json.dumps(worst.body)
    seen = longest_request(plan.engines[0], "m", worst, 8300, count)
    assert json.dumps(worst.body) == before
    parts = seen.body["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "text"]
    assert 0.97 * session < 8300 + len(parts[2]["text"]) // 2 * each < session
    assert longest_request(plan.engines[0], "m", None, 0, lambda _: 0) is None
    assert longest_request(plan.engines[0], "m", worst, session, count) is None


@pytest.mark.lmdeploy
@pytest.mark.slow
@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("transformers", "accelerate", "fastapi")),
    reason="needs Transformers' server",
)
def test_a_session(tmp_path, children):
    folder = tiny_qwen2_vl(tmp_path / "Qwen2-VL")
    resolved = ResolvedRequest(
        model=resolve_model(str(folder)), machine=machine_from("1xrtx3090"),
        workload=Workload(context=1024), image_limit=100352,
    )  # fmt: skip
    plan = plan_fallback(resolved, Transformers(), "as asked").document
    assert plan.fits
    plan = changed(plan, device_map=dict.fromkeys(plan.engines[0].device_map, "cpu"))
    (tmp_path / "plan.json").write_text(plan.to_json())
    port = free_port()
    child = Child(
        [sys.executable, str(DRIVER), str(tmp_path / "plan.json"), str(port)],
        XDG_STATE_HOME=str(tmp_path / "state"), TURBOFIT_LEASES=str(tmp_path / "leases"),
    )  # fmt: skip
    children.append(child)
    child.wait_for("OPEN")
    for phase in ("weights", "serving", "check", "ready"):
        assert f"phase: {phase}" in child.stderr
    served = Served(child, port, tmp_path / "state")
    status, _, answer = served.chat(image(448, 448), temperature=0)
    assert status == 200, answer
    # Lowered by the model folder: 100352 pixels are 512 patches, 128 tokens at most.
    assert answer["usage"]["prompt_tokens"] < 128 + 32
    status, _, answer = served.chat({"type": "text", "text": "a" * 2000})
    assert (status, "error" in answer) == (400, True)
    child.wait_for("PULSE", sum("PULSE" in line for line in child.lines) + 3)
    assert served.ask("/health")[0] == 200
    os.kill(pids(child)[0], signal.SIGKILL)
    child.wait_for("starting again")
    child.process.send_signal(signal.SIGTERM)
    assert child.finish() == 0
    assert "ended SIGTERM" in child.stderr

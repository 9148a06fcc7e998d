"""Runs of `serve`: starts, the ladder between them, signals and ends; the engine is a stand-in."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from itertools import permutations
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tests.support.open_clients import OpenClient
from tests.support.plans import plausible_plan
from tests.support.processes import REPO, Child, alive, gone, pids, standby_beside
from tests.support.serving import LONG, MESSAGES, ask_at
from tests.support.waiting import until
from turbofit.core.messages import BESIDE_COMMANDS
from turbofit.planning import checks
from turbofit.report.stored_documents import read_saved
from turbofit.serving.engine.lmdeploy import Lmdeploy
from turbofit.serving.leases import Leases, end_orphans
from turbofit.serving.options import ServeConfig
from turbofit.serving.run import Run

pytestmark = pytest.mark.slow

#: The command line; what stands by would become LMDeploy's own server.
PRETENDS = ("serve", "internvl2-8b", "--on", "1xrtx3090", "--pretend", "--no-standby")
DRIVER = REPO / "tests" / "support" / "session_driver.py"


@pytest.fixture
def session(tmp_path: Path, port: int, children: list[Child]):
    """Start a session; ``script`` says what each start of the engine does."""

    def run(script: str, on: str = "1xrtx3090", **given: Any) -> Child:
        child = Child(
            [sys.executable, str(DRIVER), on, str(port), json.dumps(given)],
            STANDIN_SCRIPT=script,
            STANDIN_COUNT=str(tmp_path / "count"),
            XDG_STATE_HOME=str(tmp_path / "state"),
            TURBOFIT_LEASES=str(tmp_path / "leases"),
        )
        children.append(child)
        return child

    return run


def last_run(tmp_path: Path) -> Path:
    return max((tmp_path / "state" / "turbofit" / "runs").iterdir())


def record(tmp_path: Path) -> Any:
    return json.loads((last_run(tmp_path) / "run.json").read_text())


def terminate(child: Child) -> None:
    child.process.send_signal(signal.SIGTERM)
    assert child.finish() == 0


def test_one_rung_helps_and_the_next_start_begins_with_it(session, tmp_path: Path) -> None:
    child = session("hang,serve")
    child.wait_for("OPEN")
    assert "ladder 1/3: the warm-up did not fit: max_prefill_token_num" in child.stderr
    assert "the worst-case requests will take about" in child.stderr
    terminate(child)
    attempts = record(tmp_path)["attempts"]
    first, second = (attempt["settings"][0]["max_prefill_token_num"] for attempt in attempts)
    assert second == first // 2
    assert (attempts[0]["ended"]["kind"], attempts[0]["ended"]["phase"]) == ("hang", "warm-up")
    assert attempts[1]["changes"] == {"max_prefill_token_num": second}
    saved = read_saved(str(last_run(tmp_path)))
    assert saved.plan.engines[0].settings.max_prefill_token_num == second
    # What a plan asks of whoever serves it is not asked of `serve`.
    assert [text for text in saved.plan.warnings if text.startswith(BESIDE_COMMANDS)]
    assert "are not planned for" not in child.stderr
    assert saved.run is not None
    phases = [moment.phase for moment in saved.run.attempts[1].moments]
    assert phases[0] in ("starting", "weights", "cache", "warm-up", "serving")  # the first seen
    assert phases[-1] == "ready"
    again = session("serve")
    again.wait_for("OPEN")
    assert f'learned {{"max_prefill_token_num": {second}}}' in again.stderr
    # The plan that was proved is not checked again.
    assert "checked on 20" in again.stderr
    assert "the worst-case requests will take about" not in again.stderr
    terminate(again)
    assert record(tmp_path)["attempts"][0]["settings"][0]["max_prefill_token_num"] == second


@pytest.mark.parametrize(
    ("script", "replan", "code", "starts", "words"),
    [
        ("oom_image", True, 6, 4, "out of memory after 4 starts"),
        # A plan that was given is not changed.
        ("hang", False, 3, 1, "hangs in its warm-up"),
        pytest.param("oom_image", False, 6, 1, "out of GPU memory", marks=pytest.mark.exhaustive),
        # A broken engine is no lack of memory. Of each kind: `engine/test_engine_log`.
        pytest.param("check_failed", True, 5, 1, "engine-0.log", marks=pytest.mark.exhaustive),
    ],
)
def test_after_the_last_rung(script, replan, code, starts, words, session, tmp_path: Path) -> None:
    child = session(script, **({} if replan else {"replan": "none"}))
    assert child.finish() == code
    assert words in child.lines[-1]
    assert ("ladder 1/3" in child.stderr) == (starts > 1)
    assert all(gone(pid) for pid in pids(child))
    document = record(tmp_path)
    assert (document["state"], len(document["attempts"])) == ("failed", starts)


def test_an_engine_that_ends_while_it_serves_is_in_the_record(session, tmp_path: Path) -> None:
    child = session("dies_later,serve")
    child.wait_for("OPEN")
    os.kill(pids(child)[0], signal.SIGUSR1)
    child.wait_for("OPEN", 2)
    ended = record(tmp_path)["attempts"][0]["ended"]
    assert (ended["kind"], ended["phase"]) == ("out_of_memory", "vision")
    checks = sum("phase: check" in line for line in child.lines)
    os.kill(pids(child)[-1], signal.SIGKILL)
    child.wait_for("phase: ready", 3)
    # What was checked once is not checked beside clients: that would be more than was planned for.
    assert sum("phase: check" in line for line in child.lines) == checks
    terminate(child)
    document = record(tmp_path)
    assert "so somebody did it" in document["events"][-1]["text"]
    assert document["attempts"][-1]["restarts"] == 1


@pytest.mark.parametrize(
    ("script", "line"),
    [
        pytest.param("slow", "phase: starting", marks=pytest.mark.exhaustive),
        ("stuck", "phase: warm-up"),
        ("slow_image", "phase: check"),
        pytest.param("serve", "OPEN", marks=pytest.mark.exhaustive),
    ],
)
def test_a_signal_in_each_phase(script: str, line: str, session, tmp_path: Path) -> None:
    child = session(script, timing={"drain": 3600.0})
    child.wait_for(line)
    number = signal.SIGINT if script == "stuck" else signal.SIGTERM
    child.process.send_signal(number)
    assert child.finish() == 0
    assert f"ended {number.name}" in child.stderr
    assert all(gone(pid) for pid in pids(child))
    assert record(tmp_path)["state"] == "ended"
    assert list((tmp_path / "leases").glob("*.json")) == []


def processes_of(folder: Path) -> set[int]:
    """Living processes in whose environment a test's folder is."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.fsencode(folder) in (process / "environ").read_bytes():
                found.add(int(process.name))
    return {pid for pid in found if alive(pid)}


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(order, id="-".join(order), marks=pytest.mark.exhaustive if number else ())
        for number, order in enumerate(permutations(("server", "standby", "engine")))
    ],
)
def test_kills_in_every_order_leave_no_process_and_no_lease(
    order: tuple[str, ...], session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the server, what stands by, and the engine, whoever becomes the next one meanwhile."""
    child = session("serve", standby=True)
    child.wait_for("OPEN")
    standby = until(lambda: standby_beside(child), "a standby")
    roles = {"server": child.process.pid, "standby": standby, "engine": pids(child)[0]}
    for role in order:
        with suppress(ProcessLookupError):
            os.kill(roles[role], signal.SIGKILL)
    child.finish()
    until(lambda: not processes_of(tmp_path), "all of its processes to be gone")
    monkeypatch.setenv("TURBOFIT_LEASES", str(tmp_path / "leases"))
    with Leases() as leases:
        end_orphans(leases)
    assert list((tmp_path / "leases").glob("*.json")) == []


#: ``turbofit serve`` that gives up on what is silent for two seconds.
IMPATIENT = """
import sys
from msgspec.structs import replace
from turbofit.cli.main import main
from turbofit.serving import start

usual = start.Supervision
start.Supervision = lambda say, exam, timing, **given: usual(
    say, exam, replace(timing, silence=2.0), **given
)
sys.exit(main(sys.argv[1:]))
"""


def test_what_waits_for_an_engine_that_hangs_is_told_and_it_is_started_again(
    tmp_path: Path, port: int, children: list[Child]
) -> None:
    """It is stopped in the middle of an answer; who asks before it is ended is told at once."""
    words = (*PRETENDS, "--port", str(port))
    child = Child(
        [sys.executable, "-c", IMPATIENT, *words, "-v"], XDG_STATE_HOME=str(tmp_path / "state"),
        TURBOFIT_LEASES=str(tmp_path / "leases"), STANDIN_PACE="0.05",
    )  # fmt: skip
    children.append(child)
    assert child.process.stdout is not None
    url = child.process.stdout.readline().strip()
    assert url, child.stderr
    body = {"model": "InternVL2-8B", "messages": MESSAGES, "max_tokens": LONG}
    client = OpenClient(url, "/v1/chat/completions", body)

    def in_flight() -> bool:
        with urlopen(f"{url}/metrics") as page:
            return b'turbofit_gateway_in_flight{engine="0"} 1' in page.read()

    until(in_flight, "it to be at the engine")
    os.kill(pids(child, "phase: starting")[0], signal.SIGSTOP)
    child.wait_for("engine 0 is in doubt")
    status, headers, answer = ask_at(url, "/v1/chat/completions", body)
    assert (status, answer["error"]["code"]) == (503, "engine_unavailable")
    assert 1 <= int(headers["retry-after"]) <= 60
    child.wait_for("warning: [")
    assert "the engine hangs: it owes answers and gives no sign of life" in child.stderr
    client.wait_for(b"engine_died")
    child.wait_for("phase: ready", 2)
    until(lambda: ask_at(url, "/health")[0] == 200, "it to serve")
    terminate(child)


@pytest.mark.parametrize("pretend", [False, True])
def test_what_a_launch_is_warned_of_is_said_unless_the_plan_says_it(
    pretend: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBOFIT_LEASES", str(tmp_path))
    monkeypatch.setattr(checks, "refuse", lambda _: ["of the plan", "of this launch"])
    plan, said = plausible_plan(warnings=("of the plan",)), list[str]()
    with Leases() as leases:
        config = ServeConfig(plan=plan, pretend=pretend)
        run = Run(config, leases, said.append, lmdeploy=Lmdeploy("0.18.0", ("never-run",)))
        run.plan = plan
        assert run.checked_plan() is plan
    assert said == ["warning: of this launch"]

"""A rehearsal's child, as its parent sees it: how far it is, its log, its document."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from turbofit.rehearsal import run
from turbofit.rehearsal.engines import REHEARSED_ENGINES
from turbofit.rehearsal.planned import moments, outcome_and_end
from turbofit.rehearsal.pretend.scenario import PretendGpu, Scenario
from turbofit.rehearsal.run import Readings
from turbofit.rehearsal.spec import Spec
from turbofit.rehearsal.turbomind import readings, server

Patch = pytest.MonkeyPatch


def test_work_is_not_inactivity() -> None:
    now, value = 0.0, 0
    timer = run.InactivityTimer(lambda: value, lambda: now)
    now = 100.0
    assert timer.inactive() == 100
    value = 1  # it moved at last
    assert timer.inactive() == 0
    now = 130.0
    assert timer.inactive() == 30
    assert timer.elapsed() == 130


def test_a_log_is_read_without_what_a_hang_repeats(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stuck = "x out of memory at 0/1\n"
    log.write_text("[TM][INFO] Object cache budget: 1 MB\n" + stuck * 3000)
    assert run._is_stuck(log)
    assert len(run.read_log(log)) < 60
    log.write_text(stuck * 3000 + "50%\r99%\r[TM][FATAL] CUDA error: out of memory\n")
    assert run.read_log(log)[-1] == "[TM][FATAL] CUDA error: out of memory"
    log.write_text("going on\n" + stuck * 3000 + "going on\n" * 2)
    assert not run._is_stuck(log)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_child_that_was_told_to_end_did_not_fail(
    number: signal.Signals, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Whoever ends turbofit ends its child: nothing was seen of the engine's own end."""
    ended = SimpleNamespace(code=-number, usages=())
    monkeypatch.setattr(run, "run_pretend", lambda *_, **__: ended)
    with pytest.raises(KeyboardInterrupt):
        run.run_child(Spec(Scenario(()), str(tmp_path)), tmp_path, {}, ())


def card(**phases: tuple[int, int]) -> dict[str, dict[str, Any]]:
    spans = {name.replace("_", " ", 1): span for name, span in phases.items()}
    return {name: {"peak": peak, "held": held} for name, (peak, held) in spans.items()}


def test_what_is_charged_to_a_card_is_in_use_when_the_account_says_so() -> None:
    held = card(weights=(90, 80), cache=(180, 180), case_vision_request=(190, 185))
    seen = moments([held], [PretendGpu("x", 2000, used=1000, late=50)])
    assert [(one.phase, one.peak, one.end) for one in seen] == [
        ("weights", (1090,), (1080,)),
        ("cache", (1230,), (1230,)),  # the question how much is free came first
        ("case vision_request", (1240,), (1235,)),
    ]
    assert [one.image for one in seen] == [False, False, True]
    # A card without a phase stays as it was.
    first = card(weights=(90, 80), cache=(180, 180), ready=(180, 180))
    seen = moments([first, card(weights=(70, 60), ready=(160, 150))], [PretendGpu("x", 2000)] * 2)
    assert [one.phase for one in seen] == ["weights", "cache", "ready"]
    assert [one.peak for one in seen] == [(90, 70), (180, 60), (180, 160)]
    assert [one.end for one in seen] == [(80, 60), (180, 60), (180, 150)]
    # A start that died ends where it died.
    seen = moments([card(**{"import": (0, 0)})], [PretendGpu("x", 2000, used=7)])
    assert [(one.phase, one.peak, one.end) for one in seen] == [("import", (7,), (7,))]


def ended(code: int = 0, stopped: str = "", **told: Any) -> Any:
    return SimpleNamespace(notes=told, ran=SimpleNamespace(code=code), stopped=stopped)


def seen(**end: Any) -> Readings:
    return Readings([], [], {}, [], {"phase": "context", "where": "Check failed", **end})


def case(**statuses: int) -> dict[str, Any]:
    return {"name": "a", "statuses": statuses}


@pytest.mark.parametrize(
    ("run", "outcome", "where"),
    [
        (ended(done=True, cases=[case(finished=3)]), "served", None),
        # A prompt that the engine refuses is an answer, too.
        (ended(done=True, cases=[case(too_long=1)]), "served", None),
        (ended(-9, "idle"), "hang", "nothing happened any more"),
        (ended(done=True, cases=[case(**{"not finished": 1})]), "hang", "not finished in time"),
        (ended(done=True, cases=[case(unavailable=1)]), "failed", "Check failed"),
        (ended(1, error={"type": "AssertionError"}), "failed", "Check failed"),
        (ended(-6), "failed", "Check failed"),
    ],
)
def test_how_it_ended(run: Any, outcome: str, where: str | None) -> None:
    found, end = outcome_and_end(run, seen(kind="crash"))
    assert found == outcome
    assert (end.where if end else None) == where


def test_an_end_after_a_refused_allocation_is_out_of_memory() -> None:
    sizes = {"asked": 9, "left": 4, "missing": 5}
    refused = seen(kind="out_of_memory", phase="warm-up", where="Attn", **sizes)
    outcome, end = outcome_and_end(ended(-6), refused)
    assert outcome == "out_of_memory"
    assert end is not None
    assert (end.kind, end.phase, end.where, end.missing) == ("out_of_memory", "warm-up", "Attn", 5)


def test_turbominds_silent_hang_refuses_nothing_that_matters() -> None:
    ledger: Any = SimpleNamespace(deaths=[{"phase": "weights", "asked": 9}], phases=["engine"])
    for stopped, outcome in (("stuck", "hang"), ("idle", "out_of_memory")):
        run = ended(-9, stopped)
        run.log = ["out of memory at 0/1"]
        assert outcome_and_end(run, seen(**readings.end_of(run, ledger)))[0] == outcome


def test_a_turbomind_that_dies_after_a_wait_did_not_hang() -> None:
    ledger: Any = SimpleNamespace(deaths=[], phases=["engine"])
    wait = "[TM][INFO][scheduler.cc:1186] out of memory at 0/1"
    fatal = "[TM][FATAL][allocator.cc:9] CUDA error: out of memory"
    for log, kind in (([wait], "crash"), ([fatal, wait], "out_of_memory"), ([], "crash")):
        run = ended(-9)
        run.log = log
        end = readings.end_of(run, ledger)
        assert (end["kind"], end["where"]) == (kind, (log or [""])[0])
        assert outcome_and_end(run, seen(**end))[0] == kind.replace("crash", "failed")
    lines = "CUDA error: out of memory\nCUDA kernel errors might be late"
    run = ended(1, error={"type": "AcceleratorError", "message": lines, "frames": []})
    run.log = [wait]
    assert readings.end_of(run, ledger)["kind"] == "out_of_memory"


def test_a_server_that_is_started_alone_says_how_it_is_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: Patch
) -> None:
    monkeypatch.delenv("TURBOFIT_PRETEND_MACHINE", raising=False)
    assert server.main(["serve"]) == 2
    assert "turbofit serve --pretend" in capsys.readouterr().err
    assert "LD_PRELOAD" not in os.environ


def test_its_ranks_join_no_ray_that_runs_here(tmp_path: Path, monkeypatch) -> None:
    """The workers of a cluster have real GPUs."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for name in ("pytorch", "transformers"):
        env = run._environment(tmp_path, REHEARSED_ENGINES[name].environ, ())
        assert env["RAY_ADDRESS"] == "local"

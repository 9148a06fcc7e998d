"""A rehearsal's child, as its parent sees it: how far it is, its log, its end."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from turbofit.rehearsal import run
from turbofit.rehearsal.engines import REHEARSED_ENGINES
from turbofit.rehearsal.pretend.scenario import Scenario
from turbofit.rehearsal.spec import Spec

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
    ended = SimpleNamespace(code=-number)
    monkeypatch.setattr(run, "run_pretend", lambda *_, **__: ended)
    with pytest.raises(KeyboardInterrupt):
        run.run_child(Spec(Scenario(()), str(tmp_path)), tmp_path, {}, ())


def test_its_ranks_join_no_ray_that_runs_here(tmp_path: Path, monkeypatch) -> None:
    """The workers of a cluster have real GPUs."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for name in ("pytorch", "transformers"):
        env = run._environment(tmp_path, REHEARSED_ENGINES[name].environ, ())
        assert env["RAY_ADDRESS"] == "local"

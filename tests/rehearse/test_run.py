"""A rehearsal's child, as its parent sees it: how far it is, whether it hangs, its log."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from turbofit.core.process.progress import Step, listened
from turbofit.pretend.scenario import Scenario
from turbofit.rehearse import run
from turbofit.rehearse.notes import Notes, read_notes
from turbofit.rehearse.spec import Spec


def test_how_far_the_child_is_told(tmp_path: Path) -> None:
    spec: Any = SimpleNamespace(cases=("first", "second"))
    heard: list[Step | None] = []
    run._tell(spec, {})  # nobody listens
    with listened(heard.append):
        run._tell(spec, read_notes(tmp_path))
        notes = Notes(tmp_path)
        notes.enter("ready")
        run._tell(spec, read_notes(tmp_path))
        notes.enter("case first")
        run._tell(spec, read_notes(tmp_path))
        notes.data["cases"].append({"name": "first"})
        notes.enter("case second")
        run._tell(spec, read_notes(tmp_path))
    starting = Step("starting the engine on pretend GPUs")
    cases = [Step("rehearsing worst cases on pretend GPUs", done, 2) for done in (0, 1)]
    assert heard == [starting, starting, *cases]


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
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever ends turbofit ends its child: nothing was seen of the engine's own end."""
    ended = SimpleNamespace(code=-number, usages=())
    monkeypatch.setattr(run, "run_pretend", lambda *_, **__: ended)
    with pytest.raises(KeyboardInterrupt):
        run.run_child(Spec(Scenario(()), str(tmp_path)), tmp_path, {}, ())

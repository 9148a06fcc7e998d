"""What a calibration learns, keeps and tells, and what it goes on with."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.measure.test_calibrator import PLAN, STEPS, driven
from turbofit.cli.main import main
from turbofit.core.units import MIB
from turbofit.measure import calibrate
from turbofit.planning import calibrations
from turbofit.planning.request import PlanRequest
from turbofit.report.views.measured_view import calibration_view
from turbofit.serving import ladder
from turbofit.serving.proved import Learned

pytestmark = pytest.mark.usefixtures("state")


def test_what_was_learned_is_kept_for_plans_on_such_cards() -> None:
    result = calibrate.learned(PLAN, driven().observations, {}, lmdeploy="0.18.0", pretend=False)
    assert result["why_not"] is None
    assert [row["phase"] for row in result["phases"]] == ["context and weights", "cache", *STEPS]
    (known,) = calibrations.with_calibrations(PLAN.machine, pretend=False).calibrations
    assert known.lmdeploy == "0.18.0"
    assert [json.loads(Path(path).read_text())["phases"] for path in result["kept"]] == [
        json.loads(json.dumps(result["phases"]))
    ]
    assert "PRETEND" not in str(calibration_view(result))
    pretended = str(calibration_view({**result, "pretend": True}))
    assert "later plans on pretend GPUs use this" in pretended


def test_what_was_calibrated_is_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate.learned(PLAN, driven().observations, {}, lmdeploy="0.18.0", pretend=True)
    words = ["calibrate", "internvl2-8b", "--on", "1xrtx3090", "--pretend", "--forget"]
    assert main(words) == 0
    assert "forgot 1 document" in capsys.readouterr().err
    assert calibrations.recall(pretend=True) == ()


@pytest.mark.parametrize(
    ("given", "chosen"), [({}, 2), ({"apart": True}, 1), ({"pretend": True}, 1)]
)
def test_speeds_are_measured_before_the_engines_start_and_planned_with(
    given: dict[str, bool], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StartedError(Exception):
        pass

    def begin() -> None:
        raise StartedError

    plans: list[str] = []
    run = SimpleNamespace(
        choose=lambda: plans.append("made") or PLAN, checked_plan=lambda: PLAN, begin=begin
    )
    monkeypatch.setattr(calibrate, "Run", lambda *_, **__: run)
    asked: list[Any] = []
    monkeypatch.setattr(calibrate, "measure_speeds", lambda _, gpus, __: asked.append(gpus) or True)
    config: Any = SimpleNamespace(
        pretend=given.get("pretend", False), plan=PLAN, request=PlanRequest(model="m", on="1xl4")
    )
    apart = given.get("apart", False)
    with pytest.raises(StartedError):
        calibrate.calibrate(config, SimpleNamespace(), print, apart=apart)
    assert (len(plans), asked) == (chosen, [[0]] * (chosen - 1))


def test_what_restarts_learned_is_dropped_only_where_something_was_missing() -> None:
    ladder.learned_file(PLAN, "0.18.0", pretend=False).write(Learned(changes={"margin": 7}))
    less = {"calibrations": [{"context": -5, "buffers": 3}], "kept": ["file"]}
    more = {"calibrations": [{"context": -5, "buffers": 9}], "kept": ["file"]}
    assert not calibrate.relieve(PLAN, less, "0.18.0", pretend=False)
    assert not calibrate.relieve(PLAN, {**more, "kept": []}, "0.18.0", pretend=False)
    assert not calibrate.relieve(PLAN, more, "0.18.0", pretend=True)
    assert ladder.recall(PLAN, "0.18.0", pretend=False) == {"margin": 7}
    assert calibrate.relieve(PLAN, more, "0.18.0", pretend=False)
    assert ladder.recall(PLAN, "0.18.0", pretend=False) == {}


def test_what_was_measured_is_told_where_nothing_is_learned(monkeypatch) -> None:
    """The disk does not take it, or somebody else's memory moved."""
    seen = driven().observations

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def moved(_: Any) -> Any:
        return 200 * MIB

    for place, answer, before, told in (
        ("turbofit.core.process.files._created", full, {}, "cannot be written: No space left"),
        ("turbofit.measure.calibrate.used_now", moved, {0: 0}, "200 MiB more in use than before"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, answer)
            result = calibrate.learned(PLAN, seen, before, lmdeploy="0.18.0", pretend=False)
        assert told in result["why_not"]
        assert result["kept"] == []
        assert result["calibrations"]
        assert calibrations.recall(pretend=False) == ()
        assert "nothing was learned" in str(calibration_view(result))

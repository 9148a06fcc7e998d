from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.support.plans import plausible_plan
from turbofit.launch.serve.ladder import forget, recall, remember


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def test_kept_for_the_same_kind_of_start_only() -> None:
    plan = plausible_plan(gpus=1, tp=1)
    assert recall(plan, "0.18.0", pretend=False) == {}
    remember(plan, "0.18.0", pretend=False, changes={"margin": 5}, why="w")
    assert recall(plan, "0.18.0", pretend=False) == {"margin": 5}
    assert recall(plan, "0.18.1", pretend=False) == {}
    assert recall(plan, "0.18.0", pretend=True) == {}
    assert recall(plausible_plan(gpus=2, tp=1), "0.18.0", pretend=False) == {}
    other = msgspec.structs.replace(plan.model, name="other", hub_id="a/other")
    assert recall(msgspec.structs.replace(plan, model=other), "0.18.0", pretend=False) == {}
    assert forget(plan, "0.18.0", pretend=False)
    assert not forget(plan, "0.18.0", pretend=False)
    assert recall(plan, "0.18.0", pretend=False) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "x", "changes": {"a": 1}}'])
def test_a_broken_file_is_no_memory(text: str, state: Path) -> None:
    plan = plausible_plan(gpus=1, tp=1)
    remember(plan, "0.18.0", pretend=False, changes={"margin": 5}, why="")
    (path,) = (state / "turbofit" / "learned").iterdir()
    path.write_text(text)
    assert recall(plan, "0.18.0", pretend=False) == {}


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/none")
    plan = plausible_plan(gpus=1, tp=1)
    remember(plan, "0.18.0", pretend=False, changes={"margin": 5}, why="")
    assert recall(plan, "0.18.0", pretend=False) == {}
    assert not forget(plan, "0.18.0", pretend=False)

"""Calibrations and tunings on disk: real and pretend apart, for the same cards and LMDeploy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.plans import machine
from turbofit.core.machine import Calibration, Machine
from turbofit.core.tuning import Tuning
from turbofit.machine.learned import forget
from turbofit.planning import calibrations, tuned


def installs(monkeypatch, **versions: str) -> None:
    """Packages beside us; all others are not there."""
    monkeypatch.setattr(calibrations, "installed", lambda *names: versions.get(names[0]))


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    installs(monkeypatch, lmdeploy="0.18.0")
    return tmp_path / "turbofit"


ONE = Calibration(
    model="m (A, 1)", engine="turbomind", engine_version="0.18", lmdeploy="0.18.0",
    gpus=("NVIDIA GeForce RTX 3090",), driver="570.1", communicator="nccl",
    when="2026-11-20T00:00:00+00:00", context=-5, buffers=7,
)  # fmt: skip


HERE = machine(1, driver="570.1")


def known(on: Machine = HERE) -> tuple[Calibration, ...]:
    return calibrations.with_calibrations(on, pretend=False).calibrations


def test_what_is_kept_comes_back_on_such_a_machine_and_no_other() -> None:
    assert calibrations.with_calibrations(HERE, pretend=False) == HERE
    path = calibrations.keep(ONE, {"phases": [1]})
    assert known() == (ONE,)
    assert json.loads(path.read_text())["phases"] == [1]
    assert not known(replace(HERE, driver="1"))
    assert not known(replace(HERE, gpus=(replace(HERE.gpus[0], name="NVIDIA L4"),)))
    newer = replace(ONE, when="2026-11-21T00:00:00+00:00", context=1)
    assert calibrations.keep(newer, {}) == path
    assert calibrations.recall(pretend=False) == (newer,)


def test_a_later_measurement_tells_how_far_they_lie_apart() -> None:
    assert calibrations.completed(ONE) == ONE  # there is nothing to compare with
    path = calibrations.keep(ONE, {})
    later = replace(ONE, context=-9, buffers=31)
    assert calibrations.completed(later).spread == 20
    assert calibrations.completed(replace(later, spread=50)).spread == 50
    path.write_text("{")
    assert calibrations.completed(later) == later


def test_another_lmdeploy_has_learned_nothing(monkeypatch) -> None:
    snapshot = replace(HERE, calibrations=(ONE,))
    assert known(snapshot) == (ONE,)  # it has its own where nothing is kept here
    calibrations.keep(ONE, {})
    installs(monkeypatch, lmdeploy="0.18.1")
    assert not known()
    assert known(snapshot) == (ONE,)
    installs(monkeypatch)
    assert known()


@pytest.mark.parametrize("package", ["torch", "nvidia-cuda-runtime"])
def test_another_torch_or_cuda_has_learned_nothing(monkeypatch, package: str) -> None:
    installs(monkeypatch, **{package: "1"})
    made = calibrations.completed(ONE)
    assert "1" in (made.torch, made.cuda)
    calibrations.keep(made, {})
    assert known() == (made,)
    installs(monkeypatch, **{package: "2"})
    assert not known()
    calibrations.keep(calibrations.completed(ONE), {})
    assert len(calibrations.recall(pretend=False)) == 2  # each is kept for its own
    installs(monkeypatch)
    assert len(known()) == 2


def test_pretend_ones_never_reach_a_real_plan(state: Path) -> None:
    pretend = replace(ONE, pretend=True)
    path = calibrations.keep(pretend, {})
    assert calibrations.recall(pretend=False) == ()
    assert calibrations.recall(pretend=True) == (pretend,)
    # Even where somebody moves the file.
    real = state / "learned" / path.parent.name
    real.mkdir(parents=True)
    (real / path.name).write_bytes(path.read_bytes())
    assert calibrations.recall(pretend=False) == ()
    path = tuned.keep_tuned(replace(TUNED, pretend=True))
    assert tuned.recall_tuned(pretend=False) == ()
    path.rename(real / path.name)
    assert tuned.recall_tuned(pretend=False) == ()


def test_damaged_files_are_as_good_as_none_and_forgotten_ones_are_gone(state: Path) -> None:
    folder = calibrations.keep(ONE, {}).parent
    (folder / "calibration-x.json").write_text("{")
    (folder / "calibration-y.json").write_text('{"schema": "turbofit.calibration/1"}')
    assert calibrations.recall(pretend=False) == (ONE,)
    assert forget("another", pretend=False) == forget(ONE.model, pretend=True) == 0
    assert forget(ONE.model, pretend=False) == 3
    assert calibrations.recall(pretend=False) == ()


TUNED = Tuning(
    turbofit_version="0", created="2026-11-20T00:00:00+00:00", model="m (A, 1)",
    gpus=("NVIDIA GeForce RTX 3090",), driver="570.1", lmdeploy="0.18.0", promise={"images": 2},
    load={"image_size": [[64, 64]]}, goal="throughput", slo={},
)  # fmt: skip


def test_the_same_kind_replaces_and_another_stays() -> None:
    path = tuned.keep_tuned(TUNED)
    newer = replace(TUNED, created="2026-11-21T00:00:00+00:00")
    assert tuned.keep_tuned(newer) == path
    assert tuned.recall_tuned(pretend=False) == (newer,)
    other = replace(TUNED, lmdeploy="0.19.0")
    tuned.keep_tuned(other)
    assert tuned.recall_tuned(pretend=False) == (newer, other)

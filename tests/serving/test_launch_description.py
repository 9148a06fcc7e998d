"""What the engines of a start are launched with: cache ratios, keys, folders and commands."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from tests.support.plans import changed, plausible_plan
from turbofit.core.plan import Plan
from turbofit.core.units import GIB
from turbofit.gateway.config import GatewayConfig
from turbofit.rehearsal.plan_clock import ClockChoice
from turbofit.serving import launch_description
from turbofit.serving.engine.launches import KEY, ratio_now, shared_ratio
from turbofit.serving.launch_description import LaunchDescription, ratio_of
from turbofit.serving.options import ServeConfig

PLAN = plausible_plan(gpus=1, tp=1)
#: With a budget that leaves a gibibyte of the card to others.
HALF = changed(PLAN, ledgers=tuple(replace(gpu, withheld=GIB) for gpu in PLAN.ledgers))
#: With smaller images than the checkpoint's own limit, which need a folder of their own.
SMALL = changed(PLAN, limits=replace(PLAN.promise.limits, max_dynamic_patch=4))


@pytest.mark.parametrize(
    ("plan", "fixed", "expected"),
    [
        (PLAN, {}, ratio_now),
        (HALF, {}, shared_ratio),
        (PLAN, {"cache_max_entry_count": 0.5}, None),
    ],
)
def test_a_start_gets_a_ratio_where_others_may_be_on_its_cards(plan, fixed, expected: Any) -> None:
    ratio: Any = ratio_of(plan, 0, fixed)
    assert (ratio and ratio.func) is expected


def described(folder: Path, plan: Plan = PLAN, **options: Any) -> LaunchDescription:
    """The description of a first start on pretend GPUs, whose run is in ``folder``."""
    run: Any = SimpleNamespace(
        config=ServeConfig(pretend=True, **options), folder=folder, fixed={}, examiner=None,
        standby=None, say=lambda _: None,
    )  # fmt: skip
    with ExitStack() as holders:
        return LaunchDescription(run, plan, 0, holders)


def test_engines_behind_a_gateway_have_a_key_and_a_folder_of_their_own(tmp_path: Path) -> None:
    found = described(tmp_path, SMALL, gateway=GatewayConfig(port=0))
    (launch,) = found.launches
    assert launch.ratio is None, "nobody else is on pretend GPUs"
    assert launch.environment({})[KEY] == found.key
    assert found.key not in launch.argv()
    assert found.overlay is not None
    assert found.overlay.parent == tmp_path / "overlay-0"
    assert str(found.overlay) in launch.argv()
    alone = described(tmp_path, api_key="mine", port=7000)
    assert (alone.key, alone.overlay, alone.launches[0].port) == (None, None, 7000)
    assert alone.launches[0].key == "mine"


def test_work_of_slow_pretend_cards_has_as_much_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        launch_description, "clock_for", lambda _, factor: ClockChoice(factor, "by the forecast")
    )
    usual, slow = described(tmp_path, clock=1.0).timing, described(tmp_path, clock=4.0).timing
    assert (slow.drain, slow.patience) == (4 * usual.drain, 4 * usual.patience)
    assert slow.start == usual.start


def test_a_stand_in_checkpoint_that_was_removed_is_made_again(tmp_path: Path) -> None:
    """Somebody removed the run's folder; a checkpoint that is not ours is waited for."""
    found = described(tmp_path, SMALL, gateway=GatewayConfig(port=0))
    folder, overlay = Path(str(found.plan.model.source.checkpoint)), Path(str(found.overlay))
    made = sorted(os.listdir(folder))
    assert made
    shutil.rmtree(folder)
    shutil.rmtree(overlay)
    found.prepare()
    assert sorted(os.listdir(folder)) == made
    assert overlay.is_dir()

"""The line that `serve` begins with on a card that nobody has measured."""

from __future__ import annotations

from msgspec.structs import replace

import turbofit
from turbofit.core.machine import Calibration
from turbofit.serving.run import unmeasured


def test_a_card_that_nobody_has_measured_is_named_with_both_commands() -> None:
    plan = turbofit.plan("internvl2-2b", on="1xrtx3090")
    assert unmeasured(plan) == (
        f"nobody has measured the {plan.machine.gpus[0].name}; ten minutes do it:"
        " turbofit calibrate InternVL2-2B, then turbofit report --share"
    )
    assert unmeasured(turbofit.plan("internvl2-2b", on="1xh100")) == ""


def test_a_calibrated_card_is_not_named() -> None:
    plan = turbofit.plan("internvl2-2b", on="1xrtx3090")
    kept = Calibration(
        model="another", engine="turbomind", engine_version="0.18", lmdeploy="0.18.0",
        gpus=(plan.machine.gpus[0].name,), driver="NA", communicator="", when="2026-11-29",
        context=0, buffers=0,
    )  # fmt: skip
    assert unmeasured(replace(plan, machine=replace(plan.machine, calibrations=(kept,)))) == ""

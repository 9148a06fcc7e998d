"""A calibration: for which launch it holds, and what it adds to a ledger."""

from __future__ import annotations

from msgspec.structs import replace

from tests.memory.conftest import launch_on
from turbofit.core.machine import Calibration
from turbofit.core.units import GIB
from turbofit.memory.account import EngineLaunch, StaticMemory, term
from turbofit.memory.calibrated import (
    CONTEXT,
    calibration_for,
    corrected,
    identity,
    unbelieved,
)

LAUNCH = launch_on("1xrtx3090", "internvl2-8b")
ONE = Calibration(
    model=identity(LAUNCH.model), engine="turbomind", engine_version="0.18", lmdeploy="0.18.0",
    gpus=("NVIDIA GeForce RTX 3090",), driver="NA", communicator="nccl",
    when="2026-11-20T00:00:00+00:00", context=-5, buffers=-9, free=LAUNCH.gpus[0].free,
)  # fmt: skip


def after(one: Calibration) -> EngineLaunch:
    return replace(LAUNCH, machine=replace(LAUNCH.machine, calibrations=(one,)))


def test_it_is_for_one_engine_and_not_for_less_free_memory() -> None:
    assert calibration_for(after(ONE), "turbomind", "0.18") == ONE
    assert calibration_for(after(ONE), "pytorch", "0.18") is None
    assert unbelieved(after(ONE), "turbomind", "0.18") == ""
    emptier = after(replace(ONE, free=ONE.free + GIB))
    assert calibration_for(emptier, "turbomind", "0.18") is None
    assert "the calibration does not count" in unbelieved(emptier, "turbomind", "0.18")


def test_it_takes_no_more_than_the_estimates_after_the_cache() -> None:
    weights = (term("weights.mlp", "weights", 8, "formula"),)
    memory = StaticMemory(before=weights, buffers=(term("pool_growth", "buffers", 3, "estimate"),))
    found = corrected(memory, ONE)
    assert [(line.term, line.bytes) for line in found.before] == [(CONTEXT, -5), ("weights.mlp", 8)]
    assert found.buffers[-1].bytes == -3
    assert corrected(memory, None) == memory

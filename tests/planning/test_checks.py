"""The whole checkup: in order, without a driver, with everything hidden."""

from __future__ import annotations

from typing import Any

from tests.support.checkup import Make, checkup, roomy_host, sources, two
from tests.support.nvml import Scenario, gpu_3090
from turbofit.core.units import GIB, MIB
from turbofit.planning.checks import examine

__all__ = ["checkup", "roomy_host", "sources"]


def test_a_machine_in_order(checkup: Any, sources: Make) -> None:
    report = checkup(two(), sources())
    assert [one for one in report.findings if one.state != "ok"] == []
    assert report.exit_code == 0
    assert len({one.check for one in report.findings}) == len(report.findings) >= 14


def test_every_finding_but_ok_has_a_reason_and_a_fix(checkup: Any, sources: Make) -> None:
    places = sources(WORLD_SIZE="4")
    places.packages.clear()
    report = checkup(Scenario([gpu_3090(0, used=23 * GIB, total=24576 * MIB), gpu_3090(1)]), places)
    bad = [one for one in report.findings if one.state in ("warning", "stops")]
    assert len(bad) >= 4
    assert all(one.why and one.fix for one in bad)
    assert report.exit_code == 3
    assert report.count("stops") == sum(one.state == "stops" for one in bad)


def test_no_driver_is_exit_4_with_the_rest_still_checked(checkup: Any, sources: Make) -> None:
    report = checkup(None, sources())
    assert report.exit_code == 4
    assert report.machine is None
    first = report.findings[0]
    assert (first.check, first.state) == ("nvml", "stops")
    assert "were not checked" in first.why
    assert "--pretend --on SPEC" in first.fix
    states = {one.check: one.state for one in report.findings}
    assert states["lmdeploy"] == "ok"
    # What follows from it is no finding of its own.
    assert states.keys().isdisjoint({"driver_cuda", "torch_architectures"})
    assert "driver_cuda" not in {one.check for one in examine(sources(), on="1xl4").findings}
    # Cards that are all hidden are no machine either; the finding names the variable.
    report = checkup(two(), sources(CUDA_VISIBLE_DEVICES="5"))
    assert report.exit_code == 4
    assert "CUDA_VISIBLE_DEVICES" in report.findings[0].seen

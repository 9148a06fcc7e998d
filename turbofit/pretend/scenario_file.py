"""The scenario file of a pretend machine, with the engine's kernels that hold no code."""

from __future__ import annotations

from pathlib import Path

from turbofit.kernels.installed import empty_kernels_file
from turbofit.pretend.scenario import Scenario

__all__ = ["write_scenario"]


def write_scenario(path: Path, scenario: Scenario, timeline: str, shared: str = "") -> None:
    """Write what the C side reads; arguments as for `Scenario.text`.

    Reads the library of the installed TurboMind where its kernels are not known yet.
    """
    capabilities = sorted({gpu.sm for gpu in scenario.gpus})
    files = {one: empty_kernels_file(one) for one in capabilities}
    empty = {one: file for one, file in files.items() if file is not None}
    path.write_text(scenario.text(timeline, shared, empty), encoding="utf-8")

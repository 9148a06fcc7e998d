"""Lives of LMDeploy's PyTorch engine and of Transformers, each with one allocation that fails."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.common.processes import CUDA_PATH
from bench.faults.allocation_configs import Config, Ended, Point
from bench.faults.allocation_lives import judged, stand_in_checkpoint
from turbofit.pretend.scenario import Scenario
from turbofit.pretend.timeline import PINNED, read_timeline
from turbofit.rehearse.torch.torch_run import EndedRehearsal, run_torch
from turbofit.rehearse.torch.torch_spec import TorchCase, TorchRequest, TorchSpec

__all__ = ["TorchLives"]

_PICTURE = (840, 840)
#: A start compiles kernels: it takes twenty seconds where nothing else runs.
_CASE_SECONDS = 60.0
_SETTINGS = {
    "pytorch": {"max_batch_size": 4, "max_prefill_token_num": 2048, "session_len": 4096},
    "transformers": {"device_map": {"": 0}},
}


class TorchLives:
    """As ``TurboMindLives``: the engine's processes are the rehearsal's own.

    Args:
        config: which.
        checkpoints: a folder in which stand-in checkpoints are kept.
    """

    def __init__(self, config: Config, checkpoints: Path) -> None:
        self._config = config
        folder = stand_in_checkpoint(config, checkpoints)
        case = TorchCase("vision_request", (TorchRequest(images=(_PICTURE,)),))
        settings: dict[str, Any] = _SETTINGS[config.engine]
        self._spec = TorchSpec(config.engine, folder, settings, (case,), _CASE_SECONDS)
        self._machine = Scenario(gpus=config.gpus, context=500 << 20)

    def __enter__(self) -> TorchLives:
        if not CUDA_PATH:
            raise RuntimeError("set TURBOFIT_CUDA_PATH to a folder with a CUDA build of torch")
        self._path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{CUDA_PATH}:{self._path or ''}"
        self._rooms = tempfile.TemporaryDirectory(prefix="turbofit-allocations-")
        return self

    def __exit__(self, *_: object) -> None:
        os.environ["PYTHONPATH"] = self._path or ""
        self._rooms.cleanup()

    def whole(self) -> list[Point]:
        """A life in which nothing fails: all its allocations, in their order."""
        seen, room = self._run(self._machine)
        if not seen.report.get("done"):
            raise RuntimeError(f"the whole life did not serve: {seen.log[-2000:]}")
        return list(_points(room))

    def fail(self, number: int, *, pinned: bool) -> Ended:
        """A life in which one allocation fails, and what torch asks then: it tries twice."""
        changes: dict[str, Any] = {"fail_pinned_at" if pinned else "fail_at": number}
        changes["fail_times"] = 1 if number == 1 else 2
        begun = time.monotonic()
        seen, _ = self._run(replace(self._machine, **changes))
        seconds, log = time.monotonic() - begun, seen.log.encode()
        found = [
            Point(one.simulated, one.kind == "pinned host", one.phase, one.site or "")
            for usage in seen.ran.usages
            for one in usage.refused
            if one.simulated
        ]
        if not found:
            return Ended("not met", None, seconds, log=log)
        cases = seen.report.get("cases", [])
        statuses = {status for case in cases for status in case["statuses"]}
        if seen.late or "not finished" in statuses:
            return Ended("hang", found[0], seconds, log=log)
        if seen.report.get("done") and statuses <= {"ok", "finished"}:
            return Ended("recovered", found[0], seconds, log=log)
        ended = judged(self._config, found[0], seconds, log)
        if seen.report.get("done") and ended.kind == "named":
            ended.kind = "answered"
        return ended

    def _run(self, machine: Scenario) -> tuple[EndedRehearsal, Path]:
        room = Path(tempfile.mkdtemp(dir=self._rooms.name))
        return run_torch(self._spec, machine, room), room


def _points(room: Path) -> Iterator[Point]:
    """Every allocation of the one process that makes any, with the phase that it was told."""
    counts = [0, 0]
    for file in sorted((room / "pretend" / "timelines").iterdir()):
        phase = "start"
        for event in read_timeline(file):
            if event.tag == "P":
                phase = event.fields[0]
            if event.tag == "A":
                pinned = event.number(1) == PINNED
                counts[pinned] += 1
                yield Point(counts[pinned], pinned, phase, "")

"""One stage: a program of its own, NVML sampled beside it, and what changed between its marks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Timer
from typing import Any

from turbofit.core.plan import Plan
from turbofit.core.struct import to_builtins
from turbofit.observe.sampler import Sampler, memory_now

__all__ = ["Ballast", "constants", "engine", "run_stage"]

HERE = Path(__file__).resolve().parent
_SETTLE = 0.1


class Ballast(AbstractContextManager["Ballast"]):
    """Memory held back in another process, so that so many MiB of a GPU are left; 0 holds none."""

    def __init__(self, left_mib: int, index: int, environ: Mapping[str, str]) -> None:
        self.held = 0
        self._process: subprocess.Popen[str] | None = None
        if not left_mib:
            return
        wanted = (memory_now(index).free >> 20) - left_mib
        if wanted <= 0:
            raise ValueError(f"{left_mib} MiB are not free on this GPU")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "ballast.py"), str(wanted)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(environ),
        )  # fmt: skip
        assert self._process.stdout is not None
        word = self._process.stdout.readline()
        if not word.startswith("held "):
            raise RuntimeError("the ballast could not be taken")
        self.held = int(word.split()[1])

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()


def run_stage(
    command: Sequence[str], *, index: int, seconds: float, environ: Mapping[str, str]
) -> dict[str, Any]:
    """Run a program that prints marks, and read NVML between them.

    Returns:
        ``marks``: each with its own facts, the ``used`` bytes at it above those before the program,
        and the ``peak`` since the mark before; ``code`` and the end of what it said otherwise.
    """
    before = memory_now(index).used
    with Sampler([index]) as sampler:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(environ)
        )
        timer = Timer(seconds, process.kill)
        timer.start()
        out, err = process.communicate()
        timer.cancel()
        marks = [json.loads(line) for line in out.splitlines() if line.startswith('{"mark"')]
        last: float | None = None
        for one in marks:
            seen = sampler.between(index, last if last is not None else one["at"] - 1.0, one["at"])
            around = sampler.between(index, one["at"] - _SETTLE, one["at"])
            one["peak"] = None if seen is None else seen.peak - before
            one["used"] = None if around is None else around.last - before
            last = one["at"]
    return {
        "code": process.returncode,
        "before": before,
        "marks": [{k: v for k, v in one.items() if k != "at"} for one in marks],
        "said": err.splitlines()[-12:] if process.returncode else [],
    }


def constants(index: int, seconds: float, environ: Mapping[str, str]) -> dict[str, Any]:
    """Stage a: the document, with what each step left beyond torch's own pool."""
    seen = run_stage(
        [sys.executable, str(HERE / "constants.py")], index=index, seconds=seconds, environ=environ
    )
    last = 0
    for one in seen["marks"]:
        if one["used"] is not None and "reserved" in one:
            beyond = one["used"] - one["reserved"]
            one["took"], last = beyond - last, beyond
    return seen


def engine(
    model: str, folder: Path, index: int, seconds: float, environ: Mapping[str, str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Stage b: NVML beside the plan's ledger, for the same phases.

    ``forecast`` holds the plan's steady and peak without what others hold; ``over`` is forecast
    minus measured, so that a minus is memory that the plan did not see.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    seen = run_stage(
        [sys.executable, "-m", "bench.gpu.engine", model, str(folder), *words],
        index=index, seconds=seconds, environ=environ,
    )  # fmt: skip
    file = folder / "plan.json"
    if not file.exists():
        return seen
    plan = Plan.from_json(file.read_bytes())
    ledger = plan.gpus[0]
    peaks = [one["peak"] for one in seen["marks"] if one["peak"] is not None]
    measured, forecast = max(peaks, default=None), ledger.peak - ledger.used
    over = None if measured is None else forecast - measured
    return {
        **seen,
        "model": model,
        "settings": to_builtins(plan.settings),
        "tokens": plan.kv.tokens,
        "margin": ledger.margin,
        "forecast_peak": forecast,
        "measured_peak": measured,
        "over": over,
        "over_share_of_card": None if over is None else over / ledger.total,
    }


def environment(index: int) -> dict[str, str]:
    """The process's own, with one GPU visible by NVML's order."""
    return {
        **os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(index),
        "LMDEPLOY_ENABLE_CHECK_ENV": "0",
    }  # fmt: skip

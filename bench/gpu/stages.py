"""One stage: a program of its own, NVML sampled beside it, and what changed between its marks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from turbofit.core.plan import Plan
from turbofit.core.struct import to_builtins
from turbofit.observe.sampler import Sampler, memory_now

__all__ = ["CONTEXTS", "Ballast", "constants", "engine", "run_stage", "runtime", "speed"]

HERE = Path(__file__).resolve().parent
_SETTLE = 0.1
#: Parts of a context's stage; the last two show what all kernels of a library take.
CONTEXTS = ("plain", "turbomind", "torch_eager", "turbomind_eager")


class Ballast(AbstractContextManager["Ballast"]):
    """Memory held back in another process, so that so many MiB of a GPU are left; 0 holds none.

    ``held`` are the bytes taken, ``left`` those that are free then, both None where none is held.

    Raises:
        ValueError: so many MiB are not free.
    """

    def __init__(self, left_mib: int, index: int, environ: Mapping[str, str]) -> None:
        self.held, self.left = 0, memory_now(index).free if left_mib else None
        self._process: subprocess.Popen[str] | None = None
        if not left_mib:
            return
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "ballast.py"), str(left_mib)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=dict(environ),
        )  # fmt: skip
        assert self._process.stdout is not None
        word = self._process.stdout.readline()
        if not word.startswith("held "):
            said = self._process.communicate()[1].splitlines()
            raise ValueError(said[-1] if said else "the memory could not be taken")
        self.held, self.left = (int(figure) for figure in word.split()[1:])

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()


def run_stage(
    command: Sequence[str], *, index: int, seconds: float, environ: Mapping[str, str]
) -> dict[str, Any]:
    """Run a program that prints marks, and read NVML between them.

    Returns:
        ``marks``: each with its own facts, the ``used`` bytes at it above those before the program,
        and the ``peak`` since the mark before; ``code`` and the end of what it said otherwise;
        ``outcome`` is ``out_of_time`` where it was ended, with its children.
    """
    before = memory_now(index).used
    with Sampler([index]) as sampler:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(environ),
            start_new_session=True,
        )  # fmt: skip
        late = threading.Event()

        def end() -> None:
            late.set()
            _kill(process)

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            out, err = process.communicate()
        finally:
            timer.cancel()
            _kill(process)
        marks = [json.loads(line) for line in out.splitlines() if _is_mark(line)]
        last: float | None = None
        for one in marks:
            seen = sampler.between(index, last if last is not None else one["at"] - 1.0, one["at"])
            around = sampler.between(index, one["at"] - _SETTLE, one["at"])
            one["peak"] = None if seen is None else seen.peak - before
            one["used"] = None if around is None else around.last - before
            last = one["at"]
    found = {
        "code": process.returncode,
        "before": before,
        "marks": [{k: v for k, v in one.items() if k != "at"} for one in marks],
        "said": err.splitlines()[-12:] if process.returncode else [],
    }
    return {**found, "outcome": "out_of_time"} if process.returncode and late.is_set() else found


def _is_mark(line: str) -> bool:
    """A whole one: who is killed may leave half of a line."""
    return line.startswith('{"mark"') and line.endswith("}")


def _kill(process: subprocess.Popen[str]) -> None:
    """With all that it has started: a child may hold its output open."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


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


def runtime(
    parts: Sequence[str], index: int, seconds: Callable[[], float], environ: Mapping[str, str]
) -> dict[str, Any]:
    """Parts of `bench.gpu.runtime`, each in a process of its own; the document, by part.

    ``NAME_eager`` is NAME with all kernels loaded at once. It went well where the first did and no
    time was over; what failed says so in its part.
    """
    found: dict[str, Any] = {}
    for part in parts:
        name = part.removesuffix("_eager")
        more = {"CUDA_MODULE_LOADING": "EAGER"} if part != name else {}
        found[part] = run_stage(
            [sys.executable, "-m", "bench.gpu.runtime", name],
            index=index, seconds=seconds(), environ={**environ, **more},
        )  # fmt: skip
    late = any(one.get("outcome") == "out_of_time" for one in found.values())
    return {"code": found[parts[0]]["code"] or int(late), **found}


def speed(
    model: str, folder: Path, index: int, seconds: float, environ: Mapping[str, str]
) -> dict[str, Any]:
    """Prefill, decode steps and images of one start, by `bench.gpu.speed`; its document."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = run_stage(
        [sys.executable, "-m", "bench.gpu.speed", model, str(folder)],
        index=index, seconds=seconds, environ=environ,
    )  # fmt: skip
    # What was measured before its time was over is as good.
    whole = any(one["mark"].startswith("decode_") for one in seen["marks"])
    return {**seen, "model": model, "code": 0 if whole else seen["code"] or 1}


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

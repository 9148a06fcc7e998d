"""Calibrates: measures a plan's engines under all worst cases, and learns for later plans.

`calibrator.py` measures a running engine; `memory_usage.py` reads the memory of the GPUs.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from typing import Final

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.plan import Plan
from turbofit.core.process.files import write_atomic
from turbofit.core.process.signals import StopSignal
from turbofit.core.struct import Document, to_builtins, to_json
from turbofit.core.units import MIB, format_bytes
from turbofit.measure.calibrate_speeds import measure_speeds
from turbofit.measure.calibrator import Calibrator
from turbofit.measure.memory_usage import NvmlUsageReader, PretendUsageReader, used_now
from turbofit.planning import calibrations
from turbofit.serving.calibration import SEEN_FILE, Observation, document, learn
from turbofit.serving.ladder import learned_file
from turbofit.serving.options import ServeConfig
from turbofit.serving.planner import leases_for
from turbofit.serving.run import Run
from turbofit.serving.start import follow

#: The most bytes by which the use of other processes may change while a launch is measured.
_MOVED: Final = 32 * MIB


def calibrate(
    config: ServeConfig,
    stop: StopSignal,
    say: Callable[[str], None],
    *,
    apart: bool,
) -> Document | signal.Signals:
    """Measure a launch and learn from it; return the document, or the signal that ended it early.

    ``config``: the configuration of a `serve` without a gateway. ``apart``: the learned values hold
    for pretend GPUs only.

    Raises:
        UsageError: the model is planned for Transformers, for which nothing can be learned.
    """
    calibrator = Calibrator(PretendUsageReader if config.pretend else NvmlUsageReader, say)
    with leases_for(config) as leases:
        run = Run(config, leases, say, on_open=lambda _: stop.end(), examiner=calibrator)
        plan = run.choose()
        if not plan.backend.of_lmdeploy:
            raise UsageError(
                f"{plan.model.name} is planned for Transformers: calibrate measures LMDeploy",
                hint="turbofit serve checks its plan with a worst-case request",
            )
        machine = run.checked_plan().machine
        gpus = sorted(index for group in plan.groups for index in group)
        # The measurement takes memory that the plan has reserved.
        if not (config.pretend or apart) and measure_speeds(machine, gpus, say):
            run.choose()
        say(run.checked_plan().verdict)
        run.begin()
        try:
            ended = follow(run, stop)
        finally:
            calibrator.end()
        if not calibrator.complete:
            say("stopped: nothing was learned")
            return ended
        assert calibrator.usage is not None
        plan, before = calibrator.usage.plan, {} if config.pretend else calibrator.usage.before
        with suppress(TurbofitError):  # on a full disk `turbofit report --share` has less to tell
            write_atomic(run.folder / SEEN_FILE, to_json(calibrator.observations), mode=0o600)
        lmdeploy = run.lmdeploy.version
        result = learned(plan, calibrator.observations, before, lmdeploy=lmdeploy, pretend=apart)
        if not result["kept"]:
            say(f"warning: nothing was learned: {result['why_not']}")
        if relieve(plan, result, lmdeploy, pretend=config.pretend):
            say("what restarts had learned is dropped: this measurement says what was missing")
        return result


def learned(
    plan: Plan,
    observations: Sequence[Observation],
    before: Mapping[int, int],
    *,
    lmdeploy: str,
    pretend: bool,
) -> Document:
    """Learn and store calibrations; return the document of `turbofit calibrate --json`.

    ``before``: bytes in use on each GPU before the last start; empty for pretend GPUs. Nothing is
    stored if the memory of other processes has changed since then.
    """
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    corrections = learn(plan, observations, lmdeploy=lmdeploy, when=when, pretend=pretend)
    completed = tuple(calibrations.completed(correction) for correction in corrections)
    beside = {**document(plan, observations), "pretend": pretend}
    why_not, kept = _moved(plan, before), []
    if why_not is None:
        try:
            kept = [str(calibrations.keep(calibration, beside)) for calibration in completed]
        except OSError as exc:
            why_not = f"the state folder cannot be written: {exc.strerror or exc}"
        except UsageError as exc:
            why_not = exc.message
    return {
        "schema": "turbofit.calibration/1",
        "calibrations": to_builtins(completed),
        "kept": kept,
        "why_not": why_not,
        **beside,
    }


def relieve(plan: Plan, result: Document, lmdeploy: str, *, pretend: bool) -> bool:
    """Delete the settings that turbofit learned from failed starts; return whether there were any.

    These settings have a larger margin for bytes that the calibration now counts. They stay if the
    calibration found no missing bytes, or was not stored.
    """
    more = any(row["context"] + row["buffers"] > 0 for row in result["calibrations"])
    kept = bool(result["kept"])
    return kept and more and learned_file(plan, lmdeploy, pretend=pretend).forget()


def _moved(plan: Plan, before: Mapping[int, int]) -> str | None:
    """Return a message if the memory of other processes on a GPU has changed since ``before``.

    None if each change is at most `_MOVED`. A larger change would count as the engine's memory.
    """
    for gpu in plan.ledgers:
        if gpu.index in before:
            more = used_now(gpu.uuid) - before[gpu.index]
            if abs(more) > _MOVED:
                change = f"{format_bytes(abs(more))} {'more' if more > 0 else 'less'} in use"
                return f"GPU {gpu.index} has {change} than before: somebody else's memory moved"
    return None

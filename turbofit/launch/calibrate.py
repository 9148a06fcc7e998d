"""One calibration: a run whose engines are driven through their worst cases, and what it taught."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.process.files import write_atomic
from turbofit.core.struct import to_builtins, to_json
from turbofit.core.units import MIB, format_bytes
from turbofit.launch.calibrator import Calibrator, NvmlUsageReader, PretendUsageReader
from turbofit.launch.follow import follow
from turbofit.launch.run import Run
from turbofit.launch.serve.ladder import forget
from turbofit.launch.serve.leases import Leases
from turbofit.memory.account import NO_IMAGES, EngineLaunch
from turbofit.memory.calibrated import calibration_for, identity
from turbofit.model.source import resolve_model
from turbofit.observe import calibrations
from turbofit.observe.calibration import SEEN_FILE, Observation, document, learn
from turbofit.observe.sampler import memory_now
from turbofit.planning.resolve import resolve
from turbofit.tuner.choose import best_plan

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Mapping, Sequence

    from turbofit.core.json_types import Document
    from turbofit.core.machine import Calibration
    from turbofit.core.plan import Plan
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.supervisor import StopSignal
    from turbofit.planning.request import PlanRequest


def calibrate(
    config: ServeConfig,
    stop: StopSignal,
    say: Callable[[str], None],
    *,
    again: bool,
    apart: bool,
) -> Document | signal.Signals:
    """Measure and learn; the document, or the signal that ended it before it was complete.

    ``config`` is of a `serve` without a public side. ``again``: what was calibrated before is
    measured again; ``apart``: what is learned holds for pretend GPUs only.

    Raises:
        UsageError: the model is planned for Transformers, which has nothing to learn.
    """
    calibrator = Calibrator(PretendUsageReader if config.pretend else NvmlUsageReader, say)
    with Leases() as leases:
        run = Run(config, leases, say, on_open=lambda _: stop.end(), examiner=calibrator)
        plan = run.choose()
        if not plan.engine.of_lmdeploy:
            raise UsageError(
                f"{plan.model.name} is planned for Transformers: calibrate measures LMDeploy",
                hint="turbofit serve checks its plan with a worst-case request",
            )
        if calibration_of(plan) is not None and not again:
            say("calibrated before: --again measures again, --forget drops it")
            return stored(plan) | {"tokens": _tokens(run, plan, apart=apart)}
        say(run.refuse().verdict)
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
        with suppress(TurbofitError):  # a full disk costs what `turbofit share` would tell
            write_atomic(run.folder / SEEN_FILE, to_json(calibrator.observations), mode=0o600)
        lmdeploy = run.lmdeploy.version
        result = learned(plan, calibrator.observations, before, lmdeploy=lmdeploy, pretend=apart)
        if result["kept"]:
            result["tokens"] = _tokens(run, plan, apart=apart)
        else:
            say(f"warning: nothing was learned: {result['why_not']}")
        if relieve(plan, result, lmdeploy, pretend=config.pretend):
            say("what restarts had learned is dropped: this measurement says what was missing")
        return result


def _tokens(run: Run, plan: Plan, *, apart: bool) -> Document:
    """KV tokens of a plan for these cards: as was assumed of them, and with what was measured."""
    assert run.config.request is not None
    request = run.config.request.changed(on=plan.machine, gpus=None)
    known = calibrations.with_calibrations(plan.machine, pretend=apart).calibrations
    # Whoever plans for the cards here adds what was measured: both are planned below that.
    resolved = resolve(request)
    return {
        name: best_plan(
            replace(resolved, machine=replace(resolved.machine, calibrations=made)), request.engine
        ).kv.total_tokens
        for name, made in (("assumed", ()), ("measured", known))
    }


def drop(request: PlanRequest, *, apart: bool) -> int:
    """Forget what was learned of a model; how many calibrations there were."""
    assert isinstance(request.model, str)
    return calibrations.forget(identity(resolve_model(request.model)), pretend=apart)


#: Bytes by which others may have moved while a launch was measured.
_MOVED: Final = 32 * MIB


def learned(
    plan: Plan,
    observations: Sequence[Observation],
    before: Mapping[int, int],
    *,
    lmdeploy: str,
    pretend: bool,
) -> Document:
    """Learn, and keep it for later plans; the document is what `turbofit calibrate --json` shows.

    ``before`` are bytes in use on each GPU before the last start; empty where others cannot move.
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
    """Drop what restarts had learned of such launches; whether there was anything.

    Otherwise a margin that the ladder made larger would be added to what was measured to be
    missing. Where nothing was, what helped the start stays.
    """
    more = any(row["context"] + row["buffers"] > 0 for row in result["calibrations"])
    return bool(result["kept"]) and more and forget(plan, lmdeploy, pretend=pretend)


def calibration_of(plan: Plan) -> Calibration | None:
    launch = EngineLaunch(
        model=plan.model,
        settings=plan.of_group(0).settings,
        gpus=tuple(plan.machine.gpu(index) for index in plan.parallel.groups[0]),
        machine=plan.machine,
        vision_load=NO_IMAGES,
    )
    return calibration_for(launch, plan.engine.name, plan.engine.version)


def stored(plan: Plan) -> Document:
    """The document that was kept of what a plan rests on, as far as it can be read."""
    calibration = calibration_of(plan)
    assert calibration is not None
    body = calibrations.read(calibration)
    return {
        "schema": "turbofit.calibration/1", **body, "calibrations": [to_builtins(calibration)],
        "kept": [str(calibrations.path_of(calibration))], "why_not": None,
    }  # fmt: skip


def _moved(plan: Plan, before: Mapping[int, int]) -> str | None:
    """Whether somebody else took or gave memory meanwhile, which would be counted as ours."""
    for gpu in plan.gpus:
        if gpu.index in before:
            more = memory_now(gpu.uuid).used - before[gpu.index]
            if abs(more) > _MOVED:
                change = f"{format_bytes(abs(more))} {'more' if more > 0 else 'less'} in use"
                return f"GPU {gpu.index} has {change} than before: somebody else's memory moved"
    return None

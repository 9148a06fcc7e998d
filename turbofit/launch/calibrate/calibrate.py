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
from turbofit.launch.calibrate.calibrator import (
    Calibrator,
    NvmlUsageReader,
    PretendUsageReader,
    Progress,
)
from turbofit.launch.run import Run
from turbofit.launch.serve.ladder import forget
from turbofit.launch.serve.leases import Leases
from turbofit.memory.calibrated import calibration_for, identity
from turbofit.model.source import resolve_model
from turbofit.observe import calibrations
from turbofit.observe.calibration import SEEN_FILE, document, learn
from turbofit.observe.sampler import memory_now
from turbofit.planning.plan import plan as best_plan

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Mapping, Sequence

    from turbofit.core.json_types import Document
    from turbofit.core.machine import Calibration
    from turbofit.core.plan import Plan
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.supervisor import StopSignal
    from turbofit.observe.calibration import Observation
    from turbofit.planning.request import PlanRequest


def calibrate(
    config: ServeConfig,
    progress: Progress,
    stop: StopSignal,
    say: Callable[[str], None],
    *,
    again: bool,
    apart: bool,
) -> Document | signal.Signals:
    """Measure and learn.

    Args:
        config: of a `serve` without a public side.
        progress: how far an earlier run of the same calibration came.
        stop: tells of signals.
        say: takes lines of progress.
        again: whether what was calibrated before is measured again.
        apart: whether what is learned holds for pretend GPUs only.

    Returns:
        What was learned, or the signal that ended it before it was complete.
    """
    calibrator = Calibrator(
        PretendUsageReader if config.pretend else NvmlUsageReader, progress, say
    )
    with Leases() as leases:
        run = Run(config, leases, say, on_open=lambda _: stop.end(), examiner=calibrator)
        run.plan = progress.plan
        if run.plan is not None and run.again():
            say("going on where an earlier calibration was cut short")
            plan = run.refuse()
        else:
            if progress.plan is not None:
                say("an earlier calibration was cut short, and does not go on")
            plan = run.choose()
            if not plan.engine.of_lmdeploy:
                raise UsageError(
                    f"{plan.model.name} is planned for Transformers: calibrate measures LMDeploy",
                    hint="turbofit serve checks its plan with a worst-case request",
                )
            if calibration_of(plan) is not None and not again:
                say("calibrated before: --again measures again, --forget drops it")
                return stored(plan) | {"tokens": _tokens(run, plan, apart=apart)}
            plan = run.settle()
        say(plan.verdict)
        run.begin()
        try:
            ended = run.follow(stop)
        finally:
            calibrator.end()
        if not progress.complete:
            say("stopped: what was measured is kept, and the same command goes on from there")
            return ended
        assert progress.plan is not None
        assert calibrator.usage is not None
        before = {} if config.pretend else calibrator.usage.before
        with suppress(TurbofitError):  # a full disk costs what `turbofit share` would tell
            write_atomic(run.folder / SEEN_FILE, to_json(progress.seen), mode=0o600)
        lmdeploy = run.lmdeploy.version
        result = learned(progress.plan, progress.seen, before, lmdeploy=lmdeploy, pretend=apart)
        progress.forget()
        if result["kept"]:
            result["tokens"] = _tokens(run, progress.plan, apart=apart)
        else:
            say(f"warning: nothing was learned: {result['why_not']}")
        if relieve(progress.plan, result, lmdeploy, pretend=config.pretend):
            say("what restarts had learned is dropped: this measurement says what was missing")
        return result


def _tokens(run: Run, plan: Plan, *, apart: bool) -> Document:
    """KV tokens of a plan for these cards: as was assumed of them, and with what was measured."""
    assert run.config.request is not None
    request = run.config.request.changed(gpus=None)
    known = calibrations.with_calibrations(plan.machine, pretend=apart)
    machines = {"assumed": replace(known, calibrations=()), "measured": known}
    return {
        name: best_plan(request.changed(on=machine)).kv.total_tokens
        for name, machine in machines.items()
    }


def progress_of(request: PlanRequest, *, apart: bool) -> Progress:
    """How far an earlier run of the same calibration came."""
    options = request.given()
    return Progress(options.pop("model"), options, pretend=apart)


def drop(request: PlanRequest, *, apart: bool) -> int:
    """Forget what was learned of a model; how many calibrations there were."""
    assert isinstance(request.model, str)
    return calibrations.forget(identity(resolve_model(request.model)), pretend=apart)


def forget_all(request: PlanRequest, *, apart: bool) -> str:
    """Forget what was learned of a model, and what is under way; what there was, in words."""
    gone = drop(request, apart=apart)
    left = progress_of(request, apart=apart).forget()
    return f"forgot {gone} calibrations{' and one that was under way' if left else ''}"


# From what was read to what later plans know, and back.


#: Bytes by which others may have moved while a launch was measured.
_MOVED: Final = 32 * MIB


def learned(
    plan: Plan,
    seen: Sequence[Observation],
    before: Mapping[int, int],
    *,
    lmdeploy: str,
    pretend: bool,
) -> Document:
    """Learn, and keep it for later plans, of pretend GPUs apart.

    ``before`` are bytes in use on each GPU before the last start; empty where others cannot move.
    The document is what `turbofit calibrate --json` shows. ``kept`` is empty where nothing was
    learned, and ``why_not`` says why.
    """
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    made = learn(plan, seen, lmdeploy=lmdeploy, when=when, pretend=pretend)
    found = tuple(calibrations.completed(one) for one in made)
    beside = {**document(plan, seen), "pretend": pretend}
    why_not, kept = _moved(plan, before), []
    if why_not is None:
        try:
            kept = [str(calibrations.keep(one, beside)) for one in found]
        except OSError as exc:
            why_not = f"the state folder cannot be written: {exc.strerror or exc}"
        except UsageError as exc:
            why_not = exc.message
    return {
        "schema": "turbofit.calibration/1",
        "calibrations": to_builtins(found),
        "kept": kept,
        "why_not": why_not,
        **beside,
    }


def relieve(plan: Plan, result: Document, lmdeploy: str, *, pretend: bool) -> bool:
    """Drop what restarts had learned of such launches, where the measurement replaces it.

    Otherwise a margin that the ladder made larger would be added to what was measured to be
    missing. Where nothing was measured to be missing, what helped the start stays.

    Returns:
        Whether anything was dropped.
    """
    more = any(one["context"] + one["buffers"] > 0 for one in result["calibrations"])
    return bool(result["kept"]) and more and forget(plan, lmdeploy, pretend=pretend)


def calibration_of(plan: Plan) -> Calibration | None:
    """What the plan's first engine rests on."""
    gpus = [plan.machine.gpu(index) for index in plan.parallel.groups[0]]
    settings, engine = plan.of_group(0).settings, plan.engine
    return calibration_for(plan.machine, gpus, plan.model, settings, engine.name, engine.version)


def stored(plan: Plan) -> Document:
    """The document that was kept of what a plan rests on, as far as it can be read."""
    one = calibration_of(plan)
    assert one is not None
    body = calibrations.read(one)
    return {
        "schema": "turbofit.calibration/1", **body, "calibrations": [to_builtins(one)],
        "kept": [str(calibrations.path_of(one))], "why_not": None,
    }  # fmt: skip


def _moved(plan: Plan, before: Mapping[int, int]) -> str | None:
    """Whether somebody else took or gave memory meanwhile, which would be counted as ours."""
    for gpu in plan.gpus:
        if gpu.index in before:
            more = memory_now(gpu.uuid).used - before[gpu.index]
            if abs(more) > _MOVED:
                said = f"{format_bytes(abs(more))} {'more' if more > 0 else 'less'} in use"
                return f"GPU {gpu.index} has {said} than before: somebody else's memory moved"
    return None

"""One calibration: a run whose engines are driven through their worst cases, and what it taught."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.launch.calibrate.calibration_store import calibration_of, learned, relieve, stored
from turbofit.launch.calibrate.calibrator import Calibrator
from turbofit.launch.calibrate.gpu_usage import NvmlUsageReader, PretendUsageReader
from turbofit.launch.calibrate.progress import Progress
from turbofit.launch.run import Run
from turbofit.launch.serve.leases import Leases
from turbofit.memory.calibrated import identity
from turbofit.model.source import resolve_model
from turbofit.observe import calibrations

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

    from turbofit.core.json_types import Document
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.supervisor import StopSignal
    from turbofit.planning.request import PlanRequest

__all__ = ["calibrate", "drop", "forget_all", "progress_of"]


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
    usage = PretendUsageReader() if config.pretend else NvmlUsageReader()
    calibrator = Calibrator(usage, progress, say)
    with Leases() as leases:
        run = Run(config, leases, say, on_open=lambda _: stop.end(), examiner=calibrator)
        return _calibrate(run, calibrator, progress, stop, again=again, apart=apart)


def _calibrate(
    run: Run,
    calibrator: Calibrator,
    progress: Progress,
    stop: StopSignal,
    *,
    again: bool,
    apart: bool,
) -> Document | signal.Signals:
    say, pretend = run.say, run.config.pretend
    if _resumes(run, progress, say):
        plan = run.refuse()
    else:
        plan = run.choose()
        if not plan.engine.of_lmdeploy:
            raise UsageError(
                f"{plan.model.name} is planned for Transformers: calibrate measures LMDeploy",
                hint="turbofit serve checks its plan with a worst-case request",
            )
        if calibration_of(plan) is not None and not again:
            say("calibrated before: --again measures again, --forget drops it")
            return stored(plan)
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
    before = {} if pretend else calibrator.before
    lmdeploy = run.lmdeploy.version
    result = learned(progress.plan, progress.seen, before, lmdeploy=lmdeploy, pretend=apart)
    progress.forget()
    if not result["kept"]:
        say(f"warning: nothing was learned: {result['why_not']}")
    if relieve(progress.plan, result, lmdeploy, pretend=pretend):
        say("what restarts had learned is dropped: this measurement says what was missing")
    return result


def _resumes(run: Run, progress: Progress, say: Callable[[str], None]) -> bool:
    """Whether the plan of a run that was cut short is reserved: the machine is still as it was."""
    if progress.plan is None:
        return False
    try:
        run.planner.take(progress.plan)
    except TurbofitError as exc:
        say(f"an earlier calibration was cut short, but {exc.message}: beginning again")
        return False
    say("going on where an earlier calibration was cut short")
    run.plan = progress.plan
    return True


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

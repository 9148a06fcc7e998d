"""``turbofit calibrate MODEL``: launch, drive the worst case, read the GPUs, and learn of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from turbofit.cli.command import command
from turbofit.cli.options.common_options import (
    FORMS,
    machine_options,
    model_argument,
    planning_options,
)
from turbofit.cli.options.fields import filled, options_of
from turbofit.cli.options.launch_options import CalibrateOptions
from turbofit.cli.serving.serve_plan import (
    first_plan,
    given_request,
    launch_request,
    planner_of,
    refuse,
    refuse_elsewhere,
)
from turbofit.cli.terminal.interrupt import exit_code, run_until_signal
from turbofit.core.errors import TurbofitError, UsageError

if TYPE_CHECKING:
    import signal

    from turbofit.core.plan import Plan
    from turbofit.launch.calibrate.calibrator import Calibrator
    from turbofit.launch.calibrate.progress import Progress
    from turbofit.launch.engine.environment import Lmdeploy
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.leases import Leases
    from turbofit.launch.serve.planner import Planner
    from turbofit.launch.serve.supervisor import StopSignal
    from turbofit.planning.request import PlanRequest

__all__ = ["calibrate"]

_PRETEND: Final = (
    "PRETEND GPUs: this tries the calibration itself; what it learns is kept for pretend GPUs only"
)


@command(
    *model_argument(),
    *machine_options(),
    *FORMS,
    *options_of(CalibrateOptions, CalibrateOptions.model_fields, group="calibration"),
    *planning_options(),
    only_linux=True,
)
def calibrate(*, model: str, as_json: bool, md: bool, **given: Any) -> int:
    """Calibrate and show; 130 where Ctrl-C ended it, and it then goes on from there next time."""
    from turbofit.launch.serve.leases import Leases

    options = filled(CalibrateOptions, given)
    options.check()
    request = given_request(model, given)
    if not options.pretend:
        refuse_elsewhere(request, "calibrate measures")
    arguments = _CalibrateArguments(model, request, options, as_json=as_json, md=md)
    if options.forget:
        return _forget(arguments)

    def body(stop: StopSignal) -> signal.Signals | None:
        with Leases() as leases:
            return _calibrate(arguments, stop, leases)

    return exit_code(run_until_signal(body))


class _CalibrateArguments(NamedTuple):
    """The command line of `calibrate`, read once."""

    model: str
    request: PlanRequest
    options: CalibrateOptions
    as_json: bool
    md: bool

    @property
    def kept_apart(self) -> bool:
        """Whether what is learned holds for pretend GPUs only."""
        from turbofit.observe.calibrations import pretends

        return self.options.pretend or pretends()

    def progress(self) -> Progress:
        """How far an earlier run of the same calibration came."""
        from turbofit.launch.calibrate.progress import Progress

        options = self.request.given()
        return Progress(options.pop("model"), options, pretend=self.kept_apart)


def _drop(arguments: _CalibrateArguments) -> int:
    """Forget what was learned of the model; how many there were."""
    from turbofit.memory.calibrated import identity
    from turbofit.model.source import resolve_model
    from turbofit.observe.calibrations import forget

    return forget(identity(resolve_model(arguments.model)), pretend=arguments.kept_apart)


def _forget(arguments: _CalibrateArguments) -> int:
    from turbofit.cli.terminal.output import say

    gone = _drop(arguments)
    left = arguments.progress().forget()
    say(f"forgot {gone} calibrations{' and one that was under way' if left else ''}")
    return 0


def _calibrate(
    arguments: _CalibrateArguments, stop: StopSignal, leases: Leases
) -> signal.Signals | None:
    """Measure and learn; the signal where one ended it before it was complete."""
    from turbofit.cli.terminal.output import note, say
    from turbofit.launch.engine.environment import lmdeploy_if_needed

    lmdeploy, missing = lmdeploy_if_needed(arguments.request.engine)
    options, request = arguments.options, arguments.request
    if options.pretend:
        note(_PRETEND)
        if options.again:
            # A pretend card is charged with what its plan says: it would learn the same twice.
            _drop(arguments)
    progress = arguments.progress()
    config = _config(options, launch_request(request, pretend=options.pretend))
    planner = planner_of(config, leases, doubled=lmdeploy.warning is not None)
    plan = _resumed(progress, planner)
    changes: dict[str, Any] = {}
    if plan is None:
        plan, changes = first_plan(request, options, planner, lmdeploy.version)
        if not plan.engine.of_lmdeploy:
            raise UsageError(
                f"{plan.model.name} is planned for Transformers: calibrate measures LMDeploy",
                hint="turbofit serve checks its plan with a worst-case request",
            )
        if _known(plan) and not options.again:
            _show_known(plan, arguments)
            return None
        if plan.fits:
            plan = planner.settle(plan, changes)
    refuse(plan, missing, pretend=options.pretend)
    say(plan.verdict)
    calibrator = _calibrator(progress, pretend=options.pretend)
    job = _job(config, plan, lmdeploy, stop, leases, calibrator, planner, changes)
    try:
        ended = _drive(job, plan, stop, progress)
    finally:
        calibrator.end()
    if ended is not None:
        return ended
    _learn(arguments, calibrator, progress, lmdeploy)
    return None


def _config(options: CalibrateOptions, request: PlanRequest) -> ServeConfig:
    """The config of a `serve` without a public side, whose end drains nothing."""
    from turbofit.launch.engine.supervised_engine import Timing
    from turbofit.launch.serve.config import ServeConfig

    return ServeConfig.of(
        request=request,
        timing=Timing(start=60 * options.minutes, drain=0.0, liveness=0.0),
        **options.config_fields(),
    )


def _drive(job: Any, plan: Plan, stop: StopSignal, progress: Progress) -> signal.Signals | None:
    """Launch and measure; the signal where one stopped it before the end."""
    from turbofit.cli.terminal.output import say
    from turbofit.launch.serve.session import run_session

    ended = run_session(job, plan, stop)
    if progress.complete:
        return None
    say("stopped: what was measured is kept, and the same command goes on from there")
    return ended


def _resumed(progress: Progress, planner: Planner) -> Plan | None:
    """The plan of a run that was cut short, where the machine is still as it was."""
    from turbofit.cli.terminal.output import say

    if progress.plan is None:
        return None
    try:
        planner.take(progress.plan)
    except TurbofitError as exc:
        say(f"an earlier calibration was cut short, but {exc.message}: beginning again")
        return None
    say("going on where an earlier calibration was cut short")
    return progress.plan


def _job(
    config: ServeConfig, plan: Plan, lmdeploy: Lmdeploy, stop: StopSignal, leases: Leases,
    calibrator: Calibrator, planner: Planner, changes: dict[str, Any],
) -> Any:  # fmt: skip
    """What `serve` would run, with an examiner and without a gateway."""
    from turbofit.cli.terminal.output import say
    from turbofit.launch.serve.download import WeightsFetcher
    from turbofit.launch.serve.job import Job
    from turbofit.launch.serve.record import Record, run_folder

    folder = run_folder(plan)
    return Job(
        config,
        folder=folder,
        record=Record(
            folder, model=plan.model.name, pretend=config.pretend, lmdeploy=lmdeploy.version,
            calibrates=True,
        ),
        say=say,
        on_open=lambda _: stop.end(),
        lmdeploy=lmdeploy,
        leases=leases,
        fetch=None if config.pretend else WeightsFetcher(say),
        replan=planner.make,
        changes=changes,
        examiner=calibrator,
    )  # fmt: skip


def _learn(
    arguments: _CalibrateArguments, calibrator: Calibrator, progress: Progress, lmdeploy: Lmdeploy
) -> None:
    """Correct what later plans estimate, keep it, and show it."""
    from turbofit.cli.terminal.output import say
    from turbofit.launch.calibrate.calibration_store import learned, relieve

    assert progress.plan is not None
    before = {} if arguments.options.pretend else calibrator.before
    result = learned(
        progress.plan,
        progress.seen,
        before,
        lmdeploy=lmdeploy.version,
        pretend=arguments.kept_apart,
    )
    progress.forget()
    if not result["kept"]:
        say(f"warning: nothing was learned: {result['why_not']}")
    if relieve(progress.plan, result, lmdeploy.version, pretend=arguments.options.pretend):
        say("what restarts had learned is dropped: this measurement says what was missing")
    _show(result, arguments)


def _known(plan: Plan) -> bool:
    """Whether the plan rests on a calibration already."""
    from turbofit.launch.calibrate.calibration_store import calibration_of

    return calibration_of(plan) is not None


def _show_known(plan: Plan, arguments: _CalibrateArguments) -> None:
    from turbofit.cli.terminal.output import say
    from turbofit.launch.calibrate.calibration_store import stored

    say("calibrated before: --again measures again, --forget drops it")
    _show(stored(plan), arguments)


def _show(result: dict[str, Any], arguments: _CalibrateArguments) -> None:
    from turbofit.cli.terminal.output import answer, show

    if arguments.as_json:
        import json

        answer(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        return
    from turbofit.report.views.run.calibration_view import calibration_view

    show(calibration_view(result), markdown=arguments.md)


def _calibrator(progress: Progress, *, pretend: bool) -> Calibrator:
    from turbofit.cli.terminal.output import say
    from turbofit.launch.calibrate.calibrator import Calibrator
    from turbofit.launch.calibrate.gpu_usage import NvmlUsageReader, PretendUsageReader

    return Calibrator(PretendUsageReader() if pretend else NvmlUsageReader(), progress, say)

"""``turbofit calibrate MODEL``: launch, drive the worst case, read the GPUs, and learn of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from turbofit.cli import options
from turbofit.cli.interrupt import exit_code, run_until_signal
from turbofit.core.errors import TurbofitError, UsageError

if TYPE_CHECKING:
    import argparse
    import signal

    from turbofit.cli.parser import Parser
    from turbofit.core.plan import Plan
    from turbofit.launch.calibrator import Calibrator
    from turbofit.launch.config import ServeConfig
    from turbofit.launch.environment import Lmdeploy
    from turbofit.launch.leases import Leases
    from turbofit.launch.planner import Planner
    from turbofit.launch.progress import Progress
    from turbofit.launch.serve import Stop
    from turbofit.planning.request import PlanRequest

__all__ = ["add_arguments", "run"]

_MINUTES: Final = 60.0
_PRETEND: Final = (
    "PRETEND GPUs: this tries the calibration itself; what it learns is kept for pretend GPUs only"
)


def add_arguments(parser: Parser) -> None:
    """The options of `plan`, and those of the launch that matter here."""
    options.add_model(parser)
    add = parser.add_argument_group("calibration").add_argument
    add("--pretend", action="store_true", help="on pretend GPUs: nothing real is learned")
    add("--again", action="store_true", help="measure again what was calibrated before")
    add("--forget", action="store_true", help="drop what was learned of this model, and end")
    add("--no-rehearse", action="store_true", help="do not run the plan on pretend GPUs first")
    add("--minutes", type=float, default=_MINUTES, metavar="N", help="give up after these (60)")
    add(
        "--pretend-taken", type=options.size, metavar="BYTES", default=0,
        help="with --pretend: somebody takes so much of each card after the plan was made",
    )  # fmt: skip
    options.add_machine(parser)
    options.add_planning(parser)
    options.add_settings(parser)
    options.add_json(parser)
    parser.set_defaults(plan=None)


def run(args: argparse.Namespace) -> int:
    """Calibrate and show; 130 where Ctrl-C ended it, and it then goes on from there next time."""
    from turbofit.launch.leases import Leases

    if args.on and not args.pretend:
        raise UsageError(
            "calibrate measures the machine here, so --on does not go with it",
            hint="leave --on out, or add --pretend",
        )
    if args.pretend_taken and not args.pretend:
        raise UsageError("--pretend-taken takes nothing of real GPUs", hint="add --pretend")
    if not args.minutes > 0:
        raise UsageError(f"--minutes {args.minutes} is no time", hint="give some minutes")
    if args.forget:
        return _forget(args)

    def body(stop: Stop) -> signal.Signals | None:
        with Leases() as leases:
            return _calibrate(args, stop, leases)

    return exit_code(run_until_signal(body))


def _drop(args: argparse.Namespace) -> int:
    """Forget what was learned of the model; how many there were."""
    from turbofit.memory.calibrated import identity
    from turbofit.model.source import resolve_model
    from turbofit.observe.calibrations import forget

    return forget(identity(resolve_model(args.model)), pretend=_kept_apart(args))


def _forget(args: argparse.Namespace) -> int:
    from turbofit.cli.output import note

    gone = _drop(args)
    left = _progress(args).forget()
    note(f"forgot {gone} calibrations{' and one that was under way' if left else ''}")
    return 0


def _calibrate(args: argparse.Namespace, stop: Stop, leases: Leases) -> signal.Signals | None:
    """Measure and learn; the signal where one ended it before it was complete."""
    from turbofit.cli.output import note
    from turbofit.cli.serve_plan import launch_request, planner_of, refuse
    from turbofit.launch.environment import lmdeploy_if_needed
    from turbofit.launch.passthrough import sort_options

    lmdeploy, missing = lmdeploy_if_needed(args.engine)
    if args.pretend:
        note(_PRETEND)
        if args.again:
            # A pretend card is charged with what its plan says: it would learn the same twice.
            _drop(args)
    passed, progress = sort_options([], unplanned=False), _progress(args)
    config = _config(args, launch_request(args, passed))
    planner = planner_of(config, leases, doubled=lmdeploy.warning is not None)
    plan = _resumed(progress, planner)
    changes: dict[str, Any] = {}
    if plan is None:
        from turbofit.cli.serve_plan import first_plan

        plan, changes = first_plan(args, passed, planner, lmdeploy.version)
        if plan.engine.name == "transformers":
            raise UsageError(
                f"{plan.model.name} is planned for Transformers: calibrate measures LMDeploy",
                hint="turbofit serve checks its plan with a worst-case request",
            )
        if _known(plan) and not args.again:
            _show_known(plan, args)
            return None
        if plan.fits:
            plan = planner.settle(plan, changes)
    refuse(plan, missing)
    note(plan.verdict)
    calibrator = _calibrator(args, progress)
    if not progress.complete:
        job = _job(config, plan, lmdeploy, stop, leases, calibrator, planner, changes)
        try:
            ended = _drive(job, plan, stop, progress)
        finally:
            calibrator.end()
        if ended is not None:
            return ended
    _learn(args, calibrator, progress, lmdeploy)
    return None


def _config(args: argparse.Namespace, request: PlanRequest) -> ServeConfig:
    """What `serve` would be asked for, but for a public side and an end that nobody waits for."""
    from turbofit.launch.config import ServeConfig
    from turbofit.launch.engine import Timing

    return ServeConfig.of(
        request=request,
        timing=Timing(start=60 * args.minutes, drain=0.0, liveness=0.0),
        rehearse=not args.no_rehearse,
        pretend=args.pretend,
        pretend_taken=args.pretend_taken,
    )


def _drive(job: Any, plan: Plan, stop: Stop, progress: Progress) -> signal.Signals | None:
    """Launch and measure; the signal where one stopped it before the end."""
    from turbofit.cli.output import note
    from turbofit.launch.session import run_session

    ended = run_session(job, plan, stop)
    if progress.complete:
        return None
    note("stopped: what was measured is kept, and the same command goes on from there")
    return ended


def _resumed(progress: Progress, planner: Planner) -> Plan | None:
    """The plan of a run that was cut short, where the machine is still as it was."""
    from turbofit.cli.output import note

    if progress.plan is None:
        return None
    try:
        planner.take(progress.plan)
    except TurbofitError as exc:
        note(f"an earlier calibration was cut short, but {exc.message}: beginning again")
        return None
    note("going on where an earlier calibration was cut short")
    return progress.plan


def _job(  # noqa: PLR0913 - the parts of one run, put together once
    config: ServeConfig, plan: Plan, lmdeploy: Lmdeploy, stop: Stop, leases: Leases,
    calibrator: Calibrator, planner: Planner, changes: dict[str, Any],
) -> Any:  # fmt: skip
    """What `serve` would run, with an examiner and without a gateway."""
    from turbofit.cli.output import note
    from turbofit.launch.download import WeightsFetcher
    from turbofit.launch.job import Job
    from turbofit.launch.record import Record, run_folder

    folder = run_folder(plan)
    return Job(
        config,
        folder=folder,
        record=Record(
            folder, model=plan.model.name, pretend=config.pretend, lmdeploy=lmdeploy.version,
            calibrates=True,
        ),
        say=note,
        on_open=lambda _: stop.end(),
        lmdeploy=lmdeploy,
        leases=leases,
        fetch=None if config.pretend else WeightsFetcher(note),
        replan=planner.make,
        changes=changes,
        examiner=calibrator,
    )  # fmt: skip


def _learn(
    args: argparse.Namespace, calibrator: Calibrator, progress: Progress, lmdeploy: Lmdeploy
) -> None:
    """Correct what later plans estimate, keep it, and show it."""
    from turbofit.cli.output import note
    from turbofit.launch.learning import learned, relieve

    assert progress.plan is not None
    before = {} if args.pretend else calibrator.before
    result = learned(
        progress.plan, progress.seen, before, lmdeploy=lmdeploy.version, pretend=_kept_apart(args)
    )
    progress.forget()
    if not result["kept"]:
        note(f"warning: nothing was learned: {result['why_not']}")
    if relieve(progress.plan, result, lmdeploy.version, pretend=args.pretend):
        note("what restarts had learned is dropped: this measurement says what was missing")
    _show(result, args)


def _known(plan: Plan) -> bool:
    """Whether the plan rests on a calibration already."""
    from turbofit.launch.learning import calibration_of

    return calibration_of(plan) is not None


def _show_known(plan: Plan, args: argparse.Namespace) -> None:
    from turbofit.cli.output import note
    from turbofit.launch.learning import stored

    note("calibrated before: --again measures again, --forget drops it")
    _show(stored(plan), args)


def _show(result: dict[str, Any], args: argparse.Namespace) -> None:
    from turbofit.cli.output import answer, show

    if args.json:
        import json

        answer(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        return
    from turbofit.report.calibration_view import calibration_view

    show(calibration_view(result), markdown=args.md)


def _calibrator(args: argparse.Namespace, progress: Progress) -> Calibrator:
    from turbofit.cli.output import note
    from turbofit.launch.calibrator import Calibrator
    from turbofit.launch.meter import NvmlMeter, PretendMeter

    return Calibrator(PretendMeter() if args.pretend else NvmlMeter(), progress, note)


def _progress(args: argparse.Namespace) -> Progress:
    from turbofit.launch.progress import Progress

    asked = options.planning_keywords(args)
    return Progress(args.model, asked, pretend=_kept_apart(args))


def _kept_apart(args: argparse.Namespace) -> bool:
    from turbofit.observe.calibrations import pretends

    return bool(args.pretend) or pretends()

"""``turbofit serve MODEL``: measure, plan, launch, open the gateway, watch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.cli import options
from turbofit.cli.gateway import add_gateway, gateway_config
from turbofit.cli.interrupt import exit_code, run_until_signal
from turbofit.cli.serve_cluster import add_cluster, serve_on_cluster
from turbofit.cli.serve_plan import (
    first_plan,
    planner_of,
    public_port,
    refuse,
    serve_config,
    show_commands,
)
from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    import argparse
    import signal
    from collections.abc import Sequence

    from turbofit.cli.parser import Parser
    from turbofit.gateway.config import GatewayConfig
    from turbofit.launch.config import ServeConfig
    from turbofit.launch.leases import Leases
    from turbofit.launch.passthrough import Passed
    from turbofit.launch.serve import Stop

__all__ = ["TAKES_REST", "add_arguments", "run"]

#: LMDeploy's own options may follow ``--``.
TAKES_REST: Final = True

_PRETEND: Final = (
    "PRETEND GPUs: memory, admission, errors and death are real; the words that this server "
    "generates mean nothing"
)


def add_arguments(parser: Parser) -> None:
    """The options of `plan`, those of the gateway, and those of the launch."""
    parser.usage = "turbofit serve (MODEL | --plan FILE) [options] [-- LMDEPLOY OPTIONS]"
    options.add_model(parser, optional=True)
    parser.add_argument("--plan", metavar="FILE", help="launch what `plan --json` wrote")
    _add_launch(parser)
    add_gateway(parser)
    # The run's folder keeps the access log where nothing else is said.
    parser.set_defaults(port=None, access_log=None)
    options.add_machine(parser)
    add_cluster(parser)
    options.add_planning(parser)
    options.add_settings(parser)
    options.add_json(parser)


def _add_launch(parser: Parser) -> None:
    group = parser.add_argument_group("launch")
    add = group.add_argument
    add("--dry-run", action="store_true", help="print what would be launched")
    add(
        "--pretend",
        action="store_true",
        help="LMDeploy's real server and engine on pretend GPUs: nothing is computed",
    )
    add(
        "--pretend-taken",
        type=options.size,
        metavar="BYTES",
        default=0,
        help="with --pretend: somebody takes so much of each card after the plan was made",
    )
    add("--no-check", action="store_true", help="ready without answered worst-case requests")
    add("--no-rehearse", action="store_true", help="do not run the plan on pretend GPUs first")
    add("--forget", action="store_true", help="begin without what earlier launches learned")
    add(
        "--no-gateway",
        action="store_true",
        help="no gateway: any client can then take the engines past the plan",
    )
    add(
        "--unplanned",
        action="store_true",
        help="pass LMDeploy options that change memory in ways the plan does not know",
    )
    add("--drain", type=_seconds, metavar="SECONDS", help="for open requests at the end (30)")
    add(
        "--liveness",
        type=_seconds,
        metavar="SECONDS",
        help="between completions that show that an engine lives (60; 0: none)",
    )


def run(args: argparse.Namespace) -> int:
    """Plan or read the plan, check, launch; 0 once a signal ended it in order."""
    from turbofit.cli.output import note
    from turbofit.launch.passthrough import sort_options

    passed = sort_options(args.after, unplanned=args.unplanned)
    if args.on and not args.dry_run and not args.pretend:
        raise UsageError(
            "serve launches on the machine here, so --on does not go with it",
            hint="leave --on out, or add --dry-run or --pretend",
        )
    if args.pretend_taken and not args.pretend:
        raise UsageError("--pretend-taken takes nothing of real GPUs", hint="add --pretend")
    if args.cluster is not None and args.model is None:
        raise UsageError("--cluster needs a model", hint="turbofit serve MODEL --cluster ray")
    if args.model is None and not args.plan:
        raise UsageError("serve needs a model", hint="turbofit serve MODEL, or --plan FILE")
    if args.cluster is not None:
        if args.pretend:
            note(_PRETEND)
        return serve_on_cluster(args, passed, _gateway(args, passed))
    if args.dry_run:
        return show_commands(args, passed)
    config = serve_config(args, passed, gateway=None if args.no_gateway else _gateway(args, passed))
    return _stoppable(args, passed, config)


def _stoppable(args: argparse.Namespace, passed: Passed, config: ServeConfig) -> int:
    from turbofit.launch.leases import Leases

    def body(stop: Stop) -> signal.Signals:
        with Leases() as leases:
            return _launch(args, passed, config, stop, leases)

    return exit_code(run_until_signal(body))


def _launch(
    args: argparse.Namespace, passed: Passed, config: ServeConfig, stop: Stop, leases: Leases
) -> signal.Signals:
    from turbofit.cli.output import answer, note
    from turbofit.launch.download import WeightsFetcher
    from turbofit.launch.environment import lmdeploy_if_needed
    from turbofit.launch.job import Job
    from turbofit.launch.others import end_orphans
    from turbofit.launch.record import Record, run_folder
    from turbofit.launch.session import run_session

    lmdeploy, missing = lmdeploy_if_needed(args.engine)
    for text in (*end_orphans(leases), *([leases.alone] if leases.alone else [])):
        note(f"warning: {text}")
    if args.pretend:
        note(_PRETEND)
    planner = planner_of(config, leases, doubled=lmdeploy.warning is not None)
    plan, changes = first_plan(args, passed, planner, lmdeploy.version)
    if plan.fits:
        plan = planner.settle(plan, None if args.plan else changes)
    refuse(plan, missing)
    note(plan.verdict)
    for warning in (*plan.warnings, *_doubts(args, passed, lmdeploy.warning)):
        note(f"warning: {warning}")
    folder = run_folder(plan)
    record = Record(folder, model=plan.model.name, pretend=args.pretend, lmdeploy=lmdeploy.version)
    job = Job(
        config,
        folder=folder,
        record=record,
        say=note,
        on_open=lambda urls: None if args.json else answer("".join(f"{u}\n" for u in urls)),
        lmdeploy=lmdeploy,
        leases=leases,
        fetch=None if args.pretend else WeightsFetcher(note),
        replan=None if args.plan else planner.make,
        changes=changes,
    )
    ended = run_session(job, plan, stop)
    if args.json:
        import json

        answer(json.dumps({"ended": ended.name, "run": str(folder)}, indent=2) + "\n")
    return ended


#: Options after ``--`` that are the gateway's business while there is one.
_PUBLIC: Final = (
    "--api-keys", "--allow-origins", "--allow-credentials", "--allow-methods", "--allow-headers",
    "--proxy-url",
)  # fmt: skip


def _gateway(args: argparse.Namespace, passed: Passed) -> GatewayConfig:
    """The public side.

    Raises:
        UsageError: open by accident, or options of the engine's own public side.
    """
    import os

    for name in _PUBLIC:
        if name in passed.argv:
            raise UsageError(
                f"{name} after -- would not reach clients: the gateway faces them",
                hint="use --api-key and --allow-origins before --, or --no-gateway",
            )
    one = os.environ.get("TURBOFIT_API_KEY", "").strip()
    if one and not args.api_key:
        args.api_key = [one]
    args.port = public_port(args)
    return gateway_config(args, upstream_key=None)


def _doubts(args: argparse.Namespace, passed: Passed, version: str | None) -> list[str]:
    """What the launch cannot promise, said before it."""
    doubts: Sequence[str] = [version] if version else []
    doubts = list(doubts)
    if passed.unplanned:
        doubts.append(
            f"{', '.join(passed.unplanned)} may change memory: the plan does not count it"
        )
    if args.no_gateway:
        doubts.append(
            "--no-gateway: the plan holds only while no client asks for more than it; any client "
            "can, and the engine then aborts"
        )
    return doubts


def _seconds(text: str) -> float:
    import argparse

    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value

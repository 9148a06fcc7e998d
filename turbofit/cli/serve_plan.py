"""What `serve` plans with: its options as the planner's, a saved plan, what was learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbofit.cli import options
from turbofit.core.errors import DoesNotFitError, LaunchError, PackageError, UsageError

if TYPE_CHECKING:
    import argparse

    from turbofit.core.plan import Command, Plan
    from turbofit.gateway.config import GatewayConfig
    from turbofit.launch.config import ServeConfig
    from turbofit.launch.engine import Timing
    from turbofit.launch.leases import Leases
    from turbofit.launch.passthrough import Passed
    from turbofit.launch.planner import Planner
    from turbofit.planning.request import PlanRequest

__all__ = [
    "first_plan", "launch_options", "launch_request", "plan_request", "planner_of", "public_port",
    "refusal", "refuse", "serve_config", "show_commands",
]  # fmt: skip


def serve_config(
    args: argparse.Namespace, passed: Passed, *, gateway: GatewayConfig | None
) -> ServeConfig:
    """What the options ask for."""
    from turbofit.launch.config import ServeConfig

    return ServeConfig.of(
        request=None if args.plan else launch_request(args, passed),
        gateway=gateway,
        port=public_port(args),
        api_key=passed.api_keys[0] if passed.api_keys else None,
        **launch_options(args, passed),
    )


def launch_options(args: argparse.Namespace, passed: Passed) -> dict[str, Any]:
    """The fields of `ServeConfig` that one machine and a cluster have options for."""
    return {
        "timing": _timing(args),
        "options": tuple(passed.argv),
        "access_log": args.access_log,
        "check": not args.no_check,
        "rehearse": not args.no_rehearse,
        "pretend": args.pretend,
        "pretend_taken": args.pretend_taken,
    }


def planner_of(config: ServeConfig, leases: Leases, *, doubled: bool) -> Planner:
    """What plans, or only reserves where a plan was given."""
    from turbofit.cli.output import note
    from turbofit.launch.planner import Planner, can_rehearse

    # A server on pretend GPUs is its own rehearsal.
    rehearse = config.rehearse and not config.pretend and can_rehearse()
    leased = None if config.pretend else leases
    return Planner(config.request, leased, note, rehearse=rehearse, doubled=doubled)


def launch_request(args: argparse.Namespace, passed: Passed) -> PlanRequest:
    """`plan_request`; the machine of a pretend run has what pretend runs have learned.

    It never has what real runs have. A twin of the machine here has the real card's, as its plan.
    """
    from turbofit.machine.source import machine_from
    from turbofit.observe.calibrations import with_calibrations

    request = plan_request(args, passed)
    if not args.pretend:
        return request
    machine = machine_from(args.on, gpus=request.gpus)
    if machine.source != "nvml":
        machine = with_calibrations(machine, pretend=True)
    return request.changed(on=machine, gpus=None)


def first_plan(
    args: argparse.Namespace, passed: Passed, planner: Planner, version: str
) -> tuple[Plan, dict[str, Any]]:
    """The plan to begin with, and the learned changes that it was made with."""
    from turbofit.cli.output import note
    from turbofit.launch.learned import forget, recall

    if args.plan:
        plan = _read(args, passed)
        if plan.fits:
            planner.take(plan)
        return plan, {}
    plan = planner.make({})
    if args.forget:
        if forget(plan, version, pretend=args.pretend):
            note("forgot what earlier launches had learned")
        return plan, {}
    changes = recall(plan, version, pretend=args.pretend)
    given = options.planning_keywords(args)
    changes = {name: value for name, value in changes.items() if name not in given}
    if not changes or not plan.fits:
        return plan, {}
    said = ", ".join(f"{name} {value}" for name, value in changes.items())
    again = planner.make(changes)
    if not again.fits:
        note(f"an earlier launch learned {said}, but nothing fits with it now")
        return planner.make({}), {}
    note(f"beginning with what an earlier launch learned: {said} (--forget drops it)")
    return again, changes


def show_commands(args: argparse.Namespace, passed: Passed) -> int:
    """Print instead of launching: the commands as somebody would run them without a gateway."""
    import msgspec

    from turbofit.cli.output import answer
    from turbofit.cli.plan import show_plan
    from turbofit.planning.plan import plan as best_plan
    from turbofit.report.shell import shell_command

    plan = _read(args, passed) if args.plan else best_plan(plan_request(args, passed))
    commands = _commands(plan, args, passed)
    if args.json or args.md:
        return show_plan(msgspec.structs.replace(plan, commands=commands), args, "serve")
    if not plan.fits:
        raise refusal(plan)
    answer("\n".join(shell_command(command) + "\n" for command in commands))
    return 0


def refusal(plan: Plan) -> DoesNotFitError:
    """The error for a plan that does not fit, with its cheapest remedy."""
    hint = "see turbofit plan MODEL for what would fit"
    if plan.remedies:
        first = plan.remedies[0]
        hint = f"{first.change}: {first.effect}"
    return DoesNotFitError(plan.verdict, hint=hint)


def refuse(plan: Plan, missing: PackageError | None) -> None:
    """Stop before anything is launched that would not serve."""
    import os

    from turbofit.planning.needs import check_needs
    from turbofit.planning.ranks import rank_warning

    if not plan.fits:
        raise refusal(plan)
    if missing is not None and plan.engine.name != "transformers":
        raise missing
    check_needs(plan)
    ranks = rank_warning(plan.parallel.tp, os.environ)
    if ranks:
        raise LaunchError(
            ranks, hint="unset WORLD_SIZE and LOCAL_RANK, or start it without torchrun"
        )


def public_port(args: argparse.Namespace) -> int:
    """The port that clients know."""
    from turbofit.planning.commands import DEFAULT_PORT

    return args.port or DEFAULT_PORT


def plan_request(args: argparse.Namespace, passed: Passed) -> PlanRequest:
    """What the options ask for, those after ``--`` among them."""
    keywords = options.planning_keywords(args)
    for name, value in _modelled(passed).items():
        if keywords.setdefault(name, value) != value:
            raise UsageError(
                f"{name} is given twice, before and after --", hint="leave one of the two out"
            )
    return options.plan_request(args, keywords)


def _read(args: argparse.Namespace, passed: Passed) -> Plan:
    """A saved plan: it is complete, so that nothing may be planned beside it."""
    from turbofit.core.struct import to_builtins
    from turbofit.report.saved import read_plan

    given = options.planning_keywords(args)
    if args.model is not None or given:
        what = "a model" if args.model is not None else f"{next(iter(given))}"
        raise UsageError(f"--plan and {what} do not go together", hint="give one of the two")
    plan = read_plan(args.plan)
    each = [to_builtins(one.settings) for one in plan.each()]
    for name, value in _modelled(passed).items():
        planned = list(dict.fromkeys(settings.get(name) for settings in each))
        if planned != [value]:
            words = " and ".join(map(str, planned))
            raise UsageError(
                f"{name} after -- is {value}, the plan was made for {words}",
                hint="plan again with it before --",
            )
    return plan


def _modelled(passed: Passed) -> dict[str, Any]:
    """Options after ``--`` that are planned with, read as turbofit's own are."""
    from turbofit.cli.parser import Parser

    parser = Parser(prog="turbofit serve")
    options.add_settings(parser)
    return options.planning_keywords(parser.parse_args(passed.modelled))


def _commands(plan: Plan, args: argparse.Namespace, passed: Passed) -> tuple[Command, ...]:
    from turbofit.core.plan import Command
    from turbofit.planning.fallback_commands import any_commands, refuse_options

    if plan.engine.name == "transformers":
        refuse_options(passed.argv)
    port = public_port(args)
    if port + plan.parallel.replicas - 1 > options.LAST_PORT:
        raise UsageError(
            f"{plan.parallel.replicas} engines from port {port} on go beyond {options.LAST_PORT}",
            hint="choose a lower --port",
        )
    return tuple(
        Command(env=command.env, argv=(*command.argv, *passed.argv), group=command.group)
        for command in any_commands(plan, port=port)
    )


def _timing(args: argparse.Namespace) -> Timing:
    """The deadlines that were given, the others as they are."""
    from turbofit.launch.engine import Timing

    given = {"drain": args.drain, "liveness": args.liveness}
    return Timing(**{name: value for name, value in given.items() if value is not None})

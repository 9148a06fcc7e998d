"""What `serve` plans with: its options as the planner's, a saved plan, what was learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from turbofit.cli.command import CliCommand, option_name
from turbofit.cli.options import LAST_PORT, planning_keywords, setting_options
from turbofit.core.errors import DoesNotFitError, LaunchError, PackageError, UsageError

if TYPE_CHECKING:
    from turbofit.cli.launch_options import LaunchOptions
    from turbofit.core.plan import Command, Plan
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.leases import Leases
    from turbofit.launch.serve.passthrough import Passed
    from turbofit.launch.serve.planner import Planner
    from turbofit.planning.request import PlanRequest

__all__ = [
    "LaunchArguments", "first_plan", "launch_request", "plan_request", "planner_of", "refusal",
    "refuse", "show_commands",
]  # fmt: skip


class LaunchArguments(NamedTuple):
    """The command line of what launches engines, read once.

    ``keywords`` are the plan's, as `planning_keywords` reads them; ``passed`` is what follows
    ``--``; ``plan`` is a saved plan's file, with which nothing is planned.
    """

    model: str | None
    keywords: dict[str, Any]
    options: LaunchOptions
    passed: Passed
    plan: str | None = None


def planner_of(config: ServeConfig, leases: Leases, *, doubled: bool) -> Planner:
    """What plans, or only reserves where a plan was given."""
    from turbofit.cli.output import note
    from turbofit.launch.serve.planner import Planner, can_rehearse

    # A server on pretend GPUs is its own rehearsal.
    rehearse = config.rehearse and not config.pretend and can_rehearse()
    leased = None if config.pretend else leases
    return Planner(config.request, leased, note, rehearse=rehearse, doubled=doubled)


def launch_request(arguments: LaunchArguments) -> PlanRequest:
    """`plan_request`; the machine of a pretend run has what pretend runs have learned.

    It never has what real runs have. A twin of the machine here has the real card's, as its plan.
    """
    from turbofit.machine.source import machine_from
    from turbofit.observe.calibrations import with_calibrations

    request = plan_request(arguments)
    if not arguments.options.pretend:
        return request
    machine = machine_from(arguments.keywords.get("on"), gpus=request.gpus)
    if machine.source != "nvml":
        machine = with_calibrations(machine, pretend=True)
    return request.changed(on=machine, gpus=None)


def first_plan(
    arguments: LaunchArguments, planner: Planner, version: str
) -> tuple[Plan, dict[str, Any]]:
    """The plan to begin with, and the learned changes that it was made with."""
    from turbofit.cli.output import note
    from turbofit.launch.serve.learned import forget, recall

    if arguments.plan:
        plan = _read(arguments)
        if plan.fits:
            planner.take(plan)
        return plan, {}
    plan = planner.make({})
    if arguments.options.forget:
        if forget(plan, version, pretend=arguments.options.pretend):
            note("forgot what earlier launches had learned")
        return plan, {}
    changes = recall(plan, version, pretend=arguments.options.pretend)
    changes = {name: value for name, value in changes.items() if name not in arguments.keywords}
    if not changes or not plan.fits:
        return plan, {}
    said = ", ".join(f"{name} {value}" for name, value in changes.items())
    again = planner.make(changes)
    if not again.fits:
        note(f"an earlier launch learned {said}, but nothing fits with it now")
        return planner.make({}), {}
    note(f"beginning with what an earlier launch learned: {said} (--forget drops it)")
    return again, changes


def show_commands(arguments: LaunchArguments, *, port: int, as_json: bool, md: bool) -> int:
    """Print instead of launching: the commands as somebody would run them without a gateway."""
    import msgspec

    from turbofit.cli.output import answer
    from turbofit.cli.plan import show_plan
    from turbofit.planning.plan import plan as best_plan
    from turbofit.report.shell import shell_command

    plan = _read(arguments) if arguments.plan else best_plan(plan_request(arguments))
    commands = _commands(plan, arguments.passed, port)
    if as_json or md:
        shown = msgspec.structs.replace(plan, commands=commands)
        return show_plan(shown, "serve", as_json=as_json, md=md)
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
    if missing is not None and plan.engine.of_lmdeploy:
        raise missing
    check_needs(plan)
    ranks = rank_warning(plan.parallel.tp, os.environ)
    if ranks:
        raise LaunchError(
            ranks, hint="unset WORLD_SIZE and LOCAL_RANK, or start it without torchrun"
        )


def plan_request(arguments: LaunchArguments) -> PlanRequest:
    """What the options ask for, those after ``--`` among them.

    Raises:
        UsageError: one of them is given twice.
    """
    from turbofit.planning.request import PlanRequest

    keywords = dict(arguments.keywords)
    for name, value in _modelled(arguments.passed).items():
        if keywords.setdefault(name, value) != value:
            raise UsageError(
                f"{option_name(name)} is given twice, before and after --",
                hint="leave one of the two out",
            )
    return PlanRequest.of(model=arguments.model, **keywords)


def _read(arguments: LaunchArguments) -> Plan:
    """A saved plan: it is complete, so that nothing may be planned beside it.

    Raises:
        UsageError: something is.
    """
    from turbofit.core.struct import to_builtins
    from turbofit.report.saved import read_plan

    model, keywords = arguments.model, arguments.keywords
    if model is not None or keywords:
        what = "a model" if model is not None else option_name(next(iter(keywords)))
        raise UsageError(f"--plan and {what} do not go together", hint="give one of the two")
    assert arguments.plan is not None
    plan = read_plan(arguments.plan)
    each = [to_builtins(one.settings) for one in plan.each()]
    for name, value in _modelled(arguments.passed).items():
        planned = list(dict.fromkeys(settings.get(name) for settings in each))
        if planned != [value]:
            words = " and ".join(map(str, planned))
            raise UsageError(
                f"{option_name(name)} after -- is {value}, the plan was made for {words}",
                hint="plan again with it before --",
            )
    return plan


def _modelled(passed: Passed) -> dict[str, Any]:
    """Options after ``--`` that are planned with, read as turbofit's own are."""
    reader = CliCommand(lambda: 0, setting_options())
    with reader.make_context("turbofit serve", list(passed.modelled)) as ctx:
        return planning_keywords(ctx.params)


def _commands(plan: Plan, passed: Passed, port: int) -> tuple[Command, ...]:
    from turbofit.core.plan import Command
    from turbofit.planning.commands import commands, refuse_options

    refuse_options(plan.engine, passed.argv)
    if port + plan.parallel.replicas - 1 > LAST_PORT:
        raise UsageError(
            f"{plan.parallel.replicas} engines from port {port} on go beyond {LAST_PORT}",
            hint="choose a lower --port",
        )
    return tuple(
        Command(env=command.env, argv=(*command.argv, *passed.argv), group=command.group)
        for command in commands(plan, port=port)
    )

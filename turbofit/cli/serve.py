"""``turbofit serve MODEL``: measure, plan, launch, watch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from turbofit.cli import options
from turbofit.core.errors import DoesNotFitError, LaunchError, UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from turbofit.cli.parser import Parser
    from turbofit.core.plan import Command, Plan
    from turbofit.launch.passthrough import Passed

__all__ = ["TAKES_REST", "add_arguments", "run"]

#: LMDeploy's own options may follow ``--``.
TAKES_REST: Final = True


def add_arguments(parser: Parser) -> None:
    """The options of `plan`, and those of the launch."""
    parser.usage = "turbofit serve (MODEL | --plan FILE) [options] [-- LMDEPLOY OPTIONS]"
    options.add_model(parser, optional=True)
    parser.add_argument("--plan", metavar="FILE", help="launch what `plan --json` wrote")
    parser.add_argument(
        "--port", type=options.port, default=None, help="first port (default 23333)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be launched")
    parser.add_argument(
        "--no-check", action="store_true", help="ready without an answered image request"
    )
    parser.add_argument(
        "--unplanned",
        action="store_true",
        help="pass LMDeploy options that change memory in ways the plan does not know",
    )
    options.add_machine(parser)
    options.add_planning(parser)
    options.add_settings(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Plan or read the plan, check, launch; 0 once a signal ended it in order."""
    from turbofit.launch.passthrough import sort_options

    passed = sort_options(args.after, unplanned=args.unplanned)
    if args.on and not args.dry_run:
        raise UsageError(
            "serve launches on the machine here, so --on does not go with it",
            hint="leave --on out, or add --dry-run",
        )
    plan = _read(args, passed) if args.plan else _plan(args, passed)
    commands = _commands(plan, args, passed)
    if args.dry_run:
        return _show(plan, commands, args)
    if not plan.fits:
        raise _refusal(plan)
    return _launch(plan, commands, args, passed)


def _plan(args: argparse.Namespace, passed: Passed) -> Plan:
    from turbofit import api

    if args.model is None:
        raise UsageError("serve needs a model", hint="turbofit serve MODEL, or --plan FILE")
    keywords = options.planning_keywords(args)
    for name, value in _modelled(passed).items():
        if keywords.setdefault(name, value) != value:
            raise UsageError(
                f"{name} is given twice, before and after --", hint="leave one of the two out"
            )
    plan = api.plan(args.model, **keywords)
    if args.dry_run or "margin" in keywords or not plan.fits or not _is_another_lmdeploy():
        return plan
    return api.plan(args.model, margin=2 * max(gpu.margin for gpu in plan.gpus), **keywords)


def _is_another_lmdeploy() -> bool:
    """Whether the account is for another LMDeploy than the one here: then margins are doubled."""
    from turbofit.launch.environment import find_lmdeploy

    return find_lmdeploy().warning is not None


def _read(args: argparse.Namespace, passed: Passed) -> Plan:
    """A saved plan: it is complete, so that nothing may be planned beside it."""
    from turbofit.cli.report import read_plan
    from turbofit.core.struct import to_builtins

    given = options.planning_keywords(args)
    if args.model is not None or given:
        what = "a model" if args.model is not None else f"{next(iter(given))}"
        raise UsageError(f"--plan and {what} do not go together", hint="give one of the two")
    plan = read_plan(args.plan)
    settings = to_builtins(plan.settings)
    for name, value in _modelled(passed).items():
        if settings.get(name) != value:
            raise UsageError(
                f"{name} after -- is {value}, the plan was made for {settings.get(name)}",
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
    from turbofit.launch.command import DEFAULT_PORT, commands

    port = args.port or DEFAULT_PORT
    if port + plan.parallel.replicas - 1 > options.LAST_PORT:
        raise UsageError(
            f"{plan.parallel.replicas} engines from port {port} on go beyond {options.LAST_PORT}",
            hint="choose a lower --port",
        )
    return tuple(
        Command(env=command.env, argv=(*command.argv, *passed.argv), group=command.group)
        for command in commands(plan, port=port)
    )


def _show(plan: Plan, commands: Sequence[Command], args: argparse.Namespace) -> int:
    """Print instead of launching."""
    import msgspec

    from turbofit.cli.output import answer
    from turbofit.cli.plan import show_plan
    from turbofit.report.shell import shell_command

    if args.json or args.md:
        return show_plan(msgspec.structs.replace(plan, commands=tuple(commands)), args)
    if not plan.fits:
        raise _refusal(plan)
    answer("\n".join(shell_command(command) + "\n" for command in commands))
    return 0


def _refusal(plan: Plan) -> DoesNotFitError:
    hint = "see turbofit plan MODEL for what would fit"
    if plan.remedies:
        first = plan.remedies[0]
        hint = f"{first.change}: {first.effect}"
    return DoesNotFitError(plan.verdict, hint=hint)


def _launch(
    plan: Plan, commands: Sequence[Command], args: argparse.Namespace, passed: Passed
) -> int:
    import os

    from turbofit.cli.output import answer, note
    from turbofit.launch.environment import find_lmdeploy, rank_warning
    from turbofit.launch.match import check_machine
    from turbofit.launch.serve import Server
    from turbofit.machine.source import machine_from

    ranks = rank_warning(plan.parallel.tp, os.environ)
    if ranks:
        raise LaunchError(
            ranks, hint="unset WORLD_SIZE and LOCAL_RANK, or start it without torchrun"
        )
    lmdeploy = find_lmdeploy()
    note(plan.verdict)
    for warning in (*plan.warnings, *_doubts(passed, lmdeploy.warning)):
        note(f"warning: {warning}")
    check_machine(plan, machine_from(None))
    folder = _folder(plan)
    server = Server(
        plan,
        commands,
        lmdeploy.argv,
        folder,
        note,
        key=passed.api_keys[0] if passed.api_keys else None,
        check=not args.no_check and plan.limits.vision_unit is not None,
    )
    ended = server.run(
        lambda urls: None if args.json else answer("".join(f"{url}\n" for url in urls))
    )
    if args.json:
        import json

        answer(json.dumps({"ended": ended.name, "run": str(folder)}, indent=2) + "\n")
    return _INTERRUPTED if ended.name == "SIGINT" else 0


_INTERRUPTED: Final = 130


def _doubts(passed: Passed, version: str | None) -> list[str]:
    """What the launch cannot promise, said before it."""
    doubts = [version] if version else []
    if passed.unplanned:
        doubts.append(
            f"{', '.join(passed.unplanned)} may change memory: the plan does not count it"
        )
    return doubts


def _folder(plan: Plan) -> Path:
    """A folder of the state folder for this run, with its plan."""
    from turbofit.core.state import new_folder

    try:
        folder = new_folder("runs", "".join(c if c.isalnum() else "-" for c in plan.model.name))
        (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    except OSError as exc:
        raise LaunchError(
            f"the state folder cannot be written: {exc.strerror or exc}",
            hint="set XDG_STATE_HOME to a folder that can",
        ) from None
    return folder

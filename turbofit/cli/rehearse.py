"""``turbofit rehearse MODEL``: the plan's settings and worst cases before the real engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.cli import options

if TYPE_CHECKING:
    import argparse

    from turbofit.cli.parser import Parser

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """The options of `plan`; with `--defaults` LMDeploy's own settings are rehearsed."""
    options.add_model(parser)
    options.add_machine(parser)
    options.add_planning(parser)
    options.add_settings(parser)
    parser.add_argument(
        "--defaults", action="store_true", help="LMDeploy's defaults instead of turbofit's plan"
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Rehearse and show; exit 3 where the engine did not serve."""
    from turbofit import api
    from turbofit.cli.output import note
    from turbofit.cli.plan import show_plan

    note("pretend GPUs: memory, admission and death are the engine's own; nothing is computed")
    keywords = options.planning_keywords(args)
    plan = api.rehearse(args.model, defaults=args.defaults, **keywords)
    code = show_plan(plan, args)
    served = plan.rehearsal is not None and plan.rehearsal.outcome == "served"
    return code if served or code else 3

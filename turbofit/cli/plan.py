"""``turbofit plan MODEL``: the best plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.cli import options

if TYPE_CHECKING:
    import argparse

    from turbofit.cli.parser import Parser
    from turbofit.core.plan import Plan

__all__ = ["add_arguments", "run", "show_plan"]


def add_arguments(parser: Parser) -> None:
    """Everything that narrows the search."""
    options.add_model(parser)
    options.add_machine(parser)
    options.add_cluster(parser)
    options.add_planning(parser)
    options.add_settings(parser)
    parser.add_argument(
        "--rehearse", action="store_true", help="check the choice with the engine on pretend GPUs"
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Plan and show; exit 3 where nothing fits."""
    from turbofit import api
    from turbofit.cli.output import patience

    if args.cluster is not None:
        return _cluster(args)
    keywords = options.planning_keywords(args)
    doing = "planning, and rehearsing on pretend GPUs" if args.rehearse else "planning"
    with patience(doing):
        plan = api.plan(args.model, rehearse=args.rehearse, **keywords)
    return show_plan(plan, args, "plan")


def _cluster(args: argparse.Namespace) -> int:
    """Plan for a cluster and show; exit 3 where no node serves.

    Raises:
        UsageError: an option of one machine is given beside it.
    """
    from turbofit import api
    from turbofit.cli.output import answer, patience, show
    from turbofit.core.errors import DoesNotFitError, UsageError
    from turbofit.launch.cluster.source import cluster_from

    for name in ("on", "gpus", "rehearse"):
        if getattr(args, name):
            raise UsageError(
                f"--{name} is of one machine, and --cluster names several",
                hint=f"leave --{name} out, or plan for that machine alone",
            )
    keywords = options.planning_keywords(args)
    with patience("measuring the nodes, and planning"):
        plan = api.plan_cluster(args.model, cluster_from(args.cluster), **keywords)
    if args.json:
        answer(plan.to_json())
    else:
        from turbofit.report.cluster_view import cluster_view

        show(cluster_view(plan), markdown=args.md)
    return 0 if plan.fits else DoesNotFitError.exit_code


def show_plan(plan: Plan, args: argparse.Namespace, command: str) -> int:
    """Show a plan as asked, keep it as the newest of its command and return its exit code."""
    from turbofit.cli.output import answer, show
    from turbofit.core.errors import DoesNotFitError
    from turbofit.report.saved import keep

    keep(plan, command)
    if args.json:
        answer(plan.to_json())
    else:
        from turbofit.report.plan_view import plan_view

        show(plan_view(plan), markdown=args.md)
    return 0 if plan.fits else DoesNotFitError.exit_code

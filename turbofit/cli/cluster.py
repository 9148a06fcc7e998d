"""``turbofit cluster``: what a Ray cluster serves, another plan for it, a node that is to leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from turbofit.cli import options
from turbofit.cli.serve_cluster import ray_address
from turbofit.core.errors import LaunchError, UsageError, error_from

if TYPE_CHECKING:
    import argparse

    from turbofit.cli.parser import Parser
    from turbofit.core.cluster import ClusterStatus

__all__ = ["add_arguments", "run"]

_ACTIONS: Final = ("status", "nodes", "change", "drain")
#: What serves looks once a second; a plan for a thousand nodes takes seconds.
_LOOK_SECONDS: Final = 15.0
_PLAN_SECONDS: Final = 300.0


def add_arguments(parser: Parser) -> None:
    """What to do, on which cluster, with which deployment."""
    parser.usage = (
        "turbofit cluster status|nodes|change|drain [NODE] [--cluster ray:ADDRESS] [options]"
    )
    add = parser.add_argument
    add(
        "action",
        choices=_ACTIONS,
        help="status: what is served, node by node; nodes: measure them; change: plan again, and "
        "change node by node while clients are served; drain: empty a node before it leaves",
    )
    add("node", nargs="?", metavar="NODE", help="drain: its name, address or id")
    add("--cluster", metavar="RAY", default="ray", help="ray (default), or ray:ADDRESS")
    add("--name", help="what is served under this name (default: the only one)")
    add("--pretend", action="store_true", help="nodes: as they pretend to be")
    options.add_planning(parser)
    options.add_settings(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Do it.

    Raises:
        UsageError: options of another action, or nothing is served there.
    """
    given = options.planning_keywords(args)
    if given and args.action != "change":
        raise UsageError(
            f"{next(iter(given))} plans, and {args.action} does not",
            hint="turbofit cluster change plans again",
        )
    if (args.node is not None) != (args.action == "drain"):
        raise UsageError("drain takes a node, others none", hint="turbofit cluster drain NODE")
    if args.action == "nodes":
        return _nodes(args)
    if args.action == "status":
        return _status(args)
    if args.action == "change":
        if not given:
            raise UsageError(
                "nothing is to change", hint="give what shall be another: --context 16384"
            )
        return _ask(args, {"kind": "change", "keywords": given}, _PLAN_SECONDS)
    return _ask(args, {"kind": "drain", "node": args.node}, _LOOK_SECONDS)


def _nodes(args: argparse.Namespace) -> int:
    from turbofit.cli.output import answer, patience, show
    from turbofit.launch.cluster.nodes import measure_nodes

    with patience("measuring the nodes"):
        cluster = measure_nodes(ray_address(args.cluster), pretend=args.pretend)
    if args.json:
        answer(cluster.to_json())
    else:
        from turbofit.report.cluster_status import nodes_view

        show(nodes_view(cluster), markdown=args.md)
    return 0


def _status(args: argparse.Namespace) -> int:
    from turbofit.cli.output import answer, show
    from turbofit.core.struct import to_json

    served = _served(args)
    if args.json:
        answer(to_json(served))
    else:
        from turbofit.report.cluster_status import status_view

        show([block for one in served for block in status_view(one)], markdown=args.md)
    return 0


def _served(args: argparse.Namespace) -> list[ClusterStatus]:
    """What is served there.

    Raises:
        UsageError: nothing.
    """
    from turbofit.launch.cluster.connect import connected
    from turbofit.launch.cluster.coordinator import find_coordinators, heard

    with connected(ray_address(args.cluster)):
        coordinators = find_coordinators(args.name)
        if not coordinators:
            raise UsageError(
                "nothing is served on this cluster", hint="turbofit serve MODEL --cluster ray"
            )
        told = [
            heard(coordinator.status.remote(), _LOOK_SECONDS)
            for coordinator in coordinators.values()
        ]
    return [one for one in told if one is not None]


def _ask(args: argparse.Namespace, question: dict[str, Any], seconds: float) -> int:
    """Ask what serves, and tell its answer.

    Raises:
        TurbofitError: it refused.
    """
    import json

    from turbofit.cli.output import answer
    from turbofit.launch.cluster.connect import connected
    from turbofit.launch.cluster.coordinator import heard, one_coordinator

    with connected(ray_address(args.cluster)):
        coordinator = one_coordinator(args.name, "turbofit serve MODEL")
        told: dict[str, Any] | None = heard(
            coordinator.ask.remote(question, seconds), seconds + _LOOK_SECONDS
        )
    if told is None:
        raise LaunchError(
            f"no answer within {seconds:.0f} s", hint="see the output of turbofit serve"
        )
    if "error" in told:
        raise error_from(told["error"])
    answer(json.dumps(told, indent=2) + "\n" if args.json else f"{told['said']}\n")
    return 0

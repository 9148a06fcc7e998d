"""``turbofit cluster``: what a Ray cluster serves, another plan for it, a node that is to leave."""

from __future__ import annotations

from itertools import chain
from typing import Any, Final

import click

from turbofit.cli.command import Argument, Option, command, option_name
from turbofit.cli.options.common_options import FORMS, planning_keywords, planning_options
from turbofit.cli.serving import ray_address
from turbofit.cli.terminal.output import Form, answer
from turbofit.core.errors import UsageError
from turbofit.core.process.progress import under_way

_ACTIONS: Final = ("status", "nodes", "change", "drain")
#: What serves looks once a second; a plan for a thousand nodes takes seconds.
_LOOK_SECONDS: Final = 15.0
_PLAN_SECONDS: Final = 300.0


@command(
    Argument("action", metavar="ACTION", type=click.Choice(_ACTIONS)),
    Argument("node", metavar="NODE", required=False),
    Option("--cluster", metavar="RAY", default="ray"),
    Option("--name"),
    Option("--pretend", is_flag=True),
    *FORMS,
    *planning_options(),
    only_linux=True,
    usage="status|nodes|change|drain [NODE] [--cluster ray:ADDRESS] [OPTIONS]",
)
def cluster(
    *,
    action: str,
    node: str | None,
    cluster: str,
    name: str | None,
    pretend: bool,
    form: Form,
    **given: Any,
) -> int:
    keywords = planning_keywords(given)
    if keywords and action != "change":
        raise UsageError(
            f"{option_name(next(iter(keywords)))} plans, and {action} does not",
            hint="turbofit cluster change plans again",
        )
    if (node is not None) != (action == "drain"):
        raise UsageError("drain takes a node, others none", hint="turbofit cluster drain NODE")
    address = ray_address(cluster)
    if action == "nodes":
        return _nodes(address, form, pretend=pretend)
    if action == "status":
        return _status(address, name, form)
    question, seconds = {"kind": action, "node": node, "keywords": keywords}, _LOOK_SECONDS
    if action == "change":
        if not keywords:
            hint = "give what shall be another: --context 16384"
            raise UsageError("nothing is to change", hint=hint)
        seconds = _PLAN_SECONDS
    from turbofit.core.struct import to_json
    from turbofit.launch.cluster.ray_adapter import ask, connected, one_board

    with connected(address):
        reply = ask(one_board(name), question, seconds)
    answer(to_json(reply) if form.as_json else f"{reply['said']}\n")
    return 0


def _nodes(address: str | None, form: Form, *, pretend: bool) -> int:
    from turbofit.launch.cluster.nodes import measure_nodes
    from turbofit.report.views.several_view import nodes_view

    with under_way("measuring the nodes"):
        measured = measure_nodes(address, pretend=pretend)
    form.show(measured, nodes_view)
    return 0


def _status(address: str | None, name: str | None, form: Form) -> int:
    from turbofit.launch.cluster.ray_adapter import boards, connected, read
    from turbofit.report.views.several_view import status_view

    with connected(address):
        statuses = [read(board)[0] for board in boards(name).values()]
    served = [status for status in statuses if status is not None]
    form.show(served, lambda all_: chain(*map(status_view, all_)))
    return 0

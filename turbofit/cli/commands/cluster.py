"""``turbofit cluster`` and ``serve MODEL --cluster ray``: the machines of a Ray cluster."""

from __future__ import annotations

from itertools import chain
from typing import Any, Final

import click

from turbofit.cli.command import Argument, Option, command
from turbofit.cli.commands.serving import PRETEND, Arguments, say_open
from turbofit.cli.options import common_options as common
from turbofit.cli.terminal import output
from turbofit.cli.terminal.interrupts import exit_code, run_until_signal
from turbofit.core.errors import UsageError
from turbofit.core.messages import option_of, refuse_together
from turbofit.core.struct import to_json
from turbofit.launch.serve import options as launch

_ACTIONS: Final = ("status", "change", "drain")
#: Seconds to wait for an answer: the server looks each second, a plan for 1,000 nodes takes longer.
_SECONDS: Final = {"drain": 15.0, "change": 300.0}


@command(
    Argument("action", metavar="ACTION", type=click.Choice(_ACTIONS)),
    Argument("node", metavar="NODE", required=False),
    Option("--cluster", metavar="RAY", default="ray"),
    Option("--name"),
    *common.FORMS,
    *common.planning_options(),
    only_linux=True,
    usage="status|change|drain [NODE] [--cluster ray:ADDRESS] [OPTIONS]",
)
def cluster(
    *,
    action: str,
    node: str | None,
    cluster: str,
    name: str | None,
    form: output.Form,
    **given: Any,
) -> int:
    keywords = common.planning_keywords(given)
    if keywords and action != "change":
        raise UsageError(
            f"{option_of(next(iter(keywords)))} plans, and {action} does not",
            hint="turbofit cluster change plans again",
        )
    if (node is not None) != (action == "drain"):
        raise UsageError("drain takes a node, others none", hint="turbofit cluster drain NODE")
    address = launch.ray_address(cluster)
    if action == "status":
        return _status(address, name, form)
    if action == "change" and not keywords:
        hint = "give what shall be another: --context 16384"
        raise UsageError("nothing is to change", hint=hint)
    from turbofit.launch.cluster.ray_adapter import ask, connected, one_board

    question = {"kind": action, "node": node, "keywords": keywords}
    with connected(address):
        reply = ask(one_board(name), question, _SECONDS[action])
    form.tell(reply, f"{reply['said']}\n")
    return 0


def _status(address: str | None, name: str | None, form: output.Form) -> int:
    from turbofit.launch.cluster.ray_adapter import boards, connected, read
    from turbofit.report.views.cluster_view import status_view

    with connected(address):
        statuses = [read(board)[0] for board in boards(name).values()]
    served = [status for status in statuses if status is not None]
    form.show(served, lambda all_: chain(*map(status_view, all_)))
    return 0


#: Options that belong to one machine.
_ONE_MACHINE: Final = (
    "on", "gpus", "plan", "dry_run", "no_gateway", "forget", "lease", "front_key_file",
    "max_concurrent_requests",
)  # fmt: skip
_NOT_OF_NODES: Final = ("cluster", "name", "node_port", "no_rehearse", "unplanned")


def serve_on_cluster(arguments: Arguments, form: output.Form) -> int:
    """Serve on a cluster until a signal; returns 0 if one ended it normally."""
    from turbofit.launch.cluster.controller import serve_cluster
    from turbofit.launch.serve.config import ClusterServeConfig
    from turbofit.planning.resolve import model_of

    request, options, public, passed = arguments
    if options.pretend:
        output.note(PRETEND)
    gateway = arguments.gateway()
    given = {*request.given(), *options.given(), *public.given()}
    instead = "; turbofit plan --cluster shows what would be served"
    refuse_together({name: name in given for name in _ONE_MACHINE}, "--cluster", instead)
    assert options.cluster is not None
    planned = arguments.planned()
    model = model_of(planned)  # read here, so that no node needs to
    config = ClusterServeConfig.of(
        request=planned.changed(model=model),
        gateway=gateway,
        address=launch.ray_address(options.cluster),
        name=options.name,
        node_port=options.node_port,
        node_words=_node_words(arguments),
        access_log=public.access_log,
        options=tuple(passed.argv),
        **options.config_fields(),
    )

    def opened(urls: list[str]) -> None:
        say_open(urls, config, config.client_name(model), form)

    ended = run_until_signal(
        lambda stop: serve_cluster(config, stop, say=output.say, on_open=opened)
    )
    if form.as_json:
        output.answer(to_json({"ended": ended.name}))
    output.say("nothing of it is left on the cluster")
    return exit_code(ended)


def _node_words(arguments: Arguments) -> tuple[str, ...]:
    """Options for each node's `turbofit serve` beside its plan: those that a front does not use."""
    words, public = arguments.options.option_arguments(_NOT_OF_NODES), arguments.public
    of_nodes = ("allowed_media_domains", "default_chat_template_kwargs", "default_sampling")
    names = (name for name in type(public).model_fields if name not in of_nodes)
    words += public.option_arguments(tuple(names))
    passed = arguments.passed.argv
    return (*words, *(("--unplanned", "--", *passed) if passed else ()))

"""``turbofit cluster`` and ``serve MODEL --cluster ray``: the machines of a Ray cluster."""

from __future__ import annotations

from typing import Final

import click

from turbofit.cli.command import Argument, Option, command
from turbofit.cli.commands.serve import PRETEND, Arguments, say_open
from turbofit.cli.options import common_options as common
from turbofit.cli.terminal import output
from turbofit.cli.terminal.output import exit_code, run_until_signal
from turbofit.core.errors import UsageError
from turbofit.core.messages import refuse_together
from turbofit.core.struct import to_json
from turbofit.serving import options as launch


@command(
    Argument("action", metavar="ACTION", type=click.Choice(("status", "drain"))),
    Argument("node", metavar="NODE", required=False),
    Option("--cluster", metavar="RAY", default="ray"),
    Option("--name"),
    *common.FORMS,
    only_linux=True,
    usage="status|drain [NODE] [--cluster ray:ADDRESS]",
)
def cluster(
    *, action: str, node: str | None, cluster: str, name: str | None, form: output.Form
) -> int:
    from turbofit.report.views.cluster_view import status_view
    from turbofit.serving.cluster.actors import drain, statuses
    from turbofit.serving.cluster.ray_adapter import connected

    if (node is not None) != (action == "drain"):
        raise UsageError("drain takes a node, status none", hint="turbofit cluster drain NODE")
    with connected(launch.ray_address(cluster)):
        if node is None:
            form.show(statuses(name), status_view)
        else:
            drained = drain(name, node)
            form.tell({"drained": drained.id}, f"node {drained.name} finishes what it has\n")
    return 0


#: Options that belong to one machine.
_ONE_MACHINE: Final = (
    "on", "gpus", "plan", "dry_run", "no_gateway", "forget", "front_key_file",
    "max_concurrent_requests",
)  # fmt: skip
_NOT_OF_NODES: Final = ("cluster", "name", "node_port", "no_rehearse", "unplanned")
#: Options of the gateway that nodes apply, not their front.
_OF_NODES: Final = ("allowed_media_domains", "default_chat_template_kwargs", "default_sampling")


def serve_on_cluster(arguments: Arguments, form: output.Form) -> int:
    """Serve on a cluster until a signal; returns 0 if one ended it normally."""
    from turbofit.planning.resolve import model_of
    from turbofit.serving.cluster.controller import serve_cluster
    from turbofit.serving.options import ClusterServeConfig

    request, options, public, passed = arguments
    if options.pretend:
        output.note(PRETEND)
    given = {*request.given(), *options.given(), *public.given()}
    instead = "; turbofit plan --cluster shows what would be served"
    refuse_together({name: name in given for name in _ONE_MACHINE}, "--cluster", instead)
    assert options.cluster is not None
    planned = arguments.request
    model = model_of(planned)  # read here, so that no node needs to
    words = (
        "--port", str(options.node_port), *options.option_arguments(_NOT_OF_NODES),
        *public.option_arguments(tuple({*type(public).model_fields} - {*_OF_NODES})),
        *(("--unplanned", "--", *passed.argv) if passed.argv else ()),
    )  # fmt: skip
    config = ClusterServeConfig.of(
        request=planned.changed(model=model),
        gateway=arguments.gateway(),
        address=launch.ray_address(options.cluster),
        name=options.name or model.name,
        node_words=words,
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

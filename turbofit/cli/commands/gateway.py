"""``turbofit gateway --plan FILE --upstream URL``: the gateway alone, in front of any LMDeploy."""

from __future__ import annotations

from typing import Any

from turbofit.cli.command import PATH, Option, command, option_name
from turbofit.cli.options.common_options import JSON
from turbofit.cli.options.fields import filled, options_of
from turbofit.cli.options.gateway_options import GatewayOptions
from turbofit.cli.terminal.interrupt import exit_code, run_until_signal, say_cut
from turbofit.core.errors import UsageError

__all__ = ["gateway"]


@command(
    Option("--plan", metavar="FILE", type=PATH, help="what `plan --json` wrote"),
    Option(
        "--upstream",
        metavar="URL",
        multiple=True,
        help="address of an engine, e.g. http://127.0.0.1:23334 (repeatable)",
    ),
    Option(
        "--upstream-key",
        metavar="KEY",
        help="the engines' API key (default: $TURBOFIT_UPSTREAM_KEY)",
    ),
    Option(
        "--overlay",
        is_flag=True,
        help="the engines run on a model folder whose default is the plan's limit",
    ),
    Option(
        "--cluster",
        metavar="RAY",
        help="one more gateway of what a Ray cluster serves: ray, ray:ADDRESS",
    ),
    Option("--name", help="with --cluster: what is served (default: the only one)"),
    JSON,
    *options_of(GatewayOptions, GatewayOptions.model_fields, group="gateway"),
    only_linux=True,
)
def gateway(
    *,
    plan: str | None,
    upstream: tuple[str, ...],
    upstream_key: str | None,
    overlay: bool,
    cluster: str | None,
    name: str | None,
    as_json: bool,
    **given: Any,
) -> int:
    """Serve until a signal ends it; 0 after a drain."""
    from msgspec.structs import replace

    from turbofit.cli.options.launch_options import needs_cluster
    from turbofit.cli.terminal.output import answer, note
    from turbofit.core.process.variables import variables
    from turbofit.gateway.http.accesslog import access_log
    from turbofit.gateway.routing.deny_file import deny_path
    from turbofit.gateway.server import make_gateway, run_gateway
    from turbofit.report.stored_documents import read_plan

    options = filled(GatewayOptions, given)
    if cluster is not None:
        of_one = {"plan": plan, "upstream": upstream, "upstream_key": upstream_key}
        for one, value in {**of_one, "overlay": overlay}.items():
            if value:
                raise UsageError(
                    f"{option_name(one)} and --cluster do not go together",
                    hint=f"leave {option_name(one)} out",
                )
        return _one_more(cluster, name, options, as_json=as_json)
    if name is not None:
        raise needs_cluster("name")
    if not plan or not upstream:
        raise UsageError(
            "gateway needs --plan and --upstream, or --cluster",
            hint="turbofit gateway --plan plan.json --upstream http://127.0.0.1:23334",
        )
    planned = read_plan(plan)
    key = upstream_key or variables().upstream_key or None
    kept = deny_path(planned, planned.engine.version)
    config = replace(options.config(upstream_key=key), denied=kept)
    if not overlay and planned.limits.vision_unit is not None:
        note(
            "note: images that cannot carry a limit are counted at the model's own default "
            "(--overlay: the engines run on an overlay)"
        )
    made = make_gateway(
        planned, upstream, config, overlay=overlay, log=access_log(options.access_log or "-")
    )
    if made.deny_list.file.damage:
        note(f"warning: {made.deny_list.file.damage}")
    run_gateway(made, on_ready=lambda url: None if as_json else answer(f"{url}\n"))
    cut = made.connections.cut
    if as_json:
        answer(f'{{"ended": "{"cut off" if cut else "drained"}", "cut": {cut}}}\n')
    say_cut(cut)
    return 0


def _one_more(cluster: str, name: str | None, options: GatewayOptions, *, as_json: bool) -> int:
    """In front of a cluster; 0 after a drain."""
    from turbofit.cli.serving.serve_cluster import ray_address
    from turbofit.cli.terminal.output import answer
    from turbofit.gateway.http.accesslog import access_log
    from turbofit.launch.cluster.extra_gateway import run_extra_gateway

    config = options.config()
    ended = run_until_signal(
        lambda stop: run_extra_gateway(
            ray_address(cluster),
            name,
            config,
            access_log(options.access_log or "-"),
            stop,
            lambda url: None if as_json else answer(f"{url}\n"),
        )
    )
    if as_json:
        answer('{"ended": "drained"}\n')
    return exit_code(ended)

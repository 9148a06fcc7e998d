"""``turbofit gateway``: keeps clients of LMDeploy within a plan, or passes requests to servers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from turbofit.cli.command import PATH, Option, command
from turbofit.cli.commands.serve import public_side
from turbofit.cli.options import common_options as common
from turbofit.cli.options import field_options as fields
from turbofit.cli.terminal.output import Form, answer, note, say_cut
from turbofit.core.errors import UsageError
from turbofit.core.messages import refuse_together
from turbofit.gateway.config import GatewayOptions
from turbofit.serving.options import needs_cluster, ray_address

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.core.plan import Plan
    from turbofit.gateway.config import GatewayConfig
    from turbofit.gateway.front import Front, NodeAddress
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.http.asgi_app import AsgiApp

#: Options of the gateway that a front leaves to its nodes.
_OF_NODES: Final = (
    "front_key_file", "allowed_media_domains", "allowed_media_networks",
    "default_chat_template_kwargs", "default_sampling",
)  # fmt: skip


@command(
    Option("--plan", metavar="FILE", type=PATH),
    Option("--upstream", metavar="URL", multiple=True),
    Option("--upstream-key", metavar="KEY", multiple=True),
    Option("--models", metavar="NAME=URL", several=True),
    Option("--nodes", metavar="URL", multiple=True),
    Option("--overlay", is_flag=True),
    Option("--cluster", metavar="RAY"),
    Option("--name"),
    common.JSON,
    *fields.options_of(GatewayOptions, group="gateway"),
    only_linux=True,
)
def gateway(
    *,
    plan: str | None,
    upstream: tuple[str, ...],
    upstream_key: tuple[str, ...],
    models: tuple[str, ...],
    nodes: tuple[str, ...],
    overlay: bool,
    cluster: str | None,
    name: str | None,
    form: Form,
    **given: Any,
) -> int:
    """Serve a gateway or a front until a signal ends it; return 0 after a drain."""
    from turbofit.core.process.variables import UPSTREAM_KEYS, keys_in
    from turbofit.report.stored_documents import read_plan

    options = fields.filled(GatewayOptions, given)
    # What only a gateway of one plan takes; a front before several servers refuses these.
    of_one = {"plan": plan, "upstream": upstream, "overlay": overlay}
    of_one |= {name: getattr(options, name) for name in _OF_NODES}
    keys = upstream_key or keys_in(UPSTREAM_KEYS)
    if cluster is not None:
        beside = {"models": models, "nodes": nodes, "upstream_key": upstream_key}
        refuse_together({**of_one, **beside}, "--cluster")
        return _serve_before_cluster(cluster, name, options, form)
    if models:
        from turbofit.gateway.front import ModelsGateway, model_servers
        from turbofit.serving.access_log import access_log

        together = {"nodes": nodes, "max_concurrent_requests": options.max_concurrent_requests}
        refuse_together({**of_one, **together}, "--models", "; each server has its own")
        log = access_log(options.access_log or "-")
        return _serve(ModelsGateway(model_servers(models, keys), public_side(options), log), form)
    if len(keys) > 1:
        raise UsageError("several keys are for --models", hint="give one --upstream-key")
    key = keys[0] if keys else None
    if nodes:
        from turbofit.gateway.front import node_addresses

        refuse_together(of_one, "--nodes")
        addresses = node_addresses(nodes, key)
        return _serve(_make_front(options, lambda: addresses), form)
    if name is not None:
        raise needs_cluster("name")
    if not plan or not upstream:
        raise UsageError(
            "gateway needs --plan and --upstream, or --models, --nodes or --cluster",
            hint="--plan FILE is what turbofit plan MODEL --json > FILE writes; --upstream URL is"
            " an engine's address, as http://127.0.0.1:23334",
        )
    config = public_side(options, upstream_key=key)
    app = _gateway_of_plan(read_plan(plan), upstream, config, options.access_log, overlay=overlay)
    return _serve(app, form)


def _gateway_of_plan(
    planned: Plan, upstream: Sequence[str], config: GatewayConfig, log: str | None, *, overlay: bool
) -> Gateway:
    """Make the gateway of one plan.

    ``overlay``: whether the engines open the plan's overlay folder, which holds image limits.
    Without an overlay, a note says how images are counted.
    """
    from turbofit.gateway.grammar_trials import trials_of
    from turbofit.serving.access_log import access_log
    from turbofit.serving.engine.parsers import parser_options
    from turbofit.serving.plan_gateway import make_gateway

    if not overlay and planned.promise.limits.vision_unit is not None:
        note(
            "note: images that cannot carry a limit are counted at the model's own default "
            "(--overlay says that the engines run on an overlay)"
        )
    folder = planned.model.source.checkpoint or ""
    parsers = [*parser_options(planned.model, Path(folder), ())]
    trials = trials_of(planned, folder, parsers, note, ours=False)
    return make_gateway(
        planned, upstream, config, overlay=overlay, log=access_log(log or "-"), grammars=trials
    )


def _serve(app: AsgiApp, form: Form) -> int:
    """Serve an app until a signal ends it; return 0 after a drain."""
    from turbofit.gateway.server import run_gateway

    run_gateway(app, on_ready=lambda url: None if form.as_json else answer(f"{url}\n"))
    cut = app.connections.cut
    if form.as_json:
        answer(f'{{"ended": "{"cut off" if cut else "drained"}", "cut": {cut}}}\n')
    say_cut(cut)
    return 0


def _make_front(options: GatewayOptions, source: Callable[[], Sequence[NodeAddress]]) -> Front:
    from turbofit.gateway.front import Front
    from turbofit.serving.access_log import access_log

    return Front(source, public_side(options), access_log(options.access_log or "-"))


def _serve_before_cluster(
    cluster: str, name: str | None, options: GatewayOptions, form: Form
) -> int:
    """Serve in front of all nodes of a run on a Ray cluster; return 0 after a drain."""
    from turbofit.serving.cluster.actors import address_source, statuses
    from turbofit.serving.cluster.ray_adapter import connected

    with connected(ray_address(cluster)):
        runs = {status.serves for status in statuses(name)}
        if len(runs) > 1:
            raise UsageError(
                f"{len(runs)} models are served there",
                hint=f"choose one with --name: {', '.join(sorted(runs))}",
            )
        # The front stays with this run, even if the cluster serves other models later.
        front = _make_front(options, address_source(runs.pop()))
        return _serve(front, form)

"""``turbofit gateway --plan FILE --upstream URL``: the gateway alone, in front of any LMDeploy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.cli import options
from turbofit.cli.interrupt import exit_code, run_until_signal

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from turbofit.cli.parser import Parser
    from turbofit.gateway.config import GatewayConfig

__all__ = ["add_arguments", "add_gateway", "gateway_config", "run"]


def add_arguments(parser: Parser) -> None:
    """The plan, the engines, and `add_gateway`'s."""
    parser.add_argument("--plan", metavar="FILE", help="what `plan --json` wrote")
    parser.add_argument(
        "--upstream",
        metavar="URL",
        action="append",
        help="address of an engine, e.g. http://127.0.0.1:23334 (repeatable)",
    )
    parser.add_argument(
        "--upstream-key",
        metavar="KEY",
        help="the engines' API key (default: $TURBOFIT_UPSTREAM_KEY)",
    )
    parser.add_argument(
        "--overlay",
        action="store_true",
        help="the engines run on a model folder whose default is the plan's limit",
    )
    parser.add_argument(
        "--cluster",
        metavar="RAY",
        help="one more gateway of what a Ray cluster serves: ray, ray:ADDRESS",
    )
    parser.add_argument("--name", help="with --cluster: what is served (default: the only one)")
    add_gateway(parser)
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout at the end"
    )


def add_gateway(parser: Parser) -> None:
    """Options of the public side, which `serve` has too."""
    group = parser.add_argument_group("gateway")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="where to listen (default 127.0.0.1)")
    add("--port", type=options.port, default=23333, help="where to listen (default 23333)")
    add(
        "--api-key",
        metavar="KEY",
        action="append",
        help="a key that clients must send (repeatable; default: $TURBOFIT_API_KEYS, by commas)",
    )
    add("--no-auth", action="store_true", help="let everybody in, beyond loopback too")
    add(
        "--allowed-media-domains",
        metavar="DOMAIN",
        nargs="+",
        default=[],
        help="fetch remote images from these: example.com, *.example.com, example.com:8443",
    )
    add(
        "--allow-origins",
        metavar="ORIGIN",
        nargs="+",
        default=[],
        help="web pages that may use the server, e.g. https://chat.example.com (default: none)",
    )
    add(
        "--trusted-proxies",
        metavar="ADDRESS",
        nargs="+",
        default=[],
        help="reverse proxies whose X-Forwarded-For says who the client is: 10.0.0.7, 10.0.0.0/8",
    )
    add(
        "--connections-per-address",
        metavar="N",
        type=options.number,
        help="connections that one address may have, but for trusted proxies (default 1024)",
    )
    add("--ssl-certfile", metavar="FILE", help="serve TLS with this certificate")
    add("--ssl-keyfile", metavar="FILE", help="its key")
    add(
        "--access-log",
        metavar="FILE",
        default="-",
        help="a JSON line for each request: a file, - for stderr (default), or none",
    )


def gateway_config(args: argparse.Namespace, *, upstream_key: str | None) -> GatewayConfig:
    """What `add_gateway`'s options say.

    Raises:
        UsageError: open to the network by accident, half a certificate, or a proxy without an
            address.
    """
    import os

    from turbofit.cli.output import note
    from turbofit.core.errors import UsageError
    from turbofit.gateway.config import ConnectionLimits, GatewayConfig
    from turbofit.gateway.connections import Networks
    from turbofit.gateway.server import check_bind

    keys: Sequence[str] = args.api_key or os.environ.get("TURBOFIT_API_KEYS", "").split(",")
    if bool(args.ssl_certfile) != bool(args.ssl_keyfile):
        raise UsageError(
            "--ssl-certfile and --ssl-keyfile go together", hint="give both, or neither"
        )
    if args.api_key and not all(key.strip() for key in args.api_key):
        raise UsageError("an --api-key is empty", hint="leave it out, or give a key")
    Networks(args.trusted_proxies)  # which says what is none before anything is started
    of_one = args.connections_per_address
    config = GatewayConfig(
        host=args.host,
        port=args.port,
        api_keys=tuple(key.strip() for key in keys if key.strip()),
        upstream_key=upstream_key,
        allow_origins=tuple(args.allow_origins),
        allowed_media_domains=tuple(args.allowed_media_domains),
        trusted_proxies=tuple(args.trusted_proxies),
        connection=ConnectionLimits(
            **({} if of_one is None else {"connections_per_address": of_one})
        ),
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
    )
    check_bind(config, no_auth=args.no_auth)
    if not config.ssl_certfile and config.host not in ("127.0.0.1", "::1", "localhost"):
        note("warning: without --ssl-certfile, keys and prompts cross the network in clear")
    return config


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it; 0 after a drain."""
    import os

    from turbofit.cli.output import answer, note
    from turbofit.core.errors import UsageError
    from turbofit.gateway.accesslog import access_log
    from turbofit.gateway.server import make_gateway, run_gateway
    from turbofit.report.saved import read_plan

    if args.cluster is not None:
        return _attend(args)
    if not args.plan or not args.upstream:
        raise UsageError(
            "gateway needs --plan and --upstream, or --cluster",
            hint="turbofit gateway --plan plan.json --upstream http://127.0.0.1:23334",
        )
    plan = read_plan(args.plan)
    key = args.upstream_key or os.environ.get("TURBOFIT_UPSTREAM_KEY") or None
    config = gateway_config(args, upstream_key=key)
    if not args.overlay and plan.limits.vision_unit is not None:
        note(
            "note: images that cannot carry a limit are counted at the model's own default "
            "(--overlay: the engines run on an overlay)"
        )
    gateway = make_gateway(
        plan, args.upstream, config, overlay=args.overlay, log=access_log(args.access_log)
    )
    run_gateway(gateway, on_ready=lambda url: None if args.json else answer(f"{url}\n"))
    if args.json:
        answer('{"ended": "drained"}\n')
    return 0


def _attend(args: argparse.Namespace) -> int:
    """In front of a cluster; 0 after a drain."""
    from turbofit.cli.output import answer
    from turbofit.cli.serve_cluster import ray_address
    from turbofit.core.errors import UsageError
    from turbofit.gateway.accesslog import access_log
    from turbofit.launch.cluster.extra_gateway import run_extra_gateway

    for name in ("plan", "upstream", "upstream_key", "overlay"):
        if getattr(args, name):
            option = name.replace("_", "-")
            raise UsageError(
                f"--{option} and --cluster do not go together", hint=f"leave --{option} out"
            )
    config = gateway_config(args, upstream_key=None)
    ended = run_until_signal(
        lambda stop: run_extra_gateway(
            ray_address(args.cluster),
            args.name,
            config,
            access_log(args.access_log),
            stop,
            lambda url: None if args.json else answer(f"{url}\n"),
        )
    )
    if args.json:
        answer('{"ended": "drained"}\n')
    return exit_code(ended)

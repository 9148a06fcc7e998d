"""``turbofit serve MODEL --cluster ray``: the machines of a Ray cluster instead of this one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.cli import options
from turbofit.cli.interrupt import exit_code, run_until_signal
from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from turbofit.cli.parser import Parser
    from turbofit.gateway.config import GatewayConfig
    from turbofit.launch.config import ClusterServeConfig
    from turbofit.launch.passthrough import Passed

__all__ = ["add_cluster", "ray_address", "serve_on_cluster"]

#: Options of one machine; the value that means nothing was given.
_ONE_MACHINE: Final = {
    "on": None, "gpus": None, "plan": None, "dry_run": False, "no_gateway": False, "forget": False,
}  # fmt: skip


def add_cluster(parser: Parser) -> None:
    """Where the cluster is, what people call what is served, and how many gateways there may be."""
    group = parser.add_argument_group("cluster")
    group.add_argument(
        "--cluster", metavar="RAY", help="serve on all machines of a Ray cluster: ray, ray:ADDRESS"
    )
    group.add_argument("--name", help="what the cluster calls it (default: the model's name)")
    group.add_argument(
        "--gateways",
        type=_gateways,
        metavar="N",
        default=1,
        help="gateways that share the limits: this one, and turbofit gateway --cluster (1)",
    )


def ray_address(text: str) -> str | None:
    """Ray's address in ``ray`` or ``ray:ADDRESS``; None is the cluster of this host.

    Raises:
        UsageError: something else.
    """
    kind, _, address = text.partition(":")
    if kind != "ray":
        raise UsageError(f"--cluster {text[:60]!r} is no Ray cluster", hint="ray, or ray:HOST:6379")
    return address or None


def serve_on_cluster(args: argparse.Namespace, passed: Passed, gateway: GatewayConfig) -> int:
    """Serve until a signal; 0 once one ended it in order.

    Raises:
        UsageError: an option of one machine.
    """
    from turbofit.cli.output import answer, note
    from turbofit.launch.cluster.run import serve_cluster

    for name, nothing in _ONE_MACHINE.items():
        if getattr(args, name) != nothing:
            option = name.replace("_", "-")
            raise UsageError(
                f"--{option} is of one machine, and --cluster names several",
                hint=f"leave --{option} out; turbofit plan --cluster shows what would be served",
            )
    config = _config(args, passed, gateway)
    ended = run_until_signal(
        lambda stop: serve_cluster(
            config,
            stop,
            say=note,
            on_open=lambda urls: None if args.json else answer("".join(f"{u}\n" for u in urls)),
        )
    )
    if args.json:
        import json

        answer(json.dumps({"ended": ended.name}, indent=2) + "\n")
    note("nothing of it is left on the cluster")
    return exit_code(ended)


def _config(args: argparse.Namespace, passed: Passed, gateway: GatewayConfig) -> ClusterServeConfig:
    """What the options ask for; the model is read here, so that no node has to."""
    from turbofit.cli.serve_plan import launch_options, plan_request
    from turbofit.launch.config import ClusterServeConfig
    from turbofit.planning.resolve import model_of

    request = plan_request(args, passed)
    return ClusterServeConfig.of(
        request=request.changed(model=model_of(request)),
        gateway=gateway,
        address=ray_address(args.cluster),
        name=args.name,
        gateways=args.gateways,
        **launch_options(args, passed),
    )


def _gateways(text: str) -> int:
    import argparse

    if not text.isdecimal() or not 1 <= int(text) <= options.LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of gateways")
    return int(text)

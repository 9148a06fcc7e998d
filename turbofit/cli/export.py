"""``turbofit export KIND PLAN``: manifests of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import argparse

    from turbofit.cli.parser import Parser

__all__ = ["add_arguments", "run"]

_IMAGE: Final = "turbofit:latest"
_EVERYWHERE: Final = "0.0.0.0"


def add_arguments(parser: Parser) -> None:
    """The kind, the plan, and what a manifest needs beside them."""
    parser.add_argument("kind", choices=("systemd", "compose", "k8s"), help="what to write")
    parser.add_argument("plan", metavar="PLAN", help="what `plan --json` wrote, or - for stdin")
    parser.add_argument("--name", help="of the service (default: turbofit-MODEL)")
    parser.add_argument("--port", type=int, default=23333, help="of the gateway (default 23333)")
    parser.add_argument(
        "--image", default=_IMAGE, help=f"compose, k8s: what to run (default {_IMAGE})"
    )
    parser.add_argument("--claim", help="k8s: a PersistentVolumeClaim for the hub's cache")
    parser.add_argument(
        "--host",
        help="systemd: where the gateway listens (default 127.0.0.1); containers: all of them",
    )
    parser.add_argument(
        "--executable", metavar="PATH", help="systemd: turbofit's path there (default: this one)"
    )
    parser.add_argument("--json", action="store_true", help="what the manifest says, as JSON")


def run(args: argparse.Namespace) -> int:
    """Write the manifest to stdout."""
    from turbofit.cli.output import answer
    from turbofit.core.errors import UsageError
    from turbofit.core.struct import to_json
    from turbofit.launch.export.compose import compose_file
    from turbofit.launch.export.k8s import k8s_objects
    from turbofit.launch.export.service import service_of
    from turbofit.launch.export.systemd import systemd_unit
    from turbofit.report.saved import read_plan

    if args.kind != "systemd" and args.host not in (None, _EVERYWHERE):
        raise UsageError(
            f"--host {args.host} is not for {args.kind}: the container's network is its own",
            hint="leave --host out; publish the port where you want it",
        )
    host = args.host or ("127.0.0.1" if args.kind == "systemd" else _EVERYWHERE)
    service = service_of(read_plan(args.plan), port=args.port, host=host, name=args.name)
    if args.json:
        answer(to_json(service))
    elif args.kind == "systemd":
        answer(systemd_unit(service, executable=args.executable or _here()))
    elif args.kind == "compose":
        answer(compose_file(service, image=args.image))
    else:
        answer(k8s_objects(service, image=args.image, claim=args.claim))
    return 0


def _here() -> str:
    """The path of this turbofit's console script."""
    import shutil
    import sys
    from pathlib import Path

    beside = Path(sys.executable).with_name("turbofit")
    return str(beside) if beside.exists() else shutil.which("turbofit") or "/usr/bin/turbofit"

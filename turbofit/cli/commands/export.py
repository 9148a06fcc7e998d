"""``turbofit export KIND PLAN``: manifests of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from turbofit.cli.command import PATH, Argument, Option, command
from turbofit.cli.options.common_options import PORT
from turbofit.cli.options.profile_options import profile_of, profile_option
from turbofit.core.errors import UsageError
from turbofit.core.process.ports import DEFAULT_PORT

if TYPE_CHECKING:
    from turbofit.core.plan import Plan

__all__ = ["export"]

_IMAGE: Final = "turbofit:latest"
_EVERYWHERE: Final = "0.0.0.0"


@command(
    Argument(
        "kind",
        metavar="KIND",
        type=click.Choice(("systemd", "compose", "k8s")),
        explained="what to write: systemd, compose or k8s",
    ),
    Argument(
        "plan",
        metavar="PLAN",
        type=PATH,
        required=False,
        explained="what `plan --json` wrote, or - for stdin; or a profile, with -f",
    ),
    profile_option(),
    Option("--name", help="of the service (default: turbofit-MODEL)"),
    Option(
        "--port", type=PORT, default=DEFAULT_PORT, help=f"of the gateway (default {DEFAULT_PORT})"
    ),
    Option("--image", default=_IMAGE, help=f"compose, k8s: what to run (default {_IMAGE})"),
    Option("--claim", help="k8s: a PersistentVolumeClaim for the hub's cache"),
    Option(
        "--host",
        help="systemd: where the gateway listens (default 127.0.0.1); containers: all of them",
    ),
    Option(
        "--executable", metavar="PATH", help="systemd: turbofit's path there (default: this one)"
    ),
    Option("--json", "as_json", is_flag=True, help="what the manifest says, as JSON"),
)
def export(
    *,
    kind: str,
    plan: str | None,
    name: str | None,
    port: int,
    image: str,
    claim: str | None,
    host: str | None,
    executable: str | None,
    as_json: bool,
) -> int:
    """Write the manifest to stdout."""
    from turbofit.cli.terminal.output import answer
    from turbofit.core.struct import to_json
    from turbofit.launch.export.compose import compose_file
    from turbofit.launch.export.k8s import k8s_objects
    from turbofit.launch.export.service import service_of
    from turbofit.launch.export.systemd import systemd_unit

    if kind != "systemd" and host not in (None, _EVERYWHERE):
        raise UsageError(
            f"--host {host} is not for {kind}: the container's network is its own",
            hint="leave --host out; publish the port where you want it",
        )
    host = host or ("127.0.0.1" if kind == "systemd" else _EVERYWHERE)
    service = service_of(_plan(plan), port=port, host=host, name=name)
    if as_json:
        answer(to_json(service))
    elif kind == "systemd":
        answer(systemd_unit(service, executable=executable or _here()))
    elif kind == "compose":
        answer(compose_file(service, image=image))
    else:
        answer(k8s_objects(service, image=image, claim=claim))
    return 0


def _plan(file: str | None) -> Plan:
    """What `plan --json` wrote, or what a profile asks for.

    Raises:
        UsageError: none of them is given, or both are.
    """
    from turbofit import api
    from turbofit.cli.options.fields import filled
    from turbofit.planning.request import PlanRequest
    from turbofit.report.stored_documents import read_plan

    ctx = click.get_current_context()
    if (file is None) == (profile_of(ctx) is None):
        raise UsageError("export needs a plan or a profile", hint="give PLAN, or -f FILE")
    if file is not None:
        return read_plan(file)
    return api.plan(filled(PlanRequest, dict(ctx.default_map or {})))


def _here() -> str:
    """The path of this turbofit's console script."""
    import shutil
    import sys
    from pathlib import Path

    beside = Path(sys.executable).with_name("turbofit")
    return str(beside) if beside.exists() else shutil.which("turbofit") or "/usr/bin/turbofit"

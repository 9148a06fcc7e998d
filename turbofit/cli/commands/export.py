"""``turbofit export``: manifests of a plan."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import click

from turbofit.cli.command import PATH, Argument, Option, command
from turbofit.cli.options import common_options as common
from turbofit.cli.terminal.output import Form, answer
from turbofit.core.errors import UsageError
from turbofit.core.process.ports import DEFAULT_PORT

if TYPE_CHECKING:
    from turbofit.core.plan import Plan

_IMAGE: Final = "turbofit:latest"
_EVERYWHERE: Final = "0.0.0.0"
#: Other names of each kind.
_OTHER_NAMES: Final = {
    "docker-compose": "compose", "docker": "compose", "kubernetes": "k8s", "kube": "k8s",
    "service": "systemd",
}  # fmt: skip


class _Kind(click.Choice[str]):
    """A kind of manifest, by any of its names; ``words`` are all of them."""

    words = ("systemd", "compose", "k8s", *_OTHER_NAMES)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert(_OTHER_NAMES.get(value, value), param, ctx)


@command(
    Argument("kind", metavar="KIND", type=_Kind(("systemd", "compose", "k8s"))),
    Argument("plan", metavar="PLAN", type=PATH),
    common.spec_option(),
    Option("--name"),
    Option("--port", type=common.PORT, default=DEFAULT_PORT, usual=f" (default {DEFAULT_PORT})"),
    Option("--image", default=_IMAGE, usual=f" (default {_IMAGE})"),
    Option("--claim"),
    Option("--host"),
    Option("--executable", metavar="PATH"),
    common.JSON,
)
def export(
    *,
    kind: str,
    plan: str,
    on: str | None,
    name: str | None,
    port: int,
    image: str,
    claim: str | None,
    host: str | None,
    executable: str | None,
    form: Form,
) -> int:
    from turbofit.core.struct import to_json
    from turbofit.launch.export import (
        SYSTEM_USER,
        exporter,
        installed_program,
        manifest,
        service_of,
    )

    of_systemd = kind == "systemd"
    if not of_systemd and host not in (None, _EVERYWHERE):
        raise UsageError(
            f"--host {host} is not for {kind}: the container's network is its own",
            hint="leave --host out; publish the port where you want it",
        )
    host = host or ("127.0.0.1" if of_systemd else _EVERYWHERE)
    if executable and not os.path.isabs(executable):
        raise UsageError(
            f"--executable {executable} is no absolute path, and systemd takes no other",
            hint=f"write it from the root, as --executable {installed_program()}",
        )
    service = service_of(_given(plan, on), port=port, host=host, name=name)
    if form.as_json:
        answer(to_json(service))
    else:
        path = executable or installed_program()
        user = exporter() if of_systemd else SYSTEM_USER  # no other manifest has a user
        answer(manifest(service, kind, image=image, claim=claim, executable=path, user=user))
    return 0


def _given(given: str, on: str | None) -> Plan:
    """The plan in a file of `plan --json`, or the plan of a model."""
    from turbofit import api
    from turbofit.report.stored_documents import read_plan

    if given == "-" or given.endswith(".json") or os.path.isfile(given):
        if on is not None:
            raise UsageError("the plan says its machine", hint="leave --on out, or name a model")
        return read_plan(given)
    return api.plan(given, on=on)

"""``turbofit export``: manifests of a plan."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import click

from turbofit.cli.command import PATH, Argument, Option, command
from turbofit.cli.options import common_options as common
from turbofit.cli.terminal.output import answer
from turbofit.core.errors import UsageError
from turbofit.core.process.ports import DEFAULT_PORT

if TYPE_CHECKING:
    from turbofit.core.plan import Plan

_IMAGE: Final = "turbofit:latest"


@command(
    Argument("kind", metavar="KIND", type=click.Choice(("systemd", "compose", "k8s"))),
    Argument("plan", metavar="PLAN", type=PATH),
    common.spec_option(),
    Option("--name"),
    Option("--port", type=common.PORT, default=DEFAULT_PORT, usual=f" (default {DEFAULT_PORT})"),
    Option("--image", default=_IMAGE, usual=f" (default {_IMAGE})"),
)
def export(*, kind: str, plan: str, on: str | None, name: str | None, port: int, image: str) -> int:
    from turbofit.launch.export import manifest

    answer(manifest(_given(plan, on), kind, port=port, name=name, image=image))
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

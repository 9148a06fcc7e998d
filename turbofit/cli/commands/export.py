"""``turbofit export``: manifests of a plan."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import click

from turbofit.cli.command import PATH, Argument, Option, command
from turbofit.cli.options import common_options as common
from turbofit.cli.terminal.output import answer
from turbofit.core.errors import UsageError, option_of
from turbofit.core.process.ports import DEFAULT_PORT

if TYPE_CHECKING:
    from turbofit.core.json_types import Options
    from turbofit.core.plan import Plan

_IMAGE: Final = "turbofit:latest"


@command(
    Argument("kind", metavar="KIND", type=click.Choice(("systemd", "compose", "k8s"))),
    Argument("plan", metavar="PLAN", type=PATH),
    *common.machine_options(),
    Option("--name"),
    Option("--port", type=common.PORT, default=DEFAULT_PORT, usual=f" (default {DEFAULT_PORT})"),
    Option("--image", default=_IMAGE, usual=f" (default {_IMAGE})"),
    *common.planning_options(),
)
def export(
    *, kind: str, plan: str, name: str | None, port: int, image: str, **given: object
) -> int:
    from turbofit.cli.export import manifest

    planned = _planned(plan, common.planning_keywords(given))
    answer(manifest(planned, kind, port=port, name=name, image=image))
    return 0


def _planned(given: str, options: Options) -> Plan:
    """The plan in a file of `plan --json`, or the plan of a model with these options."""
    from turbofit import api
    from turbofit.report.stored_documents import read_plan

    if given == "-" or given.endswith(".json") or os.path.isfile(given):
        if options:
            names = ", ".join(map(option_of, options))
            raise UsageError(
                f"{given} is a plan already", hint=f"leave {names} out, or name a model"
            )
        return read_plan(given)
    return api.plan(given, **options)

"""``turbofit export`` and ``init``: manifests of a plan, and a profile from one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import click

from turbofit.cli.command import PATH, Argument, Option, command
from turbofit.cli.options import common_options as common
from turbofit.cli.options import field_options as fields
from turbofit.cli.options import profile_option as profiles
from turbofit.cli.terminal.output import answer
from turbofit.core.errors import UsageError
from turbofit.core.process.ports import DEFAULT_PORT
from turbofit.core.process.progress import under_way

if TYPE_CHECKING:
    from turbofit.core.plan import Plan
    from turbofit.planning.request import PlanRequest

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


_HEAD: Final = """\
# `turbofit plan` and `serve` read it with `-f {file}`; docs/environment.md has every key.
# Planned on {created}: {verdict}
# It chose: {chosen}
"""


@command(
    *common.model_argument(),
    *common.machine_options(),
    Option(
        "--out",
        metavar="FILE",
        type=PATH,
        default=profiles.PROFILE,
        help=f"the file (default {profiles.PROFILE}); - for stdout",
    ),
    Option("--force", is_flag=True),
    *common.planning_options(),
)
def init(*, out: str, force: bool, **given: Any) -> int:
    """Plan, and write the options and the promise as a profile."""
    from turbofit import api
    from turbofit.core.process.files import write_output
    from turbofit.planning.plan import refusal
    from turbofit.planning.request import PlanRequest

    if out != "-" and not force and os.path.exists(out):
        raise UsageError(f"{out} is there already", hint="add --force, or name another --out")
    request = fields.filled(PlanRequest, given)
    with under_way("planning"):
        plan = api.plan(request)
    if not plan.fits:
        raise refusal(plan)
    text = profile_text(request, plan, file=profiles.PROFILE if out == "-" else out)
    if out == "-":
        answer(text)
    else:
        write_output(out, text)
        answer(f"{out}\n")
    return 0


def profile_text(request: PlanRequest, plan: Plan, *, file: str) -> str:
    """A profile of the request, with the plan's images and context; ``file`` is its name."""
    kept = request.given()
    kept["images"] = request.images
    kept.setdefault("context", None if "session_len" in kept else plan.settings.session_len)
    shape = {"engine": plan.engine.name, "tp": plan.parallel.tp, "replicas": plan.parallel.replicas}
    chosen = ", ".join(
        f"{name} {value}" for name, value in shape.items() if kept.get(name) in (None, "auto")
    )
    lines = [
        _HEAD.format(
            file=file, created=plan.created[:10], verdict=plan.verdict, chosen=chosen or "nothing"
        )
    ]
    for heading, section in profiles.sections().items():
        fields = {name: kept[name] for name in section.fields if kept.get(name) is not None}
        if heading == "model" and len(fields) == 1:
            lines.append(f"model: {_scalar(fields['model'])}")
        elif fields:
            lines.append(f"{heading}:")
            lines += [f"  {name.rstrip('_')}: {_scalar(value)}" for name, value in fields.items()]
    return "\n".join(lines) + "\n"


def _scalar(value: object) -> str:
    """A value in YAML, on one line."""
    import yaml

    return yaml.safe_dump(value, width=10**6, default_flow_style=True).partition("\n")[0]

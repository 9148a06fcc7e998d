"""``turbofit init MODEL``: a profile from a plan."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from turbofit.cli.command import PATH, Option, command
from turbofit.cli.options.common_options import (
    PROFILE,
    filled,
    machine_options,
    model_argument,
    planning_options,
    sections,
)
from turbofit.cli.terminal.output import answer
from turbofit.core.errors import UsageError
from turbofit.core.process.progress import under_way

if TYPE_CHECKING:
    from turbofit.core.plan import Plan
    from turbofit.planning.request import PlanRequest

_HEAD: Final = """\
# `turbofit plan`, `serve` and `export` read it with `-f {file}`; docs/environment.md has every key.
# Planned on {created}: {verdict}
# It chose: {chosen}
"""


@command(
    *model_argument(),
    *machine_options(),
    Option(
        "--out",
        metavar="FILE",
        type=PATH,
        default=PROFILE,
        help=f"the file (default {PROFILE}); - for stdout",
    ),
    Option("--force", is_flag=True),
    *planning_options(),
)
def init(*, out: str, force: bool, **given: Any) -> int:
    """Plan, and write what was asked and what was promised."""
    from turbofit import api
    from turbofit.core.process.files import write_output
    from turbofit.planning.plan import refusal
    from turbofit.planning.request import PlanRequest

    if out != "-" and not force and os.path.exists(out):
        raise UsageError(f"{out} is there already", hint="add --force, or name another --out")
    request = filled(PlanRequest, given)
    with under_way("planning"):
        plan = api.plan(request)
    if not plan.fits:
        raise refusal(plan)
    text = profile_text(request, plan, file=PROFILE if out == "-" else out)
    if out == "-":
        answer(text)
    else:
        write_output(out, text)
        answer(f"{out}\n")
    return 0


def profile_text(request: PlanRequest, plan: Plan, *, file: str) -> str:
    """A profile that promises what a plan does.

    What was asked holds, and the plan's images and context; ``file`` is what it will be called.
    """
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
    for heading, section in sections().items():
        fields = {name: kept[name] for name in section.fields if kept.get(name) is not None}
        if heading == "model" and len(fields) == 1:
            lines.append(f"model: {_scalar(fields['model'])}")
        elif fields:
            lines.append(f"{heading}:")
            lines += [f"  {name.rstrip('_')}: {_scalar(value)}" for name, value in fields.items()]
    return "\n".join(lines) + "\n"


def _scalar(value: object) -> str:
    """As YAML has it, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_scalar, value))}]"
    if not isinstance(value, str) or not value:
        return str(value)
    import yaml

    if value.startswith("["):
        return value
    return yaml.safe_dump(value, width=10**6, default_flow_style=True).partition("\n")[0]

"""``turbofit rehearse MODEL``: the plan's settings and worst cases before the real engine."""

from __future__ import annotations

from typing import Any

from turbofit.cli.command import PATH, Option, command
from turbofit.cli.commands.plan import show_plan
from turbofit.cli.options.common_options import (
    FORMS,
    FULL,
    machine_options,
    model_argument,
    planning_keywords,
    planning_options,
)
from turbofit.cli.terminal.output import Form, say
from turbofit.core.process.progress import under_way


@command(
    *model_argument(),
    *machine_options(),
    Option("--defaults", is_flag=True),
    Option("--keep", metavar="DIR", type=PATH),
    FULL,
    *FORMS,
    *planning_options(),
    only_linux=True,
)
def rehearse(
    *,
    model: str,
    defaults: bool,
    keep: str | None,
    form: Form,
    **given: Any,
) -> int:
    """Rehearse and show; exit 3 where the engine did not serve."""
    from turbofit import api

    say("pretend GPUs: memory, admission and death are the engine's own; nothing is computed")
    with under_way("planning"):
        plan = api.rehearse(model, defaults=defaults, keep=keep, **planning_keywords(given))
    code = show_plan(plan, "rehearse", form)
    served = plan.rehearsal is not None and plan.rehearsal.outcome == "served"
    return code if served or code else 3

"""``turbofit rehearse MODEL``: the plan's settings and worst cases before the real engine."""

from __future__ import annotations

from typing import Any, Final

from turbofit.cli.command import PATH, Option, command, option_name
from turbofit.cli.options.common_options import (
    FORMS,
    FULL,
    machine_options,
    model_argument,
    planning_keywords,
    planning_options,
)
from turbofit.core.errors import UsageError
from turbofit.core.process.progress import under_way

__all__ = ["rehearse"]

#: What only a plan or another engine can use.
_PLANNED: Final = (
    "replicas", "context", "concurrency", "goal", "queue_images", "margin", "budget", "least",
)  # fmt: skip


@command(
    *model_argument(),
    *machine_options(),
    Option("--defaults", is_flag=True, help="LMDeploy's defaults instead of turbofit's plan"),
    Option(
        "--keep",
        metavar="DIR",
        type=PATH,
        help="keep timelines and log here (with --defaults of an engine on torch)",
    ),
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
    full: bool,
    as_json: bool,
    md: bool,
    **given: Any,
) -> int:
    """Rehearse and show; exit 3 where the engine did not serve."""
    from turbofit import api
    from turbofit.cli.commands.plan import show_plan
    from turbofit.cli.terminal.output import say
    from turbofit.rehearse.torch.torch_drivers import DRIVERS

    keywords = planning_keywords(given)
    engine = keywords.get("engine", "auto")
    driver = DRIVERS.get(engine)
    if driver is not None and (defaults or not driver.batches):
        _check(engine, keywords, batches=driver.batches)
        return _rehearse_torch(model, keywords, keep, as_json=as_json, md=md)
    if keep is not None:
        raise UsageError(
            "--keep is for what is rehearsed without a plan", hint="add --engine pytorch --defaults"
        )
    say("pretend GPUs: memory, admission and death are the engine's own; nothing is computed")
    with under_way("planning"):
        plan = api.rehearse(model, defaults=defaults, **keywords)
    code = show_plan(plan, "rehearse", full=full, as_json=as_json, md=md)
    served = plan.rehearsal is not None and plan.rehearsal.outcome == "served"
    return code if served or code else 3


def _rehearse_torch(
    model: str, keywords: dict[str, Any], keep: str | None, *, as_json: bool, md: bool
) -> int:
    from turbofit import api
    from turbofit.cli.terminal.output import answer, say, show
    from turbofit.report.views.run.torch_view import torch_view

    say("pretend GPUs: memory, admission and death are the engine's own; values are not")
    with under_way("rehearsing on pretend GPUs"):
        document = api.rehearse_torch(model, keep=keep, **keywords)
    if as_json:
        import json

        answer(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    else:
        show(torch_view(document), markdown=md)
    return 0 if document["outcome"] == "served" else 3


def _check(engine: str, given: dict[str, Any], *, batches: bool) -> None:
    """Refuse options that this engine does not use, instead of ignoring them."""
    from turbofit.memory.engines import ENGINES, option_owner
    from turbofit.planning.request import ENGINE_OPTIONS

    for name in _PLANNED:
        if name in given:
            raise UsageError(
                f"{option_name(name)} shapes a plan, and none is made for the {engine} engine",
                hint="give the engine's own options, such as --session-len or --max-batch-size",
            )
    unused = set(ENGINES["turbomind"].exclusive_options)
    if not batches:
        unused |= {*ENGINE_OPTIONS, "tp"} - {"dtype"}
    for name in sorted(unused & set(given)):
        owner = option_owner({name: given[name]})
        raise UsageError(
            f"{option_name(name)} is no option of the {engine} engine",
            hint=f"leave it out, or rehearse with --engine {owner[0] if owner else 'pytorch'}",
        )

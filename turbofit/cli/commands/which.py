"""``turbofit which``: the cards for a model, or the models for a machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from turbofit.cli.command import PATH, Option, command
from turbofit.cli.options.common_options import (
    FORMS,
    FULL,
    machine_options,
    model_argument,
    planning_options,
)
from turbofit.cli.options.fields import filled, options_of
from turbofit.core.process.progress import under_way
from turbofit.planning.which_request import WhichRequest

if TYPE_CHECKING:
    from turbofit.core.which import Which

__all__ = ["which"]


@command(
    *model_argument(required=False),
    *machine_options(),
    *options_of(WhichRequest, ("images_per_second", "all_counts")),
    Option("--html", metavar="FILE", type=PATH, form=True, help="one page; - for stdout"),
    FULL,
    *FORMS,
    *planning_options(),
)
def which(
    *, model: str | None, html: str | None, full: bool, as_json: bool, md: bool, **given: Any
) -> int:
    """Look and show; exit 3 where nothing keeps the promise."""
    from turbofit.cli.terminal.output import say
    from turbofit.core.errors import DoesNotFitError
    from turbofit.machine.source import machine_from
    from turbofit.planning.which import which_cards, which_models

    if model is not None and given["on"] is None and _is_machine(model):
        given["on"], model = model, None
    if model is None and given["on"]:
        for note in machine_from(given["on"], gpus=given["gpus"]).warnings:
            say(f"assumed: {note}")
    request = filled(WhichRequest, {**given, "model": "-" if model is None else model})
    with under_way("planning for every machine" if model else "planning for every model"):
        found = which_models(request) if model is None else which_cards(request)
    _show(found, html, full=full, as_json=as_json, md=md)
    return 0 if found.keep else DoesNotFitError.exit_code


def _is_machine(text: str) -> bool:
    """Whether a SPEC stands where a model should: ``which 1xrtx3090``."""
    from turbofit.core.errors import UsageError
    from turbofit.machine.spec import parse_spec
    from turbofit.model.presets import find_preset

    if find_preset(text) or os.path.exists(text):
        return False
    try:
        parse_spec(text)
    except UsageError:
        return False
    return True


def _show(found: Which, html: str | None, *, full: bool, as_json: bool, md: bool) -> None:
    from turbofit.cli.terminal.output import answer, show, write_page

    if html:
        from turbofit.report.page.which_page import which_page

        write_page(which_page(found), html)
    elif as_json:
        from turbofit.core.struct import to_json

        answer(to_json(found))
    else:
        from turbofit.report.views.plan.which_view import which_summary, which_view

        show(which_view(found) if full or md else which_summary(found), markdown=md)

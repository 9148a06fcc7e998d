"""``turbofit which``: the cards for a model, or the models for a machine."""

from __future__ import annotations

from typing import Any

from turbofit.cli.command import command
from turbofit.cli.options.common_options import (
    FORMS,
    FULL,
    HTML,
    filled,
    machine_options,
    model_argument,
    options_of,
    planning_options,
)
from turbofit.cli.terminal.output import Form, say
from turbofit.core.process.progress import under_way
from turbofit.planning.request import PACE, WhichRequest


@command(
    *model_argument(required=False),
    *machine_options(),
    *options_of(WhichRequest, ("images_per_second", *PACE, "all_counts")),
    HTML,
    FULL,
    *FORMS,
    *planning_options(),
)
def which(*, model: str | None, form: Form, **given: Any) -> int:
    """Look and show; exit 3 where nothing keeps the promise."""
    from turbofit.core.errors import DoesNotFitError
    from turbofit.machine.source import machine_from
    from turbofit.machine.spec import is_spec
    from turbofit.planning.resolve import model_of
    from turbofit.planning.which import which_cards, which_models
    from turbofit.report.views.preset_view import which_view

    if model is not None and given["on"] is None and is_spec(model):
        given["on"], model = model, None
    request = filled(WhichRequest, {**given, "model": "-" if model is None else model})
    notes: tuple[str, ...] = ()
    if model is not None:
        known = model_of(request)
        request, notes = request.changed(model=known), known.warnings
    elif request.on is not None:
        notes = machine_from(request.on, gpus=request.gpus).warnings
    for text in notes:
        say(f"assumed: {text}")
    with under_way("planning for every machine" if model else "planning for every model"):
        choices = which_models(request) if model is None else which_cards(request)
    footer = f"turbofit {choices.turbofit_version}, planned {choices.created}."
    form.show(choices, which_view, footer)
    return 0 if choices.keep else DoesNotFitError.exit_code

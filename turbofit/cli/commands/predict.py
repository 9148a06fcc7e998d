"""``turbofit predict MODEL``: what given settings would do."""

from __future__ import annotations

from typing import Any

from turbofit.cli.command import command
from turbofit.cli.commands.plan import show_plan
from turbofit.cli.options.common_options import (
    FORMS,
    FULL,
    filled,
    machine_options,
    model_argument,
    options_of,
    planning_options,
)
from turbofit.cli.terminal.output import Form
from turbofit.core.process.progress import under_way
from turbofit.planning.request import PredictRequest


@command(
    *model_argument(),
    *machine_options(),
    *options_of(PredictRequest, ("lmdeploy", "free_at_cache")),
    FULL,
    *FORMS,
    *planning_options(),
)
def predict(*, form: Form, **given: Any) -> int:
    """Predict and show; exit 3 where the settings would not serve."""
    from turbofit import api

    request = filled(PredictRequest, given)
    with under_way("predicting"):
        plan = api.predict(request)
    return show_plan(plan, "predict", form)

"""``turbofit predict`` and ``rehearse``: what settings would do, by forecast and by the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbofit.cli.command import PATH, Option, command, refuse_together
from turbofit.cli.commands.plan import show_plan
from turbofit.cli.options.common_options import (
    FORMS,
    FULL,
    filled,
    machine_options,
    model_argument,
    options_of,
    planning_keywords,
    planning_options,
)
from turbofit.cli.terminal.output import Form, say
from turbofit.core.errors import UsageError
from turbofit.core.process.progress import under_way
from turbofit.planning.request import PlanRequest, PredictRequest

if TYPE_CHECKING:
    from turbofit.core.json_types import Options


@command(
    *model_argument(),
    *machine_options(),
    *options_of(PredictRequest, ("lmdeploy", "free_at_cache")),
    Option("--trace", metavar="FILE", type=PATH),
    Option("--vs", metavar="SPEC|FILE"),
    FULL,
    *FORMS,
    *planning_options(),
)
def predict(*, trace: str | None, vs: str | None, form: Form, **given: Any) -> int:
    """Predict and show; exit 3 where the settings would not serve."""
    from turbofit import api

    if trace is not None:
        return _predict_trace(trace, vs, given, form)
    if vs is not None:
        raise UsageError("--vs is for a trace", hint="add --trace FILE; turbofit compare has plans")
    request = filled(PredictRequest, given)
    with under_way("predicting"):
        plan = api.predict(request)
    return show_plan(plan, "predict", form)


def _predict_trace(file: str, vs: str | None, given: Options, form: Form) -> int:
    """Forecast a trace under one plan or two, and show; exit 3 where a plan does not fit."""
    import os

    from turbofit import api
    from turbofit.load.trace import read_trace
    from turbofit.load.trace_forecast import trace_forecast
    from turbofit.report.stored_documents import read_plan
    from turbofit.report.views.measured_view import trace_view

    settings = {name: given[name] for name in ("lmdeploy", "free_at_cache")}
    refuse_together(settings, "--trace", ": a trace meets turbofit's own plan")
    request, requests = filled(PlanRequest, given), read_trace(file)
    with under_way("planning, and sending the trace through the forecast"):
        plans = [api.plan(request)]
        if vs is not None:
            saved = os.path.isfile(vs)
            plans.append(read_plan(vs) if saved else api.plan(request.changed(on=vs, gpus=None)))
        short = next((plan for plan in plans if not plan.fits), None)
        if short is not None:
            return show_plan(short, "plan", form)
        forecast = trace_forecast(plans, requests, file)
    form._replace(full=True).show(forecast, trace_view)
    return 0


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
def rehearse(*, model: str, defaults: bool, keep: str | None, form: Form, **given: Any) -> int:
    """Rehearse and show; exit 3 where the engine did not serve."""
    from turbofit import api

    say("pretend GPUs: memory, admission and death are the engine's own; nothing is computed")
    with under_way("planning"):
        plan = api.rehearse(model, defaults=defaults, keep=keep, **planning_keywords(given))
    code = show_plan(plan, "rehearse", form)
    served = plan.rehearsal is not None and plan.rehearsal.outcome == "served"
    return code if served or code else 3

"""``turbofit plan``, ``predict``, ``rehearse`` and ``which``: forecasts and rehearsals."""

from __future__ import annotations

from typing import Any

from turbofit import api
from turbofit.cli.command import PATH, Option, command
from turbofit.cli.options import common_options as common
from turbofit.cli.options import field_options as fields
from turbofit.cli.terminal.output import Form, answer, say
from turbofit.core.errors import DoesNotFitError
from turbofit.core.messages import refuse_together
from turbofit.core.plan import Plan
from turbofit.core.process.progress import under_way
from turbofit.planning.request import PlanRequest, PredictRequest, WhichRequest


@command(
    *common.model_argument(file=True),
    *common.machine_options(),
    Option("--cluster", metavar="CLUSTER"),
    Option("--rehearse", is_flag=True),
    common.FULL,
    *common.FORMS,
    *fields.options_of(PlanRequest, ("lmdeploy",)),
    *common.planning_options(),
)
def plan(*, rehearse: bool, cluster: str | None, form: Form, **given: Any) -> int:
    """Make a plan and show it; exit 3 if nothing fits."""
    request = fields.filled(PlanRequest, given)
    if cluster is not None:
        of_one = {"on": request.on, "gpus": request.gpus, "rehearse": rehearse}
        refuse_together(of_one, "--cluster", ", or plan for that machine alone")
        return _plan_cluster(request, cluster, form)
    with under_way("planning, and rehearsing on pretend GPUs" if rehearse else "planning"):
        best = api.plan(request, rehearse=rehearse)
    return show_plan(best, "plan", form)


def _plan_cluster(request: PlanRequest, cluster: str, form: Form) -> int:
    """Make a plan for a cluster and show it; exit 3 if no node serves."""
    from turbofit.report.views.cluster_view import cluster_view
    from turbofit.serving.cluster.actors import cluster_from

    with under_way("measuring the nodes, and planning"):
        planned = api.plan_cluster(request, cluster_from(cluster))
    form.show(planned, cluster_view)
    return 0 if planned.fits else DoesNotFitError.exit_code


def show_plan(plan: Plan, command: str, form: Form) -> int:
    """Store a plan as the command's newest plan, and show it; return the exit code."""
    from turbofit.report.stored_documents import keep

    keep(plan, command)
    if form.as_json:
        answer(plan.to_json())
    else:
        from turbofit.report.views.plan_view import plan_view

        form.show(plan, plan_view)
    return 0 if plan.fits else DoesNotFitError.exit_code


@command(
    *common.model_argument(),
    *common.machine_options(),
    *fields.options_of(PredictRequest, ("lmdeploy", "free_at_cache")),
    common.FULL,
    *common.FORMS,
    *common.planning_options(),
)
def predict(*, form: Form, **given: Any) -> int:
    """Predict what the given settings do and show it; exit 3 if they would not serve."""
    request = fields.filled(PredictRequest, given)
    with under_way("predicting"):
        predicted = api.predict(request)
    return show_plan(predicted, "predict", form)


@command(
    *common.model_argument(),
    *common.machine_options(),
    Option("--defaults", is_flag=True),
    Option("--keep", metavar="DIR", type=PATH),
    common.FULL,
    *common.FORMS,
    *common.planning_options(),
    only_linux=True,
)
def rehearse(*, model: str, defaults: bool, keep: str | None, form: Form, **given: Any) -> int:
    """Run a rehearsal and show what it found; exit 3 if the engine did not serve."""
    say("pretend GPUs: memory, admission and death are the engine's own; nothing is computed")
    with under_way("planning"):
        plan = api.rehearse(model, defaults=defaults, keep=keep, **common.planning_keywords(given))
    code = show_plan(plan, "rehearse", form)
    served = plan.rehearsal is not None and plan.rehearsal.outcome == "served"
    return code if served or code else 3


@command(
    *common.model_argument(required=False),
    *common.machine_options(),
    *fields.options_of(WhichRequest, ("images_per_second",)),
    common.HTML,
    common.FULL,
    *common.FORMS,
    *common.planning_options(),
)
def which(*, model: str | None, form: Form, **given: Any) -> int:
    """Show the cards, or models, that keep the promise; exit 3 if none does."""
    from turbofit.machine.source import machine_from
    from turbofit.planning.resolve import model_of
    from turbofit.planning.which import which_cards, which_models
    from turbofit.report.views.preset_view import which_view

    request = fields.filled(WhichRequest, {**given, "model": "-" if model is None else model})
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
    form.show(choices, which_view)
    return 0 if choices.keep else DoesNotFitError.exit_code

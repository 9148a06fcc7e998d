"""``turbofit plan MODEL``: the best plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbofit.cli.command import Option, command, refuse_together
from turbofit.cli.options.common_options import (
    FORMS,
    FULL,
    filled,
    machine_options,
    model_argument,
    options_of,
    planning_options,
)
from turbofit.cli.options.launch_options import refuse_repeated
from turbofit.cli.terminal.output import Form, answer
from turbofit.core.errors import DoesNotFitError
from turbofit.core.process.progress import under_way
from turbofit.planning.request import PACE, PlanRequest

if TYPE_CHECKING:
    from turbofit.core.plan import Plan


@command(
    *model_argument(profile=True, several=True),
    *machine_options(),
    Option("--cluster", metavar="CLUSTER"),
    Option("--rehearse", is_flag=True),
    FULL,
    *FORMS,
    *options_of(PlanRequest, PACE, group="the forecast of speed"),
    *planning_options(),
)
def plan(
    *,
    model: tuple[str, ...],
    rehearse: bool,
    cluster: str | None,
    form: Form,
    **given: Any,
) -> int:
    """Plan and show; exit 3 where nothing fits."""
    import click

    from turbofit import api
    from turbofit.cli.options.common_options import each_model

    request = filled(PlanRequest, {**given, "model": model[0]})
    refuse_repeated(model)
    if len(model) > 1:
        alone = {"cluster": cluster, "rehearse": rehearse}
        refuse_together(alone, "several models", ", or plan each model by itself")
        from turbofit.planning.joint_plan import options_of_each

        of_models = each_model(click.get_current_context(), model)
        requests = [request.changed(**options) for options in options_of_each(request, of_models)]
        return _plan_together(requests, form)
    if cluster is not None:
        of_one = {"on": request.on, "gpus": request.gpus, "rehearse": rehearse}
        refuse_together(of_one, "--cluster", ", or plan for that machine alone")
        return _plan_cluster(request, cluster, form)
    doing = "planning, and rehearsing on pretend GPUs" if rehearse else "planning"
    with under_way(doing):
        best = api.plan(request, rehearse=rehearse)
    return show_plan(best, "plan", form)


def _plan_together(requests: list[PlanRequest], form: Form) -> int:
    """Plan several models on the same cards and show; exit 3 where they do not fit together."""
    from turbofit.planning.joint_plan import joint_plan
    from turbofit.report.views.several_view import joint_view

    with under_way("planning them together"):
        together = joint_plan(requests)
    form.show(together, joint_view)
    return 0 if together.fits else DoesNotFitError.exit_code


def _plan_cluster(request: PlanRequest, cluster: str, form: Form) -> int:
    """Plan for a cluster and show; exit 3 where no node serves."""
    from turbofit import api
    from turbofit.launch.cluster.nodes import cluster_from
    from turbofit.report.views.several_view import cluster_view

    with under_way("measuring the nodes, and planning"):
        planned = api.plan_cluster(request, cluster_from(cluster))
    form.show(planned, cluster_view)
    return 0 if planned.fits else DoesNotFitError.exit_code


def show_plan(plan: Plan, command: str, form: Form) -> int:
    """Show a plan in the form asked for, keep it as the newest of its command; its exit code."""
    from turbofit.report.stored_documents import keep

    keep(plan, command)
    if form.as_json:
        answer(plan.to_json())
    else:
        from turbofit.report.views.plan_view import plan_view

        form.show(plan, plan_view)
    return 0 if plan.fits else DoesNotFitError.exit_code

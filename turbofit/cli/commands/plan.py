"""``turbofit plan MODEL``: the best plan."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from turbofit.cli.command import Option, command
from turbofit.cli.options.common_options import (
    FORMS,
    FULL,
    machine_options,
    model_argument,
    planning_options,
    refuse_beside_cluster,
)
from turbofit.cli.options.fields import filled, options_of
from turbofit.cli.options.models_options import SharesOptions
from turbofit.core.errors import UsageError
from turbofit.core.process.progress import under_way
from turbofit.planning.request import PACE, PlanRequest

if TYPE_CHECKING:
    from turbofit.core.plan import Plan

__all__ = ["plan", "show_plan"]


@command(
    *model_argument(profile=True, several=True),
    *machine_options(),
    *options_of(SharesOptions, SharesOptions.model_fields, group="several models"),
    Option(
        "--cluster",
        metavar="CLUSTER",
        help="plan for all machines of a cluster: ray, ray:ADDRESS, a cluster's file, or "
        "sim:4xrtx3090@100/8xh100@2, which simulates 100 machines and 2",
    ),
    Option("--rehearse", is_flag=True, help="check the choice with the engine on pretend GPUs"),
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
    full: bool,
    as_json: bool,
    md: bool,
    **given: Any,
) -> int:
    """Plan and show; exit 3 where nothing fits."""
    import click

    from turbofit import api
    from turbofit.cli.options.profile_options import each_model

    request = filled(PlanRequest, {**given, "model": model[0]})
    shares = filled(SharesOptions, given).of_models(model)
    if len(model) > 1:
        if cluster is not None or rehearse:
            raise UsageError(
                f"{'--cluster' if cluster is not None else '--rehearse'} is for one model",
                hint="plan each model by itself, or leave it out",
            )
        from turbofit.planning.joint_plan import options_of_each

        each = each_model(click.get_current_context(), model)
        requests = [request.changed(**one) for one in options_of_each(request, each)]
        return _plan_together(requests, shares, model, full=full, as_json=as_json, md=md)
    if cluster is not None:
        one_machine = {*request.given(), *(["rehearse"] if rehearse else [])}
        instead = ", or plan for that machine alone"
        refuse_beside_cluster(("on", "gpus", "rehearse"), one_machine, instead)
        return _plan_cluster(request, cluster, full=full, as_json=as_json, md=md)
    doing = "planning, and rehearsing on pretend GPUs" if rehearse else "planning"
    with under_way(doing):
        found = api.plan(request, rehearse=rehearse)
    return show_plan(found, "plan", full=full, as_json=as_json, md=md)


def _plan_together(
    requests: list[PlanRequest],
    shares: tuple[float, ...],
    names: tuple[str, ...],
    *,
    full: bool,
    as_json: bool,
    md: bool,
) -> int:
    """Plan several models on the same cards and show; exit 3 where they do not fit together."""
    from turbofit.cli.terminal.output import show_form
    from turbofit.core.errors import DoesNotFitError
    from turbofit.planning.joint_plan import joint_plan
    from turbofit.report.views.plan.joint_view import joint_view

    with under_way("planning them together"):
        found = joint_plan(requests, shares)
    view = partial(joint_view, names=names)
    show_form(found, view, as_json=as_json, md=md, short=not full)
    return 0 if found.fits else DoesNotFitError.exit_code


def _plan_cluster(
    request: PlanRequest, cluster: str, *, full: bool, as_json: bool, md: bool
) -> int:
    """Plan for a cluster and show; exit 3 where no node serves."""
    from turbofit import api
    from turbofit.cli.terminal.output import show_form
    from turbofit.core.errors import DoesNotFitError
    from turbofit.launch.cluster.nodes import cluster_from
    from turbofit.report.views.cluster_view import cluster_view

    with under_way("measuring the nodes, and planning"):
        found = api.plan_cluster(request, cluster_from(cluster))
    show_form(found, cluster_view, as_json=as_json, md=md, short=not full)
    return 0 if found.fits else DoesNotFitError.exit_code


def show_plan(plan: Plan, command: str, *, full: bool, as_json: bool, md: bool) -> int:
    """Show a plan in the form asked for, keep it as the newest of its command; its exit code.

    On a terminal it is a summary where ``full`` is not asked for; other forms have everything.
    """
    from turbofit.cli.terminal.output import answer, show
    from turbofit.core.errors import DoesNotFitError
    from turbofit.report.stored_documents import keep

    keep(plan, command)
    if as_json:
        answer(plan.to_json())
    else:
        from turbofit.report.views.plan.plan_view import plan_view

        show(plan_view(plan), markdown=md, short=not full)
    return 0 if plan.fits else DoesNotFitError.exit_code

"""``turbofit serve`` for what was planned, to be copied: it measures again and keeps the limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from msgspec import UNSET

from turbofit.core.plan import CONFIG_NAMES, ServeCommand
from turbofit.core.struct import to_builtins
from turbofit.memory.versions import OLDEST_SERVED, release
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.cluster import ClusterPlan
    from turbofit.core.model import Model
    from turbofit.core.plan import Limits, Plan

#: Fields that the command names by their places, or not at all.
_UNSAID: Final = ("model", "on")
_MEASURED: Final = "nvml"
#: How the source of a cluster begins that Ray told of.
_RAY: Final = "ray "


def serve_command(plan: Plan, request: PlanRequest) -> ServeCommand | None:
    """What serves a plan as it was asked for; None where `serve` would not.

    A plan for another machine than the one here names its limits: a machine with less free then
    refuses, and does not promise less.

    Args:
        plan: what was planned.
        request: what was asked for.
    """
    old = plan.engine.of_lmdeploy and release(plan.engine.version) < OLDEST_SERVED
    if not plan.fits or old:
        return None
    model = _word(plan.model, request.model)
    served = request_of(plan, model).changed(revision=plan.model.revision, gpus=request.gpus)
    if request.paced and plan.engine.of_lmdeploy and not plan.by_group:
        # `serve` is not asked for a pace: what has it is named.
        sizes = ("max_batch_size", "max_prefill_token_num")
        named = {name: getattr(plan.settings, name) for name in sizes}
        served = served.changed(tp=plan.parallel.tp, replicas=plan.parallel.replicas, **named)
    if not is_prediction(plan) and plan.machine.source != _MEASURED:
        context = plan.kv.longest_request_tokens or plan.settings.session_len
        served = _with_limits(served, plan.model, plan.limits, context)
    return _command([model], served)


def cluster_serve_command(plan: ClusterPlan, request: PlanRequest) -> ServeCommand | None:
    """What serves a cluster's plan, on a node of it; None where `serve` would not.

    A cluster that is no measured one of Ray names its limits, as `serve_command` does.

    Args:
        plan: what was planned.
        request: what was asked for.
    """
    if not plan.fits or plan.limits is None:
        return None
    model, cluster = _word(plan.model, request.model), "ray"
    if plan.source.startswith(_RAY):
        cluster = plan.source.replace(" ", ":", 1)
    else:
        request = _with_limits(request, plan.model, plan.limits, plan.longest_request_tokens)
    return _command([model], request, "--cluster", cluster)


def joint_serve_command(
    plans: Sequence[Plan], requests: Sequence[PlanRequest]
) -> ServeCommand | None:
    """What serves several models at one address; None where one command line cannot ask for it.

    Limits that all models have in common are named where their machine is not the one here.

    Args:
        plans: one a model.
        requests: one a model.
    """
    models = [
        _word(plan.model, request.model) for plan, request in zip(plans, requests, strict=True)
    ]
    common, *others = (
        _of_all(plan.model, request) for plan, request in zip(plans, requests, strict=True)
    )
    if any(other.given() != common.given() for other in others):
        return None
    given = common.given()
    if plans[0].machine.source != _MEASURED and not given.keys() & {"context", "session_len"}:
        contexts = {plan.kv.longest_request_tokens for plan in plans}
        common = common.changed(context=min(contexts) if len(contexts) == 1 else None)
    return _command(models, common)


def request_of(plan: Plan, model: str) -> PlanRequest:
    """What a plan was asked for, on any machine; of a prediction all settings.

    Args:
        plan: one that says with which options it was made.
        model: as a command line names it.
    """
    options = {} if plan.options is UNSET else plan.options
    request = PlanRequest.of(**{**options, "model": model, "on": None, "gpus": None})
    if not is_prediction(plan):
        return request
    settings = to_builtins(plan.settings)
    names = [
        name for name, _ in CONFIG_NAMES[plan.engine.name] if name not in ("tp", "model_format")
    ]
    predicted = {name: settings[name] for name in names if settings[name]}
    shape = {"engine": plan.engine.name, "tp": plan.settings.tp}
    return request.changed(**{"context": None, **shape, **predicted})


def is_prediction(plan: Plan) -> bool:
    """Whether its settings were given or LMDeploy's defaults, and no search chose any."""
    return plan.engine.of_lmdeploy and not plan.considered


def _command(models: Sequence[str], request: PlanRequest, *words: str) -> ServeCommand:
    fields = set(type(request).model_fields) - set(PlanRequest.model_fields)
    options = request.option_arguments((*_UNSAID, *fields))
    return ServeCommand(argv=("turbofit", "serve", *models, *options, *words))


def _word(model: Model, given: str | Model) -> str:
    """How a command line names a model; a folder wherever it is pasted."""
    if model.source.kind == "folder" and model.source.checkpoint:
        return model.source.checkpoint
    return given if isinstance(given, str) else model.hub_id or model.name


def _with_limits(request: PlanRequest, model: Model, limits: Limits, context: int) -> PlanRequest:
    """The request with what was planned as what is asked for."""
    more: dict[str, Any] = {}
    if not request.given().keys() & {"context", "session_len"}:
        more["context"] = context
    rule = model.image_rule if limits.vision_unit is not None else None
    if rule is not None:
        more["images"] = limits.images_per_request
        # The limit follows from a size that was asked for; some rules have one limit alone.
        if limits.image_limit is not None and rule.varies_by_limit and not request.image_size:
            more[rule.limit_name] = limits.image_limit
    return request.changed(**more)


def _of_all(model: Model, request: PlanRequest) -> PlanRequest:
    """What is asked of a model beside its name; that a text model has no images goes unsaid."""
    unsaid = ("images", "image_size") if model.image_rule is None else ()
    given = {name: value for name, value in request.given().items() if name not in unsaid}
    return PlanRequest.of(**{**given, "model": "-"})

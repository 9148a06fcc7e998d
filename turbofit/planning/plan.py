"""Makes plans and predictions, with their command lines and warnings.

What is promised: an image limit, images and a context (`plan_document.make_promise`), made once.
How it is kept: the engines, with their ratio, prefill, batch and type of cache.
A later plan of the same request (a step down, a tuning, a rehearsal, a node) is given the promise.
It may choose other engines and settings; it never has another promise: else it does not fit.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import product
from typing import TYPE_CHECKING

from msgspec import UNSET
from msgspec.structs import replace

from turbofit.core.errors import DoesNotFitError, TurbofitError, UsageError
from turbofit.core.machine import Machine
from turbofit.core.messages import OWN_CODE
from turbofit.core.plan import Plan
from turbofit.core.units import format_bytes
from turbofit.core.version import REFERENCE
from turbofit.memory.versions import OLDEST_SERVED, is_legacy, release
from turbofit.model.presets import find_preset, load_preset
from turbofit.planning.alternatives import alternatives
from turbofit.planning.checks import plan_warnings
from turbofit.planning.choose import best_plan, plan_of
from turbofit.planning.commands import (
    came_later,
    cluster_serve_command,
    commands,
    left_out,
    serve_command,
)
from turbofit.planning.own_drafts import draft_warnings, with_numbers
from turbofit.planning.remedies import OTHER_CARDS
from turbofit.planning.resolve import resolve
from turbofit.planning.resolved_request import Margin

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from turbofit.core.cluster import Cluster, ClusterPlan
    from turbofit.core.promise import Promise
    from turbofit.planning.request import PlanRequest, PredictRequest
    from turbofit.planning.resolved_request import ResolvedRequest
    from turbofit.planning.search.search import EngineFit


def plan(
    request: PlanRequest,
    *,
    pretend: bool | None = None,
    compares_limits: bool = True,
    promise: Promise | None = None,
) -> Plan:
    """Make the best plan, which may not fit, with the settings that `turbofit tune` found for it.

    ``pretend``: True uses tunings from pretend GPUs, False tunings from real GPUs. None uses the
    tunings of this machine, if the plan is for this machine. Without ``compares_limits`` the plan
    does not compare other image limits and shapes, and takes half the time. ``promise`` is the
    promise of an earlier plan of this request, which the plan keeps if it fits.

    Raises:
        UsageError: two options contradict each other, or one cannot be used.
        MachineError: this machine cannot be read, or has no GPU.
        PackageError: no engine that turbofit accounts for runs the model.
    """
    try:
        resolved = resolve(request)
    except UsageError as exc:
        _say_of_merged(exc, request)
        raise
    resolved = replace(resolved, compares_limits=compares_limits)
    if promise is not None:
        resolved = resolved.keeping(promise)
    if request.lmdeploy is not None:
        return finished(_for_version(resolved, request, request.lmdeploy), request)
    best = best_plan(resolved, request.engine)
    if compares_limits:
        best = with_numbers(best, resolved)
    if pretend is not None or resolved.machine.source == "nvml":
        from turbofit.planning.tuned import with_tuned

        best = with_tuned(best, request, resolved, pretend=pretend)
    if compares_limits:
        best = replace(best, warnings=(*alternatives(best, request), *best.warnings))
    return finished(best, request)


def _for_version(resolved: ResolvedRequest, request: PlanRequest, version: str) -> Plan:
    """Make the best plan for another version of LMDeploy, with twice the usual margin.

    `serve` does not start the oldest versions, so these versions have no gateway. Their plan first
    counts the largest images that LMDeploy itself lets clients send. If such images do not fit, the
    plan counts smaller images, and a warning says how to start a gateway that refuses larger
    images.
    """
    from turbofit.memory.engines import check_options, engine_for, engine_of
    from turbofit.planning.predict import usual_settings
    from turbofit.planning.prefix_cache import with_prefix_cache
    from turbofit.planning.search.search import search

    first, older = engine_for(resolved.model, request.engine, version), is_legacy(version)
    if first.doubt is not None:
        raise UsageError(
            f"LMDeploy {version} is newer than {REFERENCE}, and no account knows it",
            hint=f"leave `--lmdeploy` out; turbofit predict MODEL --lmdeploy {version} predicts"
            f" given settings by the account of {REFERENCE}, with twice the margin",
        )
    if request.margin is None and older:
        more = max(resolved.margin.of(gpu) for gpu in resolved.visible)
        resolved = replace(resolved, margin=Margin(more=more))
    rule, held = resolved.model.image_rule, release(version) >= OLDEST_SERVED
    exposed = None if rule is None or held else rule.exposed_limit
    wished = [resolved]
    if exposed is not None and resolved.image_limit is None:
        wished = [replace(resolved, image_limit=exposed), resolved]
    fit = _first_fit(wished, request.engine, first.name, version)
    if fit is None:  # the search raises the first engine's refusal
        check_options(first, resolved.engine_options)
        return plan_of(search(wished[-1], first)).document
    best = plan_of(fit if older else with_prefix_cache(fit)).document
    if older:  # rates are known only for current versions
        best = replace(best, throughput=None, usual_image=UNSET)
    missing = left_out(best, usual_settings(resolved, engine_of(best)))
    new = (*_of_version(best, exposed, version), *filter(None, (missing,)))
    untrue = {OWN_CODE} if came_later(("--trust-remote-code",), version) else set()
    known = (text for text in best.warnings if text not in untrue)
    return replace(best, warnings=(*new, *known))


def _first_fit(
    wished: Sequence[ResolvedRequest], asked: str, first: str, version: str
) -> EngineFit | None:
    """Return the search's result for the first of the ``wished`` requests that fits on an engine.

    If none fits, the last result is returned, or None if every search was refused. The engine
    ``first`` is tried first. If ``asked`` is ``auto``, LMDeploy's other engines follow.
    """
    from turbofit.memory.engines import LMDEPLOY, check_options, engine_for
    from turbofit.planning.search.search import search

    found = None
    names = [first, *LMDEPLOY] if asked == "auto" else [first]
    for wish, name in product(wished, dict.fromkeys(names)):
        with suppress(TurbofitError):
            engine = engine_for(wish.model, name, version)
            check_options(engine, wish.engine_options)
            found = search(wish, engine)
            if found.fits:
                return found
    return found


def _of_version(best: Plan, exposed: int | None, version: str) -> Iterator[str]:
    """Yield warnings about a plan for a version that accepts images of ``exposed`` units."""
    if is_legacy(version):
        yield (
            f"this account of LMDeploy {version} was compared with public figures alone: margins"
            " are doubled"
        )
    limit, rule = best.promise.image_limit, best.model.image_rule
    if rule and exposed is not None and limit is not None and limit < exposed and best.fits:
        yield (
            f"LMDeploy {version} itself lets clients send images of {exposed} {rule.limit_unit}:"
            " save this plan (--json), and put `turbofit gateway --plan FILE --upstream URL` in"
            " front, so that the plan's limit holds"
        )


def _say_of_merged(exc: UsageError, request: PlanRequest) -> None:
    """Add the plan of the merged checkpoint to an error about a checkpoint's format.

    `turbofit merge` makes the merged checkpoint. Merging a LoRA does not change sizes.
    """
    preset = find_preset(request.model) if isinstance(request.model, str) else None
    refused = load_preset(preset).unsupported if preset else None
    if refused is None or not refused.merged:
        return
    try:
        merged = plan(request.changed(model=refused.merged))
    except TurbofitError:
        return
    weights = format_bytes(merged.model.weight_bytes)
    exc.message += (
        f"; the merged checkpoint, with or without a LoRA, has {weights} of weights and"
        f" {merged.verdict}"
    )


def plan_cluster(
    request: PlanRequest, cluster: Cluster, promised: ClusterPlan | None = None
) -> ClusterPlan:
    """Make one promise for several machines, and the best plan for each of them.

    The request names no machine; its ``tp`` and ``replicas`` are for each node, ``concurrency`` is
    for all nodes together. ``promised`` is an earlier plan of the cluster: joining nodes must keep
    its promise.

    Raises:
        As :func:`plan`, if every node raises an error.
    """
    from turbofit.planning.cluster_plan import make_cluster_plan

    nowhere = Machine(name="cluster", source="cluster", gpus=())
    resolved = resolve(request.changed(on=nowhere, gpus=None))
    cluster_plan = make_cluster_plan(resolved, cluster, request.engine, promised)
    return replace(cluster_plan, serve=cluster_serve_command(cluster_plan, request))


def predict(request: PredictRequest, *, finds_remedies: bool = True) -> Plan:
    """Predict the outcome of given settings, and of LMDeploy's defaults for all other settings.

    If the settings do not serve, a search finds remedies, unless ``finds_remedies`` is False.

    Raises:
        As :func:`plan`; also PackageError for a release of LMDeploy without an account.
    """
    from turbofit.memory.engines import check_options, engine_for
    from turbofit.planning.predict import make_prediction, usual_settings

    if request.least:
        raise UsageError(
            "predict tells what given settings do, and least is a choice of settings",
            hint="turbofit plan MODEL --least chooses them",
        )
    resolved = resolve(request)
    engine = engine_for(resolved.model, request.engine, request.lmdeploy)
    if not engine.backend.of_lmdeploy:
        raise UsageError(
            f"predict tells what LMDeploy does, and it does not run {resolved.model.name}",
            hint="turbofit plan finds settings for Hugging Face Transformers",
        )
    check_options(engine, resolved.engine_options)
    doubled = engine.doubt is not None and request.margin is None
    # If the margin is doubled, only the second prediction is returned, and needs remedies.
    prediction = make_prediction(
        resolved, engine, request.free_at_cache, finds_remedies and not doubled
    )
    if doubled:
        resolved = replace(resolved, margin=Margin(bytes=doubled_margin(prediction)))
        prediction = make_prediction(resolved, engine, request.free_at_cache, finds_remedies)
    of_version = (engine.doubt, left_out(prediction, usual_settings(resolved, engine)))
    warnings = (*filter(None, of_version), *prediction.warnings)
    return finished(replace(prediction, warnings=warnings), request)


def doubled_margin(plan: Plan) -> int:
    """Return twice the largest margin of a plan's GPUs, in bytes.

    A plan has this margin if the account was made for another release of LMDeploy.
    """
    return 2 * max(gpu.margin for gpu in plan.ledgers)


def finished(plan: Plan, request: PlanRequest) -> Plan:
    """Add command lines to a plan, and warnings about the environment and packages."""
    new = (text for text in plan_warnings(plan) if text not in plan.warnings)
    return replace(
        plan.with_commands(commands(plan)),
        serve=serve_command(plan, request),
        warnings=(*draft_warnings(plan), *plan.warnings, *new),
    )


def refusal(plan: Plan | ClusterPlan) -> DoesNotFitError:
    """Return the error for a plan that does not fit; its hint is the cheapest remedy."""
    hint = plan.remedies[0].text if plan.remedies else OTHER_CARDS.text
    return DoesNotFitError(plan.verdict, hint=hint)

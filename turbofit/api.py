"""The functions of turbofit for programs: each builds a request and passes it on.

    >>> import turbofit
    >>> plan = turbofit.plan("internvl2-8b", on="4xrtx3090")
    >>> plan.fits, plan.engines[0].settings.cache_max_entry_count

The keywords of `plan` are the fields of `turbofit.PlanRequest`, which editors and type checkers
read: `turbofit.plan(turbofit.PlanRequest(model=…, tp=2))`. `plan` and `predict` import neither
torch nor lmdeploy nor transformers.
"""

from __future__ import annotations

import os
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.plan import Plan
from turbofit.core.struct import Printed
from turbofit.planning import plan as planning
from turbofit.planning.request import PlanRequest, PredictRequest, WhichRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from typing_extensions import ParamSpec

    from turbofit.core.cluster import Cluster, ClusterPlan
    from turbofit.core.model import Model
    from turbofit.logs.answer import Diagnosis
    from turbofit.planning.which import Which
    from turbofit.report.painters.document import Block
    from turbofit.serving.planned_pipeline import PlannedPipeline

    _Parameters = ParamSpec("_Parameters")

_Request = TypeVar("_Request", bound=PlanRequest)
_Answer = TypeVar("_Answer")


def _text_of(document: Any) -> str:
    """Return what the command line prints, without its last line on other options."""
    from turbofit.report.painters.terminal import paint
    from turbofit.report.views.cluster_view import cluster_view
    from turbofit.report.views.findings_view import diagnosis_view
    from turbofit.report.views.plan_view import plan_view
    from turbofit.report.views.preset_view import which_view

    views: dict[str, Callable[[Any], Iterable[Block]]] = {
        "Plan": plan_view, "Which": which_view, "Diagnosis": diagnosis_view,
        "ClusterPlan": cluster_view,
    }  # fmt: skip
    view = views.get(type(document).__name__)
    if view is None:
        return repr(document)
    short = view is not diagnosis_view  # of which there is one form
    return paint(view(document), short=short).partition("\nmore: ")[0].rstrip()


Printed.painter = _text_of


@cache
def at_the_door(function: Callable[_Parameters, _Answer]) -> Callable[_Parameters, _Answer]:
    """Wrap a function: errors name keywords, not options, and tracebacks end at the caller."""

    @wraps(function)
    def door(*args: _Parameters.args, **keywords: _Parameters.kwargs) -> _Answer:
        try:
            return function(*args, **keywords)
        except TurbofitError as exc:
            exc.name_keywords()
            raise exc.with_traceback(None) from None

    return door


def _request(kind: type[_Request], model: Any, options: Any) -> _Request:
    """Make a request from a caller's model and keywords; a whole request gets the keywords, too."""
    if isinstance(model, kind):
        return model.changed(**options)
    path = os.fspath(model) if isinstance(model, os.PathLike) else model
    return kind.of(model=path, **options)


def plan(
    model: str | os.PathLike[str] | Model | PlanRequest, *, rehearse: bool = False, **options: Any
) -> Plan:
    """Return the best plan for a model on a machine.

    Args:
        model: a checkpoint folder, a hub id, a preset's name, or a model already read; or a whole
            request, in which ``options`` replace fields.
        rehearse: run the planned engines on pretend GPUs, and correct their ratio by the result.
        options: the other fields of `PlanRequest`: ``on``, ``tp``, ``images``, ``context``, …, and
            LMDeploy's own options by name. turbofit never changes a value that is given here.

    Returns:
        The plan, whether it fits or not; ``print(plan)`` shows what `turbofit plan` prints.

    Raises:
        UsageError: an option is wrong, or contradicts another.
        MachineError: this machine cannot be read, or has no GPU.
        PackageError: no engine that turbofit accounts for runs the model.
    """
    request = _request(PlanRequest, model, options)
    if not rehearse:
        return planning.plan(request)
    from turbofit.rehearsal.confirm import refuse_untwinned, rehearsed

    refuse_untwinned(request)
    return rehearsed(request, planning.plan(request))


def plan_cluster(model: str | Model | PlanRequest, cluster: Cluster, **options: Any) -> ClusterPlan:
    """Make one promise for several machines, and for each machine the best plan that keeps it.

    Args:
        model: as for `plan`.
        cluster: the nodes as they were measured; each is planned for its own cards.
        options: as for `plan`, without the machine; ``tp`` and ``replicas`` are for each node,
            ``concurrency`` is for all nodes together.

    Raises:
        TurbofitError: as `plan`, if every node has the error.
    """
    return planning.plan_cluster(_request(PlanRequest, model, options), cluster)


def which(model: str | Model | None = None, **options: Any) -> Which:
    """Find the preset cards that keep a promise; without a model, find models for a machine.

    Args:
        model: as for `plan`; None: every preset model on the machine that ``on`` names.
        options: as for `plan`, and ``images_per_second``, which the forecast must reach.

    Raises:
        TurbofitError: as `plan`, if every card or model has the error.
    """
    from turbofit.planning.which import which_cards, which_models

    request = _request(WhichRequest, "-" if model is None else model, options)
    return which_models(request) if model is None else which_cards(request)


def predict(
    model: str | os.PathLike[str] | Model | PredictRequest,
    *,
    backend_config: Any = None,
    **options: Any,
) -> Plan:
    """Predict the memory that given settings take, with LMDeploy's defaults for all others.

    Nothing is searched.

    Args:
        model: as for `plan`.
        backend_config: a config of an LMDeploy engine. Its fields that differ from LMDeploy's
            defaults are given settings.
        options: as for `plan`, and ``free_at_cache`` (free bytes when the cache was sized, from a
            log; they replace the forecast of everything before the cache) and ``lmdeploy`` (the
            engine's version, e.g. ``0.18``).

    Raises:
        TurbofitError: as `plan`.
        PackageError: turbofit has no account of the version.
    """
    given: dict[str, Any] = {**options}
    if backend_config is not None:
        from turbofit.serving.pipeline import config_engine, with_config

        engine = config_engine(backend_config, given.pop("engine", "auto"))
        given = {**with_config(given, backend_config, engine), "engine": engine}
    return planning.predict(_request(PredictRequest, model, given))


def diagnose(
    log: str | os.PathLike[str],
    *,
    model: str | None = None,
    on: str | None = None,
    hang: bool = False,
    lmdeploy: str | None = None,
) -> Diagnosis:
    """Explain from a log why an engine's run ended: the cause, a first step, what would work.

    Args:
        log: a file's path, or the text of the log itself, which contains white space.
        model: the model, if the log does not name it or names it wrongly.
        on: the machine as a SPEC, if the log does not describe it.
        hang: True if the engine hangs, since a log cannot show that.
        lmdeploy: LMDeploy's release, if the log does not print it.

    Raises:
        UsageError: the file cannot be read, or ``model`` or ``on`` has no possible meaning.
    """
    from turbofit.logs.explain import diagnose as explain
    from turbofit.logs.explain import has_words, refuse_prose

    given: dict[str, Any] = {"model": model, "on": on, "hang": hang, "lmdeploy": lmdeploy}
    if not isinstance(log, (str, os.PathLike)):
        raise UsageError(
            f"a log of the type {type(log).__name__}: it should be a text or a path",
            hint="name a log file, or give the log itself",
        )
    if isinstance(log, str) and (not log.strip() or has_words(log)):
        found = explain([log.encode()], **given)
        refuse_prose(log, found)
        return found
    try:
        return explain([Path(log).read_bytes()], **given)
    except OSError as exc:
        raise UsageError(
            f"{log} cannot be read: {exc.strerror}", hint="name a log file, or give the log itself"
        ) from None


def pipeline(  # noqa: PLR0913, D417 - LMDeploy's own signature
    model_path: str | os.PathLike[str],
    backend_config: Any = None,
    chat_template_config: Any = None,
    log_level: str = "WARNING",
    max_log_len: int | None = None,
    trust_remote_code: bool | None = None,
    speculative_config: Any = None,
    allowed_media_domains: list[str] | None = None,
    *,
    model_name: str | None = None,
    vision_config: Any = None,
    **options: Any,
) -> PlannedPipeline:
    """``lmdeploy.pipeline`` with a plan: the same call, with settings and images that fit.

    Args:
        model_path: as for LMDeploy, or the name of a preset.
        backend_config: a config of LMDeploy, which is copied. Its fields that differ from
            LMDeploy's defaults are never changed. All arguments up to ``vision_config`` are
            LMDeploy's.
        options: keywords of `plan` that shape the plan (``tp``, ``on``, ``images``, ``context``,
            ``margin``, …).

    Returns:
        An ``lmdeploy.Pipeline`` whose ``plan`` attribute is the plan.

    Raises:
        PackageError: LMDeploy is missing or too old.
        DoesNotFitError: nothing fits; the hint says what would.
        UsageError: turbofit cannot plan for a keyword or a config.
        LaunchError: a rank launcher started this process with tp > 1, another turbofit plans for
            minutes, or the hub does not give the model.
    """
    from turbofit.serving.pipeline import open_pipeline

    more = {"model_name": model_name, "vision_config": vision_config}
    named = {name: value for name, value in more.items() if value is not None}
    pipeline: PlannedPipeline = open_pipeline(
        os.fspath(model_path) if isinstance(model_path, os.PathLike) else model_path,
        backend_config=backend_config,
        chat_template_config=chat_template_config,
        log_level=log_level,
        max_log_len=max_log_len,
        trust_remote_code=trust_remote_code,
        speculative_config=speculative_config,
        allowed_media_domains=allowed_media_domains,
        **named,
        **options,
    )
    return pipeline


def rehearse(
    model: str | os.PathLike[str] | Model,
    *,
    defaults: bool = False,
    keep: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Plan:
    """Run the real engine with a plan's settings and worst cases on pretend GPUs.

    Args:
        model: as for `plan`.
        defaults: rehearse LMDeploy's defaults, as `predict` has them, instead of the plan.
        keep: a folder for timelines, notes and the engine's log; by default they are removed.
        options: as for `plan`; with ``defaults``, as for `predict`.

    Returns:
        The plan with its ``rehearsal``, and with ``rehearsed`` bytes in the terms of its ledgers.
        The plan fits only if the engine served.

    Raises:
        TurbofitError: as `plan`.
        PackageError: LMDeploy, another package that the engine runs, or a C compiler is missing.
    """
    from turbofit.rehearsal.confirm import refuse_untwinned, rehearse_plan

    request = _request(PredictRequest if defaults else PlanRequest, model, options)
    refuse_untwinned(request)
    planned = predict(request) if isinstance(request, PredictRequest) else plan(request)
    return rehearse_plan(planned, None if keep is None else Path(keep))

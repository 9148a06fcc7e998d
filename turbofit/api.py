"""The doors of turbofit for programs: where the rooms are put together.

    >>> import turbofit
    >>> plan = turbofit.plan("internvl2-8b", on="4xrtx3090")
    >>> plan.fits, plan.settings.cache_max_entry_count

Both :func:`plan` and :func:`predict` import neither torch nor lmdeploy nor transformers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.log import LazyLogger
from turbofit.core.plan import Goal, Plan
from turbofit.core.units import parse_bytes
from turbofit.launch.asked import asked_of, checked, workload_of
from turbofit.launch.cluster.planning import plan_cluster, plan_joining
from turbofit.launch.environment import rank_warning
from turbofit.launch.fallback.command import any_commands
from turbofit.launch.needs import need_warning
from turbofit.machine.source import machine_from
from turbofit.memory.engines import (
    FALLBACK,
    check_options,
    engine_for,
    engine_named,
    fallback_reason,
)
from turbofit.tuner.ask import Ask
from turbofit.tuner.choose import best_plan
from turbofit.tuner.plan import make_plan
from turbofit.tuner.predict import make_prediction

if TYPE_CHECKING:
    from turbofit.core.machine import Machine
    from turbofit.core.model import Model

__all__ = [
    "pipeline",
    "plan",
    "plan_cluster",
    "plan_joining",
    "predict",
    "rehearse",
    "rehearse_torch",
]


_LOG: Final = LazyLogger(__name__)


def _framed(plan: Plan) -> str:
    from turbofit.report.page.notebook import frame

    return frame(plan)


Plan.notebook_html = _framed


def plan(
    model: str | Model,
    *,
    on: str | Machine | None = None,
    tp: int | None = None,
    replicas: int | None = None,
    gpus: str | None = None,
    images: int = 1,
    image_size: tuple[int, int] | None = None,
    context: int | None = None,
    concurrency: int = 8,
    goal: Goal = "throughput",
    queue_images: bool = False,
    max_dynamic_patch: int | None = None,
    max_pixels: int | None = None,
    engine: str = "auto",
    margin: int | str | None = None,
    budget: int | str | None = None,
    revision: str | None = None,
    rehearse: bool = False,
    **settings: Any,
) -> Plan:
    """The best plan for a model on a machine.

    Args:
        model: a checkpoint folder, a hub id, a preset's name, or a model already read.
        on: a SPEC such as ``4xrtx3090``, a snapshot's path, a machine already read, or None for
            this machine through NVML.
        tp: GPUs of one engine; None chooses.
        replicas: engines side by side; None chooses.
        gpus: PCI indices or UUIDs to stay within.
        images: images a request.
        image_size: their (width, height); None is the worst that the model's rule admits.
        context: tokens that one request may have; None is the model's own, lowered to the cache.
        concurrency: requests at once over all replicas.
        queue_images: image requests wait for each other's prefill in turbofit's gateway, so that
            the peak pays for one of them and the cache gets the rest.
        goal: what decides between shapes that serve.
        max_dynamic_patch: InternVL's tile limit; None keeps the model's own where it can be served.
        max_pixels: Qwen2-VL's pixel limit, likewise.
        engine: ``auto``, ``turbomind``, ``pytorch`` or ``transformers``; ``auto`` is the first of
            them that runs the model, or the PyTorch engine where that serves more of what is asked.
        margin: bytes to leave free on each GPU, or a share such as ``"2%"``.
        budget: bytes that this turbofit may take of each GPU, margin included.
        revision: branch, tag or commit on the hub.
        rehearse: run the choice on pretend GPUs and correct its ratio by what was seen.
        settings: LMDeploy's own options by name; what is set is never changed.

    Returns:
        The plan, whether it fits or not.

    Raises:
        UsageError: something asked for cannot be meant or used.
        MachineError: this machine cannot be read, or has no GPU.
        PackageError: no engine that turbofit accounts for runs the model.
    """
    ask = asked_of(model, on, gpus, revision, margin, budget, settings)
    ask = replace(
        ask,
        workload=workload_of(images, image_size, context, concurrency, goal, queue_images),
        tp=tp,
        replicas=replicas,
        max_dynamic_patch=max_dynamic_patch,
        max_pixels=max_pixels,
    )
    ask = checked(ask)
    if rehearse and fallback_reason(ask.model, engine) is not None:
        raise _not_rehearsed(ask.model.name)
    made = best_plan(ask, engine)
    return _finished(_rehearsed(ask, made) if rehearse and made.fits else made)


def predict(
    model: str | Model,
    *,
    on: str | Machine | None = None,
    tp: int | None = None,
    replicas: int | None = None,
    gpus: str | None = None,
    images: int = 1,
    image_size: tuple[int, int] | None = None,
    context: int | None = None,
    concurrency: int = 8,
    goal: Goal = "throughput",
    queue_images: bool = False,
    max_dynamic_patch: int | None = None,
    max_pixels: int | None = None,
    engine: str = "auto",
    margin: int | str | None = None,
    budget: int | str | None = None,
    revision: str | None = None,
    free_at_cache: int | str | None = None,
    lmdeploy: str | None = None,
    **settings: Any,
) -> Plan:
    """What given settings do, LMDeploy's defaults where none are given. No search.

    Args as for :func:`plan`, and:
        free_at_cache: free bytes when the cache is sized, as a log said; replaces everything
            before the cache.
        lmdeploy: the engine generation, e.g. ``0.18``.

    Raises:
        As :func:`plan`; PackageError for a generation without an account.
    """
    ask = asked_of(model, on, gpus, revision, margin, budget, settings)
    ask = replace(
        ask,
        workload=workload_of(images, image_size, context, concurrency, goal, queue_images),
        tp=tp,
        replicas=replicas,
        max_dynamic_patch=max_dynamic_patch,
        max_pixels=max_pixels,
    )
    free = parse_bytes(free_at_cache) if isinstance(free_at_cache, str) else free_at_cache
    if lmdeploy is None and fallback_reason(ask.model, engine) is not None:
        raise UsageError(
            f"predict tells what LMDeploy does, and it does not run {ask.model.name}",
            hint="turbofit plan finds settings for Hugging Face Transformers",
        )
    account = engine_for(ask.model, engine, lmdeploy)
    check_options(account, ask.fixed)
    return _finished(make_prediction(checked(ask), account, free))


def pipeline(model_path: str, *arguments: Any, **keywords: Any) -> Any:
    """``lmdeploy.pipeline`` with a plan: the same call, the settings that fit, images held to it.

    Args:
        model_path: as LMDeploy takes it, or a name that presets know.
        arguments: LMDeploy's own, in its order: ``backend_config`` first; each of its fields that
            differs from LMDeploy's default stays, in a copy.
        keywords: LMDeploy's own, and those of :func:`plan` that shape it (``tp``, ``on``,
            ``images``, ``context``, ``margin``, …).

    Returns:
        An ``lmdeploy.Pipeline`` whose ``plan`` attribute is the plan.

    Raises:
        PackageError: LMDeploy is missing or too old.
        DoesNotFitError: nothing fits; the hint says what would.
        UsageError: a keyword or config that cannot be planned for.
        LaunchError: started by a rank launcher with tp > 1.
    """
    from turbofit.launch.pipeline import open_pipeline

    return open_pipeline(plan, model_path, *arguments, **keywords)


def rehearse(model: str | Model, *, defaults: bool = False, **keywords: Any) -> Plan:
    """What LMDeploy's own engine does with a plan's settings and worst cases on pretend GPUs.

    Args:
        model: as for :func:`plan`.
        defaults: rehearse LMDeploy's defaults (what :func:`predict` tells) instead of the plan.
        keywords: those of :func:`plan`, or of :func:`predict` with ``defaults``.

    Returns:
        The plan with ``rehearsal`` filled and ``rehearsed`` beside the bytes of its ledger; it
        fits only where the engine served.

    Raises:
        As :func:`plan`; PackageError where LMDeploy or a C compiler is missing.
    """
    from turbofit.rehearse.confirm import rehearse_plan

    made = predict(model, **keywords) if defaults else plan(model, **keywords)
    if made.engine.name == FALLBACK:
        raise _not_rehearsed(made.model.name)
    return rehearse_plan(made)


def rehearse_torch(
    model: str,
    *,
    engine: str = "pytorch",
    on: str | Machine | None = None,
    gpus: str | None = None,
    images: int = 1,
    image_size: tuple[int, int] | None = None,
    max_dynamic_patch: int | None = None,
    max_pixels: int | None = None,
    revision: str | None = None,
    keep: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What LMDeploy's PyTorch engine, or Transformers, does on pretend GPUs. No plan is made.

    Args:
        model: a checkpoint folder, a hub id or a preset's name.
        engine: ``pytorch`` or ``transformers``.
        on: the machine, as for :func:`plan`.
        gpus: PCI indices or UUIDs to stay within.
        images: pictures of the worst request.
        image_size: their (width, height); None is the worst that the model's own rule admits.
        max_dynamic_patch: InternVL's tile limit; None is the model's own.
        max_pixels: Qwen2-VL's pixel limit, likewise.
        revision: branch, tag or commit on the hub.
        keep: a folder for timelines and the engine's log.
        settings: LMDeploy's own options by name, its defaults for all others; for Transformers
            ``dtype`` only.

    Returns:
        The document ``turbofit.rehearsal-torch/1``; sizes are bytes.

    Raises:
        As :func:`plan`; PackageError where torch is no CUDA build, or a package is missing.
    """
    from turbofit.machine.presets import context_bytes
    from turbofit.pretend.run import scenario_of
    from turbofit.rehearse import torch_ask

    if "cache_block_seq_len" in settings:
        settings["block_size"] = settings.pop("cache_block_seq_len")
    ask = torch_ask.TorchAsk(
        model=model,
        engine=engine,
        settings={name: value for name, value in settings.items() if value is not None},
        images=images,
        image_size=image_size,
        max_dynamic_patch=max_dynamic_patch,
        max_pixels=max_pixels,
        revision=revision,
    )
    machine = machine_from(on, gpus=gpus) if on is None or isinstance(on, str) else on
    scenario = scenario_of(machine, lambda gpu: context_bytes(gpu)[0])
    folder = Path(keep) if keep is not None else None
    return torch_ask.rehearse_torch(ask, scenario, machine, folder)


def _not_rehearsed(name: str) -> UsageError:
    return UsageError(
        f"{name} is planned for Transformers, whose plans are not rehearsed",
        hint="turbofit rehearse MODEL --engine transformers runs its worst case alone",
    )


#: Rehearsals of one plan at most: the first, and two after a correction.
_REHEARSALS = 3


def _rehearsed(ask: Ask, made: Plan) -> Plan:
    """Rehearse, and plan again below the ratio that the engine left, a bounded number of times."""
    from turbofit.rehearse.confirm import confirmed, corrected_ratios, rehearse_plan

    caps: dict[int, float] = {}
    for _ in range(_REHEARSALS):
        seen = rehearse_plan(made)
        ratios = corrected_ratios(seen)
        if not ratios:
            return confirmed(seen)
        caps |= ratios
        _LOG.info("the rehearsal leaves less than the margin: ratios by GPU become %s", ratios)
        shape = replace(ask, ratio_caps=dict(caps), groups=made.parallel.groups)
        again = make_plan(shape, engine_named(made.engine.name))
        reason = replace(again.parallel, reason=made.parallel.reason)
        made = replace(again, parallel=reason)
        if not made.fits:
            return made
    return seen


def _finished(plan: Plan) -> Plan:
    """Add the command lines, and what the environment and the packages say against them."""
    said = (rank_warning(plan.parallel.tp, os.environ), need_warning(plan))
    warnings = (*plan.warnings, *(text for text in said if text))
    return replace(plan, commands=any_commands(plan), warnings=warnings)

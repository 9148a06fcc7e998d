"""What every manifest says of a plan: the command, its GPUs, its memory, its deadlines."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from msgspec import UNSET

from turbofit.core.errors import DoesNotFitError, UsageError
from turbofit.core.plan import Workload
from turbofit.core.struct import Struct, known
from turbofit.launch.engine.supervised_engine import Timing
from turbofit.tuner.resolved_request import Margin

if TYPE_CHECKING:
    from turbofit.core.plan import Plan

__all__ = ["Service", "service_of"]

#: Seconds after the drain in which engines end and their memory comes back.
_AFTER_DRAIN: Final = 30
#: For NCCL between cards that do not reach each other. Source: NCCL's user guide, Docker.
_NCCL_SHM: Final = 1 << 30
#: Ray's object store as LMDeploy starts it: this share of host RAM, at most so much. Source:
#: LMDeploy pytorch/ray.py.
_RAY_SHARE: Final = 0.3
_RAY_MOST: Final = 80 * 10**9
#: Of a cache, how many times the context for that to be promised at the next start as well.
_SPARE: Final = 1.25
_NAME: Final = re.compile(r"[^a-z0-9]+")


class Service(Struct):
    """A plan as something that is started again and again.

    ``memory`` is host memory in bytes that the engines will take; ``shm`` what ``/dev/shm`` must
    hold, 0 where nothing needs it. ``uuids`` are empty where the plan was made for a preset.
    ``start``: seconds until it must answer; ``stop``: seconds from SIGTERM until it has ended.
    """

    name: str
    argv: tuple[str, ...]
    gpus: int
    uuids: tuple[str, ...]
    card: str
    memory: int
    shm: int
    port: int
    start: int = int(Timing().start)
    stop: int = int(Timing().drain) + _AFTER_DRAIN


def service_of(plan: Plan, *, port: int, host: str, name: str | None = None) -> Service:
    """What to run for a plan.

    The command measures and plans again at every start, with the plan's shape and promises: what
    else holds memory may have changed, and GPUs may be others of the same kind.

    Raises:
        DoesNotFitError: the plan would not serve.
        UsageError: the name has no letter or digit.
    """
    if len({gpu.margin for gpu in plan.gpus}) > 1 and _has_special_margin(plan):
        raise UsageError(
            "this plan's GPUs have margins of their own, from --budget or a share of each card",
            hint="plan with one --margin in bytes, then export",
        )
    if not plan.fits:
        raise DoesNotFitError(
            f"this plan does not serve: {plan.verdict}",
            hint="export a plan that fits; turbofit report shows what would",
        )
    label = _NAME.sub("-", (name or f"turbofit-{plan.model.name}").lower()).strip("-")[:53]
    if not label:
        raise UsageError(f"--name {name} has no letter or digit", hint="give a name like vlm")
    groups = plan.parallel.groups
    indices = [index for group in groups for index in group]
    cards = [plan.machine.gpu(index) for index in indices]
    measured = plan.machine.source != "preset"
    return Service(
        name=label.strip("-"),
        argv=("turbofit", "serve", *_serve_arguments(plan), "--host", host, "--port", str(port)),
        gpus=len(indices),
        uuids=tuple(gpu.uuid for gpu in cards) if measured else (),
        card=", ".join(dict.fromkeys(gpu.name for gpu in cards)),
        memory=plan.host.pinned + plan.host.pageable,
        shm=_shm(plan),
        port=port,
    )


def _serve_arguments(plan: Plan) -> list[str]:
    """The model, the shape and the promises, as options; what is the default is left out."""
    work, settings, default = plan.workload, plan.settings, Workload()
    rule, limit = plan.model.image_rule, plan.limits.image_limit
    argv = [plan.model.source.checkpoint or plan.model.hub_id or plan.model.name]
    if plan.model.revision:
        argv += ["--revision", plan.model.revision]
    argv += ["--engine", plan.engine.name]
    if not plan.by_group:  # unequal cards: no --tp and --replicas says which go together
        # Transformers' settings have no tp: there it is the GPUs of one copy.
        tp = max(settings.tp, *map(len, plan.parallel.groups))
        argv += ["--tp", str(tp), "--replicas", str(plan.parallel.replicas)]
    if work.image_size is not None:
        argv += ["--image-size", "x".join(map(str, work.image_size))]
    for option, value, usual in (
        ("--images", work.images, default.images),
        ("--context", _promised_context(plan), None),
        ("--concurrency", work.concurrency, default.concurrency),
        ("--goal", work.goal, default.goal),
        *([(rule.limit_option, limit, rule.checkpoint_limit)] if rule and limit else []),
        ("--quant-policy", settings.quant_policy, 0),
    ):
        if value != usual:
            argv += [option, str(value)]
    if plan.footprint is not UNSET:
        argv.append("--least")
    if work.queue_images is not None:
        argv.append("--queue-images" if work.queue_images else "--no-queue-images")
    if settings.draft is not None:
        argv += settings.draft.options
    if settings.enable_prefix_caching:
        argv.append("--enable-prefix-caching")
    if settings.language_model_only:
        argv.append("--language-model-only")
    if _has_special_margin(plan):
        argv += ["--margin", str(max(gpu.margin for gpu in plan.gpus))]
    return argv


def _promised_context(plan: Plan) -> int | None:
    """The context, where it is the plan's choice and holds with somewhat less free, too.

    One that was lowered to what the cache held would not be met by a cache a page smaller: it is
    left to the next start.
    """
    context = plan.settings.session_len
    if plan.footprint is not UNSET:  # the cache is made for it
        return context
    if context == plan.model.text.max_position_embeddings:
        return None
    return context if context * _SPARE <= plan.kv.tokens else None


def _has_special_margin(plan: Plan) -> bool:
    """Whether the margin is another than the default."""
    usual = Margin()
    return any(gpu.margin != usual.of(plan.machine.gpu(gpu.index)) for gpu in plan.gpus)


def _shm(plan: Plan) -> int:
    if plan.parallel.tp == 1:
        return 0
    if not plan.engine.is_pytorch:
        return _NCCL_SHM
    total = known(plan.machine.host.ram_total, 0)
    return _NCCL_SHM + (min(_RAY_MOST, int(total * _RAY_SHARE)) if total else _RAY_MOST)

"""The normalised request of a person, and its launches, accounts and host memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import UsageError, option_of
from turbofit.core.images import ImageRule
from turbofit.core.machine import Gpu, Machine
from turbofit.core.model import Model
from turbofit.core.plan import (
    GRAMMAR_PROCESS,
    PHOTOGRAPH,
    HostMemory,
    Settings,
    Workload,
    image_threads,
)
from turbofit.core.promise import Promise
from turbofit.core.struct import Struct, known
from turbofit.core.units import GIB, MIB, format_bytes
from turbofit.machine.presets import is_measured
from turbofit.memory.account import NO_IMAGES, Account, Engine, EngineLaunch, VisionLoad
from turbofit.memory.engines import LMDEPLOY

#: The part of a margin for CUDA contexts and libraries. On unmeasured cards their sizes are
#: estimates: of seven real plans, three took 76, 138 and 206 MiB more than forecast.
CONTEXTS_MARGIN = 256 * MIB
_DEFAULT_SHARE = 0.01
#: The share of the default margin that stays after a rehearsal or a proved start.
_CHECKED_SHARE = 3 / 8
#: The least margin, even with a calibration.
LEAST_MARGIN = 64 * MIB
#: An engine keeps prepared images of at most 4 GiB (as in vLLM), and of at most an eighth of the
#: host memory that is left. If the host memory is unknown, 8 GiB count as left.
_MOST_KEPT, _SHARE_KEPT, _UNKNOWN_LEFT = 4 * GIB, 8, 8 * GIB


class Margin(Struct):
    """The memory to keep free on each GPU: bytes, a share of the total, or the default.

    The default is the larger of 256 MiB and 1 % of the GPU's memory. If this plan was
    ``rehearsed``, the margin is three eighths of the default. On cards whose contexts and libraries
    were not measured, the margin is at least 256 MiB, since a rehearsal measures neither. If a
    start proved this plan on these cards, the margin is three eighths of the default plus ``over``:
    the bytes that its engines took beyond the forecast. ``more`` bytes are added in each case.
    Without rehearsal and start, the default is ``least`` bytes or more.
    """

    bytes: int | None = None
    share: float | None = None
    more: int = 0
    least: int = 0
    rehearsed: bool = False
    over: int | None = None

    def of(self, gpu: Gpu) -> int:
        total = known(gpu.total, 0)
        margin = max(CONTEXTS_MARGIN, int(total * _DEFAULT_SHARE))
        checked = int(margin * _CHECKED_SHARE)
        if self.bytes is not None:
            margin = self.bytes
        elif self.share is not None:
            margin = int(total * self.share)
        elif self.over is not None:
            margin = min(margin, checked + max(0, self.over))
        elif self.rehearsed:
            margin = checked if is_measured(gpu) else max(checked, CONTEXTS_MARGIN)
        else:
            margin = max(margin, self.least)
        return margin + self.more

    def saved(self, gpu: Gpu) -> int:
        """Return the bytes of the default that a calibration makes unnecessary: all but 64 MiB.

        Returns 0 if a person gave the margin, or if the account itself is in doubt (``least``).
        """
        if self.bytes is not None or self.share is not None or self.least:
            return 0
        return max(0, self.of(gpu) - self.more - LEAST_MARGIN)


class ResolvedRequest(Struct):
    """A model on a machine for a workload, and the options that the user has given.

    ``engine_options`` has LMDeploy's own options by name. ``tp``, ``replicas`` and ``image_limit``
    (tiles or pixels) are None if the search chooses. ``budget`` bounds what this turbofit takes of
    each GPU, margin included, as in `budget_on`. ``least``: the best plan is the one with the
    smallest footprint that keeps the promise. ``groups`` is the only grouping to try, if given.
    ``ratio_caps`` are the largest ratios that rehearsals allow, by GPU index.

    ``options`` are the person's own options, for the plan. ``image_threads`` and ``image_cache``
    (bytes) are for each engine of LMDeploy; None: turbofit chooses. ``compares_limits``: the plan
    says what other image limits would give, which takes over half of the time of planning.
    ``promise`` is the promise of an earlier plan of the same request, which this plan must keep.
    ``prefix_caching``: the engines have a prefix cache, though the person has not asked for it.
    ``may_queue``: images may wait for each other if that serves more.
    """

    model: Model
    machine: Machine
    workload: Workload
    engine_options: dict[str, object] = msgspec.field(default_factory=dict)
    tp: int | None = None
    replicas: int | None = None
    image_limit: int | None = None
    margin: Margin = Margin()
    budget: int | str | None = None
    least: bool = False
    groups: tuple[tuple[int, ...], ...] | None = None
    ratio_caps: dict[int, float] = msgspec.field(default_factory=dict)
    options: dict[str, object] = msgspec.field(default_factory=dict)
    image_threads: int | None = None
    image_cache: int | None = None
    compares_limits: bool = True
    promise: Promise | None = None
    prefix_caching: bool = False
    may_queue: bool = True

    @property
    def visible(self) -> tuple[Gpu, ...]:
        return tuple(self.machine.gpu(index) for index in self.machine.visible)

    def margin_of(self, gpu: Gpu) -> int:
        """Return the bytes to leave free on one GPU, including the bytes withheld by a budget."""
        return self.margin.of(gpu) + self.withheld_of(gpu)

    def withheld_of(self, gpu: Gpu) -> int:
        """Return the bytes of one GPU that a budget or a slice withholds from this turbofit."""
        return max(0, gpu.usable - known(gpu.used, 0) - budget_on(gpu, self.budget))

    @property
    def promised_requests(self) -> int | None:
        """The requests at once that all caches together must hold; None without such a promise."""
        return self.workload.concurrency

    @property
    def context_given(self) -> bool:
        return self.workload.context is not None or "session_len" in self.engine_options

    @property
    def requested_image_limit(self) -> int | None:
        """The image limit of the user or the checkpoint; None for a model without images."""
        rule = self.model.image_rule
        return (
            self.image_limit
            if rule is None or self.image_limit is not None
            else rule.checkpoint_limit
        )

    def keeping(self, promise: Promise) -> ResolvedRequest:
        """Return the request of a later plan, whose engines must keep an earlier plan's promise.

        The plan has this promise, or does not fit.
        """
        rule, limit = self.model.image_rule, self.image_limit
        if rule is not None and rule.varies_by_limit and self.workload.image_size is None:
            limit = promise.image_limit or limit
        kept = replace(self, promise=promise, image_limit=limit)
        return kept.with_workload(context=promise.context)

    def with_workload(self, **fields: Any) -> ResolvedRequest:
        return replace(self, workload=replace(self.workload, **fields))


def budget_on(gpu: Gpu, budget: int | str | None) -> int:
    """Return the bytes that a budget, in bytes or a share such as ``80%``, allows on a GPU.

    A slice allows no more than its own bytes.
    """
    if isinstance(budget, str):
        budget = int(known(gpu.total, 0) * float(budget.rstrip("%")) / 100)
    return gpu.ours if budget is None else min(gpu.ours, budget)


def vision_load_of(request: ResolvedRequest, image_limit: int | None) -> VisionLoad:
    """Return the load that clients can put on the vision tower under an image limit.

    If images of a given size have fewer units than the largest image of the limit, the plan
    promises only the given size: larger images are refused or made smaller.

    Raises:
        UsageError: images are requested of a model that takes none.
    """
    rule, workload = request.model.image_rule, request.workload
    words = replace(
        NO_IMAGES, text_tokens=workload.prompt_tokens, output_tokens=workload.output_tokens
    )
    if rule is None or image_limit is None or request.engine_options.get("language_model_only"):
        if workload.image_size is not None:
            raise UsageError(
                f"{request.model.name} takes no images",
                hint="leave `--image-size` out",
            )
        return words
    if workload.images == 0:
        return words
    units = rule.worst_units(image_limit)
    if workload.image_size is not None:
        units = min(units, rule.units(*workload.image_size, image_limit))
    return replace(
        words,
        units_per_image=units,
        images_per_request=workload.images,
        tokens_per_request=rule.unit_tokens(units) * workload.images,
    )


def photographs(rule: ImageRule, image_limit: int, largest: VisionLoad) -> VisionLoad:
    """Return the load of requests with photographs, each no larger than the ``largest`` image."""
    units = min(rule.units(*PHOTOGRAPH, image_limit), largest.units_per_image)
    tokens = rule.unit_tokens(units) * largest.images_per_request
    return replace(largest, units_per_image=units, tokens_per_request=tokens)


def launch_of(
    request: ResolvedRequest,
    settings: Settings,
    gpus: Sequence[Gpu],
    vision_load: VisionLoad,
    free_at_cache: int | None = None,
) -> EngineLaunch:
    """Make the launch of one engine on some of the machine's GPUs, with the margins."""
    margin, withheld = request.margin, [request.withheld_of(gpu) for gpu in gpus]
    return EngineLaunch(
        model=request.model,
        settings=settings,
        gpus=tuple(gpus),
        machine=request.machine,
        vision_load=vision_load,
        margins=tuple([margin.of(gpu) + held for gpu, held in zip(gpus, withheld, strict=True)]),
        saved=tuple([margin.saved(gpu) for gpu in gpus]),
        withheld=tuple(withheld),
        free_at_cache=free_at_cache,
    )


def accounts_of(
    request: ResolvedRequest,
    settings: Sequence[Settings],
    groups: Sequence[Sequence[int]],
    vision_load: VisionLoad,
    engine: Engine,
    free_at_cache: int | None = None,
) -> tuple[Account, ...]:
    """Return the account of each group with its settings."""
    groups_gpus = [[request.machine.gpu(index) for index in group] for group in groups]
    return tuple(
        engine.account(launch_of(request, options, gpus, vision_load, free_at_cache))
        for options, gpus in zip(settings, groups_gpus, strict=True)
    )


def host_of(request: ResolvedRequest, accounts: Sequence[Account], engine: Engine) -> HostMemory:
    """Return the host memory of all groups, and the machine's available memory."""
    available = request.machine.host.ram_available
    memories = [
        engine.host_memory(
            request.model, account.settings, units_per_forward=account.units_per_forward
        )
        for account in accounts
    ]
    grammars = GRAMMAR_PROCESS if engine.name in LMDEPLOY else 0
    host = HostMemory(
        pinned=sum(memory.pinned for memory in memories),
        pageable=sum(memory.pageable for memory in memories) + grammars,
        available=None if available == "NA" else available,
    )
    prepares = request.model.image_rule is not None and engine.name in LMDEPLOY
    return _with_prepared(request, host, len(accounts)) if prepares else host


def _with_prepared(request: ResolvedRequest, host: HostMemory, engines: int) -> HostMemory:
    """Add to the host memory the prepared images that each engine of LMDeploy stores.

    By default, prepared images take only a part of the remaining memory, so that no plan fails
    because of these images.
    """
    threads, cores = request.image_threads, request.machine.host.cpus
    if threads is None and cores != "NA":
        threads = image_threads(cores, engines)
    cache = request.image_cache
    if cache is None:
        left = _UNKNOWN_LEFT
        if host.available is not None:
            left = max(0, host.available - host.pinned - host.pageable) // engines
        cache = min(_MOST_KEPT, left // _SHARE_KEPT)
    if threads == 1:
        cache = 0
    pageable = host.pageable + cache * engines
    return replace(host, pageable=pageable, image_threads=threads, image_cache=cache)


def host_short(host: HostMemory) -> int:
    """Return the bytes of host memory that are missing; 0 if the available memory is unknown."""
    return 0 if host.available is None else max(0, host.total - host.available)


def host_problem(host: HostMemory) -> str | None:
    """Return how much host memory is missing, in words; None if enough is known to be there."""
    if host.available is None or not (short := host_short(host)):
        return None
    return (
        f"host RAM is {format_bytes(short)} short: {format_bytes(host.pinned)}"
        f" pinned and {format_bytes(host.pageable)} pageable of {format_bytes(host.available)}"
    )


def with_image_limit(
    request: ResolvedRequest, max_dynamic_patch: int | None, max_pixels: int | None
) -> ResolvedRequest:
    """Return the request with a person's limit for one image, in tiles or in pixels.

    Raises:
        UsageError: the limit has no effect on this model's images.
    """
    name, rule = request.model.name, request.model.image_rule
    taken = rule.limit_option if rule is not None and rule.varies_by_limit else ""
    limits = ("max_dynamic_patch", "max_pixels")
    for option, given, of in zip(
        limits, (max_dynamic_patch, max_pixels), ("tiles", "pixels"), strict=True
    ):
        if given is not None and option_of(option) != taken:
            hint = f"leave it out, or give `{taken}`" if taken else "leave it out"
            raise UsageError(
                f"`{option_of(option)}` limits {of}, which no image of {name} keeps", hint=hint
            )
    image_limit = max_pixels if max_dynamic_patch is None else max_dynamic_patch
    if rule is None or image_limit is None:
        return request
    if not request.workload.images or request.engine_options.get("language_model_only"):
        raise UsageError(
            f"`{taken}` limits images, and none are served",
            hint=f"leave `{taken}` out, or serve images",
        )
    most = rule.checkpoint_limit
    if image_limit > most and rule.worst_units(image_limit) == rule.worst_units(most):
        raise UsageError(
            f"`{taken} {image_limit}`: no image of {name} has more than {most:,} {rule.limit_unit}",
            hint=f"leave it out, or give {most} or less",
        )
    return replace(request, image_limit=image_limit)

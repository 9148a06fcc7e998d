"""Predicts what given settings do: no search, the steps of one start in LMDeploy's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from msgspec.structs import replace

from turbofit.core.errors import NoKernelError, UsageError
from turbofit.core.messages import QUEUED
from turbofit.core.plan import Plan, Remedy, Settings, Throughput
from turbofit.core.units import MIB, format_bytes
from turbofit.memory.account import POOL_WARMUP, Account, Engine, EngineLaunch, VisionLoad
from turbofit.memory.calibrated import calibration_reason
from turbofit.memory.known_bad import known_problems
from turbofit.memory.start_outcome import StartOutcome, outcome_at, outcomes_at
from turbofit.memory.versions import is_legacy
from turbofit.tuner.explain.plan_document import cache_words, document, requests_held
from turbofit.tuner.explain.reasons import beyond_model, unkept
from turbofit.tuner.explain.remedies import remedies
from turbofit.tuner.resolved_request import (
    ResolvedRequest,
    accounts_of,
    host_of,
    host_problem,
    launch_of,
    vision_load_of,
)
from turbofit.tuner.search.search import fit_on_host
from turbofit.tuner.search.shapes import Shape, dtype_for, shape_settings, split_over_slices
from turbofit.tuner.speed import LinkClass, group_class, group_rates, group_speed
from turbofit.tuner.surety import with_surety
from turbofit.tuner.throughput import host_rate, total


def make_prediction(
    request: ResolvedRequest, engine: Engine, free_at_cache: int | None = None
) -> Plan:
    """The account of LMDeploy's defaults, or of what the user set, on the first GPUs.

    They are the first ``tp`` in CUDA's order; images are what an ordinary OpenAI client can send,
    ``detail: high`` included, unless a limit or a size is given.

    Raises:
        UsageError: the settings are refused before any memory is taken, or more is said to be free
            than there is.
    """
    groups = _groups(request, engine)
    _check_free(request, groups, free_at_cache)
    gpus = [request.machine.gpu(index) for index in groups[0]]
    limit, vision_load = _exposed_load(request)
    settings = _settings(request, groups, engine)
    launch = launch_of(request, settings, gpus, vision_load)
    problem = engine.problem(launch)
    if problem:
        raise UsageError(problem, hint="change the option")
    same = [settings] * len(groups)
    accounts = accounts_of(request, same, groups, vision_load, engine, free_at_cache)
    ratio = settings.cache_max_entry_count
    load = _held(request, vision_load, accounts, ratio)
    if load != vision_load:
        accounts = accounts_of(request, same, groups, load, engine, free_at_cache)
    # What is predicted is LMDeploy by itself, unless somebody asks for more.
    alone = replace(request, image_threads=request.image_threads or 1)
    host = host_of(alone, accounts, engine)
    outcomes = [outcome_at(account, ratio) for account in accounts]
    # Of the first engine whose GPU memory does not do, else of the first.
    outcome = next((outcome for outcome in outcomes if not outcome.serves), outcomes[0])
    smallest = min(account.tokens_at(ratio) for account in accounts) if outcome.serves else None
    never = _never_runs(request, accounts, load, engine) or _no_room(request, settings, smallest)
    end = never or (host_problem(host) if outcome.serves else outcome.text)
    serves = outcome.serves and end is None  # nothing kills it; the margin may still be short
    cache = smallest if serves else None
    tokens = [cache or 0] * len(groups)
    at_once, promised = requests_held(accounts, tokens, vision_load), request.promised_requests
    with_free = partial(accounts_of, request, same, groups, load, engine)
    words = cache_words(tokens, vision_load, settings) + _promised(promised, at_once)
    text = end or f"{outcome.text}; {words}"
    if free_at_cache is not None:
        text = _sized(with_free(None)[0], accounts[0], ratio) + text
    elif serves:
        text += _least_free(engine, accounts, with_free, ratio)
    version = f" with LMDeploy {engine.version}" if is_legacy(engine.version) else ""
    helps = not serves and free_at_cache is None
    return document(
        request,
        engine,
        accounts,
        fits=serves and outcome.kind == "serves",  # the margin is left too
        verdict=f"{request.model.name}{version}: {text}",
        parallel_reason="as LMDeploy takes them: the first GPUs in CUDA's order",
        host=host,
        settings=settings,
        vision_load=vision_load,
        limit=limit,
        held_requests=None if promised is None else at_once,
        reasons=(
            *_exposure(request, limit, vision_load),
            *_story(accounts[0], ratio, outcome, free_at_cache),
        ),
        warnings=_warnings(request, launch, engine, cache),
        throughput=_speed(alone, accounts, vision_load, engine, at_once) if serves else None,
        remedies=_remedies(request, engine) if helps else (),
    )


def _promised(promised: int | None, at_once: int) -> str:
    if promised is None:
        return ""
    others = ": the others wait" if at_once < promised else ""
    return f"; it holds {min(at_once, promised):,} of {promised:,} at once{others}"


def _sized(forecast: Account, account: Account, ratio: float) -> str:
    """What the ratio makes of the free memory of a log, in MiB as logs have them."""
    free, region = account.free, account.at(ratio).region
    left = (free - region) // MIB
    by_ratio = f" at the ratio {ratio:g}" if ratio < 1 else ""
    return (
        f"of {free // MIB:,} MiB free when the cache is sized ({forecast.free // MIB:,} are"
        f" forecast), the cache takes {region // MIB:,}{by_ratio} and {left:,} stay free: "
    )


def _least_free(
    engine: Engine,
    accounts: Sequence[Account],
    with_free: Callable[[int | None], Sequence[Account]],
    ratio: float,
) -> str:
    """Below how much free memory at the cache an older engine would die, and of what, to a MiB.

    Less is free then where others hold memory; images' takes what the cache leaves.
    """
    if not (is_legacy(engine.version) and accounts[0].launch.vision_load.units_per_image):
        return ""
    dies, serves, end = 0, min(account.free for account in accounts) // MIB, ""
    while serves - dies > 1:
        free = (dies + serves) // 2
        outcomes = [outcome_at(account, ratio) for account in with_free(free * MIB)]
        worst = next((outcome for outcome in outcomes if not outcome.serves), None)
        if worst is None:
            serves = free
        else:
            dies, end = free, worst.text.partition(" (")[0].partition(":")[0]
    return f"; with less than {serves:,} MiB free when the cache is sized it {end}" if end else ""


def _exposed_load(request: ResolvedRequest) -> tuple[int | None, VisionLoad]:
    """The image limit, and the images under it, that ordinary clients can ask for."""
    rule, limit = request.model.image_rule, request.requested_limit
    if rule is not None and request.limit is None:
        limit = rule.exposed_limit
    vision_load = vision_load_of(request, limit)
    if not request.workload.queue_images:
        return limit, vision_load
    return limit, replace(vision_load, units_per_forward=vision_load.units_per_request)


def _held(
    request: ResolvedRequest, vision_load: VisionLoad, accounts: Sequence[Account], ratio: float
) -> VisionLoad:
    """The units of one forward where the cache is smaller than the context. Never under."""
    rule = request.model.image_rule
    if rule is None or not vision_load.units_per_image or not accounts[0].admits_prompts:
        return vision_load
    if accounts[0].settings.enable_prefix_caching:
        return vision_load  # prompts share the blocks of one picture
    blocks = max(account.region_at(ratio) // account.block_bytes for account in accounts)
    tokens = blocks * accounts[0].block_tokens
    if tokens <= 0 or tokens >= accounts[0].settings.session_len:
        return vision_load
    most = vision_load.budgeted_units(max(vision_load.units_per_request, rule.units_within(tokens)))
    return replace(vision_load, units_per_forward=most)


def _remedies(request: ResolvedRequest, engine: Engine) -> tuple[Remedy, ...]:
    """What turbofit would do instead: its own plan first, else what makes one possible."""
    try:
        fit = fit_on_host(replace(request, fixed={}), engine)
    except (UsageError, NoKernelError):
        return ()
    if not fit.fits:
        return remedies(fit).remedies
    best, settings = fit.best, fit.best.settings
    plan = (
        f"--tp {settings.tp} --cache-max-entry-count {settings.cache_max_entry_count:.3f}"
        f" --max-prefill-token-num {settings.max_prefill_token_num}"
        f" --max-batch-size {settings.max_batch_size} --session-len {settings.session_len}"
    )
    if best.parts:
        plan = f"{best.shape.replicas} engines, each with its card's own settings"
    effect = f"lives, with {best.kv_tokens:,} KV tokens"
    return (Remedy(change=f"turbofit's plan: {plan}", effect=effect),)


def _groups(request: ResolvedRequest, engine: Engine) -> tuple[tuple[int, ...], ...]:
    visible, tp, replicas = request.machine.visible, request.tp or 1, request.replicas or 1
    problem = engine.tp_problem(request.model, tp)
    if problem:
        raise UsageError(
            f"--tp {tp} is not possible for {request.model.name}: {problem}",
            hint="choose another --tp",
        )
    if tp * replicas > len(visible):
        raise UsageError(
            f"--tp {tp} x {replicas} replicas needs {tp * replicas} GPUs; {len(visible)} visible",
            hint="lower --tp, or name more GPUs",
        )
    groups = tuple(visible[k * tp : (k + 1) * tp] for k in range(replicas))
    if tp > 1 and any(request.machine.gpu(index).mig for group in groups for index in group):
        raise UsageError(
            split_over_slices(tp, sum(not gpu.mig for gpu in request.visible)),
            hint="leave --tp out, or name whole GPUs with --gpus",
        )
    return groups


def _check_free(
    request: ResolvedRequest, groups: tuple[tuple[int, ...], ...], free: int | None
) -> None:
    if free is None:
        return
    for gpu in (request.machine.gpu(index) for group in groups for index in group):
        if free > gpu.usable:
            raise UsageError(
                f"--free-at-cache {format_bytes(free)} is more than the {format_bytes(gpu.usable)}"
                f" that CUDA can hand out on GPU {gpu.index} ({gpu.name})",
                hint="give what the log says is free when the cache is sized, on the card of the"
                " log: --on SPEC",
            )


def _exposure(
    request: ResolvedRequest, limit: int | None, vision_load: VisionLoad
) -> Iterator[str]:
    rule = request.model.image_rule
    if rule is None or limit is None or not vision_load.units_per_image:
        return
    usual = rule.checkpoint_limit
    if request.limit is None and request.workload.image_size is None and limit > usual:
        yield (
            f"images have up to {limit} {rule.limit_unit}: a client's detail: high asks for so"
            f" many, and LMDeploy obeys; the checkpoint's own {rule.limit_name} is {usual}, to"
            " which a plan and turbofit serve hold every image"
        )


def usual_settings(request: ResolvedRequest, engine: Engine) -> Settings:
    """What LMDeploy takes for a request of whose options it is told none but ``tp``."""
    bare = replace(request, fixed={}).with_workload(context=None)
    return _settings(bare, _groups(request, engine), engine)


def _settings(
    request: ResolvedRequest, groups: tuple[tuple[int, ...], ...], engine: Engine
) -> Settings:
    """LMDeploy's defaults under what the user set."""
    gpus = [request.machine.gpu(index) for index in groups[0]]
    defaults = engine.defaults(gpus[0].name)
    context = request.workload.context or request.model.text.max_position_embeddings
    prefill = request.fixed.get("max_prefill_token_num", defaults["max_prefill_token_num"])
    shape = Shape(
        tp=len(groups[0]),
        groups=groups,
        max_prefill_token_num=prefill if isinstance(prefill, int) else 0,
        limit=None,
        dtype=dtype_for(request.model, gpus)[0],
    )
    with_defaults = replace(request, fixed={**defaults, **request.fixed})
    return shape_settings(with_defaults, shape, context)


def _never_runs(
    request: ResolvedRequest, accounts: Sequence[Account], vision_load: VisionLoad, engine: Engine
) -> str | None:
    """What the engine has no code for, or is known to end or hang of every time."""
    for account in accounts:
        launch = launch_of(request, account.settings, account.gpus, vision_load)
        kernels = engine.missing_kernels(launch)
        problems = known_problems(launch, engine.name, engine.version)
        cause = kernels or next((problem.warning for problem in problems if problem.fatal), None)
        if cause is not None:
            return f"does not run: {cause}"
    return None


def _no_room(request: ResolvedRequest, settings: Settings, cache: int | None) -> str | None:
    """Why no request has the images that were asked for, however small they are."""
    rule = request.model.image_rule
    if rule is None or settings.language_model_only:
        return None
    count, session = request.workload.images, settings.session_len
    tokens = count * rule.unit_tokens(rule.least_units)
    short_cache = cache is not None and cache < min(session, tokens)
    if tokens < session and not short_cache:
        return None
    images = f"{count:,} images of the smallest size take"
    images = "one image of the smallest size takes" if count == 1 else images
    where = f"a cache of {cache:,}" if short_cache else f"a session of {session:,}"
    return f"{images} {tokens:,} tokens of {where}"


def _speed(
    request: ResolvedRequest,
    accounts: Sequence[Account],
    vision_load: VisionLoad,
    engine: Engine,
    at_once: int,
) -> Throughput | None:
    """The forecast of all engines, each with its share of the requests that they hold."""
    if is_legacy(engine.version):  # the rates are today's
        return None
    settings, machine = accounts[0].settings, request.machine
    at_once = min(at_once, request.promised_requests or settings.max_batch_size * len(accounts))
    if not at_once:
        return None
    speeds = []
    for account in accounts:
        rates = group_rates(request.model, settings, machine, account.gpus, engine)
        tokens = account.tokens_at(settings.cache_max_entry_count)
        share = at_once / len(accounts)
        speeds.append(group_speed(rates, settings, vision_load, tokens, share))
    host = host_rate(request, vision_load, len(accounts))
    images = vision_load.images_per_request
    forecast = total(speeds, machine.measured, images=images, host=host)
    gpus = [gpu for account in accounts for gpu in account.gpus]
    has_images = bool(vision_load.units_per_image)
    return with_surety(forecast, request.model, engine.name, gpus, images=has_images)


def _story(
    account: Account, ratio: float, start: StartOutcome, free_at_cache: int | None
) -> Iterator[str]:
    """The steps of the start in numbers."""
    outcome = account.at(ratio)
    free, region = account.free, outcome.region
    source = "as the log said" if free_at_cache is not None else "forecast"
    if free <= 0:
        yield f"nothing is free when the cache is sized: {format_bytes(-free)} short"
        return
    yield f"free when the cache is sized: {format_bytes(free)} on the fullest GPU ({source})"
    left = format_bytes(free - region)
    if account.calibration is not None:
        yield calibration_reason(account.calibration)
    yield f"the cache takes {ratio:g} of it, {format_bytes(region)}, and {left} stay"
    ledger = outcome.ledgers[0]
    buffers = sum(t.bytes for t in ledger.ledger if t.phase == "buffers" and t.term != POOL_WARMUP)
    yield f"buffers that live as long as the engine need {format_bytes(buffers)} of what stays"
    for term in ledger.ledger:
        if term.phase == "transient" or term.term == POOL_WARMUP:
            total = buffers + term.bytes
            spare = free - region - total
            verdict = "lives" if spare >= 0 else f"{format_bytes(-spare)} short"
            yield f"{term.term} ({term.note}): {format_bytes(total)} with the buffers: {verdict}"
    for later in outcomes_at(account, ratio)[1:]:
        if later.kind != "margin":
            yield f"and if that were mended: {later.text}"
    if start.kind == "hang":
        yield "at the server's default log level nothing is printed; the port never opens"


def _warnings(
    request: ResolvedRequest,
    launch: EngineLaunch,
    engine: Engine,
    cache: int | None,
) -> Iterator[str]:
    """What goes wrong beside memory; ``cache``: KV tokens of the smallest, None without a start."""
    if request.workload.queue_images and launch.vision_load.units_per_image:
        yield QUEUED
    gpus, settings = launch.gpus, launch.settings
    tokens, room = launch.vision_load.tokens_per_request, settings.session_len
    if cache is not None:
        yield from unkept(request, room, cache)
    yield from beyond_model(request, room)
    if tokens >= room:
        yield (
            f"the largest images of a request take {tokens:,} tokens, and a session has {room:,}:"
            " LMDeploy refuses such a request"
        )
    elif cache is not None and tokens > cache:
        yield (
            f"the largest images of a request take {tokens:,} tokens, and the cache holds"
            f" {cache:,}: such a request is not served"
        )
    for problem in known_problems(launch, engine.name, engine.version):
        if not problem.fatal:  # which is the verdict
            yield problem.warning
    if settings.tp > 1 and group_class(request.machine, gpus) < LinkClass.PCIE_PEER:
        yield (
            "these GPUs do not reach each other: NCCL goes through host memory; slower, but it"
            " takes no more GPU memory"
        )
    possible, why = dtype_for(request.model, gpus)
    if request.fixed.get("dtype") == "bfloat16" and possible == "float16":
        yield f"LMDeploy would run in float16 without a word: {why}"

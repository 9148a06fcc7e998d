"""Predicts the outcome of given settings: without search, in the order of LMDeploy's start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import ceil

from msgspec.structs import replace

from turbofit.core.errors import NoKernelError, UsageError, spelled_in_shell
from turbofit.core.forecast import Throughput
from turbofit.core.messages import QUEUED, plural
from turbofit.core.plan import Plan, Remedy, Settings
from turbofit.core.units import MIB, bisect, format_bytes
from turbofit.memory.account import (
    POOL_WARMUP,
    Account,
    Engine,
    EngineLaunch,
    VisionLoad,
)
from turbofit.memory.calibrated import calibration_reason
from turbofit.memory.known_bad import known_problems, known_warnings
from turbofit.memory.start_outcome import StartOutcome, outcome_at
from turbofit.memory.versions import is_legacy
from turbofit.planning.plan_document import cache_words, document, requests_held
from turbofit.planning.reasons import beyond_model, unkept
from turbofit.planning.remedies import remedies
from turbofit.planning.resolved_request import (
    ResolvedRequest,
    accounts_of,
    host_of,
    host_problem,
    launch_of,
    vision_load_of,
)
from turbofit.planning.search.search import fit_on_host
from turbofit.planning.search.shapes import (
    Shape,
    check_gpus,
    check_tp,
    chosen_dtype,
    dtype_for,
    shape_settings,
)
from turbofit.planning.speed import Speed, group_rates, group_speed
from turbofit.planning.throughput import forecast


def make_prediction(
    request: ResolvedRequest,
    engine: Engine,
    free_at_cache: int | None = None,
    finds_remedies: bool = True,
) -> Plan:
    """Predict what LMDeploy does with the user's settings and its other defaults.

    The engines take the first GPUs in CUDA's order, ``tp`` GPUs for each replica. Images are the
    largest that an ordinary OpenAI client can send, including ``detail: high``, unless a limit or a
    size is given.

    Raises:
        UsageError: the settings are refused before memory is allocated, or the given free memory
          is more than there is.
    """
    start = _Start(request, engine, free_at_cache)
    version = f" with LMDeploy {engine.version}" if is_legacy(engine.version) else ""
    keeps_margin = start.outcome.kind == "serves"
    exposure = _exposure(request, start.image_limit, start.vision_load)
    story = _steps_of_start(start.accounts[0], start.ratio, start.outcome, free_at_cache)
    helps: tuple[Remedy, ...] = ()
    # Memory that was free at the cache is of a run that did without the margin.
    enough = start.serves and (keeps_margin or free_at_cache is not None)
    if finds_remedies and not enough:
        helps = _remedies(request, engine)
        if free_at_cache is not None:
            helps = _lower_share(request, engine, free_at_cache, start)
    return document(
        request,
        engine,
        start.accounts,
        fits=start.serves and keeps_margin,
        verdict=f"{request.model.name}{version}: {start.text}",
        parallel_reason="LMDeploy takes the first GPUs in CUDA's order",
        host=start.host,
        settings=start.settings,
        vision_load=start.vision_load,
        image_limit=start.image_limit,
        reasons=(*exposure, *story),
        warnings=_warnings(request, start.launches, engine, start.cache),
        throughput=start.throughput(),
        remedies=helps,
    )


class _Start:
    """A start of LMDeploy with given settings, without turbofit, and its outcome.

    Raises:
        UsageError: the settings are refused before memory is allocated, or the given free memory
          is more than there is.
    """

    def __init__(self, request: ResolvedRequest, engine: Engine, free_at_cache: int | None) -> None:
        self.request, self.engine, self.free_at_cache = request, engine, free_at_cache
        self.groups = _groups(request, engine)
        _check_free(request, self.groups, free_at_cache)
        self.image_limit, self.vision_load = _exposed_load(request)
        self.settings = _settings(request, self.groups, engine)
        self.launches = [
            launch_of(
                request, self.settings, list(map(request.machine.gpu, group)), self.vision_load
            )
            for group in self.groups
        ]
        if problem := next(filter(None, map(engine.problem, self.launches)), None):
            raise UsageError(problem, hint="change the option")
        # The cache limits the images of a forward, and these images limit the cache: so accounts
        # are first made for all images, then for the images that their cache allows.
        accounts = self._accounts(self.vision_load, free_at_cache)
        self.ratio = accounts[0].ratio
        self.load = _within_cache(request, self.vision_load, accounts, self.ratio)
        changed = self.load != self.vision_load
        self.accounts = self._accounts(self.load, free_at_cache) if changed else accounts
        # The prediction is for LMDeploy without turbofit, unless threads are given.
        self.alone = replace(request, image_threads=request.image_threads or 1)
        self.host = host_of(self.alone, self.accounts, engine)
        outcomes = [outcome_at(account, self.ratio) for account in self.accounts]
        # The outcome is that of the first engine that lacks GPU memory, or else of the first one.
        self.outcome = next((each for each in outcomes if not each.serves), outcomes[0])
        smallest = min(account.tokens_at(self.ratio) for account in self.accounts)
        self.end = self._end(smallest if self.outcome.serves else None)
        #: Whether all engines start and live; they may use memory of the margin.
        self.serves = self.outcome.serves and self.end is None
        self.cache = smallest if self.serves else None
        self.at_once = requests_held(self.accounts, self.vision_load)

    def _accounts(self, load: VisionLoad, free_at_cache: int | None) -> tuple[Account, ...]:
        same = [self.settings] * len(self.groups)
        return accounts_of(self.request, same, self.groups, load, self.engine, free_at_cache)

    def _end(self, smallest: int | None) -> str | None:
        """Return the cause that ends the start, in words; None if the engine serves.

        ``smallest`` has the tokens of the smallest cache, or None if GPU memory is missing.
        """
        never = _never_runs(self.launches, self.engine)
        never = never or _no_room(self.request, self.settings, smallest)
        return never or (host_problem(self.host) if self.outcome.serves else self.outcome.text)

    @property
    def text(self) -> str:
        promised = _promised_words(self.request.promised_requests, self.at_once)
        words = cache_words(self.accounts, self.vision_load) + promised
        refused = _refused_words(self.request, self.vision_load, self.settings)
        text = self.end or f"{self.outcome.text}; {refused}{words}"
        with_free = partial(self._accounts, self.load)
        if self.free_at_cache is not None:
            return _share_words(with_free(None)[0], self.accounts[0], self.ratio) + text
        if self.end and is_legacy(self.engine.version) and not self.outcome.serves:
            text = _at_the_edge(self.outcome, self.accounts, self.ratio) + text
        if self.serves:
            return text + _least_free(self.engine, self.accounts, with_free, self.ratio)
        return text

    def throughput(self) -> Throughput | None:
        """Forecast the speed; None if the engine does not serve, or is an old release."""
        if not self.serves or is_legacy(self.engine.version):  # old releases have no known rates
            return None
        load = _accepted(self.request, self.vision_load, self.settings)
        settings, machine = self.accounts[0].settings, self.alone.machine
        most = self.alone.promised_requests or settings.max_batch_size * len(self.accounts)
        at_once = min(self.at_once, most)
        if not at_once:
            return None
        speeds, texts = list[Speed](), list[Speed]()
        for account in self.accounts:
            rates = group_rates(self.alone.model, settings, machine, account.gpus, self.engine)
            tokens = account.tokens_at(account.ratio)
            share = at_once / len(self.accounts)
            speeds.append(group_speed(rates, settings, load, tokens, share))
            texts.append(group_speed(rates, settings, load.text_alone, tokens, share))
        gpus = [gpu for account in self.accounts for gpu in account.gpus]
        texts = texts if load.units_per_image else []
        engine = self.engine.name
        return forecast(self.alone, speeds, load, engine=engine, gpus=gpus, texts=texts)


def _accepted(request: ResolvedRequest, load: VisionLoad, settings: Settings) -> VisionLoad:
    """Return the load of the largest images that fit into a session with one token of text.

    LMDeploy refuses larger images only after its vision tower has processed them, so accounts count
    the memory of larger images, too.
    """
    rule, room = request.model.image_rule, settings.session_len - 1
    if rule is None or load.tokens_per_request <= room:
        return load
    units, total = rule.images_in(load.images_per_request, room, load.units_per_image)
    return replace(load, units_per_image=units, tokens_per_request=total)


def _refused_words(request: ResolvedRequest, load: VisionLoad, settings: Settings) -> str:
    """Say that LMDeploy refuses the largest images of clients; empty if LMDeploy accepts them."""
    accepted, rule = _accepted(request, load, settings), request.model.image_rule
    if rule is None or accepted == load:
        return ""
    units = accepted.units_per_image
    return (
        f"LMDeploy refuses the largest images, whose {load.tokens_per_request:,} tokens exceed a"
        f" session of {settings.session_len:,}: at most {units:,}"
        f" {plural(units, rule.unit_name)} an image; "
    )


def _promised_words(promised: int | None, at_once: int) -> str:
    """Say how many of the promised requests run at once; empty without a promise."""
    if promised is None:
        return ""
    others = ": the others wait" if at_once < promised else ""
    return f"; it holds {min(at_once, promised):,} of {promised:,} at once{others}"


def _share_words(forecast: Account, account: Account, ratio: float) -> str:
    """Say how much of the free memory that a log reports the cache takes, in MiB as in logs."""
    free, region = account.free, account.region_at(ratio)
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
    """Say how many MiB must be free for an old engine to survive, and how it dies otherwise.

    The text is empty for newer engines, without images, or if the engine survives with any free
    memory. The free memory matters because images need memory beside the cache, and because other
    processes may take memory.
    """
    if not (is_legacy(engine.version) and accounts[0].launch.vision_load.units_per_image):
        return ""

    def end_with(free: int) -> str:
        outcomes = [outcome_at(account, ratio) for account in with_free(free * MIB)]
        worst = next((outcome.text for outcome in outcomes if not outcome.serves), "")
        return worst.partition(" (")[0].partition(":")[0]

    enough = min(account.free for account in accounts) // MIB
    dies, serves = bisect(lambda free: end_with(free) != "", 0, enough)
    end = end_with(dies) if dies else ""
    return f"; with less than {serves:,} MiB free when the cache is sized it {end}" if end else ""


def _at_the_edge(outcome: StartOutcome, accounts: Sequence[Account], ratio: float) -> str:
    """Say that an older release may start although a little memory is missing; else say nothing.

    The account of an older release is an upper bound: torch may keep less memory after loading, and
    pools may grow less. The account may be too high by as much as the margin.
    """
    margin = min(ledger.margin for account in accounts for ledger in account.ledgers_at(ratio))
    if not 0 < outcome.missing <= margin:
        return ""
    return f"at the edge (this account may be too high by {format_bytes(margin)}): "


def _exposed_load(request: ResolvedRequest) -> tuple[int | None, VisionLoad]:
    """Return the image limit that ordinary clients can reach, and the load of its largest image."""
    rule, image_limit = request.model.image_rule, request.requested_image_limit
    if rule is not None and request.image_limit is None:
        image_limit = rule.exposed_limit
    vision_load = vision_load_of(request, image_limit)
    if not request.workload.queue_images:
        return image_limit, vision_load
    return image_limit, replace(vision_load, units_per_forward=vision_load.units_per_request)


def _within_cache(
    request: ResolvedRequest, vision_load: VisionLoad, accounts: Sequence[Account], ratio: float
) -> VisionLoad:
    """Bound the units in a forward by the tokens of the cache, if it is smaller than a context."""
    rule = request.model.image_rule
    if rule is None or not vision_load.units_per_image or not accounts[0].admits_prompts:
        return vision_load
    if accounts[0].settings.enable_prefix_caching:
        return vision_load  # prompts with the same picture share its blocks
    blocks = max(account.region_at(ratio) // account.block_bytes for account in accounts)
    tokens = blocks * accounts[0].block_tokens
    if tokens <= 0 or tokens >= accounts[0].settings.session_len:
        return vision_load
    most = vision_load.budgeted_units(max(vision_load.units_per_request, rule.units_within(tokens)))
    return replace(vision_load, units_per_forward=most)


def _remedies(request: ResolvedRequest, engine: Engine) -> tuple[Remedy, ...]:
    """Return turbofit's own plan as a remedy, or else changes that make a plan possible."""
    try:
        fit = fit_on_host(replace(request, engine_options={}), engine)
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
    if len(best.parts) > 1:
        plan = f"{best.shape.replicas} engines, each with its card's own settings"
    effect = f"lives, with {best.kv_tokens:,} KV tokens"
    return (Remedy(change=f"turbofit's plan: {plan}", effect=effect),)


def _lower_share(
    request: ResolvedRequest, engine: Engine, free_at_cache: int, start: _Start
) -> tuple[Remedy, ...]:
    """Return the largest lower share of the same free memory with which the engine serves.

    If no share serves, the remedy is more free memory.
    """
    for hundredths in range(ceil(start.settings.cache_max_entry_count * 100) - 1, 0, -1):
        options = {**request.engine_options, "cache_max_entry_count": hundredths / 100}
        lower = _Start(replace(request, engine_options=options), engine, free_at_cache)
        if lower.serves:
            effect = f"lives, with {lower.cache or 0:,} KV tokens"
            change = f"--cache-max-entry-count {hundredths / 100:g}"
            return (Remedy(change=change, effect=effect),)
    effect = "no lower share of the cache serves with the memory that was free"
    return (Remedy(change="free the GPUs, or send smaller images", effect=effect),)


def _groups(request: ResolvedRequest, engine: Engine) -> tuple[tuple[int, ...], ...]:
    """Return the GPUs of each engine: the first GPUs, ``tp`` for each replica."""
    check_tp(request, engine)
    check_gpus(request)
    visible, tp = request.machine.visible, request.tp or 1
    groups = tuple(visible[k * tp : (k + 1) * tp] for k in range(request.replicas or 1))
    if tp > 1 and any(request.machine.gpu(index).mig for group in groups for index in group):
        raise UsageError(
            "LMDeploy takes the first GPUs; it cannot split a model over MIG slices",
            hint="leave `--tp` out, or name whole GPUs with `--gpus`",
        )
    return groups


def _check_free(
    request: ResolvedRequest, groups: tuple[tuple[int, ...], ...], free: int | None
) -> None:
    """Refuse free memory that is more than a card can hand out."""
    if free is None:
        return
    for gpu in (request.machine.gpu(index) for group in groups for index in group):
        if free > gpu.usable:
            most, card = format_bytes(gpu.usable), f"GPU {gpu.index} ({gpu.name})"
            raise UsageError(
                f"`--free-at-cache {format_bytes(free)}` is more than the {most} that CUDA can"
                f" hand out on {card}",
                hint="give the free memory that the log reports when the cache is sized, and the"
                " card of the log: `--on SPEC`",
            )


def _exposure(
    request: ResolvedRequest, image_limit: int | None, vision_load: VisionLoad
) -> Iterator[str]:
    """Yield a reason if clients reach larger images than the checkpoint's own limit."""
    rule = request.model.image_rule
    if rule is None or image_limit is None or not vision_load.units_per_image:
        return
    usual = rule.checkpoint_limit
    if request.image_limit is None and request.workload.image_size is None and image_limit > usual:
        yield (
            f"images have up to {image_limit} {rule.limit_unit}: a client's detail: high asks for"
            f" them, and LMDeploy obeys; the checkpoint's own {rule.limit_name} is {usual}, and a"
            " plan and turbofit serve hold every image to this limit"
        )


def usual_settings(request: ResolvedRequest, engine: Engine) -> Settings:
    """Return the settings that LMDeploy chooses if ``tp`` is the only option in its command."""
    bare = replace(request, engine_options={}).with_workload(context=None)
    return _settings(bare, _groups(request, engine), engine)


def _settings(
    request: ResolvedRequest, groups: tuple[tuple[int, ...], ...], engine: Engine
) -> Settings:
    """Return LMDeploy's defaults, overridden by the user's settings.

    The batch is that of the first card; the dtype is one that all cards have. LMDeploy silently
    takes float16 where a given bfloat16 cannot run.
    """
    gpus = [request.machine.gpu(index) for group in groups for index in group]
    defaults = engine.defaults(gpus[0].name)
    context = request.workload.context or request.model.text.max_position_embeddings
    prefill = request.engine_options.get("max_prefill_token_num", defaults["max_prefill_token_num"])
    try:
        dtype = chosen_dtype(request.model, request.engine_options.get("dtype"), gpus)
    except UsageError:
        dtype = "float16"
    shape = Shape(
        tp=len(groups[0]),
        groups=groups,
        max_prefill_token_num=prefill if isinstance(prefill, int) else 0,
        image_limit=None,
        dtype=dtype,
    )
    options = {**defaults, **request.engine_options, "dtype": dtype}
    return shape_settings(replace(request, engine_options=options), shape, context)


def _never_runs(launches: Iterable[EngineLaunch], engine: Engine) -> str | None:
    """Return why these settings never run (no code, or a fatal known fault); None if they run."""
    for launch in launches:
        kernels = engine.missing_kernels(launch)
        problems = known_problems(launch, engine.name, engine.version)
        cause = kernels or next((problem.warning for problem in problems if problem.fatal), None)
        if cause is not None:
            return f"does not run: {spelled_in_shell(cause)}"
    return None


def _no_room(request: ResolvedRequest, settings: Settings, cache: int | None) -> str | None:
    """Return why even the smallest of the wished images do not fit a request; None if they fit."""
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


def _steps_of_start(
    account: Account, ratio: float, start: StartOutcome, free_at_cache: int | None
) -> Iterator[str]:
    """Yield sentences on the steps of the start, with the bytes that each step takes."""
    free, region = account.free, account.region_at(ratio)
    source = "as the log said" if free_at_cache is not None else "forecast"
    if free <= 0:
        yield f"nothing is free when the cache is sized: {format_bytes(-free)} short"
        return
    yield f"free when the cache is sized: {format_bytes(free)} on the fullest GPU ({source})"
    left = format_bytes(free - region)
    if account.calibration is not None:
        yield calibration_reason(account.calibration)
    size = format_bytes(region)
    yield f"the cache takes {ratio:g} of the free memory, {size}, and {left} stay free"
    ledger = account.ledgers_at(ratio)[0]
    buffers = sum(t.bytes for t in ledger.terms if t.phase == "buffers" and t.term != POOL_WARMUP)
    yield f"buffers that live as long as the engine need {format_bytes(buffers)} of the rest"
    for term in ledger.terms:
        if term.phase == "transient" or term.term == POOL_WARMUP:
            total = buffers + term.bytes
            spare = free - region - total
            verdict = "lives" if spare >= 0 else f"{format_bytes(-spare)} short"
            yield f"{term.term} ({term.note}): {format_bytes(total)} with the buffers: {verdict}"
    if start.kind == "hang":
        yield "at the server's default log level nothing is printed; the port never opens"


def _warnings(
    request: ResolvedRequest,
    launches: Sequence[EngineLaunch],
    engine: Engine,
    cache: int | None,
) -> Iterator[str]:
    """Yield the warnings that are not about a lack of memory.

    ``cache`` has the tokens of the smallest cache, or None if the engine does not start.
    """
    launch = launches[0]
    if request.workload.queue_images and launch.vision_load.units_per_image:
        yield QUEUED
    tokens, room = launch.vision_load.tokens_per_request, launch.settings.session_len
    if cache is not None:
        yield from unkept(request, min(room, cache))
    yield from beyond_model(request, room)
    if cache is not None and cache < tokens < room:
        yield (
            f"the largest images of a request take {tokens:,} tokens, and the cache holds"
            f" {cache:,}: such a request is not served"
        )
    yield from known_warnings(launches, engine)
    if request.engine_options.get("dtype") == "bfloat16" != launch.settings.dtype:
        gpus = [gpu for one in launches for gpu in one.gpus]
        yield f"LMDeploy silently runs in float16: {dtype_for(request.model, gpus)[1]}"

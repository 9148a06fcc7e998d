"""Decides whether engines have a prefix cache: on where LMDeploy has it and it costs little.

With it, the next turn of a conversation does not read again what was said before, pictures
included. LMDeploy's own default is off. Its price is memory: with it, more pictures may meet in one
forward (`memory.turbomind.pool.engine_bound`). The account counts that; a plan then has fewer KV
tokens, but its promise stays. A start proves such a plan with one image that has as many units; so
where no field of a request makes an image so large, the cache is on only where somebody asks for
it. Where images wait for each other, the gateway bounds their units whatever the engine has kept.

No memory is counted as saved. If conversations do share tokens, a plan is a little too careful.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.units import three_digits
from turbofit.memory.account import Engine, EngineLaunch
from turbofit.memory.known_bad import known_problems
from turbofit.memory.versions import release
from turbofit.planning.reasons import usual_image
from turbofit.planning.resolved_request import photographs
from turbofit.planning.search.search import EngineFit, fit_of, fit_on_host
from turbofit.planning.search.shapes import Evaluation

#: The largest share of the requests a second, of new photographs, that the cache may cost.
_MOST_LOST: Final = 0.05
#: LMDeploy's first release whose cache tells pictures apart on TurboMind.
_SINCE: Final = "0.16"
_OPTION: Final = "--enable-prefix-caching"
_NAME: Final = "enable_prefix_caching"


def with_prefix_cache(fit: EngineFit) -> EngineFit:
    """Return a result that fits with the prefix cache on; else with a reason why it is off.

    The cache is on if LMDeploy has it for this model, engine and release, and if it takes no memory
    or costs at most `_MOST_LOST` and no promise. The person's own option decides alone.
    """
    request = fit.request
    if not fit.fits or _NAME in request.engine_options or request.least:
        return fit
    lacking = lacking_prefix_cache(fit)
    if lacking:
        return _off(fit, lacking)
    if _takes_more(fit):
        return _with_fewer_tokens(fit)
    return _on(fit, _with_cache(fit), "no memory")


def lacking_prefix_cache(fit: EngineFit) -> str:
    """Return why LMDeploy has no prefix cache for the model that works; empty if it has one."""
    engine, model = fit.engine, fit.request.model
    if release(engine.version) < release(_SINCE):
        return f"LMDeploy before {_SINCE} does not tell pictures apart"
    if engine.backend.on_torch and model.text.delta is not None:
        return "the PyTorch engine keeps states of delta nets only with --prefix-cache-state-budget"
    if "speculative_algorithm" in fit.request.engine_options:
        return "nobody has tried it with a draft"
    for account in fit.accounts:
        settings = replace(account.settings, enable_prefix_caching=True)
        if problem := _problem(replace(account.launch, settings=settings), engine):
            return problem
    return ""


def _problem(launch: EngineLaunch, engine: Engine) -> str:
    """Return a known fault of LMDeploy that the prefix cache brings; empty without one."""
    problems = known_problems(launch, engine.name, engine.version)
    brought = (it for it in problems if it.when.prefix_caching and not it.python_only)
    return next((it.what for it in brought), "")


def _with_cache(fit: EngineFit) -> EngineFit:
    """Return the same result with the cache on; its account is the same."""

    def cached(it: Evaluation) -> Evaluation:
        settings = replace(it.settings, enable_prefix_caching=True)
        return replace(it, settings=settings, joined=tuple(map(cached, it.joined)))

    best = cached(fit.best)
    # No image waits because of the cache.
    request = replace(fit.request, prefix_caching=True, may_queue=fit.best.queues)
    evaluations = (best if it is fit.best else it for it in fit.evaluations)
    return fit_of(request, fit.engine, best, evaluations)


def _with_fewer_tokens(fit: EngineFit) -> EngineFit:
    """Return the best result with the cache and the same groups, or a reason why it is off."""
    rule = fit.request.model.image_rule
    if rule is None or not rule.client_knobs:
        return _only_if_asked(fit, "more pictures could meet in a forward than a start can try")
    wished = replace(fit.request, prefix_caching=True, may_queue=fit.best.queues)
    limit, groups = fit.served_request.image_limit, fit.best.shape.groups
    try:
        found = fit_on_host(replace(wished, image_limit=limit, groups=groups), fit.engine)
    except TurbofitError:
        return _only_if_asked(fit, "nothing would fit")
    if not _keeps(fit, found):
        return _only_if_asked(fit, "the promise would be smaller")
    lost = 1 - _worth(found) / max(_worth(fit), 1e-9)
    cost = f"{max(0.0, lost):.1%} of {_measure(fit)}"
    if lost > _MOST_LOST:
        return _only_if_asked(fit, f"it would cost {cost}")
    evaluations = tuple(found.best if it is fit.best else it for it in fit.evaluations)
    return _on(fit, replace(found, request=wished, evaluations=evaluations), cost)


def _keeps(fit: EngineFit, found: EngineFit) -> bool:
    """Return whether a result with the cache keeps the promise, and holds a longest request."""
    context = fit.best.settings.session_len
    return (
        found.fits
        and found.best.settings.session_len >= context
        and found.image_limit == fit.image_limit
        and found.tokens >= min(fit.tokens, context)
    )


def _measure(fit: EngineFit) -> str:
    """Return the name of what `_worth` measures."""
    return "the requests/s of new photographs" if _knows_speed(fit) else "the KV tokens"


def _knows_speed(fit: EngineFit) -> bool:
    return fit.throughput is not None and fit.throughput.requests_per_second is not None


def _worth(fit: EngineFit) -> float:
    """Return the requests a second of photographs that are all new; if unknown, the KV tokens."""
    rule, limit = fit.request.model.image_rule, fit.image_limit
    if rule is None or limit is None or not _knows_speed(fit):
        return float(fit.best.kv_tokens)
    load = photographs(rule, limit, fit.best.vision_load)
    return sum(speed.requests_per_second for speed in fit.speeds_of(load))


def _takes_more(fit: EngineFit) -> bool:
    """Return whether a forward would have to allow for more vision units with the cache.

    Where image requests wait for each other, the gateway bounds the units, with a cache as without.
    """
    rule, bound = fit.request.model.image_rule, fit.engine.units_bound
    for part in fit.best.engines:
        load, settings = part.vision_load, part.settings
        if rule is None or not load.units_per_image:
            continue
        without = bound(rule, load, settings)
        cached = bound(rule, load, replace(settings, enable_prefix_caching=True))
        waits = load.budgeted_units(without) < without
        if cached > without and not waits:
            return True
    return False


def _gain(fit: EngineFit) -> str:
    """Return what a follow-up of a conversation gains; the seconds only if they are known."""
    found = usual_image(fit) or fit.throughput
    seconds = None if found is None else found.seconds_to_first_token_alone
    if seconds is None:
        return "; a follow-up of a conversation reads only what is new with it"
    return f"; a follow-up of a conversation begins up to {three_digits(seconds)} s sooner with it"


def _on(fit: EngineFit, cached: EngineFit, cost: str) -> EngineFit:
    reason = f"{_NAME}: on, as it costs {cost}{_gain(fit)}; no memory is counted as saved by it"
    return replace(cached, reasons=(*fit.reasons, reason), rival=fit.rival)


def _off(fit: EngineFit, why: str) -> EngineFit:
    return replace(fit, reasons=(*fit.reasons, f"{_NAME}: off: {why}"))


def _only_if_asked(fit: EngineFit, why: str) -> EngineFit:
    return _off(fit, f"{why}{_gain(fit)} ({_OPTION} asks for it whatever it costs)")

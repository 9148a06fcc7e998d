"""Decides whether engines have a prefix cache: on where it helps and costs little.

With it, the next turn of a conversation does not read again what was said before, pictures
included. LMDeploy's own default is off. Its price is memory: a question about a picture that was
seen before resumes among the picture's last tokens and brings its whole work in the tower back, so
that more pictures can meet in one forward. The account counts that; a plan then has fewer KV
tokens, but its promise stays. The worst requests of a start bring no picture back, so that a start
could not prove such a plan: there the cache is on only where somebody asks for it.

No memory is counted as saved. If conversations do share tokens, a plan is a little too careful.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.units import three_digits
from turbofit.memory.account import NO_IMAGES, Engine, EngineLaunch
from turbofit.memory.known_bad import known_problems
from turbofit.memory.versions import release
from turbofit.planning.reasons import usual_image
from turbofit.planning.resolved_request import launch_of, photographs
from turbofit.planning.search.search import EngineFit, fit_on_host

if TYPE_CHECKING:
    from turbofit.core.forecast import UsualImage

#: The largest share of the requests a second, of new photographs, that the cache may cost.
_MOST_LOST: Final = 0.05
#: LMDeploy's first release whose cache tells pictures apart on TurboMind.
_SINCE: Final = "0.16"
_OPTION: Final = "--enable-prefix-caching"
_NAME: Final = "enable_prefix_caching"


def with_prefix_cache(fit: EngineFit) -> EngineFit:
    """Return a result that fits with the prefix cache on; else with a reason why it is off.

    The cache is on if LMDeploy has it for this model, engine and release, if no more pictures meet
    in a forward with it, and if the same groups keep the promise of ``fit``, queue no image because
    of it, and lose at most `_MOST_LOST`. The person's own option decides alone.
    """
    request = fit.request
    if not fit.fits or _NAME in request.engine_options or request.least:
        return fit
    lacking = lacking_prefix_cache(fit)
    if lacking:
        return _off(fit, lacking)
    if _takes_more(fit):
        return _off(fit, f"more pictures could meet in a forward{_gain(fit)}{_asks()}")
    cached = _with_cache(fit)
    if cached is None:
        return _off(fit, f"no shape with it keeps the promise{_asks()}")
    why = _broken(fit, cached)
    lost = 1 - _worth(cached) / max(_worth(fit), 1e-9)
    if not why and lost > _MOST_LOST:
        why = f"it would cost {lost:.0%} of {_measure(fit)}"
    if why:
        return _off(fit, f"{why}{_gain(fit)}{_asks()}")
    cost = f"on, as it costs {max(0.0, lost):.0%} of {_measure(fit)}"
    reason = f"{_NAME}: {cost}{_gain(fit)}; no memory is counted as saved by it"
    return replace(cached, reasons=(*fit.reasons, reason), rival=fit.rival)


def lacking_prefix_cache(fit: EngineFit) -> str:
    """Return why LMDeploy has no prefix cache for the model that works; empty if it has one."""
    engine, model = fit.engine, fit.request.model
    if release(engine.version) < release(_SINCE):
        return f"LMDeploy before {_SINCE} does not tell pictures apart"
    if engine.backend.on_torch and model.text.delta is not None:
        return "the PyTorch engine keeps states of delta nets only with --prefix-cache-state-budget"
    if "speculative_algorithm" in fit.request.engine_options:
        return "nobody has tried it with a draft"
    for group, part in zip(fit.best.shape.groups, fit.best.engines, strict=True):
        gpus = [fit.request.machine.gpu(index) for index in group]
        settings = replace(part.settings, enable_prefix_caching=True)
        launch = launch_of(fit.request, settings, gpus, part.vision_load)
        if problem := _problem(launch, engine):
            return problem
    return ""


def _problem(launch: EngineLaunch, engine: Engine) -> str:
    """Return a known fault of LMDeploy that the prefix cache brings; empty without one."""
    problems = known_problems(launch, engine.name, engine.version)
    brought = (it for it in problems if it.when.prefix_caching and not it.python_only)
    return next((it.what for it in brought), "")


def _with_cache(fit: EngineFit) -> EngineFit | None:
    """Return the best result with the cache at the same image limit; None if nothing serves."""
    # No image waits because of the cache.
    wished = replace(fit.request, prefix_caching=True, may_queue=fit.best.queues)
    asked = replace(
        wished, image_limit=fit.served_request.image_limit, groups=fit.best.shape.groups
    )
    try:
        found = fit_on_host(asked, fit.engine)
    except TurbofitError:
        return None
    if not found.fits:
        return None
    evaluations = tuple(found.best if it is fit.best else it for it in fit.evaluations)
    return replace(found, request=wished, evaluations=evaluations)


def _takes_more(fit: EngineFit) -> bool:
    """Return whether more vision units can meet in a forward with the cache."""
    rule, load = fit.request.model.image_rule, fit.best.vision_load
    if rule is None or not load.units_per_image:
        return False
    bound = fit.engine.units_bound
    return any(
        bound(rule, load, replace(part.settings, enable_prefix_caching=True))
        > bound(rule, load, part.settings)
        for part in fit.best.engines
    )


def _broken(fit: EngineFit, cached: EngineFit) -> str:
    """Return what the cache would break of the promise; empty if it keeps all."""
    before, after = fit.best, cached.best
    contexts = before.settings.session_len, after.settings.session_len
    if contexts[1] < contexts[0]:
        return f"the context would fall from {contexts[0]:,} to {contexts[1]:,} tokens"
    if cached.image_limit != fit.image_limit:
        return f"the image limit would fall from {fit.image_limit} to {cached.image_limit}"
    if cached.tokens < min(fit.tokens, contexts[0]):
        return "a cache would hold no longest request"
    return ""


def _knows_speed(fit: EngineFit) -> bool:
    return fit.throughput is not None and fit.throughput.requests_per_second is not None


def _measure(fit: EngineFit) -> str:
    """Return the name of what `_worth` measures."""
    if not _knows_speed(fit):
        return "the KV tokens"
    return "the requests/s of new photographs" if fit.image_limit else "the requests/s"


def _worth(fit: EngineFit) -> float:
    """Return the requests a second of photographs that are all new, or of text without images.

    Without a forecast of the speed, return the KV tokens of all caches.
    """
    if not _knows_speed(fit):
        return float(fit.best.kv_tokens)
    load, rule, limit = NO_IMAGES, fit.request.model.image_rule, fit.image_limit
    if rule is not None and limit is not None:
        load = photographs(rule, limit, fit.best.vision_load)
    return sum(speed.requests_per_second for speed in fit.speeds_of(load))


def _gain(fit: EngineFit) -> str:
    """Return how much sooner a follow-up about a photograph begins; empty if it is not known."""
    usual: UsualImage | None = usual_image(fit) or None
    found = usual or fit.throughput
    seconds = None if found is None else found.seconds_to_first_token_alone
    if seconds is None:
        return "; a follow-up of a conversation does not read it again"
    return f"; a follow-up of a conversation begins up to {three_digits(seconds)} s sooner with it"


def _asks() -> str:
    return f" ({_OPTION} asks for it whatever it costs)"


def _off(fit: EngineFit, why: str) -> EngineFit:
    return replace(fit, reasons=(*fit.reasons, f"{_NAME}: off: {why}"))

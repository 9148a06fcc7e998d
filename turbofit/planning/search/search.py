"""The search over all legal shapes: promises count first, then the goal.

The wished image limit is tried on every shape in two ways. First, the peak counts as many images as
the engine itself can bring together. Then the peak counts fewer images, so that the gateway must
queue image requests, and the cache gets the memory that is saved. If no shape can serve the wished
limit, the largest limit is found that a shape serves, and the search starts again with this limit.
The best shape at last gets its batch for clients as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any, Final

from msgspec.structs import replace

from turbofit.core.errors import NoKernelError, TurbofitError, UsageError
from turbofit.core.forecast import Throughput
from turbofit.core.images.rule import ImageRule
from turbofit.core.plan import HostMemory
from turbofit.core.process.log import LazyLogger
from turbofit.core.struct import Struct
from turbofit.core.units import bisect
from turbofit.memory.account import Account, Engine, EngineLaunch, VisionLoad
from turbofit.memory.engines import LMDEPLOY, option_owner
from turbofit.memory.known_bad import KnownProblem, known_problems
from turbofit.model.families.engines import engine_problem
from turbofit.model.presets import four_bit_variant, unpacked_variant
from turbofit.planning.resolved_request import (
    ResolvedRequest,
    accounts_of,
    host_of,
    host_problem,
    launch_of,
    vision_load_of,
)
from turbofit.planning.search.evaluate import evaluate, with_client_rows
from turbofit.planning.search.shapes import (
    Evaluation,
    Shape,
    check_gpus,
    check_tp,
    shape_settings,
    shapes,
    unsplittable,
)
from turbofit.planning.search.sizing import Ask, SearchState, longest_context, most_context
from turbofit.planning.speed import Speed, counted_tokens, group_rates, group_speed
from turbofit.planning.throughput import forecast

_LOG: Final = LazyLogger(__name__)


class EngineFit(Struct):
    """The search's result for one engine: the best shape, its accounts and its host memory.

    ``evaluations`` are all tried shapes; even the best may not fit. ``reasons`` say why this engine
    was preferred to another, and why fewer engines run than the GPUs could hold. ``rival`` is the
    result of LMDeploy's other engine: it serves less than this engine, or it alone serves.
    """

    request: ResolvedRequest
    engine: Engine
    best: Evaluation
    evaluations: tuple[Evaluation, ...]
    accounts: tuple[Account, ...]
    host: HostMemory
    reasons: tuple[str, ...] = ()
    rival: EngineFit | None = None

    @property
    def fits(self) -> bool:
        return self.best.fits and self.host_problem is None

    @property
    def host_problem(self) -> str | None:
        return host_problem(self.host)

    @property
    def served_request(self) -> ResolvedRequest:
        """The request with the image limit that is served, as if a person had given this limit."""
        limit = self.image_limit
        lowered = limit not in (None, self.request.requested_image_limit)
        return replace(self.request, image_limit=limit) if lowered else self.request

    @property
    def requested_load(self) -> VisionLoad:
        """The load of the workload's images, before a limit is lowered."""
        return vision_load_of(self.request, self.request.requested_image_limit)

    @property
    def image_limit(self) -> int | None:
        """The promised image limit; None without images."""
        return self.best.shape.image_limit if self.best.vision_load.units_per_image else None

    @property
    def tokens(self) -> int:
        return min(account.tokens_at(account.ratio) for account in self.accounts)

    @property
    def throughput(self) -> Throughput | None:
        speeds, load = self.best.speeds, self.best.vision_load
        if not speeds:
            return None
        engine, gpus = self.engine.name, self.best.gpus(self.request.machine)
        texts = self.speeds_of(load.text_alone) if load.units_per_image else ()
        return forecast(self.request, speeds, load, engine=engine, gpus=gpus, texts=texts)

    def speeds_of(self, load: VisionLoad) -> list[Speed]:
        """Return the speed of each group for another load, with the same settings."""
        request, best, speeds = self.request, self.best, list[Speed]()
        for account, part in zip(self.accounts, best.engines, strict=True):
            size = counted_tokens(load, part.settings.session_len)
            held = part.settings.requests_in(part.kv_tokens, size)
            there = min(part.shape.requests(request.workload.concurrency), max(1, held))
            here = group_rates(
                request.model, part.settings, request.machine, account.gpus, self.engine
            )
            speeds.append(group_speed(here, part.settings, load, part.kv_tokens, there))
        return speeds


def search(request: ResolvedRequest, engine: Engine) -> EngineFit:
    """Search the best shape for a request on one engine.

    Raises:
        UsageError: an option of the user cannot be used on this machine or with this model.
    """
    searched = _Search(request, engine)
    best, evaluations = searched.best()
    fit = _with_client_rows(fit_of(request, engine, best, evaluations), searched.state)
    best = fit.best
    _LOG.info(
        "%s on %s: %d shapes looked at, %d fit; the best: tp %d x %d, prefill %d, limit %s, %s",
        engine.name, request.machine.name, len(evaluations),
        sum(evaluation.fits for evaluation in evaluations),
        best.shape.tp, best.shape.replicas, best.shape.max_prefill_token_num,
        best.shape.image_limit,
        f"{best.kv_tokens} KV tokens" if best.fits else f"{best.short} bytes short",
    )  # fmt: skip
    return fit


def fit_of(
    request: ResolvedRequest, engine: Engine, best: Evaluation, evaluations: Iterable[Evaluation]
) -> EngineFit:
    """Return the result with the ``best`` shape, its accounts and its host memory."""
    settings = [part.settings for part in best.engines]
    accounts = accounts_of(request, settings, best.shape.groups, best.vision_load, engine)
    return EngineFit(
        request=request,
        engine=engine,
        best=best,
        evaluations=tuple(evaluations),
        accounts=accounts,
        host=host_of(request, accounts, engine),
    )


def _with_client_rows(fit: EngineFit, state: SearchState) -> EngineFit:
    """Return the result with the batch for clients as they come, if the host's memory allows it."""
    best = fit.best
    if fit.served_request is not fit.request:  # the search lowered the image limit
        state = SearchState(fit.served_request, fit.engine, fit.requested_load)
    larger = with_client_rows(state, best)
    if larger is best:
        return fit
    evaluations = (larger if it is best else it for it in fit.evaluations)
    more = fit_of(fit.request, fit.engine, larger, evaluations)
    return fit if more.host_problem and not fit.host_problem else more


def fit_on_host(request: ResolvedRequest, engine: Engine) -> EngineFit:
    """Search the best shape, with fewer replicas if host memory is not enough for all of them.

    If no number of replicas fits, the result is the shape with the most requests at once. Raises as
    :func:`search`.
    """
    fit = search(request, engine)
    if fit.host_problem is None or request.replicas is not None or request.groups is not None:
        return fit
    planned, most = fit.best.shape.replicas, fit
    for replicas in range(planned - 1, 0, -1):
        try:
            fewer = search(replace(request, replicas=replicas), engine)
        except TurbofitError:
            continue
        if fewer.host_problem is not None or not fewer.best.serves:
            continue
        reason = f"replicas {replicas}: host memory is too small for {planned}"
        fewer = replace(fewer, reasons=(reason,))
        if fewer.fits:
            return fewer
        if most is fit or fewer.best.held_requests > most.best.held_requests:
            most = fewer
    return most


def at_limit(
    request: ResolvedRequest, shape: Shape, image_limit: int, engine: Engine
) -> Evaluation:
    """Return the best evaluation of a shape's groups under another image limit."""
    here = _Search(replace(request, image_limit=image_limit, groups=shape.groups), engine)
    return with_client_rows(here.state, here.best()[0])


def limit_that_fits(request: ResolvedRequest, shape: Shape, engine: Engine) -> int | None:
    """Return the largest image limit below the shape's own with which its groups fit, or None."""
    rule, here = request.model.image_rule, _Search(request, engine)
    if rule is None or shape.image_limit is None:
        return None
    space = [one for one in here.shapes() if one.groups == shape.groups] or [shape]
    space = [replace(one, at_once=None, units_per_forward=None) for one in space]

    def fits(limit: int) -> bool:
        """Return whether a shape fits with a limit, with or without images that wait."""
        whole = (replace(one, image_limit=limit) for one in space)
        waiting = (here.limited(one, limit) for one in space)
        return any(here.evaluate(one).fits for one in chain(whole, waiting))

    return _largest_limit(rule, shape, fits)


class _Search:
    """The search over the shapes of one engine for one request."""

    def __init__(
        self, request: ResolvedRequest, engine: Engine, wished: VisionLoad | None = None
    ) -> None:
        self.request, self.engine = request, engine
        self.state = SearchState(request, engine, wished)

    def best(self) -> tuple[Evaluation, list[Evaluation]]:
        """Return the best evaluation by `Evaluation.search_order`, and all evaluations.

        If no shape serves, the search starts again with a lower image limit, as if a person had
        given this limit. If no shape serves even the smallest images, the best has the wished
        limit.
        """
        request, space = self.request, self.shapes()
        whole = [self.evaluate(shape) for shape in space]
        evaluations = [*whole]
        for shape, evaluation in zip(space, whole, strict=True):
            evaluations += self.queued(shape, evaluation)
        rule, given = request.model.image_rule, request.image_limit is not None
        images = self.state.requested_load.units_per_image
        lowers = rule is not None and not given and request.workload.image_size is None and images
        serving = [it for it in evaluations if it.serves]
        if lowers and not serving:
            best, more = self.lowered(space)
            if not best.serves:
                best = max(whole, key=_order)
            return best, [*evaluations, *more]
        best = max(serving or whole, key=_order)
        place = evaluations.index(best)
        if best.serves and best.queues:
            best = self.widened(best)
        evaluations[place] = best
        return best, evaluations

    def shapes(self) -> list[Shape]:
        """Return the shapes that LMDeploy accepts with the user's options, at least one.

        Raises:
            TurbofitError: there are none; the error says why.
        """
        request, engine = self.request, self.engine
        running = list(shapes(request, engine))
        if not running:
            if request.tp is None and (problem := engine.tp_problem(request.model, 1)):
                raise UsageError(
                    f"{request.model.name} cannot run on the {engine.name} engine: {problem}",
                    hint=f"take {_other_weights(request)}",
                )
            check_tp(request, engine)
            check_gpus(request)
            raise UsageError(
                f"`--tp {request.tp}` would split over unequal GPUs, but {unsplittable(request)}",
                hint="let turbofit choose `--tp` and `--replicas`",
            )
        stages: tuple[tuple[Ask, Callable[[Any], TurbofitError]], ...] = (
            (engine.problem, lambda problem: _refused(request, problem)),
            (self._death, lambda death: UsageError(death.cause, hint=death.instead)),
            (engine.missing_kernels, lambda kernels: _no_kernels(request, engine, kernels)),
        )
        for ask, error in stages:
            problems = [self._problem(shape, ask) for shape in running]
            if all(problems):
                raise error(problems[0])
            running = [s for s, problem in zip(running, problems, strict=True) if problem is None]
        return running

    def _death(self, launch: EngineLaunch) -> KnownProblem | None:
        """Return a known fault that ends the engine with this launch, or None."""
        known = known_problems(launch, self.engine.name, self.engine.version)
        return next((problem for problem in known if problem.fatal), None)

    def _problem(self, shape: Shape, ask: Ask) -> object:
        """Return the first problem that ``ask`` finds in a shape's engines; None if all can run.

        Each engine is asked about its longest possible context, and about one request unless a
        batch is given, since the search never chooses a batch that ends the engine.
        """
        request, state = self.request, self.state
        # With images, engines are asked about the model's own context. If a given context is too
        # short for the images, another message says so.
        images = state.requested_load.units_per_image
        longest = request.model.text.max_position_embeddings if images else most_context(request)
        for gpus in state.distinct(shape.groups):
            settings = shape_settings(request, replace(shape, tp=len(gpus), at_once=1.0), longest)
            kind = settings, state.key_of(gpus)
            make = partial(launch_of, request, settings, gpus, state.requested_load)
            launch = state.once(("launch", *kind), make)
            problem = state.once((ask, *kind), partial(ask, launch))
            if problem is not None:
                return problem
        return None

    def evaluate(self, shape: Shape) -> Evaluation:
        vision_load = vision_load_of(self.request, shape.image_limit)
        if self.request.workload.queue_images and vision_load.units_per_image:
            shape = replace(shape, units_per_forward=vision_load.units_per_request)
        return evaluate(self.state, shape)

    def queued(self, shape: Shape, whole: Evaluation) -> Iterator[Evaluation]:
        """Yield the shape with image requests that wait for each other, if it may beat ``whole``.

        The peak of ``whole`` counts as many images as an engine can bring together; the peak of the
        yielded shape counts the images of one request.
        """
        request, units = self.request, self.state.requested_load.units_per_request
        # If the person has given `queue_images`, ``whole`` already obeys it.
        may_queue = self._may_queue and request.may_queue
        if not units or request.workload.queue_images is not None or not may_queue:
            return
        # The shape keeps every promise and needs no more cache, unless the goal is the context or
        # the least memory is wished.
        enough = whole.fits and whole.settings.session_len >= longest_context(request)
        enough = enough and not any(part.wants_cache for part in whole.parts)
        if enough and request.workload.goal != "context" and not request.least:
            return
        queued = self.evaluate(replace(shape, units_per_forward=units))
        if not (queued.fits and whole.fits and queued.worth <= whole.worth):
            yield queued

    def widened(self, queued: Evaluation) -> Evaluation:
        """Evaluate the shape with the most units per forward that cost no promise or speed."""
        rule, low = self.request.model.image_rule, queued.shape
        least = low.units_per_forward
        assert rule is not None
        assert least is not None
        vision_load = vision_load_of(self.request, low.image_limit)
        bounds = [
            self.engine.units_bound(rule, vision_load, part.settings) for part in queued.parts
        ]
        at_once = None if self.request.workload.concurrency is None else low.at_once
        tried, step = {0: queued}, rule.unit_step

        def costs_nothing(steps: int) -> bool:
            units = least + steps * step
            tried[steps] = self.evaluate(replace(low, at_once=at_once, units_per_forward=units))
            return tried[steps].fits and tried[steps].worth >= queued.worth

        steps = (max(least, *bounds) - least) // step + 1
        return tried[bisect(costs_nothing, 0, steps)[0]]

    def lowered(self, space: list[Shape]) -> tuple[Evaluation, list[Evaluation]]:
        """Return the result of a search with a lower image limit.

        Each shape has the largest limit that it serves, and the best of these shapes decides on the
        limit. If no shape serves any limit, the limit is the least.
        """
        rule = self.request.model.image_rule
        assert rule is not None
        searches: dict[int, _Search] = {}

        def under(limit: int) -> _Search:
            if limit not in searches:
                lower = replace(self.request, image_limit=limit)
                searches[limit] = _Search(lower, self.engine, self.state.requested_load)
            return searches[limit]

        def at(shape: Shape, limit: int) -> Evaluation:
            return under(limit).evaluate(under(limit).limited(shape, limit))

        def most(shape: Shape) -> int:
            found = _largest_limit(rule, shape, lambda limit: at(shape, limit).serves)
            return found or rule.least_limit

        limit = rule.least_limit
        if self.request.promised_requests is None:  # the shape with the largest limit is the best
            kinds = self.state.kinds
            # Of groups of the same kinds, whatever their number, one is enough.
            alike = {(kinds(it.groups), it.max_prefill_token_num): it for it in space}
            for shape in reversed(alike.values()):
                if at(shape, limit + rule.limit_step).serves:
                    limit = max(limit, most(shape))
        else:
            best = max((at(shape, most(shape)) for shape in space), key=_order)
            limit = best.shape.image_limit or limit
        return under(limit).best()

    @property
    def _may_queue(self) -> bool:
        """Whether image requests may wait for the first tokens of those before them.

        Unless a person asks for it, an engine must tell first tokens also of answers in one piece:
        else each of them would hold the next one back until its end.
        """
        asked = self.request.workload.queue_images
        return self.engine.tells_first_tokens if asked is None else asked

    def limited(self, shape: Shape, image_limit: int) -> Shape:
        """Return the shape with another image limit.

        If images may queue, one forward has at most one request's units.
        """
        lower = replace(shape, image_limit=image_limit)
        if not self._may_queue:
            return lower
        units = vision_load_of(self.request, image_limit).units_per_request
        return replace(lower, units_per_forward=units)


def _order(evaluation: Evaluation) -> tuple[object, ...]:
    return evaluation.search_order


def _largest_limit(rule: ImageRule, shape: Shape, good: Callable[[int], bool]) -> int | None:
    """Return the largest limit below a shape's own for which ``good`` is true, or None."""
    step, least = rule.limit_step, rule.least_limit
    limits = range(least, max(least, (shape.image_limit or 0) - step) + 1, step)
    if not good(least):
        return None
    return limits[bisect(lambda place: good(limits[place]), 0, len(limits))[0]]


def _refused(request: ResolvedRequest, problem: str) -> UsageError:
    """Return the error for an option that LMDeploy refuses."""
    given = "model_format" in request.engine_options
    packed = four_bit_variant(request.model) if given else None
    instead = "change it" if packed is None else f"name {packed.hub_id}, its 4 bits"
    return UsageError(problem, hint=f"leave the option out, or {instead}")


def _no_kernels(request: ResolvedRequest, engine: Engine, kernels: str) -> NoKernelError:
    """Return the error for cards without kernels; its hint names what runs instead."""
    model, engine_options = request.model, request.engine_options
    others = [name for name in LMDEPLOY if name != engine.name]
    instead = ["cards of another generation"]
    if option_owner(engine_options) is None and not all(engine_problem(model, n) for n in others):
        instead.insert(0, "another engine")
    if "quant_policy" in engine_options:
        instead.append("another `--quant-policy`")
    return NoKernelError(
        f"{model.name} does not run on {engine.name} here: {kernels}",
        hint=f"take {', '.join(instead)} or {_other_weights(request)}",
        options=["quant_policy"],
    )


def _other_weights(request: ResolvedRequest) -> str:
    """Return which other weights to take: the same model in 16 bits, if its name is known."""
    variant = unpacked_variant(request.model)
    return "other weights" if variant is None else f"{variant.hub_id}, its 16 bits"

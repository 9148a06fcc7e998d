"""The search over all legal shapes: promises count first, then the goal.

The wished image limit is tried on every shape: with the engine's own bound in the peak, and with a
lower one, so that the gateway queues image requests and the cache gets the rest. Smaller limits are
tried if no shape can serve the wished limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, Final

from msgspec.structs import replace

from turbofit.core.errors import NoKernelError, TurbofitError, UsageError
from turbofit.core.images.rule import ImageRule
from turbofit.core.machine import Gpu
from turbofit.core.plan import HostMemory, Throughput
from turbofit.core.process.log import LazyLogger
from turbofit.core.struct import Struct
from turbofit.core.units import bisect
from turbofit.memory.account import Account, Engine, EngineLaunch, VisionLoad
from turbofit.memory.engines import LMDEPLOY, option_owner
from turbofit.memory.known_bad import KnownProblem, known_problems
from turbofit.model.families.engines import engine_problem
from turbofit.model.presets import four_bit_variant, unpacked_variant
from turbofit.tuner.resolved_request import (
    ResolvedRequest,
    accounts_of,
    host_of,
    host_problem,
    launch_of,
    vision_load_of,
)
from turbofit.tuner.search.candidates import evaluate, serves_alone, with_speeds
from turbofit.tuner.search.shapes import (
    Evaluation,
    Shape,
    no_shape,
    shape_settings,
    shapes,
)
from turbofit.tuner.search.sizing import (
    SearchState,
    Sizer,
    is_bounded,
    longest_context,
    most_context,
)
from turbofit.tuner.surety import with_surety
from turbofit.tuner.throughput import host_rate, total

_LOG: Final = LazyLogger(__name__)

#: Returns the problem of a launch, or a false value.
_Ask = Callable[[EngineLaunch], Any]


#: The most requests that a shape may hold.
_Bound = Callable[[Shape], int]
_SERVES: Final = attrgetter("serves")


class EngineFit(Struct):
    """The search's result for one engine: the best shape, its accounts and its host memory.

    ``evaluations`` are all tried shapes; even the best may not fit. ``reasons`` say why this engine
    was preferred to another, and why fewer engines run than the GPUs could hold. ``rival`` is
    LMDeploy's other engine, if it serves less, or if it would serve and this one does not.
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
    def requested_load(self) -> VisionLoad:
        """The load of the workload's images, before a limit was lowered."""
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
        host = host_rate(self.request, load, len(speeds))
        measured = self.request.machine.measured
        forecast = total(speeds, measured, images=load.images_per_request, host=host)
        gpus = [self.request.machine.gpu(i) for group in self.best.shape.groups for i in group]
        images = bool(load.units_per_image)
        return with_surety(forecast, self.request.model, self.engine.name, gpus, images=images)


def search(request: ResolvedRequest, engine: Engine, *, brief: bool = False) -> EngineFit:
    """The best shape for a request; ``brief`` may leave out worse shapes.

    Raises:
        UsageError: an option of the user cannot be used on this machine or with this model.
    """
    best, evaluations = _Search(request, engine, brief=brief).best()
    _LOG.info(
        "%s on %s: %d shapes looked at, %d fit; the best: tp %d x %d, prefill %d, limit %s, %s",
        engine.name, request.machine.name, len(evaluations),
        sum(evaluation.fits for evaluation in evaluations),
        best.shape.tp, best.shape.replicas, best.shape.max_prefill_token_num,
        best.shape.image_limit,
        f"{best.kv_tokens} KV tokens" if best.fits else f"{best.short} bytes short",
    )  # fmt: skip
    groups = best.shape.groups
    settings = [best.of_group(group).settings for group in groups]
    accounts = accounts_of(request, settings, groups, best.vision_load, engine)
    host = host_of(request, accounts, engine)
    return EngineFit(
        request=request,
        engine=engine,
        best=best,
        evaluations=tuple(evaluations),
        accounts=accounts,
        host=host,
    )


def may_fit(request: ResolvedRequest, engine: Engine) -> bool:
    """Whether a search on equal cards with equal links may find a fit; if not, it never does.

    The request must not give a degree or replicas. Raises errors as :func:`search` does.
    """
    if not is_bounded(request):
        return True
    alone = _Search(replace(request, replicas=1), engine)
    # Of each degree the last shape, with the smallest prefill, has the largest cache.
    space = {shape.tp: shape for shape in alone.shapes()}
    held = {tp: alone.most_of_one(shape) for tp, shape in space.items()}
    if not any(held.values()):  # the search would then lower the image limit
        held = {tp: alone.most_of_one(shape, small=True) for tp, shape in space.items()}
    cards, wanted = len(request.visible), request.promised_requests or 1
    return any(count * (cards // tp) >= wanted for tp, count in held.items())


def fit_on_host(request: ResolvedRequest, engine: Engine, *, brief: bool = False) -> EngineFit:
    """The result for the engine, with fewer replicas if host memory is not enough for all.

    If no number of replicas fits, the one that holds the most requests at once. ``brief`` and
    errors are those of :func:`search`.
    """
    fit = search(request, engine, brief=brief)
    if fit.host_problem is None or request.replicas is not None or request.groups is not None:
        return fit
    planned, most = fit.best.shape.replicas, fit
    for replicas in range(planned - 1, 0, -1):
        try:
            fewer = search(replace(request, replicas=replicas), engine, brief=brief)
        except TurbofitError:
            continue
        if fewer.host_problem is not None or not fewer.best.serves:
            continue
        reason = f"replicas {replicas}: host memory does not do for {planned}"
        fewer = replace(fewer, reasons=(reason,))
        if fewer.fits:
            return fewer
        if most is fit or fewer.best.held_requests > most.best.held_requests:
            most = fewer
    return most


def at_limit(
    request: ResolvedRequest, shape: Shape, image_limit: int, engine: Engine
) -> Evaluation:
    """The best evaluation on a shape's groups if another image limit is wished and served."""
    limited = replace(request, image_limit=image_limit, groups=shape.groups)
    return _Search(limited, engine).best()[0]


def limit_that_fits(request: ResolvedRequest, shape: Shape, engine: Engine) -> int | None:
    """The largest lower image limit with which a shape keeps all else; None if there is none."""
    rule = request.model.image_rule
    if rule is None or shape.image_limit is None:
        return None
    whole = replace(shape, at_once=None, units_per_forward=None)
    lowered = _Search(request, engine).lowered(whole, rule, attrgetter("fits"))
    return lowered.shape.image_limit if lowered.fits else None


class _Search(SearchState):
    def __init__(self, request: ResolvedRequest, engine: Engine, *, brief: bool = False) -> None:
        super().__init__(request, engine)
        # On the PyTorch engine, one request's memory is no bound for several.
        self._brief = brief and engine.grows_with_requests and is_bounded(request)

    def best(self) -> tuple[Evaluation, list[Evaluation]]:
        """The best shape, and all tried shapes; if none serves, the best one as wished."""
        whole, others = self._evaluated()
        every = [*whole, *others]
        serving = [evaluation for evaluation in every if evaluation.serves]
        best = max(serving or whole, key=_order)
        chosen = self.widened(best) if best.serves and best.queues else best
        every = [self._as_taken(chosen if one is best else one) for one in every]
        return self._as_taken(chosen), every

    def _as_taken(self, evaluation: Evaluation) -> Evaluation:
        """Replace the forecast by that for served images; shapes are compared by wished images."""
        limit = evaluation.shape.image_limit
        if not evaluation.fits or limit == self.request.requested_image_limit:
            return evaluation

        def limited() -> SearchState:
            return SearchState(replace(self.request, image_limit=limit), self.engine)

        state = self.once(limited, "limited", limit)
        return self.once(lambda: with_speeds(state, evaluation), "taken", evaluation)

    def _evaluated(self) -> tuple[list[Evaluation], list[Evaluation]]:
        """The shapes as wished, and other attempts; a brief search skips those that must lose."""
        tried = self._whole(self.shapes())
        whole = [evaluation for _, evaluation in tried]
        if self._brief:
            tried = [pair for pair in tried if pair[1].serves or self._may_serve(pair[0])]
        others = [queued for pair in tried for queued in self.queued(*pair)]
        if not self._limit_given and not any(one.serves for one in (*whole, *others)):
            others += self._all_lowered([shape for shape, _ in tried])
        return whole, others

    def _whole(self, space: Sequence[Shape]) -> list[tuple[Shape, Evaluation]]:
        """Evaluate each shape as wished; a brief search skips those that hold fewer requests."""
        wanted = self.request.promised_requests
        if not self._brief or wanted is None:
            return [(shape, self.evaluate(shape)) for shape in space]
        return self._bounded(space, self._most_requests, self.evaluate)

    def _all_lowered(self, space: Sequence[Shape]) -> list[Evaluation]:
        """Each shape under its largest limit, but in a brief search those that hold fewer requests.

        Nothing without images.
        """
        rule = self.request.model.image_rule
        if rule is None or any(shape.image_limit is None for shape in space):
            return []
        if not self._brief or self.request.promised_requests is None:
            return [self.lowered(shape, rule, _SERVES) for shape in space]

        def most(shape: Shape) -> int:
            limit = self._limit_alone(shape, rule)
            return self._most_requests(replace(shape, image_limit=limit))

        lowered = self._bounded(space, most, lambda shape: self.lowered(shape, rule, _SERVES))
        return [evaluation for _, evaluation in lowered]

    def _bounded(
        self, space: Sequence[Shape], bound: _Bound, look: Callable[[Shape], Evaluation]
    ) -> list[tuple[Shape, Evaluation]]:
        """Look at the shapes that hold as many requests as any, from the one that may hold most."""
        bounds, wanted = {shape: bound(shape) for shape in space}, self.request.promised_requests
        tried, most = list[tuple[Shape, Evaluation]](), 0
        for shape in sorted(space, key=bounds.__getitem__, reverse=True):
            if bounds[shape] < most:
                break
            tried.append((shape, look(shape)))
            most = max(most, min(wanted or 0, tried[-1][1].held_requests))
        return tried

    def _most_requests(self, shape: Shape) -> int:
        """An upper bound of the requests at once that all groups hold with the wished limit."""
        return sum(map(self.most_of_one, _parts(shape)))

    def _may_serve(self, shape: Shape) -> bool:
        """Whether every group can serve with some image limit."""
        return all(self.most_of_one(part, small=True) for part in _parts(shape))

    def most_of_one(self, part: Shape, *, small: bool = False) -> int:
        """The most requests that one group of GPUs holds; 0 if the group cannot serve even one.

        ``small``: with the least image limit that a search may use.
        """
        rule, limit, units = self.request.model.image_rule, part.image_limit, None
        if small and rule is not None and limit is not None and not self._limit_given:
            limit = rule.least_limit
        if self.request.workload.queue_images is not False:
            units = vision_load_of(self.request, limit).units_per_request or None
        one = replace(part, image_limit=limit, units_per_forward=units, at_once=1.0)

        def most() -> int:
            sizer = Sizer(self, one)
            shortest, _ = sizer.contexts()
            return sizer.most_requests(shortest) if sizer.evaluation(shortest).fits else 0

        kind = self.key_of(self.gpus_of(one.groups)[0])
        return self.once(most, "most", replace(one, groups=()), kind)

    @property
    def _limit_given(self) -> bool:
        request = self.request
        return request.image_limit is not None or request.workload.image_size is not None

    def shapes(self) -> list[Shape]:
        """The shapes that LMDeploy accepts with the user's options, at least one.

        Raises:
            TurbofitError: there are none; the error says why.
        """
        running = list(shapes(self.request, self.engine))
        if not running:
            raise self._no_shape()
        stages: tuple[tuple[_Ask, Callable[[Any], TurbofitError]], ...] = (
            (self.engine.problem, self._refused),
            (self._death, lambda death: UsageError(death.cause, hint=death.instead)),
            (self.engine.missing_kernels, self._no_kernels),
        )
        for ask, error in stages:
            problems = [self._problem(shape, ask) for shape in running]
            if all(problems):
                raise error(problems[0])
            running = [s for s, problem in zip(running, problems, strict=True) if problem is None]
        return running

    def _no_shape(self) -> UsageError:
        request, hint = self.request, f"take {self._other_weights()}"
        if request.tp or request.replicas:
            need = (request.tp or 1) * (request.replicas or 1)
            hint = "let turbofit choose --tp and --replicas"
            tp_works = self.engine.tp_problem(request.model, request.tp or 1) is None
            if tp_works and need > len(request.visible):
                hint += f", or name a machine of {need} GPUs, as --on {need}xrtx3090"
        return UsageError(no_shape(request, self.engine), hint=hint)

    def _refused(self, problem: str) -> UsageError:
        given = "model_format" in self.request.engine_options
        packed = four_bit_variant(self.request.model) if given else None
        instead = "change it" if packed is None else f"name {packed.hub_id}, its 4 bits"
        return UsageError(problem, hint=f"leave the option out, or {instead}")

    def _no_kernels(self, kernels: str) -> NoKernelError:
        model, engine_options = self.request.model, self.request.engine_options
        others = [name for name in LMDEPLOY if name != self.engine.name]
        instead = ["cards of another generation"]
        if option_owner(engine_options) is None and not all(
            engine_problem(model, n) for n in others
        ):
            instead.insert(0, "another engine")
        if "quant_policy" in engine_options:
            instead.append("another --quant-policy")
        return NoKernelError(
            f"{model.name} does not run on {self.engine.name} here: {kernels}",
            hint=f"take {', '.join(instead)} or {self._other_weights()}",
        )

    def _other_weights(self) -> str:
        variant = unpacked_variant(self.request.model)
        return "other weights" if variant is None else f"{variant.hub_id}, its 16 bits"

    def evaluate(self, shape: Shape) -> Evaluation:
        vision_load = vision_load_of(self.request, shape.image_limit)
        if self.request.workload.queue_images and vision_load.units_per_image:
            shape = replace(shape, units_per_forward=vision_load.units_per_request)
        evaluation = evaluate(self, shape)
        _LOG.debug(
            "groups %s, prefill %d, limit %s, units %s: fits %s, %d tokens, score %.3g, %d short",
            shape.groups, shape.max_prefill_token_num, shape.image_limit, shape.units_per_forward,
            evaluation.fits, evaluation.kv_tokens, evaluation.score, evaluation.short,
        )  # fmt: skip
        return evaluation

    def queued(self, shape: Shape, whole: Evaluation) -> Iterator[Evaluation]:
        """Yield the wished limit with one request's units in the peak, unlike ``whole``."""
        # With `queue_images` every shape already has one request's units.
        free = self.request.workload.queue_images is None
        units = self.requested_load.units_per_request
        if not units or not free or not self._wants_cache(whole):
            return
        queued = self.evaluate(replace(shape, units_per_forward=units))
        if not (queued.fits and whole.fits and queued.worth <= whole.worth):
            yield queued

    def widened(self, queued: Evaluation) -> Evaluation:
        """The same shape with the most units per forward that cost no promise and no speed."""
        rule, low = self.request.model.image_rule, queued.shape
        least = low.units_per_forward
        assert rule is not None
        assert least is not None
        vision_load = vision_load_of(self.request, low.image_limit)
        bounds = [self.engine.units_bound(rule, vision_load, part.settings) for part in queued.sets]
        at_once = None if self.request.workload.concurrency is None else low.at_once

        def at(units: int) -> Evaluation:
            return self.evaluate(replace(low, at_once=at_once, units_per_forward=units))

        return _largest(queued, least, max(least, *bounds), rule.unit_step, at, attrgetter("fits"))

    def _wants_cache(self, whole: Evaluation) -> bool:
        """Whether more cache would improve a promise, or the least memory is wished."""
        if not whole.fits or self.request.workload.goal == "context" or self.request.least:
            return True
        if whole.settings.session_len < longest_context(self.request):
            return True
        return any(part.wants_cache for part in whole.sets)

    def lowered(
        self, shape: Shape, rule: ImageRule, good: Callable[[Evaluation], bool]
    ) -> Evaluation:
        """The shape with the largest lower limit that is good, or the least.

        If it also fits with the engine's bound of units, it has this bound.
        """
        limits = _limits(shape, rule)

        def at(image_limit: int) -> Evaluation:
            return self.evaluate(self._limited(shape, image_limit))

        bounded = self.engine.grows_with_requests and good is _SERVES
        found = at(self._limit_alone(shape, rule)) if bounded else None
        if found is None or not good(found):
            found = at(limits[0])
            if not good(found):
                return found
            found = _largest(found, limits[0], limits[-1], limits.step, at, good)
        whole = self.evaluate(replace(shape, image_limit=found.shape.image_limit))
        return max(found, whole, key=_order)

    def _limited(self, shape: Shape, image_limit: int) -> Shape:
        """The shape under another limit; images queue for each other unless that is refused."""
        lower = replace(shape, image_limit=image_limit)
        if self.request.workload.queue_images is False:
            return lower
        units = vision_load_of(self.request, image_limit).units_per_request
        return replace(lower, units_per_forward=units)

    def _limit_alone(self, shape: Shape, rule: ImageRule) -> int:
        """The largest limit under which every group serves one request, and so the shape some.

        Groups are in many shapes, and each kind is looked at once.
        """
        limits = _limits(shape, rule)

        def largest(part: Shape) -> int:
            def serves(place: int) -> bool:
                return serves_alone(self, self._limited(part, limits[place]))

            return limits[bisect(serves, 0, len(limits))[0] if serves(0) else 0]

        def of_kind(part: Shape) -> int:
            kind = self.key_of(self.gpus_of(part.groups)[0])
            return self.once(lambda: largest(part), "alone", replace(part, groups=()), kind)

        return min(map(of_kind, _parts(shape)))

    def _death(self, launch: EngineLaunch) -> KnownProblem | None:
        known = known_problems(launch, self.engine.name, self.engine.version)
        return next((problem for problem in known if problem.fatal), None)

    def _problem(self, shape: Shape, ask: _Ask) -> Any:
        """The problem of a shape's first engine that has one; None if all can run.

        Each is asked with its longest possible context, and with one request if no batch is given,
        since the search never chooses a batch that ends it.
        """
        request = self.request
        # With images, the longest context is used: a context too short for them is the better
        # message.
        images = self.requested_load.units_per_image
        longest = request.model.text.max_position_embeddings if images else most_context(request)

        def problem(gpus: tuple[Gpu, ...]) -> Any:
            alone = replace(shape, tp=len(gpus), at_once=1.0)
            settings = shape_settings(request, alone, longest)

            def answer() -> Any:
                return ask(launch_of(request, settings, gpus, self.requested_load))

            return self.once(answer, ask, settings, self.key_of(gpus))

        return next(filter(None, map(problem, self.firsts(shape.groups))), None)


def _limits(shape: Shape, rule: ImageRule) -> range:
    """Limits below a shape's own, the smallest first: at least that one."""
    step, least = rule.limit_step, rule.least_limit
    return range(least, max(least, (shape.image_limit or 0) - step) + 1, step)


def _parts(shape: Shape) -> Iterator[Shape]:
    """Yield each group alone, with the prefill that leaves the largest cache."""
    prefill = min(shape.prefills, default=shape.max_prefill_token_num)
    for group in shape.groups:
        alone = replace(shape, tp=len(group), groups=(group,), prefills=())
        yield replace(alone, max_prefill_token_num=prefill)


def _largest(
    best: Evaluation,
    low: int,
    high: int,
    step: int,
    at: Callable[[int], Evaluation],
    good: Callable[[Evaluation], bool],
) -> Evaluation:
    """Bisect for the largest value whose worth is at least that of ``low``, which is good."""
    tried = {0: best}

    def worth_as_much(steps: int) -> bool:
        tried[steps] = at(low + steps * step)
        return good(tried[steps]) and tried[steps].worth >= best.worth

    return tried[bisect(worth_as_much, 0, (high - low) // step + 1)[0]]


def _order(evaluation: Evaluation) -> tuple[object, ...]:
    """The sort key: fitting shapes by rank; others by requests held, then by missing bytes."""
    indices = tuple(-index for group in evaluation.shape.groups for index in group)
    if evaluation.fits:
        return (1, *evaluation.rank, indices)
    return (
        0,
        evaluation.held_requests,
        evaluation.served if evaluation.held_requests else 0.0,
        -evaluation.short,
        -evaluation.shape.tp,
        evaluation.shape.max_prefill_token_num,
        indices,
    )

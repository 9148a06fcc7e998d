"""Makes the gateway of a plan: what the plan promises becomes limits of requests and engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.images.rule import LARGEST_PIXELS
from turbofit.core.model import DTYPE_BYTES
from turbofit.core.plan import EnginePlan, Plan, may_evict
from turbofit.core.struct import NA
from turbofit.core.units import GIB
from turbofit.gateway.http.about import about_plan, memory_bars
from turbofit.gateway.limits.gate import UNSTATED, KvCache
from turbofit.gateway.limits.request_limits import UNKNOWN_HOST, Bounds, EngineBounds
from turbofit.gateway.media.pictures import BYTES_OF_PIXEL
from turbofit.machine.host import usable_cores
from turbofit.memory.account import vision_load_within
from turbofit.memory.engines import engine_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.core.images import ImageRule
    from turbofit.gateway.config import GatewayConfig
    from turbofit.gateway.grammar_trials import GrammarTrials
    from turbofit.gateway.http.about import ClockFacts
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.http.asgi_app import Log
    from turbofit.gateway.routing.deny_list import DenyList

#: Bytes of host memory for one value of an image during preprocessing: 4 bytes, and 2 bytes more
#: for the value in the result.
_WIDE: Final = DTYPE_BYTES["float32"] + DTYPE_BYTES["bfloat16"]
#: The least limit of host memory for images, in bytes.
_LEAST_HOST: Final = 2 * GIB


def make_gateway(  # noqa: PLR0913 - what a gateway is made of
    plan: Plan,
    upstreams: Sequence[str],
    config: GatewayConfig,
    *,
    overlay: bool = True,
    log: Log | None = None,
    deny_list: DenyList | None = None,
    grammars: GrammarTrials | None = None,
    in_use: Callable[[], dict[int, int]] = dict,
    clock: Callable[[], ClockFacts | None] = lambda: None,
) -> Gateway:
    """Make the gateway of a plan, which is an ASGI app.

    ``upstreams`` are the engines' URLs in the order of the plan's groups. ``overlay``: the engines
    run on the folder that `overlay` makes. ``deny_list`` is the deny list of the previous gateway;
    if None, the gateway has a new list. `Gateway` explains the other arguments.

    Raises:
        UsageError: there is no engine, or a text is no URL.
    """
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.upstream import refuse_no_url

    refuse_no_url(upstreams or [""], "an engine", "http://127.0.0.1:23334")
    cores = usable_cores()
    config = config.changed(
        about=about_plan(plan), memory=memory_bars(plan), cores=1 if cores == NA else int(cores)
    )
    return Gateway(
        bounds_of(plan, overlay=overlay), upstreams, config, log,
        deny_list=deny_list, grammars=grammars, in_use=in_use, clock=clock,
    )  # fmt: skip


def bounds_of(plan: Plan, *, overlay: bool = True) -> Bounds:
    """Return a plan's bounds for requests.

    ``overlay``: the engines run on the folder that `overlay` makes.
    """
    rule = plan.model.image_rule if plan.promise.limits.vision_unit is not None else None
    bytes_per_unit = 0 if rule is None else plan.model.unit_values * _WIDE
    engines = tuple(_engine_bounds(plan, engine, rule) for engine in plan.engines)
    has_gate = any(engine.units is not None for engine in engines)
    return Bounds(
        rule=rule,
        promise=plan.promise,
        overlay=overlay,
        answer_tokens=plan.workload.unstated_answer if has_gate and plan.may_evict() else 0,
        bytes_per_unit=bytes_per_unit,
        watches=plan.takes_videos,
        engine=plan.backend.name,
        vocabulary=plan.model.text.vocab,
        serial=plan.backend.serial,
        host_bytes=images_in_flight(plan, bytes_per_unit),
        prefix_caching=plan.prefix_caching,
        engines=engines,
    )


def _engine_bounds(plan: Plan, engine: EnginePlan, rule: ImageRule | None) -> EngineBounds:
    """Return the limits of one engine.

    Only an engine that could take more units than the plan counts needs a gate. Without a gate no
    tokens are counted.
    """
    account = engine_of(plan)
    bounds = EngineBounds(share=engine.requests)
    if rule is None:
        return bounds
    vision_load = vision_load_within(plan.promise.limits)
    if engine.units_per_forward >= account.units_bound(rule, vision_load, engine.settings):
        return bounds
    # A cache with space for a full batch of the longest requests cannot become full. Requests
    # beyond the batch wait in the engine and use no cache.
    evicts = may_evict(engine.settings, engine.kv.tokens)
    kv = KvCache(
        tokens=engine.kv.tokens if evicts else UNSTATED,
        longest=engine.kv.longest_request_tokens,
        block=engine.settings.cache_block_seq_len,
        ahead=account.blocks_ahead,
    )
    return replace(bounds, units=engine.units_per_forward, kv=kv)


def images_in_flight(plan: Plan, bytes_per_unit: int) -> int:
    """Return the most bytes of host memory for the images of all requests at one engine.

    A quarter of the memory that the plan leaves free is divided among the engines. The result is at
    least 2 GiB (4 GiB if the free memory is unknown), and at least what one request's images take.
    """
    limits, available = plan.promise.limits, plan.host.available
    decoded = LARGEST_PIXELS * BYTES_OF_PIXEL * max(1, limits.images_per_request)
    least = decoded + limits.units_per_request * bytes_per_unit
    if available is None:
        return max(least, UNKNOWN_HOST)
    free = available - plan.host.pinned - plan.host.pageable
    return max(least, _LEAST_HOST, free // 4 // max(1, plan.replicas))

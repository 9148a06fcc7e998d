"""The best plan, with its reasons in words."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from turbofit.core.model import TileRule
from turbofit.core.plan import Candidate, Plan
from turbofit.core.units import format_bytes
from turbofit.memory.account import RATIO_STEPS, Account
from turbofit.memory.calibrated import words
from turbofit.memory.engine import Engine
from turbofit.tuner.ask import Ask, exposure_of
from turbofit.tuner.candidates import Judged, explain
from turbofit.tuner.constraints import dtype_for
from turbofit.tuner.document import (
    Parts,
    accounts_of,
    document,
    group_words,
    host_of,
    host_problem,
)
from turbofit.tuner.lost import lost
from turbofit.tuner.remedies import remedies
from turbofit.tuner.search import Found, search
from turbofit.tuner.throughput import request_tokens, total

__all__ = ["make_plan"]

#: Rows of ``considered``; the chosen one is the first.
_MOST_CANDIDATES = 24


def make_plan(ask: Ask, engine: Engine) -> Plan:
    """Search, and say what was found.

    Raises:
        UsageError: something asked for cannot be used here at all.
    """
    found = search(ask, engine)
    best = found.best
    exposure = replace(best.exposure, units_per_forward=best.shape.units_per_forward)
    accounts = accounts_of(ask, best.settings, best.shape.groups, exposure, engine)
    units = max(account.units_per_forward for account in accounts)
    host = host_problem(host_of(ask, best.settings, best.shape.replicas, units, engine))
    fits = best.fits and host is None
    parts = Parts(
        groups=best.shape.groups,
        settings=best.settings,
        exposure=exposure,
        limit=best.shape.limit,
        fits=fits,
        verdict=_verdict(ask, found, accounts[0], host, engine),
        parallel_reason=_parallel_reason(ask, found),
        throughput=total(best.speeds, ask.machine.measured) if best.speeds else None,
        considered=_considered(ask, found, engine),
        reasons=tuple(_reasons(ask, found, accounts[0], engine)),
        warnings=tuple(_warnings(ask, found, engine)),
        remedies=() if best.fits else remedies(ask, found, engine),
    )
    return document(ask, parts, accounts, engine)


def _verdict(ask: Ask, found: Found, account: Account, host: str | None, engine: Engine) -> str:
    best, name = found.best, ask.model.name
    if not best.fits:
        return f"does not fit: {name}: {_why_not(ask, best, engine)}"
    if host is not None:
        return f"does not fit: {name}: {host}"
    ledgers = account.at(best.settings.cache_max_entry_count).ledgers
    spare = min(ledger.headroom for ledger in ledgers)
    together = best.kv_tokens * best.shape.replicas // request_tokens(best.exposure)
    requests = "request" if together == 1 else "requests"
    where = " and ".join(group_words(ask, group) for group in best.shape.groups)
    return (
        f"fits: {name} on {where}: {best.kv_tokens * best.shape.replicas:,} KV tokens, enough for"
        f" {together} such {requests} at once; {format_bytes(spare)} stay free on each GPU"
    )


def _considered(ask: Ask, found: Found, engine: Engine) -> tuple[Candidate, ...]:
    """The chosen shape, then the best of the others with the reason why each lost."""
    chosen = found.best
    rest = [one for one in found.judged if one is not chosen]
    rest.sort(key=lambda one: (one.fits, one.rank if one.fits else (-one.short,)), reverse=True)
    rows = [chosen.candidate(_why_not(ask, chosen, engine))]
    for one in rest[: _MOST_CANDIDATES - 1]:
        why_not = lost(ask, chosen, one) if one.fits else _why_not(ask, one, engine)
        rows.append(one.candidate(why_not))
    return tuple(rows)


def _why_not(ask: Ask, judged: Judged, engine: Engine) -> str:
    return explain(ask, judged, judged.settings.dtype, engine)


def _parallel_reason(ask: Ask, found: Found) -> str:
    best, shape = found.best, found.best.shape
    if ask.tp is not None and ask.replicas is not None:
        return "as asked"
    if not best.fits:
        return "the closest to fitting"
    words = {
        "throughput": "the most requests per second by the stated model",
        "latency": "the shortest answer by the stated model",
        "context": "the most KV tokens for one request",
    }[ask.workload.goal]
    one = f"tp {shape.tp}" if shape.tp > 1 else "one GPU each"
    return f"{shape.replicas} x {one}: {words} of {len(found.judged)} shapes"


def _reasons(ask: Ask, found: Found, account: Account, engine: Engine) -> Iterator[str]:
    best, settings = found.best, found.best.settings
    fixed = ask.fixed
    if best.fits:
        ratio = settings.cache_max_entry_count
        more = ratio + 1 / RATIO_STEPS
        largest = f"the largest that leaves the margin; {more:.3f} does not"
        if ask.ratio_cap is not None and ratio >= ask.ratio_cap:
            largest = "lowered by what a rehearsal saw"
        why = "as set by you" if "cache_max_entry_count" in fixed else largest
        yield f"cache_max_entry_count {ratio:.3f}: {why}"
    if account.calibration is not None:
        yield words(account.calibration)
    yield _because(
        fixed,
        "max_prefill_token_num",
        settings.max_prefill_token_num,
        f"best rank of the sizes tried; {engine.prefill_words(settings)}",
    )
    yield _because(
        fixed,
        "max_batch_size",
        settings.max_batch_size,
        f"{ask.workload.concurrency} concurrent requests over {best.shape.replicas} replicas",
    )
    longest = ask.model.text.max_position_embeddings
    if ask.workload.context is not None:
        why = "the context asked for"
    elif best.shape.longest is not None and settings.session_len == best.shape.longest:
        why = f"less than the cache would hold: with {longest} more images meet in a forward, and"
        why += " the memory for them holds fewer requests at once; --context asks for more"
    elif settings.session_len >= longest:
        why = "the model's own context, which the cache holds"
    else:
        why = f"the model's {longest} lowered to what the cache holds"
    yield _because(fixed, "session_len", settings.session_len, why)
    gpus = [ask.machine.gpu(index) for index in best.shape.groups[0]]
    yield _because(fixed, "dtype", settings.dtype, dtype_for(ask.model, gpus)[1])
    if best.shape.limit is not None and best.exposure.units_per_image:
        yield _limit_reason(ask, best)
        yield (
            f"the peak pays for {account.units_per_forward:,} vision units in one forward: "
            + (
                "the engine's own bound, so nothing queues"
                if best.shape.units_per_forward is None
                else "less than the engine could bring together, so the gateway must queue"
            )
        )


def _because(fixed: dict[str, object], name: str, value: object, why: str) -> str:
    return f"{name} {value}: {'as set by you' if name in fixed else why}"


def _limit_reason(ask: Ask, best: Judged) -> str:
    name = "max_dynamic_patch" if isinstance(ask.model.image_rule, TileRule) else "max_pixels"
    limit = best.shape.limit
    if ask.max_dynamic_patch is not None or ask.max_pixels is not None:
        return f"{name} {limit}: as set by you"
    if limit == ask.own_limit:
        return f"{name} {limit}: the model's own"
    return f"{name} {limit}: the largest that can be served; the model's own is {ask.own_limit}"


def _warnings(ask: Ask, found: Found, engine: Engine) -> Iterator[str]:
    shape = found.best.shape
    used = {index for group in shape.groups for index in group}
    idle = [gpu for gpu in ask.visible if gpu.index not in used]
    if idle and found.best.fits:
        names = ", ".join(f"GPU {gpu.index} ({gpu.name})" for gpu in idle)
        yield f"not used: {names}"
    if found.best.fits and len({ask.machine.gpu(index).name for index in used}) > 1:
        yield "unequal cards run the same settings: the ratio is what the tightest of them allows"
    if found.best.fits and shape.units_per_forward is not None:
        yield (
            "this plan holds only where image requests are queued, as turbofit serve and"
            " turbofit.pipeline do"
        )
    asked = exposure_of(ask, ask.own_limit)
    if asked.units_per_image and found.best.fits:
        yield (
            "requests beyond these limits are not planned for: turbofit serve and"
            " turbofit.pipeline hold them, LMDeploy itself lets any client exceed them"
        )
    if found.best.fits:
        yield from engine.warnings(found.best.settings)
    if ask.model.needs_remote_code:
        yield "LMDeploy runs the checkpoint's own code for it: --trust-remote-code is set"

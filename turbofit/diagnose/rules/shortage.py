"""Bytes that were missing when TurboMind died after its cache was sized.

The log says what was free, how much the cache took, which warm-up length or which images were under
way, and the run's settings; turbofit's account says what the engine's buffers and each such forward
take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.machine import Gpu, Machine
from turbofit.core.plan import Settings
from turbofit.core.struct import NA, Struct, known
from turbofit.core.units import MIB, format_bytes
from turbofit.memory.account import (
    NO_IMAGES,
    POOL_WARMUP,
    TEMPORARIES,
    Account,
    EngineLaunch,
    Forward,
    default_batch_size,
)
from turbofit.observe.log_events import (
    CacheBudget,
    Computed,
    Slab,
    VisionSetup,
    WarmupFinished,
    WarmupLengths,
)
from turbofit.tuner.search.shapes import dtype_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from turbofit.core.model import Model
    from turbofit.diagnose.facts import LogFacts
    from turbofit.memory.account import Engine

#: The log rounds to hundredths of a MiB.
_ROUNDING: Final = MIB // 100
#: The largest L2 of a GPU that turbofit knows (RTX PRO 6000), where the card is not known.
_UNKNOWN_L2: Final = 128 * MIB
#: Terms of the account that are taken at last.
_WORKSPACES: Final = ("gemm_workspace", "delta_workspace", "l2_flush")
_DEFAULT_PREFILL: Final = 8192
#: `quant_policy` of TurboMind: 16-bit, int8, int4.
_POLICIES: Final = (0, 8, 4)
_UNKNOWN_CARD: Final = Gpu(index=0, uuid="", name="", total=NA, reserved=NA, used=NA, free=NA)


class Shortage(Struct):
    """``step`` needed ``needed`` bytes where ``room`` were left; no step: none lacks any.

    ``left`` is what the cache left, before buffers. ``doubt`` is what a real driver may take
    besides (kernels of the engine, holes in its pools). ``assumed``: settings for want of a line;
    ``surprise``: what of the log the account does not explain.
    """

    left: int
    doubt: int
    settings: Settings
    assumed: tuple[str, ...]
    step: str = ""
    needed: int = 0
    room: int = 0
    surprise: str = ""

    @property
    def lacked(self) -> int:
        return self.needed - self.room


def shortage_of(facts: LogFacts, model: Model, gpu: Gpu | None, engine: Engine) -> Shortage | None:
    """What was missing, or None where the log has no line about its cache."""
    budget, slab = facts.first_event(CacheBudget), facts.first_event(Slab)
    if budget is None:
        return None
    settings, assumed = _settings(facts, model, gpu, engine)
    of_slab = _with_kv_type(settings, facts, model, slab, engine) if slab else settings
    settings, card = of_slab or settings, gpu or _UNKNOWN_CARD
    account = _account(engine, model, settings, replace(card, l2=known(card.l2, 0)))
    late = _late(account)
    shortage = Shortage(
        left=budget.free - _region(budget),
        doubt=late.estimates + (_UNKNOWN_L2 if card.l2 == NA else 0),
        settings=settings,
        assumed=tuple(assumed),
    )
    if slab and of_slab is None:
        surprise = (
            f"a KV block of {slab.object_size} bytes is not what {model.name} has at tp"
            f" {settings.tp}: the model or tp was another"
        )
        return replace(shortage, surprise=surprise)
    return _with_step(shortage, facts, account, late)


class _Late(NamedTuple):
    """Bytes of what comes after the cache: the engine's buffers, and those before its workspaces.

    ``freed`` is what loading held: it is given back between these. ``estimates``, and what comes
    with the worst requests only, are on top.
    """

    buffers: int
    early: int
    freed: int
    estimates: int


def _late(account: Account) -> _Late:
    lines = account.at(0.0).ledgers[0].ledger
    terms = [term for term in lines if term.phase == "buffers" and term.term != POOL_WARMUP]
    sure = (term for term in terms if term.basis != "estimate" and term.term not in account.grown)
    sizes = {term.term: term.bytes for term in sure}
    buffers = sum(sizes.values())
    return _Late(
        buffers=buffers,
        early=buffers - sum(sizes.get(name, 0) for name in _WORKSPACES),
        freed=sum(term.bytes for term in lines if term.term == TEMPORARIES),
        estimates=sum(term.bytes for term in terms) - buffers,
    )


def _with_step(shortage: Shortage, facts: LogFacts, account: Account, late: _Late) -> Shortage:
    """The first step that found too little, by the account; or what is odd where none did."""
    left, room = shortage.left, shortage.left + late.freed
    if facts.first(WarmupLengths) is None:
        stages = ((late.early, left), (late.buffers, room))
        needed, free = max(stages, key=lambda stage: stage[0] - stage[1])
        if needed <= free:
            return replace(shortage, surprise="by the account its buffers fitted")
        return replace(shortage, step="the engine's buffers", needed=needed, room=free)
    # The buffers were there: what they lack by the account, a warm-up or a request lacks.
    beyond, room = max(0, late.buffers - room), max(0, room - late.buffers)
    forwards = list(_forwards(facts))
    for name, forward in forwards:
        needed = (account.forward_bytes(forward) or 0) + beyond
        if needed > room:
            return replace(shortage, step=name, needed=needed, room=room)
    surprise = "no line tells what ran when it died"
    if forwards:
        surprise = f"by the account {format_bytes(room)} should have been enough"
    return replace(shortage, surprise=surprise)


def _account(engine: Engine, model: Model, settings: Settings, card: Gpu) -> Account:
    """One rank on this card, as if nothing else were known of its machine."""
    return engine.account(
        EngineLaunch(
            model=model,
            settings=settings,
            gpus=(card,),
            machine=Machine(name="", source="log", gpus=(card,)),
            vision_load=NO_IMAGES,
            margins=(0,),
        )
    )


def _settings(
    facts: LogFacts, model: Model, gpu: Gpu | None, engine: Engine
) -> tuple[Settings, list[str]]:
    """What the run was started with, LMDeploy's defaults else, and what was assumed."""
    options, assumed = facts.subject.options, list[str]()
    values: dict[str, Any] = {
        name: value for name, value in options.items() if name in Settings.__struct_fields__
    }
    if "tp" not in values:
        values["tp"] = max(1, len(facts.every(CacheBudget)))
        assumed.append(f"tp {values['tp']}: as many ranks printed their cache")
    _lengths(facts, values, assumed, gpu, engine)
    session = facts.session_limit
    if session is not None:
        values["session_len"] = session
    elif "session_len" not in values:
        values["session_len"] = model.text.max_position_embeddings
        assumed.append(f"session_len {values['session_len']}: the model's own")
    if gpu is not None and "dtype" not in values:
        values["dtype"] = dtype_for(model, [gpu])[0]
    elif "dtype" not in values:
        half = model.quantization or model.dtype == "float16"
        values["dtype"] = "float16" if half else "bfloat16"
    values.pop("cache_max_entry_count", None)
    return Settings(**values), assumed


def _lengths(
    facts: LogFacts, values: dict[str, Any], assumed: list[str], gpu: Gpu | None, engine: Engine
) -> None:
    """Prefill and batch: the last warm-up length is their sum, unless it is longer than a session.

    A session that is shorter hides the sum: then both are LMDeploy's defaults.
    """
    batch, prefill = values.get("max_batch_size"), values.get("max_prefill_token_num")
    warmup = facts.first_event(WarmupLengths)
    longest = max(warmup.lengths, default=0) if warmup else 0
    if longest in engine.log.tuning_lengths:
        longest = 0
    if batch is None:
        rest = longest - (prefill or _DEFAULT_PREFILL)
        batch = rest if 0 < rest <= 4096 else default_batch_size(gpu.name if gpu else "")
        values["max_batch_size"] = batch
        assumed.append(f"max_batch_size {batch}")
    if prefill is None:
        prefill = longest - batch if longest > batch else _DEFAULT_PREFILL
        values["max_prefill_token_num"] = prefill
        if prefill != _DEFAULT_PREFILL:
            assumed.append(f"max_prefill_token_num {prefill}")


def _with_kv_type(
    settings: Settings, facts: LogFacts, model: Model, slab: Slab, engine: Engine
) -> Settings | None:
    """The settings whose KV block has the size that the log prints; None: none has."""
    given = "quant_policy" in facts.subject.options
    policies = (settings.quant_policy,) if given else _POLICIES
    ways = (replace(settings, quant_policy=policy) for policy in policies)
    size = slab.object_size
    return next((way for way in ways if engine.cache(model, way).block_bytes == size), None)


def _region(budget: CacheBudget) -> int:
    """The cache's bytes: the product where it rounds to what was printed."""
    product = int(budget.free * budget.ratio)
    return product if abs(product - budget.budget) <= _ROUNDING else budget.budget


def _forwards(facts: LogFacts) -> Iterator[tuple[str, Forward]]:
    """What was run: the warm-up's longest request, or the last requests after it."""
    longest = facts.longest_warmup
    if longest and facts.first(WarmupFinished) is None:
        warmup = Forward(tokens=longest, context=longest, first_layer=True)
        yield f"the warm-up with {longest} tokens", warmup
    # The engine prepares a step while the one before it runs: the dying one is one of the last two.
    for forward in _requests(facts)[-2:]:
        what = f"{forward.units} vision units" if forward.units else f"{forward.tokens} tokens"
        yield f"a forward with {what}", forward


def _requests(facts: LogFacts) -> list[Forward]:
    """Forwards after the warm-up: the scheduler's lines of a step, then its images."""
    done = facts.first(WarmupFinished)
    if done is None:
        return []
    steps: list[Forward] = []
    parts: dict[tuple[int, int], Computed] = {}
    previous: tuple[object, ...] = ()
    for mark in facts.marks:
        if mark.line <= done.line:
            continue
        if isinstance(mark.event, Computed):
            parts[mark.event.uid, mark.event.start] = mark.event
        elif isinstance(mark.event, VisionSetup):
            key = (mark.event, tuple(parts))
            if parts or key != previous:
                steps.append(_forward(parts.values(), mark.event.units))
            previous, parts = key, {}
    if parts:
        steps.append(_forward(parts.values(), 0))
    return steps


def _forward(parts: Iterable[Computed], units: int) -> Forward:
    tokens = context = 0
    for part in parts:
        tokens += part.end - part.start
        context += part.end
    return Forward(tokens=tokens, context=context, units=units)

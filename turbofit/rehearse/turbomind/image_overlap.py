"""The worst cases of a plan for TurboMind: the most images that can meet in one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import convert

from turbofit.core.images import ImageRule
from turbofit.core.plan import Limits, Plan
from turbofit.memory.account import vision_load_within
from turbofit.memory.engines import engine_of
from turbofit.rehearse import mixes
from turbofit.rehearse.mixes import Image, Prompt, PromptMaker
from turbofit.rehearse.spec import RehearsalCase, RehearsalRequest, Unit

#: A chunk within a prompt ends at a block's edge (LMDeploy, Scheduler::ClampForwardEnd).
_BLOCK = 64
_NEW = 2  # tokens to generate: one forward of prefill, one of decoding
_TEXT = 32  # prompt tokens beside the images, about those of a chat template
_LEAST = 2  # text tokens of the shortest prompt: one on each side of its image
_CUT = 4  # prompts that meet, in nearly all cases: each fills a block of the cache only in part
_MANY = 64  # the most images that are tried if a request may have several


def worst_cases(plan: Plan) -> tuple[RehearsalCase, ...]:
    """The worst cases, see `mixes.cases_of`; the longest prompt fits the cache and the session."""
    rule, limits = plan.model.image_rule, plan.limits
    images: dict[str, Sequence[RehearsalRequest]] = {}
    whole = limits.units_per_image, limits.images_per_request, limits.units_per_request
    units = mixes.units_of_request(*whole) if limits.vision_unit else []
    if rule is not None and units:
        # With a prefix cache the next case asks again about these images.
        shared = (1, 1) if plan.settings.enable_prefix_caching else (None, None)
        images["vision_request"] = [_request(rule, units, _TEXT, *shared)]
        # Images that the cache cannot hold together need no gate.
        load = vision_load_within(limits)
        bound = engine_of(plan).units_bound(rule, load, plan.settings)
        gate = mixes.let_through(limits, min(bound, rule.units_within(plan.kv.tokens)))
        images["vision_forward"] = queue(plan, rule, limits.units_per_image, gate)
    longest = min(plan.settings.session_len, plan.kv.longest_request_tokens) - _NEW
    return mixes.cases_of(plan, images, max(1, longest), _NEW)


def queue(
    plan: Plan, rule: ImageRule, units: int, gate: int | None = None
) -> list[RehearsalRequest]:
    """Requests whose images meet at their worst, in the order in which a rehearsal queues them.

    An image has at most ``units`` units; all requests together have at most ``gate`` units if a
    gateway limits clients so. With a prefix cache an earlier request has filled it.
    """
    maker = _maker(rule, units, plan.limits)
    cold = _cold(plan, maker, gate)
    mix = [(prompt, False) for prompt in cold]
    if plan.settings.enable_prefix_caching:
        again = _repeated_images(plan, maker, gate)
        if sum(prompt.units for prompt, _ in again) >= most_met(cold, *_room(plan)):
            mix = again
    return [
        _request(
            rule,
            [image.units for image in prompt.images],
            prompt.lead + prompt.rest,
            prompt.lead,
            1 if cached else None,
        )
        for prompt, cached in mix
    ]


def _room(plan: Plan, prompts: int = _CUT) -> tuple[int, int]:
    """Tokens of a forward, and of all prompts in it whose blocks the cache holds together."""
    context = plan.kv.tokens - min(prompts, _CUT) * _BLOCK  # the last block of each is part empty
    return engine_of(plan).forward_tokens(plan.settings), min(plan.settings.session_len, context)


def _cold(plan: Plan, maker: PromptMaker, gate: int | None) -> list[Prompt]:
    """The queue of pictures that are not in the prefix cache."""
    forward, context = _room(plan)
    batch = plan.settings.max_batch_size
    if maker.alone(context) is None:
        return [maker.prompt(maker.units)]  # the engine refuses it
    images = batch if maker.images == 1 else max(batch, min(batch * maker.images, _MANY))
    queues: list[list[Prompt]] = []
    for cut in range(1, _CUT + 1):
        cut_context = _room(plan, cut)[1]
        for prompts in _queues(maker, forward, cut_context, images):
            kept = prompts if gate is None else maker.under(prompts, gate, images)
            # With only ``cut`` partly filled blocks, a queue may have at most ``cut`` prompts.
            together = maker.together(kept)
            queues += [queue for queue in (kept, together) if cut == _CUT or len(queue) <= cut]
    return max(
        (prompts for prompts in queues if prompts and len(prompts) <= batch),
        key=lambda prompts: most_met(prompts, forward, _room(plan, len(prompts))[1]),
    )


def most_met(prompts: Sequence[Prompt], forward: int, context: int) -> int:
    """The most units that one forward encodes; rows that generate are left out.

    Prompts come in this order, all before the first step; a forward has at most ``forward`` tokens,
    and all prompts in it at most ``context``. Source: lmdeploy 0.16.0
    src/turbomind/engine/scheduler.cc::RunRequiredAdmission
    """
    done, most = [0] * len(prompts), 0
    while any(at < prompt.length for at, prompt in zip(done, prompts, strict=True)):
        room, context_left, met, moved = forward, context, 0, False
        for i, prompt in enumerate(prompts):
            left = prompt.length - done[i]
            if not left:
                continue
            if room <= 0 or prompt.length > context_left:
                break
            end = done[i] + min(left, room)
            if end < prompt.length:
                end = end // _BLOCK * _BLOCK
            if end <= done[i]:
                continue
            met += prompt.met(done[i], end)
            room, context_left, moved = room - (end - done[i]), context_left - prompt.length, True
            done[i] = end
        if not moved:
            break  # the engine refuses a prompt that is longer than the context
        most = max(most, met)
    return most


def _queues(maker: PromptMaker, forward: int, context: int, batch: int) -> Iterator[list[Prompt]]:
    """Queues to try: equal images, and images that lie across a forward's edges."""
    largest = maker.alone(context)
    if largest is None:
        return
    for kept in range(1, batch + 1):
        part = maker.alone(context // kept)
        if part:
            yield [part] * kept
    yield _filled(maker, [], forward, context, batch)
    step = max(_BLOCK, forward // _BLOCK * _BLOCK)
    # An image that is one token longer than whole chunks, in a prompt that is cut there.
    first = largest._replace(lead=1 + (-largest.tokens) % step, rest=max(1, forward - step))
    yield _filled(maker, [first], forward, context, batch)


def _filled(
    maker: PromptMaker, first: list[Prompt], forward: int, context: int, batch: int
) -> list[Prompt]:
    """Whole images after the last token of a first image, and one more that is cut at the end."""
    room = forward - _BLOCK - sum(1 + prompt.rest for prompt in first)
    left = context - sum(prompt.length for prompt in first)
    # The last image, of which one token is enough, needs its place in the context, too.
    cut = maker.alone(left)
    last = cut.length if cut else _LEAST
    prompts = [*first, *maker.filled(min(room, left - last), batch - 1 - len(first))]
    cut = maker.alone(context - sum(prompt.length for prompt in prompts))
    return [*prompts, cut] if cut else prompts


def _maker(rule: ImageRule, units: int, limits: Limits) -> PromptMaker:
    def image(most: int, tokens: int) -> Image | None:
        fits = min(most, rule.units_within(tokens))
        whole = max(rule.unit_step, fits // rule.unit_step * rule.unit_step)
        return Image(whole, rule.unit_tokens(whole)) if fits else None

    return PromptMaker(
        image, units, limits.images_per_request, limits.units_per_request, rule.unit_step
    )


def _repeated_images(plan: Plan, maker: PromptMaker, gate: int | None) -> list[tuple[Prompt, bool]]:
    """Different questions about one image that is in the prefix cache: each counts all its units.

    Each prompt comes with whether its image is cached. A request with new images joins if it fits.
    """
    settings, prompt = plan.settings, maker.prompt(maker.units, rest=_LEAST)
    length = prompt.length + _NEW
    most = settings.session_len // length  # they share the picture's blocks
    if gate is not None:
        most = min(most, gate // prompt.units)
    tried = []
    for kept in (settings.max_batch_size, settings.max_batch_size - 1):
        count = max(1, min(most, kept))
        mix = [(prompt, True)] * count
        room = engine_of(plan).forward_tokens(settings) - count * _BLOCK
        context = settings.session_len - count * length - _NEW
        left = maker.request_units if gate is None else gate - count * prompt.units
        new = maker.request(left, context, room)
        if new is not None and count < settings.max_batch_size:
            mix.append((new, False))
        tried.append(mix)
    return max(tried, key=lambda mix: sum(prompt.units for prompt, _ in mix))


def _request(
    rule: ImageRule,
    units: Sequence[int],
    text_tokens: int,
    lead: int | None = None,
    images: int | None = None,
) -> RehearsalRequest:
    grids = convert([rule.grid(count) for count in units], tuple[Unit, ...])
    return RehearsalRequest(text_tokens, grids, max_new_tokens=_NEW, lead=lead, images=images)

"""The worst cases of a plan for TurboMind: the most images that can meet in one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from msgspec import convert

from turbofit.core.images import ImageRule
from turbofit.core.plan import Limits, Plan
from turbofit.memory.account import vision_load_within
from turbofit.memory.engines import engine_of
from turbofit.rehearse import mixes
from turbofit.rehearse.mixes import Image, Prompt, PromptMaker
from turbofit.rehearse.spec import RehearsalCase, RehearsalRequest, Unit

_NEW = 2  # tokens to generate: one forward of prefill, one of decoding
_TEXT = 32  # prompt tokens beside the images, about those of a chat template
_LEAST = 2  # text tokens of the shortest prompt: one on each side of its image
_CUT = 4  # prompts that meet, in nearly all cases: each fills a block of the cache only in part
_MANY = 64  # the most images that are tried if a request may have several


class Room(NamedTuple):
    """Tokens of a forward, of all prompts in it together, and of a block of the cache.

    A chunk that does not end a prompt ends at a block's edge (LMDeploy, Scheduler::ClampForwardEnd)
    and encodes ``again`` an image that was cut.
    """

    forward: int
    context: int
    block: int = 64
    again: bool = True


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
        if sum(prompt.units for prompt, _ in again) >= most_met(cold, _room(plan)):
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


def _room(plan: Plan, prompts: int = _CUT) -> Room:
    """The room of prompts whose blocks the cache has at once."""
    engine, settings = engine_of(plan), plan.settings
    block = engine.cache(plan.model, settings).block_tokens
    context = plan.kv.tokens - min(prompts, _CUT) * block  # of each the last is in part filled
    forward = engine.forward_tokens(settings)
    return Room(forward, min(settings.session_len, context), block, engine.encodes_again)


def _cold(plan: Plan, maker: PromptMaker, gate: int | None) -> list[Prompt]:
    """The queue of pictures that no cache has seen."""
    batch = plan.settings.max_batch_size
    if maker.alone(_room(plan).context) is None:
        return [maker.prompt(maker.units)]  # which the engine refuses
    images = batch if maker.images == 1 else max(batch, min(batch * maker.images, _MANY))
    queues: list[list[Prompt]] = []
    for cut in range(1, _CUT + 1):
        for prompts in _queues(maker, _room(plan, cut), images):
            kept = prompts if gate is None else maker.under(prompts, gate, images)
            # With only ``cut`` partly filled blocks, a queue may have at most ``cut`` prompts.
            together = maker.together(kept)
            queues += [queue for queue in (kept, together) if cut == _CUT or len(queue) <= cut]
    return max(
        (prompts for prompts in queues if prompts and len(prompts) <= batch),
        key=lambda prompts: most_met(prompts, _room(plan, len(prompts))),
    )


def most_met(prompts: Sequence[Prompt], room: Room) -> int:
    """The most vision units that one forward encodes; sequences that generate are not counted.

    Prompts come in this order, all before the first step.
    Source: lmdeploy 0.16.0 src/turbomind/engine/scheduler.cc::RunRequiredAdmission
    """
    done, most = [0] * len(prompts), 0
    while any(at < prompt.length for at, prompt in zip(done, prompts, strict=True)):
        forward_left, context_left, met, moved = room.forward, room.context, 0, False
        for i, prompt in enumerate(prompts):
            left = prompt.length - done[i]
            if not left:
                continue
            if forward_left <= 0 or prompt.length > context_left:
                break
            end = done[i] + min(left, forward_left)
            if end < prompt.length:
                end = end // room.block * room.block
            if end <= done[i]:
                continue
            met += prompt.met(done[i], end, again=room.again)
            forward_left -= end - done[i]
            context_left, moved = context_left - prompt.length, True
            done[i] = end
        if not moved:
            break  # the engine refuses a prompt that is longer than the context
        most = max(most, met)
    return most


def _queues(maker: PromptMaker, room: Room, batch: int) -> Iterator[list[Prompt]]:
    """What is worth trying: equal images, and images that lie across a forward's edges."""
    largest = maker.alone(room.context)
    if largest is None:
        return
    for kept in range(1, batch + 1):
        part = maker.alone(room.context // kept)
        if part:
            yield [part] * kept
    yield _filled(maker, [], room, batch)
    step = max(room.block, room.forward // room.block * room.block)
    # An image that is one token longer than whole chunks, and a prompt that is cut there.
    first = largest._replace(lead=1 + (-largest.tokens) % step, rest=max(1, room.forward - step))
    yield _filled(maker, [first], room, batch)


def _filled(maker: PromptMaker, first: list[Prompt], room: Room, batch: int) -> list[Prompt]:
    """Whole images beside the last token of a first one, and one that is cut at the end."""
    inside = room.forward - room.block - sum(1 + prompt.rest for prompt in first)
    left = room.context - sum(prompt.length for prompt in first)
    # The last, of which one token is enough, must have its place in the context, too.
    cut = maker.alone(left)
    last = cut.length if cut else _LEAST
    prompts = [*first, *maker.filled(min(inside, left - last), batch - 1 - len(first))]
    cut = maker.alone(room.context - sum(prompt.length for prompt in prompts))
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
    settings, prompt, room = plan.settings, maker.prompt(maker.units, rest=_LEAST), _room(plan)
    length = prompt.length + _NEW
    most = settings.session_len // length  # they share the picture's blocks
    if gate is not None:
        most = min(most, gate // prompt.units)
    tried = []
    for kept in (settings.max_batch_size, settings.max_batch_size - 1):
        count = max(1, min(most, kept))
        mix = [(prompt, True)] * count
        inside = room.forward - count * room.block
        context = settings.session_len - count * length - _NEW
        left = maker.request_units if gate is None else gate - count * prompt.units
        new = maker.request(left, context, inside)
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

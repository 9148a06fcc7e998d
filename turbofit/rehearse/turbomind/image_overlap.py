"""Queues of requests whose images meet in one forward of TurboMind, as many as can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from turbofit.core.images import ImageRule
from turbofit.core.json_types import JsonObject
from turbofit.core.plan import Limits, Plan
from turbofit.memory.turbomind.pool import forward_tokens

__all__ = ["Prompt", "let_through", "most_met", "queue"]

#: A chunk that does not end a prompt ends at a block's edge (LMDeploy, Scheduler::ClampForwardEnd).
_BLOCK = 64
_NEW = 2  # tokens to generate: one forward of prefill, one of decoding
_LEAST = 2  # tokens of text of the shortest prompt: one on each side of its image
_CUT = 4  # prompts that meet, nearly always: blocks of the cache that are filled in part
_MANY = 64  # images that are tried at most where a request may have several
_ALIKE = 3  # times the forwards' worth of equal images that are queued


class Prompt(NamedTuple):
    """``lead`` tokens of text, an image of ``units`` and ``tokens``, ``more`` such, ``rest``."""

    lead: int
    units: int
    tokens: int
    rest: int
    more: tuple[tuple[int, int], ...] = ()

    @property
    def images(self) -> tuple[tuple[int, int], ...]:
        """Units and tokens of each of its images."""
        return ((self.units, self.tokens), *self.more)

    @property
    def length(self) -> int:
        """All its tokens."""
        return self.lead + sum(tokens for _, tokens in self.images) + self.rest

    @property
    def all_units(self) -> int:
        """Units of all its images."""
        return sum(units for units, _ in self.images)

    def met(self, start: int, end: int) -> int:
        """Units of the images that have a token between two places."""
        found, at = 0, self.lead
        for units, tokens in self.images:
            if start < at + tokens and end > at:
                found += units
            at += tokens
        return found


def queue(plan: Plan, rule: ImageRule, units: int, gate: int | None = None) -> list[JsonObject]:
    """Requests whose images meet at their worst, in the order in which a rehearsal queues them.

    With a prefix cache: one request that fills it, to be answered first, is the caller's.

    Args:
        plan: its settings, and what its gateway lets a request have.
        rule: how images become units and tokens.
        units: of an image at most.
        gate: units of all requests at most, where the gateway holds clients to so many at once.
    """
    cold = _cold(plan, rule, units, gate)
    if not plan.settings.enable_prefix_caching:
        return [_request(rule, prompt) for prompt in cold]
    forward, context = _room(plan)
    again = _repeated_images(plan, rule, units, gate)
    seen = sum(prompt.all_units for prompt, _ in again)
    if seen < most_met(cold, forward, context):
        return [_request(rule, prompt) for prompt in cold]
    return [_request(rule, prompt) | ({"images": 1} if cached else {}) for prompt, cached in again]


def _room(plan: Plan, prompts: int = _CUT) -> tuple[int, int]:
    """Tokens of a forward, and of all prompts in it: those whose blocks the cache has at once."""
    held = plan.kv.tokens - min(prompts, _CUT) * _BLOCK  # of each the last is in part filled
    return forward_tokens(plan.settings), min(plan.settings.session_len, held)


def _cold(plan: Plan, rule: ImageRule, units: int, gate: int | None) -> list[Prompt]:
    """The queue of pictures that no cache has seen."""
    forward, context = _room(plan)
    limits, batch = plan.limits, plan.settings.max_batch_size
    if not _fits(rule, units, context):
        return [_prompt(rule, units, 1, 1)]  # which the engine refuses
    images = batch
    if limits.images_per_request > 1:
        images = max(batch, min(batch * limits.images_per_request, _MANY))
    found: list[list[Prompt]] = []
    for cut in range(1, _CUT + 1):
        held = _room(plan, cut)[1]
        for prompts in _queues(rule, units, forward, held, images):
            kept = prompts if gate is None else _under(rule, prompts, gate, images)
            # Where fewer blocks are cut, no more prompts may be in the cache at once.
            found += [q for q in (kept, _together(kept, limits)) if cut == _CUT or len(q) <= cut]
    if gate is not None:
        found += [_under(rule, _shares(rule, units, gate, n), gate, images) for n in range(2, 9)]
    return max(
        (prompts for prompts in found if prompts and len(prompts) <= batch),
        key=lambda prompts: most_met(prompts, forward, _room(plan, len(prompts))[1]),
    )


def _shares(rule: ImageRule, units: int, gate: int, count: int) -> list[Prompt]:
    return [_prompt(rule, min(units, gate // count), 1, 1)] * count


def _under(rule: ImageRule, prompts: Sequence[Prompt], gate: int, most: int) -> list[Prompt]:
    """As many of them as a gateway lets through at once, the last smaller, so that none is lost."""
    found: list[Prompt] = []
    left, unit = gate, prompts[0].units
    for prompt in prompts:
        if prompt.units > left:
            break
        found.append(prompt)
        left -= prompt.units
    while left >= rule.unit_step and len(found) < most:
        found.append(_prompt(rule, min(unit, left), 1, 1))
        left -= found[-1].units
    return found


def _together(prompts: Sequence[Prompt], limits: Limits) -> list[Prompt]:
    """The same images, in requests of as many as one may have."""
    found: list[Prompt] = []
    for prompt in prompts:
        last = found[-1] if found else None
        if (
            last is not None
            and len(last.images) < limits.images_per_request
            and last.all_units + prompt.units <= limits.units_per_request
        ):
            more = (*last.more, (prompt.units, prompt.tokens))
            found[-1] = last._replace(more=more, rest=prompt.rest)
        else:
            found.append(prompt)
    return found


def let_through(limits: Limits, bound: int) -> int | None:
    """The worst requests that the gateway lets through at once, at least one.

    None where the plan pays for all units that can meet (``bound``), so that nothing waits.
    """
    if limits.units_per_forward >= bound:
        return None
    return max(1, limits.units_per_forward // max(1, limits.units_per_request))


def most_met(prompts: Sequence[Prompt], forward: int, context: int) -> int:
    """The most units that one forward encodes; rows that generate are left out.

    Source: LMDeploy's Scheduler::RunRequiredAdmission, ForwardTokenResource, ContextTokenResource.

    Args:
        prompts: in their order of arrival, all there before the first step.
        forward: tokens of a forward at most.
        context: tokens of all prompts that are in it at most.
    """
    done, most = [0] * len(prompts), 0
    while any(at < prompt.length for at, prompt in zip(done, prompts, strict=True)):
        room, held, met, moved = forward, context, 0, False
        for i, prompt in enumerate(prompts):
            left = prompt.length - done[i]
            if not left:
                continue
            if room <= 0 or prompt.length > held:
                break
            end = done[i] + min(left, room)
            if end < prompt.length:
                end = end // _BLOCK * _BLOCK
            if end <= done[i]:
                continue
            met += prompt.met(done[i], end)
            room, held, moved = room - (end - done[i]), held - prompt.length, True
            done[i] = end
        if not moved:
            break  # a prompt that is longer than the context is refused
        most = max(most, met)
    return most


def _queues(
    rule: ImageRule, units: int, forward: int, context: int, batch: int
) -> Iterator[list[Prompt]]:
    """What is worth trying: equal images, and images that lie across a forward's edges."""
    whole = rule.unit_tokens(units)
    each = min(units, rule.units_within(context - _LEAST))
    alike = max(1, min(batch, _ALIKE * -(-forward // max(1, whole)), _ALIKE * _ALIKE))
    yield [_prompt(rule, each, 1, 1 + 61 * i % 257) for i in range(alike)]
    yield [_prompt(rule, each, 1, 1)] * alike
    for kept in range(2, batch + 1):
        part = min(each, rule.units_within(context // kept - _LEAST))
        if part:
            yield [_prompt(rule, part, 1, 1)] * kept
    yield _filled(rule, each, [], forward, context, batch)
    tokens, step = rule.unit_tokens(each), max(_BLOCK, forward // _BLOCK * _BLOCK)
    # An image that is one token longer than whole chunks, and a prompt that is cut there.
    lead = 1 + (-tokens) % step
    first = Prompt(lead, each, tokens, max(1, forward - step))
    yield _filled(rule, each, [first], forward, context, batch)


def _filled(
    rule: ImageRule, units: int, first: list[Prompt], forward: int, context: int, batch: int
) -> list[Prompt]:
    """Whole images beside the last token of a first one, and one that is cut at the end."""
    found = [*first]
    room = forward - _BLOCK - sum(1 + prompt.rest for prompt in first)
    left = context - sum(prompt.length for prompt in first)
    last = min(rule.unit_tokens(units), max(0, left)) + _LEAST
    while len(found) < batch - 1:
        # The last, of which one token is enough, must have its place in the context, too.
        fits = _fits(rule, units, min(room, left - last))
        if not fits:
            break
        found.append(_prompt(rule, fits, 1, 1))
        room -= found[-1].length
        left -= found[-1].length
    fits = _fits(rule, units, left)
    return [*found, _prompt(rule, fits, 1, 1)] if fits else found


def _fits(rule: ImageRule, units: int, tokens: int) -> int:
    """Units of the largest image of which a prompt of so many tokens has room."""
    return min(units, rule.units_within(tokens - _LEAST)) if tokens > _LEAST else 0


def _prompt(rule: ImageRule, units: int, lead: int, rest: int) -> Prompt:
    """A prompt with an image of about so many units, in whole steps."""
    units = max(rule.unit_step, units // rule.unit_step * rule.unit_step)
    return Prompt(lead, units, rule.unit_tokens(units), rest)


def _repeated_images(
    plan: Plan, rule: ImageRule, units: int, gate: int | None
) -> list[tuple[Prompt, bool]]:
    """Different questions about the image that was seen before: each brings it back whole.

    With each whether its image was seen: what gate, batch and context leave beside the questions is
    for images of another request, which no cache has seen.
    """
    settings, prompt = plan.settings, _prompt(rule, units, 1, _LEAST)
    length = prompt.length + _NEW
    most = settings.session_len // length  # they share the picture's blocks
    if gate is not None:
        most = min(most, gate // prompt.units)
    mixes = []
    for kept in (settings.max_batch_size, settings.max_batch_size - 1):
        count = max(1, min(most, kept))
        found = [(prompt, True)] * count
        room = forward_tokens(settings) - count * _BLOCK
        context = settings.session_len - count * length - _NEW
        left = plan.limits.units_per_request
        if gate is not None:
            left = min(left, gate - count * prompt.units)
        new = _new(plan, rule, units, (left, context, room))
        if new is not None and count < settings.max_batch_size:
            found.append((new, False))
        mixes.append(found)
    return max(mixes, key=lambda mix: sum(each.all_units for each, _ in mix))


def _new(plan: Plan, rule: ImageRule, units: int, left: tuple[int, int, int]) -> Prompt | None:
    """A request of images that are all met in one forward: of so many units, context, tokens."""
    found: list[tuple[int, int]] = []
    total, context, room = left
    context -= _LEAST
    while len(found) < plan.limits.images_per_request and room > 1:
        fits = min(units, total, rule.units_within(max(0, context)))
        if fits < rule.unit_step:
            break
        image = _prompt(rule, fits, 1, 1)
        found.append((image.units, image.tokens))
        total, context, room = total - image.units, context - image.tokens, room - image.tokens
    return Prompt(1, *found[0], 1, tuple(found[1:])) if found else None


def _request(rule: ImageRule, prompt: Prompt) -> dict[str, Any]:
    """As a rehearsal's specification has it."""
    return {
        "text_tokens": prompt.lead + prompt.rest,
        "lead": prompt.lead,
        "units": [rule.grid(units) for units, _ in prompt.images],
        "max_new_tokens": _NEW,
    }

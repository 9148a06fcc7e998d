"""Queues of requests whose images meet in one forward of TurboMind, as many as can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from turbofit.core.images import ImageRule
from turbofit.core.plan import Limits, Plan
from turbofit.memory.turbomind.pool import forward_tokens

__all__ = ["Prompt", "let_through", "most_met", "queue"]

#: A chunk that does not end a prompt ends at a block's edge (LMDeploy, Scheduler::ClampForwardEnd).
_BLOCK = 64
_NEW = 2  # tokens to generate: one forward of prefill, one of decoding
_LEAST = 2  # tokens of text of the shortest prompt: one on each side of its image
_CUT = 4  # prompts that meet, nearly always: blocks of the cache that are filled in part
_ALIKE = 3  # times the forwards' worth of equal images that are queued


class Prompt(NamedTuple):
    """``lead`` tokens of text, an image of ``units`` and ``tokens``, and ``rest`` tokens."""

    lead: int
    units: int
    tokens: int
    rest: int

    @property
    def length(self) -> int:
        """All its tokens."""
        return self.lead + self.tokens + self.rest


def queue(plan: Plan, rule: ImageRule, units: int) -> list[dict[str, Any]]:
    """Requests of one image each, of at most so many units, whose images meet at their worst.

    In the order in which a rehearsal queues them. With a prefix cache: one request that fills it,
    to be answered first, is the caller's.
    """
    settings = plan.settings
    if settings.enable_prefix_caching:
        return _asked_again(plan, rule, units)
    forward = forward_tokens(settings)
    # Prompts meet whose blocks the cache has all at once, of each the last in part filled.
    context = min(settings.session_len, plan.kv.tokens - _CUT * _BLOCK)
    if not _fits(rule, units, context):
        return [_request(rule, _prompt(rule, units, 1, 1))]  # which the engine refuses
    best = max(
        _queues(rule, units, forward, context, settings.max_batch_size),
        key=lambda prompts: most_met(prompts, forward, context),
    )
    return [_request(rule, prompt) for prompt in best]


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
            if done[i] < prompt.lead + prompt.tokens and end > prompt.lead:
                met += prompt.units
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


def _asked_again(plan: Plan, rule: ImageRule, units: int) -> list[dict[str, Any]]:
    """Different questions about the image that was seen before: each brings it back whole."""
    settings, prompt = plan.settings, _prompt(rule, units, 1, _LEAST)
    count = settings.session_len // (prompt.length + _NEW)  # they share the picture's blocks
    one = _request(rule, prompt) | {"images": 1}
    return [one] * max(1, min(count, settings.max_batch_size))


def _request(rule: ImageRule, prompt: Prompt) -> dict[str, Any]:
    """As a rehearsal's specification has it."""
    return {
        "text_tokens": prompt.lead + prompt.rest,
        "lead": prompt.lead,
        "units": [rule.grid(prompt.units)],
        "max_new_tokens": _NEW,
    }

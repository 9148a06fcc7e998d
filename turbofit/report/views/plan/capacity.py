"""The KV cache in tokens, images and users: arithmetic on a plan's own figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.struct import Struct
from turbofit.core.units import round_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.plan import Plan

__all__ = ["Capacity", "Users", "capacity"]

#: Text beside the images, prompt and answer together, of the conversations that are shown. The
#: first is what a verdict counts with.
_TEXT: Final = (512, 2048, 8192, 32768)


class Users(Struct):
    """How many conversations of so many tokens there can be at once, over all groups.

    ``held``: so many fit in the cache; ``running``: so many the engines take at once.
    """

    what: str
    tokens: int
    held: int
    running: int


class Capacity(Struct):
    """What the cache holds. ``images``: of the worst size, without any text; None without images.

    With Transformers, which answers one request at a time, those of one request a group.

    ``tokens_per_group`` is the smallest's where groups differ; all else counts each by its own.
    """

    tokens: int
    tokens_per_group: int
    groups: int
    images: int | None
    users: tuple[Users, ...]


def capacity(plan: Plan) -> Capacity:
    """The capacity of a plan; all 0 where the cache holds nothing."""
    kv, limits = plan.kv, plan.limits
    groups = plan.each()
    pictures = limits.image_tokens_per_request if limits.vision_unit else 0
    each = -(-pictures // max(1, limits.images_per_request)) if pictures else None
    images = limits.images_per_request
    beside = f"{images} worst {'image' if images == 1 else 'images'} and " if pictures else ""
    rows = [
        _users(groups, f"{beside}{text:,} tokens of text", pictures + text)
        for text in _TEXT
        if 0 < pictures + text < kv.longest_request_tokens
    ]
    if kv.longest_request_tokens:
        rows.append(_users(groups, "the longest request", kv.longest_request_tokens))
    held = None if not each else sum(one.kv.tokens // each for one in groups)
    if each and _serial(plan):
        held = images * len(groups) if kv.longest_request_tokens else 0
    return Capacity(
        tokens=kv.total_tokens,
        tokens_per_group=kv.tokens,
        groups=len(groups),
        images=held,
        users=tuple(rows),
    )


def _users(groups: Sequence[Plan], what: str, tokens: int) -> Users:
    """Conversations take whole blocks of one cache; Transformers answers one at a time."""
    held = running = 0
    for plan in groups:
        most = plan.kv.tokens // round_up(tokens, plan.settings.cache_block_seq_len)
        most = min(1, plan.kv.tokens // tokens) if _serial(plan) else most
        held += most
        running += min(most, plan.settings.max_batch_size)
    return Users(what=what, tokens=tokens, held=held, running=running)


def _serial(plan: Plan) -> bool:
    return plan.engine.serial

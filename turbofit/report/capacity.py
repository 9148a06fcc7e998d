"""The KV cache in tokens, images and users: arithmetic on a plan's own figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.struct import Struct
from turbofit.core.units import round_up

if TYPE_CHECKING:
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

    Where groups differ, each is counted as the smallest: never more than there is.
    """

    tokens: int
    tokens_per_group: int
    groups: int
    images: int | None
    tokens_per_image: int | None
    users: tuple[Users, ...]


def capacity(plan: Plan) -> Capacity:
    """The capacity of a plan; all 0 where the cache holds nothing."""
    kv, limits, groups = plan.kv, plan.limits, max(1, plan.parallel.replicas)
    pictures = limits.image_tokens_per_request if limits.vision_unit else 0
    each = -(-pictures // max(1, limits.images_per_request)) if pictures else None
    images = limits.images_per_request
    beside = f"{images} worst {'image' if images == 1 else 'images'} and " if pictures else ""
    rows = [
        _users(plan, f"{beside}{text:,} tokens of text", pictures + text)
        for text in _TEXT
        if pictures + text < kv.longest_request_tokens
    ]
    if kv.longest_request_tokens:
        rows.append(_users(plan, "the longest request", kv.longest_request_tokens))
    images_held = None if not each else kv.tokens // each
    if each and _serial(plan):
        images_held = images if kv.longest_request_tokens else 0
    return Capacity(
        tokens=kv.total_tokens,
        tokens_per_group=kv.tokens,
        groups=groups,
        images=None if images_held is None else images_held * groups,
        tokens_per_image=each,
        users=tuple(rows),
    )


def _users(plan: Plan, what: str, tokens: int) -> Users:
    """A conversation takes whole blocks of the cache; Transformers answers one at a time."""
    held = plan.kv.tokens // round_up(tokens, plan.settings.cache_block_seq_len)
    held = min(1, plan.kv.tokens // tokens) if _serial(plan) else held
    running = min(held, plan.settings.max_batch_size)
    groups = max(1, plan.parallel.replicas)
    return Users(what=what, tokens=tokens, held=held * groups, running=running * groups)


def _serial(plan: Plan) -> bool:
    return plan.engine.name == "transformers"

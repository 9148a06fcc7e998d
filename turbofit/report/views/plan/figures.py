"""Figures of a plan: what its cache holds, its settings, and in which its engines differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.messages import indices, plural
from turbofit.core.struct import Struct
from turbofit.core.units import round_up, three_digits
from turbofit.planning.commands import ratio
from turbofit.report.painters.document import Heading, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.plan import Plan
    from turbofit.report.painters.document import Block

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


def images_held(plan: Plan) -> int | None:
    """Images of the worst size that the caches hold without any text; None without images.

    With Transformers, which answers one request at a time, those of one request a group.
    """
    kv, limits, groups = plan.kv, plan.limits, plan.each()
    each = -(-_pictures(plan) // max(1, limits.images_per_request))
    if not each:
        return None
    if plan.engine.serial:
        return limits.images_per_request * len(groups) if kv.longest_request_tokens else 0
    return sum(one.kv.tokens // each for one in groups)


def users_of(plan: Plan) -> list[Users]:
    """Conversations of some sizes, the longest request last; none where the cache holds nothing."""
    groups, pictures, longest = plan.each(), _pictures(plan), plan.kv.longest_request_tokens
    images = plan.limits.images_per_request
    beside = f"{images} worst {plural(images, 'image')} and " if pictures else ""
    rows = [
        _users(groups, f"{beside}{text:,} tokens of text", pictures + text)
        for text in _TEXT
        if 0 < pictures + text < longest
    ]
    return [*rows, _users(groups, "the longest request", longest)] if longest else rows


def _pictures(plan: Plan) -> int:
    """Tokens of a request's images."""
    return plan.limits.image_tokens_per_request if plan.limits.vision_unit else 0


def _users(groups: Sequence[Plan], what: str, tokens: int) -> Users:
    """Conversations take whole blocks of one cache; Transformers answers one at a time."""
    held = running = 0
    for plan in groups:
        most = plan.kv.tokens // round_up(tokens, plan.settings.cache_block_seq_len)
        most = min(1, plan.kv.tokens // tokens) if plan.engine.serial else most
        held += most
        running += min(most, plan.settings.max_batch_size)
    return Users(what=what, tokens=tokens, held=held, running=running)


_SAID_WHERE_SET = ("language_model_only", "eager_mode")
#: Engines beside each other; more start a new table, so that 80 columns hold it.
_ABREAST: Final = 3


def settings_of(plan: Plan) -> dict[str, str]:
    """The settings under LMDeploy's names, as text; what LMDeploy is not told is left out."""
    out = {}
    for name, value in plan.lmdeploy_settings().items():
        if value is None or (value is False and name in _SAID_WHERE_SET):
            continue
        if name == "num_gpu_blocks" and not value:
            continue
        if name == "cache_max_entry_count":
            out[name] = ratio(value)
        else:
            out[name] = str(value).lower() if isinstance(value, bool) else str(value)
    if draft := plan.settings.draft:
        out |= {name: str(value) for name, value in draft.given.items()}
    return out


def differing(plan: Plan) -> tuple[str, ...]:
    """The settings in which the plan's engines differ."""
    each = [settings_of(plan.of_group(numbers[0])) for numbers in plan.unlike_groups()]
    return tuple(name for name in each[0] if len({settings.get(name) for settings in each}) > 1)


def per_engine_blocks(plan: Plan) -> list[Block]:
    """The settings that differ between engines, one column for those that are equal; or nothing."""
    if not plan.by_group:
        return []
    rows = [*differing(plan), "KV tokens", "requests there", "units in a forward"]
    if plan.limits.vision_unit is None:
        rows.pop()
    columns = [_column(plan, numbers, rows) for numbers in plan.unlike_groups()]
    blocks: list[Block] = [Heading("Settings of each engine's own")]
    for start in range(0, len(columns), _ABREAST):
        part = dict(columns[start : start + _ABREAST])
        cells = ((name, *(each[row] for each in part.values())) for row, name in enumerate(rows))
        blocks.append(table(("each engine", *part), cells, right=part))
    return blocks


def _column(plan: Plan, numbers: tuple[int, ...], rows: list[str]) -> tuple[str, list[str]]:
    """The engines of these groups: their GPUs, and a cell for each row."""
    group_plan = plan.by_group[numbers[0]]
    cells = settings_of(plan.of_group(numbers[0])) | {
        "KV tokens": f"{group_plan.kv.tokens:,}",
        "requests there": three_digits(group_plan.at_once),
        "units in a forward": f"{group_plan.units_per_forward:,}",
    }
    gpus = [index for number in numbers for index in plan.parallel.groups[number]]
    return f"GPU {indices(gpus)}", [cells.get(name, "-") for name in rows]

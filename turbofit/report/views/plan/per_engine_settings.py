"""The settings of a plan as text, and those that engines on unequal cards have of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.messages import indices
from turbofit.core.units import three_digits
from turbofit.planning.commands import ratio
from turbofit.report.painters.document import Heading, table

if TYPE_CHECKING:
    from turbofit.core.plan import Plan
    from turbofit.report.painters.document import Block

__all__ = ["differing", "per_engine_blocks", "settings_of"]

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
    blocks: list[Block] = [Heading(text="Settings of each engine's own")]
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

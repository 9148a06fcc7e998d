"""What presets are, and which of them keep a promise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.messages import plural
from turbofit.core.units import MIB, format_bytes
from turbofit.report.painters.document import (
    ONLY_SHORT,
    Heading,
    Items,
    Verdict,
    listed,
    remark,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from turbofit.core.model import Model
    from turbofit.core.which import Serving, Which
    from turbofit.machine.presets import GpuPreset
    from turbofit.report.painters.document import Block


def models_view(
    known: Iterable[tuple[str, Model]],
    unsupported: Iterable[tuple[str, str]],
    *,
    hub_ids: bool = True,
) -> list[Block]:
    """Models by name; those without an account below, with the reason.

    Args:
        known: models by their names.
        unsupported: reasons by their models' names.
        hub_ids: false where the terminal has no room for them.
    """
    rows = (
        (
            name,
            f"{model.parameters / 1e9:.2f}B",
            format_bytes(model.weight_bytes),
            f"{model.text.max_position_embeddings:,}",
            "none" if model.image_rule is None else model.image_rule.summary,
            model.hub_id or "",
        )
        for name, model in known
    )
    known_models = table(
        ("name", "params", "weights", "context", "images", "hub id"),
        rows,
        right=("params", "weights", "context"),
        aside=() if hub_ids else ("hub id",),
    )
    without = (f"{name}: {why}" for name, why in unsupported)
    return [Heading("Models"), known_models, *listed("Not planned for", without)]


def gpus_view(known: Iterable[tuple[str, GpuPreset]]) -> list[Block]:
    """GPUs by name."""
    numbers = ("cc", "MiB", "reserved", "GB/s", "TFLOP/s")
    rows = (
        (
            name,
            preset.name,
            "{}.{}".format(*preset.compute_capability.value),
            f"{preset.total // MIB:,}",
            f"{preset.reserved // MIB:,}",
            f"{preset.memory_bandwidth.value / 1e9:,.0f}",
            f"{preset.dense_flops.value / 1e12:,.0f}",
            preset.p2p.value,
        )
        for name, preset in known
    )
    titles = ("name", "as NVML names it", *numbers, "P2P")
    return [Heading("GPUs"), table(titles, rows, right=numbers, wrap=("as NVML names it",))]


#: Rows of a summary, and the others that it says something of; the whole text has all.
_ROWS: Final = 12
_OTHERS: Final = 3
#: Columns that a summary leaves out.
_WIDE: Final = ("engine", "shape", "KV tokens")
_NUMBERS: Final = (
    "memory", "context", "KV tokens", "at once", "requests/s", "first token"
)  # fmt: skip


def which_view(found: Which) -> list[Block]:
    """The answer first, then those that keep the promise, then what the others lack."""
    title = f"Cards for {found.model}" if found.model else f"Models on {found.machine}"
    others = tuple(f"{one.on if found.model else one.model}: {one.why_not}" for one in found.others)
    blocks: list[Block] = [
        Heading(title, short=True),
        Verdict(_answer(found), good=bool(found.keep), short=True),
    ]
    if found.keep:
        rows = [_row(found, one) for one in found.keep]
        titles = [name for name in rows[0] if name not in _WIDE]
        few = (tuple(row[name] for name in titles) for row in rows[:_ROWS])
        every = (tuple(row.values()) for row in rows)
        blocks += [
            table(titles, few, right=_NUMBERS, **ONLY_SHORT),
            Heading("What keeps the promise", whole=False),
            table([*rows[0]], every, right=_NUMBERS, aside=("engine",), sortable=True),
        ]
    else:
        blocks.append(Items(others[:_OTHERS], **ONLY_SHORT))
    blocks += listed("Not these", others)
    kept = max(0, len(found.keep) - _ROWS)
    not_said = len(others) if found.keep else len(others[_OTHERS:])
    counts = {"more that do": kept, "that do not": not_said}
    left = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    more = f"{left or 'more'}: --full, --md, --html or --json"
    return [*blocks, remark(more, **ONLY_SHORT)]


def _answer(found: Which) -> str:
    """How many keep the promise, and in which order they stand."""
    count = len(found.keep)
    everything = count + len(found.others)
    promise = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in found.request.items()
        if name != "all_counts"
    )
    if found.model is None:
        keep = f"keep the promise ({promise})" if promise else "run on it"
        order = "; the largest first" if count else ""
        return f"{count} of {everything} preset models {keep}{order}"
    keep = f"keep the promise ({promise})" if promise else "run it"
    counts = ", ".join(map(str, found.counts))
    order = "; the fewest bytes of GPU memory first" if count else ""
    if "all_counts" in found.request:
        return f"{count} {plural(count, 'machine')} of {counts} equal cards {keep}{order}"
    each = f", each with the fewest of {counts} GPUs that do" if count else f", with {counts} GPUs"
    return f"{count} of {everything} preset cards {keep}{each}{order}"


def _row(found: Which, one: Serving) -> dict[str, str]:
    """One that keeps the promise, by the titles of the columns."""
    rate, first = one.requests_per_second, one.seconds_to_first_token
    name = {"machine": one.on, "memory": format_bytes(one.bytes)}
    return {
        **(name if found.model else {"model": one.model}),
        "engine": one.engine or "",
        "shape": f"tp {one.tp} x {one.replicas}",
        "context": f"{one.context:,}",
        "KV tokens": f"{one.kv_tokens:,}",
        "at once": f"{one.requests_at_once:,}",
        "requests/s": "-" if rate is None else f"{rate:.2f}",
        "first token": "-" if first is None else f"{first:.1f} s",
    }

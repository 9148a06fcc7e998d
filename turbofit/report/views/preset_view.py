"""The views of presets of models and cards, of `which`, and of a merged checkpoint."""

from __future__ import annotations

import shlex
from itertools import chain
from typing import TYPE_CHECKING, Final

from turbofit.core.messages import counted
from turbofit.core.units import MIB, format_bytes, grouped
from turbofit.report.painters.document import (
    ONLY_SHORT,
    Heading,
    Items,
    Paragraph,
    Verdict,
    listed,
    remark,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from turbofit.core.model import Model
    from turbofit.machine.presets import GpuPreset
    from turbofit.model.merge.merge import Merged
    from turbofit.planning.which import Serving, Which
    from turbofit.report.painters.document import Block

#: The most rows of a table in the short answer; the whole text lists all.
_ROWS: Final = 12
#: The most names in a line of the short answer, and the most rows of a second table.
_OTHERS: Final = 3
_BY_TRANSFORMERS: Final = (
    "Transformers alone runs these: one request at a time, with layers in host memory where the GPU"
    " is too small"
)
_MODELS_FIRST: Final = "those with images first, larger ones before smaller ones"
#: Columns that the short answer leaves out.
_WIDE: Final = ("engine", "shape", "KV tokens")
#: An image limit above this number is in pixels, since no preset cuts an image into more tiles.
_MOST_TILES: Final = 1000
#: Options whose whole numbers are bytes.
_SIZES: Final = ("budget", "margin")
_NUMBERS: Final = (
    "memory", "context", "images", "KV tokens", "at once", "requests/s", "first token",
)  # fmt: skip


def models_view(
    known: Iterable[tuple[str, Model]], unsupported: Iterable[tuple[str, str]]
) -> list[Block]:
    """Return a table of models, and the reasons why other models are not supported."""
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
        aside=("hub id",),
    )
    without = (f"{name}: {why}" for name, why in unsupported)
    return [Heading("Models"), known_models, *listed("Not planned for", without)]


def gpus_view(known: Iterable[tuple[str, GpuPreset]]) -> list[Block]:
    """Return a table of the cards that turbofit knows by name."""
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


def which_view(which: Which) -> list[Block]:
    """Return the blocks of a `Which`: the answer, what fits, and why the others do not fit."""
    title = f"Cards for {which.model}" if which.model else f"Models on {which.machine}"
    rows = which.others
    if not which.keep:  # the nearest first: sorting keeps the order of rows without a speed
        rows = tuple(sorted(rows, key=lambda row: -(row.requests_per_second or 0.0)))
    others = tuple(f"{row.on if which.model else row.model}: {row.why_not}" for row in rows)
    kept = _kept_tables(which) if which.keep else [Items(others[:_OTHERS], **ONLY_SHORT)]
    return [
        Heading(title, short=True),
        Verdict(_answer(which), "good" if which.keep else "bad", short=True),
        *kept,
        *_warned(which),
        *_made_in_four_bits(which.others),
        *listed("Not these", others),
        remark("all of them: --full, --md, --html or --json", **ONLY_SHORT),
    ]


def _kept_tables(which: Which) -> list[Block]:
    """Return tables of the cards or models that keep the promise.

    The short answer has fewer columns and rows.
    """
    fast = [serving for serving in which.keep if serving.of_lmdeploy]
    slow = [serving for serving in which.keep if not serving.of_lmdeploy]
    blocks: list[Block] = [Heading("What keeps the promise", whole=False)]
    blocks += _kept_table(which, fast, _ROWS) if fast else []
    if slow:
        blocks.append(Heading(_BY_TRANSFORMERS, short=True))
        blocks += _kept_table(which, slow, _OTHERS if fast else _ROWS)
    return blocks


def _made_in_four_bits(rows: Iterable[Serving]) -> list[Block]:
    """Return the models that run with 4-bit weights that somebody makes, and the commands.

    The short answer only names these models.
    """
    made = [row for row in rows if row.quantize is not None]
    if not made:
        return []
    names = _few([row.model for row in made])
    commands = (f"{row.model}: {row.quantize}" for row in made)
    return [
        remark(f"with 4-bit weights that `turbofit quantize` makes: {names}", **ONLY_SHORT),
        *listed("With 4-bit weights that you make", commands),
    ]


def _few(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - _OTHERS} more" if names[_OTHERS:] else ""
    return f"{', '.join(names[:_OTHERS])}{more}"


def _outdone(row: Serving, rows: Iterable[Serving]) -> bool:
    """Return whether another row has fewer GPUs and is as good or better in every column."""
    speed = row.requests_per_second or 0.0
    return any(
        other.gpus < row.gpus
        and other.bytes <= row.bytes
        and other.context >= row.context
        and other.requests_at_once >= row.requests_at_once
        and (other.requests_per_second or 0.0) >= speed
        for other in rows
    )


def _warned(which: Which) -> list[Block]:
    """Return the known faults of the cards or models that keep the promise.

    The short answer only names these cards or models.
    """
    named = [(row, row.on if which.model else row.model) for row in which.keep]
    warned = grouped((text, name) for row, name in named for text in row.warnings)
    names = list(dict.fromkeys(chain(*warned.values())))
    if not names:
        return []
    in_short = f"warned of: {_few(names)} (turbofit plan says why)"
    texts = (f"{', '.join(names)}: {text}" for text, names in warned.items())
    return [remark(in_short, **ONLY_SHORT), *listed("Known to go wrong", texts, "warn")]


def _kept_table(which: Which, kept: list[Serving], most: int) -> list[Block]:
    """Return the table of the short answer, with at most ``most`` rows, and the whole table.

    The table of the short answer leaves out machines that are outdone by smaller ones.
    """
    shown = [row for row in kept if not _outdone(row, kept)][:most] if which.model else kept[:most]
    rows = [_row(which, serving) for serving in kept]
    titles = [name for name in rows[0] if name not in _WIDE]
    few_rows = [_row(which, serving) for serving in shown]
    few = (tuple(row[name] for name in titles) for row in few_rows)
    all_cells = (tuple(row.values()) for row in rows)
    return [
        table(titles, few, right=_NUMBERS, **ONLY_SHORT),
        table([*rows[0]], all_cells, right=_NUMBERS, aside=("engine",)),
    ]


def _answer(which: Which) -> str:
    """Return the answer of `which` in a sentence: how many of all keep the promise."""
    count = len(which.keep)
    everything = count + len(which.others)
    promise = ", ".join(f"{name.replace('_', ' ')} {it}" for name, it in _asked(which).items())
    keep, run = ("keeps", "runs") if count == 1 else ("keep", "run")
    if which.model is None:
        does = f"{keep} the promise ({promise})" if promise else f"{run} on it"
        first = "the largest first" if which.request.get("images") == 0 else _MODELS_FIRST
        order = f"; {first}" if count else ""
        return f"{count} of {everything} preset models {does}{order}"
    does = f"{keep} the promise ({promise})" if promise else f"{run} it"
    counts = ", ".join(map(str, which.counts))
    order = "; the fewest bytes of GPU memory first" if count else ""
    condition = (
        f", each with as few GPUs as are enough (of {counts})" if count else f", with {counts} GPUs"
    )
    return f"{count} of {everything} preset cards {does}{condition}{order}"


def _asked(which: Which) -> dict[str, object]:
    """Return the given options, whose whole numbers of bytes are written as sizes."""
    sizes = {name: which.request.get(name) for name in _SIZES}
    return which.request | {
        name: format_bytes(size) for name, size in sizes.items() if isinstance(size, int)
    }


def _row(which: Which, serving: Serving) -> dict[str, str]:
    """Return one row of a table by the titles of its columns."""
    rate, first = serving.requests_per_second, serving.seconds_to_first_token
    name = {"machine": serving.on, "memory": format_bytes(serving.bytes)}
    return {
        **(name if which.model else {"model": serving.model}),
        "engine": serving.engine or "",
        "shape": f"tp {serving.tp} x {serving.replicas}",
        "context": f"{serving.context:,}",
        # With a given context a row may have a lower image limit, so that its images fit.
        **({"images": _image_limit(serving.image_limit)} if "context" in which.request else {}),
        "KV tokens": f"{serving.kv_tokens:,}",
        "at once": _at_once(serving),
        "requests/s": "-" if rate is None else f"{rate:.2f}",
        "first token": "-" if first is None else f"{first:.1f} s",
    }


def _at_once(serving: Serving) -> str:
    """Return how many requests run at once, and under which lower image limit more of them do."""
    smaller = serving.smaller
    more = f"; {smaller.requests_at_once} of {_image_limit(smaller.limit)}" if smaller else ""
    return f"{serving.requests_at_once:,}{more}"


def _image_limit(limit: int | None) -> str:
    if limit is None:
        return "-"
    return f"{limit / 1e6:.1f} MP" if limit > _MOST_TILES else counted(limit, "tile")


def merged_view(merged: Merged) -> Iterator[Block]:
    """Yield the facts of a checkpoint that `turbofit merge` has written."""
    what = f"{merged.architecture}, {merged.dtype}: {counted(merged.tensors, 'tensor')}"
    yield Heading(merged.out)
    yield Paragraph(f"{what}, {format_bytes(merged.bytes)}", tone="good")
    yield Paragraph(
        f"{counted(merged.loras, 'module')} merged, {counted(merged.replaced, 'tensor')} replaced"
    )
    if merged.converted:
        tower = merged.vision_tower or "the base itself"
        text = f"converted from LLaVA's original format; vision tower from {tower}"
        yield Paragraph(text)
    for warning in merged.warnings:
        yield Paragraph(warning, tone="warn")
    yield Paragraph(f"next: {shlex.join(('turbofit', 'plan', merged.out))}")

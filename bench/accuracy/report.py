"""Writes RESULTS.md: tables of scores, goals and results, and known reasons of the worst rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from bench.accuracy.rows import HERE, Row, model_of
from bench.accuracy.score import Score, Scored, summary
from bench.page import table
from turbofit.core.presets import load_yaml
from turbofit.core.units import MIB
from turbofit.memory.versions import parse

_TABLE = "internvl2.0/deployment"


def report(scored: Sequence[Scored], unscored: Sequence[Row]) -> str:
    """Return the whole page."""
    facts = summary(scored, unscored)
    sections = {
        "Bars": _bars(scored, facts),
        "Memory by source": _errors(facts["by_source"]),
        "Memory by engine and generation": _errors(facts["by_generation"]),
        "Blocks of the cache": _blocks(facts["blocks"]),
        "Host memory by version": _host(scored),
        "Outcomes": _outcomes(scored, facts),
        "The InternVL2 table": "".join(_first_image(scored)),
        "Worst rows": "\n".join(_worst(scored)),
        "Every figure": _figures(scored),
        "Not scored": table("row | missing", [(one.id, one.missing) for one in unscored]),
    }
    return "\n".join((_HEAD, *(f"## {name}\n\n{text}\n" for name, text in sections.items())))


_HEAD = """\
# How far off the forecasts are

Made by `python -m bench.accuracy --write`; every number is computed from `rows.jsonl`. Errors are
forecast minus observed, so that a minus is memory that the forecast did not see. Percent is of one
card. One set of constants for all rows of a generation (`presets/engines/generations.yaml`), read
from LMDeploy's source or from published measurements of contexts and NCCL; none was fitted to a
row. A figure in GB is read as GiB. Where a row has no version, it is the newest release of its day;
where it names no card, the smallest common one that holds the figure (its outcome is not judged).
"""


def _bars(scored: Sequence[Scored], facts: dict[str, Any]) -> str:
    """Return a table of goals, each with the result."""
    share = facts["share_scored"] or 0
    count = f"{facts['with_a_figure_scored']} of {facts['with_a_figure']}"
    bars: list[tuple[str, str, bool]] = [
        ("TurboMind and PyTorch rows with a figure that are scored: 90 %", count, share >= 0.9)
    ]
    errors = [abs(s.percent_of_card or 0) for one in _table(scored) for s in _used(one)]
    if errors:
        name, middle, worst = "InternVL2 table, TurboMind", median(errors), max(errors)
        reached = f"{middle:.2f} % of {len(errors)} figures"
        bars += [
            (f"{name}: median error 1 % of the card", reached, middle <= 1),
            (f"{name}: worst 3 %", f"{worst:.2f} %", worst <= 3),
        ]
    sizes = [b for b in facts["blocks"] if b["figure"] == "block"]
    exact = sum(abs(b["forecast"] - b["observed"]) < 0.001 for b in sizes)
    bars.append(("KV block size exact", f"{exact} of {len(sizes)}", exact == len(sizes)))
    counts = [abs(b["error_percent"]) for b in facts["blocks"] if b["figure"] == "blocks"]
    if counts:
        bars.append(("KV block count within 2 %", f"{max(counts):.2f} %", max(counts) <= 2))
    wrong = [one.row.id for one in scored if one.wrong and one.observed == "ok"]
    bars.append(("no row that ran is forecast to run out", ", ".join(wrong) or "none", not wrong))
    wrong = [one.row.id for one in scored if one.wrong and one.observed != "ok"]
    what = "no row that ran out is forecast to keep more than the margin"
    bars.append((what, ", ".join(wrong) or "none", not wrong))
    rows = [(what, reached, "met" if met else "**missed**") for what, reached, met in bars]
    return table("bar | reached |", rows)


def _errors(groups: dict[str, Any]) -> str:
    rows = [
        (name, e["count"], f"{e['median_mib']} MiB, {e['median_percent']:.2f} %",
         f"{e['median_signed_percent']:+.2f} %", f"{e['p90_mib']} MiB, {e['p90_percent']:.2f} %",
         f"{e['worst_mib']:+d} MiB, {e['worst_percent']:+.2f} %")
        for name, e in groups.items() if e is not None
    ]  # fmt: skip
    return table("| figures | median | median, signed | p90 | worst", rows)


def _blocks(found: Sequence[dict[str, Any]]) -> str:
    rows = [
        (b["id"], "MiB of a block" if b["figure"] == "block" else "blocks", f"{b['forecast']:g}",
         f"{b['observed']:g}", f"{b['error_percent']:+.2f} %")
        for b in found
    ]  # fmt: skip
    return table("row | figure | forecast | observed | error", rows)


def _host(scored: Sequence[Scored]) -> str:
    """Return a table of a server's host memory, also pinned, by LMDeploy's version."""
    seen = [(one.row, s) for one in scored for s in one.scores if s.figure in ("host", "pinned")]
    rows = [
        (row.version, row.id, model_of(row).name, row.tp, s.figure, f"{s.forecast:,.0f} MiB",
         f"{s.observed:,.0f} MiB", f"{s.error:+,.0f}")
        for row, s in sorted(seen, key=lambda pair: (parse(pair[0].version) or (), pair[0].id))
    ]  # fmt: skip
    head = "version | row | model | tp | figure | forecast | observed | error"
    told = "`host`: pinned and pageable; the pageable part is charged at its upper end."
    return f"{told}\n\n{table(head, rows)}"


def _outcomes(scored: Sequence[Scored], facts: dict[str, Any]) -> str:
    """Return how outcomes agree with forecasts, by source, and which machines were not empty."""
    columns = ("ok", "oom_on_request", "oom")
    confusion = [
        (seen, *(made.get(column, 0) for column in columns))
        for seen, made in facts["confusion"].items()
    ]
    sources = [
        (name, c["ran"], c["ran_out"], c["wrong"])
        for name, c in facts["outcomes_by_source"].items()
    ]
    lines = [
        "`oom_on_request`: it starts, and a worst case that its settings admit would kill it.", "",
        table("observed | forecast ok | on request | oom", confusion), "",
        "Threads over-represent failures and tables successes, hence by source:", "",
        table("source | ran | ran out | contradicted", sources), "",
    ]  # fmt: skip
    lines += [
        f"- {one.row.id}: died at phase `{one.row.phase}`,"
        f" forecast `{one.forecast.phase or 'none'}`"
        for one in scored
        if one.observed == "oom" and one.row.phase
    ]
    lines += [f"- {name} is not compared: {why}" for name, why in facts["not_empty"].items()]
    return "\n".join(lines)


def _first_image(scored: Sequence[Scored]) -> Iterator[str]:
    """Yield the errors of InternVL2's table with and without the first image's memory."""
    pairs = [
        (abs(s.error), abs(s.error - one.forecast.by_requests / MIB), s.card_mib or 1)
        for one in _table(scored)
        for s in _used(one)
    ]
    if not pairs:
        return
    whole = 100 * median(a / card for a, _, card in pairs)
    without = 100 * median(b / card for _, b, card in pairs)
    worst = 100 * max(b / card for _, b, card in pairs)
    yield (
        "These versions have no warm-up that runs their vision tower, so that `steady` includes one"
        " image at the model's own limit (12 tiles and a thumbnail), as the published figures seem"
        f" to: with it the median error is {whole:.2f} %, without it {without:.2f} % (worst"
        f" {worst:.2f} %). What is left is nearly the same in every row, whatever the model, the"
        " ratio, the quantisation and the number of GPUs: kernels of cuDNN, cuBLAS and"
        " flash-attention that load at the first image would explain it, and no term charges them."
    )


def _worst(scored: Sequence[Scored]) -> Iterator[str]:
    """Yield rows with errors above 2 % of the card or contradicted outcomes, and known reasons."""
    known = load_yaml(HERE / "known.yaml")
    groups: dict[str, list[str]] = {}
    for one in scored:
        far = [s for s in _used(one) if abs(s.percent_of_card or 0) > 2]
        if not far and not one.wrong:
            continue
        errors = ", ".join(f"{s.error:+.0f} MiB ({s.percent_of_card:+.1f} %)" for s in far)
        what = errors or f"{one.observed}, forecast {one.forecast.outcome}"
        keys = [key for key in known if one.row.id.startswith(key)]
        why = known[max(keys, key=len)].strip() if keys else "Nothing more is known."
        groups.setdefault(why, []).append(f"**{one.row.id}** {what}")
    for why, rows in groups.items():
        yield f"- {'; '.join(rows)}. {why}"


def _figures(scored: Sequence[Scored]) -> str:
    def value(s: Score, number: float) -> str:
        return f"{number:.0f} {s.unit}" if s.unit == "MiB" else f"{number:g}"

    rows = [
        (one.row.id, f"{one.row.engine} {one.forecast.generation}", s.figure, value(s, s.forecast),
         value(s, s.observed), f"{s.error:+.0f}",
         "" if s.percent_of_card is None else f"{s.percent_of_card:+.2f} %")
        for one in scored for s in one.scores
    ]  # fmt: skip
    return table("row | generation | figure | forecast | observed | error | of the card", rows)


def _table(scored: Sequence[Scored]) -> list[Scored]:
    return [one for one in scored if _TABLE in one.row.source and one.row.engine == "turbomind"]


def _used(one: Scored) -> list[Score]:
    return [s for s in one.scores if s.figure == "used"]

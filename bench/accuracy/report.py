"""RESULTS.md: the scores in tables, the bars, and what is known of the worst rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from bench.accuracy.rows import HERE, Row, model_of
from bench.accuracy.score import Score, Scored, summary
from turbofit.core.presets import load_yaml
from turbofit.core.units import MIB
from turbofit.memory.versions import parse

__all__ = ["report"]

_TABLE = "internvl2.0/deployment"


def report(scored: Sequence[Scored], unscored: Sequence[Row]) -> str:
    """The whole page."""
    facts = summary(scored, unscored)
    parts = [
        _HEAD,
        _section("Bars", _bars(scored, facts)),
        _section("Memory by source", _errors(facts["by_source"])),
        _section("Memory by engine and generation", _errors(facts["by_generation"])),
        _section("Blocks of the cache", _blocks(facts["blocks"])),
        _section("Host memory by version", _host(scored)),
        _section("Outcomes", _outcomes(scored, facts)),
        _section("The InternVL2 table", _first_image(scored)),
        _section("Worst rows", _worst(scored)),
        _section("Every figure", _figures(scored)),
        _section("Not scored", _unscored(unscored)),
    ]
    return "\n".join(parts)


_HEAD = """\
# How far off the forecasts are

Made by `python -m bench.accuracy --write`; every number is computed from `rows.jsonl`. Errors are
forecast minus observed, so that a minus is memory that the forecast did not see. Percent is of one
card. One set of constants for all rows of a generation (`presets/engines/generations.yaml`), read
from LMDeploy's source or from published measurements of contexts and NCCL; none was fitted to a
row. A figure in GB is read as GiB. Where a row has no version, it is the newest release of its day;
where it names no card, the smallest common one that holds the figure (its outcome is not judged).
"""


def _section(title: str, lines: Iterator[str]) -> str:
    return f"## {title}\n\n" + "\n".join(lines) + "\n"


def _bars(scored: Sequence[Scored], facts: dict[str, Any]) -> Iterator[str]:
    """Each bar with what was reached."""
    yield "| bar | reached | |"
    yield "|---|---|---|"
    share = facts["share_scored"] or 0
    count = f"{facts['with_a_figure_scored']} of {facts['with_a_figure']}"
    yield _bar(
        "TurboMind and PyTorch rows with a figure that are scored: 90 %", count, share >= 0.9
    )
    table = [abs(s.percent_of_card or 0) for one in _table(scored) for s in _used(one)]
    if table:
        yield _bar(
            "InternVL2 table, TurboMind: median error 1 % of the card",
            f"{median(table):.2f} % of {len(table)} figures",
            median(table) <= 1,
        )
        yield _bar("InternVL2 table, TurboMind: worst 3 %", f"{max(table):.2f} %", max(table) <= 3)
    sizes = [b for b in facts["blocks"] if b["figure"] == "block"]
    exact = sum(abs(b["forecast"] - b["observed"]) < 0.001 for b in sizes)
    yield _bar("KV block size exact", f"{exact} of {len(sizes)}", exact == len(sizes))
    counts = [abs(b["error_percent"]) for b in facts["blocks"] if b["figure"] == "blocks"]
    if counts:
        yield _bar("KV block count within 2 %", f"{max(counts):.2f} %", max(counts) <= 2)
    ran = [i for i in facts["wrong_outcomes"] if _by_id(scored, i).observed == "ok"]
    out = [i for i in facts["wrong_outcomes"] if i not in ran]
    yield _bar("no row that ran is forecast to run out", ", ".join(ran) or "none", not ran)
    yield _bar(
        "no row that ran out is forecast to keep more than the margin",
        ", ".join(out) or "none",
        not out,
    )


def _bar(what: str, reached: str, met: bool) -> str:
    return f"| {what} | {reached} | {'met' if met else '**missed**'} |"


def _errors(groups: dict[str, Any]) -> Iterator[str]:
    yield "| | figures | median | median, signed | p90 | worst |"
    yield "|---|---|---|---|---|---|"
    for name, e in groups.items():
        if e is None:
            continue
        yield (
            f"| {name} | {e['count']} | {e['median_mib']} MiB, {e['median_percent']:.2f} %"
            f" | {e['median_signed_percent']:+.2f} % | {e['p90_mib']} MiB, {e['p90_percent']:.2f} %"
            f" | {e['worst_mib']:+d} MiB, {e['worst_percent']:+.2f} % |"
        )


def _blocks(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| row | figure | forecast | observed | error |"
    yield "|---|---|---|---|---|"
    for b in found:
        what = "MiB of a block" if b["figure"] == "block" else "blocks"
        yield (
            f"| {b['id']} | {what} | {b['forecast']:g} | {b['observed']:g}"
            f" | {b['error_percent']:+.2f} % |"
        )


def _host(scored: Sequence[Scored]) -> Iterator[str]:
    """Host memory of a server, and how much of it is pinned, by LMDeploy's version."""
    yield "`host`: pinned and pageable; the pageable part is charged at its upper end."
    yield ""
    yield "| version | row | model | tp | figure | forecast | observed | error |"
    yield "|---|---|---|---|---|---|---|---|"
    seen = [(one, s) for one in scored for s in one.scores if s.figure in ("host", "pinned")]
    for one, s in sorted(seen, key=lambda pair: (parse(pair[0].row.version) or (), pair[0].row.id)):
        yield (
            f"| {one.row.version} | {one.row.id} | {model_of(one.row).name} | {one.row.tp}"
            f" | {s.figure} | {s.forecast:,.0f} MiB | {s.observed:,.0f} MiB | {s.error:+,.0f} |"
        )


def _outcomes(scored: Sequence[Scored], facts: dict[str, Any]) -> Iterator[str]:
    """The confusion, by source, and the machines that were not empty."""
    yield "`oom_on_request`: it starts, and a worst case that its settings admit would kill it."
    yield ""
    columns = ("ok", "oom_on_request", "oom")
    yield "| observed | forecast ok | on request | oom |"
    yield "|---|---|---|---|"
    for seen, made in facts["confusion"].items():
        yield f"| {seen} | " + " | ".join(str(made.get(c, 0)) for c in columns) + " |"
    yield ""
    yield "Threads over-represent failures and tables successes, hence by source:"
    yield ""
    yield "| source | ran | ran out | contradicted |"
    yield "|---|---|---|---|"
    for name, c in facts["outcomes_by_source"].items():
        yield f"| {name} | {c['ran']} | {c['ran_out']} | {c['wrong']} |"
    yield ""
    phases = [one for one in scored if one.observed == "oom" and one.row.phase]
    for one in phases:
        made = one.forecast.phase or "none"
        yield f"- {one.row.id}: died at phase `{one.row.phase}`, forecast `{made}`"
    for name, why in facts["not_empty"].items():
        yield f"- {name} is not compared: {why}"


def _first_image(scored: Sequence[Scored]) -> Iterator[str]:
    """The table with and without what the first image leaves."""
    pairs = [
        (abs(s.error), abs(s.error - one.forecast.first_image / MIB), s.card_mib or 1)
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
    """Rows beyond 2 % of the card, and contradicted ones, with what is known of them."""
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


def _figures(scored: Sequence[Scored]) -> Iterator[str]:
    yield "| row | generation | figure | forecast | observed | error | of the card |"
    yield "|---|---|---|---|---|---|---|"
    for one in scored:
        for s in one.scores:
            share = s.percent_of_card
            yield (
                f"| {one.row.id} | {one.row.engine} {one.forecast.generation} | {s.figure}"
                f" | {_value(s, s.forecast)} | {_value(s, s.observed)} | {s.error:+.0f}"
                f" | {'' if share is None else f'{share:+.2f} %'} |"
            )


def _value(s: Score, value: float) -> str:
    return f"{value:.0f} {s.unit}" if s.unit == "MiB" else f"{value:g}"


def _unscored(unscored: Sequence[Row]) -> Iterator[str]:
    """Rows of LMDeploy's engines and the input that each lacks."""
    yield "| row | missing |"
    yield "|---|---|"
    for one in unscored:
        yield f"| {one.id} | {one.missing} |"


def _table(scored: Sequence[Scored]) -> list[Scored]:
    return [one for one in scored if _TABLE in one.row.source and one.row.engine == "turbomind"]


def _used(one: Scored) -> list[Score]:
    return [s for s in one.scores if s.figure == "used"]


def _by_id(scored: Sequence[Scored], name: str) -> Scored:
    return next(one for one in scored if one.row.id == name)

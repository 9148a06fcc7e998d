"""A run's documents as one page: forecast beside measured, the bars, and what was not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["bars", "summary"]

MIB = 1 << 20
#: The bars: of the card, of the oracle's cache, of the grid's best.
_PEAK, _CACHE, _SPEED = 0.02, 0.97, 0.98


def summary(out: Path) -> str:
    """Markdown."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(out.glob("*.json"))}
    missing = found.pop("not-run", {})
    gpus = found.get("machine", {}).get("machine", {}).get("gpus", [])
    lines = [f"# {', '.join(gpu['name'] for gpu in gpus) or 'No machine'}", ""]
    lines += ["Written by `python -m bench.gpu`; sizes in MiB.", ""]
    lines += _forecasts(found) + _speeds(found)
    lines += ["## Bars", "", *[f"- {line}" for line in bars(found)], ""]
    lines += ["## Not run", "", *[f"- `{name}`: {why}" for name, why in missing.items()]]
    return "\n".join([*lines, *([] if missing else ["Nothing that was asked for."])]) + "\n"


def _forecasts(found: dict[str, Any]) -> list[str]:
    rows = [
        "| stage | ratio | forecast peak | measured | over | outcome | as forecast |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        if one.get("forecast_peak") is None or "settings" not in one:
            continue
        measured = one["measured_peak"]
        cells = (
            name, f"{one['settings']['cache_max_entry_count']:.3f}", _mib(one["forecast_peak"]),
            _mib(measured), _mib(one["over"]), _outcome(one), one.get("as_forecast", ""),
        )  # fmt: skip
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return ["## Memory", "", *rows, ""] if len(rows) > 2 else []


def _outcome(one: dict[str, Any]) -> str:
    restarts = len(one.get("restarts") or ())
    return str(one.get("outcome", "")) + (f", {restarts} restarts" if restarts else "")


def _speeds(found: dict[str, Any]) -> list[str]:
    rows = [
        "| stage | way | answered | requests/s | tokens/s | outcome |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        for way in ("direct", "gateway"):
            if isinstance(one.get(way), dict):
                load = one[way]
                missing = "".join(f", {n} {why}" for why, n in load.get("unanswered", {}).items())
                answered = f"{load['answered']} of {load['load']['requests']}{missing}"
                rows.append(
                    f"| {name} | {way} | {answered} |"
                    f" {load['requests_per_second']:.2f} | {load['tokens_per_second']:.1f} |"
                    f" {_outcome(one)} |"
                )
    return ["## Speed", "", *rows, ""] if len(rows) > 2 else []


def bars(found: dict[str, Any]) -> list[str]:
    """Each bar: what was measured for it, and whether it is met."""
    lines = []
    plans = [one for one in found.values() if one.get("over") is not None and "margin" in one]
    lived = [one for one in plans if one.get("outcome") == "survived"]
    if lived:
        worst = max(abs(one["over_share_of_card"]) for one in lived)
        lines.append(_bar(f"peak within 2 % of the card: at most {worst:.2%} off", worst <= _PEAK))
        under = max(-one["over"] - one["margin"] for one in lived)
        lines.append(_bar("never under by more than the margin", under <= 0))
    deaths = [one for one in found.values() if one.get("as_forecast") is not None]
    if deaths:
        right = sum(bool(one["as_forecast"]) for one in deaths)
        said = f"lives or dies as forecast: {right} of {len(deaths)}"
        lines.append(_bar(said, right == len(deaths)))
    for name, one in found.items():
        if one.get("oracle") is not None:
            said = f"{name}: the plan's cache is {one['share']:.1%} of the oracle's"
            lines.append(_bar(said, one["share"] >= _CACHE))
        if "-thousand" in name and isinstance(one.get("gateway"), dict):
            load = one["gateway"]
            good = one["outcome"] == "survived" and load["answered"] == load["load"]["requests"]
            said = f"{name}: {load['answered']} of {load['load']['requests']} worst-case requests"
            lines.append(_bar(f"{said} answered, {one['outcome']}", good))
    return [*lines, *_fastest(found)] or ["nothing was measured for any of them"]


def _fastest(found: dict[str, Any]) -> list[str]:
    """The plan's throughput against the best of the grid, both direct."""
    lines = []
    for name, one in found.items():
        if not name.startswith("c-") or "-plan" not in name or not _rate(one):
            continue
        model, _, label = name.partition("-plan")
        rivals = {
            other: _rate(found[other]) for other in found
            if other.startswith(f"{model}-grid-") and other.endswith(label) and _rate(found[other])
        }  # fmt: skip
        if rivals:
            best = max(rivals, key=lambda key: rivals[key])
            share = _rate(one) / rivals[best]
            said = f"{name}: {share:.1%} of the tokens/s of the grid's best ({best})"
            lines.append(_bar(said, share >= _SPEED))
    return lines


def _rate(one: dict[str, Any]) -> float:
    """Tokens a second of a load that was answered whole by an engine that lived."""
    load = one.get("direct")
    if not isinstance(load, dict) or one.get("outcome") != "survived":
        return 0.0
    return float(load["tokens_per_second"]) if set(load["statuses"]) == {"200"} else 0.0


def _bar(text: str, met: bool) -> str:
    return f"{'met' if met else 'NOT MET'}: {text}"


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / MIB:,.0f}"

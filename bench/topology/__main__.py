"""``python -m bench.topology [--fit] [--write]``: the bar, and every case."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from statistics import median

from bench.topology.cases import HERE, Case, read_cases
from bench.topology.fit import FITTED, fit, left_out_scores
from bench.topology.score import Score, score
from turbofit.tuner.speed.rates import rates

_MOST = 0.22


def report() -> tuple[str, bool]:
    """RESULTS.md, and whether the bar is met."""
    cases, figures = read_cases(), rates()
    against = {case.contradicts for case in cases} | {c.id for c in cases if c.contradicts}
    judged = [case for case in cases if not case.left_out]
    shipped = {one.case.id: one for one in (score(case, figures) for case in cases)}
    others = {one.case.id: one for one in left_out_scores(judged, rates(FITTED))}
    errors = _errors(others.values())
    clear = [one for name, one in others.items() if name not in against]
    won = sum(one.won for one in clear)
    met = won == len(clear) and median(errors) <= _MOST
    sources = len({case.source for case in cases})
    lines = [
        "# Shapes against each other: forecast and measured",
        "",
        "Made by `python -m bench.topology --write` from `cases.yaml`. A ratio is a further",
        "shape's figure over the first one's. `left out` is the ratio under constants of links",
        "that were fitted to all other sources; `as shipped` under those of",
        "`presets/engines/throughput.yaml`.",
        "",
        f"{len(cases)} cases of {sources} sources, {len(judged)} judged. Each with its own source",
        f"left out: the measured winner is first in **{won} of {len(clear)}** cases that no other",
        f"contradicts; median absolute log-ratio **{median(errors):.3f}** of {len(errors)} ratios",
        f"(bar {_MOST}). As shipped: {median(_errors(shipped[c.id] for c in judged)):.3f}.",
        "",
        "| case | cards | at once, in/out | measured | left out | as shipped | winner |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for case in cases:
        mine, other = shipped[case.id], others.get(case.id)
        cards = " : ".join(f"{shape.cards.partition(',')[0]} tp{shape.tp}" for shape in case.shapes)
        word = "not judged" if other is None else "first" if other.won else "**not first**"
        if case.id in against:
            word += " (contradicted)"
        lines.append(
            f"| {case.id} | {cards} | {case.at_once}, {case.input}/{case.output}"
            f" | {_ratios(mine.measured)} | {_ratios(other.forecast) if other else ''}"
            f" | {_ratios(mine.forecast)} | {word} |"
        )
    lines += ["", "## What the cases take for granted, and why some are not judged", ""]
    lines += [f"- **{case.id}**, {case.source}, {case.engine}{_notes(case)}" for case in cases]
    return "\n".join(lines) + "\n", met


def _errors(scores: Iterable[Score]) -> list[float]:
    return [abs(error) for one in scores for error in one.errors]


def _ratios(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _notes(case: Case) -> str:
    said = []
    for name, words in (
        ("host", "host: {}"), ("assumed", "assumed: {}"), ("left_out", "not judged: {}"),
        ("contradicts", "contradicts {}"),
    ):  # fmt: skip
        if getattr(case, name):
            said.append(words.format(getattr(case, name)))
    return ". " + "; ".join(said) + "." if said else "."


def main() -> int:
    """Exit 1: the bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.topology", description=__doc__)
    parser.add_argument("--fit", action="store_true", help="constants fitted to all judged cases")
    parser.add_argument("--write", action="store_true", help="renew RESULTS.md")
    args = parser.parse_args()
    if args.fit:
        found = fit([case for case in read_cases() if not case.left_out], rates(FITTED))
        for name in FITTED:
            print(f"{name}: {getattr(found, name):.4g} (shipped {getattr(rates(), name):.4g})")
        return 0
    text, met = report()
    if args.write:
        (HERE / "RESULTS.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())

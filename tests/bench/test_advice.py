"""`bench/advice`: the page is what its commands say now, and docs/cases.md quotes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.advice.__main__ import HERE, main
from bench.advice.cases_page import recipes, renewed
from bench.advice.compute import Case, Line, computed, run, words
from bench.advice.report import judged, report, short_rows

CASES_PAGE = Path(__file__).parents[2] / "docs" / "cases.md"


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return list(computed())


def line(cases: list[Case], advice: str, case: int) -> Line:
    return next(one for one in cases[case].lines if one.advice == advice)


def test_results_are_what_the_commands_say(cases):
    assert (HERE / "RESULTS.md").read_text() == report(cases), "run python -m bench.advice --write"


def test_it_prints_what_it_writes(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out == (HERE / "RESULTS.md").read_text()


def test_the_page_of_cases_says_the_same(cases):
    text = CASES_PAGE.read_text()
    assert renewed(text, cases) == text, "run python -m bench.advice --write"
    assert sum(row in text for row in short_rows(cases)) >= 10
    assert len(recipes(text)) >= 8


def test_figures_of_a_readme_that_lags_are_renewed(cases):
    row = next(row for row in short_rows(cases) if "ratio 0.4" in row)
    recipe = (
        "| a | `plan cogvlm-17b --on 2xrtx3090` | one model: 1 KV tokens, 2 MiB stay free | x |"
    )
    said = run("plan cogvlm-17b --on 2xrtx3090").plan
    lagging = f"words\n{row.replace('lives', 'dies')}\n{recipe}\n| other | row |\n"
    words_, quoted, cooked, other = renewed(lagging, cases).splitlines()
    assert (words_, quoted, other) == ("words", row, "| other | row |")
    assert f"{said.kv.total_tokens:,} KV tokens, " in cooked
    assert " 2 MiB stay free" not in cooked


def test_what_others_hold_gives_the_log_of_the_report(cases):
    typed = line(cases, "turbofit, cards as they were", 0).command.removeprefix("plan ")
    cards = run(f"predict {typed} --max-dynamic-patch 12")
    log = cases[0].before.said
    assert cards.plan is not None
    assert log.plan is not None
    assert words(cards) == words(log)
    assert cards.plan.kv.tokens == log.plan.kv.tokens


def test_verdicts_follow_from_what_was_computed(cases):
    for case in cases:
        for one in case.lines:
            said = judged(case, one)
            lives = one.said.serves
            assert lives == words(one.said).startswith("lives")
            if "no help" in said or "not enough" in said:
                assert not lives
            if said.startswith("helps"):
                assert lives
                assert not case.before.said.serves
            assert (one.said.code == 0) == (one.said.plan is not None and one.said.plan.fits)


def test_our_plans_keep_their_margin_and_lose_to_no_ratio(cases):
    for case in cases:
        for one in case.lines:
            if one.ours:
                assert one.said.plan is not None
                assert all(gpu.headroom >= gpu.margin for gpu in one.said.plan.gpus)
            if one.against:
                other = line(cases, one.against, cases.index(case))
                assert one.said.tokens >= other.said.tokens
    ratios = [line(cases, f"ratio {r}", 1).said for r in ("0.5", "0.4", "0.2")]
    assert [one.tokens for one in ratios] == sorted((o.tokens for o in ratios), reverse=True)

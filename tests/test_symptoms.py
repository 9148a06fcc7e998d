"""docs/troubleshooting.md says what `diagnose` and the gateway say."""

from __future__ import annotations

from collections import Counter

from scripts.symptoms import PAGE, refused, renewed, rule_kinds, symptoms
from turbofit.cli.manual import EXIT_CODES

#: Answers of `diagnose` to a log without a failure.
NO_FAILURE = {"healthy", "memory_table"}
SYMPTOMS = list(symptoms())


def test_the_tables_are_what_the_program_says() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert renewed(text) == text, "run python scripts/symptoms.py"


def test_every_kind_of_answer_has_a_message() -> None:
    assert {one.kind for one in SYMPTOMS} == rule_kinds() - NO_FAILURE


def test_a_message_stands_once() -> None:
    assert [one for one, times in Counter(s.message for s in SYMPTOMS).items() if times > 1] == []


def test_every_refusal_is_found() -> None:
    codes = {one.code for one in refused()}
    assert len(codes) > 50
    assert {"convicted", "engine_resting", "image_too_large", "too_many_connections"} <= codes


def test_every_exit_code_of_a_failure_is_explained() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for code in EXIT_CODES:
        assert code in (0, 1, 2, 130) or f"\n| {code} |" in text

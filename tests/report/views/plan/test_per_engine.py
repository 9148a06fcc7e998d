from __future__ import annotations

import pytest

import turbofit
from turbofit.machine.source import machine_from
from turbofit.report.painters import markdown, terminal
from turbofit.report.painters.document import Code
from turbofit.report.views.figures import differing, per_engine_blocks
from turbofit.report.views.plan_view import plan_view

TITLE = "Settings of each engine's own"


def test_only_what_differs_is_shown_for_each_engine() -> None:
    plan = turbofit.plan("internvl2-8b-awq", on="rtx3090+rtx4080")
    assert differing(plan) == ("cache_max_entry_count", "max_batch_size")
    text = terminal.paint([block for block in plan_view(plan) if not isinstance(block, Code)])
    assert max(map(len, text.splitlines())) <= 80
    group_plan = text[text.index(TITLE) : text.index("Considered")]
    for one in plan.by_group:
        assert f"{one.settings.cache_max_entry_count:.3f}" in group_plan
        assert f"{one.kv.tokens:,}" in group_plan
    assert "session_len" not in group_plan
    rows = [line for line in text.splitlines() if line.startswith("  cache_max_entry_count")]
    assert "see below" in rows[0]
    assert f"at least {plan.kv.tokens:,} tokens" in text
    assert TITLE in markdown.paint(plan_view(plan))


@pytest.mark.parametrize("on", ["rtx3090+rtx4090+l4+a100-40g", "2xrtx3090+rtx4090"])
def test_equal_engines_share_a_column_and_eighty_columns_hold_them(on: str) -> None:
    cards = len(machine_from(on).gpus)
    plan = turbofit.plan("internvl2-2b", on=on, replicas=cards)
    text = terminal.paint(per_engine_blocks(plan))
    assert max(map(len, text.splitlines())) <= 80
    heads = [line for line in text.splitlines() if "each engine " in line]
    assert sum(line.count("GPU") for line in heads) == len(plan.unlike_groups())


def test_a_candidate_shows_the_span_of_its_engines_settings() -> None:
    plan = turbofit.plan("internvl2-8b-awq", on="rtx3090+rtx4080")
    batches = sorted(group_plan.settings.max_batch_size for group_plan in plan.by_group)
    text = terminal.paint(plan_view(plan))
    chosen = next(line for line in text.splitlines() if line.endswith("  chosen"))
    assert f" {batches[0]}-{batches[1]} " in chosen

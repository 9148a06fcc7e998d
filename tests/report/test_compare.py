from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.report.documents import planned
from turbofit import api
from turbofit.cli.main import main
from turbofit.report.compare import compare, compare_view, folded
from turbofit.report.painters.document import Table
from turbofit.report.painters.terminal import paint
from turbofit.report.stored_documents import StoredPlan

Out = pytest.CaptureFixture[str]


def saved(kind: str) -> StoredPlan:
    return StoredPlan(planned(kind), None, f"{kind}.json")


def test_settings_of_each_unequal_engine_are_compared() -> None:
    a = saved("mixed cards")
    group_plans = list(a.plan.by_group)
    group_plans[1] = replace(
        group_plans[1], settings=replace(group_plans[1].settings, max_batch_size=77)
    )
    found = compare(a, a._replace(plan=replace(a.plan, by_group=tuple(group_plans))))
    differing = {row.what: row.b for row in found.rows if not row.same}
    changed = sum(one.settings.max_batch_size for one in group_plans)
    assert differing == {"max_batch_size, engine 1": "77", "concurrency": changed}


def test_what_differs_is_side_by_side_with_the_difference() -> None:
    a, b = saved("served"), saved("died")
    found = compare(a, b)
    rows = {(row.section, row.what): row for row in found.rows}
    ratio = rows["Settings", "cache_max_entry_count"]
    assert (ratio.a, ratio.b) == (f"{a.plan.settings.cache_max_entry_count:.3f}", "0.800")
    tokens = rows["What it holds", "KV tokens"]
    assert (tokens.a, tokens.b) == (a.plan.kv.total_tokens, b.plan.kv.total_tokens)
    cache = rows["GPU 0", "kv_cache"]
    assert cache.unit == "bytes"
    assert rows["What it holds", "rehearsal"].b == "out_of_memory"
    text = paint(compare_view(found))
    assert f"{b.plan.kv.total_tokens - a.plan.kv.total_tokens:+,}" in text


def test_the_command(tmp_path: Path, capsys: Out) -> None:
    for kind in ("served", "died"):
        (tmp_path / f"{kind}.json").write_text(planned(kind).to_json())
    words = ["compare", str(tmp_path / "served.json"), str(tmp_path / "died.json")]
    assert main(words) == 0
    assert "A and B" in capsys.readouterr().out
    assert main([*words, "--md"]) == 0
    assert capsys.readouterr().out.startswith("# A and B")
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "turbofit.compare/1"
    assert main(["compare", words[1], str(tmp_path / "none.json")]) == 2


def test_many_gpus_that_differ_leave_the_promise() -> None:
    four = "+".join(f"rtx3090:used={number}GiB" for number in range(1, 5))
    a, b = (StoredPlan(api.plan("internvl2-8b", on=on), None, on) for on in ("1xl4", four))
    text = paint(compare_view(compare(a, b)), short=True)
    assert len(text.splitlines()) <= 25
    assert text.index("KV tokens") < text.index("replicas") < text.index("GPU 0: in use")
    assert "GPU 2: left then" in text
    assert "GPU 3" not in text


def test_gpus_that_differ_alike_are_counted_once() -> None:
    a, b = (
        StoredPlan(api.plan("internvl2-8b", on="4xrtx3090", tp=4, context=context), None, "x")
        for context in (32768, 8192)
    )
    found = compare(a, b)
    differ = [row for rows in folded(found.rows).values() for row in rows if not row.same]
    (table,) = (block for block in compare_view(found) if block.short and isinstance(block, Table))
    left = len(differ) - len(table.rows)
    assert f"{left} more figures differ" in paint(compare_view(found), short=True)
    assert len(differ) < sum(not row.same for row in found.rows)

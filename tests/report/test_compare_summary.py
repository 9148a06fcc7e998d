from __future__ import annotations

import pytest
from msgspec.structs import replace

import turbofit
from turbofit import api
from turbofit.report.compare import Comparison, compare, compare_summary, folded
from turbofit.report.painters.document import Table
from turbofit.report.painters.terminal import paint
from turbofit.report.stored_documents import StoredPlan


def compared(a: str, b: str) -> Comparison:
    one, other = (
        StoredPlan(turbofit.plan("internvl2-8b", on=on), None, f"{on}.json") for on in (a, b)
    )
    return compare(one, other)


@pytest.mark.parametrize(
    ("a", "b"),
    [("4xrtx3090", "2xrtx4090"), ("rtx3090+rtx4090", "1xl4"), ("1xrtx3060", "8xh100")],
)
def test_it_fits_a_terminal(a: str, b: str) -> None:
    found = compared(a, b)
    lines = paint(compare_summary(found)).splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 80
    assert lines[-1].endswith("all of them: --full, --md or --json")
    differ = sum(not row.same for _, rows in folded(found.rows) for row in rows)
    assert differ - 20 < int(lines[-1].split()[0]) < differ


def test_what_matters_comes_first() -> None:
    text = paint(compare_summary(compared("4xrtx3090", "2xrtx4090")))
    assert "A: InternVL2-8B on 4xrtx3090 (4xrtx3090.json): fits" in text
    assert text.index("KV tokens") < text.index("replicas") < text.index("GPU 0-1: in use at most")
    assert "\n  answers a request " in text


def test_why_one_does_not_fit_is_told() -> None:
    found = compared("1xrtx3060", "1xrtx3090")
    assert found.a.verdict in " ".join(paint(compare_summary(found)).split())


def test_many_gpus_that_differ_leave_the_promise() -> None:
    eight = "+".join(f"rtx3090:used={number}GiB" for number in range(1, 9))
    text = paint(compare_summary(compared("1xl4", eight)))
    assert text.index("KV tokens") < text.index("replicas") < text.index("GPU 0: in use")
    assert "GPU 2: left then" in text
    assert "GPU 3" not in text


def test_where_all_is_shown_nothing_more_is_promised() -> None:
    found = compared("1xl4", "1xl4")
    first, *rest = found.rows
    one = replace(found, rows=(replace(first, b="another"), *rest))
    text = paint(compare_summary(one))
    assert "another" in text
    assert "more figures differ" not in text


def test_equal_plans() -> None:
    text = paint(compare_summary(compared("1xl4", "1xl4")))
    assert text.endswith("nothing differs\n")


def test_gpus_that_differ_alike_are_counted_once() -> None:
    a, b = (
        StoredPlan(api.plan("internvl2-8b", on="4xrtx3090", tp=4, context=context), None, "x")
        for context in (32768, 8192)
    )
    found = compare(a, b)
    differ = [row for _, rows in folded(found.rows) for row in rows if not row.same]
    (table,) = (block for block in compare_summary(found) if isinstance(block, Table))
    left = len(differ) - len(table.rows)
    assert f"{left} more figures differ" in paint(compare_summary(found))
    assert len(differ) < sum(not row.same for row in found.rows)

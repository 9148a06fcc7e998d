"""The tables: choices say what `turbofit plan --json` says."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from tests.report.fit_site.sites import drawn, planned
from tests.sweep import part
from turbofit.core.plan import Plan
from turbofit.report.fit_site.choices import SiteChoices, SiteRequest, choices_of, points
from turbofit.report.fit_site.tables import SiteTable, table_of
from turbofit.report.views.plan.memory_view import stack, sums

#: What a plan says when it says no: nothing of what it would have served.
NOTHING = {
    "kv_tokens": 0, "requests_at_once": 0, "held": (), "throughput": None, "limit_costs": ()
}  # fmt: skip


@pytest.mark.slow
def test_choices_are_what_plan_says(
    site: Path, choices: SiteChoices, capsys: pytest.CaptureFixture[str]
) -> None:
    for chosen in drawn(choices, part(200, 8)):
        script = (site.parent / "data" / chosen.model / f"{chosen.card}.js").read_text()
        document = script.removeprefix("turbofitTable(").removesuffix(");\n")
        table = msgspec.json.decode(document, type=SiteTable)
        assert len(table.order) == len(list(points(choices)))
        plan = planned(chosen.command(), capsys)
        _compare(table, table.order[chosen.place(choices)], plan)


def _compare(table: SiteTable, place: int, plan: dict[str, object]) -> None:
    answer = table.answers[place]
    if "error" in plan:
        assert answer.memory is None
        return
    document = json.loads(json.dumps(plan))
    assert answer.verdict == document["verdict"]
    assert answer.fits == document["fits"]
    assert answer.context == document["settings"]["session_len"]
    assert answer.tp == document["parallel"]["tp"]
    assert [*answer.warnings] == document["warnings"]
    assert [[one.change, one.effect] for one in answer.remedies] == [
        [one["change"], one["effect"]] for one in document["remedies"][:3]
    ]
    assert answer.memory is not None
    fullest = min(document["gpus"], key=lambda gpu: gpu["headroom"])
    assert answer.memory.headroom == fullest["headroom"]
    assert answer.memory.total == fullest["total"]
    assert answer.memory.need == max(fullest["peak"], fullest["load_peak"])
    ledger = Plan.from_json(json.dumps(plan)).gpus[document["gpus"].index(fullest)]
    sizes = sums(stack(ledger))
    assert answer.memory.pieces == sizes
    if not answer.fits:
        assert {name: getattr(answer, name) for name in NOTHING} == NOTHING
        return
    assert answer.kv_tokens == document["kv"]["total_tokens"]
    assert answer.throughput is not None
    assert answer.throughput.requests_per_second == document["throughput"]["requests_per_second"]
    costs = [(one["option"], one["kv_tokens"]) for one in document["limit_costs"]]
    assert [(one.option, one.kv_tokens) for one in answer.limit_costs] == costs


def test_a_refusal_is_an_answer_too() -> None:
    """So many images fit no context of the model: no plan, but an answer."""
    request = SiteRequest.of(
        models=("llava-1.5-7b",), cards=("rtx4090",), counts=(1,), used=(0,),
        images=((99, None),), contexts=(4096,), concurrencies=(8,),
    )  # fmt: skip
    table = table_of(choices_of(request, "today"), "llava-1.5-7b", "rtx4090")
    said = table.answers[table.order[-1]].verdict
    assert not table.answers[table.order[-1]].fits
    assert "99" in said

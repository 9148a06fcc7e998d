"""Several models on one card, for people."""

from __future__ import annotations

from turbofit.core.units import parse_bytes
from turbofit.planning.joint_plan import joint_plan
from turbofit.planning.request import PlanRequest
from turbofit.report.painters.markdown import paint
from turbofit.report.views.several_view import joint_view


def painted(*models: str) -> str:
    requests = [PlanRequest(model=name, on="1xrtx3090") for name in models]
    return paint(joint_view(joint_plan(requests), models))


def test_a_card_with_every_model() -> None:
    text = painted("internvl2-1b", "internvl2-2b")
    rows = [line for line in text.splitlines() if line.startswith("| InternVL2")]
    assert len(rows) == 4
    table = text[text.index("MiB at the worst") :]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("| ") and "---" not in line
    ]
    last = {row[0]: float(row[-1].replace(",", "")) for row in cells[1:] if row[-1]}
    card = last.pop("the card")
    assert abs(sum(last.values()) - card) < 1


def test_the_budgets_as_they_stand_there_do_not_go_beyond_the_card() -> None:
    found = joint_plan(
        [PlanRequest(model=name, on="1xrtx3090") for name in ("internvl2-2b", "qwen2-vl-2b")]
    )
    rows = [line.split("|") for line in paint(joint_view(found, ("a", "b"))).splitlines()]
    budgets = [parse_bytes(row[2]) for row in rows if len(row) > 2 and row[2].endswith("iB ")]
    (card,) = found.gpus
    assert len(budgets) == 2
    assert sum(found.budgets) - (2 << 20) < sum(budgets) <= card.total - card.reserved - card.used

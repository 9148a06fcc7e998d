"""Several models on one card, for people."""

from __future__ import annotations

from turbofit.planning.joint_plan import joint_plan
from turbofit.planning.request import PlanRequest
from turbofit.report.painters.markdown import paint
from turbofit.report.views.plan.joint_view import joint_view


def painted(*models: str) -> str:
    requests = [PlanRequest(model=name, on="1xrtx3090") for name in models]
    return paint(joint_view(joint_plan(requests)))


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


def test_what_is_short_and_what_helps() -> None:
    text = painted("internvl2-8b", "qwen2-vl-7b")
    assert "do not fit together" in text
    assert "--swap" in text

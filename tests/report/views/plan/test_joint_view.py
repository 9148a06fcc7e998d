"""Several models on one card, for people."""

from __future__ import annotations

from turbofit.core.units import parse_bytes
from turbofit.planning.joint_plan import joint_plan
from turbofit.planning.request import PlanRequest
from turbofit.report.painters import terminal
from turbofit.report.painters.markdown import paint
from turbofit.report.views.plan.joint_view import joint_view


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


def test_what_is_short_and_what_helps() -> None:
    text = painted("internvl2-8b", "qwen2-vl-7b")
    assert "do not fit together" in text
    assert "--swap" in text


def test_the_budgets_as_they_stand_there_do_not_go_beyond_the_card() -> None:
    found = joint_plan(
        [PlanRequest(model=name, on="1xrtx3090") for name in ("internvl2-2b", "qwen2-vl-2b")]
    )
    rows = [line.split("|") for line in paint(joint_view(found, ("a", "b"))).splitlines()]
    budgets = [parse_bytes(row[2]) for row in rows if len(row) > 2 and row[2].endswith("iB ")]
    (card,) = found.gpus
    assert len(budgets) == 2
    assert sum(found.budgets) - (2 << 20) < sum(budgets) <= card.total - card.reserved - card.used


def test_the_summary_of_a_card_that_is_too_small_and_of_a_path_with_a_space() -> None:
    def summary(*models: str, names: tuple[str, ...]) -> str:
        requests = [PlanRequest(model=name, on="1xrtx3090") for name in models]
        return terminal.paint(joint_view(joint_plan(requests), names), short=True)

    names = ("internvl2-8b", "qwen2-vl-7b")
    text = summary(*names, names=names)
    assert "GPU 0 lacks 14.0 GiB" in text
    assert "-14.0" not in text
    text = summary("internvl2-1b", "internvl2-2b", names=("internvl2-1b", "internvl2-2b"))
    assert "turbofit serve internvl2-1b internvl2-2b --context 32768" in text
    unlike = [
        PlanRequest(model="internvl2-1b", on="1xrtx3090", context=4096),
        PlanRequest(model="internvl2-2b", on="1xrtx3090"),
    ]
    text = terminal.paint(joint_view(joint_plan(unlike), ("./my vl", "internvl2-2b")), short=True)
    assert "next: turbofit serve './my vl' internvl2-2b, with the same options" in text

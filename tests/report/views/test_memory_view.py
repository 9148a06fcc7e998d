"""Bars and ledgers of memory."""

from __future__ import annotations

import msgspec

import turbofit
from turbofit.core.memory_stack import memory_label
from turbofit.core.messages import indices
from turbofit.core.units import GIB, MIB, format_bytes
from turbofit.report.painters.document import Bar, BarPiece
from turbofit.report.painters.terminal import END, OVER, cells, legend
from turbofit.report.views.memory_view import memory_bar, memory_blocks


def test_a_budget_is_drawn_to_its_end_and_is_no_margin() -> None:
    plan = turbofit.plan("qwen2-vl-2b", on="1xrtx4090", budget="16GiB")
    (gpu,) = plan.ledgers
    assert gpu.budget == 16 * GIB
    drawn = next(block for block in memory_blocks(plan) if isinstance(block, Bar))
    assert drawn.need == drawn.room == gpu.total - gpu.beyond_budget
    assert next(part.bytes for part in drawn.parts if part.kind == "margin") == 256 * MIB
    assert "of a budget of 16.0 GiB in use" in drawn.title
    left = f"{format_bytes(gpu.headroom - gpu.beyond_budget)} of the budget stay free"
    assert left in plan.verdict
    short = turbofit.plan("qwen2.5-vl-7b", on="1xrtx4090", budget="16GiB")
    assert "short of the budget of 16.0 GiB" in short.verdict
    assert "margin" not in short.verdict
    drawn = next(block for block in memory_blocks(short) if isinstance(block, Bar))
    assert legend(drawn)[-1].endswith("=more than the budget has")
    (whole,) = turbofit.plan("qwen2-vl-2b", on="1xrtx4090").ledgers
    assert whole.budget is None
    assert b"withheld" not in msgspec.json.encode(whole)


def bar(*sizes: int, room: int = 100) -> Bar:
    parts = tuple(
        BarPiece(mark="abcdefgh"[i], name="n", bytes=size) for i, size in enumerate(sizes)
    )
    return Bar(title="GPU 0", room=room, parts=parts)


def test_every_part_has_a_letter_and_the_sizes_their_share() -> None:
    drawn = "".join(cells(bar(1, 59, 40), 20))
    assert len(drawn) == 20
    assert set(drawn) == set("abc")
    assert drawn == "".join(sorted(drawn))
    assert abs(drawn.count("b") - 12) <= 1
    assert drawn.count("a") == 1
    assert cells(bar(), 10) == []


def test_what_the_card_does_not_have_is_behind_its_end() -> None:
    drawn = "".join(cells(bar(50, 150), 41))
    assert len(drawn) == 41
    inside, outside = drawn.split(END)
    assert set(outside) == {OVER}
    assert abs(len(inside) - len(outside)) <= 1
    assert legend(bar(50, 150))[-1] == "!=more than the card has"


def test_indices() -> None:
    assert [indices(gpus) for gpus in ((), (3,), (2, 0, 1))] == ["", "3", "0-2"]
    assert indices((0, 2, 3, 5)) == "0,2-3,5"


def test_memory_in_use_before_the_cache_is_nobody_s_and_the_verdict_alone_has_a_shortage():
    """A log's free memory does not tell the engine's own weights from what others hold."""
    plan = turbofit.predict("internvl2-26b", on="4xrtx4090", tp=4, free_at_cache="6GiB")
    drawn = memory_bar(plan.ledgers[0], memory_label(plan.ledgers[0]))
    names = {part.kind: part.name for part in drawn.parts}
    assert names["before"] == "in use before the cache"
    assert "weights" not in names
    assert "short)" in plan.verdict
    assert drawn.title.endswith("more than there is")
    assert "B more" not in " ".join(legend(drawn))

"""Links to sections lead somewhere; the accounts' documents name every term of a ledger."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import turbofit.api
from scripts.symptoms import anchors

DOCS = Path(__file__).parents[1] / "docs"
LEDGERS: list[dict[str, Any]] = [
    {"model": "internvl2-8b", "on": "1xrtx3090"},
    {"model": "internvl2-8b", "on": "1xv100-32g"},
    {"model": "internvl2-8b", "on": "4xrtx3090,nvlink=0-1+2-3", "tp": 4},
    {"model": "qwen2-vl-7b-awq", "on": "1xl4:free=19GiB"},
    {"model": "qwen2.5-7b", "on": "1xrtx4090"},
    {"model": "internvl2-2b", "on": "1xrtx3090", "enable_prefix_caching": True},
]


def named() -> set[str]:
    """Terms in back ticks; `.lm_head` beside `weights.embedding` is `weights.lm_head`."""
    found = set[str]()
    for line in (DOCS / "turbomind.md").read_text().splitlines():
        words = re.findall(r"`([\w.]+)`", line)
        head = next((word.split(".")[0] for word in words if "." in word[1:]), "")
        found |= {head + word if word.startswith(".") else word for word in words}
    return found


@pytest.mark.parametrize("options", LEDGERS, ids=lambda options: f"{options['model']}")
def test_every_term_of_turbominds_ledger_is_explained(options: dict[str, Any]) -> None:
    plan = turbofit.api.plan(**{"engine": "turbomind", **options})
    terms = {term.term for gpu in plan.gpus for term in gpu.ledger}
    assert len(terms) > 20
    assert terms <= named()


def test_links_to_sections_lead_somewhere() -> None:
    found = 0
    for page in (*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([\w./-]*\.md)?#([\w-]+)\)", text):
            assert anchor in anchors(page.parent / target if target else page), (page.name, anchor)
            found += 1
    assert found >= 20

"""What every ledger keeps: its lines add up, and the ratio is the largest that fits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

import turbofit
from tests.memory.conftest import Case, card, check_ledger, machine_of
from tests.sweep import part
from turbofit.core.units import MIB

ROOT = Path(__file__).parents[2]
MODELS = ["internvl2-8b", "internvl2-8b-awq", "qwen2-vl-7b", "internvl2-2b", "qwen2-vl-2b"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])
def test_a_ledger_adds_up(model, ratio):
    for ledger in Case(model, 2, margin=256).account(units=13).ledgers_at(ratio):
        check_ledger(ledger)


@given(
    model=st.sampled_from(MODELS),
    total=st.integers(8000, 90000),
    used=st.integers(0, 6000),
    prefill=st.sampled_from([1024, 2048, 4096, 8192]),
    batch=st.integers(1, 300),
    units=st.integers(0, 13),
)
@settings(max_examples=part(120, 5))
def test_one_thousandth_more_does_not_fit(model, total, used, prefill, batch, units):
    machine = replace(machine_of(1), gpus=(card(total=total, used=used),))
    account = Case(model, margin=256).account(
        units, machine, max_prefill_token_num=prefill, max_batch_size=batch
    )
    ratio = account.best_ratio()
    if ratio is None:
        assert not account.fits_at(0.001)
        return
    assert 0 < ratio < 1
    assert account.fits_at(ratio)
    assert all(ledger.fits for ledger in account.ledgers_at(ratio))
    if ratio < 0.999:
        assert not account.fits_at(round(ratio + 0.001, 3))


def test_what_the_cache_is_sized_by():
    # The fullest GPU of a group.
    machine = replace(machine_of(2), gpus=(card(0), card(1, used=5000)))
    ledgers = Case("internvl2-8b", 2).account(13, machine).ledgers_at(0.5)
    assert len({t.bytes for ledger in ledgers for t in ledger.terms if t.term == "kv_cache"}) == 1
    assert ledgers[0].headroom > ledgers[1].headroom
    # A users' log replaces everything before it: 2780 MiB free, 2224 for the cache at 0.8.
    logged = Case("internvl2-8b", 4).account(25, free=2780 * MIB)
    assert (logged.free, logged.region_at(0.8)) == (2780 * MIB, 2224 * MIB)
    assert [t.term for t in logged.ledgers_at(0.8)[0].terms if t.phase == "before"] == [
        "before_cache"
    ]


#: Launches whose ledgers have, together, every term of the newest accounts except `UNSEEN`.
LAUNCHES = {
    "turbomind": [
        ("internvl2-8b", "2xrtx3090", {"tp": 2}), ("qwen2-vl-7b", "1xh100", {}),
        ("qwen3.5-9b", "1xh100", {}), ("internvl2-8b-awq", "1xrtx3090", {"dtype": "float16"}),
        ("gpt-oss-20b", "1xh100", {}), ("qwen3.5-27b-gptq-int4", "1xh100", {}),
    ],
    "pytorch": [
        ("internvl2-8b", "2xrtx3090", {"tp": 2}), ("qwen3.5-9b", "1xh100", {}),
        ("qwen2.5-7b-awq", "1xh100", {}), ("qwen3-omni-30b-a3b", "1xh200", {}),
        ("qwen3-vl-30b-a3b", "2xh100", {"tp": 2}),
    ],
}  # fmt: skip
#: Terms of adapters, of a draft, and of checkpoints that no preset describes.
UNSEEN = {
    "turbomind": set[str](),
    "pytorch": {
        "weights.adapters", "adapter_kernels", "weights.draft", "kv_cache.draft", "draft_graphs",
        "weights.unpacked",
    },
}  # fmt: skip


@pytest.mark.parametrize(("engine", "column"), [("turbomind", 2), ("pytorch", 3)])
def test_the_map_names_the_function_with_the_formula_of_each_term(engine: str, column: int) -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    table = page.split("## The formula of a term")[1].split("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    cells = {term: row[column] for row in rows for term in re.findall("`(.+?)`", row[1])}
    seen = set[str]()
    for model, on, options in LAUNCHES[engine]:
        plan = turbofit.predict(model, on=on, engine=engine, **options)
        for term in (term.term for ledger in plan.ledgers for term in ledger.terms):
            places = re.findall(r"`([\w/]+\.py)` \((.+?)\)", cells[term])
            assert places, term
            seen.add(term)
            for file, names in places:
                folder = ROOT / "turbofit" if "/" in file else ROOT / "turbofit/memory" / engine
                for name in re.findall(r"(\w+)`", names):
                    assert f"def {name}(" in (folder / file).read_text(), (term, file, name)
    # The column names no term that the engine's ledgers do not have.
    assert {term for term, cell in cells.items() if cell.strip()} - seen == UNSEEN[engine]

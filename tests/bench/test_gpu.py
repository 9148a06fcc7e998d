"""`bench.gpu`: runs of real cards are kept, and what no card shows, or is planted, is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from bench.gpu import table, trust
from bench.gpu.__main__ import main
from bench.gpu.check import impossible
from bench.gpu.held import hold
from bench.gpu.implied import implied, readings
from bench.gpu.results import Trial, trials
from turbofit.core.machine import Pcie
from turbofit.core.struct import to_json
from turbofit.core.units import MIB
from turbofit.report.share import SharedRun

KEPT = trials()
ONE = next(one.document for one in KEPT if "h200-internvl2-8b" in one.name)


@pytest.mark.parametrize("one", KEPT, ids=lambda one: one.name)
def test_what_a_card_showed_can_be(one: Trial) -> None:
    assert impossible(one.document) == []


def with_gpu(one: SharedRun, **facts: Any) -> SharedRun:
    return with_machine(one, gpus=(replace(one.plan.machine.gpus[0], **facts),))


def with_machine(one: SharedRun, **facts: Any) -> SharedRun:
    return replace(one, plan=replace(one.plan, machine=replace(one.plan.machine, **facts)))


def with_attempt(one: SharedRun, **facts: Any) -> SharedRun:
    attempts = (replace(one.run.attempts[0], **facts),)
    return replace(one, run=replace(one.run, attempts=attempts))


def with_used(one: SharedRun, used: int) -> SharedRun:
    seen, card = one.seen[0], one.seen[0].cards[0]
    changed = replace(card, used={**card.used, "sampling": used})
    return replace(one, seen=(replace(seen, cards=(changed,)),))


def with_context(one: SharedRun) -> SharedRun:
    """Its first step is the estimate."""
    context = next(t.bytes for t in one.plan.ledgers[0].terms if t.term == "cuda_context")
    first, second, *rest = one.run.attempts[0].moments
    changed = replace(second, used={"0": first.used["0"] + context})
    return with_attempt(one, moments=(first, changed, *rest))


def as_forecast(one: SharedRun) -> SharedRun:
    engine = one.run.attempts[0].engines[0]
    rows = tuple(replace(row, actual=row.forecast) for row in engine.beside)
    return with_attempt(one, engines=(replace(engine, beside=rows),))


FORGED = {
    "pretend ones": replace(ONE, run=replace(ONE.run, pretend=True)),
    "not measured: preset": with_machine(ONE, source="preset"),
    "NA is no version of a driver": with_machine(ONE, driver="NA"),
    "no version of LMDeploy": replace(ONE, run=replace(ONE.run, lmdeploy="")),
    "no GPU was read at any moment": with_attempt(ONE, moments=()),
    "bytes in use of": with_used(ONE, 200 << 30),
    "whole pages": with_used(ONE, ONE.seen[0].cards[0].used["sampling"] + 1),
    "less in use than its weights": with_used(ONE, ONE.seen[0].cards[0].before),
    "was calibrated, and read at no phase": replace(
        ONE, seen=(replace(ONE.seen[0], cards=(replace(ONE.seen[0].cards[0], used={}),)),)
    ),
    "was measured as it was forecast": as_forecast(ONE),
    "is off by whole MiB": replace(
        ONE, seen=(replace(ONE.seen[0], free=(ONE.seen[0].free or 0) - 36107716 + 36 * MIB),)
    ),
    "took what the preset says, to the byte": with_context(ONE),
    "larger than what was free": replace(ONE, seen=(replace(ONE.seen[0], free=MIB),)),
    "over its PCIe link": with_gpu(ONE, pcie=Pcie(generation=1, width=1)),
    "its GPUs, groups": replace(
        ONE, plan=replace(ONE.plan, engines=(replace(ONE.plan.engines[0], ledgers=()),))
    ),
}


@pytest.mark.parametrize("why", FORGED)
def test_what_no_card_shows_is_refused(why: str) -> None:
    assert any(why in reason for reason in impossible(FORGED[why])), impossible(FORGED[why])


def test_files_are_checked_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "accuracy.md"
    page.write_text(table.PAGE.read_text())
    monkeypatch.setattr(table, "PAGE", page)
    for module in ("__main__", "results"):
        monkeypatch.setattr(f"bench.gpu.{module}.OBSERVATIONS", tmp_path / "observations")
    good, bad, none = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "none.json"
    good.write_text(to_json(ONE))
    bad.write_text(to_json(FORGED["pretend ones"]))
    none.write_text("{}")
    assert main(["check", str(good)]) == 0
    assert main(["check", str(good), str(bad), str(none), str(tmp_path / "gone")]) == 1
    said = capsys.readouterr().out
    words = (f"{bad}: it says itself", f"{none}: ", f"{tmp_path / 'gone'}: ")
    assert [text for text in words if text not in said] == []
    assert main(["fold", str(good), str(bad)]) == 1
    (file,) = (tmp_path / "observations").iterdir()
    assert file.name == "nvidia-h200-internvl2-8b-turbomind-2026-11-26.json"
    assert "InternVL2-8B | turbomind | +199 MiB, 0.14% of the card" in page.read_text()
    (kept,) = trials()
    assert kept.preset == "h200"


def test_a_card_without_a_preset_and_a_run_without_a_calibration_have_rows() -> None:
    new = with_gpu(replace(ONE, seen=()), name="NVIDIA New 1")
    assert "No preset knows this card" in hold([Trial("new", new)])
    engines = [replace(engine, beside=()) for engine in ONE.run.attempts[0].engines]
    for one, peak in (
        (new, "+199 MiB, 0.14% of the card"),
        (with_attempt(new, engines=tuple(engines)), "no calibration in it"),
    ):
        (row,) = [line for line in table.page([Trial("", one)]).splitlines() if "New 1" in line]
        assert row.startswith(f"| NVIDIA New 1 | InternVL2-8B | turbomind | {peak} |")


def test_the_page_has_the_tables_of_what_is_kept() -> None:
    text = table.PAGE.read_text(encoding="utf-8")
    assert text == table.page(KEPT), "run python -m bench.gpu table"
    first, _, _ = text.partition("<!-- end of how far to trust -->")
    assert len(first.splitlines()) < 24
    assert all(f"| {one.preset} | TurboMind: inside in" in first for one in KEPT)


@pytest.mark.parametrize(
    ("used", "told"),
    [
        (0, "TurboMind: inside in 1 of 1, +199 MiB"),
        (300 * MIB, "TurboMind: outside, -101 MiB (why is not known)"),
        (-900 * MIB, "TurboMind: outside, +1099 MiB (why is not known)"),
    ],
)
def test_a_peak_is_inside_if_it_is_over_by_little(used: int, told: str) -> None:
    (card,) = ONE.seen[0].cards
    more = {name: size + used for name, size in card.used.items()}
    seen = replace(ONE.seen[0], cards=(replace(card, used=more),))
    (row,) = [
        line
        for line in trust.trusted([Trial("", replace(ONE, seen=(seen,)))]).splitlines()
        if line.startswith("| h200 |")
    ]
    assert told in row


def test_what_lies_outside_has_its_reason() -> None:
    text = trust.trusted(KEPT)
    assert "outside, -728 MiB (torch keeps what it once reserved)" in text
    assert "why is not known" not in text


def test_what_a_real_card_implies_of_memory() -> None:
    of_card = [one for one in KEPT if one.preset == "h200"]
    seen = {one.key: one for one in implied(it for one in of_card for it in readings(one))}
    whole = {
        "context_mib.high": 527, "total_mib.value": 143_771, "sm_count.value": 132,
        "pool_growth.value.most": 333_444_547,
    }  # fmt: skip
    assert {name: round(seen[name].value) for name in whole} == whole
    assert round(seen["pool_growth.value.most"].lowest) == 266_335_683  # the larger counts
    assert seen["context_mib.high"].meaning == "holds"
    share = seen["pool_growth.value.share"]
    assert share.value == pytest.approx(0.2216, abs=1e-4)
    assert share.meaning == "over: cache is wasted"
    assert "`pool_growth.value.share` 0.3 → 0.2216 (over: cache is wasted)" in hold(of_card)

"""`bench.gpu`: shared runs of real cards are kept, and what no card shows is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from bench.gpu import ballast, table
from bench.gpu.__main__ import main
from bench.gpu.check import impossible
from bench.gpu.results import RESULTS, kept, observed
from turbofit.core.machine import Pcie
from turbofit.core.plan import Plan
from turbofit.core.run_report import RunReport
from turbofit.core.struct import decode, to_json
from turbofit.load.result import LoadResult
from turbofit.model.source import resolve_model
from turbofit.observe.calibration import Observation
from turbofit.report.share import SharedRun, shared_run

MIB = 1 << 20
STAGES = sorted(
    file for folder in ("h200", "h200-first") for file in (RESULTS / folder).glob("b-*-plan*.json")
)


def real(stage: Path) -> SharedRun:
    """A trial on an H200, as `share` would have told it."""
    run = kept(stage.parent, stage.stem, "run.json")
    plan = kept(stage.parent, stage.stem, "plan.json")
    assert run is not None
    assert plan is not None
    seen = msgspec.convert(json.loads(stage.read_text())["seen"], tuple[Observation, ...])
    return shared_run(Plan.from_json(plan), decode(run, RunReport, what="run"), seen)


ONE = real(RESULTS / "h200" / "b-internvl2-8b-turbomind-plan-23g.json")


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage.parent.name}-{stage.stem}")
def test_what_a_card_showed_can_be(stage: Path) -> None:
    assert impossible(real(stage)) == []


def with_gpu(one: SharedRun, **facts: Any) -> SharedRun:
    machine = one.plan.machine
    changed = replace(machine, gpus=(replace(machine.gpus[0], **facts),))
    return replace(one, plan=replace(one.plan, machine=changed))


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
    context = next(t.bytes for t in one.plan.gpus[0].ledger if t.term == "cuda_context")
    first, second, *rest = one.run.attempts[0].moments
    changed = replace(second, used={"0": first.used["0"] + context})
    return with_attempt(one, moments=(first, changed, *rest))


def as_forecast(one: SharedRun) -> SharedRun:
    engine = one.run.attempts[0].engines[0]
    rows = tuple(replace(row, actual=row.forecast) for row in engine.beside)
    return with_attempt(one, engines=(replace(engine, beside=rows),))


def fast(one: SharedRun, tokens: float) -> SharedRun:
    load = LoadResult(
        turbofit_version="0.1.0", created="2026-11-26", url="", model="m", load={}, seconds=60.0,
        begun=9, answered=9, requests_per_second=1.0, output_tokens_per_second=tokens, running=1.0,
    )  # fmt: skip
    return replace(one, loads=(load,))


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
    "its memory is not so fast": fast(ONE, 1e6),
    "its groups are of GPUs": replace(ONE, plan=replace(ONE.plan, gpus=())),
}


@pytest.mark.parametrize("why", FORGED)
def test_what_no_card_shows_is_refused(why: str) -> None:
    assert any(why in reason for reason in impossible(FORGED[why])), impossible(FORGED[why])


def test_a_load_that_the_memory_allows_can_be() -> None:
    assert impossible(fast(ONE, 500.0)) == []


def test_files_are_checked_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "accuracy.md"
    page.write_text(table.PAGE.read_text())
    monkeypatch.setattr(table, "PAGE", page)
    for module in ("__main__", "table"):
        monkeypatch.setattr(f"bench.gpu.{module}.OBSERVATIONS", tmp_path / "observations")
    good, bad, none = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "none.json"
    good.write_text(to_json(ONE))
    bad.write_text(to_json(FORGED["pretend ones"]))
    none.write_text("{}")
    assert main(["check", str(good)]) == 0
    assert main(["check", str(good), str(bad), str(none), str(tmp_path / "gone")]) == 1
    said = capsys.readouterr().out
    assert f"{bad}: it says itself" in said
    assert f"{none}: " in said
    assert f"{tmp_path / 'gone'}: " in said
    assert main(["fold", str(good), str(bad)]) == 1
    (file,) = (tmp_path / "observations").iterdir()
    assert file.name == "nvidia-h200-internvlchatmodel-turbomind-2026-11-26.json"
    assert "InternVLChatModel | turbomind | +199 MiB, 0.14% of the card" in page.read_text()
    assert observed(file).preset == "h200"


def test_a_card_without_a_preset_and_a_run_without_a_calibration_have_rows(tmp_path: Path) -> None:
    file = tmp_path / "new.json"
    file.write_text(to_json(with_gpu(replace(ONE, seen=()), name="NVIDIA New 1")))
    (row,) = [line for line in table.page([observed(file)]).splitlines() if "New 1" in line]
    assert row.startswith("| NVIDIA New 1 | InternVLChatModel | turbomind | no calibration in it |")


def test_the_page_has_the_table_of_what_is_kept() -> None:
    text = table.PAGE.read_text(encoding="utf-8")
    assert text == table.page(table.every()), "run python -m bench.gpu table"
    assert "nobody yet" in text


def test_less_than_two_mib_more_is_left() -> None:
    taken: list[int] = []
    held = ballast.hold(1000 * MIB, 3001 * MIB, taken.append)
    assert held == sum(taken) == 2000 * MIB
    assert max(taken) <= 256 * MIB


def test_a_twin_is_a_checkpoint_of_its_shapes(tmp_path: Path) -> None:
    from bench.gpu.twin import main as write_twin

    assert write_twin(["qwen2-vl-2b", str(tmp_path / "twin")]) == 0
    model, preset = resolve_model(str(tmp_path / "twin")), resolve_model("qwen2-vl-2b")
    assert model.parameters == preset.parameters

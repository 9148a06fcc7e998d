"""`bench.gpu`: runs of real cards are kept, and what no card shows, or is planted, is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from bench.gpu import ballast, held, implied, results, speeds, table
from bench.gpu.__main__ import main
from bench.gpu.check import impossible
from bench.gpu.implied import Implied
from bench.gpu.results import RESULTS, kept, observed
from turbofit.core.machine import Pcie
from turbofit.core.plan import Plan
from turbofit.core.run_report import RunReport
from turbofit.core.struct import decode, to_builtins, to_json
from turbofit.machine.source import machine_from
from turbofit.measure.load.result import LoadResult
from turbofit.model.source import resolve_model
from turbofit.planning.speed import rates
from turbofit.report.share import SharedRun, shared_run
from turbofit.serving.calibration import Observation

MIB = 1 << 20
STAGES = sorted(
    file for folder in ("h200", "h200-first") for file in (RESULTS / folder).glob("b-*-plan*.json")
)


def real(stage: Path) -> SharedRun:
    """A trial on an H200, as `report --share` would have told it."""
    run = kept(stage.parent, stage.stem, "run.json") or ""
    plan = kept(stage.parent, stage.stem, "plan.json") or ""
    seen = msgspec.convert(json.loads(stage.read_text())["seen"], tuple[Observation, ...])
    return shared_run(Plan.from_json(plan), decode(run, RunReport, what="run"), seen)


ONE = real(RESULTS / "h200" / "b-internvl2-8b-turbomind-plan-23g.json")


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage.parent.name}-{stage.stem}")
def test_what_a_card_showed_can_be(stage: Path) -> None:
    assert impossible(real(stage)) == []


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
    "its GPUs, groups, sizes": replace(ONE, plan=replace(ONE.plan, gpus=())),
}


@pytest.mark.parametrize("why", FORGED)
def test_what_no_card_shows_is_refused(why: str) -> None:
    assert any(why in reason for reason in impossible(FORGED[why])), impossible(FORGED[why])
    assert impossible(fast(ONE, 500.0)) == []  # a load that the memory allows


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
    assert row.startswith("| NVIDIA New 1 | InternVLChatModel | turbomind | +199 MiB, 0.14% ")
    engines = [replace(engine, beside=()) for engine in ONE.run.attempts[0].engines]
    silent = with_attempt(replace(ONE, seen=()), engines=tuple(engines))
    file.write_text(to_json(with_gpu(silent, name="NVIDIA New 1")))
    (row,) = [line for line in table.page([observed(file)]).splitlines() if "New 1" in line]
    assert "| no calibration in it |" in row


def test_the_page_has_the_table_of_what_is_kept() -> None:
    text = table.PAGE.read_text(encoding="utf-8")
    assert text == table.page(table.every()), "run python -m bench.gpu table"


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


#: Of prompts, batches, and tokens of an answer that were timed.
LENGTHS, BATCHES, TOKENS = (512, 2048, 8192, 30000), (1, 4, 16, 64), 128


def machine(folder: Path) -> Path:
    """A folder of results of one card, without any stage."""
    folder.mkdir(parents=True, exist_ok=True)
    found = dict(to_builtins(machine_from("1xh200")))
    for gpu in found["gpus"]:
        del gpu["uuid"]
    write(folder, "machine", machine=found, packages={"torch": "2.12.1", "lmdeploy": None})
    return folder


def write(folder: Path, name: str, **document: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"code": 0, **document}))


def found(folder: Path) -> dict[str, Implied]:
    """Constants by their keys."""
    one = results.load(folder)[0]
    every = implied.implied([*implied.memory_readings(one), *speeds.speed_readings(one)])
    return {one.key: one for one in every}


def marks(**figures: int) -> dict[str, Any]:
    return {"code": 0, "marks": [{"mark": name, "used": used} for name, used in figures.items()]}


def handles(each: int) -> dict[str, Any]:
    """cuBLAS: so much for each handle."""
    made = [
        {"mark": f"made_{n}", "handles": n, "took": n * each, "used": 0} for n in (1, 2, 5, 10, 15)
    ]
    done = [{"mark": f"used_{n}", "handles": n, "took": 15 * each, "used": 0} for n in (1, 15)]
    return {"code": 0, "marks": [{"mark": "base", "handles": 0, "took": 0}, *made, *done]}


def test_what_a_real_card_implies_of_memory() -> None:
    seen = found(RESULTS / "h200")
    whole = {
        "context_mib.low": 527, "context_mib.high": 527, "total_mib.value": 143_771,
        "sm_count.value": 132, "cublas_handle.value.hopper": 67_947_725,
        "torch_kernels.value": 105_646_653, "pool_granularity.value": 32 * MIB,
        "pool_growth.value.most": 352_318_915,
    }  # fmt: skip
    assert {name: round(seen[name].value) for name in whole} == whole
    assert seen["context_mib.low"].meaning == "told in notes, charged nowhere"
    assert round(seen["pool_growth.value.most"].lowest) == 278_918_595  # the larger counts
    share = seen["pool_growth.value.share"]
    assert share.value == pytest.approx(0.2443, abs=1e-4)
    assert share.meaning == "over: cache is wasted"


def test_a_planted_context_is_found(tmp_path: Path) -> None:
    folder = machine(tmp_path / "h200")
    plain, turbomind = marks(context=530 * MIB), marks(context=530 * MIB, first=612 * MIB)
    write(folder, "a-context", plain=plain, turbomind=turbomind)
    context = found(folder)["context_mib.high"]
    assert (context.now, context.value) == (527, 610)  # a page of the first piece is not its own
    assert context.meaning == "under: memory is not paid for"


def speed_document(model: str, memory: float, compute: float, layer: float) -> dict[str, Any]:
    """What an engine with these constants would show on an H200."""
    _, work = speeds._work(model)
    bandwidth, peak = 4.8e12, 989.4e12
    step = rates().step_seconds
    timed: list[dict[str, Any]] = []
    for length in LENGTHS:
        passes = -(-length // speeds.PREFILL)
        spent = speeds._prefill_flops(work, length) / peak / compute + passes * work.layers * layer
        timed.append({"mark": f"prefill_{length}", "rows": 1, "tokens": 1, "prompt": length,
                      "seconds": spent + step})  # fmt: skip
    for rows in BATCHES:
        prompt = 10
        read = work.read_bytes(rows) + rows * (prompt + (TOKENS - 1) / 2) * work.kv_bytes
        one = read / bandwidth / memory + work.layers * layer + step
        facts = {"rows": rows, "prompt": prompt}
        timed.append({"mark": f"first_{rows}", "tokens": 1, "seconds": 0.5, **facts})
        whole = 0.5 + (TOKENS - 1) * one
        timed.append({"mark": f"decode_{rows}", "tokens": TOKENS, "seconds": whole, **facts})
    return {"model": model, "marks": timed}


def test_each_planted_constant_of_speed_is_found(tmp_path: Path) -> None:
    folder = machine(tmp_path / "h200")
    for model in ("internvl2-8b", "qwen2-vl-2b"):
        write(folder, f"s-{model}-turbomind", **speed_document(model, 0.61, 0.83, 70e-6))
    seen = found(folder)
    assert seen["memory_efficiency.value"].value == pytest.approx(0.61, rel=1e-3)
    assert seen["memory_efficiency.value"].meaning == "forecast too fast"
    assert seen["compute_efficiency.value"].value == pytest.approx(0.83, rel=1e-3)
    assert seen["compute_efficiency.value"].meaning == "forecast too slow"
    assert seen["layer_seconds.value"].value == pytest.approx(70e-6, rel=1e-3)
    assert seen["layer_seconds.value"].meaning == "forecast too fast"
    # As the presets have it, nothing changes; one model alone does not tell layers from bytes.
    now = rates()
    (folder / "s-qwen2-vl-2b-turbomind.json").unlink()
    as_it_is = (now.memory_efficiency, now.compute_efficiency, now.layer_seconds)
    write(folder, "s-internvl2-8b-turbomind", **speed_document("internvl2-8b", *as_it_is))
    seen = found(folder)
    assert not any(one.changes for one in seen.values())
    assert "layer_seconds.value" not in seen
    rows = {part: (forecast, measured) for _, part, forecast, measured in speeds.beside(
        results.load(folder)[0])}  # fmt: skip
    for part in ("prefill_8192", "decode_4"):
        assert rows[part][0] == pytest.approx(rows[part][1], rel=1e-6)
    write(folder, "s-internvl2-8b-turbomind", **speed_document("internvl2-8b", 3.0, 0.5, 4e-5))
    too_fast = found(folder)["memory_efficiency.value"]
    assert too_fast.impossible
    assert too_fast.meaning.startswith("impossible")


def test_the_report_tells_what_real_cards_showed(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["held", str(RESULTS), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said == (out / "HELD.md").read_text() + "\n"
    assert said.count("## NVIDIA H200") == 2
    assert "What is freed is free when its stream was waited for" in said
    lived, died = (f"| b-internvl2-8b-turbomind-{name} |" for name in ("plan-23g", "defaults-23g"))
    assert f"{lived} lives | survived | yes |" in said
    assert f"{died} dies | died | yes | out_of_memory | out_of_memory |" in said
    document = json.loads((out / "held.json").read_text())
    for card in document["cards"]:
        before = card["Terms that only a card shows"][0]
        assert before["over"] == before["charged"] - before["measured"]
    # Memory that one of two cards did not pay for would kill there: the larger counts.
    for name, each in (("one", 8 * MIB), ("two", 12 * MIB)):
        write(machine(tmp_path / "results" / name), "a-handles", handles=handles(each))
    assert main(["held", str(tmp_path / "results"), "--out", str(out)]) == 0
    constants = json.loads((out / "held.json").read_text())["constants"]
    found = {one["key"]: one["value"] for one in constants}
    assert found["cublas_handle.value.hopper"] == 12 * MIB
    assert main(["held", str(tmp_path)]) == 2
    assert "has no machine.json" in capsys.readouterr().err
    # A card that no preset knows is described.
    folder = machine(tmp_path / "new")
    text = (folder / "machine.json").read_text().replace("NVIDIA H200", "NVIDIA B9000")
    (folder / "machine.json").write_text(text)
    said = held.hold(results.load(folder))
    assert "No preset knows this card" in said
    assert "132 SMs" in said

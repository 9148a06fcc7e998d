"""Stages b and c of bench/gpu by their parts, and run to their end on a pretend card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.acts import beside, bisect, free_seen
from bench.gpu.llava import write_llava
from bench.gpu.run import NotRunError, Run
from bench.gpu.shapes import with_ratio
from bench.gpu.summary import bars, summary
from turbofit import api
from turbofit.model.source import resolve_model

MIB = 1 << 20
PLAN = api.plan("internvl2-8b", on="1xrtx3090", engine="turbomind")


def test_stages_go_on_where_they_stopped_and_say_what_was_not_run(tmp_path: Path, capsys) -> None:
    run = Run(tmp_path, 100.0, "b", "x|y")
    assert run.wants("b")
    assert not run.wants("c")
    run.stage("x", lambda: {"code": 0, "outcome": "survived", "over": 3 * MIB})
    run.stage("x", lambda: pytest.fail("it was run before"))
    run.stage("another", lambda: pytest.fail("it was not asked for"))

    def cut_short() -> dict[str, Any]:
        run.keep("y", {"500": "died"})
        raise NotRunError("time was over; what is known is kept")

    run.stage("y", cut_short)
    assert run.read("x") is not None
    assert run.read("y") is None
    assert run.steps("y") == {"500": "died"}
    run.close()
    missing = json.loads((tmp_path / "not-run.json").read_text())
    assert missing == {"y": "time was over; what is known is kept"}
    late = Run(tmp_path, 0.0, "b", "y")
    late.stage("y", lambda: pytest.fail("time was over"))
    assert late.not_run == {"y": "time was over"}
    again = Run(tmp_path, 100.0, "b", "y")
    again.stage("y", lambda: {"code": 1, "outcome": "crash"})
    assert again.failed
    tries: list[str] = []

    def broken() -> dict[str, Any]:
        tries.append("y")
        return {"code": 0, "outcome": {}["outcome"]}

    # A failed stage's document keeps nothing from being run again, and nothing ends the others.
    again.stage("y", broken)
    assert (tries, again.not_run["y"]) == (["y"], "KeyError: 'outcome'")
    done = Run(tmp_path, 100.0, "b", "x")
    done.close()
    assert not (tmp_path / "not-run.json").exists()
    out = capsys.readouterr().out
    assert "x: survived, forecast +3 MiB over what NVML saw" in out
    assert "y: failed (crash)" in out


def test_a_bisection_ends_within_its_step_and_tries_nothing_twice() -> None:
    tried: list[int] = []

    def try_at(at: int) -> str:
        tried.append(at)
        return "survived" if at <= 833 else "died"

    steps: dict[str, str] = {}
    best = bisect(778, 999, try_at, steps, 4)
    assert 829 <= best <= 833
    assert steps == {str(at): "survived" if at <= 833 else "died" for at in tried}
    first = list(tried)
    assert bisect(778, 999, try_at, dict(list(steps.items())[:3]), 4) == best
    assert tried[len(first):] == first[3:]  # fmt: skip


def test_a_trial_stands_beside_its_forecast_and_its_rehearsal() -> None:
    ledger = PLAN.gpus[0]
    rows = [
        {"group": 0, "gpu": 0, "phase": name, "forecast": 1, "measured": used, "over": 0}
        for name, used in (
            ("context and weights", 9), ("cache", 8), ("steady", ledger.peak - 70 * MIB),
            ("vision_forward", ledger.peak - 50 * MIB),
        )
    ]  # fmt: skip
    found = {"outcome": "survived", "phases": rows, "seen": [{"free": 900}]}
    seen = {"free": 1000, "region": 77, "cases": {"vision_forward": 5}}
    one = beside(PLAN, found, seen)
    assert one["over"] == 50 * MIB
    assert one["over_share_of_card"] == pytest.approx(50 * MIB / ledger.total)
    assert one["as_forecast"] is True
    told = {row["phase"]: row["rehearsed"] for row in one["phases"]}
    usable = ledger.total - ledger.reserved
    assert told == {
        "context and weights": usable - 1000, "cache": 77, "steady": None, "vision_forward": 5,
    }  # fmt: skip
    cut = beside(PLAN, {**found, "outcome": "out_of_time"}, None)
    assert (cut["over"], cut["as_forecast"]) == (None, None)
    died = beside(PLAN, {**found, "outcome": "died"}, None)
    assert died["over"] is None
    assert died["as_forecast"] is False
    defaults = api.predict("internvl2-8b", on="1xrtx3090:free=17GiB")
    assert beside(defaults, {"outcome": "died"}, None)["as_forecast"] is True
    hidden = {"cuda_context", "cublas"}
    charged = sum(t.bytes for t in ledger.ledger if t.term in hidden)
    free = free_seen(PLAN, found, seen)
    assert free["unseen"] == 1000 + charged - 900
    assert free["over"] == 900 - 1000
    assert set(free["estimated"]) == hidden


def test_another_ratio_keeps_the_worst_requests() -> None:
    other = with_ratio(PLAN, 0.9)
    assert other.settings.cache_max_entry_count == 0.9
    assert (other.limits, other.kv) == (PLAN.limits, PLAN.kv)


def test_bars_are_judged_by_what_was_measured(tmp_path: Path) -> None:
    def load(rate: float, answered: int = 10) -> dict[str, Any]:
        return {
            "answered": answered, "load": {"requests": 10}, "tokens_per_second": rate,
            "requests_per_second": rate, "statuses": {"200": answered},
        }  # fmt: skip

    one = {
        "outcome": "survived", "over": 10, "over_share_of_card": 0.01, "margin": 5,
        "forecast_peak": 50, "measured_peak": 40, "as_forecast": True,
        "settings": {"cache_max_entry_count": 0.5},
    }  # fmt: skip
    found: dict[str, Any] = {
        "b-m-plan": one,
        "b-m-defaults": {**one, "outcome": "died", "over": None},
        "b-m-oracle": {"oracle": 0.8, "plan": 0.784, "share": 0.98},
        "c-m-plan": {"outcome": "survived", "direct": load(97.0)},
        "c-m-grid-0.8-8192": {"outcome": "survived", "direct": load(100.0)},
        "c-m-grid-0.9-8192": {"outcome": "died", "direct": load(200.0)},
        "c-m-thousand": {"outcome": "survived", "gateway": load(1.0)},
    }
    lines = bars(found)
    assert lines[0].startswith("met: peak within 2 %")
    assert (
        "NOT MET: c-m-plan: 97.0% of the tokens/s of the grid's best (c-m-grid-0.8-8192)" in lines
    )
    assert "met: b-m-oracle: the plan's cache is 98.0% of the oracle's" in lines
    assert "met: c-m-thousand: 10 of 10 worst-case requests answered, survived" in lines
    assert "met: lives or dies as forecast: 2 of 2" in lines
    found["b-m-plan"] = {**one, "over": -6, "over_share_of_card": -0.03}
    found["c-m-thousand"]["gateway"] = load(1.0, answered=9)
    worse = [line for line in bars(found) if line.startswith("NOT MET")]
    assert len(worse) == 4
    assert bars({}) == ["nothing was measured for any of them"]
    for name, document in found.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    (tmp_path / "not-run.json").write_text('{"c-m-late": "time was over"}')
    text = summary(tmp_path)
    assert "- `c-m-late`: time was over" in text
    assert "| c-m-plan | direct | 10 of 10 | 97.00 | 97.0 | survived |" in text


def test_llava_has_its_real_shapes(tmp_path: Path) -> None:
    preset = resolve_model("llava-1.5-7b")
    made = resolve_model(str(write_llava(preset, tmp_path / preset.name)))
    assert (made.parameters, made.weight_bytes) == (preset.parameters, preset.weight_bytes)
    assert (made.text, made.vision) == (preset.text, preset.vision)
    assert made.image_rule == preset.image_rule
    plans = [api.plan(model, on="1xrtx3090", engine="pytorch") for model in (made, preset)]
    assert plans[0].gpus[0].peak == plans[1].gpus[0].peak

"""What was shown here before is not shown again; what is another plan, is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.support.plans import changed
from turbofit import api
from turbofit.core.plan import Plan
from turbofit.serving import proved
from turbofit.serving.options import ServeConfig
from turbofit.serving.proved import Proof, Rehearsals

CONFIG = ServeConfig()


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def plan() -> Plan:
    return api.plan("qwen2-vl-2b", on="1xrtx3090")


def known(plan: Plan, config: ServeConfig = CONFIG, lmdeploy: str = "0.18.0") -> bool:
    return bool(Proof(plan, config, lmdeploy).day)


def test_a_plan_is_proved_once_and_until_memory_runs_out(plan: Plan) -> None:
    proof = Proof(plan, CONFIG, "0.18.0")
    assert not known(plan)
    proof.keep()
    assert known(plan)
    again = replace(plan, created="2030-01-01", verdict="fits", considered=(), reasons=())
    place = replace(plan.model.source, checkpoint="/elsewhere")
    assert known(replace(again, model=replace(plan.model, name="finetuned", source=place)))
    proof.forget()
    assert not known(plan)


def test_what_engines_held_beyond_the_forecast_is_kept_for_any_ratio(plan: Plan) -> None:
    """The most of all starts: a ratio that went up and down would be proved at each start."""
    proof = Proof(plan, CONFIG, "0.18.0")
    assert proof.over is None
    proof.keep()
    assert proof.over is None
    for over, most in ((-40, -40), (30, 30), (10, 30)):
        proof.keep(over)
        assert proof.over == most
    higher = changed(plan, settings=replace(plan.engines[0].settings, cache_max_entry_count=0.99))
    assert Proof(higher, CONFIG, "0.18.0").over == 30
    assert not known(higher)
    assert Proof(with_card(plan, "GPU-another"), CONFIG, "0.18.0").over is None
    proof.forget()
    assert Proof(plan, CONFIG, "0.18.0").over is None


def with_driver(plan: Plan, driver: str) -> Plan:
    return replace(plan, machine=replace(plan.machine, driver=driver))


def with_card(plan: Plan, uuid: str) -> Plan:
    return changed(plan, ledgers=(replace(plan.ledgers[0], uuid=uuid),))


def test_what_its_memory_rests_on_makes_it_another_plan(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    Proof(plan, CONFIG, "0.18.0").keep()
    settings = plan.engines[0].settings
    assert not known(plan, lmdeploy="0.19.0")
    assert not known(with_driver(plan, "600.1"))
    assert not known(with_card(plan, "GPU-another"))
    assert not known(changed(plan, settings=replace(settings, cache_max_entry_count=0.123)))
    assert not known(changed(plan, units_per_forward=4))
    assert not known(plan, CONFIG.changed(options=("--adapters", "a=/b")))
    assert not known(plan, CONFIG.changed(pretend=True))
    with monkeypatch.context() as patch:
        patch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        assert not known(plan)
    with monkeypatch.context() as patch:
        patch.setattr(proved, "installed", lambda _name: "2.99")
        assert not known(plan)
    assert known(plan)


def held(plan: Plan, more: int) -> Any:
    """Its machine, of which others hold so many bytes more."""
    card: Any = plan.machine.gpus[0]
    return replace(plan.machine, gpus=(replace(card, free=card.free - more),))


def test_a_rehearsal_holds_while_its_memory_is_there(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = replace(plan, verdict="fits: rehearsed")
    Rehearsals(plan).keep(result)
    step = plan.ledgers[0].total // 1000
    assert Rehearsals(plan).recall(held(plan, 0)) == result
    assert Rehearsals(plan).recall(held(plan, -step * 5)) == result
    assert Rehearsals(plan).recall(held(plan, step - 1)) == result
    assert Rehearsals(plan).recall(held(plan, 2 * step)) is None
    wider = replace(
        plan.engines[0].settings, max_batch_size=plan.engines[0].settings.max_batch_size + 1
    )
    assert Rehearsals(changed(plan, settings=wider)).recall(plan.machine) is None
    monkeypatch.setattr(proved, "installed", lambda _name: "9.9")
    assert Rehearsals(plan).recall(plan.machine) is None

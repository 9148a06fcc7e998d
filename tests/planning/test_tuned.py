"""What `turbofit tune` found, in later plans."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.measure.test_tune_runner import SEEN
from tests.support.plans import machine
from turbofit.core.plan import SPECULATIVE
from turbofit.core.tuning import TrialForecast, TrialRecord, Tuning
from turbofit.memory.calibrated import identity
from turbofit.model.source import resolve_model
from turbofit.planning import tuned
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest
from turbofit.planning.tuned import cards_of, keep_tuned

HERE = replace(machine(1, driver="570.1"), source="nvml")
REQUEST = PlanRequest(model="internvl2-2b", on=HERE, engine="turbomind")


@pytest.fixture(autouse=True)
def lmdeploy(state, monkeypatch) -> None:
    monkeypatch.setattr(tuned, "installed", lambda *_: "0.18.0")


def tuning(**changes) -> Tuning:
    options = changes.pop("options", {"max_batch_size": 24, "max_prefill_token_num": 2048})
    trial = TrialRecord(
        number=2, options=options, engine="turbomind", tp=1, replicas=1, max_batch_size=24,
        max_prefill_token_num=2048, quant_policy=0, enable_prefix_caching=False, kv_tokens=1,
        forecast=TrialForecast(requests_per_second=2.0, ttft=1.0, tpot=0.1), outcome="measured",
        measured=SEEN,
    )  # fmt: skip
    facts = {
        "turbofit_version": "0", "created": "2026-11-20T00:00:00+00:00",
        "model": identity(resolve_model("internvl2-2b")), "gpus": cards_of(HERE),
        "driver": "570.1", "lmdeploy": "0.18.0", "promise": {"engine": "turbomind"},
        "load": {}, "goal": "throughput", "slo": {}, "best": 2, "trials": (trial,),
    }  # fmt: skip
    return Tuning(**{**facts, **changes})


def used(request: PlanRequest, **keywords) -> bool:
    found = plan(request, **keywords)
    said = [text for text in found.reasons if text.startswith("tuned: ")]
    if said:
        assert found.engines[0].settings.max_batch_size == 24
        assert found.engines[0].settings.max_prefill_token_num == 2048
        assert "1.00 requests/s with LMDeploy 0.18.0 on 2026-11-20" in said[0]
    return bool(said)


def test_a_plan_of_the_same_promise_has_its_settings() -> None:
    before = plan(REQUEST)
    keep_tuned(tuning())
    assert used(REQUEST)
    after = plan(REQUEST)
    assert after.promise.limits.image_limit == before.promise.limits.image_limit
    assert after.fits
    keep_tuned(tuning(options={"max_batch_size": 24, "quant_policy": 8}))
    found = plan(REQUEST)
    assert found.engines[0].settings.quant_policy == 8
    (said,) = [text for text in found.reasons if text.startswith("tuned: ")]
    assert "--quant-policy 8 changes answers a little" in said


def test_it_is_used_for_nothing_else() -> None:
    keep_tuned(tuning())
    for changes in (
        {"no_tuned": True}, {"images": 2}, {"max_batch_size": 4}, {"goal": "latency"},
        {"engine": "auto"}, {"model": "internvl2-1b"}, {"on": replace(HERE, driver="1")},
        {"on": replace(HERE, source="preset")}, {"context": 4096},
    ):  # fmt: skip
        assert not used(REQUEST.changed(**changes)), changes
    assert used(REQUEST.changed(margin="2%"))
    assert used(REQUEST.changed(cache_max_entry_count=0.5))
    # Pretend tunings are for pretend runs only.
    keep_tuned(tuning(pretend=True))
    there = REQUEST.changed(on=replace(HERE, source="preset"))
    assert used(there, pretend=True)
    assert not used(there)


def test_another_lmdeploy_asks_for_a_new_run(monkeypatch) -> None:
    keep_tuned(tuning())
    monkeypatch.setattr(tuned, "installed", lambda *_: "0.19.0")
    assert not used(REQUEST)
    (said,) = [text for text in plan(REQUEST).warnings if "tuned" in text]
    assert said.startswith("the tuned settings are of LMDeploy 0.18.0, and 0.19.0 is installed")
    monkeypatch.setattr(tuned, "installed", lambda *_: None)
    assert used(REQUEST)


def test_settings_that_do_not_fit_now_are_left_and_that_is_said() -> None:
    keep_tuned(tuning(options={"max_batch_size": 4096, "max_prefill_token_num": 32768}))
    (gpu,) = HERE.gpus
    fuller = replace(gpu, used=12 << 30, free=gpu.free - (12 << 30))
    found = plan(REQUEST.changed(on=replace(HERE, gpus=(fuller,))))
    assert found.fits
    assert any("turbofit tune found are not used" in text for text in found.warnings)


def test_a_rehearsal_keeps_the_settings() -> None:
    """It plans the shape again, with another margin."""
    keep_tuned(tuning())
    before = plan(REQUEST)
    after = tuned.same_shape(REQUEST, before, {}, rehearsed=True)
    assert after != before
    assert after.engines[0].settings.max_batch_size == 24
    assert after.engines[0].settings.max_prefill_token_num == 2048
    assert [text for text in after.reasons if text.startswith("tuned: ")]
    assert tuned.pinned(REQUEST, plan(REQUEST.changed(no_tuned=True))) is REQUEST


@pytest.mark.parametrize(
    ("options", "tokens"),
    [({SPECULATIVE[2]: 3}, 3), (dict.fromkeys(SPECULATIVE), 0)],
    ids=["three tokens", "no draft"],
)
def test_the_tokens_of_a_draft_that_were_the_fastest(options, tokens) -> None:
    plain = PlanRequest(model="qwen3.5-2b", on=HERE, images=0)
    asked = plain.changed(speculative_algorithm="qwen3_5_mtp")
    promise = tuned.promise_of(asked.given())
    keep_tuned(
        tuning(options=options, promise=promise, model=identity(resolve_model("qwen3.5-2b")))
    )
    found = plan(asked)
    assert any(text.startswith("tuned: ") for text in found.reasons)
    draft = found.model.draft
    assert (draft.tokens if draft else 0) == tokens
    again = tuned.same_shape(asked, found, {}, rehearsed=True).model.draft
    assert (again.tokens if again else 0) == tokens
    assert not any(text.startswith("tuned: ") for text in plan(plain).reasons)

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

import turbofit.api
from tests.rehearsal.conftest import Rehearse, forward_pool
from turbofit.core.errors import UsageError
from turbofit.core.plan import Plan, Settings
from turbofit.core.units import MIB
from turbofit.memory.account import vision_load_within
from turbofit.memory.turbomind.pool import engine_bound
from turbofit.model.folder import FolderFiles
from turbofit.model.source import resolve_model
from turbofit.rehearsal import planned as module
from turbofit.rehearsal.cases import turbomind_cases
from turbofit.rehearsal.checkpoint.twin import checkpoint_for, twin_of, write_model
from turbofit.rehearsal.planned import (
    broken_promise,
    moments,
    outcome_and_end,
    plan_spec,
    rehearse,
    terms_by_counter,
)
from turbofit.rehearsal.pretend.scenario import PretendGpu
from turbofit.rehearsal.run import Readings
from turbofit.rehearsal.spec import Spec

TRANSIENT = ("vision_request", "vision_forward", "text_prefill", "sampling")


def differences(plan: Plan, document: dict[str, Any]) -> dict[str, int]:
    """Bytes that the engine took above the forecast, where its counters tell a line apart."""
    ledgers = {gpu.index: gpu.terms for gpu in plan.ledgers}
    return {
        name: counters[name] - sum(term.bytes for term in terms)
        for index, counters in zip(plan.groups[0], document["terms"], strict=True)
        for name, terms in terms_by_counter(ledgers[index], counters).items()
    }


@pytest.fixture(scope="module")
def planned() -> Plan:
    return turbofit.api.plan("internvl2-8b", on="1xrtx3090")


def test_worst_cases_are_named_as_the_ledgers_transients(planned: Plan) -> None:
    cases = {case.name: case.requests for case in turbomind_cases(planned, planned.engines[0])}
    assert set(cases) == {t.term for t in planned.ledgers[0].terms if t.phase == "transient"}
    assert cases["vision_request"][0].units == (planned.promise.limits.units_per_image,)
    assert cases["vision_forward"][0].units == (planned.engines[0].units_per_forward,)
    assert len(cases["sampling"]) == planned.engines[0].settings.max_batch_size
    assert cases["sampling"][0].top_k == 0
    longest = cases["text_prefill"][0]
    assert longest.text_tokens + longest.max_new_tokens <= planned.engines[0].settings.session_len


def test_what_a_rehearsal_cannot_see_is_charged_to_the_card(planned: Plan, tmp_path: Path) -> None:
    spec = plan_spec(planned, tmp_path)
    terms = {t.term: t.bytes for t in planned.ledgers[0].terms}
    (gpu,) = spec.machine.gpus
    context = terms["cuda_context"] + terms["cublas"] + terms["torch_kernels"]
    assert gpu.used == planned.ledgers[0].used + context
    assert gpu.late == terms["kernel_modules"] + terms["pool_growth"]
    assert spec.settings["max_batch_size"] == planned.engines[0].settings.max_batch_size
    assert "model_format" not in spec.settings


def test_a_promised_request_that_the_engine_refuses_is_not_served(planned: Plan) -> None:
    longest = planned.promise.context

    def told(name: str, tokens: list[int], **statuses: int) -> dict[str, Any]:
        return {"name": name, "tokens": tokens, "statuses": statuses}

    answered = told("vision_request", [3330], finished=1)
    refused = told("text_prefill", [longest - 2], out_of_memory=1)
    assert broken_promise(planned, planned.engines[0], {"cache": {}, "cases": [answered]}) is None
    death = broken_promise(planned, planned.engines[0], {"cache": {}, "cases": [answered, refused]})
    assert death is not None
    assert death.phase == "case text_prefill"
    assert death.where.endswith("1 out_of_memory")
    # The plan says itself that a longer one is refused, of which two came here.
    beyond = told("vision_forward", [longest + 1, longest + 1, 20], finished=1, too_long=2)
    assert broken_promise(planned, planned.engines[0], {"cache": {}, "cases": [beyond]}) is None
    beyond["statuses"] = {"too_long": 3}
    assert broken_promise(planned, planned.engines[0], {"cache": {}, "cases": [beyond]}) is not None
    # An engine that takes shorter requests breaks the promise, too.
    death = broken_promise(
        planned, planned.engines[0], {"cache": {"session_len": longest - 1}, "cases": []}
    )
    assert death is not None
    assert death.where.startswith("the engine takes ")


def test_no_twin_of_what_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no stand-in checkpoint"):
        checkpoint_for(resolve_model("gemma-3-4b"), tmp_path)
    delta = "gated delta nets need kernels of fla and TileLang"
    for name, why, torch, hint in (
        ("llama-4-scout", "made for Llama4ForCausalLM", False, "give the folder of its checkpoint"),
        ("qwen3.5-35b-a3b", delta, True, "--engine turbomind"),
        ("qwen3-next-80b-a3b", delta, True, "--engine turbomind"),
    ):
        with pytest.raises(UsageError, match=why) as refused:
            checkpoint_for(resolve_model(name), tmp_path, torch=torch)
        assert refused.value.hint.startswith(hint)
    folder = checkpoint_for(resolve_model("qwen3-8b"), tmp_path / "q")
    first, *_ = sorted(path.name for path in folder.glob("*.safetensors"))
    assert "model.layers.0.self_attn.q_norm.weight" in FolderFiles(str(folder)).header(first)


@pytest.mark.lmdeploy
def test_the_plan_holds_on_the_pretend_card(
    run: Rehearse, planned: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents: list[tuple[Spec, dict[str, Any]]] = []

    def kept(spec: Spec, keep: Path | None) -> dict[str, Any]:
        documents.append((spec, rehearse(spec, keep)))
        return documents[-1][1]

    monkeypatch.setattr(module, "rehearse", kept)
    plan = turbofit.api.rehearse("internvl2-8b", on="1xrtx3090")
    ((spec, document),) = documents
    assert document["outcome"] == "served"
    assert plan.fits
    assert plan.engines[0].kv == planned.engines[0].kv
    assert plan.rehearsal is not None
    assert plan.rehearsal.cache.tokens is not None
    assert (
        planned.engines[0].kv.tokens
        <= plan.rehearsal.cache.tokens
        <= planned.engines[0].kv.tokens * 1.01
    )
    assert Plan.from_json(plan.to_json()) == plan
    over = differences(planned, document)
    for exact in ("weights", "kv_cache", "pool_warmup"):
        assert over[exact] == 0
    for close in ("attention", "token_ids", "guided_decoding", "gemm_workspace", "l2_flush"):
        assert abs(over[close]) < 32 * 1024
    for term in TRANSIENT:
        assert over[term] <= 0
    (ledger,) = plan.ledgers
    terms = {term.term: term for term in ledger.terms}
    assert terms["kv_cache"].rehearsed == terms["kv_cache"].bytes
    assert terms["cuda_context"].rehearsed is None
    gpu = spec.machine.gpus[0]
    peak = max(case["peak"][0] for case in document["cases"]) + gpu.used + gpu.late
    assert 0 <= planned.ledgers[0].peak - peak < 256 * MIB
    taken, paid = forward_pool(planned, document)
    assert 0.96 * paid <= taken <= paid


@pytest.mark.lmdeploy
@pytest.mark.exhaustive
def test_another_name_of_qwen3_5_is_run_as_one(run: Rehearse, tmp_path: Path) -> None:
    """TurboMind and its front end by Intern-S2's architecture: four layers of eight experts."""
    model = resolve_model("qwen3.5-35b-a3b")
    moe, delta = model.text.moe, model.text.delta
    assert moe is not None
    assert delta is not None
    text = replace(
        model.text, layers=4, moe=replace(moe, layers=4, experts=8), delta=replace(delta, layers=3)
    )
    named = "InternS2PreviewForConditionalGeneration"
    twin = twin_of(replace(model, text=text, name="Intern-S2-Preview", architecture=named))
    folder = write_model(twin, tmp_path / "Intern-S2-Preview")
    plan = turbofit.api.predict(
        str(folder), on="1xrtx3090", session_len=8192, max_batch_size=16, max_pixels=1 << 20
    )
    document = rehearse(plan_spec(plan, folder))
    assert document["outcome"] == "served"
    over = differences(plan, document)
    assert over["weights"] == over["kv_cache"] == 0
    assert all(over.get(term, 0) <= 0 for term in TRANSIENT), over


@pytest.mark.lmdeploy
@pytest.mark.exhaustive
def test_a_prefix_cache_brings_more_tiles_together_though_no_picture_was_seen(
    run: Rehearse,
) -> None:
    """Requests whose texts begin alike are passed by others while one of them writes the text.

    So a picture is cut at the end of each of the first three forwards; the fourth has the rest of
    all three. Without a prefix cache, a forward has the rest of one.
    """

    def request(text: int, lead: int, *tiles: int) -> dict[str, Any]:
        return {"text_tokens": text, "lead": lead, "units": tiles, "max_new_tokens": 12}

    alike = [
        request(70, 66), request(140, 130),  # they write the first block, and the second
        request(429, 129, 2), request(133, 129, 13),  # begin with both blocks
        request(290, 65, 2), request(69, 65, 13),  # begin with the first
        request(5, 1, 3), request(5, 1, 13), request(3, 1, 13), request(3, 1, 1),
        request(3, 1, 13),
    ]  # fmt: skip
    settings: dict[str, Any] = {
        "max_prefill_token_num": 4096, "max_batch_size": 19, "enable_prefix_caching": True,
    }  # fmt: skip
    document = run(
        "internvl2-1b",
        cases=[
            {"name": "10", "requests": [request(3, 1, 10)]},
            {"name": "13", "requests": [request(3, 1, 13)]},
            {"name": "alike", "requests": alike},
        ],
        **settings,
    )
    ten, thirteen, most = (case["transient"][0] for case in document["cases"])
    tiles = 13 + (most - thirteen) / ((thirteen - ten) / 3)
    rule = resolve_model("internvl2-1b").image_rule
    assert rule is not None
    load = vision_load_within(turbofit.api.plan("internvl2-1b", on="1xrtx3090").promise.limits)
    cached = Settings(session_len=32768, **settings)
    without = engine_bound(rule, load, replace(cached, enable_prefix_caching=False))
    assert (without, round(tiles)) == (42, 66)
    assert tiles <= engine_bound(rule, load, cached)


def card(**phases: tuple[int, int]) -> dict[str, dict[str, Any]]:
    spans = {name.replace("_", " ", 1): span for name, span in phases.items()}
    return {name: {"peak": peak, "held": held} for name, (peak, held) in spans.items()}


def test_what_is_charged_to_a_card_is_in_use_when_the_account_says_so() -> None:
    held = card(weights=(90, 80), cache=(180, 180), case_vision_request=(190, 185))
    seen = moments([held], [PretendGpu("x", 2000, used=1000, late=50)])
    assert [(one.phase, one.peak, one.end) for one in seen] == [
        ("weights", (1090,), (1080,)),
        ("cache", (1230,), (1230,)),  # the question how much is free came first
        ("case vision_request", (1240,), (1235,)),
    ]
    assert [one.image for one in seen] == [False, False, True]
    # A card without a phase stays as it was.
    first = card(weights=(90, 80), cache=(180, 180), ready=(180, 180))
    seen = moments([first, card(weights=(70, 60), ready=(160, 150))], [PretendGpu("x", 2000)] * 2)
    assert [one.phase for one in seen] == ["weights", "cache", "ready"]
    assert [one.peak for one in seen] == [(90, 70), (180, 60), (180, 160)]
    assert [one.end for one in seen] == [(80, 60), (180, 60), (180, 150)]
    # A start that died ends where it died.
    seen = moments([card(**{"import": (0, 0)})], [PretendGpu("x", 2000, used=7)])
    assert [(one.phase, one.peak, one.end) for one in seen] == [("import", (7,), (7,))]


def ended(code: int = 0, stopped: str = "", **told: Any) -> Any:
    return SimpleNamespace(notes=told, ran=SimpleNamespace(code=code), stopped=stopped)


def seen(**end: Any) -> Readings:
    return Readings([], [], {}, [], {"phase": "context", "where": "Check failed", **end})


def case(**statuses: int) -> dict[str, Any]:
    return {"name": "a", "statuses": statuses}


@pytest.mark.parametrize(
    ("run", "outcome", "where"),
    [
        (ended(done=True, cases=[case(finished=3)]), "served", None),
        # A prompt that the engine refuses is an answer, too.
        (ended(done=True, cases=[case(too_long=1)]), "served", None),
        (ended(-9, "idle"), "hang", "nothing happened any more"),
        (ended(done=True, cases=[case(**{"not finished": 1})]), "hang", "not finished in time"),
        (ended(done=True, cases=[case(unavailable=1)]), "failed", "Check failed"),
        (ended(1, error={"type": "AssertionError"}), "failed", "Check failed"),
        (ended(-6), "failed", "Check failed"),
    ],
)
def test_how_it_ended(run: Any, outcome: str, where: str | None) -> None:
    found, end = outcome_and_end(run, seen(kind="crash"))
    assert found == outcome
    assert (end.where if end else None) == where


def test_an_end_after_a_refused_allocation_is_out_of_memory() -> None:
    sizes = {"asked": 9, "left": 4, "missing": 5}
    refused = seen(kind="out_of_memory", phase="warm-up", where="Attn", **sizes)
    outcome, end = outcome_and_end(ended(-6), refused)
    assert outcome == "out_of_memory"
    assert end is not None
    assert (end.kind, end.phase, end.where, end.missing) == ("out_of_memory", "warm-up", "Attn", 5)

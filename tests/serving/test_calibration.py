"""What is learned of a launch: never under what was measured, never more than was estimated."""

from __future__ import annotations

import itertools

import pytest
from msgspec.structs import replace

import turbofit
from tests.support.plans import plausible_plan
from turbofit import api
from turbofit.core.machine import Machine
from turbofit.core.plan import GpuLedger, Plan
from turbofit.core.run_report import RunFigure
from turbofit.core.units import MIB, round_up
from turbofit.logs.log_events import CacheBudget, Slab
from turbofit.machine.source import machine_from
from turbofit.memory.account import EngineLaunch, VisionLoad
from turbofit.memory.calibrated import BUFFERS, CONTEXT, identity
from turbofit.memory.engines import engine_named
from turbofit.serving.calibration import (
    CalibratedGpu,
    Observation,
    compare_cache,
    compare_tokens,
    in_words,
    learn,
    phase_rows,
)

CASES = (
    ("internvl2-8b", "1xrtx3090", "turbomind"),
    ("internvl2-8b", "2xrtx3090", "turbomind"),
    ("internvl2-26b-awq", "2xrtx3090", "turbomind"),
    ("qwen2-vl-2b", "1xrtx3090", "pytorch"),
)
BEFORE = ("before", "context", "weights")
ERRORS = (-90, -17, 0, 33, 200)
#: By so much the pool of the cache grows.
STEP = 32 * MIB


def planned(model: str, machine: Machine, engine: str, **more: object) -> Plan:
    return api.plan(model, on=machine, engine=engine, tp=len(machine.visible), replicas=1, **more)


def launched(
    plan: Plan, context: int, buffers: int, moved: int | tuple[int, ...] = 0, *, group: int = 0
) -> Observation:
    """A launch that took so much more than forecast, while others held ``moved`` more of a card."""
    ratio = plan.engines[group].settings.cache_max_entry_count
    pytorch = plan.backend.name == "pytorch"
    cards = []
    others = moved if isinstance(moved, tuple) else (moved,) * len(plan.engines[group].ledgers)
    pairs = list(zip(plan.engines[group].ledgers, others, strict=True))
    free = min(free_of(one) - more for one, more in pairs) - context
    for one, moved_here in pairs:
        cache = sum(term.bytes for term in one.terms if term.term == "kv_cache")
        grown = round(ratio * (free - min(map(free_of, plan.engines[group].ledgers))))
        region = plan.engines[group].kv.region_bytes + grown
        if not pytorch:
            grown = round_up(region, STEP) - cache  # as its pool takes it
        more = context + buffers + grown + moved_here
        used = {"steady": one.steady + more, "kernels": one.steady + more}
        used["vision_forward"] = one.peak + more
        cards.append(CalibratedGpu(index=one.index, before=one.used + moved_here, used=used))
    return Observation(
        group=group, free=None if pytorch else free, region=None if pytorch else region,
        cards=tuple(cards),
    )  # fmt: skip


def free_of(one: GpuLedger) -> int:
    held = sum(term.bytes for term in one.terms if term.phase in BEFORE)
    return one.total - one.reserved - held


def counted(plan: Plan, machine: Machine) -> tuple[GpuLedger, ...]:
    """The same launch on the machine with what was learned."""
    limits, gpus = plan.promise.limits, [machine.gpu(index) for index in plan.groups[0]]
    vision_load = VisionLoad(
        units_per_image=limits.units_per_image, images_per_request=limits.images_per_request,
        tokens_per_request=limits.image_tokens_per_request,
        units_per_forward=plan.engines[0].units_per_forward,
    )  # fmt: skip
    launch = EngineLaunch(
        model=plan.model, settings=plan.engines[0].settings, gpus=tuple(gpus), machine=machine,
        vision_load=vision_load, margins=tuple(one.margin for one in plan.ledgers),
    )  # fmt: skip
    account = engine_named(plan.backend.name).account(launch)
    return account.ledgers_at(plan.engines[0].settings.cache_max_entry_count)


def learned(plan: Plan, *seen: Observation) -> Machine:
    when = "2026-11-20T00:00:00+00:00"
    found = learn(plan, list(seen), lmdeploy="0.18.0", when=when, pretend=False)
    assert len(found) == 1
    return replace(plan.machine, calibrations=found)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """InternVL2-8B on one card."""
    return planned("internvl2-8b", machine_from("1xrtx3090"), "turbomind")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_the_corrected_forecast_of_a_launch_is_what_it_took_and_no_less(case) -> None:
    model, on, engine = case
    plan = planned(model, machine_from(on), engine)
    assert plan.fits
    for context, buffers in itertools.product(ERRORS, ERRORS):
        seen = launched(plan, context * MIB, buffers * MIB)
        machine = learned(plan, seen)
        for card, one in zip(seen.cards, counted(plan, machine), strict=True):
            assert one.steady >= card.used["steady"]
            assert one.peak >= card.used["vision_forward"]
            # Over by a step of the cache and rounding, where estimates had so much to give back.
            if min(context, buffers) >= -17:
                assert one.peak <= card.used["vision_forward"] + STEP + 2 * MIB


def test_no_correction_takes_more_than_was_estimated_or_learned_before(plan: Plan) -> None:
    estimates = {
        phases: sum(
            t.bytes for t in plan.ledgers[0].terms if t.basis == "estimate" and t.phase in phases
        )
        for phases in (BEFORE, ("cache", "buffers"))
    }
    machine = learned(plan, launched(plan, -4000 * MIB, -4000 * MIB))
    (one,) = machine.calibrations
    assert (one.context, one.buffers) == (-estimates[BEFORE], -estimates["cache", "buffers"])
    again = planned("internvl2-8b", machine, "turbomind")
    (twice,) = learned(again, launched(again, -4000 * MIB, -4000 * MIB)).calibrations
    assert (twice.context, twice.buffers) == (one.context, one.buffers)


def test_a_plan_of_smaller_forwards_is_not_charged_less_than_nothing() -> None:
    """Holes in pools are charged by the largest forward, which was larger where it was learned."""
    plan = planned("internvl2-8b", machine_from("1xrtx3090"), "turbomind", images=4)
    machine = learned(plan, launched(plan, 0, -4000 * MIB))
    small = planned("internvl2-8b", machine, "turbomind", images=0, max_prefill_token_num=1024)
    terms = {t.term: t.bytes for t in small.ledgers[0].terms}
    later = ("kernel_modules", "pool_growth")
    (made,) = machine.calibrations
    assert -made.buffers > sum(terms[name] for name in later)
    assert terms[BUFFERS] == -sum(terms[name] for name in later)


def test_the_next_plan_uses_it_and_says_so(plan: Plan) -> None:
    machine = learned(plan, launched(plan, -60 * MIB, -40 * MIB))
    again = planned("internvl2-8b", machine, "turbomind")
    assert again.engines[0].kv.tokens > plan.engines[0].kv.tokens
    assert again.ledgers[0].headroom >= again.ledgers[0].margin
    terms = {t.term: t for t in again.ledgers[0].terms}
    # A step of the cache is on top.
    assert (terms[CONTEXT].bytes, terms[BUFFERS].bytes) == (-60 * MIB, -40 * MIB + STEP)
    assert terms[CONTEXT].basis == terms[BUFFERS].basis == "measured"
    assert "RTX 3090" in terms[CONTEXT].note
    assert "2026-11-20" in terms[CONTEXT].note
    said = [r for r in again.reasons if "68.0 MiB less than estimated" in r]
    assert said
    assert "turbofit calibrate" in said[0]
    assert Plan.from_json(again.to_json()) == again
    # More than the forecast makes it smaller.
    less = planned("internvl2-8b", learned(plan, launched(plan, 0, 250 * MIB)), "turbomind")
    assert less.engines[0].kv.tokens < plan.engines[0].kv.tokens
    assert any("282 MiB more than estimated" in reason for reason in less.reasons)


def test_it_is_for_nothing_but_what_was_measured(plan: Plan) -> None:
    machine = learned(plan, launched(plan, -60 * MIB, 0))
    (one,) = machine.calibrations
    assert one.model.startswith("InternVL2-8B (")
    here = replace(plan.model, hub_id=None, name="InternVL2-8B")  # as from a folder of that name
    assert identity(here) == one.model
    names = {t.term for t in planned("qwen2-vl-2b", machine, "turbomind").ledgers[0].terms}
    assert CONTEXT not in names
    for other in (
        replace(one, driver="570"), replace(one, engine="pytorch"),
        replace(one, engine_version="0.19"), replace(one, gpus=("NVIDIA L4",)),
        replace(one, gpus=(one.gpus[0], one.gpus[0])), replace(one, communicator="cuda-ipc"),
    ):  # fmt: skip
        changed = planned("internvl2-8b", replace(machine, calibrations=(other,)), "turbomind")
        assert changed.ledgers[0].terms == plan.ledgers[0].terms


@pytest.mark.parametrize("moved", [(100, 100), (0, 700), (512, -1000), (-1000, 512)])
def test_others_who_move_on_one_card_of_a_group_are_not_taken_for_the_engine(moved) -> None:
    """The log tells what was free on the fullest card, which may be another one than planned."""
    plan = planned("internvl2-8b", machine_from("2xrtx3090:used=2GiB"), "turbomind")
    (still,) = learned(plan, launched(plan, 50 * MIB, 20 * MIB)).calibrations
    seen = launched(plan, 50 * MIB, 20 * MIB, tuple(one * MIB for one in moved))
    (made,) = learned(plan, seen).calibrations
    assert abs(made.context - still.context) <= MIB
    assert abs(made.buffers - still.buffers) <= MIB


def test_phases_are_told_beside_the_forecast(plan: Plan) -> None:
    rows = {row["phase"]: row for row in phase_rows(plan, [launched(plan, 0, 5 * MIB)])}
    assert list(rows) == ["context and weights", "cache", "steady", "kernels", "vision_forward"]
    assert (rows["context and weights"]["over"], rows["vision_forward"]["over"]) == (0, -5 * MIB)
    assert rows["vision_forward"]["forecast"] == plan.ledgers[0].peak
    assert rows["cache"]["measured"] == round_up(plan.engines[0].kv.region_bytes, STEP)
    # Of cases after a restart, what was seen before it counts.
    seen = launched(plan, 0, 0)
    (card,) = seen.cards
    later = replace(card, used={**card.used, "sampling": plan.ledgers[0].steady})
    rows = {row["phase"]: row for row in phase_rows(plan, [replace(seen, cards=(later,))])}
    assert (rows["sampling"]["over"], rows["sampling"]["measured"]) == (0, plan.ledgers[0].peak)


def test_a_log_that_tells_what_is_free_is_not_corrected_before_the_cache(plan: Plan) -> None:
    machine = learned(plan, launched(plan, -60 * MIB, 30 * MIB))
    told = api.predict("internvl2-8b", on=machine, free_at_cache="8GiB", engine="turbomind")
    terms = {t.term: t.bytes for t in told.ledgers[0].terms}
    assert CONTEXT not in terms
    assert terms[BUFFERS] == 30 * MIB + STEP


def test_without_images_nothing_is_learned_to_be_less() -> None:
    """The tower's kernels were not loaded: a plan with images would count on their room."""
    machine = machine_from("1xrtx3090")
    text = planned("internvl2-8b", machine, "turbomind", images=0)
    (less,) = learned(text, launched(text, -40 * MIB, -60 * MIB)).calibrations
    assert (less.context, less.buffers) == (0, 0)
    (more,) = learned(text, launched(text, 40 * MIB, 60 * MIB)).calibrations
    assert more.context + more.buffers >= 100 * MIB
    without = planned("qwen2.5-7b", machine, "turbomind")
    (never,) = learned(without, launched(without, -40 * MIB, -20 * MIB)).calibrations
    assert never.context < 0


def test_equal_groups_tell_by_how_much_they_differ_whatever_was_learned_before() -> None:
    def spread(machine: Machine, *sizes: int) -> tuple[Machine, int]:
        plan = api.plan("internvl2-8b", on=machine, engine="turbomind", tp=1, replicas=2)
        seen = [
            launched(plan, size * MIB, size * MIB, group=group) for group, size in enumerate(sizes)
        ]
        more = learned(plan, *seen)
        return more, more.calibrations[0].spread

    machine, apart = spread(machine_from("2xrtx3090"), 40, 70)
    assert abs(apart - 60 * MIB) <= 2 * MIB  # what is learned is rounded up
    for sizes in ((40, 70), (70, 40)):  # the larger suffices for both
        (known,) = spread(machine_from("2xrtx3090"), *sizes)[0].calibrations
        assert min(known.context, known.buffers) >= 70 * MIB
    # The next plan counts what was learned; a launch that takes just that has no spread.
    assert spread(machine, 0, 0)[1] == 0


def test_the_engines_figures_beside_the_plans() -> None:
    plan = plausible_plan()
    budget = CacheBudget(budget=17170 * MIB, free=19667 * MIB, ratio=0.873)
    free, cache = compare_cache(plan.engines[0], budget)
    assert free.forecast == min(map(free_of, plan.ledgers))
    assert "19,667.0 MiB (forecast 19,714.0, -0.2%)" in in_words(free)
    assert "17,170.0 MiB (forecast 17,000.0, +1.0%)" in in_words(cache)
    slab = Slab(slab_size=32 * MIB, object_size=2 * MIB)
    tokens = compare_tokens(plan, plan.engines[0], budget, slab)
    assert tokens.actual == 535 * 16 * 64
    assert "547,840 (forecast 544,000, +0.7%)" in in_words(tokens)
    on_card = RunFigure(what="in use", forecast=100 * MIB, actual=99 * MIB, gpu=1)
    assert in_words(on_card) == "GPU 1: in use: 99.0 MiB (forecast 100.0, -1.0%)"
    assert "+0.0%" in in_words(replace(on_card, actual=100 * MIB - 1))


def test_tokens_of_a_hybrid_model_are_beside_its_states() -> None:
    plan = turbofit.predict(
        "qwen3.5-4b", on="1xrtx3090", engine="turbomind", tp=1, cache_max_entry_count=0.5
    )
    region = plan.engines[0].kv.region_bytes
    budget = CacheBudget(budget=region, free=2 * region, ratio=0.5)
    slab = Slab(slab_size=32 * MIB, object_size=2 * MIB)
    assert compare_tokens(plan, plan.engines[0], budget, slab).actual == plan.engines[0].kv.tokens

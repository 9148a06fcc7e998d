"""The reasons that a plan gives, and its margin."""

from __future__ import annotations

from itertools import pairwise

import pytest
from msgspec.structs import replace

import turbofit
from turbofit import api
from turbofit.core.machine import Calibration, Machine
from turbofit.core.units import GIB, MIB
from turbofit.machine.spec import parse_spec
from turbofit.memory.calibrated import identity
from turbofit.planning import resolved_request
from turbofit.planning.choose import best_plan
from turbofit.planning.request import PlanRequest
from turbofit.planning.resolve import resolve
from turbofit.planning.resolved_request import Margin

LIMITS_COMPARED = True


def test_what_a_client_may_ask_beyond_a_plan_is_explained_in_both() -> None:
    plan, told, own = (
        turbofit.plan("internvl2-8b", on="1xrtx3090"),
        turbofit.predict("internvl2-8b", on="1xrtx3090"),
        turbofit.predict("internvl2-8b", on="1xrtx3090", max_dynamic_patch=12),
    )
    assert [one.promise.limits.max_dynamic_patch for one in (plan, told, own)] == [12, 24, 12]
    (why,) = (why for why in plan.reasons if why.startswith("max_dynamic_patch"))
    assert why.startswith("max_dynamic_patch 12: the model's own")
    assert "detail: high is 24" in why
    (why,) = (why for why in told.reasons if "up to 24 tiles" in why)
    assert "own max_dynamic_patch is 12" in why
    assert not any("detail: high" in why for why in own.reasons)


@pytest.mark.parametrize(
    ("model", "on", "limits"),
    [
        ("internvl2-8b", "4xrtx3090", [12, 6, 4, 1]),
        ("qwen2-vl-7b", "1xrtx3090", [12_845_056, 4_000_000, 2_000_000, 1_000_000, 500_000]),
    ],
)
def test_smaller_images_leave_more(model: str, on: str, limits: list[int]) -> None:
    plan = turbofit.plan(model, on=on, enable_prefix_caching=False)  # which each limit decides on
    costs = plan.limit_costs
    assert [cost.limit for cost in costs] == limits
    assert (costs[0].limit, costs[0].kv_tokens) == (plan.promise.limits.image_limit, plan.kv_tokens)
    assert costs[0].requests_per_second == plan.throughput.requests_per_second
    for larger, smaller in pairwise(costs):
        assert smaller.image_tokens < larger.image_tokens
        assert smaller.kv_tokens >= larger.kv_tokens
        assert smaller.requests_per_second > larger.requests_per_second
        assert smaller.seconds_to_first_token < larger.seconds_to_first_token


def test_a_plan_for_a_limit_serves_at_least_what_its_row_says() -> None:
    on = "2xrtx3090"
    row = turbofit.plan("qwen2-vl-7b", on=on).limit_costs[-2]
    option, value = row.option.split()
    assert option == "--max-pixels"
    plan = turbofit.plan("qwen2-vl-7b", on=on, max_pixels=int(value))
    # A plan takes the smallest batch within 99 % of the best rate.
    assert plan.throughput.requests_per_second >= 0.99 * row.requests_per_second
    assert plan.promise.limits.max_pixels_per_image == row.limit
    # Where no limit can be given, there is no table.
    assert not turbofit.plan("llava-1.5-7b", on=on).limit_costs
    for asked in ({"images": 0}, {"image_size": (800, 600)}):
        assert not turbofit.plan("internvl2-8b", on=on, **asked).limit_costs
    assert not turbofit.plan("internvl2-8b", on="4xa100-80g,ram=2GiB").limit_costs  # nor a fit


MODEL = "qwen2-vl-2b"


def calibrated(spread: int, engine: str = "turbomind") -> Machine:
    """A machine on which the model was measured as it is estimated."""
    machine = parse_spec("1xrtx3090")
    plan = api.plan(MODEL, on=machine, engine=engine)
    known = Calibration(
        model=identity(plan.model), engine=engine, engine_version=plan.backend.version,
        lmdeploy="0.18.0", gpus=(machine.gpus[0].name,), driver=str(machine.driver),
        communicator="nccl", when="2026-11-20T00:00:00+00:00", context=0, buffers=0,
        spread=spread,
    )  # fmt: skip
    return replace(machine, calibrations=(known,))


@pytest.mark.parametrize("engine", ["turbomind", "pytorch"])
def test_what_was_measured_needs_less(engine: str) -> None:
    plain, spread, exact = (
        api.plan(MODEL, on=on, engine=engine)
        for on in ("1xrtx3090", calibrated(50 * MIB, engine), calibrated(0, engine))
    )
    margins = [plan.ledgers[0].margin for plan in (plain, spread, exact)]
    assert margins == [256 * MIB, 114 * MIB, 64 * MIB]
    assert plain.engines[0].kv.tokens < spread.engines[0].kv.tokens < exact.engines[0].kv.tokens
    (why,) = [why for why in spread.reasons if why.startswith("margin")]
    assert "64 MiB, and the 50.0 MiB by which measurements of turbofit calibrate here" in why


@pytest.mark.parametrize(
    ("card", "usual", "rehearsed"),
    [
        ("rtx3090", 256, 256),  # all of it is for contexts and libraries
        ("l40s", 460, 256),
        ("a100-80g", 819, 307),
        ("h100", 815, 305),
        ("h200", 1437, 539),
    ],
)
def test_a_rehearsal_takes_nothing_of_the_margin_for_contexts_and_libraries(
    card: str, usual: int, rehearsed: int
) -> None:
    gpu = parse_spec(f"1x{card}").gpus[0]
    margins = (Margin(), Margin(rehearsed=True))
    assert [margin.of(gpu) // MIB for margin in margins] == [usual, rehearsed]


def test_where_they_were_measured_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a run of bench/gpu on such a card, or by a start that proved the plan on these."""
    gpu = parse_spec("1xrtx3090").gpus[0]
    for over, margin in ((-300, 96), (0, 96), (76, 172), (138, 234), (206, 256)):
        assert Margin(over=over * MIB).of(gpu) == margin * MIB
        assert Margin(over=over * MIB, bytes=1).of(gpu) == 1
    monkeypatch.setattr(resolved_request, "is_measured", lambda _gpu: True)
    assert (Margin(rehearsed=True).of(gpu), Margin().of(gpu)) == (96 * MIB, 256 * MIB)


@pytest.mark.parametrize(
    ("card", "margin", "words"),
    [
        ("rtx3090", Margin(), "256 MiB: contexts and libraries are estimates on this card"),
        ("h100", Margin(), "816 MiB: contexts and libraries were measured on such a card"),
        ("h100", Margin(rehearsed=True), "306 MiB: a rehearsal settled what LMDeploy allocates; "),
        ("rtx3090", Margin(over=5 * MIB), "101 MiB: a start proved this plan on these cards, and"),
        ("rtx3090", Margin(bytes=100 * MIB), ""),
    ],
)
def test_a_plan_says_on_what_its_margin_rests(card: str, margin: Margin, words: str) -> None:
    resolved = replace(resolve(PlanRequest(model=MODEL, on=f"1x{card}")), margin=margin)
    said = [why for why in best_plan(resolved, "turbomind").reasons if why.startswith("margin")]
    assert [why.startswith(f"margin {words}") for why in said] == ([True] if words else [])


@pytest.mark.parametrize(
    ("on", "asked", "words"),
    [
        ("rtx4090+a100-80g", {"replicas": 2}, "256 MiB to 819 MiB: contexts and libraries are"),
        # What a budget leaves to others is no margin.
        (
            "1xrtx3090",
            {"budget": 0.9},
            "256 MiB: contexts and libraries are estimates on this card",
        ),
    ],
)
def test_the_margin_is_that_of_each_card(on: str, asked: dict[str, object], words: str) -> None:
    plan = turbofit.plan("internvl2-2b", on=on, **asked)
    assert [why for why in plan.reasons if why.startswith(f"margin {words}")]


def test_a_longer_context_costs_images_only_where_there_are_some() -> None:
    for model, said in (("qwen3-0.6b", False), ("gemma-3-4b", True)):
        reasons = turbofit.plan(model, on="1xrtx4090").reasons
        (why,) = [why for why in reasons if why.startswith("session_len")]
        assert "--context asks for more tokens" in why
        assert ("images" in why) is said


@pytest.mark.parametrize("engine", ["turbomind", "pytorch"])
def test_what_was_measured_is_believed_of_no_fuller_card(engine: str) -> None:
    def plan(taken: int, **changed: str) -> tuple[int, list[str]]:
        """The margin, and the sentence about a calibration that does not count."""
        machine = calibrated(0, engine)
        card, (known,) = machine.gpus[0], machine.calibrations
        full = replace(card, used=card.used + taken, free=card.free - taken)
        known = replace(known, free=card.free, **changed)
        on = replace(machine, gpus=(full,), calibrations=(known,))
        made = api.plan(MODEL, on=on, engine=engine)
        said = [why for why in made.reasons if why.startswith("the calibration does")]
        return made.ledgers[0].margin, said

    assert plan(32 * MIB) == (64 * MIB, [])  # a desktop never holds the same
    fuller, (why,) = plan(33 * MIB)
    assert fuller == 256 * MIB
    assert "were free on each GPU at the calibration" in why
    for changed in ({"driver": "1.2.3"}, {"engine": "another"}, {"engine_version": "0.1"}):
        assert plan(33 * MIB, **changed)[1] == []


def test_what_a_person_asks_for_stays_and_a_large_spread_adds_nothing() -> None:
    machine = calibrated(0)
    for on, asked, margin in (
        (machine, {"margin": 300 * MIB}, 300 * MIB),
        (machine, {"margin": "2%"}, int(machine.gpus[0].total * 0.02)),
        (calibrated(2 * GIB), {}, 256 * MIB),
    ):
        assert api.plan(MODEL, on=on, **asked).ledgers[0].margin == margin
    (gpu,) = api.plan(MODEL, on=machine, budget=12 * GIB).ledgers
    assert gpu.peak - gpu.used + 64 * MIB <= 12 * GIB

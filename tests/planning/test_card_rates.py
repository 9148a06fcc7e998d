"""What timed forwards of one model say of its cards, and what they leave open."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
from msgspec.structs import replace

import turbofit
from turbofit.core.errors import UsageError
from turbofit.core.machine import Calibration, MeasuredRate, MeasuredSteps, StepPoint
from turbofit.core.plan import Plan
from turbofit.memory.calibrated import identity, rates_shown, weights_of
from turbofit.memory.engines import engine_of
from turbofit.model.presets import preset_model
from turbofit.planning import card_rates
from turbofit.planning.card_rates import refuse_impossible
from turbofit.planning.speed import GroupRates, group_rates, rates

PLAN = turbofit.plan("internvl2-8b", on="1xrtx3090", engine="turbomind")


def group_of(plan: Plan, calibrations: tuple[Calibration, ...] = ()) -> GroupRates:
    machine = replace(plan.machine, calibrations=calibrations)
    settings = plan.engines[0].settings
    return group_rates(plan.model, settings, machine, machine.gpus, engine_of(plan))


GROUP = group_of(PLAN)


def steps_of(group: GroupRates, *, launches: float = 0.0, spread: float = 0.0) -> MeasuredSteps:
    """The forwards of a card with these rates; each takes ``launches`` seconds more."""
    decoded = [
        StepPoint(sequences=n, cached=n * context, seconds=1.0)
        for n, context in product((1, 4, 16), (64, 2048))
    ]
    prompts = [StepPoint(sequences=1, cached=64, seconds=1.0, prompt=n) for n in (512, 1024, 4096)]
    images = [
        StepPoint(sequences=1, cached=64, seconds=1.0, prompt=256 * n, units=n) for n in (2, 4, 16)
    ]
    points = []
    for point in (*decoded, *prompts, *images):
        tokens, pairs = point.sequences + point.prompt, point.prompt**2 / 2
        seconds = group.seconds(rates(), tokens, pairs=pairs, cached=point.cached) + launches
        seconds += group.tower_seconds(point.units) if point.units else 0.0
        points.append(replace(point, seconds=seconds, spread=spread))
    return MeasuredSteps(quant_policy=0, points=tuple(points))


def rates_of(group: GroupRates, steps: MeasuredSteps) -> dict[str, MeasuredRate]:
    found = card_rates.rates_of(group, steps, partial(group.launch_seconds, rates()))
    return {rate.of: rate for rate in found}


def slower(group: GroupRates, by: float) -> GroupRates:
    card = group.card
    return replace(
        group,
        card=replace(
            card, **{name: by * getattr(card, name) for name in card.__struct_fields__}
        ),
    )  # fmt: skip


def test_the_rates_of_a_slower_card_are_found() -> None:
    true = slower(GROUP, 0.6)
    found = rates_of(GROUP, steps_of(true))
    assert found.keys() == {"bandwidth", "cache_bandwidth", "flops", "vision_flops"}
    for name, rate in found.items():
        assert rate.value == pytest.approx(getattr(true.card, name), rel=0.01), name
        assert rate.spread < 0.1


def test_what_launches_leave_open_is_the_spread_of_a_rate() -> None:
    usual = GROUP.launch_seconds(rates(), 1)
    for launches in (-0.4 * usual, 0.4 * usual):
        found = rates_of(GROUP, steps_of(GROUP, launches=launches))
        assert found
        for name, rate in found.items():
            true = getattr(GROUP.card, name)
            bound = 0.001 + rate.spread / (1 - rate.spread)
            assert true == pytest.approx(rate.value, rel=bound), name


def test_a_small_model_on_a_fast_card_does_not_determine_how_weights_are_read() -> None:
    small = group_of(turbofit.plan("internvl2-2b", on="1xh100", engine="turbomind"))
    found = rates_of(small, steps_of(small))
    assert "bandwidth" not in found
    assert found["flops"].value == pytest.approx(small.card.flops, rel=0.01)


def test_uneven_readings_determine_nothing() -> None:
    assert rates_of(GROUP, steps_of(GROUP, spread=0.4)) == {}
    assert rates_of(GROUP, MeasuredSteps(quant_policy=0, points=())) == {}


def test_a_rate_that_no_card_reaches_is_refused() -> None:
    fast = rates_of(GROUP, steps_of(slower(GROUP, 4.0)))
    with pytest.raises(UsageError, match=r"cannot be right for the NVIDIA .* 3090: .*its peak"):
        refuse_impossible(fast.values(), PLAN.machine.gpus)
    refuse_impossible(rates_of(GROUP, steps_of(GROUP)).values(), PLAN.machine.gpus)


def kept(plan: Plan, *found: MeasuredRate, when: str = "2026-11-29T21:00:00") -> Calibration:
    steps = MeasuredSteps(quant_policy=0, points=(), weights=weights_of(plan.model), rates=found)
    return Calibration(
        model=identity(plan.model), engine=plan.backend.name, engine_version=plan.backend.version,
        lmdeploy="0.18.0", gpus=(plan.machine.gpus[0].name,), driver=str(plan.machine.driver),
        communicator="", when=when, context=0, buffers=0, steps=steps,
    )  # fmt: skip


def test_each_rate_is_of_the_model_that_determines_it_best() -> None:
    other = turbofit.plan("qwen2.5-7b", on="1xrtx3090", engine="turbomind")
    first = kept(
        PLAN,
        MeasuredRate(of="bandwidth", value=5e11, spread=0.2),
        MeasuredRate(of="vision_flops", value=GROUP.card.vision_flops / 2, spread=0.1),
    )
    second = kept(
        other, MeasuredRate(of="bandwidth", value=6e11, spread=0.1), when="2026-11-30T21:00:00"
    )
    wanted = turbofit.plan("internvl2-2b", on="1xrtx3090", engine="turbomind")
    group, plain = group_of(wanted, (first, second)), group_of(wanted)
    assert (group.card.bandwidth, group.card.flops) == (6e11, plain.card.flops)
    assert group.tower_seconds(5) == pytest.approx(2 * plain.tower_seconds(5))
    assert group.steps.source == (
        "reading weights, vision of the cards as measured here on 2026-11-29 with InternVL2-8B"
        " and here on 2026-11-30 with Qwen2.5-7B-Instruct, another model"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"gpus": ("NVIDIA L4",)},
        {"driver": "999.1"},
        {"engine": "pytorch"},
        {"engine_version": "0.1"},
        {"steps": None},
        {"steps": MeasuredSteps(quant_policy=8, points=(), weights="16 bits", rates=())},
        {"steps": MeasuredSteps(quant_policy=0, points=(), weights="awq, 4 bits", rates=())},
    ],
)
def test_rates_hold_for_their_cards_engine_and_types_alone(change: dict[str, object]) -> None:
    rate = MeasuredRate(of="bandwidth", value=5e11, spread=0.1)
    calibration, engine = kept(PLAN, rate), engine_of(PLAN)
    settings, gpus = PLAN.engines[0].settings, PLAN.machine.gpus
    changed = replace(calibration, **change)
    if changed.steps is not None:
        changed = replace(changed, steps=replace(changed.steps, rates=(rate,)))
    for one, found in ((calibration, {"bandwidth": 5e11}), (changed, {})):
        machine = replace(PLAN.machine, calibrations=(one,))
        assert rates_shown(PLAN.model, settings, machine, gpus, engine)[0] == found


def test_models_of_experts_show_no_rates_and_take_none() -> None:
    assert weights_of(preset_model("internvl2-8b")) == "16 bits"
    assert weights_of(preset_model("qwen3-30b-a3b")) == ""

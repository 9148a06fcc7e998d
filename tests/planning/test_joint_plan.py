"""Several models on the same cards: the parts add up, and every promise holds at once."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

import turbofit
from turbofit.core.errors import UsageError
from turbofit.core.machine import Calibration, Machine
from turbofit.core.units import GIB, MIB, format_bytes
from turbofit.machine.spec import parse_spec
from turbofit.memory.calibrated import identity
from turbofit.planning import joint_plan as joint_plan_module
from turbofit.planning.joint_plan import JointPlan, joint_plan, options_of_each
from turbofit.planning.request import PlanRequest

pytestmark = pytest.mark.slow


def together(*models: str, on: str | Machine = "1xrtx3090", **given) -> JointPlan:
    return joint_plan([PlanRequest(model=name, on=on, **given) for name in models])


def test_the_account_of_a_card_adds_up_and_caches_hold_as_many_requests_of_each_model() -> None:
    three = together("internvl2-2b", "qwen2-vl-2b", "internvl2-1b")
    assert three.fits
    assert three.serve is not None
    (gpu,) = three.gpus
    assert [one.model for one in gpu.models] == [plan.model.name for plan in three.plans]
    assert gpu.used + sum(one.bytes for one in gpu.models) + gpu.left == gpu.total - gpu.reserved
    assert 0 <= gpu.left < GIB // 4
    for one, plan, budget in zip(gpu.models, three.plans, three.budgets, strict=True):
        (ledger,) = plan.gpus
        assert one.bytes - one.margin == max(ledger.peak, ledger.load_peak) - ledger.used
        assert one.margin >= 256 * MIB
        assert one.bytes <= budget
        assert plan.kv.longest_request_tokens == 32768
    assert sum(three.budgets) <= parse_spec("1xrtx3090").gpus[0].free
    tokens = [plan.kv.tokens for plan in three.plans]
    assert max(tokens) < 1.3 * min(tokens)


def test_images_are_asked_of_models_that_take_them() -> None:
    request = PlanRequest(model="internvl2-2b", images=2, image_size=(800, 600))
    seer, reader, own = (
        {"model": "internvl2-2b"}, {"model": "qwen2.5-7b"}, {"model": "qwen2.5-7b", "images": 2},
    )  # fmt: skip
    assert options_of_each(request, [seer, reader, own]) == [
        seer, {**reader, "images": 0, "image_size": None}, {**own, "image_size": None},
    ]  # fmt: skip


def test_what_was_given_is_kept_by_each_and_a_budget_holds_for_all_together() -> None:
    pair = ("internvl2-2b", "internvl2-1b")
    for plan in together(*pair, context=8192, concurrency=6, images=0).plans:
        assert plan.kv.longest_request_tokens == 8192
        assert plan.settings.max_batch_size >= 6
        assert plan.kv.tokens >= 6 * 8192
    assert 10 * GIB < sum(together(*pair, budget="50%", images=0).budgets) <= 12 * GIB
    (gpu,) = together(*pair, on="1xa100", margin="4GiB", images=0).gpus
    assert [one.margin for one in gpu.models] == [4 * GIB, 4 * GIB]
    assert 0 <= gpu.left < GIB
    with pytest.raises(UsageError, match="two models"):
        together("internvl2-1b")


def test_what_a_calibration_saves_of_a_margin_is_not_counted_as_taken() -> None:
    """Of two calibrated models -657 MiB of an H100 stayed free."""
    pair, machine = ("internvl2-2b", "internvl2-1b"), parse_spec("1xh100")
    made = [
        Calibration(
            model=identity(plan.model), engine=plan.engine.name, engine_version=plan.engine.version,
            lmdeploy="0.18.0", gpus=(plan.gpus[0].name,), driver=str(machine.driver),
            communicator="nccl", when="2026-11-27", context=-30 * MIB, buffers=-40 * MIB,
        )
        for plan in (turbofit.plan(name, on=machine, images=0) for name in pair)
    ]  # fmt: skip
    found = together(*pair, on=replace(machine, calibrations=tuple(made)), images=0)
    (gpu,) = found.gpus
    assert [one.margin for one in gpu.models] == [64 * MIB, 64 * MIB]
    assert 0 <= gpu.left < GIB
    assert f"{format_bytes(gpu.left)} of the GPU stay free" in found.verdict


def test_what_does_not_fit_together_says_by_how_much() -> None:
    found = together("internvl2-8b", "qwen2-vl-7b")
    assert not found.fits
    for words in ("do not fit together", " of the GPU at least", "short"):
        assert words in found.verdict
    assert "--swap" in found.remedy
    assert sum(found.budgets) > parse_spec("1xrtx3090").gpus[0].free
    assert all(plan.fits for plan in found.plans)


def test_a_card_with_little_room_neither_hides_the_need_nor_the_cards_that_hold_all() -> None:
    """The need was said to be the room of the smallest card, and nothing of the others."""
    pair, on = ("internvl2-2b", "qwen2-vl-2b"), "a100+rtx3060:free=4GiB"
    found, alone = together(*pair, on=on), together(*pair, on=on, gpus="0")
    assert not found.fits
    assert all(plan.fits for plan in found.plans)
    assert all(5 * GIB < need < 9 * GIB for need in found.budgets)
    assert "4.0 GiB are free on GPU 1" in found.verdict
    assert alone.fits
    assert found.remedy == f"--gpus 0: {alone.verdict}"


def test_cards_of_too_little_room_are_not_planned_for(monkeypatch) -> None:
    """Cards differ by some MiB on most machines, and each look takes seconds."""
    looked = []
    on = joint_plan_module._on

    def counted(machine: Machine, *rest: Any) -> Any:
        looked.append(machine.visible)
        return on(machine, *rest)

    monkeypatch.setattr(joint_plan_module, "_on", counted)
    cards = "+".join(f"rtx3060:free={free}GiB" for free in (6.2, 6.0))
    assert not together("internvl2-2b", "qwen2-vl-2b", on=cards, images=0).fits
    assert looked == [(0, 1)]


def test_a_concurrency_is_held_by_each_in_its_part() -> None:
    found, more, alone = (
        together("internvl2-2b", "internvl2-1b", concurrency=number) for number in (20, 40, 1000)
    )
    assert found.fits
    for plan in found.plans:
        assert plan.held.requests >= 20
        assert f"{plan.held.requests} of 3,840 at once" in found.verdict
    assert not more.fits
    assert "do not fit together" in more.verdict
    assert "--concurrency" in more.remedy
    assert "with --concurrency 1000: the cache holds " in alone.verdict


def test_models_beside_each_other_share_the_cores_and_the_memory_of_their_host() -> None:
    """Each was forecast as if all cores prepared its images alone."""
    machine = parse_spec("1xa100")

    def with_ram(size: int) -> JointPlan:
        host = replace(machine.host, cpus=8, ram_total=size, ram_available=size)
        return together(
            "internvl2-2b", "internvl2-1b", on=replace(machine, host=host), context=8192
        )

    enough, short = with_ram(12 * GIB), with_ram(8 * GIB)
    assert enough.fits
    assert sum(plan.host.total for plan in enough.plans) <= 12 * GIB
    for plan in enough.plans:
        assert plan.machine.host.cpus == 4
        assert plan.host.image_threads == 3  # one of its four cores is the event loop's
        assert plan.throughput is not None
        assert plan.throughput.host is not None
        assert plan.throughput.host.cores == 3
    assert not short.fits
    assert all(plan.fits for plan in short.plans)
    assert sum(plan.host.total for plan in short.plans) > 8 * GIB
    assert "do not fit together: host RAM is " in short.verdict

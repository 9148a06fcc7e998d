"""What a rehearsal sends and charges: mixes of images, and what a calibration has measured."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from turbofit import api
from turbofit.core.machine import Calibration
from turbofit.core.plan import Limits, Plan
from turbofit.core.units import MIB
from turbofit.machine.source import machine_from
from turbofit.memory.calibrated import identity
from turbofit.rehearse.mixes import Image, Prompt, PromptMaker, let_through, units_of_request
from turbofit.rehearse.planned import charged


def plans(engine: str, context: int, buffers: int) -> tuple[Plan, Plan]:
    """Without and with a calibration, at the same ratio."""
    machine = machine_from("1xrtx3090")
    plan = api.plan("qwen2-vl-2b", on=machine, engine=engine, cache_max_entry_count=0.5)
    one = Calibration(
        model=identity(plan.model), engine=engine, engine_version=plan.engine.version,
        lmdeploy="0.18.0", gpus=(machine.gpus[0].name,), driver=str(machine.driver),
        communicator="nccl", when="2026-11-20T00:00:00+00:00", context=context * MIB,
        buffers=buffers * MIB,
    )  # fmt: skip
    known = replace(machine, calibrations=(one,))
    return plan, api.plan("qwen2-vl-2b", on=known, engine=engine, cache_max_entry_count=0.5)


@pytest.mark.parametrize(
    ("engine", "context", "buffers"),
    [("turbomind", -60, -38), ("turbomind", 25, 140), ("pytorch", 0, -20), ("pytorch", 0, 140)],
)
def test_a_twin_has_the_corrections(engine: str, context: int, buffers: int) -> None:
    (before,), (after,) = (charged(plan).gpus for plan in plans(engine, context, buffers))
    assert after.used - before.used == context * MIB
    assert after.late - before.late == buffers * MIB


def test_no_twin_has_less_than_nothing() -> None:
    _, plan = plans("turbomind", -5000, -5000)
    (gpu,) = charged(plan).gpus
    assert gpu.used == gpu.late == 0


def tile(units: int, tokens: int) -> Image | None:
    """As many tiles of 256 tokens as there is room for."""
    found = min(units, tokens // 256)
    return Image(found, 256 * found) if found else None


MAKER = PromptMaker(tile, units=13, images=3, request_units=30)


def tiles(*counts: int) -> Prompt:
    return Prompt(1, tuple(Image(count, 256 * count) for count in counts), 1)


def test_an_image_is_as_large_as_its_prompt_has_room() -> None:
    assert MAKER.alone(3330) == tiles(13)
    assert MAKER.alone(3329) == tiles(12)
    assert MAKER.alone(3330, 5) == tiles(5)
    assert MAKER.alone(257) is None
    assert MAKER.prompt(13, rest=7).length == 1 + 3328 + 7
    with pytest.raises(ValueError, match="no image of 0 units"):
        MAKER.prompt(0)


def test_prompts_are_filled_with_whole_images_from_the_largest() -> None:
    assert MAKER.filled(8192, 8) == [tiles(13), tiles(13), tiles(5)]
    assert MAKER.filled(8192, 2) == [tiles(13), tiles(13)]
    assert MAKER.request(99, 1 << 20, 1 << 20) == tiles(13, 13, 4)
    assert MAKER.request(20, 1 << 20, 1 << 20) == tiles(13, 7)
    # The last image needs one token of the forward, but its whole length in the context.
    assert MAKER.request(99, 1 << 20, 3330) == tiles(13, 13)
    assert MAKER.request(99, 2 + 14 * 256, 3330) == tiles(13, 1)
    assert MAKER.request(0, 1 << 20, 1 << 20) is None
    # A gate makes the last image smaller.
    assert MAKER.under([tiles(13)] * 4, 30, 8) == [tiles(13), tiles(13), tiles(4)]
    assert MAKER.under([tiles(13)] * 4, 30, 2) == [tiles(13), tiles(13)]
    # Images of several prompts share requests.
    assert MAKER.together([tiles(13), tiles(13), tiles(5)]) == [tiles(13, 13), tiles(5)]
    assert MAKER.together([tiles(1)] * 4) == [tiles(1, 1, 1), tiles(1)]
    assert units_of_request(13, 3, 30) == [13, 13, 4]
    assert units_of_request(13, 2, 30) == [13, 13]


def test_a_gateway_counts_units_where_fewer_are_paid_for_than_can_meet() -> None:
    limits = Limits(
        vision_unit="tile", max_dynamic_patch=12, max_pixels_per_image=None, images_per_request=1,
        units_per_image=13, units_per_request=13, units_per_forward=26,
        image_tokens_per_request=3328, n=1, bytes_per_image=1, bytes_per_body=1,
    )  # fmt: skip
    assert let_through(limits, 32) == 26
    assert let_through(limits, 26) is None

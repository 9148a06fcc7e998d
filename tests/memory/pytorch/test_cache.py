"""The PyTorch engine's blocks and states, and the images that meet in a forward."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.memory.conftest import launch_on
from turbofit.core.plan import Settings
from turbofit.memory.account import VisionLoad
from turbofit.memory.pytorch.cache import block_bytes, engine_bound, state_bytes, units_met
from turbofit.model.source import resolve_model


@pytest.mark.parametrize(
    ("crops", "images", "chunk", "meet"),
    [
        # Phi-3.5's smallest page is 313 tokens, and as many tiles as any.
        (1, 1, 8192, 8192 // 313 * 2), (16, 1, 8192, 8192 // 313 * 17),
        # A page of 16 tiles is 2509 tokens, and every chunk of its prompt as long: 8 small ones.
        (16, 1, 1024, 1024 // 313 * 17), (16, 5, 1024, 5 * 17), (16, 20, 1024, 2509 // 313 * 17),
    ],
)  # fmt: skip
def test_pages_that_meet_are_padded_to_the_planned_limit(crops, images, chunk, meet):
    rule = resolve_model("phi-3.5-vision").image_rule
    load = VisionLoad(
        units_per_image=crops + 1, images_per_request=images, tokens_per_request=2509 * images
    )
    batch = 128 if chunk == 8192 else 4
    settings = Settings(max_batch_size=batch, session_len=8192, max_prefill_token_num=chunk)
    assert engine_bound(rule, load, settings) == meet


def test_images_meet_by_their_tokens_and_the_next_forward_s_are_on_the_card_already() -> None:
    """Images are never cut, and pixels of the next forward are sent while one runs."""
    launch = launch_on("1xrtx3090", "internvl2-8b", units=None)
    rule, load = launch.model.image_rule, launch.vision_load
    many = Settings(max_batch_size=8, max_prefill_token_num=8192)
    few = Settings(max_batch_size=8, max_prefill_token_num=1024)
    one = Settings(max_batch_size=1, max_prefill_token_num=8192)
    assert engine_bound(rule, load, many) == 32  # 8192 tokens of 256 each
    assert engine_bound(rule, load, few) == 13  # a chunk grows for an image
    assert engine_bound(rule, load, one) == 13

    def met(load: VisionLoad, settings: Settings) -> tuple[int, int]:
        return units_met(engine_bound(rule, load, settings), rule, load, settings)

    assert met(load, many) == (32, 32)
    # After an image that is a chunk of its own come the small images of other requests ...
    assert met(load, few) == (13, 4)
    # ... or the next image of its own.
    several = launch_on("1xrtx3090", "internvl2-8b", units=None, images=3).vision_load
    assert met(several, few) == (13, 13)
    # One row at a time; and a gateway that lets no more through than one forward has.
    assert (met(load, one), met(replace(load, units_per_forward=26), many)) == ((13, 0), (26, 0))


@pytest.mark.parametrize(
    ("name", "tp", "size"),
    [
        # Latents are keys alone, of one head.
        ("glm-4.7-flash", 1, 47 * 32 * 576 * 2), ("glm-4.7-flash", 4, 47 * 32 * 576 * 2),
        # MiniCPM3's are expanded before they are cached: each head's keys and padded values.
        ("minicpm3-4b", 1, 62 * 64 * 40 * 2 * (64 + 32) * 2),
        # LMDeploy cuts no layer's attention of Llama 4 into chunks of 8192 tokens.
        ("llama-4-scout", 1, 2 * 48 * 8 * 64 * 128 * 2),
        # Only attention has keys and values, not delta nets.
        ("qwen3.5-27b", 1, 2 * 16 * 4 * 64 * 256 * 2),
    ],
)  # fmt: skip
def test_what_a_block_holds(name: str, tp: int, size: int) -> None:
    assert block_bytes(resolve_model(name).text, Settings(tp=tp)) == size


#: Of the 27B: 48 layers of 10,240 channels and 48 heads of 128 x 128.
WINDOW, STATE = 48 * 10_240 * 4 * 2, 48 * 48 * 128 * 128 * 2


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_slot_for_each_sequence_and_two(tp: int) -> None:
    text = resolve_model("qwen3.5-27b").text
    for settings in (Settings(), Settings(session_len=10, quant_policy=8)):
        slots = state_bytes(text, replace(settings, tp=tp, max_batch_size=8))
        assert slots == 10 * (WINDOW + STATE) // tp
    assert state_bytes(resolve_model("qwen3-vl-8b").text, Settings()) == 0

"""Transformers' and LMDeploy's own image rules of LLaVA, and Transformers' parameter counts."""

from __future__ import annotations

import random

import pytest

from tests.support.checkpoints_llava import make_llava
from tests.support.oracles import (
    front_end,
    picture,
    tokens_of,
)
from turbofit.core.images import AnyresRule
from turbofit.model.families.engines import engine_problem
from turbofit.model.source import resolve_model
from turbofit.planning.compatibility import FrontEnd

NEXT = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
OV = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))
SLIM = ((336, 336 * 2), (336 * 4, 336), (336, 336), (336 * 2, 336 * 2), (336, 336 * 6))


def rule_of(grids, side=336, most=None):
    return AnyresRule(
        tile_size=side, tokens_per_tile=(side // 14) ** 2, grids=grids, most_tiles=most,
        max_dynamic_patch=max(high * wide // side**2 for high, wide in grids),
    )  # fmt: skip


RULES = [rule_of(NEXT), rule_of(OV, 384, 9), rule_of(OV[:20], 384, 2), rule_of(SLIM)]


def sizes(seed: int, number: int) -> list[tuple[int, int]]:
    """Random sizes, long strips, tiny images, and shapes that are nearly a grid's."""
    rng = random.Random(seed)
    found = [(1, 1), (1, 5000), (5000, 1), (336, 336), (672, 672), (335, 673)]
    while len(found) < number:
        found.append((rng.randrange(1, 4000), rng.randrange(1, 4000)))
        found.append((rng.randrange(1, 60), rng.randrange(1, 4000)))
        side = rng.choice([336, 384])
        wide, high = side * rng.randrange(1, 7), side * rng.randrange(1, 7)
        found.append((wide + rng.randrange(-3, 4), high + rng.randrange(-3, 4)))
    return found


def processor_of(rule, limit):
    """Transformers' own counting, without a tokenizer or pixels."""
    from types import SimpleNamespace

    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
    from transformers.models.llava_onevision.processing_llava_onevision import (
        LlavaOnevisionProcessor,
    )

    base = LlavaOnevisionProcessor if rule.most_tiles else LlavaNextProcessor
    own = base.__new__(base)
    grids = [list(grid) for grid in rule.grids_within(limit)]
    own.image_processor = SimpleNamespace(image_grid_pinpoints=grids)
    own.num_image_tokens, own.patch_size = rule.tokens_per_tile, 14
    own.num_additional_image_tokens = 0
    own.vision_aspect_ratio = f"anyres_max_{rule.most_tiles}"
    return own


@pytest.mark.parametrize("rule", RULES)
def test_tokens_and_tiles_are_transformers(transformers, rule):
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    rng = random.Random(1)
    worst = dict.fromkeys(rule.lower_limits(), 0)
    for width, height in sizes(7, 2100):
        limit = rng.choice(list(worst))
        own = processor_of(rule, limit)
        side = rule.tile_size
        tokens = own._get_number_of_features(height, width, side, side)
        assert rule.tokens(width, height, limit) == tokens
        tiles = rule.units(width, height, limit)
        grids = own.image_processor.image_grid_pinpoints
        assert tiles == image_size_to_num_patches([height, width], grids, side)
        assert tokens <= rule.unit_tokens(tiles)
        assert tiles <= rule.units_within(tokens)
        worst[limit] = max(worst[limit], tiles)
    for limit, most in worst.items():
        assert most <= rule.worst_units(limit)
        wide, high = rule.worst_size(limit)
        assert rule.units(wide, high, limit) == rule.worst_units(limit)
        assert rule.largest_limit(rule.worst_units(limit)) == limit
    assert rule.largest_limit(1) is None


def test_published_worst_cases():
    plain, many = RULES[:2]
    assert (plain.worst_units(), plain.unit_tokens(5)) == (5, 576 * 5 + 48)
    assert plain.tokens(672, 672) == 2928
    # 9 tiles' worth at most, or up to 1.1 times as many a side.
    assert many.worst_units() == 37
    assert many.tokens(2304, 2304) == 729 + 81 * 81 + 81
    assert many.unit_tokens(37) < 729 + 1.21 * 81 * 81 + 6 * 27


@pytest.mark.lmdeploy
def test_lmdeploy_counts_the_same_tokens(transformers, tmp_path):
    """It tells the processor that PIL images have channels last, which Transformers 5 believes."""
    folder = make_llava(tmp_path / "llava-1.5-7b-hf")
    model = resolve_model(str(folder))
    front = front_end(folder)
    image = [{"role": "user", "content": [{"type": "image", "data": picture(500, 300)}]}]
    if FrontEnd("0.18", model.architecture, "pytorch").failure(transformers.__version__):
        # Small: columns are taken for channels, and each is enlarged; 500 of them fill gigabytes.
        small = [{"role": "user", "content": [{"type": "image", "data": picture(40, 30)}]}]
        with pytest.raises(RuntimeError, match="must match the size of tensor"):
            front.preprocess(small)
        front.processor = transformers.CLIPImageProcessorPil.from_pretrained(str(folder))
    part = front.preprocess(list(image))[-1]["content"][0]
    assert part["image_tokens"] == model.image_rule.tokens(500, 300) == 576
    assert part["pixel_values"].shape == (1, 3, 336, 336)


@pytest.mark.lmdeploy
def test_lmdeploy_does_not_start_llava_next(transformers, tmp_path):
    """It hands an argument to a class that takes none, whatever Transformers' version."""
    folder = make_llava(tmp_path / "llava-v1.6-7b-hf", "llava_next")
    with pytest.raises(TypeError, match="trust_remote_code"):
        tokens_of(folder, [(picture(500, 300), {})])
    assert "front end" in engine_problem(resolve_model(str(folder)), "pytorch")

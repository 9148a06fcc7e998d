"""Idefics3 and SmolVLM: Transformers' parameters, tiles of every shape, and the prompt's tokens."""

from __future__ import annotations

import json
import random
import re

import pytest

from tests.support.oracles import ConfigFiles, idefics_of, read
from turbofit.core.errors import UsageError
from turbofit.core.images import LongestEdgeRule
from turbofit.model.checkpoint import Origin, read_checkpoint

KINDS = ("Idefics3", "SmolVLM")
#: Tile, its tokens, tiles of the longer side: SmolVLM2-256M, SmolVLM2-2.2B, Idefics3-8B; small.
PUBLISHED = ((512, 64, 4), (384, 81, 4), (364, 169, 4), (28, 4, 3), (30, 4, 5))


def rule_of(tile, tokens, side):
    return LongestEdgeRule(tile_size=tile, tokens_per_tile=tokens, max_dynamic_patch=side**2)


def grid_of(processor, width, height):
    """Tiles that the real preprocessor makes, and their rows and columns."""
    import torch

    image = torch.zeros(3, height, width, dtype=torch.uint8)
    made = processor([[image]], return_tensors="pt", return_row_col_info=True)
    return made["pixel_values"].shape[1], made["rows"][0][0], made["cols"][0][0]


def test_tiles_are_the_preprocessor_s(transformers):
    """Small tiles, so that thousands of images are cheap; every limit of each."""
    rng = random.Random(7)
    for tile, tokens, side in PUBLISHED[3:]:
        rule = rule_of(tile, tokens, side)
        for limit in rule.lower_limits():
            size = rule.folder_edits(limit).processor["size"]
            processor = transformers.Idefics3ImageProcessor(
                size=size, max_image_size={"longest_edge": tile}
            )
            for _ in range(250):
                width, height = rng.randrange(1, 90), rng.randrange(1, 90)
                if rng.random() < 0.2:
                    height = width + rng.randrange(-1, 2) or 1
                found, rows, columns = grid_of(processor, width, height)
                assert rule.units(width, height, limit) == found <= rule.worst_units(limit)
                assert found == (rows * columns + 1 if rows else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_processor_s(transformers, kind):
    """As many as there are special tokens and line feeds in the text that it puts in the prompt."""
    base = getattr(transformers, f"{kind}Processor")
    rng = random.Random(11)
    for published in PUBLISHED[:3]:
        rule = rule_of(*published)
        own = base.__new__(base)
        own.fake_image_token, own.image_token = "<fake_token_around_image>", "<image>"
        own.global_image_tag = own.global_image_token = "<global-img>"
        own.image_seq_len = rule.tokens_per_tile
        for _ in range(400):
            limit = rng.choice(rule.lower_limits())
            width, height = rng.randrange(1, 3000), rng.randrange(1, 3000)
            units = rule.units(width, height, limit)
            rows, columns = rule._grid(width, height, limit) if units > 1 else (0, 0)
            said = own.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0)
            tokens = len(re.findall(r"<[^>]+>|\n", said))
            assert rule.tokens(width, height, limit) == tokens <= rule.unit_tokens(units)
            assert rule.units_within(tokens) >= units


def test_a_limit_between_two_squares_is_the_lower_one():
    rule = rule_of(*PUBLISHED[0])
    assert rule.lower_limits() == (16, 9, 4, 1)
    assert [rule.worst_units(limit) for limit in (16, 15, 9, 5, 3, 1)] == [17, 10, 10, 5, 1, 1]
    assert (rule.largest_limit(17), rule.largest_limit(9), rule.largest_limit(4)) == (16, 4, 1)
    assert rule.units(*rule.worst_size()) == 17
    assert rule.least_units == rule.units(*rule.small_image.size) == 5
    assert rule.with_limit(4).units(*rule.with_limit(4).worst_size()) == 5


def read_with(config, processor):
    files = ConfigFiles(config.to_json_string(use_diff=False), processor=json.dumps(processor))
    return read_checkpoint(files, Origin(name="x", kind="folder", where="x"))


def test_the_processor_s_own_limit_and_what_contradicts_the_tower(transformers):
    config = idefics_of(transformers, random.Random(2))
    tile = config.vision_config.image_size
    processor = {
        "size": {"longest_edge": 3 * tile}, "max_image_size": {"longest_edge": tile},
        "do_image_splitting": True,
    }  # fmt: skip
    model = read_with(config, processor)
    assert model.image_rule.max_dynamic_patch == 9
    whole = read_with(config, processor | {"do_image_splitting": False})
    assert whole.image_rule.worst_units() == 1
    for wrong in (
        {"size": {"longest_edge": 3 * tile + 1}}, {"max_image_size": {"longest_edge": tile + 2}},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            read_with(config, processor | wrong)
    inner = '{"architectures": ["Idefics3ForConditionalGeneration"], "text_config": {%s}}'
    with pytest.raises(UsageError):
        read(inner % '"model_type": "mamba"')

"""Image rules beside LMDeploy's and Transformers' own preprocessing, over thousands of sizes."""

from __future__ import annotations

import json
import random
import re

import pytest

from tests.support.checkpoints_llava import make_llava
from tests.support.oracles import (
    front_end,
    idefics_of,
    picture,
    shapes_near,
    sizes,
    tokens_of,
)
from tests.support.tiny_checkpoints import read as read_files
from tests.sweep import part
from turbofit.core.errors import UsageError
from turbofit.core.images import AnyresRule, LongestEdgeRule, PatchRule, TileRule, VideoRule
from turbofit.model.families.engines import engine_problem
from turbofit.model.source import resolve_model
from turbofit.planning.examine.packages import bad_transformers


class Picture:
    """All that the preprocessing asks of an image."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def resize(self, size: tuple[int, int]) -> Picture:
        return Picture(size)

    def crop(self, box: tuple[int, int, int, int]) -> Picture:
        return self


def tile_sizes(seed: int, count: int) -> list[tuple[int, int]]:
    """Random sizes, extreme ratios, exact ratios and exact ties."""
    rng = random.Random(seed)
    found = [(448, 448), (1, 1), (1, 200), (200, 1), (3000, 15), (15, 3000), (8192, 8192)]
    for _ in range(count):
        found.append((rng.randrange(1, 5000), rng.randrange(1, 5000)))
        found.append((rng.randrange(1, 5000), rng.randrange(1, 60)))
        columns, rows, scale = rng.randrange(1, 13), rng.randrange(1, 13), rng.randrange(1, 700)
        found.append((columns * scale, rows * scale))
        # Half way between two candidate ratios, where the area decides.
        other, least = rng.randrange(1, 13), rng.randrange(1, 13)
        found.append((columns * other + least * rows, 2 * rows * other))
        scale = rng.randrange(1, 300)
        found.append(((columns * other + least * rows) * scale, 2 * rows * other * scale))
    return [(width, height) for width, height in found if width and height]


@pytest.mark.lmdeploy
@pytest.mark.parametrize(
    ("smallest", "limit", "count"),
    [(1, 12, 500), (1, 6, 150), (1, 24, 60), (1, 4, 150), (1, 1, 20), (2, 7, 100), (6, 6, 60),
     (1, 40, 12), (9, 4, 20), (1, 0, 10)],
)  # fmt: skip
@pytest.mark.parametrize("thumbnail", [True, False])
def test_tiles_are_lmdeploys(transformers, smallest, limit, count, thumbnail):
    from lmdeploy.vl.model.internvl import dynamic_preprocess

    rule = TileRule(
        tile_size=448, tokens_per_tile=256, max_dynamic_patch=12, min_dynamic_patch=smallest,
        thumbnail=thumbnail,
    )  # fmt: skip
    for width, height in tile_sizes(limit * 31 + smallest, count):
        pieces = dynamic_preprocess(
            Picture((width, height)), min_num=smallest, max_num=limit, image_size=448,
            use_thumbnail=thumbnail,
        )  # fmt: skip
        assert rule.units(width, height, limit) == len(pieces), (width, height)


@pytest.mark.parametrize(("smallest", "limit"), [(1, 12), (1, 6), (2, 9), (1, 24), (1, 1)])
def test_tiles_are_transformers(transformers, smallest, limit):
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

    processor = GotOcr2ImageProcessor(size={"height": 448, "width": 448})
    rule = TileRule(
        tile_size=448, tokens_per_tile=256, max_dynamic_patch=limit, min_dynamic_patch=smallest,
        client_knobs=False,
    )  # fmt: skip
    knobs = {"crop_to_patches": True, "min_patches": smallest, "max_patches": limit}
    for width, height in tile_sizes(limit + 100, 500):
        expected = processor.get_number_of_image_patches(height, width, knobs)
        assert rule.units(width, height) == expected, (width, height)


BOUNDS = [
    (3136, 12_845_056), (3136, 1_003_520), (784, 784), (200_000, 100_000), (1, 50_000),
    (1_000_000, 1_000_001), (3136, 157_000), (256 * 784, 1280 * 784), (50_000_000, 60_000_000),
    (50_176, 1_605_632),  # MinerU's
]  # fmt: skip
BOUNDS_OF_16 = [
    (65536, 16_777_216), (12_544, 9_633_792), (2048, 4096), (900_000, 1_000_000), (2, 60_000),
    (3136, 12_845_056),
]  # fmt: skip


@pytest.mark.parametrize(
    ("patch", "glm", "smallest", "largest"),
    [
        *((14, False, *bounds) for bounds in BOUNDS),
        *((16, False, *bounds) for bounds in BOUNDS_OF_16),
        *((14, True, *bounds) for bounds in BOUNDS_OF_16),
    ],
)
def test_patches_are_transformers(transformers, patch, glm, smallest, largest):
    from transformers.models.glm4v.image_processing_glm4v import smart_resize as resize_frames
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    bounds = {"min_pixels": smallest, "max_pixels": largest}
    rule = PatchRule(patch_size=patch, merge=2, **bounds)
    if glm:  # counts the frames of a video in its pixels, two for an image
        rule = PatchRule(
            patch_size=patch, merge=2, min_pixels=smallest // 2, max_pixels=largest // 2, frames=2,
            enlarge=True, client_knobs=False,
        )  # fmt: skip
    worst = 0
    for width, height in sizes(largest, 200):
        args = (2, height, width) if glm else (height, width)
        try:
            rows, columns = (resize_frames if glm else smart_resize)(
                *args, factor=2 * patch, **bounds
            )
        except ValueError:
            with pytest.raises(UsageError):
                rule.units(width, height)
            continue
        found = rule.units(width, height)
        assert found == rows * columns // patch**2, (width, height)
        assert rule.unit_tokens(found) == found // 4
        worst = max(worst, found)
    assert worst <= rule.worst_units()


def test_bounds_are_the_preprocessors():
    qwen3 = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "vision_config": {"out_hidden_size": 4096},
    }
    glm = {"architectures": ["Glm4vForConditionalGeneration"]}
    size, own, glms = (
        {"size": {"shortest_edge": least, "longest_edge": most}}
        for least, most in ((65536, 16777216), (4096, 25165824), (12544, 9633792))
    )
    rule = read_files(config=qwen3, preprocessor_config=size | {"patch_size": 16}).image_rule
    assert rule == PatchRule(
        patch_size=16, merge=2, min_pixels=65536, max_pixels=16777216, client_knobs=False,
        video=VideoRule(merged_frames=2, min_pixels=65536, max_pixels=16777216),
    )  # fmt: skip
    assert rule.worst_units() == 65536
    for files, bounds in (
        ({"preprocessor_config": size, "video_preprocessor_config": own}, (4096, 25165824)),
        ({"processor_config": {"video_processor": own}, "video_preprocessor_config": size},
         (4096, 25165824)),
        ({}, (131072, 786432)),
    ):  # fmt: skip
        video = read_files(config=qwen3, **files).image_rule.video
        assert (video.min_pixels, video.max_pixels) == bounds
    rule = read_files(config=glm, preprocessor_config=glms).image_rule
    assert (rule.min_pixels, rule.max_pixels, rule.frames) == (6272, 4816896, 2)
    assert rule.worst_units() == 24576
    for wrong in ({"patch_size": 16}, {"merge_size": 4}, {"size": {"longest_edge": 0}}):
        with pytest.raises(UsageError):
            read_files(config=glm, preprocessor_config=wrong)


#: Tile, its tokens, tiles of the longer side: SmolVLM2-256M, SmolVLM2-2.2B, Idefics3-8B; small.
PUBLISHED = ((512, 64, 4), (384, 81, 4), (364, 169, 4), (28, 4, 3), (30, 4, 5))


def edge_rule(tile, tokens, side):
    return LongestEdgeRule(tile_size=tile, tokens_per_tile=tokens, max_dynamic_patch=side**2)


@pytest.mark.slow
def test_tiles_are_the_preprocessor_s(transformers):
    """Small tiles, so that thousands of images are cheap; every limit of each."""
    import torch

    rng = random.Random(7)
    for tile, tokens, side in PUBLISHED[3:]:
        rule = edge_rule(tile, tokens, side)
        for limit in rule.lower_limits():
            size = rule.folder_edits(limit).processor["size"]
            processor = transformers.Idefics3ImageProcessor(
                size=size, max_image_size={"longest_edge": tile}
            )
            for _ in range(part(250, 4)):
                width, height = rng.randrange(1, 90), rng.randrange(1, 90)
                if rng.random() < 0.2:
                    height = width + rng.randrange(-1, 2) or 1
                image = torch.zeros(3, height, width, dtype=torch.uint8)
                made = processor([[image]], return_tensors="pt", return_row_col_info=True)
                found, rows, columns = (
                    made["pixel_values"].shape[1], made["rows"][0][0], made["cols"][0][0]
                )  # fmt: skip
                assert rule.units(width, height, limit) == found <= rule.worst_units(limit)
                assert found == (rows * columns + 1 if rows else 1)


@pytest.mark.parametrize("kind", ["Idefics3", "SmolVLM"])
def test_tokens_are_the_processor_s(transformers, kind):
    """As many as there are special tokens and line feeds in the text that it puts in the prompt."""
    base = getattr(transformers, f"{kind}Processor")
    rng = random.Random(11)
    for published in PUBLISHED[:3]:
        rule = edge_rule(*published)
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
    rule = edge_rule(*PUBLISHED[0])
    assert rule.lower_limits() == (16, 9, 4, 1)
    assert [rule.worst_units(limit) for limit in (16, 15, 9, 5, 3, 1)] == [17, 10, 10, 5, 1, 1]
    assert (rule.largest_limit(17), rule.largest_limit(9), rule.largest_limit(4)) == (16, 4, 1)
    assert rule.least_units == rule.units(*rule.small_image.size) == 5


def test_the_processor_s_own_limit_and_what_contradicts_the_tower(transformers):
    config = json.loads(idefics_of(transformers, random.Random(2)).to_json_string(use_diff=False))
    tile = config["vision_config"]["image_size"]
    whole = {"size": {"longest_edge": 3 * tile}, "max_image_size": {"longest_edge": tile}}
    for split, most in ((True, 9), (False, 0)):
        processor = whole | {"do_image_splitting": split}
        rule = read_files(config=config, preprocessor_config=processor).image_rule
        assert rule.worst_units() == most + 1
    for wrong in (
        {"size": {"longest_edge": 3 * tile + 1}}, {"max_image_size": {"longest_edge": tile + 2}},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            read_files(config=config, preprocessor_config=whole | wrong)
    config = {"architectures": ["Idefics3ForConditionalGeneration"]}
    with pytest.raises(UsageError):
        read_files(config=config | {"text_config": {"model_type": "mamba"}})


NEXT = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
OV = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))
SLIM = ((336, 336 * 2), (336 * 4, 336), (336, 336), (336 * 2, 336 * 2), (336, 336 * 6))


def anyres_rule(grids, side=336, most=None):
    return AnyresRule(
        tile_size=side, tokens_per_tile=(side // 14) ** 2, grids=grids, most_tiles=most,
        max_dynamic_patch=max(high * wide // side**2 for high, wide in grids),
    )  # fmt: skip


RULES = [
    anyres_rule(NEXT),
    anyres_rule(OV, 384, 9),
    anyres_rule(OV[:20], 384, 2),
    anyres_rule(SLIM),
]


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
    for width, height in shapes_near(rule.tile_size, 2100):
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


@pytest.mark.lmdeploy
def test_lmdeploy_counts_the_same_tokens(transformers, tmp_path):
    """It tells the processor that PIL images have channels last, which Transformers 5 believes."""
    folder = make_llava(tmp_path / "llava-1.5-7b-hf")
    model = resolve_model(str(folder))
    front = front_end(folder)
    large, small = (
        [{"role": "user", "content": [{"type": "image", "data": picture(*size)}]}]
        for size in ((500, 300), (40, 30))
    )
    if bad_transformers(model.architecture, ["pytorch"], transformers.__version__):
        # Small: columns are taken for channels, and each is enlarged; 500 of them fill gigabytes.
        with pytest.raises(RuntimeError, match="must match the size of tensor"):
            front.preprocess(small)
        front.processor = transformers.CLIPImageProcessorPil.from_pretrained(str(folder))
    part = front.preprocess(large)[-1]["content"][0]
    assert part["image_tokens"] == model.image_rule.tokens(500, 300) == 576
    assert part["pixel_values"].shape == (1, 3, 336, 336)
    # It hands an argument to a class of LLaVA-NeXT that takes none, whatever Transformers' version.
    folder = make_llava(tmp_path / "llava-v1.6-7b-hf", "llava_next")
    with pytest.raises(TypeError, match="trust_remote_code"):
        tokens_of(folder, [(picture(500, 300), {})])
    assert "front end" in engine_problem(resolve_model(str(folder)), "pytorch")

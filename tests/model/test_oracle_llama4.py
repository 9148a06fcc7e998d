"""Llama 4 against Transformers' preprocessor and class, and LMDeploy's front end and class."""

from __future__ import annotations

import json
import random

import pytest
from msgspec.structs import replace

from tests.support.checkpoints import write_tokenizer
from tests.support.oracles import count, picture, read, text_config, tokens_of, written
from turbofit.core.errors import UsageError
from turbofit.core.images import CanvasRule
from turbofit.core.model import Quantization
from turbofit.model.families.engines import engine_problem
from turbofit.model.source import resolve_model

TOKENS = (
    "<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>",
    "<|tile_y_separator|>",
)  # fmt: skip


def rule_of(most: int, side: int = 336) -> CanvasRule:
    return CanvasRule(
        tile_size=side, tokens_per_tile=(side // 28) ** 2 + 1, max_dynamic_patch=most
    )  # fmt: skip


def sizes(side: int, number: int):
    """Random sizes, long strips, tiny images, and shapes that are a canvas's or nearly."""
    rng = random.Random(side)
    found = [(1, 1), (1, 9000), (9000, 1), (side, side), (side - 1, side + 1), (2 * side, side)]
    while len(found) < number:
        found.append((rng.randrange(1, 6000), rng.randrange(1, 6000)))
        found.append((rng.randrange(1, 60), rng.randrange(1, 6000)))
        wide, high = side * rng.randrange(1, 9), side * rng.randrange(1, 9)
        found.append((wide, high))
        found.append((wide + rng.randrange(-2, 3), high + rng.randrange(-2, 3)))
        found.append((wide // rng.randrange(1, 9) + 1, high // rng.randrange(1, 9) + 1))
    return found


@pytest.mark.parametrize(("most", "side"), [(16, 336), (5, 336), (1, 336), (13, 56)])
def test_canvases_are_transformers(transformers, most, side):
    import torch
    from transformers.image_utils import SizeDict
    from transformers.models.llama4.image_processing_llama4 import (
        find_supported_resolutions,
        get_best_fit,
    )

    rule = rule_of(most, side)
    square = SizeDict(height=side, width=side)
    canvases = torch.tensor(find_supported_resolutions(max_num_chunks=most, patch_size=square))
    worst = 0
    for width, height in sizes(side, 700):
        rows, columns = (int(n) // side for n in get_best_fit((height, width), canvases))
        expected = rows * columns + (rows * columns > 1)
        assert rule.units(width, height) == expected, (width, height)
        worst = max(worst, expected)
    assert worst == rule.worst_units() == (most + 1 if most > 1 else 1)


def llama_of(transformers, rng):
    text = text_config(rng) | {"intermediate_size_mlp": rng.randrange(5, 60), "head_dim": 8}
    text |= {"num_local_experts": rng.choice([2, 4]), "pad_token_id": 0}
    text |= {"interleave_moe_layer_step": rng.choice([1, 2]), "num_hidden_layers": 4}
    text |= {"attention_bias": rng.random() < 0.5, "use_qk_norm": rng.random() < 0.5}
    heads = rng.choice([1, 2])
    wide = rng.choice([16, 24])
    vision = {
        "num_hidden_layers": rng.randrange(1, 4), "num_attention_heads": heads,
        "hidden_size": heads * 8, "intermediate_size": heads * 32, "image_size": 56,
        "patch_size": 14, "projector_input_dim": wide, "projector_output_dim": wide,
        "vision_output_dim": wide,
    }  # fmt: skip
    config = transformers.Llama4Config(
        text_config=text, vision_config=vision, tie_word_embeddings=False
    )
    config.text_config.tie_word_embeddings = False
    config.architectures = ["Llama4ForConditionalGeneration"]
    return config


@pytest.mark.parametrize("seed", range(6))
def test_parameters(transformers, tmp_path, seed):
    config = llama_of(transformers, random.Random(f"llama4{seed}"))
    expected = count(transformers, "Llama4ForConditionalGeneration", config)
    model = read(config)
    assert model.parameters == expected
    assert engine_problem(model, "pytorch") is engine_problem(model, "transformers") is None
    assert "encoder" in engine_problem(model, "turbomind")
    stored = Quantization(method="fp8", bits=8, group_size=128)
    assert "fp8" in engine_problem(replace(model, quantization=stored), "pytorch")


@pytest.mark.parametrize("seed", range(3))
def test_every_element_is_explained(transformers, tmp_path, seed):
    config = llama_of(transformers, random.Random(f"names{seed}"))
    written(transformers, config, tmp_path / "m")
    path = tmp_path / "m" / "preprocessor_config.json"
    path.write_text(json.dumps({"size": {"height": 56, "width": 56}, "max_patches": 9}))
    model = resolve_model(str(tmp_path / "m"))
    assert model.warnings == ()
    assert model.image_rule == rule_of(9, 56)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pixel_shuffle_ratio": 0.3}, "does not make"),
        ({"vision_output_dim": 5}, "is not projector_output_dim's 4096"),
        ({"image_size": 340}, "not whole windows of 28 pixels"),
        ({"num_attention_heads": 7}, "does not divide"),
    ],
)
def test_contradictions_are_said(change, said):
    vision = {"hidden_size": 1408, "vision_output_dim": 4096, "image_size": 336} | change
    config = {"architectures": ["Llama4ForConditionalGeneration"], "vision_config": vision}
    with pytest.raises(UsageError, match=said):
        read(json.dumps(config))


@pytest.mark.lmdeploy
class TestLmdeploy:
    @pytest.mark.parametrize("seed", range(3))
    def test_model_is_built_whole(self, transformers, engine_parameters, tmp_path, seed):
        config = llama_of(transformers, random.Random(f"engine{seed}"))
        written(transformers, config, tmp_path / "m")
        (tmp_path / "m" / "preprocessor_config.json").write_text('{"size": {"height": 56}}')
        # The engine builds norms of heads that no checkpoint has, where there is a rotation.
        own = config.text_config
        rotated = sum(1 for layer in range(own.num_hidden_layers) if (layer + 1) % 4)
        more = rotated * own.head_dim if own.use_qk_norm else 0
        found = engine_parameters(tmp_path / "m")
        assert found == resolve_model(str(tmp_path / "m")).parameters + more

    def test_image_tokens_reach_the_engine_as_planned(self, transformers, tmp_path):
        folder = tmp_path / "m"
        written(transformers, llama_of(transformers, random.Random(3)), folder)
        write_tokenizer(folder, TOKENS)
        values = {
            "image_processor_type": "Llama4ImageProcessorFast", "max_patches": 7,
            "processor_class": "Llama4Processor", "size": {"height": 56, "width": 56},
        }  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
        rule = resolve_model(str(folder)).image_rule
        rng = random.Random(5)
        found = [(rng.randrange(5, 600), rng.randrange(5, 600)) for _ in range(12)]
        seen = tokens_of(folder, [(picture(*size), {"max_patches": 99}) for size in found])
        assert seen == [rule.tokens(*size) for size in found]

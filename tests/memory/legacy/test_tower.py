"""Torch's vision tower in older servers."""

from __future__ import annotations

from msgspec.structs import replace

from turbofit.core.units import MIB
from turbofit.memory.legacy.generations import generation_of, legacy_constants
from turbofit.memory.legacy.weights import tower_activations, tower_bytes
from turbofit.model.parameters import vision_parameters
from turbofit.model.source import resolve_model


def test_a_tower_holds_its_weights_and_a_little_rounding():
    for name in ("internvl2-8b", "internvl2-26b", "qwen2-vl-7b"):
        model = resolve_model(name)
        plain = vision_parameters(model.vision, model.text.hidden) * 2
        (held,) = tower_bytes(model, 1, generation_of("0.5.2").vision, legacy_constants())
        assert plain <= held <= plain * 1.08


def test_spread_over_ranks_whole_layers_and_nothing_lost():
    model, rule = resolve_model("internvl2-26b"), generation_of("0.5.2").vision
    whole = tower_bytes(model, 1, rule, legacy_constants())[0]
    for tp in (2, 4, 8):
        shares = tower_bytes(model, tp, rule, legacy_constants())
        assert len(shares) == tp
        assert abs(sum(shares) - whole) < tp * 24 * MIB


def test_no_tower_no_bytes():
    constants, rule = legacy_constants(), generation_of("0.5.2").vision
    assert tower_bytes(resolve_model("qwen2.5-7b"), 2, rule, constants) == (0, 0)
    none = replace(rule, runs="native")
    assert tower_bytes(resolve_model("internvl2-8b"), 1, none, constants) == (0,)


def test_scores_of_attention_are_what_flash_attention_saves():
    constants = legacy_constants()
    vision = resolve_model("internvl2-8b").vision
    with_scores = tower_activations(vision, 13, constants, flash=False)
    without = tower_activations(vision, 13, constants, flash=True)
    scores = 2 * 13 * 16 * 1025**2 * 2
    assert scores < with_scores < scores * 1.4
    assert 250 * MIB < without < 350 * MIB


def test_patches_attend_to_all_patches_of_the_request():
    constants, vision = legacy_constants(), resolve_model("qwen2-vl-7b").vision
    one = tower_activations(vision, 1000, constants, flash=False)
    two = tower_activations(vision, 2000, constants, flash=False)
    assert two > 3 * one

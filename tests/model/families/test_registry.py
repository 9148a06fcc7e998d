"""Every family reads any config, or refuses it as a user's error."""

from __future__ import annotations

import copy
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tiny_checkpoints import LLAMA, read
from tests.sweep import part
from turbofit.core.errors import TurbofitError, UsageError
from turbofit.model.config import Section
from turbofit.model.families.engines import engine_problem
from turbofit.model.families.registry import VISION_READERS, read_dims
from turbofit.model.families.text import TEXT_ARCHITECTURES
from turbofit.model.presets import known_presets, preset_model
from turbofit.rehearse.checkpoint.twin import config_of, twin_of

GOLDEN = Path(__file__).parents[3] / "bench/golden/checkpoints.yaml"
pytestmark = pytest.mark.slow
ARCHITECTURES = sorted({*TEXT_ARCHITECTURES, *VISION_READERS})


@cache
def bases():
    """A config for each architecture: golden ones, stand-ins' of presets, those of one reader."""
    found = {}
    for name in known_presets():
        with suppress(UsageError):
            model = preset_model(name)
            found[model.architecture] = config_of(twin_of(model))
    for files in yaml.safe_load(GOLDEN.read_text()).values():
        match files.get("config"):
            case {"architectures": [str(name)]} as config:
                found.setdefault(name, config)
    readers = {VISION_READERS.get(name): config for name, config in found.items()}
    return {
        name: found.get(name) or readers.get(VISION_READERS.get(name), LLAMA)
        for name in ARCHITECTURES
    }


def keys_of(value):
    """All keys of a config and its sections."""
    if isinstance(value, dict):
        yield from value
        for inner in value.values():
            yield from keys_of(inner)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.integers() | st.floats()
    | st.sampled_from(ARCHITECTURES) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=10,
)  # fmt: skip


@settings(max_examples=part(300, 3))
@given(st.data(), st.sampled_from(ARCHITECTURES), values, values)
def test_fuzzed_configs_raise_nothing_else(data, architecture, processor, tokenizer):
    keys = sorted({str(key) for base in bases().values() for key in keys_of(base)})
    config = copy.deepcopy(bases()[architecture]) | {"architectures": [architecture]}
    sections = [config, *(part for part in config.values() if isinstance(part, dict))]
    changes = st.dictionaries(st.sampled_from(keys), values, max_size=5)
    data.draw(st.sampled_from(sections)).update(data.draw(changes))
    files = {"preprocessor_config": processor, "tokenizer_config": tokenizer}
    try:
        model = read(config=config, **files)
    except TurbofitError:
        return
    assert model.parameters > 0
    assert model.weight_bytes > 0
    for engine in ("turbomind", "pytorch", "transformers"):
        engine_problem(model, engine)
    if model.image_rule is not None:
        for size in ((1, 1), (640, 480), (100, 10_000)):
            most = model.image_rule.worst_units()
            assert 1 <= model.image_rule.units(*size) <= most
            assert model.image_rule.tokens(*size) <= model.image_rule.unit_tokens(most)


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(("inner", "outer"), [(TIED, {}), ({}, TIED)])
def test_either_config_ties_the_head(inner, outer):
    """Transformers before 5 wrote it into the text_config alone."""
    text = {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, **inner}
    config = {"text_config": text, "vision_config": {"hidden_size": 896}, **outer}
    section = Section(config, "config.json")
    dims = read_dims(section, "Qwen2VLForConditionalGeneration", None, [])
    assert dims.text.tie_word_embeddings

"""Phi-3.5-MoE, DeepSeek-MoE and MiniCPM3 beside Transformers' and LMDeploy's own classes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.support.oracles import count, text_config
from turbofit.core.errors import UsageError
from turbofit.core.model import Model, Quantization
from turbofit.model.config import Section
from turbofit.model.families.engines import engine_problem
from turbofit.model.families.text import read_text
from turbofit.model.parameters import text_parameters
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearse.checkpoint.twin import twin_of, write_checkpoint, write_model

PRESETS = ["phi-3.5-moe", "deepseek-moe-16b", "minicpm3-4b"]
LATENTS = {"kv_lora_rank": 12, "q_lora_rank": 20, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4}


def cut(name: str, layers: int) -> Model:
    """The first layers of a preset."""
    model = preset_model(name)
    text, moe = model.text, model.text.moe
    if moe is not None:
        moe = replace(moe, layers=layers - (text.layers - moe.layers))
    return replace(model, text=replace(text, layers=layers, moe=moe))


def as_read(config: Any, name: str) -> Any:
    return read_text(Section(json.loads(config.to_json_string(use_diff=False)), "c"), name)


@pytest.mark.parametrize("seed", range(6))
def test_phi_moe_is_transformers_own(transformers: Any, seed: int) -> None:
    rng = random.Random(seed)
    values = text_config(rng) | {"num_local_experts": rng.randrange(2, 5), "pad_token_id": 0}
    values |= {key: rng.random() < 0.5 for key in ("attention_bias", "lm_head_bias")}
    config = transformers.PhimoeConfig(**values)
    text = as_read(config, "PhiMoEForCausalLM")
    assert text_parameters(text) == count(transformers, "PhimoeForCausalLM", config)


@pytest.mark.parametrize("seed", range(6))
def test_minicpm3_is_transformers_own(transformers: Any, seed: int) -> None:
    rng = random.Random(seed)
    values = text_config(rng) | LATENTS | {"attention_bias": rng.random() < 0.5, "pad_token_id": 0}
    values["num_key_value_heads"] = values["num_attention_heads"]
    values["tie_word_embeddings"] = rng.random() < 0.5
    config = transformers.MiniCPM3Config(**values)
    text = as_read(config, "MiniCPM3ForCausalLM")
    assert text_parameters(text) == count(transformers, "MiniCPM3ForCausalLM", config)
    assert (text.kv_heads, text.head_dim) == (values["num_attention_heads"], 10)


@pytest.mark.parametrize("name", PRESETS)
def test_a_checkpoint_is_read_as_its_preset(name: str, tmp_path: Path) -> None:
    found, preset = resolve_model(str(write_checkpoint(name, tmp_path))), preset_model(name)
    assert found.text == preset.text
    assert (found.parameters, found.warnings) == (preset.parameters, ())
    assert engine_problem(found, "pytorch") is None
    assert "does not run" in (engine_problem(found, "turbomind") or "")
    assert engine_problem(found, "transformers")
    packed = Quantization(method="fp8", bits=8, group_size=128)
    said = engine_problem(replace(preset, quantization=packed), "pytorch")
    assert "in 16 bits only" in (said or "")


def test_deepseek_s_config_class_is_code_of_the_checkpoint(tmp_path: Path) -> None:
    folder = write_model(twin_of(cut("deepseek-moe-16b", 2)), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert not resolve_model(str(folder)).needs_remote_code
    config["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    assert resolve_model(str(folder)).needs_remote_code
    assert preset_model("deepseek-moe-16b").needs_remote_code


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q_lora_rank": None}, "q_lora_rank is null"),
        ({"v_head_dim": 32}, "v_head_dim is not 64"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is not 40"),
        ({"num_attention_heads": 39, "num_key_value_heads": 39}, "39 does not divide 2560"),
    ],
)
def test_latents_that_lmdeploy_does_not_run(change: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_text(Section(change, "c"), "MiniCPM3ForCausalLM")


@pytest.mark.lmdeploy
class TestLmdeploy:
    @pytest.mark.parametrize(("name", "layers"), list(zip(PRESETS, (2, 3, 2), strict=True)))
    def test_models_are_built_whole(
        self, engine_parameters: Any, tmp_path: Path, name: str, layers: int
    ) -> None:
        model = cut(name, layers)
        folder = write_model(twin_of(model), tmp_path)
        counted = engine_parameters(folder)
        if model.text.tie_word_embeddings:  # it ties them when it has loaded them
            counted -= model.text.vocab * model.text.hidden
        assert counted == text_parameters(model.text)

    def test_minicpm3_caches_what_its_latents_expand_to(self, tmp_path: Path) -> None:
        from lmdeploy.hf_configs import config_from_pretrained
        from lmdeploy.pytorch.configurations.minicpm3 import MiniCPM3ModelConfigBuilder

        text = preset_model("minicpm3-4b").text
        folder = write_model(twin_of(cut("minicpm3-4b", 2)), tmp_path)
        made = MiniCPM3ModelConfigBuilder.build(config_from_pretrained(str(folder)), tp=1)
        assert made.num_key_value_heads == text.kv_heads
        assert made.k_head_dim == made.v_head_dim == text.head_dim

    def test_deepseek_as_published_needs_its_config_class(self, tmp_path: Path) -> None:
        """Without it, Transformers 5 has no pad_token_id, which LMDeploy's class asks for."""
        from lmdeploy.hf_configs import config_from_pretrained

        folder = write_model(twin_of(cut("deepseek-moe-16b", 2)), tmp_path)
        config = json.loads((folder / "config.json").read_text())
        del config["pad_token_id"]
        config["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekConfig"}
        (folder / "config.json").write_text(json.dumps(config))
        generic = config_from_pretrained(str(folder), trust_remote_code=False)
        assert not hasattr(generic, "pad_token_id")

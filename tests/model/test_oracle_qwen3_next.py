"""Qwen3-Next against LMDeploy's own class: parameters, states and blocks; what it refuses."""

from __future__ import annotations

import json
import random

import pytest

from tests.support.oracles import check_cache, delta_nets, text_config, without_fla, written
from turbofit.model.source import resolve_model

NAME = "Qwen3NextForCausalLM"


def next_of(transformers, seed):
    rng = random.Random(seed)
    values = text_config(rng) | delta_nets(rng) | {"num_hidden_layers": 8, "head_dim": 8}
    values |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 7}
    values |= {"shared_expert_intermediate_size": 9, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.Qwen3NextConfig(**values, pad_token_id=0)
    config.architectures = [NAME]
    # Which Transformers 5 drops where it made layer_types of it.
    config.full_attention_interval = values["full_attention_interval"]
    return config


@pytest.mark.lmdeploy
class TestLmdeploy:
    @pytest.mark.parametrize("seed", range(3))
    def test_model_is_built_whole(
        self, transformers, engine_parameters, tmp_path, monkeypatch, seed
    ):  # fmt: skip
        without_fla(monkeypatch, "qwen3_next")
        config = next_of(transformers, seed)
        config.mlp_only_layers = [seed]
        written(transformers, config, tmp_path / "m")
        model = resolve_model(str(tmp_path / "m"))
        assert model.text.moe.layers == 7
        assert engine_parameters(tmp_path / "m") == model.parameters

    @pytest.mark.parametrize("tp", [1, 2])
    @pytest.mark.parametrize("seed", range(3))
    def test_states_and_blocks_are_the_engines(self, transformers, tmp_path, seed, tp):
        from lmdeploy.pytorch.configurations.qwen3_next import Qwen3NextModelConfigBuilder

        config = next_of(transformers, seed)
        written(transformers, config, tmp_path / "m")
        text = resolve_model(str(tmp_path / "m")).text
        made = Qwen3NextModelConfigBuilder.build(config, tp=tp)
        check_cache(made, text, tp)

    def test_a_config_as_published_does_not_start_with_transformers_5(self, transformers, tmp_path):
        """What known-bad.yaml says; with layer_types beside it, the interval stays."""
        from lmdeploy.hf_configs import config_from_pretrained
        from lmdeploy.pytorch.configurations.qwen3_next import Qwen3NextModelConfigBuilder

        published = {"architectures": [NAME], "model_type": "qwen3_next", "bos_token_id": 0}
        published |= {"eos_token_id": 1, "num_hidden_layers": 4, "full_attention_interval": 4}
        kinds = ["linear_attention"] * 3 + ["full_attention"]
        for added, starts in (({}, transformers.__version__[0] < "5"), ({"layer_types": kinds}, 1)):
            (tmp_path / "config.json").write_text(json.dumps(published | added))
            config = config_from_pretrained(str(tmp_path), trust_remote_code=False)
            if starts:
                assert Qwen3NextModelConfigBuilder.build(config).num_layers == 1
                continue
            with pytest.raises(AttributeError, match="full_attention_interval"):
                Qwen3NextModelConfigBuilder.build(config)

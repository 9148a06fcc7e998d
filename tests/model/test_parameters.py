from __future__ import annotations

import random

import pytest

from tests.model.families.test_text import SMALL
from tests.support.oracles import (
    config_class,
    count,
    delta_nets,
    read,
    text_config,
)
from tests.sweep import sweep
from turbofit.core.model import Quantization, TextDims
from turbofit.model.parameters import stored_bytes, text_parameters
from turbofit.model.presets import preset_model
from turbofit.model.tensors import linears

KNOWN = {
    "smolvlm2-256m": 256_484_928,
    "smolvlm2-500m": 507_482_304,
    "smolvlm-2.2b": 2_246_272_880,
    "internvl2-1b": 938_158_976,
    "internvl2-2b": 2_205_754_368,
    "internvl2-8b": 8_075_365_376,
    "internvl2-26b": 25_514_186_112,
    "internvl2-40b": 40_068_684_160,
    "internvl2-76b": 76_262_358_400,
    "internvl3-8b": 7_944_373_760,
    "internvl3-8b-hf": 7_944_373_760,
    "qwen2-vl-2b": 2_208_985_600,
    "mineru2.5-1.2b": 1_156_026_624,
    "qwen2-vl-7b": 8_291_375_616,
    "qwen2-vl-72b": 73_405_560_320,
    "qwen2.5-vl-7b": 8_292_166_656,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "internlm2.5-7b": 7_737_708_544,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-32b": 33_452_718_336,
    "qwen2.5-vl-72b": 73_410_777_344,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-70b": 70_553_706_496,
    "llava-1.5-7b": 7_063_427_072,
    "llava-v1.6-mistral-7b": 7_566_747_648,
    "cogvlm-17b": 17_639_685_376,
    "llama-3.2-11b-vision": 10_670_220_835,
    "phi-3.5-vision": 4_146_621_440,
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-12b": 12_187_325_040,
    "gemma-3-27b": 27_432_406_640,
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "qwen3-vl-30b-a3b": 31_070_754_032,
    "intern-s1-pro": 916_895_660_360,
    "qwen2.5-omni-3b": 4_703_464_448,
    "qwen2.5-omni-7b": 8_931_813_888,
    "qwen3-omni-30b-a3b": 31_719_205_488,
    "deepseek-moe-16b": 16_375_728_128,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,
    "llama-4-scout": 108_641_793_536,
    "llama-4-maverick": 401_583_781_376,
    "qwen3-coder-next": 79_674_391_296,
    "qwen3-0.6b": 596_049_920,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    # 110,468,824,832 and 358,337,791,296 are published with the draft's layer.
    "glm-4.5-air": 106_852_251_264,
    "glm-4.5": 352_797_829_024,
}

#: In billions, as model cards round them: where only that was published.
ROUNDED = {
    "internvl-chat-v1.5": "25.5", "mini-internvl-2b": "2.2", "internvl2.5-1b": "0.94",
    "internvl2.5-2b": "2.21", "internvl2.5-4b": "3.71", "internvl2.5-8b": "8.08",
    "internvl2.5-26b": "25.5", "internvl2.5-38b": "38.4", "internvl2.5-78b": "78.4",
    "internvl3-14b": "15.1", "internvl3-38b": "38.4", "internvl3-78b-hf": "78.4",
    "internvl3.5-1b": "1.061", "internvl3.5-2b": "2.3", "internvl3.5-4b": "4.7",
    "internlm3-8b": "8.8", "phi-3.5-moe": "41.9", "minicpm3-4b": "4.07",
    "internvl3.5-14b": "15.1", "internvl3.5-38b": "38.4", "internvl3.5-30b-a3b": "30.8",
    "internvl3.5-241b-a28b": "240.7", "internvl3.5-gpt-oss-20b-a4b": "21.2", "intern-s1": "241",
    "idefics3-8b": "8.46",
}  # fmt: skip


def test_presets_have_the_published_number_of_parameters():
    found = {name: preset_model(name).parameters for name in (*KNOWN, *ROUNDED)}
    assert {name: found[name] for name in KNOWN} == KNOWN
    digits = {name: len(size.partition(".")[2]) for name, size in ROUNDED.items()}
    assert {name: f"{found[name] / 1e9:.{count}f}" for name, count in digits.items()} == ROUNDED
    for name in found:
        if name.startswith("internvl3-") and name.endswith("-hf"):  # another format, no other dims
            hf, chat = preset_model(name), preset_model(name.removesuffix("-hf"))
            assert (hf.text, hf.vision) == (chat.text, chat.vision)
            assert not hf.image_rule.client_knobs


def test_quantised_bytes_follow_the_published_layout():
    # As long as their index says: experts in mxfp4, all the rest in bfloat16.
    assert preset_model("gpt-oss-20b").weight_bytes == 13_761_264_768
    assert preset_model("gpt-oss-120b").weight_bytes == 65_248_815_744
    text = TextDims(
        architecture="LlamaForCausalLM", layers=2, hidden=256, heads=2, kv_heads=1, head_dim=128,
        intermediate=512, vocab=100, max_position_embeddings=1,
    )  # fmt: skip
    packed = sum(linear.weights for linear in linears(text))
    rest = 2 * (text_parameters(text) - packed)
    awq = Quantization(method="awq", bits=4, group_size=128)
    # Each group of 128: 64 bytes of weights, a float16 scale and a 4-bit zero.
    assert stored_bytes(text, None, "float16", awq) == rest + packed // 128 * 133 // 2 * 1
    fp8 = Quantization(method="fp8", bits=8, group_size=128)
    assert stored_bytes(text, None, "bfloat16", fp8) == rest + packed + packed // 128**2 * 4


FAMILIES = [
    "Llama", "Qwen2", "Qwen3", "Qwen2Moe", "Qwen3Moe", "Mixtral", "Mistral", "Phi3", "Gemma",
    "Gemma2", "Gemma3", "Glm4", "GptOss", "Glm4Moe", "Qwen3Next",
]  # fmt: skip

OF_LATENTS = ("DeepseekV2", "DeepseekV3", "Glm4MoeLite")
LATENTS = {"kv_lora_rank": 12, "q_lora_rank": 20, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4}
#: Whose heads may be of any width, and have biases or not.
OWN_HEADS = set(FAMILIES) - {"Qwen2", "Qwen2Moe", "Mixtral", "Mistral", "Phi3"}


@pytest.mark.parametrize("family", [*FAMILIES, "Phimoe", "MiniCPM3", *OF_LATENTS])
@pytest.mark.parametrize("seed", sweep(range(6), 3))
def test_text_models_equal_transformers_on_meta(transformers, family, seed):
    rng = random.Random(f"{family}{seed}")
    values = text_config(rng) | {"tie_word_embeddings": rng.random() < 0.5}
    if family in OWN_HEADS:
        values |= {"head_dim": rng.choice([8, 12]), "attention_bias": rng.random() < 0.5}
    if family == "Llama":
        values["mlp_bias"] = rng.random() < 0.5
    if family == "Phimoe":
        values |= {"num_local_experts": 3, "lm_head_bias": rng.random() < 0.5}
    if family == "MiniCPM3":
        values |= LATENTS | {"num_key_value_heads": values["num_attention_heads"]}
    if family in {"Phimoe", "MiniCPM3"}:
        values["attention_bias"] = rng.random() < 0.5
    if "Moe" in family or family in {"Mixtral", "GptOss", "Qwen3Next"}:
        key = "num_local_experts" if family in {"Mixtral", "GptOss"} else "num_experts"
        key = "n_routed_experts" if family == "Glm4Moe" else key
        values[key] = rng.randrange(2, 5)
        values |= {"num_experts_per_tok": 2, "moe_intermediate_size": rng.randrange(3, 30)}
    if family in {"Qwen2Moe", "Qwen3Next"}:
        values |= {"shared_expert_intermediate_size": rng.randrange(3, 30)}
        values["qkv_bias"] = rng.random() < 0.5
    if family == "Qwen3Next":
        values |= delta_nets(rng) | {"num_hidden_layers": rng.randrange(4, 9)}
    if family == "Glm4Moe":
        values |= {"n_shared_experts": rng.randrange(1, 3), "use_qk_norm": rng.random() < 0.5}
        values["first_k_dense_replace"] = rng.randrange(values["num_hidden_layers"])
    if family in {"Qwen3Moe", "Qwen3Next"} and values["num_hidden_layers"] > 1:
        values["mlp_only_layers"] = [0]
    if family in OF_LATENTS:
        values = {**SMALL, **rng.choice([{}, {"q_lora_rank": None}, {"attention_bias": True}])}
    config = config_class(transformers, family)(**{**values, "pad_token_id": 0})
    config.architectures = [f"{family.replace('Phimoe', 'PhiMoE')}ForCausalLM"]
    model = read(config)
    parameters, moe = model.parameters, model.text.moe
    if moe and moe.correction:  # a buffer in Transformers, a tensor in checkpoints
        parameters -= moe.layers * moe.experts
    assert parameters == count(transformers, f"{family}ForCausalLM", config)
    if family == "MiniCPM3":
        assert (model.text.kv_heads, model.text.head_dim) == (model.text.heads, 10)
    if family in OF_LATENTS:
        assert moe.correction is (family != "DeepseekV2")
        assert (model.text.kv_heads, model.text.head_dim) == (1, 16)
        assert model.text.mla.q_rank == (values["q_lora_rank"] or 0)


#: Ours, and Transformers' name.
DIMS = {
    "vocab": "vocab_size", "hidden": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
    "intermediate": "intermediate_size", "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(transformers, family):
    """A config that leaves everything out means the same to both."""
    defaults = config_class(transformers, family)()
    text = read(f'{{"architectures": ["{family}ForCausalLM"]}}').text
    for dim, name in DIMS.items():
        assert getattr(text, dim) == getattr(defaults, name), name
    own = getattr(defaults, "head_dim", None) or text.hidden // text.heads
    assert text.head_dim == own
    if text.moe:
        # Mixtral's and gpt-oss's own key, which Transformers gives the others' name too.
        own = "num_local_experts" if family in {"GptOss", "Glm4Moe"} else "num_experts"
        assert text.moe.experts == getattr(defaults, own)
        assert text.moe.experts_per_token == defaults.num_experts_per_tok

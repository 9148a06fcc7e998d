"""Which engines run a model, and with which weights."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from turbofit.core.model import Quantization
from turbofit.model.families.engines import engine_problem
from turbofit.model.presets import preset_model

ENGINES = ("turbomind", "pytorch", "transformers")


RUNS = {
    "internvl2-8b": "turbomind pytorch",
    "internvl2-4b": "pytorch",
    "internvl3-8b-hf": "turbomind pytorch transformers",
    "qwen2-vl-7b": "turbomind pytorch transformers",
    "qwen2-vl-7b-awq": "turbomind pytorch",
    "qwen3-vl-8b": "pytorch transformers",
    "qwen3.5-9b": "turbomind pytorch transformers",
    "qwen3.5-27b-gptq-int4": "turbomind",  # it leaves gated delta nets
    "qwen3.5-35b-a3b": "turbomind pytorch transformers",
    "llava-1.5-7b": "pytorch transformers",
    "llava-v1.6-mistral-7b": "transformers",
    "llava-onevision-7b": "transformers",
    "llama-3.2-11b-vision": "transformers",
    "cogvlm-17b": "pytorch",
    "glm-4v-9b": "pytorch",
    "glm-4.1v-9b": "pytorch transformers",
    "gemma-3-4b": "pytorch transformers",
    "phi-3.5-vision": "pytorch",
    "llama-4-scout": "pytorch transformers",
    "intern-s1-pro": "pytorch",
    "kimi-k2.5": "pytorch",
    "qwen2.5-omni-7b": "transformers",
    "qwen3-omni-30b-a3b": "pytorch",
    "internlm2.5-7b": "turbomind pytorch",
    "llama-3.1-8b": "turbomind pytorch transformers",
    "gpt-oss-20b": "turbomind",
    "gpt-oss-20b-bf16": "turbomind pytorch",
    "glm-4.5-air": "pytorch",
    "phi-3.5-moe": "pytorch",
    "deepseek-moe-16b": "pytorch",
    "minicpm3-4b": "pytorch",
    "qwen3-next-80b-a3b": "pytorch",
    "deepseek-v3": "pytorch",
    "glm-4.7-flash": "turbomind pytorch",
}


@pytest.mark.parametrize(("name", "engines"), RUNS.items())
def test_engines_of_presets(name, engines):
    model = preset_model(name)
    assert [e for e in ENGINES if engine_problem(model, e) is None] == engines.split()
    for engine in ENGINES:
        problem = engine_problem(model, engine)
        assert problem is None or 20 < len(problem) < 120


FP8 = Quantization(method="fp8", bits=8, group_size=128)


AWQ = Quantization(method="awq", bits=4, group_size=128)


GPTQ = Quantization(method="gptq", bits=4, group_size=128)


@pytest.mark.parametrize(
    ("name", "engine", "packed", "words"),
    [
        ("kimi-k2.5", "transformers", None, "latent attention"),
        ("intern-s1-pro", "transformers", None, "own code"),
        ("qwen3-omni-30b-a3b", "transformers", None, "no account"),
        ("qwen2.5-omni-7b", "pytorch", None, "no engine"),
        ("llama-4-scout", "turbomind", None, "encoder"),
        ("internvl2-4b", "turbomind", None, "tries no other engine"),
        ("llama-4-scout", "pytorch", FP8, "fp8"),
        ("phi-3.5-moe", "pytorch", FP8, "in 16 bits only"),
        ("deepseek-moe-16b", "pytorch", FP8, "in 16 bits only"),
        ("minicpm3-4b", "pytorch", FP8, "in 16 bits only"),
        ("qwen3-omni-30b-a3b", "pytorch", FP8, "take 16 bits"),
        # LMDeploy's loader: KeyError 'multi_modal_projector.linear_1.weight'; fp8 it packs itself.
        ("internvl3-8b-hf", "pytorch", AWQ, "projector"),
        ("internvl3-8b-hf", "pytorch", FP8, None),
        ("intern-s1-mini", "pytorch", AWQ, "projector"),
        ("intern-s1-mini", "turbomind", AWQ, None),
        ("internvl3-8b", "pytorch", AWQ, None),
        # Its loader of Qwen2.5-0.5B in fp8: shape '[-1, 3, 2, 1]' is invalid for size 49.
        ("qwen2.5-0.5b", "turbomind", FP8, "heads"),
        ("llama-3.2-1b", "turbomind", FP8, None),
        ("qwen3.5-9b", "turbomind", GPTQ, "widen gptq"),
    ],
)
def test_reasons(name, engine, packed, words):
    model = preset_model(name)
    if packed is not None:
        model = replace(model, quantization=packed)
    problem = engine_problem(model, engine)
    assert problem is None if words is None else words in problem


@pytest.mark.parametrize(
    ("method", "bits", "group", "turbomind", "pytorch"),
    [
        ("awq", 4, 128, True, True), ("awq", 4, 64, False, True), ("gptq", 4, 128, True, False),
        ("compressed-tensors", 4, 32, True, False), ("fp8", 8, 128, True, True),
    ],
)  # fmt: skip
def test_quantised_weights(method, bits, group, turbomind, pytorch):
    plain = preset_model("qwen2.5-7b")
    model = replace(plain, quantization=Quantization(method=method, bits=bits, group_size=group))
    assert (engine_problem(model, "turbomind") is None) is turbomind
    assert (engine_problem(model, "pytorch") is None) is pytorch
    assert "further packages" in engine_problem(model, "transformers")


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8"])
@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ({"hidden": 960}, "the hidden size's 960 channels"),
        ({"heads": 15, "head_dim": 192}, "the heads' 2880 channels"),
        ({"intermediate": 2624}, "the MLP's 2624 channels"),
        ({"intermediate": 29568}, None),
    ],
)
def test_turbomind_takes_whole_groups(method, dims, words):
    """On pretend GPUs: "K % 128 == 0 … got K=960", "shape '[1024, 20, -1]' is invalid"."""
    model = preset_model("llama-3.1-8b")
    packed = Quantization(method=method, bits=4, group_size=128)
    model = replace(model, text=replace(model.text, **dims), quantization=packed)
    problem = engine_problem(model, "turbomind")
    assert (problem is None) if words is None else (words in problem)
    exempt = replace(packed, unconverted=("mlp.down_proj", "o_proj", "mlp.up_proj"))
    assert engine_problem(replace(model, quantization=exempt), "turbomind") is None


def test_dims_that_turbomind_lacks():
    model = preset_model("qwen2-vl-7b")
    model = replace(model, vision=replace(model.vision, heads=10))
    assert "64 or 80" in engine_problem(model, "turbomind")
    assert engine_problem(model, "pytorch") is None
    model = preset_model("qwen3.5-9b")
    narrow = replace(model.text, delta=replace(model.text.delta, key_dim=64))
    assert "128 channels" in engine_problem(replace(model, text=narrow), "turbomind")

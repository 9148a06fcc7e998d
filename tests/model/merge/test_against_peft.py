"""peft's own merge beside ours, bit for bit, where peft is installed."""

from __future__ import annotations

import pytest

from tests.model.merge.cases import CASES, GOLDEN, digest, dyadic, load, make_adapter, make_base
from tests.model.merge.llava_cases import VISION
from turbofit.model.merge.merge import merge

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def peft(transformers):
    return pytest.importorskip("peft")


def by_peft(peft, transformers, base, adapter):
    import torch

    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype="auto")
    merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {
        name: tensor.contiguous()
        for name, tensor in merged.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_case_is_bit_identical(peft, transformers, tmp_path, name):
    base_dtype, dtype, config, more = CASES[name]
    base = make_base(tmp_path / "base", dtype=base_dtype)
    extra = {key: dyadic(shape, 77, dtype) for key, shape in more.items()}
    adapter = make_adapter(tmp_path / "lora", dtype=dtype, config=config, more=extra)
    expected = by_peft(peft, transformers, base, adapter)
    merge(str(base), str(adapter), str(tmp_path / "out"))
    assert digest(load(tmp_path / "out")) == digest(expected)
    if name in GOLDEN:
        assert digest(expected) == GOLDEN[name]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_random_numbers_of_an_llms_size(peft, transformers, tmp_path, dtype):
    import torch
    from safetensors.torch import load_file, save_file

    base = make_base(tmp_path / "base", dtype=dtype)
    adapter = make_adapter(tmp_path / "lora", config={"lora_alpha": 13, "use_rslora": True})
    generator = torch.Generator().manual_seed(5)
    for path in (*base.glob("*.safetensors"), adapter / "adapter_model.safetensors"):
        tensors = load_file(path)
        for key, tensor in tensors.items():
            drawn = torch.randn(tensor.shape, generator=generator) * 0.05
            tensors[key] = drawn.to(tensor.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    expected = by_peft(peft, transformers, base, adapter)
    merge(str(base), str(adapter), str(tmp_path / "out"))
    found = load(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def small_vlm(transformers, kind):
    import torch

    torch.manual_seed(2)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 96}  # fmt: skip
    if kind == "llava":
        config = transformers.LlavaConfig(
            text_config={**text, "model_type": "llama"}, vision_config=VISION, image_token_index=95
        )
        model = transformers.LlavaForConditionalGeneration(config)
    else:
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
        config = transformers.Qwen2VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
        )
        model = transformers.Qwen2VLForConditionalGeneration(config)
    return model.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llava", ["q_proj", "fc1", "linear_1"]),
        ("llava", r".*language_model.*\.(down_proj|v_proj)"),
        ("qwen2-vl", ["qkv", "up_proj", "k_proj", "lm_head"]),
    ],
)
def test_adapters_of_vision_language_models(peft, transformers, tmp_path, kind, targets):
    """Adapters name modules, checkpoints keep older names: both find each other."""
    import torch

    model = small_vlm(transformers, kind)
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter.data) * 0.1
    lora.save_pretrained(tmp_path / "lora")
    lora.merge_and_unload().save_pretrained(tmp_path / "expected")
    said = merge(str(tmp_path / "base"), str(tmp_path / "lora"), str(tmp_path / "out"))
    assert said.loras > 2
    found, expected = load(tmp_path / "out"), load(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(load(tmp_path / "base")[name], expected[name]) for name in expected)

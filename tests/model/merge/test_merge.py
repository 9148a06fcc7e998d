"""Merging: peft's own bits, the spellings of names, what is refused, and what is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.model.merge.cases import (
    CASES,
    GOLDEN,
    LORA,
    MODULES,
    VISION,
    digest,
    dyadic,
    load,
    make_adapter,
    make_base,
    merged,
)
from turbofit.core.errors import UsageError
from turbofit.model.merge.merge import merge
from turbofit.model.source import resolve_model

pytestmark = pytest.mark.slow

torch: Any = None  # by `conftest`, as the next
safe: Any = None

Q = "model.layers.0.self_attn.q_proj"


def change_config(base: Path, **values) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def by_hand(weight, key, *, scaling, file):
    """One rounding of W + s·B·A, in float64."""
    a, b = (file[f"{key}.lora_{part}.weight"].double() for part in "AB")
    return (weight.double() + (b @ a) * scaling).to(weight.dtype)


def test_the_layout_and_the_small_files_stay(tmp_path, adapter):
    base = make_base(tmp_path / "base", shards=3)
    (base / "notes.bin").write_bytes(b"no weights of the model")
    said = merged(tmp_path, base, adapter)
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in base.iterdir()} - {"notes.bin"} == set(said.files)
    for name in ("config.json", "LICENSE.txt", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    was = json.loads((base / "model.safetensors.index.json").read_text())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == was["weight_map"]
    found, before = load(out), load(base)
    assert index["metadata"]["total_size"] == sum(
        tensor.numel() * tensor.element_size() for tensor in found.values()
    )
    assert (said.loras, said.tensors, said.dtype) == (4, 21, "bfloat16")
    assert said.bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed == {f"{module}.weight" for module in MODULES}
    assert oct((out.stat().st_mode) & 0o700) == oct(0o700)
    model = resolve_model(str(out))
    assert (model.architecture, model.source.checkpoint) == ("LlamaForCausalLM", str(out))


@pytest.mark.parametrize(
    ("stored", "adapted"),
    [
        ("language_model.model.layers.0.x_proj", "model.language_model.layers.0.x_proj"),
        ("model.language_model.layers.0.x_proj", "language_model.model.layers.0.x_proj"),
        ("language_model.model.layers.0.x_proj", "model.layers.0.x_proj"),
        ("visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
        ("vision_tower.vision_model.encoder.x", "model.vision_tower.encoder.x"),
        ("vision_tower.vision_model.encoder.x", "model.vision_tower.vision_model.encoder.x"),
        ("multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
        ("multi_modal_projector.linear_2", "model.mm_projector.2"),
        ("language_model.lm_head", "lm_head"),
        ("lm_head", "model.lm_head"),
    ],
)
def test_names_of_other_releases_are_found(tmp_path, stored, adapted):
    base = make_base(tmp_path / "base", shards=1)
    weight = dyadic((32, 32), 3, "bfloat16")
    safe.save_file(
        {f"{stored}.weight": weight, "other.bias": torch.ones(3)}, base / "model.safetensors"
    )
    config = {"target_modules": [adapted.rpartition(".")[2]]}
    adapter = make_adapter(tmp_path / "lora", modules={adapted: (32, 32)}, config=config)
    merged(tmp_path, base, adapter)
    found = load(tmp_path / "out")
    file = safe.load_file(adapter / "adapter_model.safetensors")
    expected = by_hand(weight, f"base_model.model.{adapted}", scaling=2.5, file=file)
    assert torch.equal(found[f"{stored}.weight"], expected)
    assert torch.equal(found["other.bias"], torch.ones(3))


def test_adapter_names_in_keys_and_layers_that_peft_wraps(tmp_path):
    base = make_base(tmp_path / "base", shards=1)
    path = base / "model.safetensors"
    parts = safe.load_file(path) | {f"{Q}.bias": dyadic((32,), 4, "bfloat16")}
    safe.save_file(parts, path)
    key = f"base_model.model.{Q}"
    more = {
        f"{key}.lora_A.default.weight": dyadic((8, 32), 1),
        f"{key}.lora_B.default.weight": dyadic((32, 8), 2),
        "base_model.model.model.norm.modules_to_save.default.weight": dyadic((32,), 6),
        "base_model.model.model.layers.1.input_layernorm.base_layer.weight": dyadic((32,), 7),
        # Of an lm_head that has LoRA, peft saves the base's weight as well.
        "base_model.model.lm_head.base_layer.weight": dyadic((96, 32), 9, "bfloat16"),
        "base_model.model.lm_head.lora_A.weight": dyadic((8, 32), 1),
        "base_model.model.lm_head.lora_B.weight": dyadic((96, 8), 2),
    }
    merged(tmp_path, base, make_adapter(tmp_path / "lora", modules={}, more=more))
    found = load(tmp_path / "out")
    head = more["base_model.model.lm_head.base_layer.weight"]
    summed = by_hand(head, "base_model.model.lm_head", scaling=2.5, file=more)
    assert torch.equal(found["lm_head.weight"], summed)
    assert torch.equal(found[f"{Q}.bias"], parts[f"{Q}.bias"])
    assert torch.equal(found["model.norm.weight"], dyadic((32,), 6, "bfloat16"))
    assert torch.equal(found["model.layers.1.input_layernorm.weight"], dyadic((32,), 7, "bfloat16"))
    assert not torch.equal(found[f"{Q}.weight"], parts[f"{Q}.weight"])


@pytest.mark.parametrize(("size", "warned"), [("7b", False), ("13b", True)])
def test_another_base_is_warned_of(tmp_path, size, warned):
    base = make_base(tmp_path / "vicuna-7b-v1.5")
    name = f"lmsys/vicuna-{size}-v1.5"
    adapter = make_adapter(tmp_path / "lora", config={"base_model_name_or_path": name})
    said = merged(tmp_path, base, adapter)
    assert [name in text for text in said.warnings] == [True] * warned


def test_tied_embeddings(tmp_path):
    base = make_base(tmp_path / "base", shards=1)
    parts = safe.load_file(base / "model.safetensors")
    del parts["lm_head.weight"]
    safe.save_file(parts, base / "model.safetensors")
    change_config(base, tie_word_embeddings=True)
    for name in ("model.embed_tokens", "lm_head"):
        more = {f"base_model.model.{name}.weight": dyadic((96, 32), 1)}
        with pytest.raises(UsageError, match=r"ties lm_head|no tensor for .*lm_head") as caught:
            merged(tmp_path, base, make_adapter(tmp_path / name, more=more))
        assert "untie and save" in caught.value.hint


LORA_ON_EMBEDDINGS = {
    "base_model.model.model.embed_tokens.lora_embedding_A": (8, 96),
    "base_model.model.model.embed_tokens.lora_embedding_B": (32, 8),
}
LORA_ON_IMAGES = {
    "base_model.model.conv.q_proj.lora_A.weight": (8, 3, 2, 2),
    "base_model.model.conv.q_proj.lora_B.weight": (8, 8, 1, 1),
}


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("lora", {"peft_type": "LOHA"}, "LOHA is not LoRA"),
        *(
            ("lora", {name: value}, f"LoRA with {name} is more than plain LoRA")
            for name, value in (
                ("use_qalora", True),
                ("layer_replication", [[0, 1]]),
                ("lora_bias", True),
                ("use_dora", True),
                ("target_parameters", ["experts.w"]),
                ("rank_pattern", {"q_proj": 4}),
                ("alpha_pattern", {"q_proj": 4}),
                ("fan_in_fan_out", True),
            )
        ),
        ("lora", {"init_lora_weights": "pissa_niter_4"}, "changed the base"),
        ("lora", {"r": 4}, "both need two dimensions and the config's rank 4"),
        ("lora", {"r": 0}, "r is 0"),
        ("lora", {"lora_alpha": "many"}, "lora_alpha is not a number"),
        ("base", {"quantization_config": {"quant_method": "awq"}}, "the base is quantised"),
        ("modules", {"model.layers.7.q_proj": (32, 32)}, "no tensor for base_model.model.model.la"),
        ("modules", {Q: (48, 32)}, f"changes {Q}.weight, which is 32 × 32"),
        ("modules", {Q: (32, 48)}, "is 32 × 32 in the base, by 32 × 48"),
        ("more", {"base_model.model.model.mm_projector.0.weight": (4,)}, "mm_projector"),
        (
            "more",
            {"base_model.model.lm_head.weight": (99, 32)},
            "is 96 × 32 in the base, by 99 × 32",
        ),
        ("more", {f"base_model.model.{Q}.lora_A.weight": (8, 32)}, "one half"),
        ("more", LORA_ON_EMBEDDINGS, "model.embed_tokens has a bias of B, or LoRA on embeddings"),
        ("more", LORA_ON_IMAGES, "8x3x2x2 and 8x8x1x1"),
    ],
)
def test_what_is_refused_is_named(tmp_path, base, part, change, words):
    modules = change if part == "modules" else {} if part == "more" else None
    more = {key: dyadic(shape, 1) for key, shape in change.items()} if part == "more" else None
    adapter = make_adapter(tmp_path / "lora", modules=modules, more=more)
    if part == "lora":
        (adapter / "adapter_config.json").write_text(json.dumps({**LORA, **change}))
    if part == "base":
        change_config(base, **change)
    with pytest.raises(UsageError) as caught:
        merged(tmp_path, base, adapter)
    assert words in caught.value.message
    assert caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora"]


def test_a_broken_adapter_is_not_merged(tmp_path):
    base = make_base(tmp_path / "base", dtype="float16")
    more = {
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": torch.full((32, 8), 1e5)
    }
    with pytest.raises(UsageError, match="float16 is too narrow") as caught:
        merged(tmp_path, base, make_adapter(tmp_path / "lora", more=more))
    assert "bfloat16" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def peft(transformers):
    return pytest.importorskip("peft")


def by_peft(peft, transformers, base, adapter):
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
    assert digest(expected) == GOLDEN[name]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_random_numbers_of_an_llms_size(peft, transformers, tmp_path, dtype):
    base = make_base(tmp_path / "base", dtype=dtype)
    adapter = make_adapter(tmp_path / "lora", config={"lora_alpha": 13, "use_rslora": True})
    generator = torch.Generator().manual_seed(5)
    for path in (*base.glob("*.safetensors"), adapter / "adapter_model.safetensors"):
        tensors = safe.load_file(path)
        for key, tensor in tensors.items():
            drawn = torch.randn(tensor.shape, generator=generator) * 0.05
            tensors[key] = drawn.to(tensor.dtype)
        safe.save_file(tensors, path, metadata={"format": "pt"})
    expected = by_peft(peft, transformers, base, adapter)
    merge(str(base), str(adapter), str(tmp_path / "out"))
    found = load(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def small_vlm(transformers, kind):
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
    model = small_vlm(transformers, kind)
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter.data) * 0.1
    lora.save_pretrained(tmp_path / "lora")
    lora.merge_and_unload().save_pretrained(tmp_path / "expected")
    assert merge(str(tmp_path / "base"), str(tmp_path / "lora"), str(tmp_path / "out")).loras > 2
    found, expected = load(tmp_path / "out"), load(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(load(tmp_path / "base")[name], expected[name]) for name in expected)

"""Module names and sizes, proved against Transformers' own classes on the meta device."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.machine import Gpu
from turbofit.core.model import Model, ModelSource, Quantization, TextDims
from turbofit.core.units import GIB
from turbofit.memory.account import Load
from turbofit.memory.placement import ModelCopies, place_all
from turbofit.memory.transformers.activations import _LAYOUTS, components, layout_of
from turbofit.model.loading import installed_names
from turbofit.model.presets import preset_model

needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="needs Transformers"
)
TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
MOE = {
    **TEXT, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
QWEN_TOWER = {
    "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 64,
}  # fmt: skip
VISION = {
    "LlavaForConditionalGeneration": {"model_type": "clip_vision_model", **TOWER},
    "LlavaNextForConditionalGeneration": {"model_type": "clip_vision_model", **TOWER},
    "LlavaOnevisionForConditionalGeneration": {"model_type": "siglip_vision_model", **TOWER},
    "Idefics3ForConditionalGeneration": TOWER,
    "SmolVLMForConditionalGeneration": TOWER,
    "Gemma3ForConditionalGeneration": {"model_type": "siglip_vision_model", **TOWER},
    "InternVLForConditionalGeneration": {**TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
    "MllamaForConditionalGeneration": {
        **TOWER, "num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
    },
    "Qwen2VLForConditionalGeneration": {
        "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2,
    },
    "Qwen2_5_VLForConditionalGeneration": QWEN_TOWER,
    "Qwen2_5OmniThinkerForConditionalGeneration": QWEN_TOWER,
    "Qwen3VLForConditionalGeneration": {**QWEN_TOWER, "deepstack_visual_indexes": [0]},
}  # fmt: skip
SOUND = {"encoder_layers": 2, "d_model": 32, "encoder_attention_heads": 2, "output_dim": 64}
#: Of a model that also speaks the server loads the thinker.
LOADED = dict.fromkeys(
    ("Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration"),
    "Qwen2_5OmniThinkerForConditionalGeneration",
)
INSIDE = dict.fromkeys(
    ("LlavaOnevisionForConditionalGeneration", "InternVLForConditionalGeneration"), "qwen2"
)


def tiny(architecture):
    """The class itself, without storage."""
    import torch
    import transformers

    architecture = LOADED.get(architecture, architecture)
    kind = getattr(transformers, architecture)
    vision = VISION.get(architecture)
    if vision is None:
        experts = "Mo" in architecture or "Mix" in architecture
        config = kind.config_class(**(MOE if experts else TEXT))
    else:
        text = dict(TEXT)
        if "Llava" in architecture or "Intern" in architecture:
            text["model_type"] = INSIDE.get(architecture, "llama")
        if architecture.startswith("Mllama"):
            text["cross_attention_layers"] = [1]
        more = {"audio_config": SOUND} if "Omni" in architecture else {}
        config = kind.config_class(text_config=text, vision_config=vision, **more)
    with torch.device("meta"):
        return kind(config)


def described(architecture):
    """The same as turbofit would read it; only what a map needs."""
    text = TextDims(
        architecture=architecture, layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16,
        intermediate=128, vocab=512, max_position_embeddings=2048,
    )  # fmt: skip
    return Model(
        name=architecture, architecture=architecture, parameters=1, weight_bytes=2,
        dtype="bfloat16", text=text,
        source=ModelSource(kind="folder", where="x", sizes="formula"),
    )  # fmt: skip


@needs_transformers
@pytest.mark.lmdeploy
@pytest.mark.parametrize("architecture", sorted(_LAYOUTS))
def test_a_map_names_every_parameter_and_buffer_once(architecture):
    card = Gpu(index=0, uuid="GPU-0", name="card", total=24 << 30, reserved=0, used=0, free=0)
    copies = ModelCopies(described(architecture), "bfloat16", [[card]], {0: 0})
    placement = place_all(copies, Load(tokens=64, images=0, units=0))
    assert placement is not None
    placed = copies.device_map(placement, None)
    placed = installed_names(placed) if "Omni" in architecture else placed
    model = tiny(architecture)
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    covers = {name: [key for key in placed if name == key or name.startswith(f"{key}.")]
              for name in names}  # fmt: skip
    assert {name: keys for name, keys in covers.items() if len(keys) != 1} == {}
    idle = set(placed) - {key for keys in covers.values() for key in keys}
    assert idle <= {"lm_head", "model.image_newline"}


@pytest.mark.parametrize("name", ["qwen2-vl-7b", "qwen2-vl-2b", "qwen2.5-7b", "mixtral-8x7b"])
def test_components_are_the_whole_model(name):
    model = preset_model(name)
    parts = components(model, "bfloat16")
    over = parts.weights - model.weight_bytes
    # Each layer is rounded up to a whole element.
    assert 0 <= over <= 2 * model.text.layers
    assert parts.tied == model.text.tie_word_embeddings
    if name == "qwen2-vl-7b":  # read from the checkpoint's headers, in GiB
        sizes = (parts.vision, parts.embeddings, parts.head, parts.layers[0].weights)
        assert [round(size / GIB, 3) for size in sizes] == [1.259, 1.015, 1.015, 0.434]
        assert parts.layers[0].kv_per_token == 2 * 4 * 128 * 2
    # A tower for sound is held with its positions: 9,414,609,568 bytes were requested of torch,
    # 672 more, rounding and frequencies.
    omni = preset_model("qwen2.5-omni-3b")
    held = components(omni, "bfloat16").weights
    assert held == omni.weight_bytes + 1500 * 1280 * 4 == 9_414_608_896


def test_what_it_does_not_run_is_refused():
    packed = Quantization(method="awq", bits=4, group_size=128)
    quantized = replace(described("LlamaForCausalLM"), quantization=packed)
    for model, word in ((preset_model("internvl2-8b"), "InternVLChatModel"), (quantized, "awq")):
        with pytest.raises(UsageError, match=word):
            layout_of(model)

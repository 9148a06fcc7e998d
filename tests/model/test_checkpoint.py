from __future__ import annotations

import copy
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.checkpoints import make_internvl2, make_text
from tests.model.conftest import write_safetensors
from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.images import TileRule
from turbofit.core.model import Quantization
from turbofit.model.checkpoint import Origin, Weights, read_checkpoint
from turbofit.model.config import Section
from turbofit.model.families.engines import engine_problem
from turbofit.model.families.registry import VISION_READERS, read_dims
from turbofit.model.families.text import TEXT_ARCHITECTURES
from turbofit.model.parameters import stored_bytes
from turbofit.model.source import resolve_model

pytestmark = pytest.mark.slow

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 100,
    "max_position_embeddings": 64, "torch_dtype": "float16",
}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}


def llama_tensors(config=LLAMA, *, awq=False, dtype="F16"):
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    width = config.get("head_dim", hidden // config["num_attention_heads"])
    query = width * config["num_attention_heads"]
    key = width * config["num_key_value_heads"]
    tensors = {
        "model.embed_tokens.weight": (dtype, (config["vocab_size"], hidden)),
        "lm_head.weight": (dtype, (config["vocab_size"], hidden)),
        "model.norm.weight": (dtype, (hidden,)),
    }
    linears = {
        "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden), "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inter, hidden), "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
    }  # fmt: skip
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = (dtype, (hidden,))
        for name, (out, inn) in linears.items():
            if awq:
                tensors[f"{prefix}{name}.qweight"] = ("I32", (inn, out // 8))
                tensors[f"{prefix}{name}.qzeros"] = ("I32", (inn // 128, out // 8))
                tensors[f"{prefix}{name}.scales"] = ("F16", (inn // 128, out))
            else:
                tensors[f"{prefix}{name}.weight"] = (dtype, (out, inn))
    return tensors


def make(folder, config=LLAMA, tensors=None, **files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is None:
        tensors = llama_tensors(config)
    if tensors:
        write_safetensors(folder / "model.safetensors", tensors)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


class Memory:
    """A checkpoint in memory: JSON files and tensors."""

    def __init__(self, tensors=None, **files) -> None:
        self.files = files
        self.tensors = tensors

    def read(self, name):
        content = self.files.get(name.removesuffix(".json"))
        return None if content is None else json.dumps(content).encode()

    def weights(self):
        return Weights(self.tensors)


def read(**files):
    return read_checkpoint(Memory(**files), Origin(name="x", kind="folder", where="x"))


def test_exact_bytes_from_headers(tmp_path):
    model = resolve_model(make(tmp_path / "tiny"))
    assert (model.name, model.source.kind, model.source.sizes) == ("tiny", "folder", "file")
    assert model.weight_bytes == sum(2 * math.prod(shape) for _, shape in llama_tensors().values())
    assert model.tensor_bytes == {"F16": model.weight_bytes}
    assert model.weight_bytes == 2 * model.parameters
    assert (model.dtype, model.warnings, model.source.checkpoint) == (
        "float16", (), str(tmp_path / "tiny"),
    )  # fmt: skip


def test_stored_dtype_wins_over_the_config(tmp_path):
    model = resolve_model(make(tmp_path / "tiny", tensors=llama_tensors(dtype="BF16")))
    assert model.dtype == "bfloat16"


def test_sharded(tmp_path):
    folder = tmp_path / "tiny"
    make(folder, tensors={})
    names = list(llama_tensors())
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        write_safetensors(folder / file, {name: llama_tensors()[name] for name in part})
    index = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "consolidated.safetensors").write_bytes(b"not read")
    assert resolve_model(str(folder)).weight_bytes == 2 * resolve_model(str(folder)).parameters
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(UsageError, match="model-2"):
        resolve_model(str(folder))


def test_an_index_that_names_what_no_file_holds(tmp_path):
    folder = tmp_path / "tiny"
    make(folder)
    index = {"weight_map": dict.fromkeys([*llama_tensors(), "ghost"], "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="ghost"):
        resolve_model(str(folder))


def test_awq_as_stored(tmp_path):
    config = LLAMA | {"quantization_config": AWQ | {"modules_to_not_convert": ["visual"]}}
    model = resolve_model(make(tmp_path / "a", config, llama_tensors(awq=True)))
    assert model.quantization == Quantization(
        method="awq", bits=4, group_size=128, unconverted=("visual",)
    )
    assert model.weight_bytes == stored_bytes(model.text, None, "float16", model.quantization)
    assert set(model.tensor_bytes) == {"F16", "I32"}
    assert sum(model.tensor_bytes.values()) == model.weight_bytes
    assert model.parameters == resolve_model(make(tmp_path / "b")).parameters


@pytest.mark.parametrize(
    "change",
    [
        {"version": "gemv"}, {"bits": 8}, {"group_size": 48}, {"quant_method": "bitsandbytes"},
        {"quant_method": "gptq", "desc_act": True}, {"quant_method": "gptq", "sym": False},
        {"quant_method": "fp8"}, {"quant_method": "fp8", "weight_block_size": [64, 64]},
        {"quant_method": "smooth_quant"}, {"quant_method": "compressed-tensors"},
        {"group_size": "128"}, {"quant_method": 4},
    ],
)  # fmt: skip
def test_quantisation_that_the_engine_refuses(change):
    with pytest.raises(UsageError):
        read(config=LLAMA | {"quantization_config": AWQ | change})


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
         ("gptq", 4, 128)),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("fp8", 8, 128)),
        ({"quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {
            "group_0": {"format": "pack-quantized",
                        "weights": {"num_bits": 4, "type": "int", "group_size": 32}}}},
         ("compressed-tensors", 4, 32)),
    ],
)  # fmt: skip
def test_quantisation_that_the_engine_takes(quantization, expected):
    found = read(config=LLAMA | {"quantization_config": quantization}).quantization
    assert (found.method, found.bits, found.group_size) == expected


def test_a_format_that_only_the_whole_config_names():
    """TurboMind reads config_groups.group_0.format: KeyError 'format' at its start."""
    weights = {"num_bits": 4, "type": "int", "group_size": 128}
    quantization = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"weights": weights}},
    }  # fmt: skip
    with pytest.raises(UsageError, match="config_groups without a format") as told:
        read(config=LLAMA | {"quantization_config": quantization})
    assert '"format": "pack-quantized"' in told.value.hint


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"vocab_size": 101}, ("101", "100x256")),
        ({"num_hidden_layers": 3}, ("3 layers", "has 2")),
        ({"num_hidden_layers": 1}, ("1 layers", "has 2")),
        ({"intermediate_size": 511}, ("511", "512x256")),
        ({"num_key_value_heads": 2}, ("256", "128x256")),
        ({"head_dim": 64}, ("128", "256x256")),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, change, both):
    with pytest.raises(UsageError) as error:
        resolve_model(make(tmp_path / "x", LLAMA | change, llama_tensors()))
    assert all(part in error.value.message for part in both)


def test_a_checkpoint_without_head_must_be_tied(tmp_path):
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    with pytest.raises(UsageError, match="lm_head"):
        resolve_model(make(tmp_path / "x", tensors=tensors))
    tied = resolve_model(make(tmp_path / "y", LLAMA | {"tie_word_embeddings": True}, tensors))
    assert tied.weight_bytes == 2 * tied.parameters


def test_elements_that_no_dim_explains_are_said(tmp_path):
    tensors = llama_tensors() | {"value_head.weight": ("F16", (256,))}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", (64,))
    warnings = resolve_model(make(tmp_path / "x", tensors=tensors)).warnings
    assert len(warnings) == 1
    assert "256 elements more" in warnings[0]


def test_torch_only_checkpoints_get_formula_sizes(tmp_path):
    folder = make(tmp_path / "x", tensors={})
    (tmp_path / "x" / "pytorch_model.bin").write_bytes(b"\x80")
    model = resolve_model(folder)
    assert model.source.sizes == "formula"
    assert model.tensor_bytes == {}
    assert ".bin" in model.warnings[0]
    assert model.weight_bytes == 2 * model.parameters


def test_missing_weights_are_said(tmp_path):
    assert "no weights" in resolve_model(make(tmp_path / "x", tensors={})).warnings[0]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, False),
        ({"tokenizer_config": {"auto_map": {"AutoTokenizer": ["t.T", None]}}}, True),
        ({"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer"}}, False),
        ({"preprocessor_config": {"auto_map": {"AutoImageProcessor": "p.P"}}}, False),
    ],
)
def test_remote_code_of_a_tokenizer(files, expected):
    assert read(config=LLAMA, **files).needs_remote_code is expected


def test_remote_code_of_the_config_matters_only_to_internvl_chat(tmp_path):
    mapped = {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}
    assert not read(config=LLAMA | {"auto_map": mapped}).needs_remote_code
    folder = make_internvl2(tmp_path / "InternVL2-1B")
    config = json.loads((folder / "config.json").read_text())
    assert not resolve_model(str(folder)).needs_remote_code
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": mapped}))
    assert resolve_model(str(folder)).needs_remote_code


def internvl(tmp_path, **changes):
    folder = make_internvl2(tmp_path / "InternVL2-1B")
    config = json.loads((folder / "config.json").read_text())
    for path, value in changes.items():
        *parts, key = path.split("__")
        inner = config
        for part in parts:
            inner = inner[part]
        inner[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_internvl_is_read_whole(tmp_path):
    model = resolve_model(internvl(tmp_path))
    assert model.image_rule == TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=12)
    assert model.vision.kind == "internvit"
    assert model.text.architecture == "Qwen2ForCausalLM"
    assert model.weight_bytes == 2 * model.parameters
    assert model.warnings == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"ps_version": "v1"},
        {"force_image_size": 224},
        {"downsample_ratio": 0.3},
        {"llm_config__architectures": []},
        {"llm_config__architectures": ["DeepseekV4ForCausalLM"]},
        {"llm_config": None},
        {"vision_config": None},
        {"vision_config__norm_type": "group_norm"},
        {"vision_config__num_attention_heads": 5},
        {"vision_config__image_size": 450},
        {"vision_config__num_hidden_layers": 3},
        {"vision_config__hidden_size": 128},
        {"max_dynamic_patch": 10**9},
        {"max_dynamic_patch": "12"},
        {"use_thumbnail": 1},
    ],
)
def test_internvl_that_would_not_run(tmp_path, changes):
    with pytest.raises(UsageError):
        resolve_model(internvl(tmp_path, **changes))


def test_images_are_tiled_where_there_is_no_preprocessor(tmp_path):
    """LMDeploy looks at dynamic_image_size only where a preprocessor config is there too."""
    folder = internvl(tmp_path, dynamic_image_size=False)
    assert resolve_model(folder).image_rule.dynamic
    (tmp_path / "InternVL2-1B" / "preprocessor_config.json").write_text("{}")
    assert not resolve_model(folder).image_rule.dynamic


QWEN = {
    "architectures": ["Qwen2VLForConditionalGeneration"], "hidden_size": 64, "vocab_size": 80,
    "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "torch_dtype": "bfloat16",
    "vision_config": {"depth": 1, "embed_dim": 64, "num_heads": 1, "hidden_size": 64},
}  # fmt: skip


@pytest.mark.parametrize(
    ("files", "bounds"),
    [
        ({"preprocessor_config": {"min_pixels": 3136, "max_pixels": 12845056}}, (3136, 12845056)),
        ({"preprocessor_config": {"size": {"shortest_edge": 9, "longest_edge": 784}}}, (9, 784)),
        ({"preprocessor_config": {"max_pixels": 9, "size": {"longest_edge": 7840}}}, (3136, 9)),
        ({"preprocessor_config": {"max_pixels": 9},
          "processor_config": {"image_processor": {"max_pixels": 11}}}, (3136, 11)),
        ({"preprocessor_config": {"max_pixels": 9}, "processor_config": {"a": 1}}, (3136, 9)),
        ({}, (3136, 1003520)),
    ],
)  # fmt: skip
def test_qwen_pixel_bounds(files, bounds):
    model = read(config=QWEN, **files)
    assert (model.image_rule.min_pixels, model.image_rule.max_pixels) == bounds
    assert bool(model.warnings) is (not files)


@pytest.mark.parametrize(
    "change",
    [
        {"vision_config": {"num_heads": 3, "embed_dim": 64, "hidden_size": 64}},
        {"vision_config": {"hidden_size": 65}},
        {"vision_config": []},
        {"num_key_value_heads": 3},
        {"num_attention_heads": 0},
        {"hidden_size": 10**30},
        {"hidden_size": 64.0},
        {"vocab_size": True},
        {"architectures": "Qwen2VLForConditionalGeneration"},
        {"architectures": [{}]},
        {"architectures": []},
        {"architectures": None},
        {"architectures": ["DeepseekV4ForCausalLM"]},
        {"architectures": ["LlavaLlamaForCausalLM"]},
        {"architectures": ["Nonsense" * 99]},
    ],
)
def test_configs_that_are_refused(change):
    with pytest.raises(UsageError) as error:
        read(config=QWEN | change)
    assert len(error.value.message) < 300


def test_lengths_as_lmdeploy_takes_them():
    assert read(config=LLAMA).text.max_position_embeddings == 64
    assert read(config=LLAMA | {"seq_length": 32}).text.max_position_embeddings == 32
    assert read(config=LLAMA | {"model_max_length": 10**30}).text.max_position_embeddings == 64


def test_dense_layers_among_experts():
    moe = {
        "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 4, "mlp_only_layers": [0, 9]
    }  # fmt: skip
    model = read(config=moe)
    assert model.text.moe.layers == 3
    assert engine_problem(model, "turbomind") is None
    for change in (
        {"decoder_sparse_step": 2, "mlp_only_layers": []},
        {"architectures": ["Qwen2MoeForCausalLM"]},
    ):
        model = read(config=moe | change)
        assert "sparse" in engine_problem(model, "turbomind")
        assert engine_problem(model, "pytorch") is None
    assert read(config=moe | {"decoder_sparse_step": 3, "mlp_only_layers": []}).text.moe.layers == 1
    with pytest.raises(UsageError):
        read(config=moe | {"mlp_only_layers": [0, 1, 2, 3]})


def test_not_a_number_is_json_too(tmp_path):
    folder = make(tmp_path / "x")
    text = (tmp_path / "x" / "config.json").read_text()
    (tmp_path / "x" / "config.json").write_text(text[:-1] + ', "limit": [0.0, Infinity, NaN]}')
    assert resolve_model(folder).parameters


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"a":}', "\udcff", "[" * 200_000])
def test_broken_json(tmp_path, text):
    folder = make_text(tmp_path / "x")
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError):
        resolve_model(str(folder))


def test_a_pipe_is_not_a_config(tmp_path):
    """A named pipe would block for ever."""
    import os

    folder = make_text(tmp_path / "x")
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    os.mkfifo(folder / "tokenizer_config.json")
    os.mkfifo(folder / "preprocessor_config.json")
    assert resolve_model(str(folder)).parameters


KEYS = sorted({*LLAMA, *QWEN, "tie_word_embeddings", "head_dim", "quantization_config", "auto_map",
               "text_config", "llm_config", "ps_version", "downsample_ratio", "dtype",
               "max_dynamic_patch", "num_experts", "mlp_only_layers", "decoder_sparse_step",
               "image_grid_pinpoints", "vision_feature_layer", "vision_feature_select_strategy",
               "vision_aspect_ratio", "model_type", "num_multi_query_heads", "image_size",
               "patch_size", "num_positions", "num_heads", "cross_attention_layers",
               "max_num_tiles", "supported_aspect_ratios", "vision_output_dim",
               "intermediate_layers_indices",
               "deepstack_visual_indexes", "num_position_embeddings", "out_hidden_size", "size",
               "temporal_patch_size", "mm_tokens_per_image", "img_processor", "embd_layer",
               "num_crops", "multi_query_group_num", "kv_channels", "num_layers",
               "max_image_tiles", "longest_edge", "shortest_edge", "layer_types",
               "full_attention_interval", "linear_num_key_heads", "moe_layers", "max_patches",
               "interleave_moe_layer_step", "pixel_shuffle_ratio", "attn_output_gate"})  # fmt: skip
ARCHITECTURES = sorted({*TEXT_ARCHITECTURES, *VISION_READERS})
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.integers() | st.floats()
    | st.sampled_from(ARCHITECTURES) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


EVA_CLIP = {
    "hidden_size": 64, "num_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8,
    "image_size": 56, "patch_size": 14, "num_positions": 17,
}  # fmt: skip
PHI_EMBEDDING = {
    "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
    "use_hd_transform": True, "with_learnable_separator": True,
}  # fmt: skip
OUT = {"out_hidden_size": 256}
#: What makes the base of the fuzzed config one that is read.
VISION_PARTS = {
    "ChatGLMForConditionalGeneration": EVA_CLIP, "ChatGLMModel": EVA_CLIP,
    "CogVLMForCausalLM": EVA_CLIP, "Gemma3ForConditionalGeneration": {"patch_size": 14},
    "LlavaNextForConditionalGeneration": {"image_size": 336, "patch_size": 14},
    "LlavaOnevisionForConditionalGeneration": {"vision_use_head": False, "image_size": 384},
    "Qwen2VLForConditionalGeneration": {**QWEN["vision_config"], "hidden_size": 256},
    "Qwen2_5_VLForConditionalGeneration": {"out_hidden_size": 256, "hidden_size": 64},
    "Glm4vForConditionalGeneration": OUT, "Qwen3VLForConditionalGeneration": OUT,
    "Qwen3VLMoeForConditionalGeneration": OUT, "Qwen3_5ForConditionalGeneration": OUT,
    "Qwen3_5MoeForConditionalGeneration": OUT,
    "InternS1ProForConditionalGeneration": OUT, "InternS1_1_ForConditionalGeneration": OUT,
    "Llama4ForConditionalGeneration": {
        "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 256,
        "vision_output_dim": 4096,
    },
    "InternVLChatModel": {"hidden_size": 64, "num_attention_heads": 1, "image_size": 448},
    "KimiK25ForConditionalGeneration": {
        "merge_type": "sd2_tpool", "pos_emb_type": "divided_fixed", "patch_size": 14,
        "video_attn_type": "spatial_temporal", "merge_kernel_size": [2, 2], "hidden_size": 64,
        "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 256,
        "init_pos_emb_height": 4,
    },
}  # fmt: skip


THINKER = {
    "text_config": {**LLAMA, "num_key_value_heads": 2, "num_attention_heads": 2},
    "vision_config": OUT, "audio_config": {"output_dim": 256},
}  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(ARCHITECTURES),
    st.dictionaries(st.sampled_from(KEYS), values, max_size=5),
    st.sampled_from(["", "text_config", "llm_config", "vision_config", "thinker_config"]),
    values,
    values,
)
def test_fuzzed_configs_raise_nothing_else(architecture, change, part, processor, tokenizer):
    config = copy.deepcopy(QWEN) | {
        "architectures": [architecture], "ps_version": "v2",
        "llm_config": LLAMA, "text_config": LLAMA | {"cross_attention_layers": [1]},
        "embd_layer": PHI_EMBEDDING,
        "img_processor": {"model_name": "openai/clip-vit-large-patch14-336"},
        "vision_config": VISION_PARTS.get(architecture, {}), "kv_channels": 32,
        "thinker_config": THINKER,
        "mm_tokens_per_image": 256 if architecture != "Gemma3ForConditionalGeneration" else 4,
    }  # fmt: skip
    if part and isinstance(config.get(part), dict):
        config[part] = config[part] | change
    else:
        config |= change
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

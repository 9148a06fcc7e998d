"""Models of random dims by Transformers' and LMDeploy's own classes, to hold ours against."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from msgspec.structs import replace

from tests.support import tiny_checkpoints
from tests.support.checkpoints import write_tokenizer
from tests.support.safetensors_file import write_safetensors
from turbofit.core.plan import Settings
from turbofit.memory.pytorch.cache import block_bytes, state_bytes, state_slots


def text_config(rng: random.Random) -> dict[str, object]:
    kv = rng.choice([1, 2, 4])
    heads = kv * rng.choice([1, 2, 3])
    return {
        "vocab_size": rng.randrange(50, 400),
        "hidden_size": heads * rng.choice([8, 16, 24]),
        "num_hidden_layers": rng.randrange(1, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": rng.randrange(3, 90),
        "max_position_embeddings": 64,
    }


def delta_nets(rng: random.Random) -> dict[str, object]:
    keys = rng.choice([2, 4])
    return {
        "linear_num_key_heads": keys, "linear_num_value_heads": keys * rng.choice([1, 3]),
        "linear_key_head_dim": rng.choice([4, 8]), "linear_value_head_dim": rng.choice([4, 8]),
        "linear_conv_kernel_dim": rng.choice([3, 4]), "full_attention_interval": rng.choice([2, 4]),
    }  # fmt: skip


def qwen3_tower(rng: random.Random, text: dict[str, object], *, features: bool = True):
    """A vision config of Qwen3-VL and later; with ``features`` for the decoder's first layers."""
    heads = rng.choice([1, 2])
    return {
        "depth": rng.randrange(1, 4), "num_heads": heads, "hidden_size": heads * 8,
        "intermediate_size": rng.randrange(5, 60), "out_hidden_size": text["hidden_size"],
        "patch_size": rng.choice([4, 16]), "num_position_embeddings": rng.choice([4, 9]),
        "deepstack_visual_indexes": [0] * rng.randrange(0, 3) if features else [],
    }  # fmt: skip


def count(transformers, name: str, config) -> int:
    import torch

    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    return sum(tensor.numel() for tensor in {id(p): p for p in model.parameters()}.values())


def config_class(transformers, family):
    return getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")


def read(config):
    data = config if isinstance(config, str) else config.to_json_string(use_diff=False)
    return tiny_checkpoints.read(config=json.loads(data))


def vision_of(rng, kind):
    heads = rng.choice([1, 2, 4])
    vision = {
        "model_type": kind, "hidden_size": heads * 12, "num_hidden_layers": rng.randrange(1, 4),
        "num_attention_heads": heads, "intermediate_size": rng.randrange(5, 99),
        "image_size": 28 * rng.randrange(1, 4), "patch_size": rng.choice([7, 14]),
    }  # fmt: skip
    return vision | ({"vision_use_head": False} if "siglip" in kind else {})


def sizes(seed: int, count: int) -> list[tuple[int, int]]:
    """Random sizes, halves of a window (ties of rounding) and ratios up to and past 200."""
    rng = random.Random(seed)
    found = [(1, 1), (1, 200), (200, 1), (1, 201), (42, 42), (14, 14), (4032, 3024)]
    for _ in range(count):
        found.append((rng.randrange(1, 6000), rng.randrange(1, 6000)))
        found.append((28 * rng.randrange(1, 200) + 14, 28 * rng.randrange(1, 200) + 14))
        short = rng.randrange(1, 40)
        found.append((short, rng.randrange(short * 190, short * 201)))
        found.append((rng.randrange(short * 190, short * 201), short))
    return found


def shapes_near(side: int, number: int) -> list[tuple[int, int]]:
    """Random sizes, long strips, tiny images, and shapes that are whole squares or nearly."""
    rng = random.Random(side)
    found = [(1, 1), (1, 9000), (9000, 1), (side, side), (side - 1, side + 1), (2 * side, side)]
    while len(found) < number:
        found.append((rng.randrange(1, 6000), rng.randrange(1, 6000)))
        found.append((rng.randrange(1, 60), rng.randrange(1, 6000)))
        wide, high = side * rng.randrange(1, 9), side * rng.randrange(1, 9)
        found.append((wide, high))
        found.append((wide + rng.randrange(-3, 4), high + rng.randrange(-3, 4)))
        found.append((wide // rng.randrange(1, 9) + 1, high // rng.randrange(1, 9) + 1))
    return found


def llava_of(transformers, rng, family="Llava", tower="clip"):
    inner = rng.choice(["Llama", "Qwen2", "Mistral"])
    text = text_config(rng) | {"model_type": inner.lower()}
    text["architectures"] = [f"{inner}ForCausalLM"]
    vision = vision_of(rng, f"{tower}_vision_model")
    side = vision["image_size"]
    keys = {"image_grid_pinpoints": [[side, side], [side, 2 * side]]} if family != "Llava" else {}
    if tower == "siglip":
        keys["vision_feature_select_strategy"] = "full"
    return getattr(transformers, f"{family}Config")(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=rng.random() < 0.3,
        architectures=[f"{family}ForConditionalGeneration"],
        **keys,
    )


def written(transformers, config, folder):
    """A header-only checkpoint with the tensors of Transformers' class."""
    import torch

    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    seen, tensors = set(), {}
    for name, tensor in model.named_parameters(remove_duplicate=True):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = ("BF16", tuple(tensor.shape))
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    (folder / "preprocessor_config.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", tensors)
    return tensors


def gemma_of(transformers, rng):
    text = text_config(rng) | {"head_dim": 8}
    vision = vision_of(rng, "siglip_vision_model") | {"image_size": 28, "patch_size": 7}
    return transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=rng.choice([1, 4, 16]),
        tie_word_embeddings=rng.random() < 0.5, architectures=["Gemma3ForConditionalGeneration"],
    )  # fmt: skip


def idefics_of(transformers, rng, kind="Idefics3"):
    heads = rng.choice([1, 2, 4])
    patch, merge = rng.choice([7, 14]), rng.choice([1, 2, 3])
    vision = {
        "hidden_size": heads * 12, "num_hidden_layers": rng.randrange(1, 4),
        "num_attention_heads": heads, "intermediate_size": rng.randrange(5, 99),
        "image_size": 2 * patch * merge * rng.randrange(1, 3), "patch_size": patch,
    }  # fmt: skip
    text = text_config(rng) | {"model_type": "llama", "architectures": ["VLlama3ForCausalLM"]}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, scale_factor=merge,
        tie_word_embeddings=rng.random() < 0.5, pad_token_id=0,
        architectures=[f"{kind}ForConditionalGeneration"],
    )  # fmt: skip
    config.text_config.tie_word_embeddings = rng.random() < 0.5
    return config


def mllama_of(transformers, rng):
    text = text_config(rng)
    del text["num_hidden_layers"]
    heads = rng.choice([1, 2])
    kept = sorted(rng.sample(range(3), rng.randrange(0, 3)))
    shapes = [[1, 1], [1, 2], [2, 1]][: rng.randrange(1, 4)]
    vision = {
        "hidden_size": heads * 8, "attention_heads": heads, "num_hidden_layers": 3,
        "num_global_layers": rng.randrange(1, 4), "intermediate_size": rng.randrange(5, 60),
        "image_size": 28, "patch_size": 14, "max_num_tiles": 2, "supported_aspect_ratios": shapes,
        "intermediate_layers_indices": kept or [0],
        "vision_output_dim": heads * 8 * (len(kept or [0]) + 1),
    }  # fmt: skip
    text |= {
        "num_hidden_layers": 5,
        "pad_token_id": 0,
        "cross_attention_layers": sorted(rng.sample(range(5), 2)),
    }
    return transformers.MllamaConfig(
        text_config=text, vision_config=vision, architectures=["MllamaForConditionalGeneration"]
    )


def qwen3_of(transformers, rng, family="Qwen3VL"):
    text = text_config(rng) | {"head_dim": 8, "attention_bias": rng.random() < 0.5}
    if family == "Qwen3VLMoe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 7}
        text |= {"decoder_sparse_step": 1, "tie_word_embeddings": False}
    vision = qwen3_tower(rng, text)
    return getattr(transformers, f"{family}Config")(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=rng.random() < 0.5,
        architectures=[f"{family}ForConditionalGeneration"],
    )


def glm_of(transformers, rng):
    text = text_config(rng) | {"pad_token_id": 0, "tie_word_embeddings": rng.random() < 0.3}
    heads = rng.choice([1, 2])
    vision = {
        "depth": rng.randrange(1, 4), "num_heads": heads, "hidden_size": heads * 8,
        "intermediate_size": rng.randrange(5, 60), "out_hidden_size": text["hidden_size"],
        "patch_size": 14, "image_size": 28, "attention_bias": rng.random() < 0.5,
    }  # fmt: skip
    return transformers.Glm4vConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=rng.random() < 0.5,
        architectures=["Glm4vForConditionalGeneration"],
    )


def qwen3_5_of(transformers, rng, family="Qwen3_5"):
    text = text_config(rng) | {"head_dim": 8, "attn_output_gate": True, "pad_token_id": 0}
    text |= delta_nets(rng) | {"num_hidden_layers": rng.randrange(4, 10)}
    if family == "Qwen3_5Moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 7}
        text |= {"shared_expert_intermediate_size": 9}
    vision = qwen3_tower(rng, text, features=False)
    return getattr(transformers, f"{family}Config")(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=rng.random() < 0.5,
        architectures=[f"{family}ForConditionalGeneration"],
    )


def front_end(folder, **options):
    """LMDeploy's front end for a checkpoint's folder, on the PyTorch engine."""
    import torch
    from lmdeploy.vl.model.builder import load_vl_model

    front = load_vl_model(str(folder), "pytorch", **options)
    front.set_mm_feature_dtype(torch.bfloat16)
    return front


def tokens_of(folder, images):
    """Image tokens as LMDeploy's front end counts them."""
    model = front_end(folder)
    found = []
    for image, knobs in images:
        content = [{"type": "image", "data": image, **knobs}]
        answer = model.preprocess([{"role": "user", "content": content}])
        found.append(int(answer[-1]["content"][0]["image_tokens"]))
    return found


def check_images(front, rule, text, **asked):
    """Image tokens reach the engine as the rule plans them, whatever a part asks for."""
    rng = random.Random(6)
    for _ in range(12):
        size = rng.randrange(10, 1200), rng.randrange(10, 1200)
        item = {"type": "image", "data": picture(*size), **asked}
        found = front.preprocess([{"role": "user", "content": [item]}], text)
        assert found["input_ids"].count(front.image_token_id) == rule.tokens(*size)
        (image,) = found["multimodal"]
        assert image["pixel_values"].shape[0] == rule.units(*size)


def picture(width, height):
    from PIL import Image

    return Image.new("RGB", (width, height))


def with_processor(folder, name, processor, tokens=()):
    """The tokenizer and the processors' files that Transformers looks for beside a config."""
    write_tokenizer(folder, tokens)
    values = {**processor, "processor_class": f"{name}Processor"}
    video = {**values, "video_processor_type": f"{name}VideoProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


@pytest.fixture
def engine_parameters(transformers, monkeypatch):
    """Counts what the engine would build for a folder, buffers aside."""
    import torch
    from lmdeploy.hf_configs import config_from_pretrained
    from lmdeploy.pytorch.backends.cuda.op_backend import CudaOpsBackend
    from lmdeploy.pytorch.configurations.builder import AutoModelConfigBuilder
    from lmdeploy.pytorch.models.patch import build_model_from_hf_config

    kernel = MagicMock(inv_freq=torch.empty(5))
    del kernel.build_expert_storage  # of expert parallelism alone
    monkeypatch.setattr(CudaOpsBackend, "build_op", classmethod(lambda *_, **__: kernel))
    monkeypatch.setattr("lmdeploy.utils.is_bf16_supported", lambda *_: True)
    for draws in ("normal_", "uniform_"):  # weights that are counted need no values
        monkeypatch.setattr(torch.Tensor, draws, lambda tensor, *_, **__: tensor)

    def counted(folder) -> int:
        config = config_from_pretrained(str(folder), trust_remote_code=False)
        inner = getattr(config, "llm_config", None)
        if isinstance(inner, dict):  # what InternVLChatModel's own config class makes of it
            config.llm_config = transformers.AutoConfig.for_model(**inner)
            config.vision_config = transformers.PretrainedConfig(**config.vision_config)
        made = AutoModelConfigBuilder.build(config, str(folder), tp=1)
        device = torch.device("meta")
        model = build_model_from_hf_config(made.hf_config or config, torch.bfloat16, device)
        return sum(tensor.numel() for tensor in {id(p): p for p in model.parameters()}.values())

    return counted


def without_fla(monkeypatch, name):
    """Have a class of gated delta nets built here: fla's norm is for a GPU alone."""
    import torch

    def norm(hidden, eps=0.0, activation="", **kwargs):
        return torch.nn.RMSNorm(hidden, **kwargs)

    monkeypatch.setattr(f"lmdeploy.pytorch.models.{name}.build_rmsnorm_gated", norm)


def check_cache(made, text, tp):
    """Blocks and states of delta nets are what LMDeploy makes of its own model config."""
    from lmdeploy.pytorch.config import CacheConfig
    from lmdeploy.pytorch.engine.executor.base import ExecutorBase

    assert made.num_layers == text.attention_layers
    settings = Settings(tp=tp, max_batch_size=6)
    cache = CacheConfig(
        max_batches=6, block_size=64, num_cpu_blocks=0, num_gpu_blocks=0,
        states_shapes=made.states_shapes,
    )  # fmt: skip
    executor = SimpleNamespace(cache_config=cache, model_config=made)
    assert ExecutorBase._get_state_cache_mem(executor) == state_bytes(text, settings)
    assert cache.num_state_caches == state_slots(settings)
    each = block_bytes(replace(text, layers=1, delta=None), settings)
    assert block_bytes(text, settings) == made.num_layers * each


_GLM_TOKENS = ("<|image|>", "<|video|>", "<|begin_of_video|>", "<|end_of_video|>")


def qwen3(transformers, folder):
    config = qwen3_of(transformers, random.Random(2))
    config.vision_config.patch_size = 16
    written(transformers, config, folder)
    size = {"shortest_edge": 65_536, "longest_edge": 400_000}
    with_processor(
        folder, "Qwen3VL",
        {"image_processor_type": "Qwen2VLImageProcessorFast", "size": size, "patch_size": 16,
         "temporal_patch_size": 2, "merge_size": 2},
    )  # fmt: skip
    return "<|image_pad|>"


def glm(transformers, folder):
    written(transformers, glm_of(transformers, random.Random(2)), folder)
    size = {"shortest_edge": 12_544, "longest_edge": 400_000}
    with_processor(
        folder, "Glm4v",
        {"image_processor_type": "Glm4vImageProcessor", "size": size, "patch_size": 14,
         "temporal_patch_size": 2, "merge_size": 2},
        _GLM_TOKENS,
    )  # fmt: skip
    return "<|image|>"

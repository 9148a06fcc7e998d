"""Tiny checkpoints and adapters whose numbers are sums of few powers of two.

A product of such matrices is exact in float32 in any order of summation, so that the merged bits do
not depend on the machine's BLAS; what is left to get right is where a result is rounded.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from turbofit.model.merge.merge import merge

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 96, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
LORA: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 20, "bias": "none",
    "target_modules": ["q_proj", "down_proj"], "inference_mode": True,
}  # fmt: skip


#: What it changes: (out, in).
MODULES = {
    f"model.layers.{i}.{part}": shape
    for i in range(2)
    for part, shape in (("self_attn.q_proj", (32, 32)), ("mlp.down_proj", (32, 48)))
}


def dyadic(shape, salt, dtype="float32"):
    """Multiples of 1/256 below a half: seven bits, exact in every dtype used here."""
    import torch

    count = torch.arange(math.prod(shape), dtype=torch.int64)
    values = (count * 2654435761 + salt * 40503) % 65521 % 255 - 127
    return (values.double() / 256).reshape(shape).to(getattr(torch, dtype))


def llama_shapes(config=TINY) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama by their names."""
    width, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, width)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (width, width),
            f"{layer}self_attn.k_proj.weight": (kv, width),
            f"{layer}self_attn.v_proj.weight": (kv, width),
            f"{layer}self_attn.o_proj.weight": (width, width),
            f"{layer}mlp.gate_proj.weight": (inner, width),
            f"{layer}mlp.up_proj.weight": (inner, width),
            f"{layer}mlp.down_proj.weight": (width, inner),
            f"{layer}input_layernorm.weight": (width,),
            f"{layer}post_attention_layernorm.weight": (width,),
        }
    return {**shapes, "model.norm.weight": (width,), "lm_head.weight": (rows, width)}


def make_base(folder: Path, *, dtype="bfloat16", shards=2, config=TINY, binary=False) -> Path:
    """A Llama in several files, with a byte of every kind of small file."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {
        name: dyadic(shape, salt, dtype)
        for salt, (name, shape) in enumerate(llama_shapes(config).items())
    }
    names = list(tensors)
    where = {}
    for i in range(shards):
        part = {name: tensors[name] for name in names[i::shards]}
        stem, end = ("pytorch_model", "bin") if binary else ("model", "safetensors")
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{end}" if shards > 1 else f"{stem}.{end}"
        if binary:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    if shards > 1:
        index = "pytorch_model.bin.index.json" if binary else "model.safetensors.index.json"
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (folder / "LICENSE.txt").write_text("as the base has it")
    return folder


def make_adapter(
    folder: Path, *, dtype="float32", config=None, modules=None, more=None, name="adapter_model"
) -> Path:
    """An adapter as peft saves it; ``modules`` maps a module to (out, in)."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    said = {**LORA, **(config or {})}
    modules = MODULES if modules is None else modules
    tensors = {}
    for salt, (module, (rows, columns)) in enumerate(modules.items()):
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = dyadic((said["r"], columns), 1000 + salt, dtype)
        tensors[f"{key}.lora_B.weight"] = dyadic((rows, said["r"]), 2000 + salt, dtype)
    tensors |= more or {}
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def load(folder: Path) -> dict[str, Any]:
    """All tensors of a folder of safetensors."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def digest(tensors: dict[str, Any]) -> str:
    """A hash of names, dtypes, shapes and bits."""
    import torch

    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(bytes(tensor.flatten().view(torch.uint8).tolist()))
    return found.hexdigest()[:16]


#: Of a merge: dtype of the base, dtype of the adapter, its config, and further tensors of its file.
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "bf16": ("bfloat16", "float32", {}, {}),
    "bf16 of a bf16 adapter": ("bfloat16", "bfloat16", {}, {}),
    "fp16": ("float16", "float32", {}, {}),
    "fp16 of a bf16 adapter": ("float16", "bfloat16", {}, {}),
    "fp32 of an fp16 adapter": ("float32", "float16", {}, {}),
    "rslora": ("bfloat16", "float32", {"use_rslora": True, "r": 16, "lora_alpha": 8}, {}),
    "regex": ("bfloat16", "float32", {"target_modules": r".*layers.*(q|down)_proj"}, {}),
    "modules_to_save": (
        "bfloat16", "float32", {"modules_to_save": ["lm_head"]},
        {"base_model.model.lm_head.weight": (96, 32)},
    ),
}  # fmt: skip
#: By peft 0.21.2 (torch 2.13, CPU); `test_against_peft` computes them anew where it is installed.
GOLDEN: dict[str, str] = {
    "bf16": "9f0d337ca1d0b463",
    "bf16 of a bf16 adapter": "9f0d337ca1d0b463",
    "fp16": "6eabaf272824726e",
    "fp16 of a bf16 adapter": "6eabaf272824726e",
    "fp32 of an fp16 adapter": "90e7e2d6beb59599",
    "rslora": "18a25b1e2b296104",
    "regex": "9f0d337ca1d0b463",
    "modules_to_save": "b091b2a67beca004",
}


VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "projection_dim": 8, "model_type": "clip_vision_model",
}  # fmt: skip
LLAVA: dict[str, Any] = {
    **TINY, "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama",
    "mm_vision_tower": "openai/clip-tiny-patch14-28", "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 16, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_aspect_ratio": "pad",
    "pad_token_id": 0,
}  # fmt: skip


def projector(prefix="model.mm_projector.", dtype="float16") -> dict[str, Any]:
    """The two layers between tower and language model."""
    return {
        f"{prefix}0.weight": dyadic((32, 16), 51, dtype),
        f"{prefix}0.bias": dyadic((32,), 52, dtype),
        f"{prefix}2.weight": dyadic((32, 32), 53, dtype),
        f"{prefix}2.bias": dyadic((32,), 54, dtype),
    }


def add_tokenizer(folder: Path, *, rows=96) -> None:
    """A SentencePiece model with so many pieces."""
    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, rows))]
    config = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>",
              "eos_token": "</s>", "pad_token": "<unk>"}  # fmt: skip
    data = b""
    for i, name in enumerate(names):
        kind = 2 if i == 0 else 3 if i < 3 else 1
        raw = name.encode()
        inner = b"\x0a" + bytes([len(raw)]) + raw + b"\x15\0\0\0\0\x18" + bytes([kind])
        data += b"\x0a" + bytes([len(inner)]) + inner
    data += b"\x12\x02\x18\x02"  # a trainer spec: BPE
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<unk>"}))
    (folder / "generation_config.json").write_text(json.dumps({"pad_token_id": 0}))


def make_original(folder: Path, *, config=None) -> Path:
    """liuhaotian/llava-v1.5-7b, tiny: two torch files, no vision tower in them."""
    import torch

    make_base(folder, dtype="float16", binary=True)
    path = folder / "pytorch_model-00002-of-00002.bin"
    index_path = folder / "pytorch_model.bin.index.json"
    extra = projector() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    torch.save({**torch.load(path), **extra}, path)
    index = json.loads(index_path.read_text())
    index["weight_map"] |= dict.fromkeys(extra, path.name)
    index_path.write_text(json.dumps(index))
    (folder / "config.json").write_text(
        json.dumps({**LLAVA, "torch_dtype": "float16", **(config or {})})
    )
    add_tokenizer(folder)
    return folder


def make_vicuna(folder: Path, **keywords) -> Path:
    """lmsys/vicuna-7b-v1.5, tiny."""
    make_base(folder, dtype="float16", binary=True, **keywords)
    add_tokenizer(folder)
    return folder


def make_llava_lora(folder: Path, **keywords) -> Path:
    """liuhaotian/llava-v1.5-7b-lora, tiny: LoRA, and the projector in a file of its own."""
    import torch

    make_adapter(folder, name="adapter_model.bin", **keywords)
    torch.save(
        projector("base_model.model.model.mm_projector.", "bfloat16"),
        folder / "non_lora_trainables.bin",
    )
    (folder / "config.json").write_text(json.dumps(LLAVA))
    return folder


def make_clip(folder: Path, transformers, *, binary=True) -> Path:
    """openai/clip-vit-large-patch14-336, tiny, in float32 and with its text half."""
    import torch

    torch.manual_seed(3)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 1, "vocab_size": 20, "projection_dim": 8}  # fmt: skip
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    )
    model.save_pretrained(folder)
    if binary:
        from safetensors.torch import load_file

        state = load_file(folder / "model.safetensors")
        state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def merged(tmp_path: Path, base: Path, adapter: Path, **keywords):
    return merge(str(base), str(adapter), str(tmp_path / "out"), **keywords)

"""A tiny LLaVA-1.5 in its original format, whole or as LoRA over a Vicuna, and a tiny CLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.model.merge.cases import TINY, dyadic, make_adapter, make_base

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 8,
    "model_type": "clip_vision_model",
}
LLAVA: dict[str, Any] = {
    **TINY,
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "mm_vision_tower": "openai/clip-tiny-patch14-28",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 16,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
    "pad_token_id": 0,
}


def projector(prefix="model.mm_projector.", dtype="float16") -> dict[str, Any]:
    """The two layers between tower and language model."""
    return {
        f"{prefix}0.weight": dyadic((32, 16), 51, dtype),
        f"{prefix}0.bias": dyadic((32,), 52, dtype),
        f"{prefix}2.weight": dyadic((32, 32), 53, dtype),
        f"{prefix}2.bias": dyadic((32,), 54, dtype),
    }


def add_tokenizer(folder: Path, *, pieces=False, rows=96) -> None:
    """A word-level tokenizer.json, or a SentencePiece model with as many pieces."""
    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, rows))]
    config = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>",
              "eos_token": "</s>", "pad_token": "<unk>"}  # fmt: skip
    if pieces:
        data = b""
        for i, name in enumerate(names):
            kind = 2 if i == 0 else 3 if i < 3 else 1
            raw = name.encode()
            inner = b"\x0a" + bytes([len(raw)]) + raw + b"\x15\0\0\0\0\x18" + bytes([kind])
            data += b"\x0a" + bytes([len(inner)]) + inner
        data += b"\x12\x02\x18\x02"  # a trainer spec: BPE
        (folder / "tokenizer.model").write_bytes(data)
    else:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                   "special": True}  # fmt: skip
        document = {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": names[i], **special} for i in range(3)],
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {
                "type": "WordLevel",
                "vocab": {name: i for i, name in enumerate(names)},
                "unk_token": "<unk>",
            },
        }
        (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<unk>"}))
    (folder / "generation_config.json").write_text(json.dumps({"pad_token_id": 0}))


def make_original(folder: Path, *, pieces=False, config=None) -> Path:
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
    add_tokenizer(folder, pieces=pieces)
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

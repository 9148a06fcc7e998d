"""Tiny checkpoints of Llama and Qwen2-VL, as folders and in memory."""

from __future__ import annotations

import json

from tests.support.safetensors_file import write_safetensors
from turbofit.core.model import ModelSource
from turbofit.model.checkpoint import Weights, read_checkpoint

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 100,
    "max_position_embeddings": 64, "torch_dtype": "float16",
}  # fmt: skip


QWEN = {
    "architectures": ["Qwen2VLForConditionalGeneration"], "hidden_size": 64, "vocab_size": 80,
    "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "torch_dtype": "bfloat16",
    "vision_config": {"depth": 1, "embed_dim": 64, "num_heads": 1, "hidden_size": 64},
}  # fmt: skip


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
                tensors |= {
                    f"{prefix}{name}.qweight": ("I32", (inn, out // 8)),
                    f"{prefix}{name}.qzeros": ("I32", (inn // 128, out // 8)),
                    f"{prefix}{name}.scales": ("F16", (inn // 128, out)),
                }
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
    return read_checkpoint(Memory(**files), ModelSource(kind="folder", where="x", sizes="file"))

"""Header-only checkpoints of drafts for speculative decoding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from turbofit.core.draft import Draft
from turbofit.core.json_types import Options
from turbofit.core.model import Model, TextDims
from turbofit.rehearse.checkpoint.header_only import write_header
from turbofit.rehearse.checkpoint.linears import Entry

__all__ = ["speculative_of"]


def speculative_of(draft: Draft | None, model: Model, scratch: Path) -> Options:
    """The fields of LMDeploy's SpeculativeConfig; empty where nothing drafts.

    A draft that is a checkpoint of its own is taken from its folder, or a stand-in is written.

    Args:
        draft: what drafts.
        model: its target.
        scratch: where a stand-in is written.
    """
    if draft is None:
        return {}
    folder = Path(draft.model).expanduser()
    if draft.has_checkpoint and not any(folder.glob("*.safetensors")):
        folder = _write(draft, model.text.hidden, scratch / "draft")
    return {
        "method": draft.method,
        "num_speculative_tokens": draft.num_speculative_tokens,
        "model": str(folder) if draft.has_checkpoint else "",
    }


def _write(draft: Draft, width: int, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = draft.text
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": text.hidden,
        "target_hidden_size": width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "head_dim": text.head_dim,
        "intermediate_size": text.intermediate,
        "vocab_size": text.vocab,
        "draft_vocab_size": draft.vocab,
        "max_position_embeddings": text.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_header(folder / "model.safetensors", _tensors(draft, width))
    return folder


def _tensors(draft: Draft, width: int) -> Iterator[Entry]:
    """Names as EAGLE's own checkpoints have them."""
    text, third = draft.text, draft.method == "eagle3"
    if draft.embeddings:
        yield "embed_tokens.weight", "BF16", (text.vocab, text.hidden)
    for i in range(text.layers):
        yield from _layer("midlayer." if third else f"layers.{i}.", text, third)
        if third or i:
            yield from _norms("midlayer." if third else f"layers.{i}.", text, "input_layernorm")
    if not third:
        yield "fc.weight", "BF16", (text.hidden, 2 * text.hidden)
        return
    yield from _norms("midlayer.", text, "hidden_norm")
    yield from _norms("", text, "norm")
    yield "fc.weight", "BF16", (text.hidden, 3 * width)
    yield "lm_head.weight", "BF16", (draft.vocab, text.hidden)
    yield "d2t", "I32", (draft.vocab,)


def _layer(at: str, text: TextDims, third: bool) -> Iterator[Entry]:
    hidden, inputs = text.hidden, (2 if third else 1) * text.hidden
    query, key = text.heads * text.head_dim, text.kv_heads * text.head_dim
    for name, outputs in (("q", query), ("k", key), ("v", key)):
        yield f"{at}self_attn.{name}_proj.weight", "BF16", (outputs, inputs)
    yield f"{at}self_attn.o_proj.weight", "BF16", (hidden, query)
    yield f"{at}mlp.gate_proj.weight", "BF16", (text.intermediate, hidden)
    yield f"{at}mlp.up_proj.weight", "BF16", (text.intermediate, hidden)
    yield f"{at}mlp.down_proj.weight", "BF16", (hidden, text.intermediate)
    yield from _norms(at, text, "post_attention_layernorm")


def _norms(at: str, text: TextDims, name: str) -> Iterator[Entry]:
    yield f"{at}{name}.weight", "BF16", (text.hidden,)

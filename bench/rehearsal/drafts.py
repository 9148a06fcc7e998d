"""Writes drafts for speculative decoding whose weights are zeros, as sparse files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal

from msgspec.structs import replace

from tests.support.safetensors_file import write_safetensors
from turbofit.core.model import Draft, Model
from turbofit.model.drafts import draft_tensors

#: The algorithm of drafts that are layers of the model's checkpoint.
MTP: Final = "deepseek_mtp"
Algorithm = Literal["eagle", "eagle3", "deepseek_mtp"]


def write_draft(
    model: Model,
    folder: Path,
    algorithm: Algorithm,
    *,
    rows: int = 32000,
    embeds: bool | None = None,
    **settings: Any,
) -> Path:
    """Write a draft of one layer with the base's dimensions; ``settings`` replace its config's.

    ``rows`` are those of an EAGLE-3 draft's head. ``embeds``: the file has embeddings; as in
    published ones, EAGLE's have and EAGLE-3's have not.
    """
    third = algorithm == "eagle3"
    text = replace(model.text, layers=1, tie_word_embeddings=False)
    draft = Draft(
        algorithm=algorithm,
        path=str(folder),
        tokens=1,
        text=text,
        head_rows=rows if third else 0,
        embeds=not third if embeds is None else embeds,
    )
    tensors = {name: ("BF16", list(shape)) for name, shape in draft_tensors(draft).items()}
    if third:
        tensors |= {"d2t": ("I64", [rows]), "t2d": ("BOOL", [text.vocab])}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": text.hidden, "intermediate_size": text.intermediate,
        "num_attention_heads": text.heads, "num_key_value_heads": text.kv_heads,
        "head_dim": text.head_dim, "num_hidden_layers": 1, "vocab_size": text.vocab,
        "max_position_embeddings": text.max_position_embeddings, "rms_norm_eps": 1e-5,
        **({"draft_vocab_size": rows} if third else {}), **settings,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder

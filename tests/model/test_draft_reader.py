"""What drafts for a model: read from a checkpoint of its own, a target's, or a preset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.model.draft_reader import read_draft, requested_draft
from turbofit.model.parameters import draft_elements
from turbofit.model.source import resolve_model
from turbofit.rehearse.checkpoint.header_only import write_header

LLAMA = "llama-3.1-8b"
#: The shapes of yuhuili/EAGLE3-LLaMA3.1-Instruct-8B, whose target is Llama-3.1-8B-Instruct.
EAGLE3 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "draft_vocab_size": 32000,
    "max_position_embeddings": 2048,
}  # fmt: skip


def folder_of(tmp_path: Path, **changes: Any) -> str:
    (tmp_path / "config.json").write_text(json.dumps({**EAGLE3, **changes}), encoding="utf-8")
    return str(tmp_path)


def test_an_eagle3_draft_is_read(tmp_path: Path) -> None:
    write_header(tmp_path / "model.safetensors", [("d2t", "I32", (32000,))])
    draft = read_draft(resolve_model(LLAMA), "eagle3", folder_of(tmp_path), 3)
    assert (draft.text.layers, draft.text.kv_heads, draft.vocab) == (1, 8, 32000)
    assert not draft.embeddings
    assert draft.has_checkpoint
    assert draft.model == str(tmp_path)
    assert draft.target_states == 3


def test_embeddings_of_its_own_are_seen(tmp_path: Path) -> None:
    table = ("embed_tokens.weight", "BF16", (128256, 4096))
    write_header(tmp_path / "model.safetensors", [table])
    assert read_draft(resolve_model(LLAMA), "eagle3", folder_of(tmp_path), 1).embeddings


@pytest.mark.parametrize(("more", "held"), [(0, False), (128256 * 4096 * 2, True)])
def test_the_size_of_torchs_own_file_tells_of_embeddings(
    tmp_path: Path, more: int, held: bool
) -> None:
    name, model = folder_of(tmp_path), resolve_model(LLAMA)
    alone = draft_elements("eagle3", replace(model.text, layers=1), 32000, 4096)
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        file.truncate(2 * alone + more)
    assert read_draft(model, "eagle3", name, 1).embeddings is held


def test_what_nobody_can_tell_is_charged(tmp_path: Path) -> None:
    assert read_draft(resolve_model(LLAMA), "eagle3", folder_of(tmp_path), 1).embeddings


@pytest.mark.parametrize(
    ("model", "method", "key"),
    [
        ("deepseek-v3", "deepseek_mtp", True),
        ("glm-4.5-air", "deepseek_mtp", True),
        ("glm-4.7-flash", "deepseek_mtp", True),
        ("qwen3.5-9b", "qwen3_5_mtp", False),
        ("qwen3.5-35b-a3b", "qwen3_5_mtp", False),
    ],
)
def test_layers_of_the_target_draft(model: str, method: Any, key: bool) -> None:
    target = resolve_model(model)
    draft = read_draft(target, method, None, 2)
    assert draft.text.layers == 1
    assert draft.text.delta is None
    assert draft.text.attention_layers == 1
    assert draft.embeddings is key
    assert draft.model == ""
    assert not draft.has_checkpoint
    if target.text.moe is not None:
        assert draft.text.moe is not None
        assert draft.text.moe.layers == 1


def test_layers_are_counted_in_a_checkpoints_config(tmp_path: Path) -> None:
    config = {"num_nextn_predict_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    draft = read_draft(resolve_model("glm-4.5-air"), "deepseek_mtp", str(tmp_path), 1)
    assert draft.text.layers == 2
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="holds no layers that draft"):
        read_draft(resolve_model("glm-4.5-air"), "deepseek_mtp", str(tmp_path), 1)


@pytest.mark.parametrize(
    ("model", "method", "words"),
    [
        (LLAMA, "dflash", "no account of --speculative-algorithm dflash"),
        (LLAMA, "hy3_mtp", "no account"),
        (LLAMA, "eagle3", "a checkpoint of its own"),
        (LLAMA, "qwen3_5_mtp", "not for LlamaForCausalLM"),
        ("qwen3-8b", "eagle3", "for LlamaForCausalLM, not for Qwen3ForCausalLM"),
        ("glm-4.5-air", "eagle3", "not for Glm4MoeForCausalLM"),
        ("deepseek-v2-lite", "deepseek_mtp", "not for DeepseekV2ForCausalLM"),
    ],
)
def test_what_lmdeploy_or_turbofit_does_not_draft_with(model: str, method: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as told:
        read_draft(resolve_model(model), method, None, 1)
    assert told.value.hint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "which LMDeploy 0.18 does not take"),
        ({"hidden_size": 2048, "head_dim": 128}, "drafts for a model of 2048 channels"),
        ({"target_hidden_size": 8192}, "of 8192 channels"),
        ({"vocab_size": 32000}, "and 32000 tokens"),
        ({"num_hidden_layers": 2}, "Eagle3 drafts of one"),
        ({"draft_vocab_size": None}, "draft_vocab_size is missing"),
    ],
)
def test_drafts_that_do_not_go_with_the_target(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        read_draft(resolve_model(LLAMA), "eagle3", folder_of(tmp_path, **changes), 1)


def test_a_draft_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="no checkpoint's folder"):
        read_draft(resolve_model(LLAMA), "eagle3", "nowhere", 1)


def test_how_to_draft_without_a_word_that_something_should() -> None:
    with pytest.raises(UsageError, match="--speculative-draft-model"):
        requested_draft(resolve_model(LLAMA), None, "x", None)
    with pytest.raises(UsageError, match="--speculative-num-draft-tokens"):
        requested_draft(resolve_model(LLAMA), None, None, 2)

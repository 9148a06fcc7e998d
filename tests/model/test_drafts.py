"""Which drafts LMDeploy's PyTorch engine loads beside a model, and which are refused before."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET
from msgspec.structs import replace

from bench.rehearsal.drafts import Algorithm, write_draft
from turbofit.core.errors import UsageError
from turbofit.core.model import Draft, Model, ModelSource
from turbofit.model.drafts import with_draft
from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.twin import twin_of, write_model

LLAMA = resolve_model("llama-3.1-8b")


def read(folder: Path, algorithm: str = "eagle3", model: Model = LLAMA, tokens: int = 3) -> Draft:
    draft = with_draft(model, algorithm, str(folder), tokens).draft
    assert draft is not UNSET
    return draft


def refused(*given: Any, **options: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        read(*given, **options)
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value


@pytest.mark.parametrize("algorithm", ["eagle", "eagle3"])
def test_what_is_known_of_each(algorithm: Algorithm, tmp_path: Path) -> None:
    folder = write_draft(LLAMA, tmp_path / "draft", algorithm)
    draft = read(folder, algorithm)
    assert (draft.algorithm, draft.path, draft.tokens) == (algorithm, str(folder), 3)
    assert draft.text.layers == 1
    # published EAGLE-3 drafts take the base's embeddings, and have a smaller vocabulary
    assert (draft.head_rows, draft.embeds) == (
        (0, True) if algorithm == "eagle" else (32000, False)
    )
    assert not LLAMA.draft


def test_embeddings_of_its_own(tmp_path: Path) -> None:
    """Of torch's own format only the size tells."""
    for embeds in (False, True):
        folder = write_draft(LLAMA, tmp_path / str(embeds), "eagle3", embeds=embeds)
        assert read(folder).embeds is embeds
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        assert read(folder).embeds is embeds


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vocab_size": 32000}, "its vocabulary has 32,000 tokens, and that of .* 128,256"),
        ({"hidden_size": 2048}, "it has 2048 hidden channels"),
        ({"target_hidden_size": 8192}, "hidden channels"),
        ({"num_hidden_layers": 2}, "drafts of one layer, and it has 2"),
        ({"tie_word_embeddings": True}, "head is tied"),
        ({"attention_bias": True}, "it has biases"),
        ({"quantization_config": {"quant_method": "awq"}}, "or is quantised"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "LlamaForCausalLMEagle3, and LMDeploy"),
        ({"draft_vocab_size": 16000}, "the file differ in d2t"),
    ],
)
def test_configs(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_draft(LLAMA, tmp_path / "draft", "eagle3", **config)
    assert re.search(message, refused(folder).message)


def test_files(tmp_path: Path) -> None:
    eagle = write_draft(LLAMA, tmp_path / "eagle", "eagle")
    assert "is no eagle3 draft of" in refused(eagle).message
    third = write_draft(LLAMA, tmp_path / "eagle3", "eagle3", embeds=True)
    assert "is no eagle draft of" in refused(third, "eagle").message
    os.truncate(third / "model.safetensors", 8192)
    assert "holds 8192 bytes" in refused(third).message
    assert "neither a folder nor in the local hub cache" in refused(tmp_path / "none").message
    (third / "config.json").write_text("{")
    assert "is not JSON" in refused(third).message


def test_the_base_itself(tmp_path: Path) -> None:
    folder = write_draft(LLAMA, tmp_path / "draft", "eagle3")
    source = ModelSource(kind="folder", where=str(folder), sizes="file", checkpoint=str(folder))
    base = replace(LLAMA, source=source)
    assert "it is Llama-3.1-8B-Instruct itself" in refused(folder, model=base).message


def test_what_lmdeploy_or_turbofit_does_not_know(tmp_path: Path) -> None:
    folder = write_draft(LLAMA, tmp_path / "draft", "eagle3")
    qwen = resolve_model("qwen2.5-0.5b")
    assert "has eagle3 for LlamaForCausalLM" in refused(folder, model=qwen).message
    for algorithm, why in {"dflash": "a block at once", "hy3_mtp": "no account of Hy3"}.items():
        assert why in refused(folder, algorithm).message
    assert "plans up to 6" in refused(folder, tokens=7).message
    for algorithm, path, message in (
        (None, str(folder), "no draft without --speculative-algorithm"),
        ("eagle", None, "needs a draft"),
    ):
        with pytest.raises(UsageError, match=message):
            with_draft(LLAMA, algorithm, path, 1)


def test_a_base_with_few_layers(tmp_path: Path) -> None:
    """EAGLE-3 would read one layer twice."""
    folder = write_draft(LLAMA, tmp_path / "draft", "eagle3")
    small = replace(LLAMA, text=replace(LLAMA.text, layers=6))
    assert "a base of 7 layers or more" in refused(folder, model=small).message


@pytest.mark.parametrize(
    ("model", "algorithm", "draft", "tokens", "message"),
    [
        ("llama-3.1-8b", "qwen3_5_mtp", None, 1, "planned for Qwen3_5ForCausalLM, "),
        ("qwen3.5-9b", "deepseek_mtp", None, 1, "planned for Glm4MoeForCausalLM, .*, not Qwen3_5"),
        ("qwen3.5-9b", "eagle3", None, 1, "has eagle3 for LlamaForCausalLM"),
        ("qwen3.5-9b", "qwen3_5_mtp", "/draft", 1, "a part of .*own checkpoint"),
        ("qwen3.5-9b", "qwen3_5_mtp", None, 7, "plans up to 6"),
        ("deepseek-v2-lite", "deepseek_mtp", None, 1, "not DeepseekV2ForCausalLM"),
        ("kimi-k2.5", "deepseek_mtp", None, 1, "not KimiK2ForCausalLM"),
        ("kimi-k2.5", "eagle3", "/draft", 1, "no account of Kimi's draft"),
    ],
)
def test_own_layers_that_are_not_planned(
    model: str, algorithm: str, draft: str | None, tokens: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        with_draft(resolve_model(model), algorithm, draft, tokens)


def test_own_layers_must_be_in_the_checkpoint(tmp_path: Path) -> None:
    """Conversions leave them out, and LMDeploy would leave them unfilled."""
    text = resolve_model("glm-4.5-air").text
    assert text.moe is not None
    cut = replace(text, layers=2, moe=replace(text.moe, layers=1, experts=8))
    plain = replace(resolve_model("glm-4.5-air"), text=cut)
    whole = with_draft(plain, "deepseek_mtp", None, 2)
    without = resolve_model(str(write_model(twin_of(plain), tmp_path / "without")))
    model = resolve_model(str(write_model(twin_of(whole), tmp_path / "whole")))
    assert model.text == without.text  # the layers that propose are none of the model's
    draft = with_draft(model, "deepseek_mtp", None, 2).draft
    assert draft is not UNSET
    assert (draft.is_own, draft.text.layers, draft.head_rows) == (True, 1, 151552)
    with pytest.raises(UsageError, match="no layers that propose tokens"):
        with_draft(without, "deepseek_mtp", None, 2)

"""Which LoRA adapters LMDeploy's PyTorch engine serves, and which are refused before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.rehearsal.adapters import ALL, ATTENTION, DELTA, write_adapter
from tests.support.safetensors_file import write_safetensors
from turbofit.core.errors import UsageError
from turbofit.core.model import Model
from turbofit.model.adapters import with_adapters
from turbofit.model.source import resolve_model

QWEN = resolve_model("qwen2.5-0.5b")


def read(model: Model, *words: object, only_text: bool = False) -> Model:
    return with_adapters(model, [str(word) for word in words], only_text=only_text)


def test_what_is_known_of_each(tmp_path: Path) -> None:
    a = write_adapter(QWEN, tmp_path / "a", 16)
    b = write_adapter(QWEN, tmp_path / "b", 8, ("q_proj",), dtype="BF16")
    one, two = read(QWEN, f"sql={a}", b).loras
    assert (one.name, one.rank, one.modules, one.path) == ("sql", 16, ALL, str(a))
    assert (two.name, two.rank, two.modules) == ("default", 8, ("q_proj",))
    assert two.file_bytes == 24 * 8 * (896 + 896) * 2
    assert not QWEN.loras


def test_the_base_that_it_names(tmp_path: Path) -> None:
    """Shapes alone do not tell a chat model from its base model."""
    for name, said in {"Qwen/Qwen2.5-0.5B-Instruct": False, "Qwen/Qwen2.5-0.5B": True}.items():
        folder = tmp_path / str(said)
        adapter = write_adapter(QWEN, folder, 8, base_model_name_or_path=name)
        warned = [text for text in read(QWEN, adapter).warnings if "as its base" in text]
        assert bool(warned) is said


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "LoRA with use_dora is more than plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "LoRA with modules_to_save is more"),
        ({"rank_pattern": {"q_proj": 4}}, "LoRA with rank_pattern is more"),
        ({"alpha_pattern": {"q_proj": 4}}, "LoRA with alpha_pattern is more"),
        ({"use_rslora": True}, "LoRA with use_rslora is more"),
        ({"bias": "all"}, "it has biases"),
        ({"peft_type": "IA3"}, "IA3 is not LoRA"),
        ({"init_lora_weights": "pissa"}, "changed the base too"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, "has no place for the"),
        ({"r": 4}, "of another base"),
        ({"r": 0}, "not within"),
    ],
)
def test_configs(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    adapter = write_adapter(QWEN, tmp_path / "a", 8, **config)
    with pytest.raises(UsageError) as caught:
        read(QWEN, f"a={adapter}")
    assert message in caught.value.message
    assert "\n" not in caught.value.message + caught.value.hint
    # The hint leads to `merge` only where `merge` takes the adapter.
    taken = {"modules_to_save", "use_rslora", "bias"} & config.keys()
    assert not taken or "turbofit merge" in caught.value.hint
    refused = {"use_dora", "rank_pattern", "alpha_pattern", "peft_type", "init_lora_weights"}
    assert not refused & config.keys() or "peft's own" in caught.value.hint


def test_a_file_without_matrices(tmp_path: Path) -> None:
    adapter = write_adapter(QWEN, tmp_path / "a", 8, target_modules=".*_proj")
    write_safetensors(adapter / "adapter_model.safetensors", {})
    with pytest.raises(UsageError, match="has no matrices"):
        read(QWEN, f"a={adapter}")


Q, LM = "model.layers.0.self_attn.q_proj", "lm_head"


@pytest.mark.parametrize(
    ("base", "more", "hint"),
    [
        ("qwen2.5-0.5b", {f"{LM}.lora_A": [8, 896], f"{LM}.lora_B": [151936, 8]}, "turbofit merge"),
        ("qwen2.5-0.5b", {"model.embed_tokens.lora_embedding_A": [8, 151936]}, "peft's own"),
        ("qwen2.5-0.5b", {f"{LM}.lora_A": [8, 896]}, "peft's own"),
        ("qwen2.5-0.5b", {"model.embed_tokens": [151936, 896]}, "untie"),
        ("qwen2.5-7b", {"model.embed_tokens": [152064, 3584]}, "turbofit merge"),
        ("qwen2.5-7b-awq", {f"{Q}.lora_magnitude_vector": [3584]}, "16-bit checkpoint"),
        ("gemma-3-4b", {}, "if it is plain LoRA, turbofit merge"),
    ],
)
def test_the_hint_names_merge_only_where_merge_takes_the_adapter(
    base: str, more: dict[str, list[int]], hint: str, tmp_path: Path
) -> None:
    tensors = {f"base_model.model.{name}.weight": ("F32", shape) for name, shape in more.items()}
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(UsageError) as caught:
        read(resolve_model(base), f"a={tmp_path}")
    assert hint in caught.value.hint
    assert ("turbofit merge" in caught.value.hint) is ("turbofit merge" in hint)


def test_files(tmp_path: Path) -> None:
    other = write_adapter(resolve_model("qwen2.5-7b"), tmp_path / "other", 8)
    with pytest.raises(UsageError, match=r"of another base than Qwen2\.5-0\.5B"):
        read(QWEN, f"a={other}")
    fewer = write_adapter(QWEN, tmp_path / "fewer", 8, ATTENTION, target_modules=list(ALL))
    with pytest.raises(UsageError, match=r"has no lora_A of layer 0's down_proj.* unfilled"):
        read(QWEN, f"a={fewer}")
    renamed = write_adapter(QWEN, tmp_path / "new", 8, layers="model.language_model.layers")
    with pytest.raises(UsageError, match=r"calls the decoder's layers model\.language_model"):
        read(QWEN, f"a={renamed}")
    broken = write_adapter(QWEN, tmp_path / "broken", 8)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"adapter_model.safetensors ends before"):
        read(QWEN, f"a={broken}")
    weights.rename(broken / "adapter_model.bin")
    with pytest.raises(UsageError, match=r"adapter_model.bin cannot be checked"):
        read(QWEN, f"a={broken}")
    with pytest.raises(UsageError, match="neither a folder nor in the local hub cache"):
        read(QWEN, "a=/no/such/folder")
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        read(QWEN, f"a={broken}")


def test_names_of_modules_that_lmdeploy_does_not_read(tmp_path: Path) -> None:
    """The file says which modules an expression or paths name; a copy says so for LMDeploy."""
    paths = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(24)]
    for number, targets in enumerate((r".*\.q_proj", paths)):
        folder = tmp_path / str(number)
        adapter = write_adapter(QWEN, folder, 8, ("q_proj",), target_modules=targets)
        model = read(QWEN, f"a={adapter}")
        assert model.loras[0].modules == ("q_proj",)
        assert model.loras[0].renamed
        assert "adapter a names its modules" in model.warnings[-1]
    model = resolve_model("qwen3-vl-2b")
    for layers, renamed in {"language_model.layers": False, "model.layers": True}.items():
        adapter = write_adapter(model, tmp_path / layers, 8, layers=layers)
        assert read(model, f"a={adapter}").loras[0].renamed is renamed


def test_names(tmp_path: Path) -> None:
    adapter = write_adapter(QWEN, tmp_path / "a", 8)
    for words, message in {
        (adapter, adapter): "two adapters are called default",
        (f"x={adapter}", f"x={adapter}"): "two adapters are called x",
        (f"={adapter}",): "an empty name",
        (f"{QWEN.hub_id}={adapter}",): "like the model",
        (f"{QWEN.name}={adapter}",): "like the model",
        (f"Qwen2.5-0.5B-Instruct={adapter}",): "like the model",
        (f"qwen2.5-0.5b={adapter}",): "like the model",
        (f"llama2={adapter}",): "a chat template of LMDeploy",
    }.items():
        with pytest.raises(UsageError, match=message):
            read(QWEN, *words)


def test_ranks_that_the_kernel_takes(tmp_path: Path) -> None:
    """Triton's blocks are powers of two; of several adapters of a module the largest decides."""
    odd = write_adapter(QWEN, tmp_path / "odd", 24)
    small, large = (write_adapter(QWEN, tmp_path / str(rank), rank) for rank in (12, 32))
    with pytest.raises(UsageError, match="odd has rank 24"):
        read(QWEN, f"odd={odd}", f"small={small}")
    assert len(read(QWEN, f"odd={odd}", f"small={small}", f"large={large}").loras) == 3


@pytest.mark.parametrize(
    ("name", "clash", "apart"),
    [
        ("qwen2.5-vl-3b", ("gate_proj",), ATTENTION),
        ("internvl3-1b-hf", ("q_proj",), ("o_proj", "gate_proj", "up_proj", "down_proj")),
        ("intern-s1-mini", ("v_proj",), ("down_proj",)),
        ("llava-1.5-7b", ("k_proj",), ("o_proj", "up_proj")),
        ("llava-v1.6-mistral-7b", ("v_proj",), ("o_proj", "gate_proj")),
        ("qwen2-vl-2b", (), ALL),
        ("internvl3-1b", (), ALL),
        ("qwen3.5-0.8b", (), (*ALL, *DELTA)),
    ],
)
def test_modules_of_the_vision_tower(
    name: str, clash: tuple[str, ...], apart: tuple[str, ...], tmp_path: Path
) -> None:
    """They are found by the end of their names, and would be given the prompt's positions."""
    model = resolve_model(name)
    layers = "model.language_model.layers"
    served = write_adapter(model, tmp_path / "served", 8, apart, layers=layers)
    loaded = read(model, f"a={served}")
    assert loaded.loras[0].modules == apart
    assert any("not rehearsed" in line for line in loaded.warnings) is bool(model.text.delta)
    if not clash:
        return
    refused = write_adapter(model, tmp_path / "refused", 8, (*clash, *apart), layers=layers)
    with pytest.raises(UsageError, match=f"the vision tower's {clash[0]}") as caught:
        read(model, f"a={refused}")
    assert "--language-model-only" in caught.value.hint
    assert f"if its base is {model.name}, turbofit merge" in caught.value.hint
    assert read(model, f"a={refused}", only_text=True).loras


def test_a_class_that_was_not_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="finds no modules for adapters") as caught:
        read(resolve_model("gemma-3-4b"), f"a={tmp_path}")
    assert "turbofit merge" in caught.value.hint


def test_experts_are_no_modules(tmp_path: Path) -> None:
    model = resolve_model("qwen3-30b-a3b")
    adapter = write_adapter(model, tmp_path / "a", 8, ATTENTION)
    assert read(model, f"a={adapter}").loras[0].modules == ATTENTION
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == list(ATTENTION)

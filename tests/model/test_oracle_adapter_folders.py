"""Copies of adapters that LMDeploy's own loader reads, with the values of the originals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import turbofit
from bench.rehearsal.adapters import write_adapter
from tests.support.serving import needs
from turbofit.core.plan import Plan
from turbofit.model.adapter_folders import with_copies
from turbofit.model.safetensors import PREFIX
from turbofit.model.source import resolve_model

NEW = "model.language_model.layers"
FILE = "adapter_model.safetensors"
MODULES = ("q_proj", "down_proj")


def split(folder: Path) -> tuple[bytes, bytes]:
    """The header of an adapter's file with its length, and the data after it."""
    whole = (folder / FILE).read_bytes()
    begin = PREFIX + int.from_bytes(whole[:PREFIX], "little")
    return whole[:begin], whole[begin:]


def trained(model: str, folder: Path, **config: Any) -> Path:
    """An adapter as PEFT saves it with Transformers from 4.52 on, with values that differ."""
    adapter = write_adapter(resolve_model(model), folder, 2, MODULES, layers=NEW, **config)
    header, data = split(adapter)
    (adapter / FILE).write_bytes(header + (bytes(range(63)) * (len(data) // 63 + 1))[: len(data)])
    return adapter


def planned(model: str, adapter: Path) -> Plan:
    return turbofit.plan(model, on="1xl4", adapters=(f"sql={adapter}",), max_batch_size=8)


def opened(plan: Plan) -> Path:
    (word,) = plan.engines[0].settings.adapters or ()
    assert word.startswith("sql=")
    return Path(word.removeprefix("sql="))


@pytest.mark.parametrize(
    ("model", "layers"),
    [("qwen2-vl-2b", "model.layers"), ("qwen3-vl-2b", "language_model.layers")],
)
def test_lmdeploy_loads_the_copy_and_ends_on_the_original(
    model: str, layers: str, tmp_path: Path
) -> None:
    needs("lmdeploy", "torch")
    from lmdeploy.pytorch.adapter.adapter import load_lora_weights
    from lmdeploy.pytorch.models.qwen2_vl import Qwen2VLForConditionalGeneration as Qwen
    from safetensors.torch import load_file

    adapter = trained(model, tmp_path / "lora")
    plan = planned(model, adapter)
    assert "adapter sql names its modules in a way" in "".join(plan.model.warnings)
    copy = opened(with_copies(plan, tmp_path / "copies"))
    loaded: dict[str, Any] = {}

    def parameter(name: str) -> Any:
        keep = lambda _, values, adapter_id: loaded.update({name: values})  # noqa: E731
        return SimpleNamespace(weight_loader=keep)

    joined = {"q_proj": "self_attn.qkv_proj", "down_proj": "mlp.down_proj"}
    names = {
        f"{layers}.{layer}.{joined[module]}.lora_adapters.{module}.lora_{part}"
        for layer in range(plan.model.text.layers)
        for module in MODULES
        for part in "AB"
    }
    theirs: Any = SimpleNamespace(
        packed_modules_mapping=Qwen.packed_modules_mapping,
        named_parameters=lambda: [(name, parameter(name)) for name in names],
    )
    with pytest.raises(KeyError, match="language_model"):
        load_lora_weights(theirs, load_file(adapter / FILE).items(), adapter_id=1)
    load_lora_weights(theirs, load_file(copy / FILE).items(), adapter_id=1)
    assert loaded.keys() == names
    values = load_file(adapter / FILE)
    key = f"base_model.model.{NEW}.1.self_attn.q_proj.lora_A.weight"
    assert loaded[f"{layers}.1.self_attn.qkv_proj.lora_adapters.q_proj.lora_A"].equal(values[key])


def test_only_names_change(tmp_path: Path) -> None:
    adapter = trained("qwen2-vl-2b", tmp_path / "lora", target_modules=r".*\.(q|down)_proj")
    plan = planned("qwen2-vl-2b", adapter)
    assert plan.model.loras[0].modules == MODULES
    again = with_copies(plan, tmp_path / "copies")
    copy = opened(again)
    assert opened(plan) == adapter
    assert with_copies(plan, tmp_path / "copies") == again
    (_, before), (header, after) = map(split, (adapter, copy))
    assert before == after
    assert len(header) % PREFIX == 0
    config = json.loads((copy / "adapter_config.json").read_text())
    assert (config["target_modules"], config["lora_alpha"]) == (list(MODULES), 4)

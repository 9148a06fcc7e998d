"""Stacked copies of adapters in LMDeploy's own loader and splitter, beside the weights of merge."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

import turbofit
from bench.rehearsal.adapters import ALL, INTERNLM2, write_adapter
from tests.model.trained_adapter import FILE, trained
from tests.support.serving import needs
from turbofit.core.model import Model
from turbofit.model.adapter_folders import with_copies
from turbofit.model.adapters import PARENTS, engine_modules, file_modules, sizes_of, with_adapters
from turbofit.model.merge.merge import Lora
from turbofit.model.source import resolve_model

INSIDE = "language_model.model.layers"
PLAN = turbofit.plan("internvl2-1b", on="1xl4", engine="pytorch", max_batch_size=8)


def small(name: str) -> Model:
    """A model with one layer and few heads and channels, so that its adapters are small."""
    model = resolve_model(name)
    hidden = 4 * model.text.head_dim
    text = replace(model.text, layers=1, hidden=hidden, intermediate=512, heads=4, kv_heads=2)
    return replace(model, text=text)


def opened(model: Model, root: Path) -> Path:
    engines = with_copies(replace(PLAN, model=model), root).engines
    (word,) = engines[0].settings.adapters or ()
    return Path(word.removeprefix("sql="))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("name", "rank", "modules", "stacked"),
    [
        ("internvl2-1b", 8, ALL, 32),
        ("internvl3.5-8b", 6, ("q_proj", "v_proj", "up_proj"), 16),
        ("internvl2-1b", 4, ("k_proj",), 4),
        ("internvl2-2b", 8, INTERNLM2, 16),
        ("internvl2-2b", 12, ("wqkv", "w1"), 12),
        ("internvl2-2b", 8, ("wqkv", "wo"), 8),
    ],
)
def test_what_lmdeploy_loads_are_the_weights_of_a_merge(
    name: str, rank: int, modules: tuple[str, ...], stacked: int, world: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    needs("lmdeploy", "torch")
    import torch
    from safetensors.torch import load_file

    model = small(name)
    adapter = trained(model, tmp_path / "lora", rank, modules, layers=INSIDE)
    model = with_adapters(model, [f"sql={adapter}"], only_text=False)
    (lora,) = model.loras
    folder = opened(model, tmp_path / "run")
    stored, copy = load_file(adapter / FILE), load_file(folder / FILE)
    assert lora.rank == stacked
    assert lora.file_bytes == sum(tensor.nbytes for tensor in copy.values())
    config = SimpleNamespace(**json.loads((folder / "adapter_config.json").read_text()))
    torch.manual_seed(rank)
    for module in config.target_modules:
        found = torch.cat(loaded_rows(model, config, module, copy, world, monkeypatch))
        for part in engine_modules(model)[module]:
            outputs, inputs = sizes_of(model, part)
            base = torch.randn(outputs, inputs)
            key = f"base_model.model.{INSIDE}.0.{PARENTS[part]}.{part}.lora_"
            merged = base
            if part in modules:
                a, b = (stored[f"{key}{letter}.weight"] for letter in "AB")
                merged = Lora(a, b, 2 * rank / rank).merged(base.clone())
            if part == "wqkv":  # files have each group's heads together
                base, merged = by_kind(model, base), by_kind(model, merged)
            rows, found = found[:outputs], found[outputs:]
            assert torch.equal(base + rows, merged), (module, part)
        assert not len(found)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("name", "modules"), [("internvl2-1b", ALL), ("internvl2-2b", INTERNLM2)])
def test_an_adapter_of_zeros_is_the_base(
    name: str, modules: tuple[str, ...], world: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    needs("lmdeploy", "torch")
    from safetensors.torch import load_file

    model = small(name)
    adapter = write_adapter(model, tmp_path / "lora", 8, modules, layers=INSIDE)
    model = with_adapters(model, [f"sql={adapter}"], only_text=False)
    folder = opened(model, tmp_path / "run")
    config = SimpleNamespace(**json.loads((folder / "adapter_config.json").read_text()))
    assert {*config.target_modules} == {*engine_modules(model)}
    for module in config.target_modules:
        copy = load_file(folder / FILE)
        for rows in loaded_rows(model, config, module, copy, world, monkeypatch):
            assert not rows.any(), module  # memory that nothing fills would be NaN, which is true


def by_kind(model: Model, rows: Any) -> Any:
    """All rows of queries, then those of keys, then those of values."""
    import torch

    text = model.text
    groups = rows.unflatten(0, (text.kv_heads, -1, text.head_dim))
    kinds = groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)
    return torch.cat(kinds)


def loaded_rows(
    model: Model, config: Any, module: str, copy: Any, world: int, monkeypatch: pytest.MonkeyPatch
) -> list[Any]:
    """What all ranks of LMDeploy add to a module's weight, by its sections."""
    import torch
    from lmdeploy.pytorch.adapter.adapter import get_ranks_and_scalings, load_lora_weights
    from lmdeploy.pytorch.backends.lora import AdapterInfo
    from lmdeploy.pytorch.models.internlm2 import InternLM2ForCausalLM
    from lmdeploy.pytorch.nn.linear import lora as theirs
    from lmdeploy.pytorch.nn.linear.default import QKVBaseLinear

    text, parts = model.text, engine_modules(model)[module]
    base = SimpleNamespace(r=0, target_modules=[])
    ranks, scalings = get_ranks_and_scalings(module, [base, config], device=torch.device("cpu"))
    outputs = [size for part in parts for size in sections(model, part)]
    inputs, total, columns = sizes_of(model, parts[0])[1], int(sum(ranks)), len(outputs) > 1
    key = next(name for name in copy if f".{module}.lora_A" in name)
    place = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    added = []
    for here in range(world):
        monkeypatch.setattr(theirs, "get_tp_world_rank", lambda here=here: (world, here))
        split = SimpleNamespace(qkv_split_section=outputs)
        layer = SimpleNamespace(
            adapter_info=AdapterInfo(inputs, sum(outputs), ranks, scalings, slice(0)),
            is_tp=True,
            colwise=columns,
            lora_b_spliter=lambda rows, split=split: QKVBaseLinear.weight_spliter_lora_b(
                split, rows
            ),
        )
        made = {
            "A": torch.full((total, inputs // (1 if columns else world)), torch.nan),
            "B": torch.full((total, sum(outputs) // (world if columns else 1)), torch.nan),
        }

        def parameter(letter: str, layer: Any = layer, made: Any = made) -> Any:
            load = getattr(theirs.LoRA, f"weight_loader_{letter}")
            return SimpleNamespace(
                data=made[letter],
                weight_loader=partial(load, layer),
            )

        engine: Any = SimpleNamespace(
            packed_modules_mapping={},
            config=SimpleNamespace(
                num_attention_heads=text.heads,
                num_key_value_heads=text.kv_heads,
                hidden_size=text.hidden,
            ),
            named_parameters=lambda parameter=parameter: [
                (f"{place}.lora_adapters.{module}.lora_{letter}", parameter(letter))
                for letter in "AB"
            ],
        )
        weights = [(name, value) for name, value in copy.items() if f".{module}.lora_" in name]
        if "wqkv" in file_modules(model):
            engine.packed_modules_mapping = InternLM2ForCausalLM.packed_modules_mapping
            InternLM2ForCausalLM.load_lora_weights(engine, weights, adapter_id=1)
        else:
            load_lora_weights(engine, weights, adapter_id=1)
        added.append(float(scalings[1]) * (made["B"].T @ made["A"]))
    if not columns:
        return [torch.cat(added, dim=1)]
    of_ranks = [rows.split([size // world for size in outputs]) for rows in added]
    return [torch.cat([rows[section] for rows in of_ranks]) for section in range(len(outputs))]


def sections(model: Model, part: str) -> list[int]:
    """The outputs of a module of files, by what LMDeploy divides among ranks."""
    text = model.text
    if part == "wqkv":
        return [size * text.head_dim for size in (text.heads, text.kv_heads, text.kv_heads)]
    return [sizes_of(model, part)[0]]

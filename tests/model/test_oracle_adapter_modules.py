"""Adapters that LMDeploy's own classes find and load, beside the weights of merge.

LMDeploy builds each class on torch's meta device, and the adapters on the CPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from msgspec.structs import replace

import turbofit
from bench.rehearsal.adapters import ALL, BESIDE_TOWER, DELTA, write_adapter
from tests.model.trained_adapter import FILE, trained
from tests.rehearsal.pretend.cuda_torch import run
from tests.support.processes import CUDA_PATH
from tests.support.serving import needs
from turbofit.core.model import Model
from turbofit.model.adapter_folders import with_copies
from turbofit.model.adapters import (
    PARENTS,
    engine_modules,
    layers_of,
    layers_with,
    sizes_of,
    with_adapters,
)
from turbofit.model.merge.merge import Lora
from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.twin import twin_of, write_model

needs("lmdeploy", "torch", "peft")
pytestmark = [
    pytest.mark.lmdeploy,
    pytest.mark.slow,
    pytest.mark.skipif(CUDA_PATH is None, reason="no CUDA build of torch"),
]

NEW: Final = "model.language_model.layers"
#: What LMDeploy adds to each module that it found, by adapter; memory that nothing fills is NaN.
PROGRAM: Final = """
import gc
gc.disable()  # what it imports stays
torch.compile = lambda *_, **__: lambda function: function  # no adapter changes what is compiled
from lmdeploy.pytorch.config import ModelConfig
from lmdeploy.pytorch.models import patch, qwen3_5
from safetensors.torch import save_file

class Nothing(torch.nn.Identity):
    pass

# made with kernels of packages that are not installed here; no adapter changes them
qwen3_5.build_rmsnorm_gated = qwen3_5.GatedDelta = qwen3_5.CausalConv1d = Nothing
torch.use_deterministic_algorithms(True)  # torch.empty fills with NaN
for case in json.loads(sys.argv[-1]):
    config = ModelConfig.from_pretrained(case["model"], trust_remote_code=True, dtype="float16")
    model = patch.build_model_from_hf_config(
        config.hf_config, dtype=torch.float16, device=torch.device("meta"),
        build_model_ctx=patch.BuildModelContext(language_model_only=case["only_text"]),
    )
    patch.add_adapters(model, case["adapters"], torch.float32, torch.device("cpu"))
    changed = {}
    for name, module in model.named_modules():
        loras = getattr(module, "lora_adapters", {}).values()
        for number, adapter in enumerate(sorted(case["adapters"]), 1):
            added = torch.zeros(module.out_features, module.in_features) if loras else None
            for lora in loras:
                info = lora.adapter_info
                begin, rank = int(info.rank_offsets[number]), int(info.ranks[number])
                a, b = (matrix[begin : begin + rank] for matrix in (lora.lora_A, lora.lora_B))
                added[info.base_slice] += float(info.scalings[number]) * (b.T @ a)
            if loras:
                changed[f"{adapter} {name}"] = added
    save_file(changed, case["out"])
"""


def small(name: str) -> Model:
    model = resolve_model(name)
    text = replace(model.text, hidden=256, intermediate=512, heads=4, kv_heads=2, layers=1)
    if text.delta is not None:
        text = replace(text, layers=4, delta=replace(text.delta, layers=3))
    if text.moe is not None:
        text = replace(text, moe=replace(text.moe, layers=4))
    return replace(model, text=text)


CASES: Final = {
    "internvl3-1b-hf": (BESIDE_TOWER, False),
    "intern-s1-mini": (("up_proj", "o_proj"), False),
    "llava-1.5-7b": (BESIDE_TOWER, False),
    "llava-1.5-13b": (ALL, True),
    "qwen3.5-0.8b": ((*ALL, *DELTA), False),
    "qwen3.5-2b": ((*ALL, "in_proj_qkv", "out_proj"), False),
    "qwen3.5-35b-a3b": (("q_proj", "v_proj", "in_proj_z", "in_proj_a"), False),
}


def test_what_lmdeploy_adds_is_what_merge_adds(tmp_path: Path) -> None:
    """An adapter of zeros adds nothing, and no module of a tower is changed."""
    import torch
    from safetensors.torch import load_file

    cases, models = [], {}
    for name, (modules, only_text) in CASES.items():
        model, folder = small(name), tmp_path / name
        words = [
            f"trained={trained(model, folder / 'trained', 6, modules, layers=NEW)}",
            f"zeros={write_adapter(model, folder / 'zeros', 8, modules, layers=NEW)}",
        ]
        models[name] = model = with_adapters(model, words, only_text=only_text)
        cases.append({
            "model": str(write_model(twin_of(model), folder / "model")), "only_text": only_text,
            "adapters": opened(model, folder / "run", only_text=only_text),
            "out": str(folder / "added"),
        })  # fmt: skip
    ran = run(tmp_path / "program", PROGRAM, json.dumps(cases))
    assert ran.code == 0, ran.text
    torch.manual_seed(0)
    for name, model in models.items():
        added = load_file(tmp_path / name / "added")
        stored = load_file(tmp_path / name / "trained" / FILE)
        seen = set()
        for module, layer, parts in changed_modules(model):
            place = f"{layers_of(model)}.{layer}.{PARENTS[parts[0]]}.{module}"
            seen |= {f"trained {place}", f"zeros {place}"}
            assert not added[f"zeros {place}"].any(), place
            rows = added[f"trained {place}"].split([sizes_of(model, part)[0] for part in parts])
            for part, values in zip(parts, rows, strict=True):
                base = torch.randn(sizes_of(model, part))
                key = f"base_model.model.{NEW}.{layer}.{PARENTS[part]}.{part}.lora_"
                merged = base
                if f"{key}A.weight" in stored:
                    a, b = (stored[f"{key}{letter}.weight"] for letter in "AB")
                    merged = Lora(a, b, 2.0).merged(base.clone())
                assert torch.equal(base + values, merged), (name, place, part)
        assert added.keys() == seen, name


def opened(model: Model, root: Path, *, only_text: bool) -> dict[str, str]:
    plan = turbofit.plan("internvl2-1b", on="1xl4", engine="pytorch", max_batch_size=8)
    settings = replace(plan.engines[0].settings, language_model_only=only_text)
    plan = replace(plan, model=model, engines=(replace(plan.engines[0], settings=settings),))
    engines = with_copies(plan, root).engines
    return dict(word.split("=", 1) for word in engines[0].settings.adapters or ())


def changed_modules(model: Model) -> list[tuple[str, int, tuple[str, ...]]]:
    """The engine's modules with adapters, their layers and parts, by turbofit's tables."""
    used = set(model.loras[0].modules)
    tables: dict[str, Any] = dict(engine_modules(model))
    if model.text.delta is not None:  # LMDeploy's table joins these
        for joined in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if tables.keys() >= {*joined}:
                tables = {n: parts for n, parts in tables.items() if n not in joined}
                tables["qkv_proj" if "q_proj" in joined else "gate_up_proj"] = joined
    return [
        (module, layer, parts)
        for module, parts in tables.items()
        if used & {*parts}
        for layer in layers_with(model, parts[0])
    ]

"""Cases of a merge, and the digests that peft 0.21.2 (torch 2.13, CPU) gave for them.

Each case: dtype of the base, dtype of the adapter, its config, and further tensors of its file.
`test_against_peft` computes the digests anew where peft is installed.
"""

from __future__ import annotations

from typing import Any

CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "bf16": ("bfloat16", "float32", {}, {}),
    "bf16 of a bf16 adapter": ("bfloat16", "bfloat16", {}, {}),
    "fp16": ("float16", "float32", {}, {}),
    "fp16 of a bf16 adapter": ("float16", "bfloat16", {}, {}),
    "fp32 of an fp16 adapter": ("float32", "float16", {}, {}),
    "rslora": ("bfloat16", "float32", {"use_rslora": True, "r": 16, "lora_alpha": 8}, {}),
    "regex": ("bfloat16", "float32", {"target_modules": r".*layers.*(q|down)_proj"}, {}),
    "modules_to_save": (
        "bfloat16",
        "float32",
        {"modules_to_save": ["lm_head"]},
        {"base_model.model.lm_head.weight": (96, 32)},
    ),
    "dora": (
        "bfloat16",
        "float32",
        {"use_dora": True},
        {
            f"base_model.model.model.layers.{i}.{part}.lora_magnitude_vector": (32,)
            for i in range(2)
            for part in ("self_attn.q_proj", "mlp.down_proj")
        },
    ),
}
#: Without DoRA, whose norms and quotients are not exact.
GOLDEN: dict[str, str] = {
    "bf16": "9f0d337ca1d0b463",
    "bf16 of a bf16 adapter": "9f0d337ca1d0b463",
    "fp16": "6eabaf272824726e",
    "fp16 of a bf16 adapter": "6eabaf272824726e",
    "fp32 of an fp16 adapter": "90e7e2d6beb59599",
    "rslora": "18a25b1e2b296104",
    "regex": "9f0d337ca1d0b463",
    "modules_to_save": "b091b2a67beca004",
}

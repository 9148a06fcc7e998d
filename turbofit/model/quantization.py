"""How a checkpoint's linear layers are quantised; `families.engines` says who runs that."""

from __future__ import annotations

import contextlib
import re
from typing import Any, Final, Literal

from turbofit.core.errors import UsageError
from turbofit.core.model import Quantization
from turbofit.model.config import Section

__all__ = ["read_quantization"]

#: Group sizes that some engine of LMDeploy 0.18 takes.
_GROUPS: Final = {"awq": {32, 64, 128}, "gptq": {128}, "compressed-tensors": {32, 128}}
_DEEPEST: Final = 8


def read_quantization(config: Section) -> Quantization | None:
    """The ``quantization_config``, wherever in config.json it is; None where there is none.

    Raises:
        UsageError: a method or a variant of it that no engine runs.
    """
    values = _find(config.values, _DEEPEST)
    if not values:
        return None
    section = Section(values, f"{config.what}: quantization_config")
    method = section.string("quant_method", "")
    if method == "awq":
        if section.string("version", "") != "gemm":
            raise _refused(section, "an AWQ version other than gemm")
        return _int4(section, "awq", section.integer("bits", section.integer("w_bit", 4)))
    if method == "gptq":
        if section.boolean("desc_act", False) or not section.boolean("sym", True):
            raise _refused(section, "GPTQ with desc_act or without sym")
        return _int4(section, "gptq", section.integer("bits", 4))
    if method == "compressed-tensors":
        return _compressed(section)
    if method == "fp8":
        block = section.integers("weight_block_size")
        if block != (128, 128):
            raise _refused(section, "fp8 without scales for blocks of 128 x 128")
        skipped = section.strings("modules_to_not_convert")
        return Quantization(method="fp8", bits=8, group_size=128, unconverted=skipped)
    if method == "mxfp4":
        skipped = section.strings("modules_to_not_convert")
        return Quantization(method="mxfp4", bits=4, group_size=32, unconverted=skipped)
    raise _refused(section, f"the quantisation {method[:40]!r}")


def exempts(quantization: Quantization, module: str) -> bool:
    """Whether a config exempts a linear layer, such as ``linear_attn.in_proj_z``, in all layers.

    Names are of single layers, parts of names, or expressions behind ``re:``; one that names any
    layer's stands for all. Under for what the layers of a checkpoint do differently.
    """
    parent = module.rpartition(".")[0]
    for name in quantization.unconverted:
        pattern = name.removeprefix("re:")
        if pattern != name:
            with contextlib.suppress(re.error):
                if re.search(pattern, f"model.language_model.layers.0.{module}"):
                    return True
        elif name and (name in module or name.endswith((module, parent))):
            return True
    return False


def _int4(section: Section, method: Literal["awq", "gptq"], bits: int) -> Quantization:
    return _checked(section, method, bits, section, "modules_to_not_convert")


def _compressed(section: Section) -> Quantization:
    group = section.required("config_groups").required("group_0")
    weights = group.required("weights")
    stored = group.string("format", section.string("format", ""))
    if stored != "pack-quantized" or weights.string("type", "int") != "int":
        raise _refused(section, f"compressed-tensors as {stored[:40]!r}")
    bits = weights.integer("num_bits", 4)
    found = _checked(weights, "compressed-tensors", bits, section, "ignore")
    if not found.of_experts and not group.string("format", ""):
        # turbomind/converter.py: KeyError 'format'. Experts alone are the PyTorch engine's.
        raise UsageError(
            f"{section.what}: LMDeploy 0.18 does not start from config_groups without a format",
            hint=f'add "format": "{stored}" to its group_0 in config.json',
        )
    return found


def _checked(
    section: Section,
    method: Literal["awq", "gptq", "compressed-tensors"],
    bits: int,
    outer: Section,
    skipped: str,
) -> Quantization:
    """Four bits, and a group size that the engine takes."""
    group = section.integer("group_size", section.integer("q_group_size", 128))
    if bits != 4 or group not in _GROUPS[method]:
        raise _refused(outer, f"{method} with {bits} bits in groups of {group}")
    return Quantization(
        method=method, bits=bits, group_size=group, unconverted=outer.strings(skipped)
    )


def _refused(section: Section, what: str) -> UsageError:
    return UsageError(
        f"{section.what}: LMDeploy 0.18 does not run {what}",
        hint="take a checkpoint with AWQ (gemm) or GPTQ in groups of 128, or an unquantised one",
    )


def _find(values: dict[str, Any], depth: int) -> dict[str, Any] | None:
    """The first ``quantization_config`` in the config or its parts."""
    found = values.get("quantization_config")
    if isinstance(found, dict):
        return found
    if depth:
        for value in values.values():
            if isinstance(value, dict) and (inner := _find(value, depth - 1)):
                return inner
    return None
